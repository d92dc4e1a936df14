"""Files: what goes out comes back, what cannot be read is said plainly, and nothing is half-written."""

from __future__ import annotations

import csv
import json
import os
import pickle
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import dask.array as da
import h5py
import numpy as np
import pytest
import tifffile
import zarr
from test_recording import a_result

from napari_calvae import formats
from napari_calvae.formats import (
    _files,
    movies,
    read,
    read_labels,
    read_movie,
    read_spikes,
    write,
    write_arrays,
    write_movie,
)
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.roi_masks import RoiMasks

VALUES = np.random.default_rng(0).random((3, 50)).astype(np.float32)


def a_movie(n_frames=30):
    return np.random.default_rng(0).integers(0, 4000, (n_frames, 12, 10)).astype(np.uint16)


def test_every_format_says_what_it_reads():
    for module in formats.FORMATS.values():
        assert all(pattern.startswith("*.") for pattern in module.PATTERNS)
        for suffix in getattr(module, "SUFFIXES", ()):  # what it writes it can read
            assert any(fnmatch(f"a{suffix}", pattern) for pattern in module.PATTERNS)


@pytest.mark.parametrize("name", ["values", "dff", "F"])
def test_npz_and_h5_name_their_arrays(tmp_path, name):
    arrays = {name: VALUES, "frame_rate": np.asarray(12.5), "roi_ids": np.array([4, 2, 9]), "t0": np.asarray(0.5)}
    np.savez(tmp_path / "a.npz", **arrays)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for key, array in arrays.items():
            file[key] = array
    for file in ("a.npz", "a.h5"):
        traces = read(tmp_path / file)
        np.testing.assert_array_equal(traces.values, VALUES)
        assert (traces.frame_rate, traces.roi_ids, traces.t0) == (12.5, (4, 2, 9), 0.5)
        assert traces.unit == ("raw" if name == "F" else "dff")
    assert read(tmp_path / "a.npz", frame_rate=20.0, unit="raw").frame_rate == 20
    assert read(tmp_path / "a.npz", unit="raw").unit == "raw"


def test_npz_and_h5_may_state_the_unit(tmp_path):
    np.savez(tmp_path / "a.npz", values=VALUES, frame_rate=10, unit="raw")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["values"] = VALUES
        file.attrs.update(frame_rate=10.0, unit="raw")
    assert read(tmp_path / "a.npz").unit == read(tmp_path / "a.hdf5").unit == "raw"


def test_npy_needs_a_frame_rate(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    np.testing.assert_array_equal(read(tmp_path / "a.npy", 30.0).values, VALUES)
    with pytest.raises(RecordingError, match=r"frame_rate: expected.*got none"):
        read(tmp_path / "a.npy")


def write_csv(path, header, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(header)
        table.writerows(rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(
    ("name", "scale"), [("time", 1), ("Time (s)", 1), ("t", 1), ("time_ms", 1000), ("Time [ms]", 1000)]
)
def test_csv_reads_its_clock(tmp_path, delimiter, name, scale):
    times = 3 + np.arange(50) / 12.5
    write_csv(tmp_path / "a.csv", [name, "roi_7", "roi_3", "roi_12"], np.c_[times * scale, VALUES.T], delimiter)
    traces = read(tmp_path / "a.csv")
    np.testing.assert_allclose(traces.values, VALUES, rtol=1e-6)
    assert traces.frame_rate == pytest.approx(12.5)
    assert traces.t0 == pytest.approx(3)
    assert traces.roi_ids == (7, 3, 12)


def test_csv_from_pandas_without_clock_and_with_gaps(tmp_path):
    rows = [[k, *row] for k, row in enumerate(VALUES.T.tolist())]
    rows[4][2] = ""
    write_csv(tmp_path / "a.csv", ["", "0", "1", "2"], rows)
    traces = read(tmp_path / "a.csv", 30.0)
    expected = np.ones((3, 50), bool)
    expected[1, 4] = False
    np.testing.assert_array_equal(traces.valid, expected)
    assert traces.roi_ids == (0, 1, 2)
    write_csv(tmp_path / "b.csv", ["left", "right", "both"], VALUES.T)
    assert read(tmp_path / "b.csv", 30.0).roi_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "0.1,0.2\n0.3,0.4\n", r"a\.csv: expected a header.*got numbers in the first line"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: expected 2 columns as in the header, got 1"),
        ("a.csv", "a,b\n1,2\n3,x\n", r"a\.csv, line 3: expected numbers"),
        ("a.csv", "a,b\n", "expected a header and at least one frame, got 1 lines"),
        ("a.csv", "time,a\n0,1\n1,1\n2,1\n9,1\n", r"evenly spaced frames, got a step of 7 s.*after 2 s.*empty cells"),
        ("a.csv", "time,a\n0,1\n0,1\n", "time column that rises"),
        ("a.csv", "time\n0\n1\n", r"expected one column per ROI, got the columns \['time'\]"),
        ("a.csv", "roi,frame,rate\n1,0,0\n", r"expected traces.*got a table of results"),
        ("a.csv", b"\xff\xfe\x00\x81", "expected a text table, got binary data"),
        ("a.npy", b"junk", r"a\.npy: expected a NumPy file of plain numbers"),
        ("a.npz", b"junk", r"a\.npz: expected a NumPy file of plain numbers"),
        ("a.npy", b"", r"a\.npy: expected a NumPy file of plain numbers"),
        ("a.h5", b"junk", r"a\.h5: expected an HDF5 file, got one that cannot be read"),
        ("a.xyz", b"junk", r"a\.xyz: expected traces in one of the formats.*Movies need a label image"),
    ],
)
def test_unreadable_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecordingError, match=message):
        read(tmp_path / name, 30.0)


