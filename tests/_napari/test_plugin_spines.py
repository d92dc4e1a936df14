"""Dendrites: what is decided without Qt, and the widget on a real viewer with a simulated shaft and its spines."""

from __future__ import annotations

import csv
import io
import math
import threading

import numpy as np
import pytest
from plugin_helpers import hide_as_if_closed, is_all_seen
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QFileDialog
from recording_helpers import FRAME_RATE, show
from recording_helpers import dendrite as simulated_dendrite

import napari_calvae as calvae
from napari_calvae._napari import answers, dendrite

SHAFT, SPINES = 1, (2, 3, 4, 5)


@pytest.fixture(scope="module")
def scene():
    """Movie, label image and truth of a shaft with four spines."""
    return simulated_dendrite(40.0)


@pytest.fixture(scope="module")
def separated(scene) -> calvae.SpineInference:
    _, _, truth = scene
    return calvae.infer_spines(truth.traces, SHAFT, n_samples=20, device="cpu")


# Without Qt ----------------------------------------------------------------------------------------------------------


def test_the_largest_roi_looks_like_the_shaft(scene):
    assert dendrite.guess_shaft(calvae.RoiMasks.from_labels(scene[1])) == SHAFT


def test_spines_are_all_others_or_those_that_were_typed():
    assert dendrite.chosen_spines("", 2, (1, 2, 3)) == (1, 3)
    assert dendrite.chosen_spines(" 2-4", 2, (1, 2, 3, 4)) == (3, 4)
    with pytest.raises(calvae.RecordingError, match="at least one ROI beside the shaft, got only ROI 2"):
        dendrite.chosen_spines("2", 2, (1, 2, 3))
    with pytest.raises(calvae.RecordingError, match="Choose the shaft again"):
        dendrite.chosen_spines("", 9, (1, 2, 3))


def test_what_cannot_be_separated_is_told_in_the_words_of_the_science(scene):
    movie, labels, _ = scene
    rois = calvae.RoiMasks.from_labels(labels)
    slow = dendrite.Order(4, movie, rois, SHAFT, SPINES, answers.Settings(frame_rate=1.0))
    last = list(dendrite.iter_separate(slow))[-1]
    assert isinstance(last, answers.Failure)
    assert last.number == 4
    assert "expected 10 to 60 Hz" in last.sentence


def test_parts_of_a_spine_are_apart_and_add_up(separated):
    shown = dendrite.picture(separated, 2)
    assert shown.shaft.roi_ids == (SHAFT,)
    assert shown.spine.roi_ids == (SPINES[1],)
    values = shown.spine.traces.values[0]
    np.testing.assert_allclose(shown.bap + shown.rest, values, atol=1e-5)
    expected = separated.bap[2] + separated.synaptic[2] + separated.theta["baseline"][2]
    np.testing.assert_allclose(shown.bap + shown.synaptic, expected, atol=1e-5)


def test_numbers_of_compartments_and_their_table(separated):
    shaft, *spines = dendrite.compartments(separated)
    assert (shaft.roi, shaft.compartment, shaft.bap_of_shaft) == (SHAFT, "shaft", 1.0)
    assert math.isnan(shaft.input_dff)
    assert tuple(spine.roi for spine in spines) == SPINES
    for row, spine in enumerate(spines, 1):
        assert spine.rate_low <= spine.rate_per_s <= spine.rate_high
        assert spine.bap_of_shaft == pytest.approx(spine.bap_dff / shaft.bap_dff)
        assert spine.input_dff == pytest.approx(float(separated.theta["synaptic_amplitude"][row]))
    table = list(csv.DictReader(io.StringIO(dendrite.csv_text([shaft, *spines]))))
    assert [line["roi"] for line in table] == ["1", "2", "3", "4", "5"]
    assert table[0]["input_dff"] == ""
    assert float(table[1]["r2"]) == pytest.approx(spines[0].r2, rel=1e-4)


# On a viewer ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_spines(viewer, open_beside, scene):
    """Open movie, ROIs and both widgets."""
    from napari_calvae._napari.spine_widget import SpineWidget

    def open_both(with_movie=True):
        if with_movie:
            show(viewer, *scene[:2])
        return open_beside(SpineWidget, "spines")

    return open_both


@pytest.fixture
def quick(monkeypatch, separated):
    """A stand-in that tells what it was asked, and can be held up."""
    asked: list = []
    gate = threading.Event()
    gate.set()

    def infer_spines(traces, shaft, **settings):
        asked.append((traces, shaft, settings))
        gate.wait(20)
        return separated

    monkeypatch.setitem(vars(calvae), "infer_spines", infer_spines)
    return asked, gate


