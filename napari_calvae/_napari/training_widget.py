"""The dock widget that fits a model to this recording, shows what that changes, and how far a result can be trusted."""

from __future__ import annotations

from pathlib import Path

from napari.qt import get_qapp
from napari.utils.notifications import show_error
from napari.utils.theme import get_theme
from napari.viewer import Viewer
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QFileDialog, QTabWidget, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import answers, recovery, retraining, session, trust
from napari_calvae._napari.docking import DockManners
from napari_calvae._napari.inference_widget import InferenceWidget
from napari_calvae._napari.plot_items import Palette
from napari_calvae._napari.retraining import State
from napari_calvae._napari.training_bar import TrainingBar
from napari_calvae._napari.training_form import TrainingForm
from napari_calvae._napari.training_plots import ComparisonPlots, CurvePlots
from napari_calvae._napari.trust_panel import TrustPanel
from napari_calvae._napari.work import Worker

WIDTH = 310
_FILTER = "Models (*.safetensors)"


class TrainingWidget(QWidget):
    """Fit, watch, compare, keep; and ask how far a cell can be trusted.

    ``ready`` is emitted when the form is there, ``finished`` when a fit has come to its end, ``trusted`` when an
    expectation is shown, ``failed`` with the sentence that tells why something is not.
    """

    ready = Signal()
    finished = Signal()
    trusted = Signal()
    failed = Signal(str)

    def __init__(self, napari_viewer: Viewer):
        super().__init__()
        self._viewer = napari_viewer
        self._closed = self._attached = False
        self._requests, self._questions = answers.Requests(), answers.Requests()
        self._parameters: tuple = ()
        self.state = State.IDLE
        self.fitted: retraining.Fitted | None = None
        self._objective = ""
        self.form: TrainingForm | None = None
        self.curves, self.comparison, self.trust = CurvePlots(), ComparisonPlots(), TrustPanel()
        self._lay_out()
        self._fit, self._asked = Worker(self), Worker(self)
        self._manners = DockManners(self, None, leave=self.detach, stay=self.attach, gone=self.close_down)
        self._connect()
        self._on_theme()
        self.bar.start.setEnabled(False)
        self.bar.say("Starting …")

    def _lay_out(self) -> None:
        self.setMinimumWidth(WIDTH)
        self.tabs = QTabWidget()
        self.tabs.setDocumentMode(True)
        for page, title, tip in (
            (self.curves, "Curves", "Loss, bound and parameters while the model is fitted"),
            (self.comparison, "Cell", "The picked cell by the old model and by the new one"),
            (self.trust, "Trust", "How well the spikes of the picked cell can be inferred"),
        ):
            self.tabs.setTabToolTip(self.tabs.addTab(page, title), tip)
        self.bar = TrainingBar()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 2, 6, 4)
        layout.setSpacing(4)
        layout.addWidget(self.tabs, 1)
        layout.addWidget(self.bar)

    def _connect(self) -> None:
        for name, button in self.bar.buttons.items():
            button.clicked.connect(getattr(self, f"_on_{name}"))
        self.trust.ask.clicked.connect(self._on_trust)
        self.tabs.currentChanged.connect(self._offer_models)
        self._fit.message.connect(self._on_message)
        self._asked.message.connect(self._on_answer)
        get_qapp().aboutToQuit.connect(self.close_down)
        self.attach()

    # What is pressed

    def _on_start(self) -> None:
        if self.form is None:
            return
        try:
            order = self._order(self.form)
        except (calvae.RecordingError, ValueError) as error:
            self._fail(session.explain(error))
            return
        self.fitted, self._objective = None, order.objective
        self.curves.clear()
        self.comparison.clear()
        self._set_state(State.RUNNING)
        self.bar.show_progress(0.0, "reading the traces")
        self.bar.say(f"Fitting to {len(order.wanted)} ROIs; ROI {order.cell} is shown on the way.")
        if self.tabs.currentWidget() in (self.form, self.trust):
            self.tabs.setCurrentWidget(self.curves)
        self._fit.start(retraining.iter_retrain(order))

    def _order(self, form: TrainingForm) -> retraining.Order:
        inference = InferenceWidget.of(self._viewer)
        key, _, masks = inference.choices.rois()
        wanted = form.wanted(masks.ids, inference.picked_roi)
        cell = inference.picked_roi if inference.picked_roi in masks.ids else wanted[0]
        return retraining.Order(
            self._requests.new(),
            inference.choices.frames,
            masks,
            wanted,
            cell,
            key.settings,
            form.base.currentData() or key.settings.model,
            form.objective.currentData(),
            form.config(),
            form.generative.currentData(),
            form.noise.currentData(),
            form.spikes_path,
        )

    def _on_pause(self) -> None:
        if self.state is State.RUNNING:
            self._fit.pause()
            self._set_state(State.PAUSED)
            self.bar.say("Paused after this step. Resume goes on, Cancel keeps the old model.")
        else:
            self._set_state(State.RUNNING)
            self.bar.say("Going on.")

    def _on_cancel(self) -> None:
        self._requests.new()
        self._fit.stop()
        self._set_state(State.IDLE)
        self.bar.say("Cancelled: the old model stays as it was.")

    def _on_keep(self) -> None:
        if self.fitted is not None:
            self._use(
                lambda fitted: fitted.path or retraining.keep(fitted.model, recovery.folder(), self._objective),
                "Kept as",
            )

    def _on_discard(self) -> None:
        if self.fitted is not None and self.fitted.path is not None:
            self.fitted.path.unlink(missing_ok=True)
        self.fitted = None
        self._set_state(State.IDLE)
        self.bar.say("Discarded: the old model stays as it was.")

    def _on_save(self) -> None:
        name, _ = QFileDialog.getSaveFileName(self, "Save the fitted model", "fitted" + retraining.SUFFIX, _FILTER)
        if name and self.fitted is not None:
            path = Path(name)
            # The dialog has asked about a file of exactly this name, and about no other.
            told = path.suffix == retraining.SUFFIX
            self._use(lambda fitted: retraining.save(fitted.model, path, overwrite=told), "Saved as")

    def _on_load(self) -> None:
        name, _ = QFileDialog.getOpenFileName(self, "Load a model", "", _FILTER)
        if not name:
            return
        try:
            described = calvae.load_model(name, coupled=False).description
        except (OSError, ValueError) as error:
            self._fail(session.explain(error))
            return
        self._infer_with(Path(name))
        self.bar.say(f"Inferring with {Path(name).stem} ({described}).")

    def _use(self, write, done: str) -> None:
        try:
            path = write(self.fitted)
        except (OSError, ValueError) as error:
            self._fail(session.explain(error))
            return
        self._infer_with(path)
        self._set_state(State.KEPT)
        for_good = "" if done == "Saved as" else " Save as … has it for good."
        self.bar.say(f"{done} “{path.stem}”; it is the model of the spike inference now.{for_good}")

    def _infer_with(self, path: Path) -> None:
        InferenceWidget.of(self._viewer).use_model(str(path))
        self._offer_models()

    def _on_trust(self) -> None:
        inference = InferenceWidget.of(self._viewer)
        try:
            key = inference.choices.rois()[0]
            roi = inference.picked_roi
            result = None if roi is None else inference.results.get(key, roi)
            if result is None:
                raise calvae.RecordingError(
                    "Trust: expected a picked cell, got none whose spikes are inferred. Click a ROI in the movie first."
                )
        except (calvae.RecordingError, ValueError) as error:
            self._fail(session.explain(error))
            return
        self.trust.ask.setEnabled(False)
        self.trust.verdict.setText(f"ROI {roi}: simulating and inferring …")
        self._asked.start(trust.iter_trust(self._questions.new(), result, key.settings.model))

    # What is told

    def _on_message(self, message: retraining.Message) -> None:
        if isinstance(message, retraining.Offer):
            self._show_form(message.options)
        elif isinstance(message, answers.Failure) and message.number == 0:
            self._fail(message.sentence)
        elif not self._requests.wants(message.number):
            return
        elif isinstance(message, answers.Progress):
            self.bar.show_progress(0.0, message.doing)
        elif isinstance(message, answers.Failure):
            self._set_state(State.IDLE)
            self._fail(message.sentence)
        elif isinstance(message, retraining.Remark):
            self.bar.say(message.sentence)
        elif isinstance(message, retraining.Step):
            left = retraining.told(message.seconds_left) if message.step > 1 else "…"
            self.bar.show_progress(
                message.step / message.n_steps, f"step {message.step} of {message.n_steps}, {left} left"
            )
            self.curves.add_terms(message.step, message.terms, self._parameters)
        elif isinstance(message, retraining.Glimpse):
            self._show_glimpse(message)
        else:
            self._show_fitted(message)

    def _show_form(self, options: calvae.FitOptions) -> None:
        self.form = TrainingForm(options)
        self.form.failed.connect(self._fail)
        self.tabs.setTabToolTip(self.tabs.insertTab(0, self.form, "Settings"), "What to fit, to what, and how")
        self.tabs.setCurrentIndex(0)
        self._offer_models()
        self._set_state(State.IDLE)
        self.bar.say("Choose what to fit, then press Start. Nothing changes until you keep the result.")
        self.ready.emit()

    def _offer_models(self, *_: object) -> None:
        if self.form is not None:
            box = InferenceWidget.of(self._viewer).controls.model
            names = [(box.itemText(i), box.itemData(i)) for i in range(box.count())]
            self.form.set_models(names, box.currentData())

    def _show_glimpse(self, glimpse: retraining.Glimpse) -> None:
        self._parameters = glimpse.parameters
        self.curves.add_theta(glimpse.step, glimpse.inference, glimpse.parameters)
        if glimpse.step == 0:
            self.comparison.set_before(glimpse.inference, "before")
        else:
            self.comparison.set_after(glimpse.inference, f"after step {glimpse.step}")

    def _show_fitted(self, fitted: retraining.Fitted) -> None:
        self.fitted = fitted
        self.comparison.set_before(fitted.before, "before")
        self.comparison.set_after(fitted.after, "after" if fitted.verdict.kept is not False else "after (old weights)")
        # With the old weights in it there is nothing to keep.
        self._set_state(State.IDLE if fitted.verdict.kept is False else State.FITTED)
        self.tabs.setCurrentWidget(self.comparison)
        self.bar.say(fitted.verdict.sentence)
        self.finished.emit()

    def _on_answer(self, message: answers.Message | trust.Expected) -> None:
        if isinstance(message, answers.Ready) or not self._questions.wants(message.number):
            return
        if isinstance(message, trust.Expected):
            self.trust.show_expectation(message.expectation)
            self.trust.ask.setEnabled(True)
            self.trusted.emit()
        elif isinstance(message, answers.Failure):
            self.trust.ask.setEnabled(True)
            self.trust.verdict.setText(message.sentence)
            self._fail(message.sentence)

    def _fail(self, sentence: str) -> None:
        self.bar.say(sentence, error=True)
        show_error(sentence)
        self.failed.emit(sentence)

    def _set_state(self, state: State) -> None:
        self.state = state
        self.bar.set_state(state)
        if state is not State.PAUSED:
            self._fit.resume()

    def _on_theme(self, *_: object) -> None:
        theme = get_theme(self._viewer.theme)
        palette = Palette.on(theme.background.as_hex(), theme.text.as_hex())
        for pictures in (self.curves, self.comparison, self.trust):
            pictures.set_palette(palette)

    # Coming and going

    def attach(self) -> None:
        """Listen to the viewer."""
        if not self._attached:
            self._attached = True
            self._viewer.events.theme.connect(self._on_theme)
            if self.form is None:
                self._fit.start(retraining.iter_offer())

    def detach(self) -> None:
        """Stop all work and wait for its end, let go of the viewer."""
        if not self._attached:
            return
        self._attached = False
        self._viewer.events.theme.disconnect(self._on_theme)
        self._requests.new()
        self._questions.new()
        self._fit.close()
        self._asked.close()
        if self.state in (State.RUNNING, State.PAUSED):
            self._set_state(State.IDLE)
            self.bar.say("Stopped: the old model stays as it was.")

    def close_down(self) -> None:
        """Leave nothing behind; the widget is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        get_qapp().aboutToQuit.disconnect(self.close_down)
        self.detach()
        for pictures in (self.curves, self.comparison, self.trust):
            pictures.dispose()
        self.deleteLater()
