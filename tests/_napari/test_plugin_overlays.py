"""True spikes, OASIS and cells that light up, laid over what is shown."""

from __future__ import annotations

import numpy as np
import pytest
from plugin_helpers import CENTRES, FRAME_RATE, posterior_of
from qtpy.QtCore import Qt
from scipy.ndimage import gaussian_filter1d

import napari_calvae as calvae
from napari_calvae._napari import activity, overlays


def results(n_rois=2, n_frames=203):
    traces = calvae.Traces(np.random.default_rng(0).normal(size=(n_rois, n_frames)), 20.0, roi_ids=(3, 7)[:n_rois])
    whole = posterior_of(traces, 10)
    return {roi: (whole, row) for row, roi in enumerate(whole.roi_ids)}


def test_cells_light_up_in_their_own_pixels_and_frames():
    rows = results()
    labels = np.array([[0, 3, 3], [5, 7, 9]])
    movie = activity.paint(rows, labels)
    assert movie.shape == (203, 2, 3)
    assert movie.dtype == np.float32
    shown = np.asarray(movie)
    for (result, row), pixels in ((rows[3], [(0, 1), (0, 2)]), (rows[7], [(1, 1)])):
        expected = gaussian_filter1d(result.rate[row], 2.0, mode="nearest", truncate=4)
        for y, x in pixels:
            np.testing.assert_allclose(shown[:, y, x], expected, rtol=1e-4, atol=1e-5)
    for y, x in ((0, 0), (1, 0), (1, 2)):
        assert not shown[:, y, x].any()
    np.testing.assert_array_equal(np.asarray(movie[150]), shown[150])


def test_the_brightest_is_what_the_middle_cell_reaches():
    rows = results()
    peaks = [gaussian_filter1d(r.rate[k], 2.0, truncate=4).max() for r, k in rows.values()]
    assert activity.brightest(rows) == pytest.approx(np.median(peaks))


@pytest.mark.usefixtures("network")
def test_cells_light_up_once_inferred_and_go_dark_again(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[1])
    qtbot.waitUntil(lambda: widget.plots.picture is not None, timeout=20_000)
    active = viewer.layers.selection.active
    qtbot.mouseClick(widget.plots.activity_button, Qt.MouseButton.LeftButton)
    layer = viewer.layers[overlays.LAYER]
    assert viewer.layers.selection.active is active
    np.testing.assert_allclose(layer.scale, viewer.layers["movie"].scale)
    assert "inferred activity" not in [widget.controls.movie.itemText(k) for k in range(widget.controls.movie.count())]
    frame = int(widget.plots.picture.rate[0].argmax())
    assert np.asarray(layer.data[frame])[CENTRES[1]] > 0
    assert np.asarray(layer.data[frame])[CENTRES[2]] == 0
    canvas.click(*CENTRES[2])
    qtbot.waitUntil(lambda: np.asarray(layer.data[:, CENTRES[2][0], CENTRES[2][1]]).any(), timeout=20_000)
    for k in range(3):
        qtbot.mouseClick(widget.plots.activity_button, Qt.MouseButton.LeftButton)
        assert (viewer.layers[overlays.LAYER] is layer, layer.visible, len(layer.data) > 1) == (True, *[k == 1] * 2)
    # The eye in napari's list and the button say the same.
    layer.visible = True
    assert widget.plots.activity_button.isChecked()
    assert np.asarray(layer.data[frame])[CENTRES[1]] > 0
    viewer.layers.remove(layer)
    qtbot.mouseClick(widget.plots.activity_button, Qt.MouseButton.LeftButton)
    assert overlays.LAYER not in viewer.layers
    qtbot.mouseClick(widget.plots.activity_button, Qt.MouseButton.LeftButton)
    assert np.asarray(viewer.layers[overlays.LAYER].data[frame])[CENTRES[1]] > 0


def test_cells_light_up_where_a_turned_movie_lies(qtbot, show_movie, open_widget, viewer, labels):
    def turn(layer, angle):
        rotate = np.eye(layer.ndim)
        rotate[-2:, -2:] = [(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))]
        layer.rotate = rotate

    movie = show_movie(rois=None)
    rois = viewer.add_labels(labels.copy(), name="ROIs")
    turn(movie, 0.3), turn(rois, 0.3)
    widget = open_widget()
    widget.infer_all()
    qtbot.waitUntil(lambda: len(widget.results.rows) == 3 and not widget._batch.busy, timeout=20_000)
    qtbot.mouseClick(widget.plots.activity_button, Qt.MouseButton.LeftButton)
    layer, place = viewer.layers[overlays.LAYER], (5, *CENTRES[1])
    np.testing.assert_allclose(layer.data_to_world(place), movie.data_to_world(place))
    turn(movie, 0.5), turn(rois, 0.5)
    qtbot.waitUntil(lambda: np.allclose(layer.data_to_world(place), movie.data_to_world(place)), timeout=5_000)


@pytest.mark.parametrize("change", ["settings", "rois", "movie"])
def test_nothing_glows_that_no_longer_holds(qtbot, show_movie, open_widget, viewer, network, change):
    show_movie()
    widget = open_widget()
    widget.infer_all()
    qtbot.waitUntil(lambda: len(widget.results.rows) == 3 and not widget._batch.busy, timeout=20_000)
    qtbot.mouseClick(widget.plots.activity_button, Qt.MouseButton.LeftButton)
    layer = viewer.layers[overlays.LAYER]
    assert np.asarray(layer.data).any()
    if change == "settings":
        widget.controls.neuropil.setValue(0.3)  # no ROI is picked: nothing is inferred again by itself
    elif change == "rois":
        viewer.layers["ROIs"].data = np.zeros_like(viewer.layers["ROIs"].data)
    else:
        viewer.layers.remove("movie")
    qtbot.waitUntil(lambda: not np.asarray(layer.data).any(), timeout=5_000)
    assert layer.visible
    assert len(network.calls) == 1
    if change == "settings":
        widget.infer_all()
        qtbot.waitUntil(lambda: np.asarray(layer.data).any(), timeout=20_000)


