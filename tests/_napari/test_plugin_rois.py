"""From layers to label images, without a viewer: against pixel-by-pixel geometry, and against reading afresh."""

from __future__ import annotations

import numpy as np
import pytest
from napari.components import ViewerModel
from napari.layers import Image, Labels, Points, Shapes

import napari_calvae as calvae
from napari_calvae._napari import answers, picking, script, session
from napari_calvae._napari.roi_reader import RoiReader, View
from napari_calvae._napari.shapes import pixels_inside

SIZE = (40, 50)


def test_pixels_of_shapes_have_their_centre_inside():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    box = np.array([(10.2, 12.3), (10.2, 30.1), (21.4, 30.1), (21.4, 12.3)])
    inside = (y >= 10.2) & (y <= 21.4) & (x >= 12.3) & (x <= 30.1)
    for kind in ("rectangle", "polygon"):
        np.testing.assert_array_equal(np.sort(pixels_inside(kind, box, SIZE)), np.flatnonzero(inside))
    round_ = ((y - 15.8) / 5.6) ** 2 + ((x - 21.2) / 8.9) ** 2 <= 1
    np.testing.assert_array_equal(np.sort(pixels_inside("ellipse", box, SIZE)), np.flatnonzero(round_))
    turned = np.roll(box, 1, axis=0)
    np.testing.assert_array_equal(np.sort(pixels_inside("ellipse", turned, SIZE)), np.flatnonzero(round_))
    triangle = np.array([(0.0, 0.0), (0.0, 10.5), (10.5, 0.0)])
    np.testing.assert_array_equal(np.sort(pixels_inside("polygon", triangle, SIZE)), np.flatnonzero(y + x <= 10.5))


@pytest.mark.parametrize("kind", ["rectangle", "polygon", "ellipse"])
def test_shapes_over_the_edge_are_cut_and_flat_ones_are_empty(kind):
    box = np.array([(-5.0, -6.0), (-5.0, 6.0), (5.0, 6.0), (5.0, -6.0)])
    pixels = pixels_inside(kind, box, SIZE)
    y, x = np.divmod(pixels, SIZE[1])
    assert len(pixels)
    assert y.max() <= 5
    assert x.max() <= 6
    assert not len(pixels_inside(kind, box - 100, SIZE))
    assert len(pixels_inside(kind, np.tile((3.5, 3.5), (4, 1)), SIZE)) <= 1


def test_an_oblique_ellipse_has_its_area():
    turn = np.array([(np.cos(0.6), -np.sin(0.6)), (np.sin(0.6), np.cos(0.6))])
    box = np.array([(-8.0, -4.0), (-8.0, 4.0), (8.0, 4.0), (8.0, -4.0)]) @ turn.T + 20
    assert len(pixels_inside("ellipse", box, SIZE)) == pytest.approx(np.pi * 32, rel=0.05)


def test_layers_in_other_coordinates_land_on_the_same_pixels():
    movie = Image(np.zeros((5, *SIZE)), scale=(0.1, 2, 2), translate=(0, 10, 20))
    pixels = np.array([(5, 5), (5, 15), (12, 15), (12, 5)], float)
    plain = RoiReader().labels(Shapes([pixels], shape_type="polygon"), View(Image(np.zeros((5, *SIZE)))))
    world = pixels * 2 + (10, 20)
    micrometres = Shapes([(world - 3) / 0.5], shape_type="polygon", scale=(0.5, 0.5), translate=(3, 3))
    over_time = Shapes([np.insert(world, 0, 0.2, axis=1)], shape_type="polygon")
    for layer in (micrometres, over_time):
        np.testing.assert_array_equal(RoiReader().labels(layer, View(movie)), plain)
    points = Points([(0.3, 10 + 2 * 9, 20 + 2 * 11)])
    image = RoiReader().labels(points, View(movie, diameter=5))
    assert np.argwhere(image == 1).mean(axis=0) == pytest.approx((9, 11))


def turned(ndim, angle=0.3, **more):
    """Where a layer lies that is turned and sheared in y and x, moved and stretched."""
    rotate, affine, shear = np.eye(ndim), np.eye(ndim + 1), np.zeros(ndim * (ndim - 1) // 2)
    shear[-1] = 0.4
    rotate[-2:, -2:] = [(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))]
    affine[-3:-1, -3:] = [(1.1, 0.2, 4), (-0.1, 0.9, -3)]
    return {"rotate": rotate, "affine": affine, "shear": shear, "scale": (2,) * ndim, "translate": (3,) * ndim, **more}


