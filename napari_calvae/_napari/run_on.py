"""“Run on …”: where all ROIs are inferred, chosen from a small menu; how far a run into a store is, in a line."""

from __future__ import annotations

import os
from pathlib import Path
from weakref import WeakKeyDictionary

from napari.layers import Layer
from qtpy.QtCore import QObject, Qt
from qtpy.QtGui import QAction, QActionGroup
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QInputDialog, QLabel, QMenu, QSizePolicy, QToolButton, QWidget

from napari_calvae._napari import running
from napari_calvae._napari.inference_widget import InferenceWidget

#: What the menu offers besides memory: words, the question, what stands in the box at first.
_PLACES = {
    "local": ("This computer, several processes …", "Number of processes", ""),
    "scheduler": ("A Dask scheduler …", "Address of the scheduler", "tcp://"),
    "queue": ("A queue of jobs …", "Queue and number of jobs: slurm, pbs, lsf or sge", "slurm:10"),
}
_STORE = "Zarr store (*.zarr)"


class RunOn(QToolButton):
    """The arrow beside “Infer all”, with its menu.

    ``scheduler`` is None for memory, else as in `calvae.iter_batch`.
    """

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.scheduler: str | None = None
        self.setPopupMode(QToolButton.ToolButtonPopupMode.InstantPopup)
        self.setArrowType(Qt.ArrowType.DownArrow)
        self.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonIconOnly)
        menu = QMenu("Run on", self)
        menu.setToolTipsVisible(True)
        group = QActionGroup(menu)
        self.memory = QAction("This computer, in memory", menu)
        self.memory.setToolTip("As fast as a click allows; for thousands of ROIs choose one of the others")
        self.memory.triggered.connect(lambda: self.choose(None))
        self.places: dict[str, QAction] = {}
        for kind, (words, _, _) in _PLACES.items():
            action = self.places[kind] = QAction(words, menu)
            action.setToolTip("Results go into a Zarr store; what was stopped goes on when it is asked for again")
            action.triggered.connect(lambda _checked, kind=kind: self.ask(kind))
        for action in (self.memory, *self.places.values()):
            action.setCheckable(True)
            group.addAction(action)
            menu.addAction(action)
        menu.addSeparator()
        self.go_on = QAction("Go on with a store …", menu)
        self.go_on.setToolTip("Infer what is missing in a store that was begun with the same ROIs and settings")
        menu.addAction(self.go_on)
        self.setMenu(menu)
        self.choose(None)

    def choose(self, scheduler: str | None) -> None:
        """Run there from now on."""
        self.scheduler = scheduler
        where = self.kind
        (self.memory if where is None else self.places[where]).setChecked(True)
        self.setToolTip(f"“Infer all” runs on: {scheduler or 'this computer, in memory'}. Choose another place here")

    @property
    def kind(self) -> str | None:
        """Entry of the menu that the scheduler belongs to; None is memory."""
        if self.scheduler is None:
            return None
        return "local" if self.scheduler.startswith("local") else "scheduler" if "://" in self.scheduler else "queue"

    def ask(self, kind: str) -> None:
        """Ask for the rest of the choice."""
        _, question, first = _PLACES[kind]
        before = self.scheduler if self.scheduler is not None and self.kind == kind else first
        if kind == "local":
            n_cores = os.cpu_count() or 1
            known = before.partition(":")[2]
            number, said = QInputDialog.getInt(self, "Run on", question, int(known or n_cores), 1, 8 * n_cores)
            text = f"local:{number}"
        else:
            text, said = QInputDialog.getText(self, "Run on", question, text=before)
        # What was asked for and not answered leaves the choice as it was.
        self.choose(text.strip() if said and text.strip() else self.scheduler)


class RunLine(QWidget):
    """One line that is seen while a run goes on: how far it is, the dashboard, and a button that stops it."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.words = QLabel()
        self.words.setTextFormat(Qt.TextFormat.RichText)
        self.words.setOpenExternalLinks(True)
        self.words.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.stop = QToolButton()
        self.stop.setText("✕")
        self.stop.setToolTip("Stop; what is in the store stays, and “Infer all” goes on with it")
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(4)
        row.addWidget(self.words, 1)
        row.addWidget(self.stop)
        self.hide()


class Runs(QObject):
    """Starts runs as the menu has it, and shows how far they are.

    Parameters
    ----------
    button, line
        The menu, and where to tell.
    """

    def __init__(self, button: RunOn, line: RunLine):
        super().__init__(button)
        self._button, self._line = button, line
        self._inference: InferenceWidget | None = None
        self._layer: Layer | None = None
        #: Stores that runs on these layers were begun with, to go on with them.
        self._begun: WeakKeyDictionary[Layer, Path] = WeakKeyDictionary()
        button.go_on.triggered.connect(self.resume)
        line.stop.clicked.connect(self._stop)

    def start(self, inference: InferenceWidget) -> None:
        """Infer all ROIs where the menu says."""
        self._inference = inference
        layer = self._layer = inference.choices.roi_layer
        if self._button.scheduler is None:
            inference.infer_all()
        elif layer is not None and layer in self._begun:
            # It is told again as soon as it goes on; if it cannot, another store is asked for the next time.
            out = self._begun.pop(layer)
            if not inference.infer_into(out, self._button.scheduler):
                self._begun[layer] = out
        else:
            self._ask(inference, layer)

    def resume(self) -> None:
        """Ask for a store that was begun, and go on with it where the menu says."""
        path = QFileDialog.getExistingDirectory(self._button, "Go on with a store")
        if path and self._inference is not None:
            self._layer = self._inference.choices.roi_layer
            self._inference.infer_into(path, self._button.scheduler)

    def _ask(self, inference: InferenceWidget, layer: Layer | None) -> None:
        name = "spikes.zarr" if layer is None else f"{layer.name.replace(' ROIs', '').replace('/', ' ')} spikes.zarr"
        path, _ = QFileDialog.getSaveFileName(self._button, "Store of the results", name, _STORE)
        if path:
            inference.infer_into(path if path.endswith(".zarr") else f"{path}.zarr", self._button.scheduler)

    def follow(self, inference: InferenceWidget | None) -> None:
        """Work with this widget from now on."""
        self._inference = inference
        self.show(None)

    def show(self, state: running.Running | None) -> None:
        """Tell how far a run is; None if there is none."""
        if state is not None and self._layer is not None:
            if state.ended:
                self._begun.pop(self._layer, None)
            elif state.total:  # there is a store
                self._begun[self._layer] = state.out
        self._line.setVisible(state is not None and not state.ended)
        if state is not None:
            self._line.words.setText(state.words)
            self._line.words.setToolTip(str(state.out))

    def _stop(self) -> None:
        if self._inference is not None:
            self._inference.cancel()
