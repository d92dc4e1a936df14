"""Stimulated recordings: what is decided without Qt, and the widget on a real viewer with simulated pulses."""

from __future__ import annotations

import csv
import io
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QFileDialog
from recording_helpers import FRAME_RATE, show, stimulated

import napari_calvae as calvae
from napari_calvae._napari import answers, pulse_average, pulses, responses
from napari_calvae._napari.plot_items import DIMMED

FEW = {"n_start": 1, "n_settle": 2, "n_samples": 8}


@pytest.fixture(scope="module")
def scene():
    """Movie, label image, pulses and true counts of four cells."""
    return stimulated(30.0)


@pytest.fixture(scope="module")
def rois(scene) -> calvae.RoiMasks:
    return calvae.RoiMasks.from_labels(scene[1])


@pytest.fixture(scope="module")
def estimated(scene, rois) -> calvae.AllOpticalInference:
    traces = calvae.extract(scene[0], rois, FRAME_RATE)
    return calvae.infer_all_optical(traces, scene[2], rois, **FEW)


# Without Qt ----------------------------------------------------------------------------------------------------------


def test_pulses_are_told_in_words_and_checked_against_the_movie(scene, rois):
    words = pulses.check(scene[2], rois, 30.0)
    assert words == f"{len(scene[2])} pulses of 100 ms on 4 targets, 1.0 to {scene[2].onset.max():.1f} s"
    one = {"onset": [1.0, 2.0], "duration": [0.01, 0.02], "targets": [[5, 5], [500, 5]]}
    told = pulses.check(calvae.read_stimulation(one), rois, 30.0)
    assert told == "2 pulses of 10 to 20 ms on 2 targets, 1.0 to 2.0 s; 1 of the targets outside the movie"
    with pytest.raises(calvae.RecordingError, match=r"in pixels of the movie, 80 × 80, got 500, 5"):
        pulses.check(calvae.Stimulation([1.0], 0.1, ((500, 5),)), rois, 30.0)
    with pytest.raises(calvae.RecordingError, match=r"within the recording, 0 to 30.0 s, got 1000 to 1000 s"):
        pulses.check(calvae.Stimulation([1000.0], 0.1, ((5, 5),)), rois, 30.0)
    with pytest.raises(calvae.RecordingError, match="at least one, got none"):
        pulses.check(calvae.Stimulation([], 0.1, ()), rois, 30.0)


def test_pulses_are_found_in_metadata(rois):
    arrays = {"onset": [1.0], "duration": 0.1, "roi": [1]}
    layers = [None, SimpleNamespace(metadata={}), SimpleNamespace(metadata={"stimulation": arrays})]
    assert pulses.in_metadata(*layers[:2]) is None
    found = pulses.in_metadata(*layers)
    assert found is arrays
    np.testing.assert_allclose(pulses.read(found, rois).targets[0], rois.centroids[:1])


def test_sweeps_tell_how_far_they_are_and_errors_are_sentences(scene, rois):
    settings = answers.Settings(FRAME_RATE)
    order = pulses.Order(3, scene[0][:300], rois, scene[2], settings, n_settle=1, n_samples=2, n_start=1)
    messages = list(pulses.iter_estimate(order))
    sweeps = [m for m in messages if isinstance(m, pulses.Sweep)]
    assert [s.fraction for s in sweeps] == [k / 7 for k in range(1, 8)]
    assert sweeps[-1].words.startswith("sampling, 7 of 7, 0 s left")
    assert isinstance(messages[-1], pulses.Estimated)
    assert messages[-1].seconds > 0
    late = pulses.Order(4, scene[0][:60], rois, calvae.Stimulation([9.0], 0.1, ((5, 5),)), settings, 1, 2)
    (failure,) = [m for m in pulses.iter_estimate(late) if isinstance(m, answers.Failure)]
    assert "expected pulses between" in failure.sentence


def test_what_is_drawn_of_a_cell_adds_up(estimated, scene):
    shown = responses.picture(estimated, 2)
    values = shown.spikes.traces.values[0]
    np.testing.assert_allclose(shown.artefact + shown.rest, values, atol=1e-5)
    np.testing.assert_allclose(shown.artefact + shown.response, shown.spikes.reconstruction[0], atol=1e-4)
    # Cells are 40 pixels apart, the reach of the light is far less: pulses on one are on no other.
    n_pulses = [sum(np.allclose(t, p) for t in scene[2].targets) for p in estimated.positions]
    assert [cell.n_pulses for cell in responses.cells(estimated)] == n_pulses
    assert not (shown.lit & shown.lit_elsewhere).any()
    every = scene[2].lit(estimated.spikes.traces.n_frames, FRAME_RATE)
    np.testing.assert_array_equal(shown.lit | shown.lit_elsewhere, every)