def press(qtbot, button):
    assert button.isVisible()
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def test_a_dendrite_is_separated_and_shown(qtbot, open_spines, scene, monkeypatch, tmp_path):
    _, widget = open_spines()
    assert [widget.shaft.itemText(i) for i in range(5)] == [f"ROI {k}" for k in (1, 2, 3, 4, 5)]
    assert widget.shaft.currentData() == SHAFT
    with qtbot.waitSignal(widget.finished, timeout=60_000):
        press(qtbot, widget.bar.start)
    result, plots = widget.result, widget.plots
    assert (result.shaft, result.spines) == (SHAFT, SPINES)
    assert result.inference.traces.provenance["extraction"]["neuropil_coefficient"] == 0.0
    assert widget.table.rowCount() == 4
    assert widget.shown_spine == 2
    assert plots.title.text().startswith("<b>Spine 2</b> on shaft 1")
    # The simulation's trains are found again.
    counts = scene[2].counts
    wide = np.hanning(13)
    for row in np.flatnonzero(counts.sum(axis=1) > 4):
        found, true = (np.convolve(x, wide, "same") for x in (result.inference.rate[row], counts[row]))
        assert np.corrcoef(found, true)[0, 1] > 0.5
    # Arrow keys go from spine to spine.
    first = plots.spine_trace.getData()[1].copy()
    widget.table.setFocus()
    qtbot.keyClick(widget.table, Qt.Key.Key_Down)
    assert widget.shown_spine == 3
    assert not np.array_equal(first, plots.spine_trace.getData()[1])
    assert plots.bap_raster.item.image.shape[0] == plots.input_raster.item.image.shape[0] == 50
    assert plots.bap_part.high.max() > plots.picture.baseline + 0.1
    assert plots.synaptic.getData()[1].max() > 0.1
    assert len(plots.input_rate.band.low) == len(plots.input_rate.mean.getData()[0])
    path = tmp_path / "spines.csv"
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *a, **k: (str(path), ""))
    press(qtbot, widget.csv)
    assert "The shaft and 4 spines written to spines.csv" in widget.bar.status.text()
    assert path.read_text().splitlines()[0].startswith("roi,compartment,rate_per_s,rate_low,rate_high,input_dff")


def test_shaft_and_spines_are_those_that_were_chosen(qtbot, open_spines, quick, scene):
    asked, _ = quick
    inference, widget = open_spines()
    press(qtbot, widget.use_picked)
    assert "Click the shaft in the movie first" in widget.bar.status.text()
    inference.ask(4)
    qtbot.waitUntil(lambda: inference.plots.picture is not None, timeout=60_000)
    press(qtbot, widget.use_picked)
    assert widget.shaft.currentData() == 4
    widget.spines.setText("1-3, 4")
    widget.neuropil.setValue(0.5)
    inference.controls.samples.setValue(30)
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    traces, shaft, settings = asked[-1]
    assert (shaft, traces.roi_ids) == (4, (4, 1, 2, 3))
    assert settings["n_samples"] == 30
    assert traces.provenance["extraction"]["neuropil_coefficient"] == 0.5
    widget.spines.setText("9")
    press(qtbot, widget.bar.start)
    assert "ROIs: expected ids among" in widget.bar.status.text()


@pytest.mark.parametrize("what", ["frame rate", "ROIs", "samples", "neuropil", "shaft"])
def test_what_was_made_of_other_rois_or_settings_is_told_and_dimmed(qtbot, open_spines, quick, viewer, what):
    inference, widget = open_spines()
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    layer = viewer.layers["ROIs"]
    there_and_back = {
        "frame rate": lambda on: inference.controls.frame_rate_typed.emit("20" if on else f"{FRAME_RATE}"),
        "ROIs": lambda on: layer.data_setitem((np.array([1]), np.array([1])), 2 if on else 0),
        "samples": lambda on: inference.controls.samples.setValue(20 if on else 50),
        "neuropil": lambda on: widget.neuropil.setValue(0.5 if on else 0.0),
        "shaft": lambda on: widget.shaft.setCurrentIndex(widget.shaft.findData(2 if on else SHAFT)),
    }[what]
    there_and_back(True)
    qtbot.waitUntil(lambda: "other settings: press Separate again" in widget.bar.status.text())
    assert widget.plots.graphics.ci.opacity() < 1
    widget.table.choose(1)
    assert widget.plots.graphics.ci.opacity() < 1
    there_and_back(False)
    qtbot.waitUntil(lambda: widget.plots.graphics.ci.opacity() == 1)
    assert "goes with movie, ROIs and settings again" in widget.bar.status.text()
    there_and_back(True)
    qtbot.waitUntil(lambda: widget.plots.graphics.ci.opacity() < 1)
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    assert widget.plots.graphics.ci.opacity() == 1
    assert "separated" in widget.bar.status.text()


def test_what_changed_while_it_was_separated_is_told_in_the_end(qtbot, open_spines, quick):
    asked, gate = quick
    inference, widget = open_spines()
    gate.clear()
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: bool(asked), timeout=30_000)
    inference.controls.frame_rate_typed.emit("20")
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        gate.set()
    assert "other settings: press Separate again" in widget.bar.status.text()
    assert widget.plots.graphics.ci.opacity() < 1


