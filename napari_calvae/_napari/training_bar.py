"""Below the pages of the training widget: what can be done next, how far the fit is, and a line of plain words."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QHBoxLayout, QLabel, QProgressBar, QPushButton, QSizePolicy, QVBoxLayout, QWidget

from napari_calvae._napari.retraining import OFFERED, State

_ERROR = "color: #ff6b6b;"
_BUTTONS = {
    "start": ("Start", "Fit the model to this recording; nothing changes until you keep the result"),
    "pause": ("Pause", "Hold the fit after this step, and go on later"),
    "cancel": ("Cancel", "Stop the fit; the old model stays"),
    "keep": ("Keep", "Infer with the fitted model from now on, until napari is closed"),
    "discard": ("Discard", "Forget the fitted model; the old one stays"),
    "save": ("Save as …", "Write the fitted model to a file, to load or share it later, and infer with it"),
    "load": ("Load …", "Infer with a model from a file"),
}


class TrainingBar(QWidget):
    """Buttons of the present state, progress, status line."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.buttons = {name: QPushButton(text) for name, (text, _) in _BUTTONS.items()}
        row = QHBoxLayout()
        row.setSpacing(4)
        for name, button in self.buttons.items():
            button.setToolTip(_BUTTONS[name][1])
            button.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
            row.addWidget(button, 1)
        self.start, self.pause, self.cancel, self.keep, self.discard, self.save, self.load = self.buttons.values()
        self.progress = QProgressBar()
        self.progress.setMaximum(1000)
        self.progress.setFixedHeight(16)
        self.status = QLabel()
        self.status.setWordWrap(True)
        self.status.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.status.setMinimumHeight(34)
        self.status.setAlignment(Qt.AlignmentFlag.AlignTop)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(4)
        column.addWidget(self.progress)
        column.addWidget(self.status)
        column.addLayout(row)
        self.set_state(State.IDLE)

    def set_state(self, state: State) -> None:
        """Show what can be done in this state."""
        for name, button in self.buttons.items():
            button.setVisible(name in OFFERED[state])
            button.setEnabled(True)
        self.pause.setText("Resume" if state is State.PAUSED else "Pause")
        self.progress.setVisible(state in (State.RUNNING, State.PAUSED))

    def show_progress(self, fraction: float, words: str) -> None:
        """Say how far the fit is."""
        self.progress.setValue(round(1000 * fraction))
        self.progress.setFormat(words)

    def say(self, sentence: str, error: bool = False) -> None:
        """Write into the status line."""
        self.status.setStyleSheet(_ERROR if error else "")
        self.status.setText(sentence)
        self.status.setToolTip(sentence)
