"""Files of other programs through roiextractors: written here as their programs write them, and read as traces."""

from __future__ import annotations

import errno
import sys

import h5py
import numpy as np
import pytest
import zarr

from napari_calvae.formats import extractors, read
from napari_calvae.recording import RecordingError

pytest.importorskip("roiextractors")

N_ROIS, N_FRAMES, HEIGHT, WIDTH = 3, 40, 6, 5
TRACES = np.random.default_rng(0).random((N_ROIS, N_FRAMES)).astype("f4")
MASKS = np.zeros((N_ROIS, HEIGHT, WIDTH), "f4")
for _roi in range(N_ROIS):
    MASKS[_roi, 2 * _roi, _roi : _roi + 2] = 1, 0.5


def text(value):
    """Text as MATLAB 7.3 keeps it."""
    return np.array([[ord(letter)] for letter in value], "u2")


def new_extract(path, relative=1, masks=MASKS, version="1.1.0"):
    with h5py.File(path, "w") as file:  # MATLAB's arrays lie in the file with their axes reversed
        file["output/temporal_weights"] = TRACES
        file["output/spatial_weights"] = masks.transpose(0, 2, 1)
        file["output/config/preprocess"] = np.array([[float(relative)]])
        file["output/info/version"] = text(version)


def old_extract(path):
    with h5py.File(path, "w") as file:
        group = file.create_group("extractAnalysisOutput")
        group["traces"], group["filters"] = TRACES.T, MASKS
        group["time/totalTime"], group["info/version"] = np.array([[4.0]]), text("0.6.0")
        group["info/summary_image"], group["file"] = np.ones((HEIGHT, WIDTH)), text("movie.h5")


def cnmfe(path):
    with h5py.File(path, "w") as file:
        group = file.create_group("cnmfeAnalysisOutput")
        group["extractedSignals"], group["extractedImages"] = TRACES.T, MASKS
        group["time/totalTime"], group["Cn"] = np.array([[4.0]]), np.ones((HEIGHT, WIDTH))


def minian(folder, times=None, ids=(4, 0, 9), **fields):
    root = zarr.open_group(folder, mode="w", zarr_format=2)
    fields = {"A": MASKS, "C": TRACES, "b": np.ones((HEIGHT, WIDTH)), "f": np.ones(N_FRAMES)} | fields
    for name, values in fields.items():
        if values is None:
            continue
        group = root.create_group(f"{name}.zarr")
        group.create_array(name, data=np.asarray(values))
        if name == "A":
            group.create_array("unit_id", data=np.array(ids))
            group.create_array("height", data=np.arange(HEIGHT))
            group.create_array("width", data=np.arange(WIDTH))
        if name == "C":
            group.create_array("frame", data=np.arange(N_FRAMES))
    if times is not None:
        lines = "".join(f"{frame},{time:.3f},0\n" for frame, time in enumerate(times))
        (folder / "timeStamps.csv").write_text(f"Frame Number,Time Stamp (ms),Buffer Index\n{lines}")


def same_masks(rois, masks=MASKS):
    assert rois.shape == (HEIGHT, WIDTH)
    for pixels, weights, mask in zip(rois.pixels, rois.weights, masks, strict=True):
        found = np.zeros(HEIGHT * WIDTH, "f4")
        found[pixels] = weights
        np.testing.assert_array_equal(found.reshape(mask.shape), mask)


@pytest.mark.parametrize(("relative", "unit"), [(1, "dff"), (0, "raw")])
def test_extract(tmp_path, relative, unit):
    new_extract(tmp_path / "a.mat", relative)
    traces = extractors.read(tmp_path / "a.mat", 20.0)
    np.testing.assert_array_equal(traces.values, TRACES)
    assert (traces.roi_ids, traces.frame_rate, traces.unit) == ((1, 2, 3), 20, unit)
    np.testing.assert_array_equal(traces.accepted, [True] * 3)
    same_masks(traces.rois)
    assert traces.provenance == {"source": "a.mat", "roiextractors": {"program": "EXTRACT", "response": unit}}
    assert extractors.read(tmp_path / "a.mat", 20.0, "raw").unit == "raw"