def test_a_click_in_the_movie_shows_that_spine_and_a_click_in_the_plots_that_moment(
    qtbot, open_spines, quick, viewer, canvas, scene
):
    _, widget = open_spines()
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    viewer.reset_view()
    y, x = np.argwhere(scene[1] == 4).mean(axis=0)
    canvas.click(y, x)
    qtbot.waitUntil(lambda: widget.shown_spine == 4, timeout=60_000)
    widget.plots.picked.emit(10.0)
    assert viewer.dims.point[0] == pytest.approx(10.0, abs=1 / 30)
    assert widget.plots.rows[0].cursor.value() == pytest.approx(10.0, abs=1 / 30)
    viewer.dims.set_point(0, 20.0)
    assert widget.plots.rows[0].cursor.value() == pytest.approx(20.0, abs=1 / 30)


def test_cancelled_work_shows_nothing(qtbot, open_spines, quick):
    asked, gate = quick
    _, widget = open_spines()
    gate.clear()
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: bool(asked), timeout=30_000)
    assert widget.bar.progress.isVisible()
    press(qtbot, widget.bar.cancel)
    assert "Cancelled" in widget.bar.status.text()
    gate.set()
    qtbot.waitUntil(lambda: not widget._worker.busy)
    assert widget.result is None
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)


def test_without_a_movie_it_says_what_is_missing(qtbot, open_spines):
    _, widget = open_spines(with_movie=False)
    press(qtbot, widget.bar.start)
    assert "Movie: expected an Image layer" in widget.bar.status.text()
    assert widget.bar.start.isEnabled()


def test_it_fits_a_small_window_and_follows_the_theme(qtbot, open_spines, quick, viewer):
    _, widget = open_spines()
    viewer.window.resize(1280, 800)
    QApplication.processEvents()
    assert widget.minimumSizeHint().width() <= 600
    viewer.window.resize(1000, 800)
    qtbot.waitUntil(lambda: is_all_seen(widget.plots.title))
    dock, other = (viewer.window._wrapped_dock_widgets[name] for name in ("spines", "spike inference"))
    qtbot.waitUntil(lambda: other in viewer.window._qt_window.tabifiedDockWidgets(dock))
    for control in (widget.shaft, widget.use_picked, widget.spines, widget.neuropil, widget.table, widget.csv):
        assert control.toolTip()
    viewer.theme = "light"
    assert widget.plots.synaptic.opts["pen"].color().name() == "#00796b"
    assert "#" in widget.plots.palette_used.background
    viewer.theme = "dark"
    assert widget.plots.synaptic.opts["pen"].color().name() == "#35c9b5"


@pytest.mark.parametrize("how", ["dock", "window"])
def test_closing_in_the_middle_leaves_nothing(qtbot, open_spines, quick, viewer, how):
    asked, gate = quick
    before = threading.active_count()
    _, widget = open_spines()
    listeners = len(viewer.events.theme.callbacks), len(viewer.dims.events.point.callbacks)
    gate.clear()
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: bool(asked), timeout=30_000)
    threading.Timer(0.3, gate.set).start()
    if how == "window":
        viewer.close()
    else:
        viewer.window._wrapped_dock_widgets["spines"].destroyOnClose()
    qtbot.waitUntil(lambda: not widget._attached, timeout=10_000)
    assert not widget._worker.busy
    assert widget.result is None
    qtbot.waitUntil(lambda: threading.active_count() <= before + 1, timeout=10_000)
    assert len(viewer.events.theme.callbacks) < listeners[0]
    assert len(viewer.dims.events.point.callbacks) < listeners[1]


def test_a_window_that_is_shown_again_can_separate_again(qtbot, open_spines, quick, viewer):
    _, widget = open_spines()
    qtbot.waitUntil(lambda: widget._manners._seen is not None)
    hide_as_if_closed(viewer.window._qt_window, widget)
    assert not widget._attached
    viewer.window._qt_window.show()
    assert widget._attached
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)


def test_it_opens_the_spike_inference_where_there_is_none_and_outlives_it(qtbot, viewer, scene, quick):
    from napari_calvae._napari.inference_widget import InferenceWidget

    show(viewer, *scene[:2])
    _, widget = viewer.window.add_plugin_dock_widget("napari-calvae", "spines")
    inference = InferenceWidget.of(viewer)
    qtbot.waitUntil(lambda: not inference._clicked.busy, timeout=60_000)
    viewer.window._wrapped_dock_widgets["spike inference (napari-calvae)"].destroyOnClose()
    qtbot.waitUntil(lambda: inference._closed)
    QApplication.processEvents()
    with qtbot.waitSignal(widget.finished, timeout=60_000):
        widget.start()
    again = InferenceWidget.of(viewer)
    assert again is not inference
    assert widget.plots.geometry().right() > widget.width() - 20  # no stretch of napari's beside them
    qtbot.waitUntil(lambda: not again._clicked.busy, timeout=60_000)
    widget.close_down()
    again.close_down()
