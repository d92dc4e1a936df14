"""ROIs that are edited, moved and removed in a real viewer, and what is inferred again because of it."""

from __future__ import annotations

import numpy as np
import pytest
from napari.utils import progress
from plugin_helpers import CENTRES, FRAME_RATE
from qtpy.QtCore import Qt

import napari_calvae as calvae
from napari_calvae._napari import following

pytestmark = pytest.mark.usefixtures("network")


def shows(qtbot, widget, roi):
    qtbot.waitUntil(lambda: widget.plots.picture is not None and widget.plots.picture.roi_ids == (roi,), timeout=20_000)


def settled(qtbot, widget):
    """Wait until edits were noticed and what follows from them is done."""
    qtbot.wait(following.PAUSE + 100)
    qtbot.waitUntil(lambda: not widget._clicked.busy and not widget._follower._timer.isActive(), timeout=20_000)


def drag(qtbot, canvas, start, end):
    """Drag slowly: vispy leaves out movements that follow each other at once."""
    from qtpy.QtCore import QEvent, QPointF
    from qtpy.QtGui import QMouseEvent
    from qtpy.QtTest import QTest
    from qtpy.QtWidgets import QApplication

    native, left = canvas.viewer.window._qt_viewer.canvas.native, Qt.MouseButton.LeftButton
    none = Qt.KeyboardModifier.NoModifier
    # Where things are on the screen is asked for first: some modes zoom or move on the way.
    points = [canvas._point(*(np.array(start) * (1 - s) + np.array(end) * s)) for s in (0, 0.25, 0.5, 0.75, 1.0)]
    QTest.mouseMove(native, points[0])
    QTest.mousePress(native, left, pos=points[0])
    for point in points[1:]:
        qtbot.wait(30)
        place = QPointF(point)
        moved = QMouseEvent(
            QEvent.Type.MouseMove, place, native.mapToGlobal(place), Qt.MouseButton.NoButton, left, none
        )
        QApplication.sendEvent(native, moved)
    QTest.mouseRelease(native, left, pos=points[-1])


def expected(movie, labels, roi):
    traces = calvae.extract(movie, labels, FRAME_RATE)
    return traces.values[traces.index(roi)]


@pytest.fixture
def apart(movie):
    """The movie with a wide dark margin and a fourth cell in its far corner, out of reach of the others."""
    wide = np.pad(movie, ((0, 0), (0, 90), (0, 90)), constant_values=100)
    wide[:, 105:115, 105:115] = movie[:, 5:15, 5:15]
    return np.random.default_rng(0).poisson(wide).astype(np.uint16)


@pytest.fixture
def apart_labels(labels):
    wide = np.pad(labels, ((0, 90), (0, 90)))
    wide[106:114, 106:114] = 4
    return wide


def test_a_painted_roi_is_inferred_again_once_and_by_itself(
    qtbot, show_movie, open_widget, canvas, network, viewer, movie
):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    layer = viewer.layers["ROIs"]
    layer.brush_size = 3
    layer.mode = "paint"
    drag(qtbot, canvas, (10, 10), (10, 18))
    assert layer.data[10, 18] == 1
    layer.mode = "erase"
    canvas.click(7, 10)
    assert layer.data[7, 10] == 0
    settled(qtbot, widget)
    assert network.calls == [(1,), (1,)]
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, layer.data, 1))
    qtbot.waitUntil(lambda: np.concatenate(viewer.layers["picked ROI"].data)[:, 1].max() > 17)
    layer.undo()
    layer.undo()
    settled(qtbot, widget)
    assert network.calls == [(1,), (1,), (1,)]
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, layer.data, 1))


def test_an_edit_out_of_reach_changes_nothing_that_is_known(
    qtbot, show_movie, open_widget, canvas, network, viewer, apart, apart_labels
):
    show_movie(apart, rois=apart_labels)
    widget = open_widget()
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    before = widget.plots.picture
    layer = viewer.layers["ROIs"]
    layer.selected_label = 4
    layer.fill((100, 60), 5)  # the background, so that all rings are lost
    layer.undo()
    layer.paint((104, 110), 4)
    settled(qtbot, widget)
    assert network.calls == [(1, 2, 3, 4)]
    assert widget.plots.picture is before
    assert set(widget.results.rows) == {1, 2, 3}
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: set(widget.results.rows) == {1, 2, 3, 4}, timeout=20_000)
    assert network.calls == [(1, 2, 3, 4), (4,)]