def test_numbers_of_cells_and_connections(estimated, scene):
    cells = responses.cells(estimated)
    # Light of 14 spikes/s for 0.1 s; the model is a softplus of it and of the drive.
    assert np.mean([cell.evoked for cell in cells]) == pytest.approx(1.4, abs=0.5)
    assert np.mean([cell.artefact_dff for cell in cells]) == pytest.approx(0.5, abs=0.1)
    assert all(cell.evoked_low <= cell.evoked <= cell.evoked_high for cell in cells)
    found = responses.connections(estimated)
    assert len(found) == 12
    certain = [round(c.probability, 2) for c in found]  # beyond that the stronger comes first
    assert certain == sorted(certain, reverse=True)
    one = found[0]
    assert one.strength == pytest.approx(estimated.connectivity[one.receiver - 1, one.sender - 1])
    lines = list(csv.DictReader(io.StringIO(responses.csv_text(found))))
    assert list(lines[0]) == ["sender", "receiver", "strength", "std", "low", "high", "probability"]
    assert len(list(csv.DictReader(io.StringIO(responses.csv_text(cells))))) == 4
    assert [responses.signed(x) for x in (0.123, -0.5, -0.001)] == ["+0.12", "−0.50", "0.00"]


def test_the_average_around_pulses(estimated, scene):
    found = pulse_average.average(estimated, 0)
    on = [k for k, t in enumerate(scene[2].targets) if np.allclose(t, estimated.positions[0])]
    assert found.n_pulses == sum(0.5 <= scene[2].onset[k] < 28.4 for k in on)
    np.testing.assert_allclose(found.artefact + found.rest, found.trace, atol=1e-5)
    # Other pulses, 40 pixels away, add little to it: the artefact falls off with 25 pixels.
    # A pulse begins in the middle of a frame.
    during = (found.seconds > 0.02) & (found.seconds < 0.08)
    assert found.artefact[during].min() > 0.8 * float(estimated.spikes.theta["artefact"][0])
    assert found.rate[during].mean() > 3 * found.rate[found.seconds < 0].mean()
    assert (found.low <= found.high).all()
    elsewhere = calvae.Stimulation([2.0], 0.1, ((70.0, 70.0),))
    assert pulse_average.average(replace(estimated, stimulation=elsewhere), 0) is None


# On a viewer ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_stimulation(viewer, open_beside, scene):
    """Open movie, ROIs and both widgets; options are the movie's metadata."""
    from napari_calvae._napari.stimulation_widget import StimulationWidget

    def open_both(with_movie=True, **metadata):
        if with_movie:
            show(viewer, *scene[:2], **metadata)
        return open_beside(StimulationWidget, "stimulation")

    return open_both


@pytest.fixture
def quick(monkeypatch, estimated):
    """A stand-in that tells what it was asked, and can be held up."""
    asked: list = []
    gate = threading.Event()
    gate.set()

    def iter_all_optical(traces, stimulation, positions, model, **settings):
        asked.append((traces, stimulation, positions, settings))
        for step in (1, 2, 3):
            yield SimpleNamespace(stage="sample", step=step, n_steps=3, seconds=step, connectivity=np.eye(4))
            gate.wait(20)
        return estimated

    monkeypatch.setitem(vars(calvae), "iter_all_optical", iter_all_optical)
    return asked, gate


def press(qtbot, button):
    assert button.isVisible()
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def write_table(path, stimulation):
    lines = ["onset_s,duration_ms,x,y"]
    for k, targets in enumerate(stimulation.targets):
        lines += [f"{stimulation.onset[k]},{1000 * stimulation.duration[k]},{x},{y}" for x, y in targets]
    path.write_text("\n".join(lines))
    return str(path)