def test_pickles_are_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps([1, 2]))
    for name in ("a.npy", "b.npy"):
        with pytest.raises(RecordingError, match="pickled objects are never loaded"):
            read(tmp_path / name, 30.0)


def test_tables_that_hold_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", spks=VALUES)
    with pytest.raises(RecordingError, match=r"named values or dff or F, got \['spks'\]"):
        read(tmp_path / "a.npz", 30.0)
    np.savez(tmp_path / "b.npz", dff=VALUES, frame_rate=[30.0, 20.0])
    with pytest.raises(RecordingError, match="expected one frame_rate for all ROIs, got 2 values"):
        read(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match="expected a file, found nothing there"):
        read(tmp_path / "c.npz")


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_results_come_back(tmp_path, suffix):
    result, path = a_result(), tmp_path / f"spikes{suffix}"
    write(result, path)
    traces = read(path)
    np.testing.assert_array_equal(traces.values, result.traces.values)
    assert (traces.frame_rate, traces.roi_ids, traces.t0) == (10, (5, 6), 2.0)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as z:
            stored = {name: z[name] for name in z.files}
        provenance = json.loads(str(stored["provenance"]))
    else:
        with h5py.File(path) as file:
            stored = {name: file[name][()] for name in file}
            provenance = json.loads(file.attrs["provenance"])
    np.testing.assert_array_equal(stored["rate"], result.rate)
    np.testing.assert_array_equal(stored["events_frame"], result.events["frame"])
    np.testing.assert_array_equal(stored["reconstruction_std"], result.reconstruction_std)
    np.testing.assert_array_equal(stored["theta_amplitude"], result.theta["amplitude"])
    np.testing.assert_array_equal(stored["quality_explained"], result.quality["explained"])
    np.testing.assert_allclose(stored["interval"], result.interval(0.9, 1.0), rtol=1e-6)
    np.testing.assert_array_equal(stored["interval_edges"], result.window_edges(1.0))
    assert provenance["inference"] == {"seed": 0, "array": [0, 1]}


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".mat"])
@pytest.mark.parametrize("what", ["result", "traces"])
def test_judgements_come_back(tmp_path, suffix, what):
    path, result = tmp_path / f"a{suffix}", a_result()
    judged = replace(result, traces=result.traces.replace(accepted=[True, False]))
    write(judged if what == "result" else judged.traces, path)
    assert read(path).accepted.tolist() == [True, False]
    write(result if what == "result" else result.traces, path, overwrite=True)
    assert read(path).accepted is None