@pytest.mark.parametrize("kind", [Points, Shapes])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("whose", ["layer", "movie"])
def test_rois_of_turned_layers_and_movies_are_where_they_are_seen(kind, ndim, whose):
    movie = Image(np.zeros((5, *SIZE)), **(turned(3) if whose == "movie" else {}))
    corners = np.array([(8, 9), (8, 21), (19, 21), (19, 9)], float)
    placed = turned(ndim, 0.5) if whose == "layer" else {}
    layer = Shapes(ndim=ndim, **placed) if kind is Shapes else Points(ndim=ndim, **placed)
    wanted = [layer.world_to_data(movie.data_to_world((0, *corner))) for corner in corners]
    layer.add([wanted], shape_type="polygon") if kind is Shapes else layer.add(np.mean(wanted, axis=0))
    image = RoiReader().labels(layer, View(movie, diameter=6))
    assert np.argwhere(image == 1).mean(axis=0) == pytest.approx((13.5, 15), abs=0.5)
    if kind is Shapes:
        assert (image == 1).sum() == pytest.approx(11 * 12, rel=0.2)


@pytest.mark.parametrize("name", ["rotate", "affine", "shear"])
def test_turning_a_layer_is_an_edit(name):
    layer, view, reader = Points([(20.0, 30.0)]), View(Image(np.zeros((5, *SIZE))), diameter=5), RoiReader()
    before = reader.image(layer, view)
    setattr(layer, name, turned(2)[name])
    assert not np.array_equal(reader.image(layer, view), before)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_point_is_added_where_a_turned_movie_was_clicked(ndim):
    viewer, movie = ViewerModel(), Image(np.zeros((5, *SIZE)), **turned(3))
    viewer.add_layer(movie)
    viewer.dims.set_point(0, 5)
    layer = viewer.add_points(ndim=ndim, **turned(ndim, -0.2))
    picking.add_point(viewer, layer, movie, (12, 17))
    image = RoiReader().labels(layer, View(movie, diameter=5))
    assert np.argwhere(image == 1).mean(axis=0) == pytest.approx((12, 17), abs=0.1)


def test_the_outline_lies_on_a_turned_movie():
    viewer, movie, mask = ViewerModel(), Image(np.zeros((5, *SIZE)), **turned(3)), np.zeros(SIZE, bool)
    mask[10:15, 20:25] = True
    outline = picking.Outline(viewer)
    for place in ({}, turned(3, 0.6)):  # a new layer, and one that is there
        for name, value in place.items():
            setattr(movie, name, value)
        outline.show(mask, movie)
        layer = viewer.layers[picking.OUTLINE]
        middle = np.mean([layer.data_to_world(point) for point in layer.data[0]], axis=0)
        assert movie.world_to_data((5, *middle))[-2:] == pytest.approx((12, 22), abs=0.6)


@pytest.mark.parametrize(
    "moved",
    [{"translate": (10, 17)}, {"scale": (2, 2.1)}, {"scale": (1, 1), "translate": (0, 0)}, {"affine": np.eye(3) + 0.1}],
)
def test_labels_that_lie_elsewhere_than_the_movie_get_a_sentence(moved):
    movie = Image(np.zeros((5, *SIZE)), scale=(0.1, 2, 2), translate=(0, 10, 20), name="film")
    rois, view, reader = np.pad(np.ones((4, 4), int), ((2, 34), (2, 44))), View(movie), RoiReader()
    layer = Labels(rois, scale=(2, 2), translate=(10, 20), name="cells")
    np.testing.assert_array_equal(reader.read(layer, view, True)[1], rois)
    layer.translate = (10.9, 20)  # each label still over its own pixel
    np.testing.assert_array_equal(reader.read(layer, view, True)[1], rois)
    layer.translate = (10, 20)
    for name, value in moved.items():
        setattr(layer, name, value)
    words = "labels “cells” where the movie “film” is, got another position, .* “Copy all to clipboard”"
    with pytest.raises(calvae.RecordingError, match=words):
        reader.read(layer, view, True)
    fixed = Labels(rois[None], scale=(9, 2, 2), translate=(3, 10, 20))  # along other axes it may lie anywhere
    np.testing.assert_array_equal(reader.read(fixed, view, True)[1], rois)


@pytest.mark.parametrize("n_planes", [1, 3])
def test_a_first_disc_lies_where_the_movie_lies_however_that_is_turned(n_planes):
    shape = (5, *SIZE) if n_planes == 1 else (5, n_planes, *SIZE)
    movie = Image(np.zeros(shape), **turned(len(shape)))
    view = View(movie, plane=n_planes - 1)
    layer = picking.add_disc(ViewerModel(), None, movie, (20, 30), 6, view.plane)
    image = RoiReader().labels(layer, view)
    assert np.argwhere(image == 1).mean(axis=0) == pytest.approx((20, 30))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint64])