def test_an_edit_while_all_are_inferred_costs_the_edited_roi_alone(qtbot, show_movie, open_widget, network, viewer):
    show_movie()
    widget = open_widget()
    widget.controls.neuropil.setValue(0)
    gate = network.hold(2)
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(widget.results.rows) == 1)
    viewer.layers["ROIs"].paint((16, 29), 2)
    settled(qtbot, widget)
    gate.set()
    qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    assert set(widget.results.rows) == {1, 3}
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(widget.results.rows) == 3, timeout=20_000)
    assert network.calls == [(1, 2, 3), (2,)]


def test_other_settings_while_all_are_inferred_end_that(qtbot, show_movie, open_widget, network):
    show_movie()
    widget = open_widget()
    gate = network.hold(2)
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(widget.results.rows) == 1)
    widget.controls.samples.setValue(30)
    gate.set()
    qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    assert "settings changed" in widget.controls.status.text()
    assert not progress._all_instances


def test_without_neuropil_only_the_edited_roi_is_inferred_again(
    qtbot, show_movie, open_widget, canvas, network, viewer
):
    show_movie()
    widget = open_widget()
    widget.controls.neuropil.setValue(0)
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    viewer.layers["ROIs"].paint((16, 29), 2)
    settled(qtbot, widget)
    assert set(widget.results.rows) == {1, 3}


def test_a_roi_that_is_erased_is_let_go_with_a_sentence(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[2])
    shows(qtbot, widget, 2)
    layer = viewer.layers["ROIs"]
    layer.mode = "fill"
    layer.selected_label = 0
    canvas.click(*CENTRES[2])
    settled(qtbot, widget)
    assert widget.picked_roi is None
    assert widget.plots.picture is None
    assert "ROI 2 is gone" in widget.controls.status.text()
    assert "picked ROI" not in viewer.layers
    layer.mode = "pan_zoom"
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    layer.data = np.zeros_like(layer.data)
    settled(qtbot, widget)
    assert widget.plots.picture is None
    assert "expected at least one, got none in the Labels layer" in widget.controls.status.text()


def test_other_data_in_the_movie_are_inferred_again(qtbot, show_movie, open_widget, canvas, viewer, movie, labels):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 3)
    other = movie[::-1].copy()
    viewer.layers["movie"].data = other
    settled(qtbot, widget)
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(other, labels, 3))


def test_data_that_changed_in_place_count_when_they_are_assigned_anew(
    qtbot, show_movie, open_widget, canvas, network, viewer, movie, labels
):
    layer = show_movie(movie.copy())
    widget = open_widget()
    for roi in (3, 2):
        canvas.click(*CENTRES[roi])
        shows(qtbot, widget, roi)
    layer.data[:] = movie[::-1]
    layer.data = layer.data
    canvas.click(*CENTRES[3])  # at once, before edits are looked at
    shows(qtbot, widget, 3)
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie[::-1], labels, 3))
    settled(qtbot, widget)
    assert network.calls == [(3,), (2,), (3,)]
    layer.data[:] = movie
    layer.data = layer.data
    settled(qtbot, widget)  # the one on view by itself
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, labels, 3))


