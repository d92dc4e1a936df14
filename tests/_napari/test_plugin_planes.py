"""Movies of several planes, and movies that are no array in memory."""

from __future__ import annotations

import threading

import dask.array as da
import numpy as np
import pytest
from plugin_helpers import CENTRES, FRAME_RATE
from qtpy.QtCore import Qt

import napari_calvae as calvae
from napari_calvae._napari import answers, following, overlays, session, writing

pytestmark = pytest.mark.usefixtures("network")

SCALE = (1 / FRAME_RATE, 5.0, 1.0, 1.0)


def shows(qtbot, widget, roi):
    qtbot.waitUntil(lambda: widget.plots.picture is not None and widget.plots.picture.roi_ids == (roi,), timeout=20_000)


def settled(qtbot, widget):
    qtbot.wait(following.PAUSE + 100)
    qtbot.waitUntil(lambda: not widget._clicked.busy and not widget._follower._timer.isActive(), timeout=20_000)


def expected(plane, labels, roi):
    traces = calvae.extract(plane, labels, FRAME_RATE)
    return traces.values[traces.index(roi)]


def shown_trace(widget):
    return widget.plots.picture.traces.values[0]


@pytest.fixture(scope="module")
def stack(movie):
    """(time, z, y, x): three planes with different traces."""
    return np.stack([movie, movie[::-1], np.roll(movie, 100, axis=0)], axis=1)


@pytest.fixture(params=["numpy", "dask", "zarr"])
def kind(request, tmp_path):
    """An array as one of several kinds of array."""
    if request.param == "numpy":
        return lambda array: array
    if request.param == "dask":
        return lambda array: da.from_array(array, chunks=(90, *array.shape[1:]))
    zarr = pytest.importorskip("zarr")
    chunks = lambda array: (70, *array.shape[1:-2], 40, 20)  # noqa: E731
    return lambda array: zarr.create_array(str(tmp_path / "movie.zarr"), data=array, chunks=chunks(array))


def test_lazy_movies(qtbot, show_movie, open_widget, canvas, kind, movie, labels):
    show_movie(kind(movie))
    widget = open_widget()
    canvas.click(*CENTRES[2])
    shows(qtbot, widget, 2)
    np.testing.assert_allclose(shown_trace(widget), expected(movie, labels, 2), rtol=1e-5)
    widget.controls.place.click()
    canvas.click(3, 3)
    shows(qtbot, widget, 4)


def test_stacks_of_planes(qtbot, show_movie, open_widget, canvas, viewer, kind, stack, labels, network):
    show_movie(kind(stack), scale=SCALE)
    widget = open_widget()
    viewer.dims.set_current_step(1, 1)
    canvas.click(*CENTRES[2])
    shows(qtbot, widget, 2)
    np.testing.assert_allclose(shown_trace(widget), expected(stack[:, 1], labels, 2), rtol=1e-5)
    viewer.dims.set_current_step(1, 2)  # the same ROI on another plane is another cell
    settled(qtbot, widget)
    np.testing.assert_allclose(shown_trace(widget), expected(stack[:, 2], labels, 2), rtol=1e-5)
    viewer.dims.set_current_step(1, 1)  # known
    settled(qtbot, widget)
    np.testing.assert_allclose(shown_trace(widget), expected(stack[:, 1], labels, 2), rtol=1e-5)
    assert network.calls == [(2,), (2,)]
    viewer.dims.set_current_step(0, 123)
    assert widget.plots.trace_row.cursor.value() == pytest.approx(123 / FRAME_RATE)
    widget.plots.picked.emit(5.0)
    assert viewer.dims.current_step[:2] == (100, 1)
    qtbot.mouseClick(widget.controls.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: set(widget.results.rows) == {1, 2, 3}, timeout=20_000)


def test_labels_with_planes_of_their_own(qtbot, show_movie, open_widget, canvas, viewer, stack, labels):
    planes = np.stack([labels, np.where(labels == 2, 7, 0), np.zeros_like(labels)]).astype(np.int32)
    show_movie(stack, rois=planes, scale=SCALE)
    viewer.layers["ROIs"].scale = SCALE[1:]
    widget = open_widget()
    viewer.dims.set_current_step(1, 1)
    canvas.click(*CENTRES[2])
    shows(qtbot, widget, 7)
    np.testing.assert_allclose(shown_trace(widget), expected(stack[:, 1], planes[1], 7), rtol=1e-5)
    viewer.dims.set_current_step(1, 0)
    settled(qtbot, widget)
    assert "ROI 7 is not on plane 0" in widget.controls.status.text()
    assert widget.plots.picture is None
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    viewer.dims.set_current_step(1, 2)
    settled(qtbot, widget)
    assert "got none on plane 2 of the Labels layer" in widget.controls.status.text()
    widget.controls.place.click()
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 8)  # new to all planes
    data = viewer.layers["ROIs"].data
    assert (data[2] == 8).any()
    np.testing.assert_array_equal(data[:2], planes[:2])
    np.testing.assert_allclose(shown_trace(widget), expected(stack[:, 2], data[2], 8), rtol=1e-5)


