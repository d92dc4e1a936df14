"""The dock widget on a real viewer, with real mouse events; the network is a stand-in that the tests can hold up."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from plugin_helpers import CENTRES, FRAME_RATE, hide_as_if_closed
from qtpy.QtCore import QPoint, Qt, QTimer
from qtpy.QtGui import QCloseEvent
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QDialog

import napari_calvae as calvae
from napari_calvae.inference import devices

pytestmark = pytest.mark.usefixtures("network")


class Pressed(QCloseEvent):
    """As the X of a window's frame sends it."""

    def spontaneous(self):
        return True


def wait_for(qtbot, widget, roi):
    qtbot.waitUntil(lambda: widget.plots.picture is not None and widget.plots.picture.roi_ids == (roi,), timeout=20_000)


def test_a_click_on_a_roi_shows_its_posterior(qtbot, show_movie, open_widget, canvas, movie, labels, viewer):
    show_movie()
    widget = open_widget()
    for roi in (2, 3, 1):
        canvas.click(*CENTRES[roi])
        wait_for(qtbot, widget, roi)
        assert f"ROI {roi}" in widget.plots.title.text()
        assert viewer.layers["ROIs"].selected_label == roi
        expected = calvae.extract(movie, labels, FRAME_RATE).values[roi - 1]
        np.testing.assert_array_equal(widget.plots.picture.traces.values[0], expected)
        widget.plots.trace_row.view.setXRange(2, 8, padding=0)
        widget.plots.redraw()
        x, y = widget.plots.trace.getData()
        frames = np.round(x * FRAME_RATE).astype(int)
        assert set(range(40, 161)) <= set(frames)
        np.testing.assert_allclose(x, frames / FRAME_RATE)
        np.testing.assert_allclose(y, expected[frames])
        np.testing.assert_allclose(
            widget.plots.reconstruction.getData()[1], widget.plots.picture.reconstruction[0][frames]
        )
        np.testing.assert_allclose(widget.plots.spread.high - widget.plots.spread.low, 4, rtol=1e-5)
        samples = widget.plots.picture.samples()[:, 0]
        np.testing.assert_array_equal(widget.plots.raster.image > 0, samples[:, frames] > 0)
        band = widget.plots.band
        expected_band = widget.plots.picture.interval(0.9, band.window)[:, 0] / band.window
        first = round((band.boundaries[0] + 0.5 / FRAME_RATE) / band.window)
        np.testing.assert_allclose([band.low, band.high], expected_band[:, first : first + len(band.low)])
    assert widget.controls.device.currentText() == "auto: cpu"
    offered = {widget.controls.device.itemData(k) for k in range(widget.controls.device.count())}
    assert offered == {"auto", *devices()}
    qtbot.waitUntil(lambda: "picked ROI" in viewer.layers and not widget._outline_timer.isActive())
    outline = viewer.layers["picked ROI"]
    assert np.concatenate(outline.data).mean(axis=0) == pytest.approx(CENTRES[1], abs=0.5)
    assert viewer.layers.selection.active is viewer.layers["ROIs"]


def test_a_drag_and_a_click_while_painting_pick_nothing(qtbot, show_movie, open_widget, canvas, network, viewer):
    show_movie()
    widget = open_widget()
    canvas.drag(CENTRES[1], CENTRES[2])
    viewer.reset_view()
    viewer.layers["ROIs"].mode = "pick"
    canvas.click(*CENTRES[1])
    qtbot.wait(100)
    assert network.calls == []
    assert widget.picked_roi is None


def test_the_newest_click_wins(qtbot, show_movie, open_widget, canvas, network):
    show_movie()
    widget = open_widget()
    shown = []
    widget.shown.connect(shown.append)
    gate = network.hold(1)
    canvas.click(*CENTRES[1])
    qtbot.waitUntil(lambda: network.calls == [(1,)])
    canvas.click(*CENTRES[2])
    canvas.click(*CENTRES[3])
    gate.set()
    wait_for(qtbot, widget, 3)
    qtbot.waitUntil(lambda: not widget._clicked.busy)
    assert shown == [3]
    assert network.calls == [(1,), (3,)]


def test_what_fails_leaves_no_other_picture(qtbot, show_movie, open_widget, canvas, network):
    show_movie()
    widget = open_widget()
    assert not widget.plots.pin_button.isEnabled()
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    assert widget.plots.pin_button.isEnabled()
    network.broken.add(2)
    gate = network.hold(2)
    canvas.click(*CENTRES[2])
    assert widget.plots.picture.roi_ids == (1,)  # in view until the other one is there, but not to be taken for it
    assert widget.plots.current is None
    assert not widget.plots.pin_button.isEnabled()
    with qtbot.waitSignal(widget.failed, timeout=20_000):
        gate.set()
    assert "got none of ROI 2" in widget.controls.status.text()
    assert widget.plots.picture is None
    assert widget.plots.trace.getData()[0] is None or not len(widget.plots.trace.getData()[0])
    network.broken.clear()
    widget.controls.samples.setValue(12)  # the picked ROI is still ROI 2
    wait_for(qtbot, widget, 2)
    assert widget.plots.pin_button.isEnabled()