def test_a_frame_rate_of_the_time_axis_is_that_of_its_present_scale(qtbot, show_movie, open_widget, canvas, viewer):
    units = ("second", "pixel", "pixel")
    layer = show_movie(metadata={}, units=units)
    viewer.layers["ROIs"].units = units[1:]
    widget = open_widget()
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 3)
    controls = widget.controls
    assert (controls.frame_rate.text(), controls.rate_source.text()) == ("20", "Hz (time axis)")
    layer.scale = (1 / 10, 1, 1)
    settled(qtbot, widget)
    assert (controls.frame_rate.text(), controls.rate_source.text()) == ("10", "Hz (time axis)")
    assert widget.plots.picture.frame_rate == 10
    qtbot.keyClicks(controls.frame_rate, "5")  # being typed behind the 10
    layer.scale = (1 / 8, 1, 1)
    settled(qtbot, widget)
    assert controls.frame_rate.text() == "105"
    controls.frame_rate.setText("12")
    controls.frame_rate.setModified(True)
    qtbot.keyClick(controls.frame_rate, Qt.Key.Key_Return)
    layer.scale = (1 / 20, 1, 1)
    settled(qtbot, widget)
    assert (controls.frame_rate.text(), controls.rate_source.text()) == ("12", "Hz (typed)")
    assert widget.plots.picture.frame_rate == 12


@pytest.mark.parametrize("gone", ["movie", "ROIs", "all"])
def test_nothing_is_shown_of_a_movie_or_rois_that_were_removed(qtbot, show_movie, open_widget, canvas, viewer, gone):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 3)
    qtbot.waitUntil(lambda: "picked ROI" in viewer.layers)
    if gone == "all":
        viewer.layers.clear()
    else:
        viewer.layers.remove(gone)
    settled(qtbot, widget)
    assert widget.plots.picture is None
    assert "picked ROI" not in viewer.layers or viewer.layers["picked ROI"].nshapes == 0
    assert "got none" in widget.controls.status.text()


def test_a_late_answer_is_not_shown_under_another_movie(
    qtbot, show_movie, open_widget, canvas, network, viewer, movie, labels
):
    show_movie()
    widget = open_widget()
    gate = network.hold(3)
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(lambda: network.calls == [(3,)])
    other = viewer.add_image(movie[::-1].copy(), name="other")  # whose frame rate nobody knows
    widget.controls.choose_movie(other)
    gate.set()
    settled(qtbot, widget)
    assert widget.plots.picture is None
    assert not widget.results.rows
    widget._on_frame_rate_typed(str(FRAME_RATE))
    shows(qtbot, widget, 3)
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie[::-1], labels, 3))


def test_rois_of_another_layer_are_inferred_anew(qtbot, show_movie, open_widget, canvas, viewer, movie, labels):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 3)
    turned = np.where(labels > 0, 4 - labels, 0)
    viewer.add_labels(turned, name="turned")
    widget.controls.choose_rois(viewer.layers["turned"])
    assert widget.plots.picture is None
    shows(qtbot, widget, 3)
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, labels, 1))


def test_a_shape_that_is_dragged_takes_its_trace_along(qtbot, show_movie, open_widget, canvas, network, viewer, movie):
    show_movie(rois=None)
    corners = np.array([(6, 6), (6, 14), (14, 14), (14, 6)])
    layer = viewer.add_shapes(
        [corners, corners + np.array((0, 19)), corners + np.array((19, 9))],
        shape_type=["rectangle", "ellipse", "polygon"],
    )
    widget = open_widget()
    viewer.layers.selection.active = viewer.layers["movie"]
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    first = widget.plots.picture.traces.values[0]
    viewer.layers.selection.active = layer
    layer.mode = "select"
    canvas.click(10, 10)
    drag(qtbot, canvas, (10, 10), (20, 30))
    settled(qtbot, widget)
    centre = np.mean(layer.data[0], axis=0)
    assert centre == pytest.approx((20, 30), abs=1)
    assert network.calls == [(1,), (1,)]
    image = widget.choices.rois()[1]
    assert np.argwhere(image == 1).mean(axis=0) == pytest.approx(centre, abs=0.5)
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, image, 1))
    assert not np.array_equal(first, widget.plots.picture.traces.values[0])
    assert (image == 2).sum() == pytest.approx(np.pi * 16, rel=0.2)
    layer.selected_data = {0}
    layer.remove_selected()
    settled(qtbot, widget)
    assert widget.picked_roi == 1  # the shapes that are left move up
    layer.selected_data = {0, 1}
    layer.remove_selected()
    settled(qtbot, widget)
    assert "got none in the Shapes layer" in widget.controls.status.text()
    assert widget.plots.picture is None


