"""The words by which files of other programs name movies, rates, units and times."""

from __future__ import annotations

import re

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from scipy.io import savemat
from test_movies import MOVIE, STACK, a_bruker_folder, a_scanimage_file

import napari_calvae as calvae
from napari_calvae import RecordingError, Traces, write
from napari_calvae.formats import FORMATS, _lazy, _mat, check_result, is_movie, read, read_movie, writer_of
from napari_calvae.formats._files import check_memory
from napari_calvae.formats.ground_truth import read_ground_truth
from napari_calvae.formats.numpy_table import write_arrays
from napari_calvae.formats.tiff import write_movie


@pytest.mark.parametrize(
    ("seconds", "units"),
    [
        (1e-9, "ns nanosecond nanoseconds"),
        (1e-6, "us \u00b5s \u03bcs microsecond microseconds"),
        (1e-3, "ms msec millisecond milliseconds"),
        (1, "s sec second seconds"),
        (60, "min mins minute minutes"),
        (3600, "h hr hrs hour hours"),
        (86_400, "d day days"),
    ],
)
def test_units_of_time(tmp_path, seconds, units):
    assert {unit for unit, value in _lazy.SECONDS.items() if value == seconds} == set(units.split())
    for unit in filter(str.isascii, units.split()):
        tifffile.imwrite(tmp_path / "a.tif", MOVIE, imagej=True, metadata={"finterval": 0.5, "tunit": unit.upper()})
        assert read_movie(tmp_path / "a.tif")[1] == pytest.approx(2 / seconds)


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


@pytest.mark.parametrize("kind", ["f8", "f4", "?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_numbers_of_all_kinds_in_mat_files_are_seen(tmp_path, kind):
    savemat(tmp_path / "a.mat", {"a": np.ones((2, 3), kind), "said": "so"})
    assert _mat.shapes(tmp_path / "a.mat") == {"a": (2, 3), "said": ()}


def test_chunks_that_are_larger_than_wanted_are_read_whole():
    movie = _lazy.lazy(np.arange(120).reshape(5, 4, 6), (2, 4, 6), n_bytes=1)
    assert movie.chunks == ((2, 2, 1), (4,), (6,))


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_pickled_objects_are_not_loaded(tmp_path, name):
    traces = np.array([[1.0, None], [2.0, 3.0]], object)
    if name == "a.npy":
        np.save(tmp_path / name, traces, allow_pickle=True)
    else:
        np.savez(tmp_path / name, dff=traces)
    with pytest.raises(RecordingError, match=r"expected a NumPy file of plain numbers.* never loaded"):
        read(tmp_path / name, 10.0)


def test_only_files_that_are_there_are_movies(tmp_path):
    np.save(tmp_path / "traces.npy", np.zeros((3, 90)))
    np.save(tmp_path / "movie.npy", MOVIE)
    found = {name: is_movie(tmp_path / name) for name in ("traces.npy", "movie.npy", "none.npy", "none.xml")}
    assert found == {"traces.npy": False, "movie.npy": True, "none.npy": False, "none.xml": False}


def test_a_table_without_times_begins_at_zero(tmp_path):
    (tmp_path / "a.csv").write_text("roi_1,roi_2\n" + "1.5,2\n" * 9)
    traces = read(tmp_path / "a.csv", 10.0)
    assert (traces.t0, traces.frame_rate, traces.roi_ids, traces.unit) == (0.0, 10.0, (1, 2), "dff")


def test_columns_that_count_frames_are_no_rois(tmp_path):
    (tmp_path / "a.csv").write_text(",index,Frame,roi_7\n" + "".join(f"{k},{k},{k},0.5\n" for k in range(9)))
    traces = read(tmp_path / "a.csv", 10.0)
    assert (traces.roi_ids, traces.values.tolist()) == ((7,), [[0.5] * 9])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("Time (min)", 60),
        ("time_min", 60),
        ("time_h", 3600),
        ("ts", 1),
        ("Time [s]", 1),
        ("timestamp (s)", 1),
        ("Timestamps", 1),
        ("Time stamp (ms)", 1e-3),
        ("Elapsed time (s)", 1),
        ("Frame #", None),
        ("Frame number", None),
        ("frame_idx", None),
        ("Slice", None),
        ("Unnamed: 0", None),
        ("t_min", 60),
        ("# frame", None),
        ("#Frame", None),
        ("# time", 1),
    ],
)
def test_columns_of_times_and_frames_are_told_from_rois(tmp_path, suffix, name, seconds):
    if suffix == ".parquet" and name.startswith("#"):
        pytest.skip("a line of text begins so, no column")
    columns = {name: np.arange(9) / 10 / seconds if seconds else np.arange(9), "roi_7": np.full(9, 0.5)}
    if suffix == ".csv":
        table = "".join(f"{first},{second}\n" for first, second in zip(*columns.values(), strict=True))
        (tmp_path / "a.csv").write_text(",".join(columns) + "\n" + table)
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), tmp_path / "a.parquet")
    traces = read(tmp_path / f"a{suffix}", None if seconds else 10.0)
    assert (traces.roi_ids, traces.values.tolist()) == ((7,), [[0.5] * 9])
    assert traces.frame_rate == pytest.approx(10.0)