def test_judgements_that_are_none_are_refused(tmp_path):
    for accepted in ([0, 2, 1], ["yes", "no", "no"], [1.0, np.nan, 0.0]):
        np.savez(tmp_path / "a.npz", values=VALUES, frame_rate=10.0, accepted=accepted)
        with pytest.raises(RecordingError, match=r"a\.npz: expected 0 or 1 for every ROI under the name accepted"):
            read(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", values=VALUES, frame_rate=10.0, accepted=[0, 1])
    with pytest.raises(RecordingError, match="accepted: expected one value per ROI, 3"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.zarr"])
def test_neuropil_is_not_subtracted_from_traces_that_have_none(tmp_path, name):
    write(a_result().traces, tmp_path / name)
    for opened in (read, formats.open_traces):
        with pytest.raises(RecordingError, match=rf"neuropil: expected a movie or a suite2p folder .*, got {name}"):
            opened(tmp_path / name, neuropil=0.0)


def test_what_an_hdf5_file_has_instead_of_traces_is_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["traces"] = VALUES
        file["more/time"] = np.arange(50.0)
    with pytest.raises(RecordingError) as error:
        read(tmp_path / "a.h5", 30.0)
    assert "named values or dff or F, or CaImAn's estimates/C, got " in str(error.value)
    assert "got more/time (50,), traces (3, 50). Rename" in str(error.value)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.update({f"d{i}": VALUES for i in range(9)})
    with pytest.raises(RecordingError, match=r"d7 \(3, 50\) …\. Rename"):
        read(tmp_path / "b.h5")
    h5py.File(tmp_path / "c.h5", "w").close()
    with pytest.raises(RecordingError, match=r"got none\. Rename"):
        read(tmp_path / "c.h5")


def test_results_as_text(tmp_path):
    result = a_result(n_frames=45)
    write(result, tmp_path / "a.csv")
    assert {p.name for p in tmp_path.iterdir()} == {"a.csv", "a.events.csv", "a.rois.csv", "a.provenance.json"}
    rows = list(csv.DictReader(open_text(tmp_path / "a.csv")))
    assert len(rows) == 2 * 45
    np.testing.assert_allclose([float(r["rate"]) for r in rows[45:]], result.rate[1], rtol=1e-5)
    assert [r["roi"] for r in rows[::45]] == ["5", "6"]
    assert float(rows[1]["time_s"]) == pytest.approx(2.1)
    low = [float(r["count_low"]) for r in rows[:40]]
    np.testing.assert_allclose(low, np.repeat(result.interval()[0, 0], 10))
    assert rows[44]["count_low"] == ""
    events = list(csv.DictReader(open_text(tmp_path / "a.events.csv")))
    assert sum(int(e["count"]) for e in events) == result.events["count"].sum()
    rois = list(csv.DictReader(open_text(tmp_path / "a.rois.csv")))
    assert float(rois[1]["theta_amplitude"]) == pytest.approx(result.theta["amplitude"][1])


def open_text(path):
    return path.read_text().splitlines()


def test_results_too_short_for_an_interval_do_without(tmp_path):
    for name in ("a.npz", "a.csv"):
        write(a_result(n_frames=5), tmp_path / name)
    with np.load(tmp_path / "a.npz") as z:
        assert "interval" not in z.files


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.csv"])
def test_files_are_replaced_only_when_told_and_only_whole(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"exists already.*--overwrite"):
        write(a_result(), path)
    module = formats.writer_of(path)

    def broken(result):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "provenance_json", broken)
        with pytest.raises(OSError, match="disk full"):
            write(a_result(), path, overwrite=True)
    assert path.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == [name]
    write(a_result(), path, overwrite=True)
    assert path.read_bytes()[:8] != b"precious"


def test_the_files_beside_a_text_result_are_as_safe(tmp_path):
    (tmp_path / "a.rois.csv").write_text("precious")
    with pytest.raises(FileExistsError, match=r"a\.rois\.csv: exists already"):
        write(a_result(), tmp_path / "a.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["a.rois.csv"]


def test_where_results_cannot_go(tmp_path):
    with pytest.raises(RecordingError, match=r"name that ends in .*\.npz, .*\.csv, .*\.h5, .*got 'a.xyz'"):
        write(a_result(), tmp_path / "a.xyz")
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        write(a_result(), tmp_path / "none" / "a.npz")
    (tmp_path / "b.npz").mkdir()
    with pytest.raises(IsADirectoryError, match="got a folder"):
        write(a_result(), tmp_path / "b.npz")


def test_spikes_are_read_from_a_table_with_a_row_each(tmp_path):
    (tmp_path / "s.csv").write_text("roi,time_s\n7,1.5\n2,0.25\n7,0.5\n")
    assert {roi: t.tolist() for roi, t in read_spikes(tmp_path / "s.csv").items()} == {2: [0.25], 7: [0.5, 1.5]}
    (tmp_path / "ms.csv").write_text("cell;time_ms\n1;1500\n")
    assert read_spikes(tmp_path / "ms.csv")[1].tolist() == [1.5]
    for text in ("roi,sample,frame,time_s,count\n1,0,5,0.5,1\n", "a,b\n1,2\n"):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(RecordingError, match="a row per true spike"):
            read_spikes(tmp_path / "bad.csv")
    (tmp_path / "half.csv").write_text("roi,time_s\n1.5,2\n")
    with pytest.raises(RecordingError, match="whole ROI ids"):
        read_spikes(tmp_path / "half.csv")


def test_spikes_are_read_by_roi(tmp_path):
    write_arrays({"spike_times_3": np.array([0.5, 1.0]), "counts": np.zeros(3)}, tmp_path / "s.npz")
    assert {roi: times.tolist() for roi, times in read_spikes(tmp_path / "s.npz").items()} == {3: [0.5, 1.0]}
    write_arrays({"counts": np.zeros(3)}, tmp_path / "t.npz")
    with pytest.raises(RecordingError, match="expected arrays spike_times_<ROI id>"):
        read_spikes(tmp_path / "t.npz")
    np.save(tmp_path / "u.npy", np.zeros(3))
    with pytest.raises(RecordingError, match=r"u\.npy: expected an \.npz file of spike times"):
        read_spikes(tmp_path / "u.npy")


def test_movies_are_opened_not_loaded(tmp_path):
    movie = a_movie()
    tifffile.imwrite(tmp_path / "plain.tif", movie, imagej=True, metadata={"axes": "TYX", "finterval": 0.05})
    write_movie(movie, tmp_path / "packed.tif", 20.0)
    np.save(tmp_path / "array.npy", movie)
    kinds = {"plain.tif": np.memmap, "packed.tif": da.Array, "array.npy": np.memmap}
    for name, kind in kinds.items():
        opened, rate = read_movie(tmp_path / name)
        assert isinstance(opened, kind)
        assert rate == (None if name == "array.npy" else pytest.approx(20.0))
        np.testing.assert_array_equal(np.asarray(opened), movie)
        np.testing.assert_array_equal(np.asarray(opened[3:20:4, 2:5, 1]), movie[3:20:4, 2:5, 1])
        np.testing.assert_array_equal(np.asarray(opened[7]), movie[7])
        assert formats.is_movie(tmp_path / name)


def test_a_packed_movie_is_read_in_pieces_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("napari_calvae.formats.tiff.CHUNK_BYTES", 12 * 10 * 2 * 4)
    movie = a_movie(203)
    write_movie(movie, tmp_path / "a.tif", 20.0)
    opened, _ = read_movie(tmp_path / "a.tif")
    assert opened.chunks[0][:2] == (4, 4)
    np.testing.assert_array_equal(opened.compute(scheduler="threads", num_workers=8), movie)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened))[5].compute(), movie[5])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"imagej": True, "metadata": {"finterval": 50.0, "tunit": "ms"}}, 20.0),
        ({"imagej": True, "metadata": {"finterval": 33.0, "tunit": "beats"}}, None),  # never guessed
        ({"imagej": True, "metadata": {"finterval": 0.0}}, None),
        ({"imagej": True, "metadata": {"fps": 7.0}}, None),  # ImageJ's speed of playback
        ({"ome": True, "metadata": {"axes": "TYX", "TimeIncrement": 0.1}}, 10.0),
        ({"ome": True, "metadata": {"axes": "TYX", "TimeIncrement": 125, "TimeIncrementUnit": "ms"}}, 8.0),
        ({"ome": True, "metadata": {"axes": "TYX"}}, None),
        ({"metadata": {"frame_rate": 15.0}}, 15.0),
        ({"metadata": None, "software": "SI.VERSION_MAJOR = 5\nSI.hRoiManager.scanFrameRate = 30.02"}, 30.02),
        (
            {
                "metadata": None,
                "software": "SI.hScan2D.logAverageFactor = 3\nSI.hRoiManager.scanFrameRate = 30",
            },
            10.0,
        ),
        ({"metadata": None, "description": "state.acq.frameRate=4.5\rstate.acq.x=1"}, 4.5),
        ({"metadata": None}, None),
    ],
)
def test_the_frame_rate_is_read_not_guessed(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", a_movie(), photometric="minisblack", compression="zlib", **options)
    movie, rate = read_movie(tmp_path / "a.tif")
    assert movie.shape == (30, 12, 10)
    assert rate == (None if expected is None else pytest.approx(expected))


def test_movies_that_cannot_be_read(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"junk")
    with pytest.raises(RecordingError, match=r"a\.tif: expected a TIFF movie, got one that cannot be read"):
        read_movie(tmp_path / "a.tif")
    write_movie(a_movie(), tmp_path / "b.tif", 20.0)
    (tmp_path / "c.tif").write_bytes((tmp_path / "b.tif").read_bytes()[:300])
    with pytest.raises(RecordingError, match=r"c\.tif: expected a whole TIFF movie"):
        read_movie(tmp_path / "c.tif")
    tifffile.imwrite(tmp_path / "d.tif", np.zeros((5, 12, 10, 3), np.uint8), photometric="rgb", compression="zlib")
    with pytest.raises(RecordingError, match=r"d\.tif: expected one grey image per frame"):
        read_movie(tmp_path / "d.tif")
    (tmp_path / "e.xyz").write_bytes(b"junk")
    with pytest.raises(RecordingError, match=r"expected a movie in one of the formats \*\.tif, \*\.tiff, \*\.npy"):
        read_movie(tmp_path / "e.xyz")
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        read_movie(tmp_path / "f.tif")


def test_channels_come_as_they_are(tmp_path):
    movie = np.zeros((7, 2, 12, 10), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", movie, imagej=True, compression="zlib", metadata={"axes": "TCYX"})
    assert read_movie(tmp_path / "a.tif")[0].shape == (7, 2, 12, 10)


def test_label_images(tmp_path):
    labels = np.arange(120).reshape(12, 10) % 5
    write_movie(labels.astype(np.uint16), tmp_path / "a.tif", None)
    tifffile.imwrite(tmp_path / "b.tif", labels.astype(np.float32))
    np.save(tmp_path / "c.npy", labels[None])
    for name in ("a.tif", "b.tif", "c.npy"):
        read_back = read_labels(tmp_path / name)
        assert read_back.dtype.kind in "iu"
        np.testing.assert_array_equal(read_back, labels)


def test_a_movie_in_place_of_a_label_image_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((12, 9, 8), np.uint8))
    with pytest.raises(RecordingError, match=r"a\.npy: expected one label image .*, got the shape \(12, 9, 8\)"):
        read_labels(tmp_path / "a.npy")


def test_a_label_image_larger_than_any_microscope_takes_is_not_loaded(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.ones((10, 10), np.uint8))
    monkeypatch.setattr(movies, "MOST_PIXELS", 100)
    assert read_labels(tmp_path / "a.npy").shape == (10, 10)
    monkeypatch.setattr(movies, "MOST_PIXELS", 99)
    with pytest.raises(RecordingError, match=r"at most 99 pixels, got the shape \(10, 10\)"):
        read_labels(tmp_path / "a.npy")


def test_a_tiff_of_a_few_bytes_that_claims_a_gigabyte_is_not_decoded(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 9), np.uint16), compression="zlib", metadata=None)
    whole = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tags = [file.pages[0].tags[name] for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
    forged = bytearray(whole)
    for tag in tags:
        size = {3: 2, 4: 4}[tag.dtype]
        forged[tag.valueoffset : tag.valueoffset + size] = (21_000).to_bytes(size, "little")
    (tmp_path / "a.tif").write_bytes(forged)
    with pytest.raises(RecordingError, match=r"at most 134,217,728 pixels, got the shape \(21000, 21000\)"):
        read_movie(tmp_path / "a.tif")


def test_room_that_is_reserved_is_there_and_keeps_what_was(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    _files.reserve(tmp_path / "a", 1000)
    assert (tmp_path / "a").read_bytes() == b"abc" + bytes(1000)


def test_the_table_of_rois_begins_with_their_ids(tmp_path):
    found = a_result()
    write(found, tmp_path / "a.csv")
    with open(tmp_path / "a.rois.csv", newline="") as file:
        first, *rows = csv.reader(file)
    assert (first[0], [int(row[0]) for row in rows]) == ("roi", list(found.roi_ids))
    assert (tmp_path / "a.events.csv").read_text().startswith("roi,sample,frame,time_s,count\n")
    assert "accepted" not in first
    write(replace(found, traces=found.traces.replace(accepted=[True, False])), tmp_path / "b.csv")
    with open(tmp_path / "b.rois.csv", newline="") as file:
        assert [(row["roi"], row["accepted"]) for row in csv.DictReader(file)] == [("5", "1"), ("6", "0")]


def test_what_memory_cannot_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:  # a claim of 800 GB in a file of a few hundred bytes
        file.create_dataset("dff", shape=(1_000_000, 100_000), dtype="f8", chunks=(100, 1000))
        file["frame_rate"] = 10.0
    with pytest.raises(RecordingError, match=r"a\.h5: expected arrays that fit into .* got 800 GB\. Save it as Zarr"):
        read(tmp_path / "a.h5")
    np.savez_compressed(tmp_path / "a.npz", dff=np.zeros((10, 1000)), frame_rate=10.0, other=np.zeros(10**6))
    monkeypatch.setattr(os, "sysconf", lambda name: 300)  # 90 kB: more than the traces take, which alone are read
    assert read(tmp_path / "a.npz").n_rois == 10
    monkeypatch.setattr(os, "sysconf", lambda name: 200)
    with pytest.raises(RecordingError, match=r"a\.npz: expected arrays that fit into this machine's 4e-05 GB"):
        read(tmp_path / "a.npz")


def test_units_stored_as_bytes_are_understood(tmp_path):
    arrays = {"values": VALUES, "frame_rate": np.array(9.0), "unit": np.bytes_("raw")}
    assert _files.traces_of(arrays, tmp_path).unit == "raw"


def placed() -> RoiMasks:
    """Two ROIs of unequal size and weights on two planes."""
    weights = (np.array([0.5, 2], np.float32), np.array([1, 3, 0.25], np.float32))
    return RoiMasks((4, 6), (np.array([7, 8]), np.array([0, 23, 8])), (5, 6), weights, (0, 1))


@pytest.mark.parametrize("what", ["traces", "result"])
@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.mat"])
def test_masks_come_back_from_files_of_named_arrays(tmp_path, name, what):
    result = a_result()
    result = replace(result, traces=result.traces.replace(rois=placed()))
    write(result if what == "result" else result.traces, tmp_path / name)
    found, expected = read(tmp_path / name).rois, placed()
    assert (found.shape, found.ids, found.planes) == (expected.shape, expected.ids, expected.planes)
    for kind in ("pixels", "weights"):
        for mine, theirs in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype


def test_a_mask_of_a_single_roi_comes_back_from_matlab(tmp_path):
    write(Traces(VALUES[:1], 9.0, rois=RoiMasks((4, 6), (np.array([7]),))), tmp_path / "a.mat")
    assert read(tmp_path / "a.mat").rois.pixels[0].tolist() == [7]


@pytest.mark.parametrize(
    "changed",
    [
        {"rois_shape": np.array([4])},
        {"rois_shape": np.array([2**40, 2**40])},
        {"rois_shape": np.array([4.0, 6.0])},
        {"rois_sizes": np.array([2, 4])},
        {"rois_sizes": np.array([5, 0])},
        {"rois_sizes": np.array([-1, 6])},
        {"rois_sizes": np.array([5])},
        {"rois_weights": np.ones(4)},
        {"rois_pixels": np.array([7, 8, 0, 24, 8])},
        {"rois_planes": np.array([0])},
        {"rois_planes": None},
    ],
)
def test_masks_that_contradict_themselves_are_refused(tmp_path, changed):
    traces = a_result().traces.replace(rois=placed())
    arrays = _files.arrays_of(traces) | _files.mask_arrays(traces) | changed
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(RecordingError, match=r"a\.npz: "):
        read(tmp_path / "a.npz")


def test_damage_in_the_middle_of_a_movie_is_said_when_it_is_met(tmp_path):
    write_movie(a_movie(), tmp_path / "a.tif", 20.0)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        offset = tiff.pages[20].dataoffsets[0]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset : offset + 40] = bytes(40)
    (tmp_path / "a.tif").write_bytes(data)
    movie, _ = read_movie(tmp_path / "a.tif")
    movie[:20].compute()
    with pytest.raises(RecordingError, match=r"a\.tif: expected a TIFF movie of 30 frames, got one of which frames 20"):
        movie[20].compute()


def a_claim(folder: Path, name: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Path:
    """A small file that says it holds far more than anyone records."""
    if folder.suffix == ".h5":
        with h5py.File(folder, "w") as file:
            file.create_dataset(name, shape, "f4", chunks=chunks).attrs["frame_rate"] = 30.0
        return folder
    group = zarr.open_group(str(folder), mode="w", attributes={"frame_rate": 30.0})
    group.create_array(name, data=np.ones(chunks, "f4"), chunks=chunks)
    about = json.loads((folder / name / "zarr.json").read_text())
    (folder / name / "zarr.json").write_text(json.dumps(about | {"shape": list(shape)}))
    return folder


@pytest.mark.parametrize("name", ["a.h5", "a.zarr"])
@pytest.mark.parametrize("shape", [(10**12, 16, 16), (10**7, 10**5, 10**5), (2**62, 2, 2)])
def test_movies_larger_than_any_are_refused_at_once(tmp_path, name, shape):
    path = a_claim(tmp_path / name, "mov", shape, (1, *(min(n, 16) for n in shape[1:])))
    with pytest.raises(RecordingError, match=rf"at most 1,000,000 times 16 MB, got .* {shape[0]} × {shape[1]} × "):
        read_movie(path)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1000, 10**12), "expected arrays that fit into this machine's .* GB of memory"),
        ((10**10, 1000), r"\(roi, time\) with at most 1,000,000 ROIs, got 10000000000 of 1000 frames"),
    ],
)
def test_traces_of_a_store_larger_than_any_are_refused_at_once(tmp_path, shape, said):
    with pytest.raises(RecordingError, match=said):
        read(a_claim(tmp_path / "a.zarr", "dff", shape, (1, 1000)))