def test_lines_are_no_rois(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie(rois=None)
    viewer.add_shapes([[(3, 3), (20, 20)]], shape_type="line")
    viewer.layers.selection.active = viewer.layers["movie"]
    widget = open_widget()
    with qtbot.waitSignal(widget.failed):
        canvas.click(*CENTRES[1])
    assert "got a line (shape 1 of the layer)" in widget.controls.status.text()


def test_points_are_discs_that_can_be_moved_and_added(qtbot, show_movie, open_widget, canvas, network, viewer, movie):
    show_movie(rois=None)
    layer = viewer.add_points([CENTRES[1], CENTRES[2], (200, 3)], size=2)
    widget = open_widget()
    widget.controls.diameter.setValue(8)
    viewer.layers.selection.active = viewer.layers["movie"]
    canvas.click(CENTRES[2][0] + 2, CENTRES[2][1])
    shows(qtbot, widget, 2)
    image = widget.choices.rois()[1]
    assert set(np.unique(image)) == {0, 1, 2}  # the third is outside
    assert (image == 2).sum() == pytest.approx(np.pi * 16, rel=0.1)
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, image, 2))
    viewer.layers.selection.active = layer
    layer.mode = "select"
    canvas.click(*CENTRES[2])
    drag(qtbot, canvas, CENTRES[2], CENTRES[3])
    assert layer.data[1] == pytest.approx(CENTRES[3], abs=1)
    settled(qtbot, widget)
    image = widget.choices.rois()[1]
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, image, 2))
    widget.controls.diameter.setValue(12)
    settled(qtbot, widget)
    image = widget.choices.rois()[1]
    assert (image == 2).sum() > 100
    np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected(movie, image, 2))
    layer.mode = "pan_zoom"
    widget.controls.place.click()
    canvas.click(10, 28)
    shows(qtbot, widget, 4)
    assert layer.data[3] == pytest.approx(CENTRES[2], abs=2.5)


@pytest.mark.parametrize("snap", [True, False])
def test_a_disc_goes_to_the_middle_of_the_cell_or_where_it_was_put(
    qtbot, show_movie, open_widget, canvas, viewer, snap
):
    show_movie(rois=None)
    widget = open_widget()
    widget.controls.diameter.setValue(9)
    widget.controls.place.click()
    if not snap:
        widget.controls.snap.click()
    canvas.click(13, 32)
    shows(qtbot, widget, 1)
    middle = np.argwhere(viewer.layers["ROIs"].data == 1).mean(axis=0)
    off = np.hypot(*(middle - CENTRES[2]))
    assert off < 1.5 if snap else off > 3.5
    canvas.click(18, 31)  # snapping would lead to the same cell
    shows(qtbot, widget, 2)
    assert viewer.layers["ROIs"].data[18, 31] == 2


def test_baseline_amplitude_and_device_reach_the_network(
    qtbot, show_movie, open_widget, canvas, network, movie, labels
):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    assert network.asked[-1]["traces"].unit == "raw"
    assert (network.asked[-1]["amplitude"], network.asked[-1]["device"]) == (None, "auto")

    def asked_again(change):
        n = len(network.asked)
        change()
        qtbot.waitUntil(lambda: len(network.asked) == n + 1 and not widget._clicked.busy, timeout=20_000)
        return network.asked[-1]

    got = asked_again(lambda: widget.controls.baseline_percentile.setValue(30))
    raw = calvae.extract(movie, labels, FRAME_RATE, wanted=(1,))
    np.testing.assert_array_equal(got["traces"].values, calvae.delta_f_over_f(raw, 60.0, 30).values)
    got = asked_again(lambda: widget.controls.baseline_window.setValue(5))
    np.testing.assert_array_equal(got["traces"].values, calvae.delta_f_over_f(raw, 5, 30).values)
    assert asked_again(lambda: widget.controls.amplitude.setValue(0.25))["amplitude"] == 0.25
    assert asked_again(lambda: widget.controls.device.setCurrentIndex(1))["device"] == "cpu"
    widget.controls.amplitude.setFocus()
    widget.controls.amplitude.selectAll()
    qtbot.keyClicks(widget.controls.amplitude, "0")
    got = asked_again(lambda: qtbot.keyClick(widget.controls.amplitude, Qt.Key.Key_Return))
    assert got["amplitude"] is None
    assert widget.controls.amplitude.text() == "unknown"