@pytest.mark.usefixtures("network")
def test_true_spikes_are_marked_where_the_layer_knows_them(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie()
    viewer.layers["ROIs"].metadata["spike_times"] = {1: np.array([2.0, 5.5, 99.0])}
    widget = open_widget()
    canvas.click(*CENTRES[1])
    qtbot.waitUntil(lambda: widget.plots.picture is not None, timeout=20_000)
    assert widget.plots.truth_button.isEnabled()
    assert widget.plots.true_spikes.getData()[0] is None or not len(widget.plots.true_spikes.getData()[0])
    qtbot.mouseClick(widget.plots.truth_button, Qt.MouseButton.LeftButton)
    x, y = widget.plots.true_spikes.getData()
    np.testing.assert_array_equal(x, [2.0, 2.0, 5.5, 5.5])
    assert y.min() > widget.plots.picture.n_samples
    assert "true spikes" in widget.plots.raster_row.words.toPlainText()
    canvas.click(*CENTRES[2])
    qtbot.waitUntil(lambda: widget.plots.picture.roi_ids == (2,), timeout=20_000)
    assert not widget.plots.truth_button.isEnabled()
    assert "true spikes" not in widget.plots.raster_row.words.toPlainText()


@pytest.mark.usefixtures("network")
def test_oasis_is_drawn_beside_ours_with_as_many_spikes(qtbot, show_movie, open_widget, canvas):
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    show_movie()
    widget = open_widget()
    qtbot.mouseClick(widget.plots.rival_button, Qt.MouseButton.LeftButton)
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(lambda: widget.plots.rival is not None, timeout=20_000)
    expected = calvae.oasis(widget.plots.picture.traces)[0]
    np.testing.assert_array_equal(widget.plots.rival, expected)
    _, y = widget.plots.rival_rate.getData()
    band = widget.plots.band
    frames = round(band.window * FRAME_RATE)
    mine = widget.plots.picture.rate[0]
    scaled = expected * mine.sum() / expected.sum()
    np.testing.assert_allclose(y[::2], scaled[: frames * len(band.mean)].reshape(-1, frames).mean(1), rtol=1e-5)
    assert "OASIS" in widget.plots.rate_row.words.toPlainText()
    qtbot.mouseClick(widget.plots.rival_button, Qt.MouseButton.LeftButton)
    assert widget.plots.rival is None
    assert "OASIS" not in widget.plots.rate_row.words.toPlainText()


@pytest.mark.usefixtures("network")
def test_without_oasis_a_sentence_says_how_to_get_it(qtbot, show_movie, open_widget, canvas, monkeypatch):
    def absent(_):
        raise calvae.RecordingError(
            "OASIS: expected the package oasis-deconv, found none. Install napari-calvae[bench]."
        )

    monkeypatch.setitem(vars(calvae), "oasis", absent)
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(lambda: widget.plots.picture is not None, timeout=20_000)
    qtbot.mouseClick(widget.plots.rival_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: "napari-calvae[bench]" in widget.controls.status.text(), timeout=5000)
    assert not widget.plots.rival_button.isChecked()
    assert widget.plots.picture is not None


@pytest.mark.usefixtures("network")
def test_pinned_cells_stay_in_view_on_the_same_time(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie()
    widget = open_widget()
    pinned = widget.plots.pinned
    assert not pinned.isVisible()
    for roi in (1, 2):
        canvas.click(*CENTRES[roi])
        qtbot.waitUntil(lambda roi=roi: widget.plots.picture is not None and widget.plots.picture.roi_ids == (roi,))
        qtbot.mouseClick(widget.plots.pin_button, Qt.MouseButton.LeftButton)
    qtbot.mouseClick(widget.plots.pin_button, Qt.MouseButton.LeftButton)
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(lambda: widget.plots.picture.roi_ids == (3,))
    assert list(pinned.cells) == [1, 2]
    assert pinned.isVisible()
    widget.plots.trace_row.view.setXRange(3, 9, padding=0)
    for roi, cell in pinned.cells.items():
        qtbot.waitUntil(lambda cell=cell: cell.trace.getData()[0][-1] < 10)
        x, y = cell.trace.getData()
        np.testing.assert_allclose(cell.rows[0].view.viewRange()[0], (3, 9), atol=0.3)
        np.testing.assert_allclose(y, cell.picture.traces.values[0][np.round(x * FRAME_RATE).astype(int)])
        assert f"ROI {roi}" in cell.title.text()
        assert cell.raster.image.shape[0] == cell.picture.n_samples
    viewer.dims.set_point(0, 5.0)
    assert pinned.cells[1].rows[0].cursor.value() == pytest.approx(5.0, abs=0.1)
    widget.controls.samples.setValue(20)
    qtbot.waitUntil(lambda: "before the last change" in pinned.cells[1].title.text(), timeout=10_000)
    widget.infer_all()
    qtbot.waitUntil(lambda: pinned.cells[1].picture.n_samples == 20, timeout=10_000)
    assert "before the last change" not in pinned.cells[1].title.text()
    qtbot.mouseClick(pinned.cells[1].close_button, Qt.MouseButton.LeftButton)
    assert list(pinned.cells) == [2]
    qtbot.mouseClick(pinned.cells[2].close_button, Qt.MouseButton.LeftButton)
    assert not pinned.isVisible()