def test_pulses_are_loaded_and_artefact_and_response_are_shown(qtbot, open_stimulation, scene, monkeypatch, tmp_path):
    _, widget = open_stimulation()
    path = write_table(tmp_path / "pulses.csv", scene[2])
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *a, **k: (path, ""))
    press(qtbot, widget.load)
    assert widget.told.text() == f"{pulses.check(scene[2], widget.inference.choices.rois()[2], 30.0)} (pulses.csv)."
    widget.settle.setValue(2)
    widget.samples.setValue(4)
    with qtbot.waitSignal(widget.finished, timeout=60_000):
        press(qtbot, widget.bar.start)
    result, plots = widget.result, widget.plots
    assert result.spikes.n_samples == 4
    assert result.spikes.roi_ids == (1, 2, 3, 4)
    assert widget.table.rowCount() == 4
    assert widget.shown_cell == 1
    assert plots.title.text().startswith("<b>ROI 1</b>")
    assert plots.artefact.getData()[1].max() == pytest.approx(float(result.artefact[0].max()), abs=1e-6)
    assert plots.raster.item.image.shape[0] == 4
    assert np.isfinite(plots.lit[0].high).any()
    assert len(plots.elsewhere.getData()[0]) > 10
    first = plots.trace.getData()[1].copy()
    widget.table.setFocus()
    qtbot.keyClick(widget.table, Qt.Key.Key_Down)
    assert widget.shown_cell == 2
    assert not np.array_equal(first, plots.trace.getData()[1])


def test_connections_are_listed_framed_and_saved(qtbot, open_stimulation, quick, scene, monkeypatch, tmp_path):
    asked, _ = quick
    _, widget = open_stimulation(stimulation=scene[2])
    assert "found in the layer" in widget.told.text()
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    traces, stimulation, positions, settings = asked[0]
    assert stimulation is scene[2]
    assert traces.roi_ids == positions.ids
    assert (settings["n_settle"], settings["n_samples"]) == (30, 40)
    assert "8 samples in 3 s" in widget.bar.status.text()
    widget.pages.setCurrentIndex(1)
    assert widget.average.title.text().startswith("<b>ROI 1</b> &nbsp; mean over ")
    assert len(widget.average.response.getData()[0]) == len(widget.average.average.seconds)
    widget.pages.setCurrentIndex(2)
    panel = widget.connections
    assert panel.table.rowCount() == 12
    cells = [panel.table.item(0, column).text() for column in range(5)]
    one = panel.found[0]
    assert cells[:3] == [str(one.sender), str(one.receiver), responses.signed(one.strength)]
    assert panel.matrix.image.shape == (4, 4)
    assert np.diag(panel.matrix.image).tolist() == [0] * 4
    panel.table.choose(0)
    x, y = panel.frame.getData()
    assert (x.mean() > one.sender - 2, y.min()) == (True, one.receiver - 1.5)
    assert widget.shown_cell == one.receiver
    for button, name, n in ((panel.csv, "connections.csv", 13), (widget.csv, "cells.csv", 5)):
        path = tmp_path / name
        monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *a, path=path, **k: (str(path), ""))
        press(qtbot, button)
        assert len(path.read_text().splitlines()) == n
        assert name in widget.bar.status.text()


def test_a_click_in_the_movie_shows_that_cell(qtbot, open_stimulation, quick, viewer, canvas, scene):
    _, widget = open_stimulation(stimulation=scene[2])
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    viewer.reset_view()
    canvas.click(*np.argwhere(scene[1] == 3).mean(axis=0))
    qtbot.waitUntil(lambda: widget.shown_cell == 3, timeout=60_000)


def test_what_is_missing_or_wrong_is_said(qtbot, open_stimulation, monkeypatch, tmp_path, scene):
    _, widget = open_stimulation()
    press(qtbot, widget.bar.start)
    assert "Load a file first" in widget.bar.status.text()
    (tmp_path / "pulses.csv").write_text("time,where\n1,2\n")
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *a, **k: (str(tmp_path / "pulses.csv"), ""))
    press(qtbot, widget.load)
    assert "columns onset_s, duration_s, x and y" in widget.bar.status.text()
    assert "got the columns time, where" in widget.bar.status.text()
    assert widget.source is None
    (tmp_path / "pulses.csv").write_text("onset_s,duration_s,x,y\n1,0.1,900,900\n")
    press(qtbot, widget.load)
    assert "Convert them to pixels" in widget.bar.status.text()
    assert widget.told.text() == "No pulses yet."