def test_settings_that_fail_leave_no_picture_of_older_ones(qtbot, show_movie, open_widget, canvas, network):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    network.broken.add(1)
    with qtbot.waitSignal(widget.failed, timeout=20_000):
        widget.controls.samples.setValue(12)
    assert widget.plots.picture is None
    network.broken.clear()
    widget.controls.samples.setValue(50)
    wait_for(qtbot, widget, 1)


def test_slider_and_cursor_move_together(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[2])
    wait_for(qtbot, widget, 2)
    viewer.dims.set_current_step(0, 123)
    assert [row.cursor.value() for row in widget.plots.rows] == pytest.approx([123 / FRAME_RATE] * 3)
    view = widget.plots.raster_row.view
    for seconds in (5.0, 14.0):
        place = widget.plots.graphics.mapFromScene(view.mapViewToScene(view.viewRect().center()))
        across = view.mapViewToScene(view.mapToView(view.rect().center()))
        point = view.mapViewToScene(type(across)(seconds, 25))
        place = widget.plots.graphics.mapFromScene(point)
        QTest.mouseClick(
            widget.plots.graphics.viewport(), Qt.MouseButton.LeftButton, pos=QPoint(round(place.x()), round(place.y()))
        )
        qtbot.waitUntil(lambda s=seconds: abs(viewer.dims.point[0] - s) < 0.15)
        step = viewer.dims.current_step[0]
        assert step == pytest.approx(seconds * FRAME_RATE, abs=2)
        assert widget.plots.trace_row.cursor.value() == pytest.approx(step / FRAME_RATE)
        QTest.qWait(QApplication.doubleClickInterval() + 50)


def test_a_known_roi_is_shown_without_asking_again_until_it_is_edited(
    qtbot, show_movie, open_widget, canvas, network, viewer
):
    show_movie()
    widget = open_widget()
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    assert "3 ROIs inferred" in widget.controls.status.text()
    assert network.calls == [(1, 2, 3)]
    canvas.click(*CENTRES[2])
    wait_for(qtbot, widget, 2)
    assert network.calls == [(1, 2, 3)]
    viewer.layers["ROIs"].data_setitem((np.array([35]), np.array([35])), 3)
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    first, *between, last = network.calls
    assert (first, last) == ((1, 2, 3), (1,))
    assert between in ([], [(2,)])  # on a busy machine the one on view may be asked for again before the click


def test_infer_all_can_be_cancelled_and_clicks_are_answered_meanwhile(qtbot, show_movie, open_widget, canvas, network):
    show_movie()
    widget = open_widget()
    gate = network.hold(2)
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(widget.results.rows) == 1)
    assert widget.controls.cancel.isEnabled()
    assert 0 < widget.controls.progress.value() < 100
    canvas.click(*CENTRES[3])
    wait_for(qtbot, widget, 3)
    qtbot.mouseClick(widget.controls.cancel, Qt.MouseButton.LeftButton)
    gate.set()
    qtbot.waitUntil(lambda: not widget._batch.busy)
    assert set(widget.results.rows) == {1, 3}
    assert widget.controls.infer_all.isEnabled()
    assert widget.controls.progress.value() == 0


def test_an_unknown_frame_rate_is_asked_for(qtbot, show_movie, open_widget, canvas, network):
    show_movie(metadata={}, scale=(1, 1, 1))
    widget = open_widget()
    assert widget.controls.frame_rate.text() == ""
    assert "type it" in widget.controls.status.text()
    with qtbot.waitSignal(widget.failed):
        canvas.click(*CENTRES[1])
    assert "never guessed" in widget.controls.status.text()
    assert network.calls == []
    widget.controls.frame_rate.clear()
    qtbot.keyClicks(widget.controls.frame_rate, "20")
    qtbot.keyClick(widget.controls.frame_rate, Qt.Key.Key_Return)
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    assert widget.plots.picture.frame_rate == 20
    assert widget.controls.rate_source.text() == "Hz (typed)"
    widget.controls.frame_rate.clear()
    qtbot.keyClicks(widget.controls.frame_rate, "fast")
    with qtbot.waitSignal(widget.failed):
        qtbot.keyClick(widget.controls.frame_rate, Qt.Key.Key_Return)
    assert "got “fast”" in widget.controls.status.text()
    assert widget.controls.frame_rate.text() == "20"
    assert widget.plots.picture.frame_rate == 20


