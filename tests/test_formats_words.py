"""The words by which files of other programs name movies, rates, units and times."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from scipy.io import savemat
from test_movies import MOVIE, a_bruker_folder

from napari_calvae.formats import _lazy, read_movie
from napari_calvae.formats.ground_truth import read_ground_truth


@pytest.mark.parametrize("unit", _lazy.SECONDS)
def test_units_of_time_are_what_pint_says(unit):
    pint = pytest.importorskip("pint")
    said = pint.UnitRegistry()(unit.replace("msec", "ms").replace("sec", "s") if unit in ("sec", "msec") else unit)
    assert said.to("second").magnitude == pytest.approx(_lazy.SECONDS[unit])


def test_all_usual_units_are_known():
    assert {"s", "sec", "second", "ms", "millisecond", "us", "µs", "min", "minute", "h", "hour"} <= _lazy.SECONDS.keys()


@pytest.mark.parametrize("name", ["mov", "movie", "data", "imaging", "images", "group/Movie"])
def test_a_movie_with_a_usual_name_is_the_one_that_is_meant(tmp_path, name):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["another"] = np.zeros((3, 2, 2))
        file[name] = MOVIE
    np.testing.assert_array_equal(np.asarray(read_movie(tmp_path / "a.h5")[0]), MOVIE)


@pytest.mark.parametrize(
    "name", ["frame_rate", "framerate", "fr", "fs", "fps", "imaging_rate", "sampling_rate", "rate", "FPS"]
)
def test_rates_by_their_usual_names(tmp_path, name):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["mov"] = MOVIE
        file["mov"].attrs[name] = 12.5
    assert read_movie(tmp_path / "a.h5")[1] == 12.5


def a_data_set(path, **changes):
    arrays = {
        "cell": np.array(["c1", "c2", "c2"]),
        "sweep": np.array([0, 0, 1]),
        "indicator": np.array(["GCaMP6s"] * 2 + ["OGB-1"]),
        "frame_rate": np.array([10.0, 20.0, 20.0]),
        "t0": np.array([0.5, 1.0, 9.0]),
        "dff": np.arange(150, dtype=np.float32),
        "trace_offsets": np.array([0, 30, 90, 150]),
        "spike_times": np.array([1.0, 2.0, 3.0, 10.0]),
        "spike_offsets": np.array([0, 2, 3, 4]),
    }
    np.savez(path, **arrays | changes)
    return arrays


def test_a_data_set_of_ground_truth_is_read_to_the_last_value(tmp_path):
    a_data_set(tmp_path / "DS99.npz")
    (tmp_path / "notes.txt").write_text("not read")
    first, second, third = read_ground_truth(tmp_path)
    assert [s.cell for s in (first, second, third)] == ["c1", "c2", "c2"]
    assert [s.indicator for s in (first, second, third)] == ["GCaMP6s", "GCaMP6s", "OGB-1"]
    assert [(s.dataset, s.frame_rate, s.t0) for s in (first, third)] == [("DS99", 10.0, 0.5), ("DS99", 20.0, 9.0)]
    np.testing.assert_array_equal(second.dff, np.arange(30, 90))
    assert [s.spike_times.tolist() for s in (first, second, third)] == [[1, 2], [3], [10]]
    assert len(read_ground_truth(tmp_path, min_duration=3.0)) == 0
    assert len(read_ground_truth(tmp_path, min_duration=2.9)) == 3


def test_pickles_in_ground_truth_are_refused(tmp_path):
    a_data_set(tmp_path / "DS99.npz", cell=np.array(["c1", "c2", None], object))
    with pytest.raises(ValueError, match=r"DS99\.npz: expected an \.npz file of ground truth"):
        read_ground_truth(tmp_path)


def test_a_folder_without_ground_truth_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"ground truth: expected \.npz or \.mat files in .*, found none"):
        read_ground_truth(tmp_path)


def test_where_a_sweep_of_a_mat_file_begins_and_ends(tmp_path):
    times = np.concatenate([np.arange(20) / 10, [7.0], 10 + np.arange(30) / 10])  # a frame alone is no sweep
    dff = np.arange(51.0)
    # Half a frame before the first and after the last belong to a sweep, the very end does not.
    spikes = np.array([-0.06, -0.05, 1.9499, 1.95, 9.96, 12.94, np.nan])
    savemat(tmp_path / "c.mat", {"time_stamps": times[None], "dff": dff[None], "ap_times": spikes})
    one, two = read_ground_truth(tmp_path / "c.mat")
    assert (len(one.dff), len(two.dff), two.dff[0]) == (20, 30, 21)
    assert one.spike_times == pytest.approx([-0.05, 1.9499])
    assert two.spike_times == pytest.approx([9.96, 12.94])
    slightly = times.copy()
    slightly[20:] = np.inf
    slightly[10:20] += 0.04  # a late frame is no jump
    savemat(tmp_path / "c.mat", {"time_stamps": slightly[None], "dff": dff[None], "ap_times": spikes})
    (one,) = read_ground_truth(tmp_path / "c.mat")
    assert len(one.dff) == 20


def changed(folder, *replacements):
    text = (folder / "t.xml").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "t.xml").write_text(text)
    return folder


def test_bruker_times_that_begin_anew_with_each_cycle_leave_the_absolute_ones(tmp_path):
    folder = a_bruker_folder(tmp_path / "a", [[[image] for image in MOVIE]])
    text = (folder / "t.xml").read_text()
    for k in range(len(MOVIE)):
        text = text.replace(f'relativeTime="{0.05 * k:.6f}"', 'relativeTime="0.000000"')
    (folder / "t.xml").write_text(text)
    assert read_movie(folder)[1] == pytest.approx(20.0)


def test_bruker_lists_without_channels_or_declaration(tmp_path):
    folder = a_bruker_folder(tmp_path / "a", [[[image] for image in MOVIE]])
    changed(folder, ('channel="1" ', ""), ('<?xml version="1.0" encoding="utf-8"?>', ""))
    movie, _ = read_movie(folder)
    np.testing.assert_array_equal(np.asarray(movie), MOVIE)
    np.testing.assert_array_equal(np.asarray(movie[3]), MOVIE[3])
    np.testing.assert_array_equal(np.asarray(movie[-1, 2:4]), MOVIE[-1, 2:4])


def test_whole_volumes_of_a_bruker_series_are_all_kept(tmp_path):
    volumes = [[[image] for image in volume] for volume in MOVIE.reshape(3, 4, 16, 10)]
    movie, _ = read_movie(a_bruker_folder(tmp_path / "a", volumes, "TSeries ZSeries Element"))
    assert movie.shape == (3, 4, 16, 10)