def test_extract_marks_cells_that_lost_their_pixels(tmp_path):
    masks = MASKS.copy()
    masks[1] = 0
    new_extract(tmp_path / "a.mat", masks=masks)
    traces = extractors.read(tmp_path / "a.mat", 20.0)
    np.testing.assert_array_equal(traces.accepted, [True, False, True])
    assert traces.rois is None


@pytest.mark.parametrize("make", [old_extract, cnmfe])
def test_old_extract_and_cnmfe_know_how_long_the_recording_was(tmp_path, make):
    make(tmp_path / "a.mat")
    traces = extractors.read(tmp_path / "a.mat")
    np.testing.assert_array_equal(traces.values, TRACES)
    assert (traces.roi_ids, traces.frame_rate, traces.unit, traces.accepted) == ((1, 2, 3), 10, "raw", None)
    same_masks(traces.rois)
    assert extractors.read(tmp_path / "a.mat", 25.0).frame_rate == 25


@pytest.mark.parametrize("grouped", [True, False])
def test_minian_has_denoised_traces_and_a_clock(tmp_path, grouped):
    folder = tmp_path / "minian"
    minian(folder, 500 + np.arange(N_FRAMES) * 50 + np.random.default_rng(0).uniform(-3, 3, N_FRAMES), b0=TRACES * 2)
    if not grouped:  # the folder is nothing but a folder
        (folder / ".zgroup").unlink()
    with pytest.warns(UserWarning, match=r"minian: expected fluorescence, got only the denoised traces of Minian"):
        traces = read(folder)
    np.testing.assert_allclose(traces.values, TRACES * 3, rtol=1e-6)
    assert (traces.roi_ids, traces.unit) == ((4, 0, 9), "raw")
    assert traces.frame_rate == pytest.approx(20, rel=0.01)
    assert traces.t0 == pytest.approx(0.5, abs=0.003)
    same_masks(traces.rois)


@pytest.mark.filterwarnings("ignore:.*denoised traces of Minian")
def test_minian_without_a_clock_needs_a_frame_rate(tmp_path):
    minian(tmp_path / "a")
    np.testing.assert_array_equal(read(tmp_path / "a", 15.0).values, TRACES)
    assert read(tmp_path / "a", 15.0).frame_rate == 15
    with pytest.raises(RecordingError, match=r"frame_rate: expected .*got none"):
        read(tmp_path / "a")
    minian(tmp_path / "b", np.r_[np.arange(N_FRAMES - 1) * 50, 9999])
    with pytest.raises(RecordingError, match=r"timeStamps\.csv: expected evenly spaced frames"):
        read(tmp_path / "b")


def test_inscopix_cell_sets(tmp_path):
    isx = pytest.importorskip("isx")
    timing = isx.Timing(num_samples=N_FRAMES, period=isx.Duration.from_msecs(50))
    cells = isx.CellSet.write(str(tmp_path / "a.isxd"), timing, isx.Spacing(num_pixels=(HEIGHT, WIDTH)))
    for cell in range(N_ROIS):
        cells.set_cell_data(cell, MASKS[cell], TRACES[cell], f"C{cell}")
    cells.flush()
    cells = isx.CellSet.read(str(tmp_path / "a.isxd"), read_only=False)
    for cell, status in enumerate(("accepted", "rejected", "undecided")):
        cells.set_cell_status(cell, status)
    del cells
    traces = read(tmp_path / "a.isxd")
    np.testing.assert_array_equal(traces.values, TRACES)
    assert (traces.roi_ids, traces.frame_rate, traces.unit) == ((1, 2, 3), 20, "raw")
    np.testing.assert_array_equal(traces.accepted, [True, False, True])
    assert traces.provenance["roiextractors"]["roi_names"] == ["C0", "C1", "C2"]
    same_masks(traces.rois)


