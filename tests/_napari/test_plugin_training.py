"""The training widget on a real viewer with the sample movie: real buttons, real fits of a few steps."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from plugin_helpers import hide_as_if_closed
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QFileDialog, QLabel

import napari_calvae as calvae
from napari_calvae._napari.contributions import open_sample, sample_folder
from napari_calvae._napari.retraining import State

PICKED = 3


@pytest.fixture
def open_retrain(viewer, qtbot, open_widget):
    """Open the sample movie, both widgets, and pick a cell; the training widget is closed in the end."""
    from napari_calvae._napari.training_widget import TrainingWidget

    opened = []

    def open_both(pick=PICKED):
        for data, options, kind in open_sample():
            getattr(viewer, f"add_{kind}")(data, **options)
        inference = open_widget()
        if pick is not None:
            inference.ask(pick)
            qtbot.waitUntil(lambda: inference.plots.picture is not None, timeout=60_000)
        widget = TrainingWidget(viewer)
        viewer.window.add_dock_widget(widget, name="retrain", area="right")
        qtbot.waitUntil(lambda: widget.form is not None, timeout=60_000)
        opened.append(widget)
        return inference, widget

    yield open_both
    for widget in opened:
        if widget._attached:
            widget.close_down()


def choose(box, data):
    box.setCurrentIndex(box.findData(data))
    assert box.currentData() == data


def press(qtbot, button):
    assert button.isVisible()
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def shown(widget):
    return {name for name, button in widget.bar.buttons.items() if button.isVisible()}


def steps_of(widget):
    return len(widget.curves.series["loss"].steps) if "loss" in widget.curves.series else 0


def fit_to_labels(qtbot, widget, monkeypatch, n_steps=4):
    choose(widget.form.objective, "supervised")
    path = str(sample_folder() / "spikes.npz")
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *a, **k: (path, ""))
    press(qtbot, widget.form.spikes)
    assert widget.form.spikes.text() == "spikes.npz: 9 ROIs"
    widget.form.fields["n_steps"].setValue(n_steps)
    with qtbot.waitSignal(widget.finished, timeout=60_000):
        press(qtbot, widget.bar.start)


def test_a_fit_is_shown_and_kept_and_inference_follows(qtbot, open_retrain, monkeypatch):
    inference, widget = open_retrain()
    before = inference.plots.picture
    assert shown(widget) == {"start", "load"}
    fit_to_labels(qtbot, widget, monkeypatch)
    assert widget.tabs.currentWidget() is widget.comparison
    widget.tabs.setCurrentWidget(widget.curves)
    x, y = widget.curves.loss.getData()
    np.testing.assert_array_equal(x, [1, 2, 3, 4])
    assert np.isfinite(y).all()
    labels = [widget.curves.which.itemText(i) for i in range(widget.curves.which.count())]
    assert labels[:3] == ["Rate of ROI 3 (spikes/s)", "Rise time of ROI 3 (s)", "Decay time of ROI 3 (s)"]
    widget.curves.which.setCurrentIndex(2)
    np.testing.assert_array_equal(widget.curves.chosen.getData()[0], [0, 1, 2, 3, 4])
    assert widget.curves.lanes[1].axis.labelText == "s"
    assert "amplitude" in widget.curves.now.text()
    comparison = widget.comparison
    widget.tabs.setCurrentWidget(comparison)
    np.testing.assert_allclose(comparison.before.rate, before.rate, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(comparison.before.rate, comparison.after.rate)
    assert all(raster.image is not None for raster in comparison.rasters)
    assert len(comparison.rates[1].getData()[0])
    assert "ROI 3" in comparison.title.text()
    assert "no cell was left to judge by" in widget.bar.status.text()
    assert shown(widget) == {"keep", "discard", "save"}
    assert inference.plots.picture is before
    press(qtbot, widget.bar.keep)
    assert inference.controls.model.currentText() == "supervised 1"
    assert shown(widget) == {"start", "save", "load"}
    qtbot.waitUntil(lambda: inference.plots.picture is not before, timeout=30_000)
    picture = inference.plots.picture
    assert picture.provenance["model_sha256"] == widget.fitted.model.sha256
    np.testing.assert_allclose(picture.rate, comparison.after.rate, rtol=1e-4, atol=1e-4)
    assert "supervised 1" in [widget.form.base.itemText(i) for i in range(widget.form.base.count())]


def test_pause_resume_cancel(qtbot, open_retrain):
    inference, widget = open_retrain()
    choose(widget.form.objective, "elbo")
    widget.form.fields["n_steps"].setValue(5000)
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: steps_of(widget) > 2, timeout=60_000)
    assert shown(widget) == {"pause", "cancel"}
    assert widget.bar.progress.isVisible()
    assert widget.bar.progress.format().startswith("step ")
    assert widget.bar.progress.format().endswith(" left")
    bound = widget.curves.which.findText("Bound (nats per snippet)")
    widget.curves.which.setCurrentIndex(bound)
    assert widget.curves.which.findText("Amplitude, median of cells (ΔF/F)") > 0
    press(qtbot, widget.bar.pause)
    assert widget.bar.pause.text() == "Resume"
    QTest.qWait(1500)  # a step that was under way comes to its end, on a busy machine too
    held = steps_of(widget)
    QTest.qWait(500)
    assert steps_of(widget) == held
    press(qtbot, widget.bar.pause)
    qtbot.waitUntil(lambda: steps_of(widget) > held + 1, timeout=20_000)
    press(qtbot, widget.bar.pause)
    press(qtbot, widget.bar.cancel)
    qtbot.waitUntil(lambda: not widget._fit.busy, timeout=20_000)
    assert widget.state is State.IDLE
    assert "old model stays" in widget.bar.status.text()
    assert inference.controls.model.currentText() == "universal"
    done = steps_of(widget)
    QTest.qWait(100)
    assert steps_of(widget) == done


@pytest.fixture
def outcome(monkeypatch):
    """A fit whose outcome the test decides: the description of the model that comes of it."""
    told = SimpleNamespace(description="; kept: correlation +0.100 (so it is kept)", traces=None, settings=None)

    def iter_fit(traces, base, objective, **settings):
        told.traces, told.settings, model = traces, settings, calvae.load_model(base)
        for step in (1, 2):
            yield SimpleNamespace(step=step, n_steps=2, loss=1.0 / step, terms={"bound": -1.0}, model=model)
        return calvae.SpikeVAE(**{**vars(model), "description": told.description})

    calvae.iter_fit  # noqa: B018 - the real one must be there to come back
    monkeypatch.setitem(vars(calvae), "iter_fit", iter_fit)
    return told


def test_a_fit_that_is_no_better_leaves_nothing_to_keep(qtbot, open_retrain, outcome):
    outcome.description = "; not kept, weights of the base: correlation -0.020 (more than 0.02 is kept)"
    _, widget = open_retrain()
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    assert "No better, so the old weights stay: correlation -0.020" in widget.bar.status.text()
    assert shown(widget) == {"start", "load"}


def test_the_form_decides_what_is_fitted(qtbot, open_retrain, outcome):
    _, widget = open_retrain()
    form = widget.form
    choose(form.objective, "vimco")
    assert form.fields["n_steps"].value() == 300
    assert not form.spikes.isVisible()
    assert "No labels needed" in form.explanation.text()
    choose(form.generative, "dye_binding")
    choose(form.noise, "drift")
    choose(form.rois, "typed")
    form.typed.setText("2-4, 7")
    form.fields["learning_rate"].setValue(0.001)
    form.fields["seed"].setValue(5)
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    assert outcome.traces.roi_ids == (2, 3, 4, 7)
    assert (outcome.settings["generative"], outcome.settings["noise"]) == ("dye_binding", "drift")
    config = outcome.settings["config"]
    assert (config.n_steps, config.learning_rate, config.seed, config.snapshot_every) == (300, 0.001, 5, 15)
    press(qtbot, widget.bar.discard)
    assert widget.fitted is None
    choose(form.rois, "picked")
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    assert outcome.traces.roi_ids == (PICKED,)


def test_labels_help_and_ranges_are_those_of_the_settings(open_retrain, viewer):
    _, widget = open_retrain(pick=None)
    fields = type(widget.form.config()).model_fields
    words = [label.text() for label in widget.form.findChildren(QLabel)]
    for name, field in widget.form.fields.items():
        assert fields[name].title in words
        assert field.toolTip() == fields[name].description
    assert widget.form.fields["n_steps"].minimum() == 1
    assert widget.form.fields["learning_rate"].minimum() > 0
    for button in (*widget.bar.buttons.values(), widget.trust.ask, widget.form.base, widget.form.noise):
        assert button.toolTip()
    viewer.window.resize(1280, 800)
    QApplication.processEvents()
    assert widget.minimumSizeHint().width() <= 310
    inside = widget.form.widget()
    assert inside.minimumSizeHint().width() <= widget.form.viewport().width()


def test_what_is_missing_is_said(qtbot, open_retrain, monkeypatch, tmp_path):
    _, widget = open_retrain(pick=None)
    failed = []
    widget.failed.connect(failed.append)
    choose(widget.form.rois, "picked")
    press(qtbot, widget.bar.start)
    assert "Click a ROI in the movie first" in failed[-1]
    choose(widget.form.rois, "typed")
    press(qtbot, widget.bar.start)
    assert "expected ids such as" in failed[-1]
    choose(widget.form.rois, "all")
    choose(widget.form.objective, "semi_supervised")
    with qtbot.waitSignal(widget.failed, timeout=30_000):
        press(qtbot, widget.bar.start)
    assert "Labelled spikes: expected a file" in failed[-1]
    assert shown(widget) == {"start", "load"}
    widget.tabs.setCurrentWidget(widget.trust)
    press(qtbot, widget.trust.ask)
    assert "Click a ROI in the movie first" in failed[-1]
    (tmp_path / "broken.safetensors").write_bytes(b"not a model")
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *a, **k: (str(tmp_path / "broken.safetensors"), ""))
    press(qtbot, widget.bar.load)
    assert "got a damaged or foreign file" in failed[-1]
    assert widget.bar.status.text() == failed[-1]


def test_a_model_is_saved_and_loaded_again(qtbot, open_retrain, outcome, monkeypatch, tmp_path):
    inference, widget = open_retrain()
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    target = tmp_path / "mine.safetensors"
    target.write_bytes(b"something else")
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *a, **k: (str(tmp_path / "mine"), ""))
    press(qtbot, widget.bar.save)
    assert "exists already" in widget.bar.status.text()
    assert target.read_bytes() == b"something else"
    # The dialog has asked before it returns the full name of a file that is there.
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *a, **k: (str(target), ""))
    press(qtbot, widget.bar.save)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.safetensors"]
    assert "correlation +0.100" in calvae.load_model(target).description
    assert inference.controls.model.currentData() == str(target)
    inference.controls.model.setCurrentIndex(0)
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *a, **k: (str(target), ""))
    press(qtbot, widget.bar.load)
    assert inference.controls.model.currentText() == "mine"
    assert "Inferring with mine" in widget.bar.status.text()
    qtbot.waitUntil(lambda: not inference._clicked.busy, timeout=30_000)


def test_how_far_a_cell_can_be_trusted(qtbot, open_retrain):
    _, widget = open_retrain()
    widget.tabs.setCurrentWidget(widget.trust)
    for _ in range(2):
        with qtbot.waitSignal(widget.trusted, timeout=30_000):
            press(qtbot, widget.trust.ask)
    cells = [label.text() for label in widget.trust._cells]
    assert len(cells) == 18
    assert cells[0] == "Correlation, σ 200 ms"
    assert 0 < float(cells[1].removeprefix("<b>").removesuffix("</b>")) <= 1
    assert "ROI 3: 8 recordings simulated" in widget.trust.origin.text()
    assert "spikes" in widget.trust.verdict.text()
    assert len(widget.trust.rate.getData()[0]) > 100
    QApplication.processEvents()
    assert widget.trust.widget().width() <= widget.trust.viewport().width()


def test_colours_follow_the_theme(open_retrain, viewer):
    _, widget = open_retrain(pick=None)
    viewer.theme = "light"
    assert widget.curves.trend.opts["pen"].color().name() == "#00796b"
    viewer.theme = "dark"
    assert widget.curves.trend.opts["pen"].color().name() == "#35c9b5"


@pytest.mark.parametrize("how", ["dock", "window", "paused"])
def test_closing_in_the_middle_leaves_nothing(qtbot, open_retrain, viewer, how):
    before = threading.active_count()
    _, widget = open_retrain()
    choose(widget.form.objective, "elbo")
    widget.form.fields["n_steps"].setValue(5000)
    listeners = len(viewer.events.theme.callbacks)
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: steps_of(widget) > 1, timeout=60_000)
    if how == "paused":
        press(qtbot, widget.bar.pause)
    if how == "window":
        viewer.close()
    else:
        viewer.window._wrapped_dock_widgets["retrain"].destroyOnClose()
    qtbot.waitUntil(lambda: not widget._attached, timeout=10_000)
    assert not widget._fit.busy
    qtbot.waitUntil(lambda: threading.active_count() <= before + 1, timeout=10_000)
    assert len(viewer.events.theme.callbacks) < listeners


def test_a_window_that_is_shown_again_can_fit_again(qtbot, open_retrain, outcome, viewer):
    _, widget = open_retrain()
    choose(widget.form.objective, "elbo")
    hide_as_if_closed(viewer.window._qt_window, widget)
    assert not widget._attached
    viewer.window._qt_window.show()
    assert widget._attached
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)


def test_it_opens_the_spike_inference_where_there_is_none(qtbot, viewer):
    from napari_calvae._napari.inference_widget import InferenceWidget

    for data, options, kind in open_sample():
        getattr(viewer, f"add_{kind}")(data, **options)
    _, widget = viewer.window.add_plugin_dock_widget("napari-calvae", "retrain")
    qtbot.waitUntil(lambda: widget.form is not None, timeout=60_000)
    inference = InferenceWidget.of(viewer)
    qtbot.waitUntil(lambda: not inference._clicked.busy, timeout=60_000)
    assert widget.form.base.currentText() == "universal"
    widget.close_down()
    inference.close_down()
