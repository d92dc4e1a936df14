"""Start and cancel long work, see how far it is, read a line of plain words."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QHBoxLayout, QLabel, QProgressBar, QPushButton, QSizePolicy, QVBoxLayout, QWidget

_ERROR = "color: #ff6b6b;"


class WorkBar(QWidget):
    """Progress and status line; its kinds add buttons to ``button_row``, above or below."""

    def __init__(self, parent: QWidget | None = None, *, buttons_first: bool):
        super().__init__(parent)
        self.button_row = QHBoxLayout()
        self.button_row.setSpacing(4)
        self.progress = QProgressBar()
        self.progress.setMaximum(1000)
        self.progress.setFixedHeight(16)
        self.progress.setToolTip("How far it is")
        self.status = QLabel()
        self.status.setWordWrap(True)
        self.status.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        self.status.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.status.setMinimumHeight(34)
        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(4)
        if buttons_first:
            column.addLayout(self.button_row)
        column.addWidget(self.progress)
        column.addWidget(self.status)
        if not buttons_first:
            column.addLayout(self.button_row)

    def show_progress(self, fraction: float, words: str) -> None:
        """Say how far it is (0 to 1)."""
        self.progress.setValue(round(1000 * fraction))
        self.progress.setFormat(words)

    def say(self, sentence: str, error: bool = False) -> None:
        """Write into the status line."""
        self.status.setStyleSheet(_ERROR if error else "")
        self.status.setText(sentence)
        self.status.setToolTip(sentence)


class RunBar(WorkBar):
    """Two buttons, progress, status line.

    Parameters
    ----------
    start, tip
        What the first button says, and what it does, in words.
    """

    def __init__(self, start: str, tip: str, parent: QWidget | None = None):
        super().__init__(parent, buttons_first=True)
        self.start, self.cancel = QPushButton(start), QPushButton("Cancel")
        self.start.setToolTip(tip)
        self.cancel.setToolTip("Stop; what is shown stays as it was")
        for button in (self.start, self.cancel):
            self.button_row.addWidget(button, 1)
        self.status.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.MinimumExpanding)
        self.set_running(False)

    def set_running(self, running: bool) -> None:
        """Show whether something is being done."""
        self.start.setEnabled(not running)
        self.cancel.setEnabled(running)
        self.progress.setVisible(running)