@pytest.mark.parametrize("end", ["finished", "cancelled", "closed"])
def test_progress_in_the_activity_dock_is_gone_in_the_end(qtbot, show_movie, open_widget, network, viewer, end):
    from napari._qt.widgets.qt_progress_bar import QtLabeledProgressBar

    def bars():
        return viewer.window._qt_window._activity_dialog.findChildren(QtLabeledProgressBar)

    show_movie()
    widget = open_widget()
    gate = network.hold(2)
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(widget.results.rows) == 1 and bars() and bars()[0].qt_progress_bar.value() > 50)
    (bar,) = bars()
    assert bar.description_label.text().startswith("Spikes of 3 ROIs")
    qtbot.waitUntil(lambda: "<" in bar.eta_label.text())  # [time taken < time left]
    if end == "cancelled":
        qtbot.mouseClick(widget.controls.cancel, Qt.MouseButton.LeftButton)
        qtbot.waitUntil(lambda: not progress._all_instances)
    gate.set()
    if end == "closed":
        viewer.window.remove_dock_widget(widget)
    qtbot.waitUntil(lambda: not progress._all_instances and not bars(), timeout=20_000)


@pytest.mark.parametrize("n_edits", [40, pytest.param(120, marks=pytest.mark.slow)])
def test_after_random_edits_the_picture_is_that_of_the_picked_roi(
    n_edits, qtbot, show_movie, open_widget, canvas, network, viewer, movie
):
    rng = np.random.default_rng(11)
    stack = np.stack([movie, movie[::-1]], axis=1)
    show_movie(stack, scale=(1 / FRAME_RATE, 1, 1, 1), rois=None)
    start = np.zeros((2, 40, 40), np.int32)
    start[0, 6:14, 6:14], start[1, 25:33, 15:23] = 1, 2
    layer = viewer.add_labels(start, name="ROIs")
    widget = open_widget()
    widget.controls.place.click()
    failures = []
    widget.failed.connect(failures.append)

    def paint(label):
        place = rng.integers(4, 36, 2)
        layer.paint((viewer.dims.current_step[1], *place), label)

    actions = [
        lambda: canvas.click(*rng.integers(2, 38, 2)),
        lambda: canvas.click(*rng.integers(2, 38, 2)),
        lambda: paint(int(rng.integers(0, 4))),
        lambda: paint(0),
        layer.undo,
        lambda: viewer.dims.set_current_step(1, int(rng.integers(0, 2))),
        lambda: viewer.dims.set_current_step(0, int(rng.integers(0, 400))),
        lambda: widget.controls.samples.setValue(int(rng.integers(5, 60))),
        lambda: widget.controls.neuropil.setValue(float(rng.choice([0, 0.7]))),
        widget.infer_all,
        widget.cancel,
        lambda: qtbot.wait(int(rng.integers(1, 400))),
    ]
    for k in rng.integers(0, len(actions), n_edits):
        actions[k]()
        qtbot.wait(5)
        if rng.random() < 0.1:
            settled(qtbot, widget)
            check(widget, stack, layer)
    qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    settled(qtbot, widget)
    check(widget, stack, layer)
    assert len(network.calls) > n_edits / 8
    assert all("free pixels" in sentence or "expected at least one" in sentence for sentence in failures), failures


def check(widget, stack, layer):
    """What is shown is what the network makes of the picked ROI as it is now."""
    if widget.picked_roi is None:
        assert widget.plots.picture is None
        return
    plane, settings = widget.choices.plane, widget.choices.settings()
    traces = calvae.extract(
        stack[:, plane], layer.data[plane], FRAME_RATE, neuropil_coefficient=settings.neuropil_coefficient
    )
    picture = widget.plots.picture
    assert picture.roi_ids == (widget.picked_roi,)
    assert picture.n_samples == settings.n_samples
    np.testing.assert_allclose(picture.traces.values[0], traces.values[traces.index(widget.picked_roi)], rtol=1e-5)