def test_inscopix_needs_its_own_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "isx", None)
    (tmp_path / "a.isxd").write_bytes(b"")
    with pytest.raises(RecordingError, match=r"a\.isxd: expected the package that reads files of Inscopix, got .*isx"):
        read(tmp_path / "a.isxd")


def test_sima_is_refused(tmp_path):
    (tmp_path / "a.sima").mkdir()
    (tmp_path / "a.sima/signals.pkl").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(RecordingError, match=r"a\.sima: .*SIMA data set, made of pickles that may run any code"):
        read(tmp_path / "a.sima")


def test_what_is_theirs_is_told_from_the_rest(tmp_path):
    new_extract(tmp_path / "a.mat")
    old_extract(tmp_path / "b.mat")
    cnmfe(tmp_path / "c.mat")
    (tmp_path / "d.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with h5py.File(tmp_path / "e.mat", "w") as file:
        file["dff"] = TRACES
        file["output/other"] = TRACES
    minian(tmp_path / "f")
    (tmp_path / "g/A.zarr").mkdir(parents=True)
    assert [path.name for path in sorted(tmp_path.iterdir()) if extractors.matches(path)] == [
        "a.mat", "b.mat", "c.mat", "f"
    ]  # fmt: skip


def test_a_missing_roiextractors_is_named(tmp_path, monkeypatch):
    new_extract(tmp_path / "a.mat")
    monkeypatch.setitem(sys.modules, "roiextractors", None)
    with pytest.raises(RecordingError, match=r"roiextractors: expected to be installed.*napari-calvae\[formats\]"):
        extractors.read(tmp_path / "a.mat", 20.0)


def test_extract_without_a_frame_rate(tmp_path):
    new_extract(tmp_path / "a.mat")
    with pytest.raises(RecordingError, match=r"frame_rate: expected .*got none"):
        extractors.read(tmp_path / "a.mat")


def remove(path, name):
    with h5py.File(path, "r+") as file:
        del file[name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: remove(path, "output/config"),
        lambda path: remove(path, "output/info"),
        lambda path: new_extract(path, version="new"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_outputs(tmp_path, damage):
    new_extract(tmp_path / "a.mat")
    damage(tmp_path / "a.mat")
    with pytest.raises(RecordingError, match=r"a\.mat: expected an output of EXTRACT, got one that cannot be read"):
        extractors.read(tmp_path / "a.mat", 20.0)


@pytest.mark.parametrize("part", ["b", "f"])
def test_minian_with_missing_parts(tmp_path, part):
    minian(tmp_path / "a", **{part: None})
    with pytest.raises(RecordingError, match=r"a: expected an output of Minian, got one that cannot be read"):
        read(tmp_path / "a", 20.0)


def test_files_cut_short_are_nobodys(tmp_path):
    new_extract(tmp_path / "a.mat")
    content = (tmp_path / "a.mat").read_bytes()
    (tmp_path / "a.mat").write_bytes(content[: len(content) // 2])
    assert not extractors.matches(tmp_path / "a.mat")
    (tmp_path / "b.isxd").write_bytes(b"junk")
    with pytest.raises(RecordingError, match=r"b\.isxd: expected"):
        read(tmp_path / "b.isxd")


@pytest.mark.filterwarnings("ignore:.*denoised traces of Minian")
def test_missing_frames_and_whole_numbers(tmp_path):
    values = TRACES.copy()
    values[1, 3] = np.nan
    minian(tmp_path / "a", C=values)
    assert not read(tmp_path / "a", 20.0).valid[1, 3]
    minian(tmp_path / "b", C=(TRACES * 100).astype("i2"))
    np.testing.assert_array_equal(read(tmp_path / "b", 20.0).values, (TRACES * 100).astype("i2"))


def test_a_file_without_permission(tmp_path, monkeypatch):
    new_extract(tmp_path / "a.mat")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(extractors, "_open", refuse)
    with pytest.raises(PermissionError):
        extractors.read(tmp_path / "a.mat", 20.0)
