"""A click beside all ROIs adds a disc: where it was clicked, or on the middle of the cell next to it."""

from __future__ import annotations

from napari.layers import Labels, Points
from napari.viewer import Viewer
from qtpy.QtCore import QObject, Signal

import napari_calvae as calvae
from napari_calvae._napari import answers, picking, session
from napari_calvae._napari.choices import Choices
from napari_calvae._napari.controls import Controls
from napari_calvae._napari.work import Worker


class Placing(QObject):
    """Adds discs to the chosen ROIs; ``placed`` is emitted with the new ROI's id, ``failed`` with a sentence.

    Parameters
    ----------
    parent
        Lives and dies with it.
    viewer, controls, choices
        Where discs go, how large they are, and what was chosen.
    """

    placed = Signal(int)
    failed = Signal(str)

    def __init__(self, parent: QObject, viewer: Viewer, controls: Controls, choices: Choices):
        super().__init__(parent)
        self._viewer, self._controls, self._choices = viewer, controls, choices
        self._requests = answers.Requests()
        self._click = (0.0, 0.0)
        self._plane = 0
        self._worker = Worker(self)
        self._worker.message.connect(self._on_message)

    def place(self, click: tuple[float, float]) -> None:
        """Add a disc at (y, x), in pixels of the movie; with snapping as soon as the cell next to it was found."""
        self._click, self._plane, number = click, self._choices.plane, self._requests.new()
        if self._controls.snap.isChecked():
            diameter = self._controls.diameter.value()
            self._worker.start(answers.iter_peak(number, self._choices.frames, click, diameter))
        else:
            self._add(click)

    def give_up(self) -> None:
        """Place nothing that has not been placed yet."""
        self._requests.new()
        self._worker.stop()

    def close(self) -> None:
        """The same, and wait for the end of the thread."""
        self._requests.new()
        self._worker.close()

    def _on_message(self, message: answers.Message) -> None:
        if isinstance(message, answers.Ready) or not self._requests.wants(message.number):
            return
        if isinstance(message, answers.Failure):
            self.failed.emit(message.sentence)
        elif isinstance(message, answers.Peak) and self._choices.plane != self._plane:
            self._controls.say(
                "The plane changed while the cell was looked for: no disc was added. Click again.", error=True
            )
        elif isinstance(message, answers.Peak):
            try:
                peak = tuple(session.landing(self._choices.labels(), self._click, message.place))
                self._add((peak[0], peak[1]))
            except (calvae.RecordingError, ValueError) as error:
                self.failed.emit(session.explain(error))

    def _add(self, place: tuple[float, float]) -> None:
        movie, layer = self._choices.chosen_movie(), self._choices.roi_layer
        if isinstance(layer, Points):
            roi = picking.add_point(self._viewer, layer, movie, place)
        else:
            old = layer if isinstance(layer, Labels) else None
            diameter = self._controls.diameter.value()
            layer = picking.add_disc(self._viewer, old, movie, place, diameter, self._choices.plane)
            roi = int(layer.selected_label)
        self._controls.choose_rois(layer)
        self.placed.emit(roi)