def test_pulses_in_a_layer_go_with_the_layer_and_those_of_a_file_stay(
    qtbot, open_stimulation, scene, viewer, quick, tmp_path
):
    inference, widget = open_stimulation(stimulation={"onset": [1.0], "duration": 0.1, "roi": [9]})
    assert "ids of ROIs as targets, got 9" in widget.told.text()
    show(viewer, scene[0].copy(), scene[1], stimulation=scene[2])
    box = inference.controls.movie
    box.setCurrentIndex(box.findData(viewer.layers["movie [1]"]))
    assert widget.told.text().endswith("(found in the layer).")
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    write_table(tmp_path / "mine.csv", scene[2])
    widget.load_file(tmp_path / "mine.csv")
    box.setCurrentIndex(box.findData(viewer.layers["movie"]))
    assert widget.told.text().endswith("(mine.csv).")
    assert "another movie, other ROIs or other settings: press Estimate again" in widget.bar.status.text()


def opacities(widget):
    return {page.graphics.ci.opacity() for page in (widget.plots, widget.average, widget.connections)}


def test_what_was_made_of_other_pulses_is_told_and_dimmed(qtbot, open_stimulation, scene, quick, tmp_path):
    _, widget = open_stimulation(stimulation=scene[2])
    with qtbot.waitSignal(widget.finished, timeout=30_000):
        press(qtbot, widget.bar.start)
    write_table(tmp_path / "same.csv", scene[2])
    widget.load_file(tmp_path / "same.csv")
    assert opacities(widget) == {1}
    write_table(tmp_path / "later.csv", replace(scene[2], onset=scene[2].onset + 0.1))
    widget.load_file(tmp_path / "later.csv")
    assert "other settings: press Estimate again" in widget.bar.status.text()
    assert opacities(widget) == {DIMMED}
    widget.load_file(tmp_path / "same.csv")
    assert opacities(widget) == {1}
    widget.samples.setValue(33)
    assert opacities(widget) == {DIMMED}
    widget.show_cell(1)
    widget.connections.show_result(widget.result, widget.connections.found)
    assert opacities(widget) == {DIMMED}


def test_cancelled_work_shows_nothing(qtbot, open_stimulation, quick, scene):
    _, gate = quick
    _, widget = open_stimulation(stimulation=scene[2])
    gate.clear()
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: widget.bar.progress.format().startswith("sampling, 1 of 3"), timeout=30_000)
    assert widget.bar.progress.format().endswith("2 s left")
    assert widget.connections.matrix.image.shape == (4, 4)
    press(qtbot, widget.bar.cancel)
    gate.set()
    qtbot.waitUntil(lambda: not widget._worker.busy)
    assert widget.result is None
    assert widget.connections.graphics.ci.opacity() == 0
    assert "Cancelled" in widget.bar.status.text()
    assert widget.bar.start.isEnabled()


def test_it_fits_a_small_window_and_follows_the_theme(qtbot, open_stimulation, quick, viewer):
    _, widget = open_stimulation()
    viewer.window.resize(1280, 800)
    QApplication.processEvents()
    assert widget.minimumSizeHint().width() <= 640
    order, one = [], widget.load
    for _ in range(6):
        order.append(one)
        one = one.nextInFocusChain()
        while one.focusPolicy() == Qt.FocusPolicy.NoFocus or one.focusProxy() is not None:
            one = one.nextInFocusChain()
    assert order == [widget.load, widget.settle, widget.samples, widget.bar.start, widget.bar.cancel, widget.table]
    for control in (widget.load, widget.settle, widget.samples, widget.table, widget.csv, widget.connections.csv):
        assert control.toolTip()
    viewer.theme = "light"
    assert widget.plots.response.opts["pen"].color().name() == "#00796b"
    viewer.theme = "dark"
    assert widget.plots.response.opts["pen"].color().name() == "#35c9b5"


@pytest.mark.parametrize("how", ["dock", "window"])
def test_closing_in_the_middle_leaves_nothing(qtbot, open_stimulation, quick, viewer, scene, how):
    _, gate = quick
    before = threading.active_count()
    _, widget = open_stimulation(stimulation=scene[2])
    listeners = len(viewer.events.theme.callbacks)
    gate.clear()
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: widget.bar.progress.format().startswith("sampling"), timeout=30_000)
    threading.Timer(0.3, gate.set).start()
    if how == "window":
        viewer.close()
    else:
        viewer.window._wrapped_dock_widgets["stimulation"].destroyOnClose()
    qtbot.waitUntil(lambda: not widget._attached, timeout=10_000)
    assert not widget._worker.busy
    assert widget.result is None
    qtbot.waitUntil(lambda: threading.active_count() <= before + 1, timeout=10_000)
    assert len(viewer.events.theme.callbacks) < listeners