@pytest.mark.parametrize("name", ["Time (frames)", "Time of day", "frametime", "time (ns since 1970)"])
def test_times_in_a_unit_that_is_not_known_are_no_roi(tmp_path, name):
    (tmp_path / "a.csv").write_text(f"{name},roi_7\n" + "".join(f"{k},0.5\n" for k in range(9)))
    with pytest.raises(RecordingError, match=rf"a\.csv: expected times in a unit.*got a column '{re.escape(name)}'"):
        read(tmp_path / "a.csv", 10.0)


def test_times_told_twice_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("time_s,time_ms,roi_7\n" + "".join(f"{k},{1000 * k},0.5\n" for k in range(9)))
    with pytest.raises(RecordingError, match=r"a\.csv: expected one column of times, got 'time_s' and 'time_ms'"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("header", "ids"),
    [
        ("roi_-3,roi_2", (-3, 2)),
        ("-3;2;x", ()),
        ("roi-3,roi-2", (3, 2)),
        ("lifetime_1,sometimes_2", (1, 2)),
        ("t1,t2", (1, 2)),
        ("TH,tdTomato", ()),
        ("t_a,t_d,t_h", ()),
        ("T d,T h", ()),
        ("0,1", (0, 1)),
        ("1,2", (1, 2)),
    ],
)
def test_names_of_columns_as_ids(tmp_path, header, ids):
    delimiter = ";" if ";" in header else ","
    n = header.count(delimiter) + 1
    (tmp_path / "a.csv").write_text(header + "\n" + (delimiter.join(["5"] * n) + "\n") * 9)
    assert read(tmp_path / "a.csv", 10.0).roi_ids == (ids or tuple(range(1, n + 1)))


def test_negative_ids_come_back_from_a_table(tmp_path):
    write(Traces(np.ones((2, 9)), 10.0, roi_ids=(-3, 3)), tmp_path / "a.csv")
    assert read(tmp_path / "a.csv").roi_ids == (-3, 3)


@pytest.mark.parametrize("first", ["112,98", "0,2", "2,1", "1e2,3", "-1,0", "1,0"])
def test_a_first_frame_of_whole_numbers_is_no_header(tmp_path, first):
    (tmp_path / "a.csv").write_text(first + "\n" + "100,97\n" * 9)
    with pytest.raises(RecordingError, match=r"a\.csv: expected a header.*got numbers in the first line.*as roi_1"):
        read(tmp_path / "a.csv", 10.0)


def test_a_single_column_of_whole_numbers_may_begin_with_one(tmp_path):
    (tmp_path / "a.csv").write_text("1\n" + "3\n" * 9)
    with pytest.raises(RecordingError, match=r"expected a header"):
        read(tmp_path / "a.csv", 10.0)
    (tmp_path / "a.csv").write_text("0\n" + "0.5\n" * 9)  # as pandas names the only column of a table
    assert read(tmp_path / "a.csv", 10.0).n_frames == 9


def test_ids_that_pandas_writes_beside_an_index_are_a_header(tmp_path):
    (tmp_path / "a.csv").write_text(",7,3\n" + "".join(f"{k},5,6\n" for k in range(9)))
    assert read(tmp_path / "a.csv", 10.0).roi_ids == (7, 3)
    (tmp_path / "a.csv").write_text(",7,3\n" + "4,5,6\n" * 9)  # the first frame of the first ROI is missing
    with pytest.raises(RecordingError, match=r"expected a header"):
        read(tmp_path / "a.csv", 10.0)


