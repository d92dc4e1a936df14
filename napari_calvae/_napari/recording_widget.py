"""A dock that works on the movie and the ROIs of the inference widget: its work, its colours, its coming and going."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from napari.qt import get_qapp
from napari.utils.notifications import show_error
from napari.utils.theme import get_theme
from napari.viewer import Viewer
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QFileDialog, QFormLayout, QHBoxLayout, QSizePolicy, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import answers, session
from napari_calvae._napari.choices import Choices
from napari_calvae._napari.docking import DockManners
from napari_calvae._napari.inference_widget import InferenceWidget
from napari_calvae._napari.plot_items import Palette
from napari_calvae._napari.run_bar import RunBar
from napari_calvae._napari.time_plots import TimePlots
from napari_calvae._napari.work import Worker


class RecordingWidget(QWidget):
    """Has a bar to start work with and plots over time; what is worked out is up to its kinds.

    A kind says which work the start button asks for (``_order``) and what that depends on (``_conditions``), how a
    message of it is shown (``_show_message``), what it has to offer for these ROIs (``_offer``), what is shown of a
    picked one (``_on_picked``), and what is to be undone when work ends without a result (``_on_stopped``).

    ``finished`` is emitted when a result is shown, ``failed`` with the sentence that tells why there is none.
    """

    finished = Signal()
    failed = Signal(str)

    def __init__(self, viewer: Viewer, bar: RunBar, plots: TimePlots, height: int):
        super().__init__()
        self._viewer, self.bar, self.plots = viewer, bar, plots
        self._closed = self._attached = False
        self._requests = answers.Requests()
        self._inference: InferenceWidget | None = None
        #: Movie, ROIs and settings that were asked about, and those that the result shown was made of.
        self._asked_of: tuple | None = None
        self._made_of: tuple | None = None
        self._outdated = False
        self.setMinimumHeight(height)
        # napari puts a stretch beside what does not want all of a dock.
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self._worker = Worker(self)
        self._manners = DockManners(self, height, leave=self.detach, stay=self.attach, gone=self.close_down)
        self._worker.message.connect(self._on_message)
        bar.start.clicked.connect(self.start)
        bar.cancel.clicked.connect(self.cancel)
        plots.picked.connect(self._on_moment_picked)
        get_qapp().aboutToQuit.connect(self.close_down)

    # What each kind has of its own

    @abstractmethod
    def _order(self, number: int) -> Iterator[Any]:
        """Work that the start button asks for, or the sentence that says what is missing (raised)."""

    @abstractmethod
    def _conditions(self, choices: Choices) -> tuple:
        """All that a result depends on, as it is now; raises where there are no ROIs or no frame rate."""

    @abstractmethod
    def _show_message(self, message: Any) -> None:
        """Show what the work tells."""

    def _offer(self, rois: calvae.RoiMasks) -> None:
        """Offer what can be done with these ROIs."""

    def _on_stopped(self) -> None:
        """Show again what was there before the work."""

    def _on_picked(self, roi: int) -> None:
        """Show the ROI that was picked in the movie."""

    def _paint(self, palette: Palette) -> None:
        """Draw what is not the plots in these colours."""

    # Work

    def start(self) -> None:
        """Do the work."""
        number = self._requests.new()
        try:
            work = self._order(number)
            self._asked_of = self._conditions(self.inference.choices)
        except (calvae.RecordingError, OSError, ValueError) as error:
            self._fail(session.explain(error))
            return
        self.bar.set_running(True)
        self.bar.show_progress(0.0, "reading the traces")
        self._worker.start(work)

    def cancel(self) -> None:
        """Stop the work; what is shown stays."""
        self._stop()
        self.bar.say("Cancelled: what is shown stays as it was.")

    def _stop(self) -> None:
        self._requests.new()
        self._worker.stop()
        self.bar.set_running(False)
        self._on_stopped()

    def _done(self, sentence: str) -> None:
        """Say that a result is shown."""
        self.bar.set_running(False)
        self.bar.say(sentence)
        self._shows_what_was_asked()
        self.finished.emit()

    def _shows_what_was_asked(self) -> None:
        """From now on what is shown is made of what was asked about; that may have changed meanwhile."""
        self._made_of = self._asked_of
        self._set_outdated(False)
        self._check_shown()

    def _check_shown(self, *_: object) -> None:
        """Say so where movie, ROIs or settings are no longer those that what is shown was made of, and dim it."""
        if self._made_of is None or self._inference is None:
            return
        try:
            outdated = self._conditions(self._inference.choices) != self._made_of
        except (calvae.RecordingError, ValueError):
            outdated = True
        if outdated == self._outdated:
            return
        self._set_outdated(outdated)
        self.bar.say(self._told_outdated() if outdated else "What is shown goes with movie, ROIs and settings again.")

    def _set_outdated(self, outdated: bool) -> None:
        """Dim what is shown, or no longer; a kind that shows more than plots over time dims that, too."""
        self._outdated = outdated
        self.plots.set_outdated(outdated)

    def _told_outdated(self) -> str:
        start = self.bar.start.text()
        return f"What is shown was made of another movie, other ROIs or other settings: press {start} again."

    def _on_message(self, message: Any) -> None:
        if not self._requests.wants(message.number):
            return
        if isinstance(message, answers.Progress):
            self.bar.show_progress(message.fraction, message.doing)
        elif isinstance(message, answers.Failure):
            self.bar.set_running(False)
            self._on_stopped()
            self._fail(message.sentence)
        else:
            self._show_message(message)

    def _fail(self, sentence: str) -> None:
        self.bar.say(sentence, error=True)
        show_error(sentence)
        self.failed.emit(sentence)

    def _lay_panel(
        self, width: int, rows: Sequence[tuple[str, QWidget]], below: Sequence[tuple[QWidget, int]], beside: QWidget
    ) -> None:
        """A panel of labelled rows, the bar and what is ``below`` it (with its stretch), at the left of a widget."""
        form = QFormLayout()
        form.setContentsMargins(0, 0, 0, 0)
        form.setVerticalSpacing(3)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        for label, field in rows:
            form.addRow(label, field) if label else form.addRow(field)
        panel = QWidget()
        panel.setFixedWidth(width)
        column = QVBoxLayout(panel)
        column.setContentsMargins(0, 0, 6, 0)
        column.setSpacing(4)
        column.addLayout(form)
        column.addWidget(self.bar)
        for widget, stretch in below:
            column.addWidget(widget, stretch)
        if not any(stretch for _, stretch in below):
            column.addStretch(1)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(6, 4, 4, 2)
        layout.addWidget(panel)
        layout.addWidget(beside, 1)

    def _tab_through(self, *widgets: QWidget) -> None:
        """Let the tab key go through these, and the bar's buttons among them, in this order."""
        for one, other in itertools.pairwise(widgets):
            QWidget.setTabOrder(one, other)

    def save(self, title: str, name: str, kinds: str, write: Callable[[Path], str]) -> None:
        """Ask for a file and write into it; ``write`` returns what was done, in words."""
        path, _ = QFileDialog.getSaveFileName(self, title, name, kinds)
        if not path:
            return
        try:
            self.bar.say(write(Path(path)))
        except (OSError, ValueError) as error:
            self._fail(session.explain(error))

    # Movie, ROIs and time of the inference widget

    @property
    def inference(self) -> InferenceWidget:
        """The inference widget of this viewer; it is opened if it is not."""
        inference = InferenceWidget.of(self._viewer)
        if inference is not self._inference:
            self._let_go()
            self._inference = inference
            for signal, slot in self._links(inference):
                signal.connect(slot)
        return inference

    def _links(self, inference: InferenceWidget) -> list[tuple[Any, Callable[..., None]]]:
        return [
            (inference.controls.layers_chosen, self._on_layers),
            (inference.controls.frame_rate_typed, self._on_layers),  # without one, ROIs are not read
            (inference.controls.changed, self._check_shown),
            (inference.results_changed, self._check_shown),
            (inference.shown, self._on_picked),
            (inference.destroyed, self._on_inference_gone),
        ]

    def _let_go(self) -> None:
        if self._inference is not None:
            for signal, slot in self._links(self._inference):
                signal.disconnect(slot)
        self._inference = None

    def _on_layers(self, *_: object) -> None:
        """Offer what movie and ROIs have; say so where what is shown was made of others."""
        try:
            rois = self.inference.choices.rois()[2]
        except (calvae.RecordingError, ValueError):
            pass  # said when the work is asked for
        else:
            self._offer(rois)
        self._check_shown()

    def _on_inference_gone(self, *_: object) -> None:
        self._inference = None

    def _time(self) -> tuple[session.Clock, int] | None:
        """Clock of the movie, and the viewer's axis along which its time runs; None where they are not known."""
        choices = None if self._inference is None else self._inference.choices
        if choices is None or choices.clock is None or choices.movie is None:
            return None
        axis = self._viewer.dims.ndim - choices.movie.ndim
        return (choices.clock, axis) if axis >= 0 else None

    def _on_slider(self, *_: object) -> None:
        if (time := self._time()) is not None:
            clock, axis = time
            self.plots.set_cursor(clock.seconds(self._viewer.dims.point[axis]))

    def _on_moment_picked(self, seconds: float) -> None:
        if (time := self._time()) is not None:
            clock, axis = time
            self._viewer.dims.set_point(axis, clock.point(seconds))

    def _on_theme(self, *_: object) -> None:
        theme = get_theme(self._viewer.theme)
        palette = Palette.on(theme.background.as_hex(), theme.text.as_hex())
        self.plots.set_palette(palette)
        self._paint(palette)

    # Coming and going

    def attach(self) -> None:
        """Listen to the viewer and its inference widget."""
        if self._attached or self._closed:
            return
        self._attached = True
        self._viewer.events.theme.connect(self._on_theme)
        self._viewer.dims.events.point.connect(self._on_slider)
        self.inference  # noqa: B018 - links with it
        self._on_theme()
        self._on_layers()

    def detach(self) -> None:
        """Stop all work and wait for its end, let go of the viewer."""
        if not self._attached:
            return
        self._attached = False
        self._viewer.events.theme.disconnect(self._on_theme)
        self._viewer.dims.events.point.disconnect(self._on_slider)
        self._let_go()
        self._stop()
        self._worker.close()

    def close_down(self) -> None:
        """Leave nothing behind; the widget is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        get_qapp().aboutToQuit.disconnect(self.close_down)
        self.detach()
        self._dispose()
        self.deleteLater()

    def _dispose(self) -> None:
        self.plots.dispose()
