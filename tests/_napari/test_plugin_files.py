"""Files of traces and movies as layers: opened, clicked, edited, repeated as a script, written."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from napari.components import ViewerModel
from plugin_helpers import CENTRES, FRAME_RATE, posterior_of

import napari_calvae as calvae
from napari_calvae._napari import answers, file_rois, picking, reading, script, stored, writing

N_FRAMES = 400


def made(n_rois=3, rois=None, frame_rate=FRAME_RATE, **more) -> calvae.Traces:
    """Raw traces with events."""
    rng = np.random.default_rng(3)
    spikes = rng.random((n_rois, N_FRAMES)) < 0.03
    kernel = np.exp(-np.arange(60) / 12)
    signal = np.stack([np.convolve(row, kernel)[:N_FRAMES] for row in spikes])
    values = 100 + 60 * signal + rng.normal(0, 2, signal.shape)
    return calvae.Traces(values, frame_rate, "raw", rois=rois, **more)


@pytest.fixture
def traces(labels) -> calvae.Traces:
    return made(rois=calvae.RoiMasks.from_labels(labels), accepted=[True, False, True])


@pytest.fixture
def file(tmp_path, traces):
    """A file of three traces that knows where its ROIs are."""
    path = tmp_path / "cells.zarr"
    calvae.write(traces, path)
    return path


def layers_of(path):
    """What napari gets of a file: layers by their kind."""
    read = reading.get_reader(str(path))
    return {kind: (data, options) for data, options, kind in read(str(path))}


# Reading


def test_rois_of_a_file_become_labels_with_their_traces(file, traces, labels):
    data, options = layers_of(file)["labels"]
    np.testing.assert_array_equal(data, labels)
    given = options["metadata"][file_rois.KEY]
    assert given.rate == FRAME_RATE
    np.testing.assert_allclose(given.source.load().values, traces.values)
    assert options["features"]["verdict"].tolist() == ["accepted", "rejected", "accepted"]
    assert options["features"]["index"].tolist() == [1, 2, 3]
    colours = options["colormap"].color_dict
    assert not np.allclose(colours[2], colours[None])
    assert 1 not in colours


def test_fluorescence_is_painted_into_the_rois(file, traces, labels):
    data, options = layers_of(file)["image"]
    assert data.shape == (N_FRAMES, 40, 40)
    assert options["scale"] == (1 / FRAME_RATE, 1, 1)
    frames = np.asarray(data)
    for roi, (y, x) in CENTRES.items():
        values = traces.values[roi - 1]
        brightest = int(values.argmax())
        assert frames[brightest, y, x] > 0.9
        assert frames[:, y, x].argmax() == brightest
    assert frames[:, labels == 0].max() == 0


def test_planes_become_an_axis(tmp_path, labels):
    masks = calvae.RoiMasks.from_labels(labels)
    given = made(rois=replace(masks, planes=(0, 2, 0)))
    calvae.write(given, tmp_path / "planes.zarr")
    data, options = layers_of(tmp_path / "planes.zarr")["labels"]
    assert data.shape == (3, 40, 40)
    assert [set(np.unique(plane)) for plane in data] == [{0, 1, 3}, {0}, {0, 2}]
    assert options["axis_labels"] == ("plane", "y", "x")
    assert options["metadata"][file_rois.KEY].marks[2][0] == 2


def test_a_roi_under_others_keeps_a_pixel():
    big, small = np.arange(100), np.arange(10, 20)
    masks = calvae.RoiMasks((10, 10), (small, small, big), (4, 5, 6), (np.ones(10), np.r_[np.ones(9), 3], np.ones(100)))
    image = file_rois.draw(masks)
    assert set(np.unique(image)) == {4, 5, 6}


def test_faint_pixels_are_not_drawn():
    masks = calvae.RoiMasks((4, 4), (np.arange(4),), (7,), (np.array([1.0, 0.5, 0.1, 0.01]),))
    assert (file_rois.draw(masks) == 7).sum() == 2


@pytest.mark.parametrize("n", [1, 5, 12])
def test_rois_without_a_place_are_squares(tmp_path, n):
    calvae.write(made(n), tmp_path / "table.npz")
    data, options = layers_of(tmp_path / "table.npz")["labels"]
    ids, counts = np.unique(data[data > 0], return_counts=True)
    assert ids.tolist() == list(range(1, n + 1))
    assert len(set(counts)) == 1
    assert "places unknown" in options["name"]


def test_labels_are_above_zero_whatever_the_ids(tmp_path):
    calvae.write(made(3, roi_ids=(0, 1, 2)), tmp_path / "ids.npz")
    given = file_rois.open_file(tmp_path / "ids.npz")
    assert given.renumbered
    assert given.source.roi_ids == (1, 2, 3)


def test_a_frame_rate_that_is_not_in_the_file_is_left_open(tmp_path):
    np.save(tmp_path / "plain.npy", made(2).values)
    given = file_rois.open_file(tmp_path / "plain.npy")
    assert given.rate is None
    assert given.with_rate(12.5).select([1]).frame_rate == 12.5


def test_what_is_damaged_says_so(tmp_path):
    (tmp_path / "cells.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut short")
    with pytest.raises(calvae.RecordingError, match=r"cells\.mat"):
        reading.get_reader(str(tmp_path / "cells.mat"))("")


@pytest.mark.parametrize("name", ["picture.tif", "notes.txt", "empty", "picture.h5", "nothing.npy"])
def test_others_are_left_to_others(tmp_path, name):
    import h5py
    import tifffile

    path = tmp_path / name
    if name == "picture.tif":
        tifffile.imwrite(path, np.zeros((4, 5), np.uint8))
    elif name == "picture.h5":
        with h5py.File(path, "w") as other:
            other["picture"] = np.zeros((4, 5))
    elif name == "empty":
        path.mkdir()
    elif name == "notes.txt":
        path.write_text("hello")
    assert reading.get_reader(str(path)) is None
    assert reading.get_reader([str(path)]) is None


def test_a_movie_stays_in_its_file(tmp_path, movie):
    import h5py

    with h5py.File(tmp_path / "movie.h5", "w") as out:
        out.create_dataset("mov", data=movie).attrs["frame_rate"] = 7.5
    data, options = layers_of(tmp_path / "movie.h5")["image"]
    assert isinstance(data, np.memmap) or hasattr(data, "dask")
    assert data.shape == movie.shape
    assert options["metadata"] == {"frame_rate": 7.5}
    assert options["scale"] == (1 / 7.5, 1, 1)
    assert options["axis_labels"] == ("time", "y", "x")
    assert options["contrast_limits"][0] < options["contrast_limits"][1] <= movie.max()


def test_a_movie_without_a_frame_rate_has_none(tmp_path, movie):
    np.save(tmp_path / "movie.npy", movie)
    _, options = layers_of(tmp_path / "movie.npy")["image"]
    assert options["metadata"] == {}
    assert "scale" not in options


def test_a_folder_of_suite2p(shared):
    found = layers_of(shared / "formats" / "suite2p")
    data, options = found["labels"]
    given = options["metadata"][file_rois.KEY]
    assert given.rate == 30.0
    assert set(np.unique(data)) == {0, *given.source.roi_ids}
    assert options["features"]["verdict"].isin(["accepted", "rejected"]).all()


def test_the_mean_image_of_suite2p_lies_below_its_rois(shared):
    folder = shared / "formats" / "suite2p"
    found = reading.get_reader(str(folder))(str(folder))
    assert [kind for _, _, kind in found] == ["image", "image", "labels"]
    assert [options["name"] for _, options, _ in found] == [
        f"suite2p {what}" for what in ("mean image", "fluorescence", "ROIs")
    ]
    mean, options, _ = found[0]
    assert mean.shape == found[-1][0].shape
    assert 0 < options["contrast_limits"][0] < options["contrast_limits"][1] <= mean.max()
    inside = found[-1][0] > 0
    assert mean[inside].mean() > mean[~inside].mean()
    assert found[1][1]["blending"] == "additive"  # what is painted leaves the mean image to be seen


def test_a_mean_image_is_not_offered_as_a_movie():
    viewer = ViewerModel()
    for image in (np.ones((40, 40)), np.ones((3, 40, 40))):
        viewer.add_image(image, **reading._mean_layer(image, "suite2p"))
    assert picking.movies(viewer) == []


def test_rejected_cells_can_be_seen_and_told_apart(file):
    colours = layers_of(file)["labels"][1]["colormap"].color_dict
    assert colours[2][3] == 1
    assert np.abs(np.subtract(colours[2], colours[None])[:3]).max() > 0.3


# Traces of what was not edited


def request_of(given, wanted, masks=None, movie=None, **settings):
    masks = masks or calvae.RoiMasks.from_labels(given.labels)
    frames = file_rois.FileFrames(given, 0, movie)
    return answers.Request(1, frames, masks, tuple(wanted), answers.Settings(**{"frame_rate": FRAME_RATE} | settings))


def ended(steps):
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def edited(labels):
    """Label image in which ROI 2 has lost a pixel and ROI 9 is new."""
    image = labels.copy()
    y, x = np.argwhere(image == 2)[0]
    image[y, x] = 0
    image[0:3, 0:3] = 9
    return image


def test_traces_come_from_the_file(file, traces):
    given = file_rois.open_file(file)
    found = ended(answers.iter_traces(request_of(given, [3, 1])))
    assert found.roi_ids == (3, 1)
    np.testing.assert_allclose(found.values, traces.values[[2, 0]])


def test_an_edited_roi_needs_the_movie(file, labels, movie):
    given = file_rois.open_file(file)
    masks = calvae.RoiMasks.from_labels(edited(labels))
    assert given.unedited(masks, 0) == {1, 3}
    assert given.unedited(masks, 1) == set()
    with pytest.raises(calvae.RecordingError, match=r"ROI 2: drawn or edited.*open the movie of 400 frames, 40 × 40"):
        ended(answers.iter_traces(request_of(given, [1, 2], masks)))
    found = ended(answers.iter_traces(request_of(given, [9, 1, 2], masks, movie)))
    assert found.roi_ids == (9, 1, 2)
    known = calvae.extract(movie, edited(labels), frame_rate=FRAME_RATE)
    np.testing.assert_allclose(found.values[2], known.values[known.index(2)])
    np.testing.assert_allclose(found.values[1], given.source.load().values[0])


def test_ratios_and_raw_values_are_not_mixed(tmp_path, traces, labels, movie):
    dff = calvae.delta_f_over_f(traces)
    calvae.write(dff, tmp_path / "dff.zarr")
    given = file_rois.open_file(tmp_path / "dff.zarr")
    masks = calvae.RoiMasks.from_labels(edited(labels))
    found = ended(answers.iter_traces(request_of(given, [1, 2], masks, movie)))
    assert found.unit == "dff"
    assert np.nanmedian(np.abs(found.values)) < 1


def test_a_baseline_of_ones_own_row_by_row(file, traces):
    given = file_rois.open_file(file)
    request = request_of(given, [1], baseline_window=5.0, baseline_percentile=20.0)
    source = answers.source_of(request)
    wanted = calvae.delta_f_over_f(traces, 5.0, 20.0)
    assert source.unit == "dff"
    np.testing.assert_allclose(source.select([2]).values, wanted.values[[2]], rtol=1e-5)
    np.testing.assert_allclose(ended(answers.iter_traces(request)).values, wanted.values[[0]], rtol=1e-5)
    assert answers.source_of(request_of(given, [1])).unit == "raw"


def test_cells_without_signal_do_not_stop_the_others(tmp_path, network):
    alive = made(3)
    values = alive.values.copy()
    values[1] = 7.0
    calvae.write(alive.replace(values=values), tmp_path / "some.npz")
    given = file_rois.open_file(tmp_path / "some.npz")
    messages = list(answers.iter_answers(request_of(given, [1, 2, 3])))
    assert [roi for m in messages if isinstance(m, answers.Answer) for roi in m.inference.roi_ids] == [1, 3]
    assert ended(answers.iter_traces(request_of(given, [1, 2, 3]))).roi_ids == (1, 2, 3)
    source = answers.source_of(request_of(given, [1], baseline_window=5.0))
    assert np.isnan(source.select([0, 1]).values).all(axis=1).tolist() == [False, True]


def test_results_in_a_store_are_shown_as_they_are(tmp_path, traces, network, monkeypatch):
    result = in_store(traces, tmp_path / "spikes.zarr")
    given = file_rois.open_file(tmp_path / "spikes.zarr")
    request = request_of(given, [2, 3], n_samples=7)
    (_, found) = answers.iter_answers(request)
    assert isinstance(found, answers.Found)
    assert found.rows == (1, 2)
    np.testing.assert_array_equal(found.results.one(1).rate[0], result.rate[1])
    assert found.results.count(1)[0] == pytest.approx(result.quality["spike_rate"][1] * N_FRAMES / FRAME_RATE)
    assert network.calls == []
    list(answers.iter_answers(request_of(given, [2], n_samples=8)))  # others are asked for
    assert network.calls == [(2,)]


def in_store(traces, path, n_samples=7):
    """Write made-up results as if the universal model had found them."""
    result = posterior_of(calvae.delta_f_over_f(traces), n_samples)
    quality = np.zeros(traces.n_rois, [("spike_rate", "f4"), ("noise_level", "f4")])
    quality["spike_rate"] = result.rate.mean(axis=1)
    provenance = {
        "model_sha256": calvae.load_model("universal").sha256,
        "settings": {"n_samples": n_samples, "seed": 0, "device": "auto", "amplitude": None},
    }
    result = replace(result, quality=quality, provenance=provenance)
    calvae.write(result, path)
    return result


def test_rates_of_a_store_can_be_painted_unless_they_are_too_many(tmp_path, traces, monkeypatch):
    result = in_store(traces, tmp_path / "spikes.zarr")
    found = stored.FromStore(calvae.open_result(tmp_path / "spikes.zarr"))
    assert found.news() == [0, 1, 2]
    assert found.news() == []
    np.testing.assert_array_equal(found.rate, result.rate)
    monkeypatch.setattr(stored, "_MOST", 10)
    with pytest.raises(calvae.RecordingError, match="Look at single cells"):
        stored.FromStore(found.store).rate  # noqa: B018 - it raises


@pytest.mark.parametrize("kind", ["file", "ids"])
def test_the_script_repeats_what_was_inferred(tmp_path, file, kind):
    if kind == "ids":
        file = tmp_path / "ids.npz"
        calvae.write(made(3, roi_ids=(0, 1, 2)), file)
    given = file_rois.open_file(file)
    source = script.source_of(None, file_rois.FileFrames(given), None, given.labels)
    settings = answers.Settings(frame_rate=FRAME_RATE, n_samples=3, baseline_percentile=20.0)
    text = script.script(source, settings, rejected=[2])
    out = tmp_path / "rates.npy"
    done = f"{text}\nnp.save({str(out)!r}, rate[kept])\nassert result.roi_ids == (1, 2, 3)\n"
    subprocess.run([sys.executable, "-c", done], check=True, capture_output=True)
    wanted = ended(answers.iter_traces(request_of(given, [1, 2, 3], baseline_percentile=20.0)))
    np.testing.assert_array_equal(np.load(out), calvae.infer(wanted, n_samples=3).rate[[0, 2]])


def test_the_script_names_edited_rois(file, labels):
    given = file_rois.open_file(file)
    source = script.source_of(None, file_rois.FileFrames(given), None, edited(labels))
    assert "ROIs 2, 9 were drawn or edited" in script.script(source, answers.Settings(frame_rate=FRAME_RATE))


# In napari


@pytest.fixture
def open_file(viewer, network, open_widget, file):
    """Open the file and the widget."""
    viewer.open(str(file), plugin="napari-calvae")
    return viewer.layers["cells ROIs"], open_widget()


def test_a_click_infers_from_the_file(open_file, canvas, qtbot, network, traces):
    layer, widget = open_file
    assert widget.choices.real_movie is None
    assert (widget.choices.frame_rate().hz, widget.choices.frame_rate().source) == (FRAME_RATE, "file")
    with qtbot.waitSignal(widget.shown, timeout=20_000):
        canvas.click(*CENTRES[2])
    (asked,) = network.asked
    np.testing.assert_allclose(asked["traces"].values[0], traces.values[1])
    assert layer.selected_label == 2
    widget._on_moment_picked(5.0)
    assert widget._viewer.dims.point[0] == pytest.approx(5.0)


def test_no_image_is_needed(viewer, network, open_widget, file, canvas, qtbot):
    data, options = layers_of(file)["labels"]
    viewer.add_labels(data, **options)
    widget = open_widget()
    with qtbot.waitSignal(widget.shown, timeout=20_000):
        canvas.click(*CENTRES[3])
    widget._on_moment_picked(5.0)  # there is no slider to move
    assert widget.plots.picture.roi_ids == (3,)


def test_an_edit_is_told_until_the_movie_is_there(open_file, canvas, qtbot, viewer, movie, network):
    layer, widget = open_file
    y, x = CENTRES[1]
    layer.data_setitem((np.array([y]), np.array([x + 3])), 0)
    with qtbot.waitSignal(widget.failed, timeout=20_000) as failed:
        canvas.click(*CENTRES[1])
    assert "ROI 1: drawn or edited" in failed.args[0]
    viewer.add_image(movie, name="movie")
    assert widget.choices.real_movie is viewer.layers["movie"]
    with qtbot.waitSignal(widget.shown, timeout=20_000):
        widget.ask(1)
    known = calvae.extract(movie, layer.data, frame_rate=FRAME_RATE)
    np.testing.assert_allclose(network.asked[-1]["traces"].values[0], known.values[0])


def test_all_rois_but_the_edited_ones_are_inferred(open_file, qtbot):
    layer, widget = open_file
    layer.data_setitem((np.array([0]), np.array([0])), 1)
    widget.infer_all()
    qtbot.waitUntil(lambda: len(widget.results.rows) == 2, timeout=20_000)
    qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    widget.infer_all()
    assert "1 were drawn or edited and need the movie" in widget.controls.status.text()


def test_another_movie_is_not_that_of_the_traces(open_file, viewer, movie):
    _, widget = open_file
    viewer.add_image(movie[:100], name="short")
    assert widget.controls.movie.currentData() is viewer.layers["short"]
    assert widget.choices.real_movie is None
    assert widget.choices.array.shape == movie.shape


def test_a_typed_frame_rate_is_believed(viewer, network, open_widget, tmp_path, qtbot):
    np.save(tmp_path / "plain.npy", made(2).values)
    viewer.open(str(tmp_path / "plain.npy"), plugin="napari-calvae")
    widget = open_widget()
    assert "type it in Hz" in widget.controls.status.text()
    widget._on_frame_rate_typed("25")
    with qtbot.waitSignal(widget.shown, timeout=20_000):
        widget.ask(2)
    assert network.asked[-1]["traces"].frame_rate == 25.0


def test_planes_are_inferred_one_by_one_and_written_together(viewer, network, open_widget, tmp_path, labels, qtbot):
    masks = calvae.RoiMasks.from_labels(labels)
    calvae.write(made(rois=replace(masks, planes=(0, 2, 0))), tmp_path / "planes.zarr")
    viewer.open(str(tmp_path / "planes.zarr"), plugin="napari-calvae")
    widget = open_widget()
    layer = viewer.layers["planes ROIs"]
    for plane in (0, 2):
        viewer.dims.set_point(1, plane)
        widget.infer_all()
        qtbot.waitUntil(lambda: not widget._batch.busy, timeout=20_000)
    assert layer.save(str(tmp_path / "out.npz"), plugin="napari-calvae") == [str(tmp_path / "out.npz")]
    with np.load(tmp_path / "out.npz") as out:
        assert out["roi_ids"].tolist() == [1, 2, 3]
        assert out["rate"].shape == (3, N_FRAMES)


# Writing


def test_nothing_inferred_is_nothing_to_write(open_file, tmp_path):
    layer, _ = open_file
    with pytest.raises(writing.WritingError, match="Press “Infer all” first"):
        layer.save(str(tmp_path / "out.nwb"))
    assert not (tmp_path / "out.nwb").exists()


def test_results_are_written_with_the_verdicts(open_file, qtbot, tmp_path):
    from napari_calvae._napari import judging, roi_layer

    layer, widget = open_file
    widget.infer_all()
    qtbot.waitUntil(lambda: len(widget.results.rows) == 3, timeout=20_000)
    verdicts = {1: judging.Judgement(judging.REJECTED), 3: judging.Judgement(judging.ACCEPTED)}
    roi_layer.write_judgements(layer, [1, 2, 3], judging.Judgements(verdicts))
    data, meta, _ = layer.as_layer_data_tuple()
    out = tmp_path / "spikes.zarr"
    copied = {**meta, "metadata": copy.deepcopy(meta["metadata"])}  # not the colours, which older napari cannot copy
    assert writing.write(str(out), data, copied) == [str(out)]
    found = calvae.open_result(out)
    assert found.roi_ids == (1, 2, 3)
    assert found.accepted.tolist() == [False, False, True]  # ROI 2: as the file had it
    assert found.rois.ids == (1, 2, 3)
    with pytest.raises(FileExistsError, match="exists already"):
        writing.write(str(out), data, meta)


def test_results_of_another_layer_are_not_written(open_file, qtbot, viewer, tmp_path):
    layer, widget = open_file
    with qtbot.waitSignal(widget.shown, timeout=20_000):
        widget.ask(1)
    viewer.add_labels(np.ones((40, 40), int), name="other")
    widget.controls.choose_rois(viewer.layers["other"])
    with pytest.raises(writing.WritingError, match="“cells ROIs” as the ROIs of the spike inference widget"):
        writing.write(str(tmp_path / "out.npz"), *layer.as_layer_data_tuple()[:2])


def test_results_of_memory_and_store_are_joined(tmp_path, traces):
    result = in_store(traces, tmp_path / "spikes.zarr")
    found = stored.FromStore(calvae.open_result(tmp_path / "spikes.zarr"))
    joined = writing.joined({3: (found, 2), 1: (result, 0), 2: (found, 1)})
    assert joined.roi_ids == (1, 2, 3)
    np.testing.assert_array_equal(joined.rate, result.rate)
    np.testing.assert_array_equal(joined.samples(), result.samples())


def test_a_layer_can_be_copied_and_saved_as_labels(open_file, viewer, tmp_path):
    layer, _ = open_file
    given = layer.metadata[file_rois.KEY]
    assert copy.deepcopy(layer.metadata)[file_rois.KEY] is given
    assert partial(layer.save, str(tmp_path / "rois.tif"))()
    np.testing.assert_array_equal(calvae.read_labels(tmp_path / "rois.tif"), layer.data)