def test_named_arrays_that_say_no_more_begin_at_zero(tmp_path):
    np.savez(tmp_path / "a.npz", dff=np.zeros((2, 9)), frame_rate=10.0)
    assert read(tmp_path / "a.npz").t0 == 0.0
    np.savez(tmp_path / "a.npz", dff=np.zeros((2, 9)), frame_rate=10.0, t0=[1.0, 2.0])
    with pytest.raises(RecordingError, match=r"expected one t0 for all ROIs, got 2 values"):
        read(tmp_path / "a.npz")


def test_the_formats_have_the_names_by_which_the_docs_call_them():
    names = {"suite2p", "zarr", "nwb", "caiman", "numpy", "csv", "parquet", "roiextractors", "matlab", "hdf5"}
    assert set(FORMATS) == names
    assert [writer_of(f"a.{name}") for name in ("csv", "parquet", "zarr", "nwb", "h5", "npz")] == [
        FORMATS[name] for name in ("csv", "parquet", "zarr", "nwb", "hdf5", "numpy")
    ]


def test_sweeps_of_which_one_is_off_are_not_taken_for_one_recording(tmp_path):
    times = np.concatenate([np.arange(40) / 10, 10 + np.arange(40) / 10, 20 + np.arange(40) / 11])
    savemat(tmp_path / "c.mat", {"time_stamps": times[None], "dff": np.arange(120.0)[None], "ap_times": [[1.0]]})
    with pytest.raises(RecordingError, match=r"expected sweeps of one frame rate, got 10 to 11 Hz"):
        read(tmp_path / "c.mat")


def test_a_frame_that_is_missing_ends_a_sweep(tmp_path):
    times = np.delete(np.arange(40) / 10, 20)
    savemat(tmp_path / "c.mat", {"time_stamps": times[None], "dff": np.arange(39.0)[None], "ap_times": [[1.0]]})
    assert [len(sweep.dff) for sweep in read_ground_truth(tmp_path / "c.mat")] == [20, 19]


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


