"""Below the pages of the training widget: what can be done next, how far the fit is, and a line of plain words."""

from __future__ import annotations

from qtpy.QtWidgets import QPushButton, QSizePolicy, QWidget

from napari_calvae._napari.retraining import OFFERED, State
from napari_calvae._napari.run_bar import WorkBar

_BUTTONS = {
    "start": ("Start", "Fit the model to this recording; nothing changes until you keep the result"),
    "pause": ("Pause", "Hold the fit after this step, and go on later"),
    "cancel": ("Cancel", "Stop the fit; the old model stays"),
    "keep": ("Keep", "Infer with the fitted model from now on, until napari is closed"),
    "discard": ("Discard", "Forget the fitted model; the old one stays"),
    "save": ("Save as …", "Write the fitted model to a file, to load or share it later, and infer with it"),
    "load": ("Load …", "Infer with a model from a file"),
}


class TrainingBar(WorkBar):
    """Buttons of the present state, progress, status line."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent, buttons_first=False)
        self.buttons = {name: QPushButton(text) for name, (text, _) in _BUTTONS.items()}
        for name, button in self.buttons.items():
            button.setToolTip(_BUTTONS[name][1])
            button.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
            self.button_row.addWidget(button, 1)
        self.start, self.pause, self.cancel, self.keep, self.discard, self.save, self.load = self.buttons.values()
        self.set_state(State.IDLE)

    def set_state(self, state: State) -> None:
        """Show what can be done in this state."""
        for name, button in self.buttons.items():
            button.setVisible(name in OFFERED[state])
            button.setEnabled(True)
        self.pause.setText("Resume" if state is State.PAUSED else "Pause")
        self.progress.setVisible(state in (State.RUNNING, State.PAUSED))