def test_a_first_disc_lies_on_its_plane(qtbot, show_movie, open_widget, canvas, viewer, stack):
    show_movie(stack, rois=None, scale=SCALE)
    widget = open_widget()
    viewer.dims.set_current_step(1, 2)
    widget.controls.place.click()
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 1)
    layer = viewer.layers["ROIs"]
    assert layer.data.shape == stack.shape[1:]
    np.testing.assert_allclose(layer.scale, SCALE[1:])
    assert (layer.data[2] == 1).any()
    assert not layer.data[:2].any()


@pytest.mark.parametrize("change", ["plane", "ROIs", "movie"])
def test_a_snapped_disc_lies_where_it_was_clicked_or_nowhere(
    qtbot, show_movie, open_widget, canvas, viewer, stack, labels, monkeypatch, change
):
    search, gate = answers.iter_peak, threading.Event()

    def held(*asked):
        gate.wait(20)
        yield from search(*asked)

    monkeypatch.setattr(answers, "iter_peak", held)
    show_movie(stack, rois=np.zeros(stack.shape[1:], np.int32), scale=SCALE)
    first = viewer.layers["ROIs"]
    first.scale = SCALE[1:]
    other = viewer.add_labels(np.zeros_like(first.data), scale=SCALE[1:], name="other")
    copy = viewer.add_image(stack[:300], scale=SCALE, metadata={"frame_rate": FRAME_RATE}, name="copy")
    widget = open_widget()
    widget.controls.choose_rois(first)
    viewer.dims.set_current_step(1, 0)
    widget.controls.place.click()
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(lambda: widget._placing._worker.busy)
    if change == "plane":
        viewer.dims.set_current_step(1, 2)
    elif change == "ROIs":
        widget.controls.choose_rois(other)
    else:
        widget.controls.choose_movie(copy)
    gate.set()
    if change == "plane":
        qtbot.waitUntil(lambda: "no disc was added. Click again" in widget.controls.status.text(), timeout=10_000)
    qtbot.waitUntil(lambda: not widget._placing._worker.busy)
    assert not first.data.any()
    assert not other.data.any()
    canvas.click(*CENTRES[3])  # nothing changes any more
    shows(qtbot, widget, 1)


def test_shapes_and_points_belong_to_their_plane(qtbot, show_movie, open_widget, canvas, viewer, stack):
    show_movie(stack, rois=None, scale=SCALE)
    corners = np.array([(6, 6), (6, 14), (14, 14), (14, 6)], float)
    layer = viewer.add_shapes(
        [np.insert(corners, 0, 2, axis=1), np.insert(corners + np.array((0, 19)), 0, 0, axis=1)], scale=SCALE[1:]
    )
    viewer.layers.selection.active = viewer.layers["movie"]
    widget = open_widget()
    viewer.dims.set_current_step(1, 2)
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    assert set(np.unique(widget.choices.rois()[1])) == {0, 1}
    viewer.dims.set_current_step(1, 0)
    settled(qtbot, widget)
    assert "ROI 1 is not on plane 0" in widget.controls.status.text()
    viewer.layers.remove(layer)
    points = viewer.add_points([(0, *CENTRES[1]), (2, *CENTRES[2])], scale=SCALE[1:])
    viewer.layers.selection.active = viewer.layers["movie"]
    viewer.dims.set_current_step(1, 2)
    canvas.click(*CENTRES[2])
    shows(qtbot, widget, 2)
    widget.controls.place.click()
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 3)
    assert points.data[2] == pytest.approx((2, *CENTRES[3]), abs=1.5)


def test_results_of_one_id_on_several_planes_are_not_merged(
    qtbot, show_movie, open_widget, viewer, stack, labels, tmp_path
):
    show_movie(stack, scale=SCALE, rois=None)
    third = labels == 3
    layer = viewer.add_labels(np.stack([labels, 3 * third, 4 * third]), name="ROIs", scale=SCALE[1:])
    widget = open_widget()
    widget.controls.choose_rois(layer)

    def infer(plane):
        viewer.dims.set_current_step(1, plane)
        widget.infer_all()
        qtbot.waitUntil(lambda: bool(widget.results.rows) and not widget._batch.busy, timeout=20_000)

    def save():
        return layer.save(str(tmp_path / "out.npz"), plugin="napari-calvae")

    for plane in (0, 1, 2):
        infer(plane)
    with pytest.raises(writing.WritingError, match="got results of ROI 3 on planes 0 and 1"):
        save()
    assert not list(tmp_path.iterdir())
    layer.data[1][layer.data[1] > 0] = 5
    layer.refresh()
    infer(1)
    save()
    with np.load(tmp_path / "out.npz") as out:
        assert out["roi_ids"].tolist() == [1, 2, 3, 4, 5]