def test_a_disc_takes_a_free_id_where_the_largest_is_in_use(dtype):
    most, movie = np.iinfo(dtype).max, Image(np.zeros((5, *SIZE)))
    rois = np.zeros(SIZE, dtype)
    rois[0, :4] = 1, 2, 4, most
    layer = picking.add_disc(ViewerModel(), Labels(rois), movie, (20, 30), 6)
    assert layer.selected_label == 3
    np.testing.assert_array_equal(np.unique(layer.data), np.array([0, 1, 2, 3, 4, most], dtype))
    layer = picking.add_disc(ViewerModel(), layer, movie, (30, 30), 6)
    assert layer.selected_label == 5
    assert layer.data[30, 30] == 5


def test_labels_without_a_free_id_get_a_sentence():
    rois = np.zeros(SIZE, np.uint8)
    rois.ravel()[:255] = np.arange(1, 256)
    layer = Labels(rois.copy())
    with pytest.raises(calvae.RecordingError, match=r"all 255 that uint8 can hold in use.*Convert to int32"):
        picking.add_disc(ViewerModel(), layer, Image(np.zeros((5, *SIZE))), (20, 30), 6)
    np.testing.assert_array_equal(layer.data, rois)


@pytest.mark.parametrize("kind", ["labels", "shapes", "points"])
def test_reading_after_any_edit_equals_reading_afresh(kind):
    rng = np.random.default_rng(5)
    view = View(Image(np.zeros((5, *SIZE))), diameter=6)
    if kind == "labels":
        layer = Labels(rng.integers(0, 3, SIZE))
    elif kind == "points":
        layer = Points(rng.uniform(0, 40, (6, 2)))
    else:
        layer = Shapes([rng.uniform(0, 40, (4, 2)) for _ in range(6)], shape_type="polygon")
    reader = RoiReader()
    for step in range(25):
        if kind == "labels":
            layer.data[tuple(rng.integers(0, 40, 2))] = rng.integers(0, 5)
        elif kind == "points":
            layer.data = layer.data + rng.normal(size=(6, 2)) * (rng.random((6, 1)) < 0.3)
        elif step % 8 == 7:
            layer.add(rng.uniform(0, 40, (4, 2)), shape_type="rectangle")
        else:
            data = layer.data
            data[step % 6] = data[step % 6] + rng.normal(size=2)
            layer.data = data
        for neuropil in (True, False):
            marks, image, masks = reader.read(layer, view, neuropil)
            again, fresh, _ = RoiReader().read(layer, view, neuropil)
            assert marks == again
            np.testing.assert_array_equal(image, fresh)
            np.testing.assert_array_equal(masks.to_labels(), fresh)


def test_nothing_on_the_plane_is_said_so():
    view = View(Image(np.zeros((5, *SIZE))))
    for layer in (Labels(np.zeros(SIZE, int)), Points(ndim=2), Shapes(ndim=2), Points([(500, 500)])):
        reader = RoiReader()
        assert not reader.image(layer, view).any()
        with pytest.raises(session.NoRois, match=f"got none in the {type(layer).__name__} layer"):
            reader.read(layer, view, True)


@pytest.mark.parametrize("own", [{"baseline_percentile": 25.0}, {"baseline_window": 12.0, "amplitude": 0.3}])
def test_the_script_says_baseline_and_amplitude(own):
    settings = answers.Settings(frame_rate=10.0, n_samples=2, **own)
    text = script.script(script.Source(None, None, np.ones((4, 4), int)), settings)
    rng = np.random.default_rng(0)
    traces = calvae.Traces(rng.normal(100, 3, (2, 300)) + 40 * (rng.random((2, 300)) < 0.02), 10.0, unit="raw")
    lines = text[text.index("traces = calvae.extract") : text.index("rate = ")].splitlines()[1:]
    scope = {"traces": traces, "calvae": calvae}
    exec("\n".join(lines), scope)
    request = answers.with_baseline(traces, settings)
    given = {} if settings.amplitude is None else {"amplitude": settings.amplitude}
    expected = calvae.infer(request, n_samples=2, **given)
    np.testing.assert_array_equal(scope["result"].traces.values, request.values)
    np.testing.assert_allclose(scope["result"].rate, expected.rate, rtol=1e-4, atol=1e-4)


def test_what_is_left_open_is_as_the_model_was_trained():
    traces = calvae.Traces(np.random.default_rng(0).normal(100, 3, (1, 900)), 10.0, unit="raw")
    assumed = calvae.load_model().preprocessing
    got = answers.with_baseline(traces, answers.Settings(10.0, baseline_percentile=40.0))
    np.testing.assert_array_equal(got.values, calvae.delta_f_over_f(traces, assumed.baseline_window, 40.0).values)