@pytest.mark.parametrize(
    ("name", "place", "shape"),
    [
        ("a.nwb", "processing/ophys/x/data", (10**6, 10**6)),
        ("a.hdf5", "estimates/C", (1000, 10**9)),
        ("a.mat", "dff", (10**9, 1000)),
    ],
)
def test_hdf5_files_that_claim_what_they_do_not_hold_are_refused_at_once(tmp_path, name, place, shape):
    """Whatever else is in them: reading such an array would fill memory with nothing."""
    with h5py.File(tmp_path / name, "w", userblock_size=512) as file:
        file.attrs["nwb_version"] = "2.7.0"
        file.create_dataset(place, shape, "f4", chunks=(10, 1000))[:2, :3] = 1.0
    said = rf"{name}: expected an HDF5 file that holds what it says, got one that claims 4e\+03 GB of {place} and has"
    with pytest.raises(RecordingError, match=said):
        read(tmp_path / name)


def test_large_arrays_that_a_file_holds_or_that_are_movies_claim_nothing_wrong(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("whole", data=np.random.default_rng(0).random(20_000))
        file.create_dataset("movie", (10**6, 512, 512), "u2", chunks=(1, 512, 512))
        file["nothing"] = h5py.Empty("f4")
        monkeypatch.setattr(os, "sysconf", lambda name: 100)  # 10 kB of memory
        _files.check_claims(file, tmp_path / "a.h5", most_axes=2)
        with pytest.raises(RecordingError, match="GB of movie"):
            _files.check_claims(file, tmp_path / "a.h5")