def test_a_click_beside_all_rois_places_a_disc(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie(rois=None)
    widget = open_widget()
    widget.controls.diameter.setValue(8)
    with qtbot.waitSignal(widget.failed):
        canvas.click(*CENTRES[1])
    widget.controls.place.setChecked(True)
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    canvas.click(*CENTRES[3])
    wait_for(qtbot, widget, 2)
    rois = viewer.layers["ROIs"].data
    y, x = np.nonzero(rois == 2)
    assert (y.mean(), x.mean()) == pytest.approx(CENTRES[3], abs=0.6)
    assert len(y) == pytest.approx(np.pi * 16, rel=0.2)
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    assert rois.max() == 2


def test_a_click_on_a_shape_infers_its_mask(qtbot, show_movie, open_widget, canvas, viewer, movie):
    show_movie(rois=None)
    square = np.array([(0, 6, 6), (0, 6, 14), (0, 14, 14), (0, 14, 6)])
    viewer.add_shapes([square], shape_type="polygon", scale=(1 / FRAME_RATE, 1, 1))
    viewer.layers["movie"].mode = "pan_zoom"
    viewer.layers.selection.active = viewer.layers["movie"]
    widget = open_widget()
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    got = widget.plots.picture.traces.values[0]
    assert np.corrcoef(got, movie[:, 7:14, 7:14].mean((1, 2)))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 40, 40), "at least two frames"),
        ((3, 30, 40, 40), "second"),
        ((10, 40, 40), "second"),
    ],
)
def test_a_bad_movie_gets_a_sentence_and_no_picture_of_the_one_before(
    qtbot, show_movie, open_widget, canvas, viewer, shape, words
):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    bad = viewer.add_image(np.ones(shape), name="bad", metadata={"frame_rate": FRAME_RATE})
    widget.controls.movie.setCurrentIndex(next(i for i in range(2) if widget.controls.movie.itemData(i) is bad))
    with qtbot.waitSignal(widget.failed, timeout=20_000):
        widget.pick(np.zeros(len(shape)) + 10)
    # The choice of the movie may have failed by itself before.
    qtbot.waitUntil(lambda: words in widget.controls.status.text(), timeout=20_000)
    assert "expected" in widget.controls.status.text()
    assert widget.plots.picture is None


def test_only_what_can_be_a_movie_is_offered_and_the_longest_is_chosen(
    qtbot, show_movie, open_widget, canvas, viewer, movie, labels
):
    film = show_movie()
    plane = {"metadata": {"frame_rate": FRAME_RATE}}
    anatomy = viewer.add_image(np.ones((30, 40, 40)), name="anatomy", **plane)
    viewer.add_image(movie.mean(axis=0), name="mean", **plane)
    viewer.add_image(labels, name="labels as an image")
    viewer.add_image(np.ones((500, 40, 40, 3), np.uint8), name="colours", rgb=True, **plane)
    viewer.add_image(np.ones((2, 3, 30, 40, 40)), name="channels", **plane)
    widget = open_widget()
    box = widget.controls.movie
    assert [box.itemData(k) for k in range(box.count())] == [film, anatomy]
    widget.pick(np.array([0] * (viewer.dims.ndim - 2) + list(CENTRES[2]), float))
    wait_for(qtbot, widget, 2)
    for layer in (film, anatomy):
        viewer.layers.remove(layer)
    assert widget.choices.movie is None
    with qtbot.waitSignal(widget.failed):
        widget.pick(np.zeros(viewer.dims.ndim))
    assert "with one channel, got none" in widget.controls.status.text()


def test_rois_of_another_size_get_a_sentence(qtbot, show_movie, open_widget, canvas):
    show_movie(rois=np.ones((20, 20), np.int32))
    widget = open_widget()
    with qtbot.waitSignal(widget.failed):
        canvas.click(*CENTRES[1])
    assert "40 × 40 pixels, got shape (20, 20)" in widget.controls.status.text()


def test_nothing_open_gets_a_sentence(qtbot, open_widget):
    widget = open_widget()
    with qtbot.waitSignal(widget.failed):
        qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    assert "Open a movie" in widget.controls.status.text()


def test_missing_frames_are_shaded(qtbot, show_movie, open_widget, canvas, movie):
    data = movie.astype(np.float32)
    data[100:120] = np.nan
    show_movie(data)
    widget = open_widget()
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    shaded = widget.plots.trace_row.missing
    inside = shaded.x[np.isfinite(shaded.high)]
    assert (inside.min(), inside.max()) == pytest.approx((99.5 / FRAME_RATE, 119.5 / FRAME_RATE))