def test_cells_light_up_on_their_plane(qtbot, show_movie, open_widget, canvas, viewer, stack):
    show_movie(stack, scale=SCALE)
    widget = open_widget()
    viewer.dims.set_current_step(1, 2)
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    qtbot.mouseClick(widget.plots.activity_button, Qt.MouseButton.LeftButton)
    layer = viewer.layers[overlays.LAYER]
    assert layer.data.shape == (400, 1, 40, 40)
    np.testing.assert_allclose(layer.scale, SCALE)
    np.testing.assert_allclose(layer.translate, (0, 10, 0, 0))
    assert viewer.dims.nsteps[1] == 3


@pytest.mark.parametrize("planes", [False, True])
def test_multi_scale_movies_are_read_at_full_resolution(
    qtbot, show_movie, open_widget, canvas, viewer, stack, movie, labels, planes
):
    full = stack if planes else movie
    levels = [da.from_array(full), da.from_array(full[..., ::2, ::2])]
    show_movie(levels, multiscale=True, scale=SCALE if planes else (1 / FRAME_RATE, 1, 1))
    widget = open_widget()
    if planes:
        viewer.dims.set_current_step(1, 2)
    canvas.click(*CENTRES[3])
    shows(qtbot, widget, 3)
    np.testing.assert_allclose(shown_trace(widget), expected(stack[:, 2] if planes else movie, labels, 3), rtol=1e-5)


def test_a_label_image_of_another_number_of_planes_gets_a_sentence(
    qtbot, show_movie, open_widget, canvas, viewer, stack, labels
):
    show_movie(stack, rois=np.stack([labels, labels]), scale=SCALE)
    widget = open_widget()
    with qtbot.waitSignal(widget.failed):
        canvas.click(*CENTRES[1])
    words = "40 × 40 pixels, or 3 of them for as many planes, got shape (2, 40, 40)"
    assert words in widget.controls.status.text()


def test_labels_that_cannot_be_edited_get_a_sentence(qtbot, show_movie, open_widget, canvas, viewer, labels):
    show_movie(rois=None)
    viewer.add_labels(da.from_array(labels))
    widget = open_widget()
    canvas.click(*CENTRES[1])
    shows(qtbot, widget, 1)
    widget.controls.place.click()
    with qtbot.waitSignal(widget.failed):
        canvas.click(3, 35)
    assert "cannot be edited" in widget.controls.status.text()


# Without a viewer


def test_a_plane_reads_nothing_but_what_it_is_asked_for(stack):
    class Counting:
        shape, dtype, chunks = stack.shape, stack.dtype, (10, 1, 40, 40)
        asked = ()

        def __getitem__(self, key):
            self.asked = key
            return stack[key]

    counting = Counting()
    plane = session.MoviePlane(counting, 2)
    assert (plane.shape, plane.ndim, len(plane), plane.dtype) == ((400, 40, 40), 3, 400, stack.dtype)
    assert plane.chunks == (10, 40, 40)
    assert counting.asked == ()
    np.testing.assert_array_equal(plane[5:9, 3:4, ::2], stack[5:9, 2, 3:4, ::2])
    np.testing.assert_array_equal(plane[7], stack[7, 2])
    assert counting.asked == (7, 2)
    assert session.MoviePlane(stack, 1).chunks is None


def test_discs_around_points_keep_their_ids_and_the_last_is_on_top():
    image = session.discs({1: (5, 5), 4: (5, 8), 9: (50, 50), 6: (0.5, 19.5)}, 6, (20, 20))
    assert set(np.unique(image)) == {0, 1, 4}
    assert image[5, 6] == 4
    assert image[5, 3] == 1
    tiny = session.discs({2: (3.5, 3.5)}, 1, (20, 20))
    assert (tiny == 2).any()
    assert not session.discs({}, 6, (20, 20)).any()


def test_a_disc_stays_at_the_click_if_the_peak_has_a_roi():
    labels = np.zeros((20, 20), int)
    labels[4:8, 4:8] = 3
    assert session.landing(labels, (9.5, 6), (6, 6)) == (9.5, 6)
    assert session.landing(labels, (12, 12), (14, 13)) == (14, 13)
