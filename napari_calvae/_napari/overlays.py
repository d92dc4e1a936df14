"""What can be laid over the plots and the movie: true spikes, a rival's estimate, cells that light up."""

from __future__ import annotations

import numpy as np
from napari.layers import Image
from napari.viewer import Viewer
from qtpy.QtCore import QObject, QTimer, Signal

import napari_calvae as calvae
from napari_calvae._napari import activity, answers, picking
from napari_calvae._napari.choices import Choices
from napari_calvae._napari.plots import PosteriorPlots
from napari_calvae._napari.work import Worker

#: Name of the layer in which cells light up.
LAYER = "inferred activity"
#: Pause (ms) in which further results may come before the layer is painted again.
_PAUSE = 200


class Overlays(QObject):
    """Keeps the overlays that are switched on true to what is shown; ``failed`` is emitted with a sentence.

    Parameters
    ----------
    parent
        Lives and dies with it.
    viewer, plots, choices, results
        Where things are drawn, what was chosen, and what has been inferred.
    """

    failed = Signal(str)

    def __init__(
        self, parent: QObject, viewer: Viewer, plots: PosteriorPlots, choices: Choices, results: answers.Results
    ):
        super().__init__(parent)
        self._viewer, self._plots, self._choices, self._results = viewer, plots, choices, results
        self._requests = answers.Requests()
        self._worker = Worker(self)
        self._layer: Image | None = None
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(_PAUSE)
        self._later.timeout.connect(self._paint)
        self._worker.message.connect(self._on_rival)
        plots.truth_button.toggled.connect(self.on_shown)
        plots.rival_button.toggled.connect(self.on_shown)
        plots.activity_button.toggled.connect(self._on_activity)

    def on_shown(self, *_: object) -> None:
        """Lay over the picture what belongs to it."""
        picture = self._plots.picture
        known = None if picture is None else self._truth(picture.roi_ids[0])
        self._plots.truth_button.setEnabled(known is not None)
        self._plots.set_truth(known if self._plots.truth_button.isChecked() else None)
        number = self._requests.new()
        if picture is None or not self._plots.rival_button.isChecked():
            self._plots.set_rival(None)
            return
        self._worker.start(answers.iter_rival(number, picture.traces))

    def on_results_changed(self, *_: object) -> None:
        """Renew the pinned cells, and paint all again, soon."""
        self._renew_pinned()
        if self._plots.activity_button.isChecked() and not self._later.isActive():
            self._later.start()

    def _renew_pinned(self) -> None:
        if not self._plots.pinned.cells:
            return
        try:
            key = self._choices.rois()[0]
        except (calvae.RecordingError, ValueError):
            key = None  # nothing holds of what was chosen before
        for roi, cell in self._plots.pinned.cells.items():
            known = None if key is None else self._results.get(key, roi)
            if known is None:
                cell.set_outdated()
            elif known.rate is not cell.picture.rate:
                cell.set_picture(known)

    def close(self) -> None:
        """Take the layer away and stop all work."""
        self._later.stop()
        self._worker.close()
        self._remove()

    def _truth(self, roi: int) -> np.ndarray | None:
        """Spike times (s) of a ROI as the metadata of its layer have them."""
        layer = self._choices.roi_layer
        times = None if layer is None else layer.metadata.get("spike_times", {}).get(roi)
        return None if times is None else np.asarray(times, float)

    def _on_rival(self, message: answers.Message) -> None:
        if isinstance(message, answers.Failure) and self._requests.wants(message.number):
            self._plots.rival_button.setChecked(False)
            self.failed.emit(message.sentence)
        elif isinstance(message, answers.Rival) and self._requests.wants(message.number):
            self._plots.set_rival(message.estimate)

    def _on_activity(self, on: bool) -> None:
        if on:
            self._paint()
        elif self._layer is not None:
            self._layer.visible = False
            self._blank()

    def _blank(self) -> None:
        """Let nothing glow; the layer stays: napari holds on to those that are gone, one a click would fill memory."""
        if self._layer is not None:
            self._layer.data = np.zeros_like(self._layer.data[:1])

    def _on_visible(self) -> None:
        """Follow the eye in napari's list of layers."""
        if self._layer is not None:
            self._plots.activity_button.setChecked(self._layer.visible)

    def _paint(self) -> None:
        if not self._plots.activity_button.isChecked():
            return
        try:
            key, labels, _ = self._choices.rois()
        except (calvae.RecordingError, ValueError):
            self._blank()
            return
        rows = {roi: self._results.rows[roi] for roi in self._results.known(key)}
        if not rows:
            self._blank()
            return
        movie = self._choices.chosen_movie()
        try:
            data, top = activity.paint(rows, labels), activity.brightest(rows)
        except calvae.RecordingError as error:
            self._plots.activity_button.setChecked(False)
            self.failed.emit(str(error))
            return
        place = picking.placed(movie, range(movie.ndim))
        if movie.ndim == 4:  # lies on the plane of its cells, and is not seen on others
            data = data[:, None]
            place["translate"] = place["translate"] + np.array([0, key.plane * movie.scale[1], 0, 0])
        if self._layer is not None and self._layer in self._viewer.layers and self._layer.ndim != movie.ndim:
            self._remove()
        if self._layer is not None and self._layer in self._viewer.layers:
            self._layer.data = data
            for name, wanted in place.items():
                setattr(self._layer, name, wanted)
            self._layer.contrast_limits = (0.0, top)
            self._layer.visible = True
            return
        active = self._viewer.layers.selection.active
        self._layer = Image(
            data,
            name=LAYER,
            metadata={picking.OWN: True},
            **place,
            units=movie.units,
            axis_labels=movie.axis_labels,
            blending="additive",
            colormap="inferno",
            contrast_limits=(0.0, top),
        )
        self._layer.events.visible.connect(self._on_visible)
        self._viewer.add_layer(self._layer)
        self._viewer.layers.selection.active = active

    def _remove(self) -> None:
        if self._layer is not None and self._layer in self._viewer.layers:
            self._viewer.layers.remove(self._layer)
        self._layer = None