def test_a_change_of_settings_infers_again(qtbot, show_movie, open_widget, canvas, network):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[1])
    wait_for(qtbot, widget, 1)
    widget.controls.samples.setValue(12)
    qtbot.waitUntil(lambda: widget.plots.picture.n_samples == 12)
    assert network.calls == [(1,), (1,)]
    assert widget.plots.raster.image.shape[0] == 12


def test_both_themes(qtbot, show_movie, open_widget, viewer):
    show_movie()
    widget = open_widget()
    viewer.theme = "light"
    assert widget.plots._palette.reconstruction == "#d55e00"
    viewer.theme = "dark"
    assert widget.plots._palette.reconstruction == "#ffa23a"


@pytest.mark.parametrize("how", ["dock", "window"])
def test_closing_in_the_middle_leaves_nothing(qtbot, show_movie, open_widget, canvas, network, viewer, how):
    show_movie()
    before = threading.active_count()
    listeners = len(viewer.mouse_drag_callbacks), len(viewer.dims.events.point.callbacks)
    widget = open_widget()
    gate = network.hold(1)
    canvas.click(*CENTRES[1])
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(network.calls) == 2)
    threading.Timer(0.3, gate.set).start()
    if how == "dock":
        viewer.window._wrapped_dock_widgets["spike inference"].destroyOnClose()
    else:
        viewer.close()
    qtbot.waitUntil(lambda: not widget._attached, timeout=10_000)
    qtbot.waitUntil(lambda: threading.active_count() <= before, timeout=5_000)
    assert len(viewer.mouse_drag_callbacks) == listeners[0]
    assert len(viewer.dims.events.point.callbacks) <= listeners[1]  # napari's own go with the window
    assert not widget._clicked.busy
    assert not widget._batch.busy


def test_a_device_that_is_not_there_leaves_the_choice_to_the_best_and_stays_remembered(open_widget):
    controls, told = open_widget().controls, []
    controls.left_at.connect(lambda name, value: told.append((name, value)))
    controls.changed.connect(lambda: told.append("changed"))
    for name in ("cuda", "mps"):
        controls.device.addItem(name, name)
    controls.restore({"samples": 50, "neuropil_coefficient": 0.7, "diameter": 10, "snap": True, "device": "cuda"})
    controls.set_devices(("cpu",), "cpu")
    assert controls.device.currentText() == "auto: cpu"
    assert {controls.device.itemData(k) for k in range(controls.device.count())} == {"auto", "cpu"}
    assert told == ["changed"]


def test_a_window_that_stays_open_keeps_its_work(qtbot, show_movie, open_widget, network, viewer, monkeypatch):
    from napari._qt import qt_main_window
    from napari.settings import get_settings

    class Question:
        def exec_(self):
            asked.append(self)
            QTest.qWait(100)  # as long as somebody looks at it, timers and signals go on
            return QDialog.DialogCode.Rejected

    asked = []
    monkeypatch.setattr(qt_main_window, "ConfirmCloseDialog", lambda *_, **__: Question())
    monkeypatch.setattr(get_settings().application, "confirm_close_window", True)
    show_movie()
    widget = open_widget()
    gate = network.hold(1)
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(network.calls) == 1)
    threading.Timer(1.0, gate.set).start()
    window = viewer.window._qt_window
    QApplication.sendEvent(window, Pressed())
    assert asked
    QTest.qWait(50)
    window.hide(), window.show()  # as Qt does where a window is to stay on top
    qtbot.waitUntil(lambda: len(widget.results.rows) == 3, timeout=10_000)


@pytest.mark.parametrize("answer", ["accept", "reject"])
def test_the_question_that_napari_asks_decides_whether_work_ends(show_movie, open_widget, viewer, monkeypatch, answer):
    from napari._qt.dialogs.confirm_close_dialog import ConfirmCloseDialog
    from napari.settings import get_settings

    monkeypatch.setattr(get_settings().application, "confirm_close_window", True)
    show_movie()
    widget, asked = open_widget(), []

    def press():
        asked.append(QApplication.activeModalWidget())
        getattr(asked[0], answer)()

    QTimer.singleShot(300, press)
    window, event = viewer.window._qt_window, Pressed()
    QApplication.sendEvent(window, event)
    assert isinstance(asked[0], ConfirmCloseDialog)
    if event.isAccepted():
        window.hide()  # as Qt does then
    assert widget._attached == (answer == "reject")


def test_a_window_that_is_shown_again_listens_again(qtbot, show_movie, open_widget, canvas, viewer):
    show_movie()
    widget, window = open_widget(), viewer.window._qt_window
    hide_as_if_closed(window, widget)
    assert not widget._attached
    window.show()
    assert widget._attached
    canvas.click(*CENTRES[2])
    wait_for(qtbot, widget, 2)