def test_ground_truth_in_folders_of_data_sets(tmp_path):
    found = {"time_stamps": np.arange(20.0)[None] / 10, "dff": np.zeros((1, 20)), "ap_times": [[1.0]]}
    for place in ("a.mat", "DS1/b.mat", "DS1/deeper/c.mat"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        savemat(tmp_path / place, found)
    sweeps = read_ground_truth(tmp_path)
    assert {(sweep.cell, sweep.indicator) for sweep in sweeps} == {("a", ""), ("b", "")}
    savemat(tmp_path / "a.mat", found | {"dff": np.zeros((2, 20))})
    with pytest.raises(RecordingError, match=r"a\.mat: expected"):
        read_ground_truth(tmp_path / "a.mat")


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


def test_pages_of_one_file_of_a_bruker_series(tmp_path):
    folder = a_bruker_folder(tmp_path / "a", [[[image] for image in MOVIE]])
    text = (folder / "t.xml").read_text()
    for k in range(1, len(MOVIE) + 1):
        old = f'page="1" filename="t_Cycle00001_Ch1_{k:06d}.ome.tif"'
        assert old in text
        text = text.replace(old, f'page="{k}" filename="all.tif"')
    (folder / "t.xml").write_text(text)
    tifffile.imwrite(folder / "all.tif", MOVIE, photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(np.asarray(read_movie(folder)[0]), MOVIE)


@pytest.mark.parametrize(
    "about", [{"finterval": 0.05}, {"finterval": 50, "tunit": "ms"}, {"finterval": 0.05, "fps": 9}]
)
def test_frame_intervals_of_imagej(tmp_path, about):
    tifffile.imwrite(tmp_path / "a.tiff", MOVIE, imagej=True, metadata=about)
    assert is_movie(tmp_path / "a.tiff")
    assert read_movie(tmp_path / "a.tiff")[1] == pytest.approx(20)


@pytest.mark.parametrize("name", ["frame_rate", "fps"])
def test_rates_that_were_written_with_an_array(tmp_path, name):
    tifffile.imwrite(tmp_path / "a.tif", MOVIE, metadata={name: 20.0})
    assert read_movie(tmp_path / "a.tif")[1] == 20


@pytest.mark.parametrize("said", ["true", "1"])
def test_volumes_of_scanimage_by_either_word(tmp_path, said):
    values = STACK | {"hStackManager.enable": said, "hStackManager.numFramesPerVolumeWithFlyback": 2}
    assert read_movie(a_scanimage_file(tmp_path / "a.tif", MOVIE, **values))[0].shape == (len(MOVIE) // 2, 2, 16, 10)


@pytest.mark.parametrize("axes", [None, ["t", "c", "z", "y", "x"], [{"name": name} for name in "TCZYX"]])
def test_axes_of_ome_zarr_as_each_version_names_them(tmp_path, axes):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("0", shape=(len(MOVIE), 1, 1, 16, 10), chunks=(1, 1, 1, 16, 10), dtype="u2")[:] = MOVIE[
        :, None, None
    ]
    image = {"version": "0.1", "datasets": [{"path": "0"}]} | ({} if axes is None else {"axes": axes})
    group.attrs["multiscales"] = [image]
    movie, rate = read_movie(tmp_path / "a.zarr")
    np.testing.assert_array_equal(np.asarray(movie), MOVIE)
    assert rate is None


def test_a_movie_called_like_traces_is_told_by_its_axes(tmp_path):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("F", shape=MOVIE.shape, dtype="u2")[:] = MOVIE
    assert is_movie(tmp_path / "a.zarr")
    group = zarr.open_group(str(tmp_path / "b.zarr"), mode="w")
    group.create_array("F", shape=(3, 90), dtype="f4")
    assert not is_movie(tmp_path / "b.zarr")


def test_numbers_with_an_imaginary_part_in_a_zarr_are_refused(tmp_path):
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w").create_array("dff", shape=(3, 90), dtype="c8")
    with pytest.raises(RecordingError, match=r"a\.zarr: expected real numbers, got dtype complex64"):
        read(tmp_path / "a.zarr", 10.0)


def test_what_is_known_of_traces_stays_with_them_in_a_store(tmp_path):
    write(Traces(np.zeros((2, 9)), 10.0, provenance={"rig": "two"}), tmp_path / "a.zarr")
    found = read(tmp_path / "a.zarr").provenance
    assert (found["rig"], found["source"]) == ("two", "a.zarr")


def test_two_frames_of_a_bruker_series_have_a_rate(tmp_path):
    assert read_movie(a_bruker_folder(tmp_path / "a", [[[image] for image in MOVIE[:2]]]))[1] == pytest.approx(20.0)


def test_pages_of_a_bruker_series_that_are_counted_on_from_file_to_file(tmp_path):
    folder = a_bruker_folder(tmp_path / "a", [[[image] for image in MOVIE]])
    names = [f'filename="t_Cycle00001_Ch1_{k:06d}' for k in range(1, len(MOVIE) + 1)]
    changed(folder, *((f'page="1" {name}', f'page="{k}" {name}') for k, name in enumerate(names, 1)))
    np.testing.assert_array_equal(np.asarray(read_movie(folder)[0]), MOVIE)


def test_the_only_matrix_of_a_mat_file_may_have_two_rows(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 50))
    savemat(tmp_path / "a.mat", {"signal": values, "about": "two cells"})
    found = read(tmp_path / "a.mat", frame_rate=20.0, unit="dff")
    np.testing.assert_allclose(found.values, values, rtol=1e-6)


@pytest.mark.parametrize("name", ["a.h5", "a.hdf5", "A.HDF5"])
def test_hdf5_movies_by_either_ending(tmp_path, name):
    with h5py.File(tmp_path / name, "w") as file:
        file["mov"] = MOVIE
    assert is_movie(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(read_movie(tmp_path / name)[0]), MOVIE)


def test_frames_of_a_movie_that_is_written_are_so_many_seconds_apart(tmp_path):
    write_movie(MOVIE, tmp_path / "a.tif", 20.0)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.imagej_metadata["finterval"] == pytest.approx(0.05)
        assert tiff.imagej_metadata["tunit"] == "s"


def test_several_frames_of_each_plane_are_no_volumes(tmp_path):
    path = a_scanimage_file(tmp_path / "a.tif", MOVIE, **STACK | {"hStackManager.framesPerSlice": 2})
    assert read_movie(path)[0].shape == MOVIE.shape


def test_a_file_that_is_not_there_cannot_be_added_to(tmp_path):
    with pytest.raises(FileNotFoundError):
        check_result(tmp_path / "none.nwb", append=True)


def test_planes_of_a_tiff_that_grows_are_not_taken_for_frames(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", MOVIE.reshape(6, 2, 16, 10), metadata={"axes": "TZYX"})
    with pytest.raises(RecordingError):
        calvae.open_growing(tmp_path / "a.ome.tif")


@pytest.mark.parametrize(
    "options",
    [
        {"imagej": True},
        {"ome": True},
        {"photometric": "minisblack"},
        {"photometric": "minisblack", "contiguous": False, "metadata": None},
        {"photometric": "minisblack", "compression": "zlib"},
    ],
)
def test_a_tiff_that_is_cut_off_is_never_taken_for_a_shorter_one(tmp_path, options):
    """Wherever it ends: either all pixels are there, or it is said that some are not."""
    with tifffile.TiffWriter(tmp_path / "a.tif", **{k: options[k] for k in ("imagej", "ome") if k in options}) as tiff:
        rest = {k: v for k, v in options.items() if k not in ("imagej", "ome")}
        for image in MOVIE if "contiguous" in rest else [MOVIE]:
            tiff.write(image, **rest)
    whole = (tmp_path / "a.tif").read_bytes()
    np.testing.assert_array_equal(np.asarray(read_movie(tmp_path / "a.tif")[0]), MOVIE)
    refused = 0
    for end in (*range(600, len(whole), 97), len(whole) - 1):
        (tmp_path / "b.tif").write_bytes(whole[:end])
        try:
            movie = np.asarray(read_movie(tmp_path / "b.tif")[0])
        except RecordingError:
            refused += 1
        else:
            np.testing.assert_array_equal(movie, MOVIE)
    assert refused > 20


def test_a_tiff_that_names_a_page_after_the_last_is_read(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for image in MOVIE:
            tiff.write(image, photometric="minisblack", contiguous=False, metadata=None)
    with tifffile.TiffFile(path) as tiff:
        last, head = tiff.pages[-1].offset, tiff.tiff.tagnosize + 12 * len(tiff.pages[-1].tags)
    content = bytearray(path.read_bytes())
    assert content[last + head : last + head + 4] == bytes(4)
    content[last + head : last + head + 4] = len(content).to_bytes(4, "little")
    path.write_bytes(content)
    np.testing.assert_array_equal(np.asarray(read_movie(path)[0]), MOVIE)


def test_arrays_may_be_as_large_as_memory_and_no_larger(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}[name])
    check_memory(40_960, tmp_path / "a.npz")
    with pytest.raises(RecordingError, match="expected arrays that fit into this machine"):
        check_memory(40_961, tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["t", "frame"])
def test_an_axis_of_ome_zarr_may_have_any_name_if_it_is_of_time(tmp_path, name):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("0", shape=MOVIE.shape, chunks=(1, 16, 10), dtype="u2")[:] = MOVIE
    axes = [{"name": name, "type": "time"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    group.attrs["multiscales"] = [{"version": "0.4", "datasets": [{"path": "0"}], "axes": axes}]
    np.testing.assert_array_equal(np.asarray(read_movie(tmp_path / "a.zarr")[0]), MOVIE)


def test_a_frame_rate_that_contradicts_the_file_stays_known(tmp_path):
    write(Traces(np.ones((2, 30)) + np.arange(30), 10.0, "raw"), tmp_path / "a.npz")
    assert read(tmp_path / "a.npz", frame_rate=20.0).provenance["frame_rate_of_file"] == 10.0
    assert "frame_rate_of_file" not in read(tmp_path / "a.npz", frame_rate=10.0).provenance


def test_the_name_of_what_was_written_is_told(tmp_path):
    assert write_arrays({"a": np.ones(3)}, tmp_path / "a.npz") == tmp_path / "a.npz"
