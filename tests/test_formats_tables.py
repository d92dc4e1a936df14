"""MATLAB files and Parquet tables, and what text tables share with these."""

from __future__ import annotations

import builtins
import json
import pickle
from dataclasses import replace

import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.io.matlab import MatWriteError
from test_recording import a_result

from napari_calvae.formats import check_result, csv_table, matlab, open_traces, parquet, read, write
from napari_calvae.formats.ground_truth import read_ground_truth
from napari_calvae.preprocess import bin_spikes
from napari_calvae.recording import RecordingError, Traces

VALUES = np.random.default_rng(0).random((3, 50)).astype(np.float32)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


# MATLAB


def save_v73(path, variables):
    """Write as MATLAB 7.3 does: HDF5 with its axes reversed, cells as references, after a header of 512 bytes."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in variables.items():
            put(file, file, name, value)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def put(file, group, name, value):
    if isinstance(value, dict):
        made = group.create_group(name)
        made.attrs["MATLAB_class"] = np.bytes_("struct")
        for key, each in value.items():
            put(file, made, key, each)
        return
    if isinstance(value, list):
        references = np.empty((len(value), 1), h5py.ref_dtype)
        for i, each in enumerate(value):
            put(file, file.require_group("#refs#"), f"{name}{i}", each)
            references[i, 0] = file[f"#refs#/{name}{i}"].ref
        made = group.create_dataset(name, data=references, dtype=h5py.ref_dtype)
        made.attrs["MATLAB_class"] = np.bytes_("cell")
    elif isinstance(value, str):
        made = group.create_dataset(name, data=np.array([[ord(c)] for c in value], np.uint16))
        made.attrs["MATLAB_class"] = np.bytes_("char")
    elif not np.size(value):
        made = group.create_dataset(name, data=np.array([0, 0], np.uint64))
        made.attrs["MATLAB_empty"] = np.uint8(1)
        made.attrs["MATLAB_class"] = np.bytes_("double")
    else:
        made = group.create_dataset(name, data=np.atleast_2d(value).T)
        kinds = {"float32": "single", "float64": "double"}
        made.attrs["MATLAB_class"] = np.bytes_(kinds.get(made.dtype.name, made.dtype.name))


@pytest.fixture(params=["5", "7.3"])
def save(request):
    """How to save a MATLAB file of either kind."""

    def save_v5(path, variables):
        cells = {k: np.array(v, object) if isinstance(v, list) else v for k, v in variables.items()}
        savemat(path, cells)

    return save_v5 if request.param == "5" else save_v73


@pytest.mark.parametrize(("name", "unit"), [("values", "dff"), ("dff", "dff"), ("F", "raw"), ("anything", "dff")])
def test_mat_matrices(tmp_path, save, name, unit):
    beside = {"frame_rate": 12.5, "roi_ids": np.array([4, 2, 9]), "t0": 0.5, "note": "a text", "row": np.arange(7.0)}
    save(tmp_path / "a.mat", {name: VALUES} | beside)
    traces = read(tmp_path / "a.mat")
    np.testing.assert_array_equal(traces.values, VALUES)
    assert (traces.frame_rate, traces.roi_ids, traces.t0, traces.unit) == (12.5, (4, 2, 9), 0.5, unit)
    assert read(tmp_path / "a.mat", 20.0, "raw").frame_rate == 20
    assert read(tmp_path / "a.mat", 20.0, "raw").unit == "raw"


def test_mat_files_state_the_unit_and_need_a_frame_rate(tmp_path, save):
    save(tmp_path / "a.mat", {"values": VALUES, "unit": "raw", "other": VALUES})
    with pytest.raises(RecordingError, match=r"frame_rate: expected.*got none"):
        read(tmp_path / "a.mat")
    assert read(tmp_path / "a.mat", 30.0).unit == "raw"


def test_mat_numbers_of_other_kinds(tmp_path, save):
    values = VALUES.astype(float)
    values[1, 3] = np.nan
    save(tmp_path / "a.mat", {"dff": values})
    assert np.argwhere(~read(tmp_path / "a.mat", 30.0).valid).tolist() == [[1, 3]]
    save(tmp_path / "b.mat", {"F": np.arange(100, dtype=np.int16).reshape(2, 50)})
    assert read(tmp_path / "b.mat", 30.0).values[1, 0] == 50
    save(tmp_path / "c.mat", {"dff": VALUES[0]})
    np.testing.assert_array_equal(read(tmp_path / "c.mat", 30.0).values, VALUES[:1])


def a_sweep(n_frames=40, rate=20.0, start=1.0):
    """A recording as CASCADE keeps it: spikes in frames 3, 10 and 11."""
    times = start + np.arange(n_frames) / rate
    dff = np.linspace(0, 1, n_frames)
    return {"fluo_time": times, "fluo_mean": dff, "events_AP": times[[3, 10, 11]] * 1e4, "ephys_raw": np.empty((0, 0))}


@pytest.mark.parametrize("cell", [True, False], ids=["cell", "struct"])
def test_cascade_with_one_sweep_keeps_its_clock(tmp_path, save, cell):
    save(tmp_path / "CAttached_x.mat", {"CAttached": [a_sweep()] if cell else a_sweep()})
    traces = read(tmp_path / "CAttached_x.mat")
    np.testing.assert_allclose(traces.values, [np.linspace(0, 1, 40)], rtol=1e-6)
    assert traces.frame_rate == pytest.approx(20)
    assert (traces.t0, traces.unit, traces.roi_ids) == (1, "dff", (1,))
    np.testing.assert_allclose(matlab.read_spikes(tmp_path / "CAttached_x.mat")[1], [1.15, 1.5, 1.55])


def test_cascade_with_several_sweeps_has_a_row_for_each(tmp_path, save):
    save(tmp_path / "a.mat", {"CAttached": [a_sweep(), a_sweep(30, start=700.0)]})
    traces = read(tmp_path / "a.mat")
    assert traces.values.shape == (2, 40)
    assert traces.valid.sum(axis=1).tolist() == [40, 30]
    assert (traces.t0, traces.roi_ids) == (0, (1, 2))
    assert traces.provenance["sweeps_begin_s"] == [1.0, 700.0]
    assert "frame_rate_of_file" not in traces.provenance
    assert read(tmp_path / "a.mat", 7.5).provenance["frame_rate_of_file"] == pytest.approx(traces.frame_rate)
    spikes = matlab.read_spikes(tmp_path / "a.mat")
    for row in (1, 2):
        counts = bin_spikes(spikes[row], traces.t0, traces.frame_rate, traces.n_frames)
        assert np.flatnonzero(counts).tolist() == [3, 10, 11]


def test_sweeps_of_different_frame_rates_are_not_mixed(tmp_path, save):
    save(tmp_path / "a.mat", {"CAttached": [a_sweep(), a_sweep(rate=22.0)]})
    with pytest.raises(RecordingError, match=r"a\.mat: expected sweeps of one frame rate, got 20 to 22 Hz"):
        read(tmp_path / "a.mat")
    assert read(tmp_path / "a.mat", 20.0).n_rois == 2


def test_c_spikes_trials_are_sweeps(tmp_path, save):
    times = np.array([2.0, 50.0])[:, None] + np.arange(30) / 10
    dff = VALUES[:2, :30].copy()
    times[1, 20:], dff[1, 20:] = np.nan, np.nan
    save(tmp_path / "a.mat", {"time_stamps": times, "dff": dff, "ap_times": np.array([2.5, 50.0, 51.1, 90.0])})
    traces = read(tmp_path / "a.mat")
    np.testing.assert_array_equal(traces.values[0], dff[0])
    np.testing.assert_array_equal(traces.values[1, :20], dff[1, :20])
    assert traces.valid.sum(axis=1).tolist() == [30, 20]
    spikes = matlab.read_spikes(tmp_path / "a.mat")
    np.testing.assert_allclose(spikes[1], [0.5])
    np.testing.assert_allclose(spikes[2], [0, 1.1], atol=1e-9)


def test_real_mat_files(shared):
    folder = shared / "formats"
    found = {path.stem: path for path in folder.glob("*_mat/*.mat")}
    assert len(found) == 4
    shapes = {}
    for name, path in found.items():
        traces, spikes, sweeps = read(path), matlab.read_spikes(path), read_ground_truth(path)
        shapes[name] = (traces.values.shape, round(traces.frame_rate, 2))
        assert set(spikes) == set(traces.roi_ids)
        for row, sweep in enumerate(sweeps):
            np.testing.assert_array_equal(traces.values[row, : len(sweep.dff)], sweep.dff)
            counts = bin_spikes(spikes[row + 1], traces.t0, traces.frame_rate, traces.n_frames)
            assert counts.sum() == len(sweep.spike_times)
    assert shapes == {
        "CAttached_S1_cell2_mini": ((2, 450), 15.0),
        "CAttached_Theis16_set5_GCaMP6s_V1_1_mini": ((1, 10000), 59.1),
        "CAttached_jGCaMP8f_471994_6_mini": ((1, 19520), 121.96),
        "jGCaMP8f_ANM478411_cell06": ((3, 19520), 121.96),
    }
    original = loadmat(found["jGCaMP8f_ANM478411_cell06"])
    traces = read(found["jGCaMP8f_ANM478411_cell06"])
    np.testing.assert_array_equal(traces.values, original["dff"])
    spikes = matlab.read_spikes(found["jGCaMP8f_ANM478411_cell06"])
    began = original["time_stamps"][:, 0]
    together = np.concatenate([spikes[row] + start for row, start in enumerate(began, 1)])
    np.testing.assert_allclose(together, original["ap_times"].ravel())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"a": VALUES, "b": VALUES},
            r"expected a matrix \(roi, time\) named values or dff or F, or only one.*got a, b",
        ),
        ({"a": 5.0, "text": "x"}, r"expected a matrix.*got a, text"),
        ({"dff": VALUES, "frame_rate": np.array([30.0, 20.0])}, r"expected one frame_rate for all ROIs, got 2 values"),
        ({"CAttached": 5.0}, r"expected CASCADE's layout"),
        ({"CAttached": {"fluo_time": np.arange(9.0)}}, r"expected CASCADE's layout.*fluo_mean"),
        (
            {"CAttached": [{name: np.ones(1) for name in a_sweep()}]},
            r"expected at least one sweep of two frames, got none",
        ),
    ],
)
def test_mat_files_that_hold_something_else(tmp_path, save, variables, message):
    save(tmp_path / "a.mat", variables)
    with pytest.raises(RecordingError, match=rf"a\.mat: {message}"):
        read(tmp_path / "a.mat", None if "frame_rate" in variables else 30.0)


def test_spikes_need_ground_truth(tmp_path, save):
    save(tmp_path / "a.mat", {"dff": VALUES})
    with pytest.raises(RecordingError, match=r"a\.mat: expected CASCADE's layout.*or that of C-SPIKES"):
        matlab.read_spikes(tmp_path / "a.mat")
    with pytest.raises(FileNotFoundError):
        matlab.read_spikes(tmp_path / "b.mat")


def test_damaged_mat_files(tmp_path, save):
    save(tmp_path / "a.mat", {"dff": np.random.default_rng(0).random((3, 5000)), "frame_rate": 30.0})
    whole = (tmp_path / "a.mat").read_bytes()
    for content in (
        b"",
        b"junk",
        b"MATLAB 5.0".ljust(200),
        *(whole[: int(len(whole) * s)] for s in (0.001, 0.1, 0.5, 0.9)),
    ):
        (tmp_path / "b.mat").write_bytes(content)
        with pytest.raises(RecordingError, match=r"b\.mat: expected"):
            read(tmp_path / "b.mat", 30.0)


@pytest.mark.parametrize("what", ["result", "traces"])
def test_mat_files_are_written_for_matlab(tmp_path, what):
    result = a_result()
    write(result if what == "result" else result.traces.replace(unit="raw"), tmp_path / "a.mat")
    traces = read(tmp_path / "a.mat")
    np.testing.assert_array_equal(traces.values, result.traces.values)
    assert (traces.frame_rate, traces.roi_ids, traces.t0) == (10, (5, 6), 2.0)
    assert traces.unit == ("dff" if what == "result" else "raw")
    stored = loadmat(tmp_path / "a.mat")
    assert "inference" in json.loads(stored["provenance"].item()) or what == "traces"
    if what == "result":
        np.testing.assert_array_equal(stored["rate"], result.rate)
        np.testing.assert_array_equal(stored["events_frame"].ravel(), result.events["frame"])
        np.testing.assert_allclose(stored["interval"], result.interval(0.9, 1.0), rtol=1e-6)


def test_mat_files_have_a_limit(tmp_path, monkeypatch):
    def too_large(*_, **__):
        raise MatWriteError("Matrix too large to save with Matlab 5 format")

    monkeypatch.setattr(matlab, "savemat", too_large)
    with pytest.raises(RecordingError, match=r"a\.mat: expected arrays of less than 4 GB.*Write \.h5"):
        write(a_result(), tmp_path / "a.mat")
    assert not list(tmp_path.iterdir())


# Tables


@pytest.mark.parametrize("t0", [1e6, 1.7e9])
def test_clocks_since_1970_keep_their_frames(tmp_path, t0):
    write(Traces(VALUES, 30.0, t0=t0), tmp_path / "a.csv")
    found = read(tmp_path / "a.csv")
    assert found.frame_rate == pytest.approx(30.0, rel=1e-4)
    assert found.t0 == pytest.approx(t0, abs=1e-4)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("unit", ["raw", "dff"])
def test_traces_come_back_from_tables(tmp_path, suffix, unit):
    values = VALUES.copy()
    values[1, 7] = np.nan
    traces = Traces(values, 12.5, unit, (7, 3, 12), 20_000.04, provenance={"a": np.arange(2)})
    write(traces, tmp_path / f"a{suffix}")
    found = read(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(found.values, values, rtol=1e-5)
    assert found.frame_rate == pytest.approx(12.5, rel=1e-6)
    assert (found.roi_ids, found.unit) == ((7, 3, 12), unit)
    assert found.t0 == pytest.approx(20_000.04)
    if suffix == ".csv":
        assert json.loads((tmp_path / "a.provenance.json").read_text()) == {
            "traces": {"a": [0, 1]},
            "unit": unit,
            "frames": 50,
            "frame_rate": 12.5,
        }
    else:
        assert found.frame_rate == 12.5
        assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
        assert json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"calvae_provenance"])["traces"]["a"] == [
            0,
            1,
        ]


def test_parquet_tables_of_others(tmp_path):
    times = 3 + np.arange(50) / 12.5
    columns = {
        "Time [ms]": times * 1e3,
        "cell 7": VALUES[0],
        "cell 2": VALUES[1].astype(float),
        "cell 4": np.arange(50),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    traces = read(tmp_path / "a.parquet")
    np.testing.assert_array_equal(traces.values, np.stack([VALUES[0], VALUES[1], np.arange(50)]))
    assert (traces.roi_ids, traces.unit, traces.t0) == ((7, 2, 4), "dff", 3)
    assert traces.frame_rate == pytest.approx(12.5)
    assert read(tmp_path / "a.parquet", 20.0, "raw").frame_rate == 20
    source = open_traces(tmp_path / "a.parquet")
    fetch = pickle.loads(pickle.dumps(source.fetch))
    np.testing.assert_array_equal(fetch(np.array([0, 2])), traces.values[[0, 2]])


def test_parquet_tables_of_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    when = pandas.date_range("2024-05-06", periods=50, freq="80ms", name="time")
    frame = pandas.DataFrame(VALUES.T, columns=["a", "b", "c"])
    frame.set_index(when).to_parquet(tmp_path / "a.parquet")
    traces = read(tmp_path / "a.parquet")
    assert (traces.frame_rate, traces.t0, traces.roi_ids) == (pytest.approx(12.5), 0, (1, 2, 3))
    np.testing.assert_array_equal(traces.values, VALUES)
    frame.index = np.arange(50) ** 2
    frame.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(RecordingError, match=r"frame_rate: expected.*got none"):
        read(tmp_path / "b.parquet")
    np.testing.assert_array_equal(read(tmp_path / "b.parquet", 30.0).values, VALUES)
    frame.index = pandas.to_timedelta(np.arange(50) * 0.04, unit="s").rename("t")
    frame.to_parquet(tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet").frame_rate == pytest.approx(25)


def test_parquet_nulls_are_missing_frames(tmp_path):
    columns = {"a": pa.array([1.0, None, 3.0]), "b": pa.array([1, None, 3]), "c": pa.array([True, None, True])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    traces = read(tmp_path / "a.parquet", 2.0)
    assert traces.valid.tolist() == [[True, False, True]] * 3
    assert traces.values[:, ::2].tolist() == [[1, 3], [1, 3], [1, 1]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ["x", "y", "z"]}, r"expected numbers in every column, got string in 'a'"),
        ({"time": [0.0, 1.0, 2.0]}, r"expected one column per ROI, got the columns \['time'\]"),
        ({"time": [0.0, 0.0, 2.0], "a": [1, 2, 3]}, r"expected a time column that rises"),
        ({"time": [0.0, 1.0, 9.0, 10.0, 11.0], "a": [1] * 5}, r"expected evenly spaced frames"),
        ({"time": ["x", "y"], "a": [1, 2]}, r"expected a Parquet table, got a file that cannot be read"),
        ({"roi": [1], "frame": [0], "rate": [0.0]}, r"expected traces.*got a table of results"),
    ],
)
def test_parquet_tables_that_hold_something_else(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(RecordingError, match=rf"a\.parquet: {message}"):
        read(tmp_path / "a.parquet", 30.0)


def test_damaged_parquet_tables(tmp_path):
    write(a_result().traces, tmp_path / "a.parquet")
    source = open_traces(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", b"junk", whole[:-20], whole[: len(whole) // 2], b"PAR1" + bytes(100) + b"PAR1"):
        (tmp_path / "b.parquet").write_bytes(content)
        with pytest.raises(RecordingError, match=r"b\.parquet: expected a Parquet table"):
            read(tmp_path / "b.parquet", 30.0)
    (tmp_path / "a.parquet").write_bytes(whole[:100])
    with pytest.raises(RecordingError, match=r"a\.parquet: expected a Parquet table"):
        source.load()


def test_results_as_parquet(tmp_path):
    result = a_result(n_frames=45)
    write(result, tmp_path / "a.parquet")
    assert {p.name for p in tmp_path.iterdir()} == {"a.parquet", "a.events.parquet", "a.rois.parquet"}
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names[:4] == ["roi", "frame", "time_s", "dff"]
    assert table.num_rows == 2 * 45
    column = {name: table.column(name).to_numpy() for name in table.column_names}
    np.testing.assert_array_equal(column["rate"].reshape(2, 45), result.rate)
    np.testing.assert_array_equal(column["roi"], np.repeat([5, 6], 45))
    np.testing.assert_allclose(column["time_s"][45:], result.traces.times)
    np.testing.assert_allclose(column["count_low"][:40], np.repeat(result.interval()[0, 0], 10))
    assert np.isnan(column["count_high"][40:45]).all()
    assert json.loads(table.schema.metadata[b"calvae_provenance"])["inference"]["seed"] == 0
    events = pq.read_table(tmp_path / "a.events.parquet")
    np.testing.assert_array_equal(events.column("count").to_numpy(), result.events["count"])
    np.testing.assert_array_equal(events.column("roi").to_numpy(), result.events["roi"] + 5)
    rois = pq.read_table(tmp_path / "a.rois.parquet")
    np.testing.assert_array_equal(rois.column("theta_amplitude").to_numpy(), result.theta["amplitude"])
    assert "accepted" not in rois.column_names
    with pytest.raises(RecordingError, match="got a table of results"):
        read(tmp_path / "a.parquet")
    write(replace(result, traces=result.traces.replace(accepted=[False, True])), tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.rois.parquet").column("accepted").to_pylist() == [0, 1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".mat"])
def test_results_without_events(tmp_path, suffix):
    result = a_result()
    write(replace(result, events=result.events[:0], n_samples=0), tmp_path / f"a{suffix}")
    if suffix == ".parquet":
        assert pq.read_table(tmp_path / "a.events.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("suffix", "beside"), [(".parquet", "a.rois.parquet"), (".mat", None), (".csv", "a.events.csv")]
)
def test_tables_appear_whole_or_not_at_all(tmp_path, monkeypatch, suffix, beside):
    module = {".parquet": parquet, ".mat": matlab, ".csv": csv_table}[suffix]
    if beside:
        (tmp_path / beside).write_text("precious")
        with pytest.raises(FileExistsError, match=r"exists already.*--overwrite"):
            write(a_result(), tmp_path / f"a{suffix}")
        (tmp_path / beside).unlink()
    (tmp_path / f"a{suffix}").write_text("precious")

    def full(*_):
        raise OSError("disk full")

    for name in ("provenance_json", "arrays_of"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="disk full"):
                write(a_result(), tmp_path / f"a{suffix}", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]
    assert (tmp_path / f"a{suffix}").read_text() == "precious"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_judgements_come_back_from_tables_of_traces(tmp_path, suffix):
    write(Traces(VALUES, 12.5, accepted=[True, False, True]), tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}").accepted.tolist() == [True, False, True]
    if suffix == ".csv":  # columns were taken out, or renamed, by another program
        text = (tmp_path / "a.csv").read_text()
        time, _, *others = zip(*(line.split(",") for line in text.splitlines()), strict=True)
        (tmp_path / "a.csv").write_text("\n".join(map(",".join, zip(time, *others, strict=True))))
        assert read(tmp_path / "a.csv").accepted.tolist() == [False, True]
        renamed = [("beta" if k else "gamma", *cells) for k, (_, *cells) in enumerate(others)]
        (tmp_path / "a.csv").write_text("\n".join(map(",".join, zip(time, *renamed, strict=True))))
        assert read(tmp_path / "a.csv").accepted is None
        (tmp_path / "a.csv").write_text(text.replace("roi_3", "roi_4"))
        assert read(tmp_path / "a.csv").accepted is None
        longer = "time_s,roi_1,roi_2,roi_3\n" + "".join(f"{k / 12.5},1,2,3\n" for k in range(VALUES.shape[1] + 9))
        (tmp_path / "a.csv").write_text(longer)  # another table under this name
        assert read(tmp_path / "a.csv").accepted is None


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_traces_leave_no_parts_of_the_result_that_they_replace(tmp_path, monkeypatch, suffix):
    result = a_result()
    module = {".parquet": parquet, ".csv": csv_table}[suffix]
    write(result, tmp_path / f"a{suffix}")
    write(result, tmp_path / f"b{suffix}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_table", full)
        with pytest.raises(OSError, match="disk full"):
            write(result.traces, tmp_path / f"a{suffix}", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(result.traces, tmp_path / f"a{suffix}", overwrite=True)
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("a.")}
    assert left == {f"a{suffix}"} | ({"a.provenance.json"} if suffix == ".csv" else set())
    assert {path for path in before if path.name.startswith("b.")} < set(tmp_path.iterdir())
    (tmp_path / f"c.events{suffix}").write_text("licks")  # of another program: there is no result beside it
    write(result.traces, tmp_path / f"c{suffix}", overwrite=True)
    write(result.traces, tmp_path / f"c{suffix}", overwrite=True)
    assert (tmp_path / f"c.events{suffix}").read_text() == "licks"


def test_parquet_says_what_to_install(tmp_path, monkeypatch):
    write(a_result().traces, tmp_path / "a.parquet")
    found = builtins.__import__

    def absent(name, *arguments):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    for use in (
        lambda: read(tmp_path / "a.parquet"),
        lambda: write(a_result(), tmp_path / "b.parquet"),
        lambda: check_result(tmp_path / "b.parquet"),
    ):
        with pytest.raises(RecordingError, match=r"package pyarrow.*pip install 'napari-calvae\[formats\]'"):
            use()


def test_a_single_frame_of_several_rois_comes_back_from_matlab(tmp_path):
    write(Traces([[1.0], [2.0]], 3.0, "raw", (7, 4)), tmp_path / "a.mat")
    again = read(tmp_path / "a.mat")
    assert again.values.tolist() == [[1.0], [2.0]]
    assert again.roi_ids == (7, 4)


def test_a_table_of_traces_that_is_cut_off_is_missed(tmp_path):
    """At whatever row: what is beside it says how many there were."""
    values = np.random.default_rng(0).normal(size=(2, 20))
    write(Traces(values, 10.0, "raw"), tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    assert len(lines) == 21
    for n in range(3, 21):
        (tmp_path / "a.csv").write_text("".join(lines[:n]))
        with pytest.raises(RecordingError, match=r"expected 20 frames, as a\.provenance\.json says"):
            read(tmp_path / "a.csv")
    (tmp_path / "a.provenance.json").unlink()
    assert read(tmp_path / "a.csv", unit="raw").n_frames == 19
