"""suite2p folders, of all versions and half-broken ones, and the pickles in them, which must not run."""

from __future__ import annotations

import builtins
import datetime
import json
import os
import pathlib
import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_recording import a_result

from napari_calvae import formats
from napari_calvae.formats import _pickles, open_traces, read, read_movie, suite2p, write
from napari_calvae.formats._pickles import load_dicts
from napari_calvae.preprocess import delta_f_over_f, extract
from napari_calvae.recording import RecordingError

SHAPE = (12, 10)


def save_dicts(path, dicts):
    np.save(path, dicts if isinstance(dicts, dict) else np.array(dicts, object), allow_pickle=True)


def a_stat(n_rois, first=0):
    """ROIs of 2 × 3 pixels, one below the other; each shares its last row with the next."""
    return [
        {
            "ypix": np.repeat([first + k, first + k + 1], 3),
            "xpix": np.tile([2, 3, 4], 2),
            "lam": np.arange(1, 7, dtype=np.float32),
            "overlap": np.array([False] * 3 + [True] * 3),
            "med": [first + k, 3],
            "npix_soma": np.int64(6),
        }
        for k in range(n_rois)
    ]


def a_plane(folder, n_rois=3, n_frames=40, shape=SHAPE, version="0.10", seed=0, **settings):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    np.save(folder / "F.npy", rng.uniform(100, 200, (n_rois, n_frames)).astype(np.float32))
    np.save(folder / "Fneu.npy", rng.uniform(50, 100, (n_rois, n_frames)).astype(np.float32))
    np.save(folder / "iscell.npy", np.c_[np.arange(n_rois) % 2, np.full(n_rois, 0.5)])
    save_dicts(folder / "stat.npy", a_stat(n_rois))
    plane = {"Ly": shape[0], "Lx": shape[1]}
    if version == "0.10":
        paths = {"save_path": pathlib.PurePosixPath("a/b"), "date_proc": datetime.datetime(2021, 5, 6)}
        save_dicts(
            folder / "ops.npy", {"fs": 15.0, "neucoeff": 0.5, "suite2p_version": "0.10.3"} | plane | paths | settings
        )
    else:
        extraction = {"neuropil_coefficient": 0.6, "allow_overlap": settings.pop("allow_overlap", False)}
        save_dicts(folder / "db.npy", plane | {"first_files": np.array([True]), "iplane": np.int64(0)})
        save_dicts(folder / "settings.npy", {"fs": 15.0, "extraction": extraction, "version": "1.1.0"} | settings)
    return folder


def result_of(traces, seed=0):
    """A result with the traces' ROIs and frames and some rates."""
    rate = np.random.default_rng(seed).uniform(0, 9, traces.values.shape).astype(np.float32)
    return replace(a_result(), traces=traces, rate=rate)


def corrected(folder, coefficient):
    values, around = (np.load(folder / name).astype(float) for name in ("F.npy", "Fneu.npy"))
    return values - coefficient * (around - np.median(around, axis=1, keepdims=True))


def test_mean_images_lie_where_the_rois_do(tmp_path):
    images = [np.full(SHAPE, 3.0), np.full((SHAPE[0] + 2, SHAPE[1]), 5)]
    images[0][0, 0] = np.nan
    for number, image in zip((0, 2), images, strict=True):
        a_plane(tmp_path / f"plane{number}", shape=image.shape, meanImg=image)
    mean = suite2p.read_mean_image(tmp_path)
    assert mean.shape == (3, SHAPE[0] + 2, SHAPE[1])
    assert mean[0, 0, 0] == 0
    assert (mean[0, 1 : SHAPE[0]] == 3).all()
    assert not mean[0, SHAPE[0] :].any()
    assert not mean[1].any()
    assert (mean[2] == 5).all()
    assert suite2p.read_mean_image(tmp_path / "plane0" / "F.npy").shape == SHAPE


@pytest.mark.parametrize("image", [None, "text", np.zeros((3, 3)), np.full(SHAPE, None)])
def test_what_is_no_image_of_the_plane_is_left_out(tmp_path, image):
    a_plane(tmp_path / "plane0", meanImg=image)
    assert suite2p.read_mean_image(tmp_path) is None


def test_a_real_folder_is_read_from_any_of_its_ends(shared):
    folder = shared / "formats" / "suite2p"
    for path in (folder, folder / "plane0", folder / "plane0" / "F.npy"):
        traces = read(path)
        np.testing.assert_allclose(traces.values, corrected(folder / "plane0", 0.7), rtol=1e-5)
        assert (traces.frame_rate, traces.unit, traces.roi_ids) == (30, "raw", tuple(range(1, 14)))
        assert traces.accepted.tolist() == (np.load(folder / "plane0" / "iscell.npy")[:, 0] > 0).tolist()
        assert traces.provenance["source"] == path.name.replace("F.npy", "plane0")
        assert traces.provenance["suite2p"]["version"] == "1.1.0"
    stat = np.load(folder / "plane0" / "stat.npy", allow_pickle=True)
    for row, roi in enumerate(stat):
        used = ~roi["overlap"]
        expected = np.zeros((96, 96), np.float32)
        expected[roi["ypix"][used], roi["xpix"][used]] = roi["lam"][used]
        found = np.zeros(96 * 96, np.float32)
        found[traces.rois.pixels[row]] = traces.rois.weights[row]
        np.testing.assert_array_equal(found.reshape(96, 96), expected)


def test_another_share_of_the_neuropil_may_be_asked_for(shared, tmp_path):
    plane = shared / "formats" / "suite2p" / "plane0"
    for share in (0.0, 0.3):
        traces = read(plane, neuropil=share)
        np.testing.assert_allclose(traces.values, corrected(plane, share), rtol=1e-5)
        assert traces.provenance["suite2p"]["planes"][0]["neuropil_coefficient"] == share
    with pytest.raises(RecordingError, match="neuropil: expected a coefficient between 0 and 2, got 7"):
        open_traces(plane, neuropil=7)
    shutil.copytree(plane, tmp_path / "plane0")
    (tmp_path / "plane0" / "Fneu.npy").unlink()
    with pytest.raises(RecordingError, match=r"neuropil: expected .*neuropil, found no Fneu\.npy in plane0"):
        read(tmp_path, neuropil=0.3)


def test_masks_of_a_real_folder_lie_on_the_cells_of_its_movie(shared):
    plane = shared / "formats" / "suite2p" / "plane0"
    traces = read(plane)
    movie, _ = read_movie(shared / "movies" / "hybrid_gcamp6f.tif")
    ours = extract(movie[:900], traces.rois, 30.0, neuropil_coefficient=0).values
    theirs = np.load(plane / "F.npy")[:, :900]
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)]
    assert min(alike) > 0.95  # suite2p moved the frames by up to a pixel first
    np.testing.assert_allclose(ours.mean(axis=1) / 2, theirs.mean(axis=1), rtol=0.01)  # it halves 16-bit movies


def test_traces_stay_in_their_file_and_survive_pickling(shared):
    source = open_traces(shared / "formats" / "suite2p")
    fetch = pickle.loads(pickle.dumps(source.fetch))
    np.testing.assert_array_equal(fetch(np.array([1, 4, 12])), source.load().values[[1, 4, 12]])
    assert source.chunk_rows == 1


@pytest.mark.parametrize(("version", "coefficient"), [("0.10", 0.5), ("1.0", 0.6)])
def test_old_and_new_settings(tmp_path, version, coefficient):
    plane = a_plane(tmp_path / "plane0", version=version)
    traces = read(plane)
    np.testing.assert_allclose(traces.values, corrected(plane, coefficient), rtol=1e-5)
    assert traces.frame_rate == 15
    assert traces.accepted.tolist() == [False, True, False]
    assert traces.rois.shape == SHAPE
    assert traces.provenance["suite2p"]["planes"][0]["neuropil_coefficient"] == coefficient
    assert read(plane, frame_rate=20.0).frame_rate == 20


@pytest.mark.parametrize("version", ["0.10", "1.0"])
def test_pixels_of_several_rois_count_only_where_suite2p_let_them(tmp_path, version):
    alone = read(a_plane(tmp_path / "a", version=version)).rois
    both = read(a_plane(tmp_path / "b", version=version, allow_overlap=True)).rois
    assert [len(p) for p in alone.pixels] == [3, 3, 3]
    assert [len(p) for p in both.pixels] == [6, 6, 6]
    assert alone.pixels[1].tolist() == [12, 13, 14]


def test_a_roi_of_shared_pixels_only_keeps_them(tmp_path):
    plane = a_plane(tmp_path / "plane0")
    stat = a_stat(3)
    stat[1]["overlap"][:] = True
    save_dicts(plane / "stat.npy", stat)
    assert [len(p) for p in read(plane).rois.pixels] == [3, 6, 3]


def test_planes_follow_each_other_by_number(tmp_path):
    folder = tmp_path / "suite2p"
    counts = {10: (2, 38, (8, 20)), 2: (4, 40, SHAPE), 0: (1, 39, SHAPE)}
    for seed, (number, (n_rois, n_frames, shape)) in enumerate(counts.items()):
        a_plane(folder / f"plane{number}", n_rois, n_frames, shape, seed=seed)
    (folder / "plane1").mkdir()  # a plane without ROIs
    (folder / "combined").mkdir()
    traces = read(folder)
    assert traces.roi_ids == tuple(range(1, 8))
    assert traces.rois.planes == (0, 2, 2, 2, 2, 10, 10)
    assert traces.rois.shape == (12, 20)
    assert traces.rois.pixels[0].tolist() == [2, 3, 4]
    assert traces.rois.pixels[2].tolist() == [22, 23, 24]
    row = 0
    for number in (0, 2, 10):
        n_rois, n_frames, _ = counts[number]
        part = traces.values[row : row + n_rois]
        np.testing.assert_allclose(part[:, :n_frames], corrected(folder / f"plane{number}", 0.5), rtol=1e-5)
        assert np.isnan(part[:, n_frames:]).all()
        row += n_rois
    assert traces.accepted.tolist() == [False, False, True, False, True, False, True]
    np.testing.assert_array_equal(open_traces(folder).select([0, 3, 6]).values, traces.values[[0, 3, 6]])


def test_planes_of_different_frame_rates_are_not_mixed(tmp_path):
    a_plane(tmp_path / "suite2p" / "plane0")
    a_plane(tmp_path / "suite2p" / "plane1", fs=7.5)
    with pytest.raises(RecordingError, match=r"expected one frame rate for all planes, got \{.*\}\. Read each"):
        read(tmp_path / "suite2p")
    assert read(tmp_path / "suite2p", frame_rate=7.5).n_rois == 6


def test_what_may_be_missing(tmp_path):
    plane = a_plane(tmp_path / "plane0")
    (plane / "Fneu.npy").unlink()
    (plane / "iscell.npy").unlink()
    traces = read(plane)
    np.testing.assert_array_equal(traces.values, np.load(plane / "F.npy"))
    assert traces.accepted is None
    assert traces.provenance["suite2p"]["planes"][0]["neuropil_coefficient"] is None
    (plane / "ops.npy").unlink()
    with pytest.raises(RecordingError, match=r"frame_rate: expected.*got none"):
        read(plane)
    traces = read(plane, 30.0)
    assert (traces.rois, traces.n_rois) == (None, 3)
    save_dicts(tmp_path / "settings.npy", {"fs": 9.0})  # beside the planes
    assert read(plane).frame_rate == 9


def test_missing_frames_stay_missing(tmp_path):
    plane = a_plane(tmp_path / "plane0")
    values, around = np.load(plane / "F.npy"), np.load(plane / "Fneu.npy")
    values[0, 3], around[1, 5], around[2] = np.nan, np.nan, np.nan
    np.save(plane / "F.npy", values)
    np.save(plane / "Fneu.npy", around)
    traces = read(plane)
    assert np.argwhere(~traces.valid).tolist() == [[0, 3], [1, 5]]
    np.testing.assert_array_equal(traces.values[2], values[2])


def test_other_layouts_of_numbers(tmp_path):
    plane = a_plane(tmp_path / "plane0")
    expected = read(plane).values
    for name in ("F.npy", "Fneu.npy"):
        np.save(plane / name, np.asfortranarray(np.load(plane / name).astype(np.float64)))
    source = open_traces(plane)
    np.testing.assert_allclose(source.load().values, expected, rtol=1e-6)
    assert source.chunk_rows == 3


def test_only_suite2p_folders_are_taken_for_some(tmp_path):
    plane = a_plane(tmp_path / "s" / "plane0")
    for path in (plane, plane.parent, plane / "F.npy"):
        assert suite2p.matches(path)
    np.save(tmp_path / "F.npy", np.ones((2, 30)))
    for path in (tmp_path / "F.npy", plane / "spks.npy", plane / "Fneu.npy", tmp_path / "none"):
        assert not suite2p.matches(path)
    assert read(tmp_path / "F.npy", 30.0).unit == "dff"  # a plain matrix


class Runs:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "stat.npy").unlink(), r"expected suite2p's F.npy and stat.npy, found no stat.npy"),
        (lambda p: (p / "F.npy").unlink(), r"expected suite2p's F.npy and stat.npy, found no F.npy"),
        (lambda p: truncate(p / "F.npy"), r"plane0/F\.npy: expected a matrix of numbers.*incomplete"),
        (lambda p: truncate(p / "Fneu.npy"), r"plane0/Fneu\.npy: expected a matrix of numbers"),
        (lambda p: truncate(p / "stat.npy"), r"stat\.npy: expected a NumPy file of dictionaries.*cannot be read"),
        (lambda p: truncate(p / "ops.npy"), r"ops\.npy: expected a NumPy file of dictionaries.*cannot be read"),
        (lambda p: (p / "ops.npy").write_bytes(b""), r"ops\.npy: expected a NumPy file of dictionaries"),
        (lambda p: (p / "F.npy").write_bytes(b"junk"), r"F\.npy: expected a matrix of numbers"),
        (lambda p: np.save(p / "F.npy", np.ones(9)), r"F\.npy: expected a matrix.*shape \(9,\)"),
        (lambda p: np.save(p / "F.npy", np.ones((3, 0))), r"F\.npy: expected a matrix.*shape \(3, 0\)"),
        (lambda p: np.save(p / "F.npy", np.ones((3, 40), complex)), r"F\.npy: expected a matrix.*complex128"),
        (lambda p: save_dicts(p / "F.npy", {"a": 1}), r"F\.npy: expected a matrix of numbers"),
        (lambda p: np.save(p / "Fneu.npy", np.ones((3, 39))), r"Fneu\.npy: expected the shape of F\.npy, \(3, 40\)"),
        (lambda p: np.save(p / "iscell.npy", np.ones((2, 2))), r"iscell\.npy: expected one entry per row.*3, got 2"),
        (lambda p: save_dicts(p / "stat.npy", a_stat(4)), r"stat\.npy: expected one entry per row of F\.npy, 3, got 4"),
        (lambda p: np.save(p / "stat.npy", np.ones(3)), r"stat\.npy: expected dictionaries, got an array of numbers"),
        (lambda p: save_dicts(p / "stat.npy", [1, "a", None]), r"stat\.npy: expected dictionaries, got other objects"),
        (lambda p: save_dicts(p / "stat.npy", [{}] * 3), r"stat\.npy: expected ypix, xpix and lam.*in row 0"),
        (lambda p: save_dicts(p / "stat.npy", a_stat(3, 10)), r"stat\.npy.*row 1 .*outside the image of 12 × 10"),
        (lambda p: save_dicts(p / "ops.npy", {"fs": "fast"}), r"expected numbers for fs, Ly, Lx"),
        (lambda p: save_dicts(p / "ops.npy", {"fs": -1.0}), r"frame_rate: expected a positive number"),
        (
            lambda p: save_dicts(p / "ops.npy", {"f": Runs(print, "!")}),
            r"ops\.npy.*got builtins\.print, which is refused",
        ),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    plane = a_plane(tmp_path / "plane0")
    damage(plane)
    with pytest.raises(RecordingError, match=message):
        read(plane)


def test_traces_that_vanish_after_they_were_opened(tmp_path):
    plane = a_plane(tmp_path / "plane0")
    source = open_traces(plane)
    truncate(plane / "F.npy")
    with pytest.raises(RecordingError, match=r"F\.npy: expected a matrix of numbers"):
        source.load()


# Spikes


def test_spikes_take_the_place_of_suite2ps(tmp_path):
    plane = a_plane(tmp_path / "suite2p" / "plane0", n_rois=5)
    traces = delta_f_over_f(read(plane))
    result = result_of(traces)
    write(result, tmp_path / "new" / "spks.npy")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"spks.npy", "spks.provenance.json"}
    spikes = np.load(tmp_path / "new" / "spks.npy")
    assert spikes.dtype == np.float32
    np.testing.assert_allclose(spikes, result.rate / 15, rtol=1e-6)
    provenance = json.loads((tmp_path / "new" / "spks.provenance.json").read_text())
    assert provenance["traces"]["suite2p"]["planes"][0]["rois"] == 5
    with pytest.raises(FileExistsError, match=r"spks\.npy: exists already.*--overwrite"):
        write(result, tmp_path / "new" / "spks.npy")
    some = result_of(traces.select([3, 1]))
    write(some, tmp_path / "new" / "spks.npy", overwrite=True)
    spikes = np.load(tmp_path / "new" / "spks.npy")
    np.testing.assert_allclose(spikes[[3, 1]], some.rate / 15, rtol=1e-6)
    assert not spikes[[0, 2, 4]].any()
    assert spikes.shape == np.load(plane / "F.npy").shape


def test_spikes_of_several_planes_are_rows_of_the_combined_folder(tmp_path):
    for number, n_frames in ((0, 40), (1, 38)):
        a_plane(tmp_path / "suite2p" / f"plane{number}", 2, n_frames)
    result = result_of(delta_f_over_f(read(tmp_path / "suite2p")))
    write(result, tmp_path / "spks.npy")
    spikes = np.load(tmp_path / "spks.npy")
    np.testing.assert_allclose(spikes[:, :38], result.rate[:, :38] / 15, rtol=1e-6)
    np.testing.assert_allclose(spikes[:2, 38:], result.rate[:2, 38:] / 15, rtol=1e-6)
    assert not spikes[2:, 38:].any()


def test_spikes_of_other_traces_are_written_row_by_row(tmp_path, monkeypatch):
    result = a_result()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(result, "~/spks.npy")
    np.testing.assert_allclose(np.load(tmp_path / "spks.npy"), result.rate / 10, rtol=1e-6)


def test_spikes_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
    with pytest.raises(RecordingError, match=r"expected inferred spikes, got traces"):
        write(a_result().traces, tmp_path / "new" / "spks.npy")
    renumbered = result_of(read(a_plane(tmp_path / "plane0")).replace(roi_ids=(7, 8, 9), rois=None))
    with pytest.raises(RecordingError, match=r"expected ROIs 1 to 3, the rows of F\.npy, got 7 to 9"):
        write(renumbered, tmp_path / "new" / "spks.npy")
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        write(a_result(), tmp_path / "no" / "such" / "spks.npy")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(suite2p, "provenance_json", full)
    with pytest.raises(OSError, match="disk full"):
        write(a_result(), tmp_path / "new" / "spks.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["plane0"]
    (tmp_path / "plane0" / "spks.npy").write_text("precious")
    with pytest.raises(OSError, match="disk full"):
        write(a_result(), tmp_path / "plane0" / "spks.npy", overwrite=True)
    assert (tmp_path / "plane0" / "spks.npy").read_text() == "precious"
    assert formats.writer_of("x/spks.npy") is suite2p


@pytest.mark.filterwarnings("ignore")
def test_suite2ps_own_loader_opens_a_folder_with_our_spikes(shared, tmp_path):
    loader = pytest.importorskip("suite2p.gui.io", exc_type=ImportError)
    from suite2p.io import combined

    folder = tmp_path / "suite2p"
    shutil.copytree(shared / "formats" / "suite2p", folder, copy_function=shutil.copyfile)
    result = result_of(delta_f_over_f(read(folder)))
    write(result, folder / "plane0" / "spks.npy", overwrite=True)
    _, _, F, _, spikes, *_ = loader.load_files(str(folder / "plane0" / "stat.npy"))
    assert spikes.shape == F.shape
    np.testing.assert_allclose(spikes, result.rate / 30, rtol=1e-6)
    np.testing.assert_allclose(combined(str(folder), save=False)[5], result.rate / 30, rtol=1e-6)


# Pickles


def write_pickle(path, content, shape=(), protocol=4):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
        file.write(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))


PLAIN = {
    "numbers": [1, 2.5, True, None, 3 + 4j, 10**30],
    "texts": ("a", b"b", {"c"}, frozenset("d"), slice(1, 2)),
    "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("x"), np.str_("")],
    "arrays": [
        np.arange(6.0).reshape(2, 3).T,
        np.array(["ab", "c"]),
        np.arange(3, dtype=">i2"),
        np.zeros((0, 2)),
        np.array(5),
    ],
    "objects": np.array([np.arange(2), "x", None], object),
    "when": datetime.datetime(2021, 5, 6, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    "nested": {"deep": [{"er": np.array([True])}]},
}


def same(a, b):
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in b)
    if isinstance(b, np.ndarray):
        if b.dtype == object:
            return a.dtype == object and a.shape == b.shape and same(a.tolist(), b.tolist())
        return a.dtype == b.dtype.newbyteorder("=") and np.array_equal(np.asarray(a), b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
def test_plain_dictionaries_come_back(tmp_path, core, protocol):
    content = pickle.dumps(np.array(PLAIN, object), protocol=protocol)
    if protocol == 3:  # as older versions of NumPy pickle; the names end in newlines
        content = re.sub(rb"numpy\._?core", core, content)
    write_pickle(tmp_path / "a.npy", content)
    assert same(load_dicts(tmp_path / "a.npy"), [PLAIN])


def test_real_dictionaries_come_back(shared):
    for path in sorted((shared / "formats" / "suite2p").rglob("*.npy")):
        try:
            expected = np.load(path, allow_pickle=False)
        except ValueError:
            expected = np.load(path, allow_pickle=True).ravel().tolist()
            assert [set(d) for d in load_dicts(path)] == [set(d) for d in expected]
            assert all(same(ours, theirs) for ours, theirs in zip(load_dicts(path), expected, strict=True))
        else:
            with pytest.raises(RecordingError, match="expected dictionaries, got an array of numbers"):
                load_dicts(path)


@pytest.mark.parametrize("kind", [pathlib.PurePosixPath, pathlib.PureWindowsPath])
def test_paths_become_pure_ones(tmp_path, kind):
    # The other system's paths cannot even be made here.
    content = pickle.dumps(np.array({"p": kind("/a/b")}, object), protocol=3).replace(b"Pure", b"")
    write_pickle(tmp_path / "a.npy", content)
    assert load_dicts(tmp_path / "a.npy") == [{"p": kind("/a/b")}]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda marker: Runs(os.system, f"touch {marker}"), r"(posix|nt)\.system"),
        (lambda marker: Runs(builtins.eval, f"open({str(marker)!r}, 'w')"), r"builtins\.eval"),
        (lambda marker: Runs(builtins.exec, f"open({str(marker)!r}, 'w')"), r"builtins\.exec"),
        (lambda marker: Runs(builtins.open, str(marker), "w"), r"_?io\.open"),
        (lambda marker: Runs(builtins.getattr, "a", "upper"), r"builtins\.getattr"),
        (lambda marker: Runs(np.save, str(marker), 1), r"numpy\.save"),
        (lambda marker: Runs(np.load, str(marker)), r"numpy\.load"),
        (lambda marker: Runs(np.testing.measure, f"open({str(marker)!r}, 'w')"), r"numpy\.testing\S*\.measure"),
        (lambda marker: Runs(np.fromfile, str(marker)), r"numpy\S*\.fromfile"),
        (lambda marker: Runs(shutil.rmtree, str(marker)), r"shutil\.rmtree"),
        (lambda marker: Runs(pickle.loads, b"N."), r"_?pickle\.loads"),
        (lambda marker: Runs(pathlib.Path.touch, marker), r"(builtins\.getattr|pathlib\S*\.Path\.touch)"),
        (
            lambda marker: Runs(np.ndarray.tofile, np.ones(1), str(marker)),
            r"(builtins\.getattr|numpy\.ndarray\.tofile)",
        ),
        (lambda marker: Runs(RecordingError, str(marker)), r"napari_calvae\.errors\.RecordingError"),
    ],
)
@pytest.mark.parametrize("protocol", [3, 4])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, call, name, protocol):
    marker = tmp_path / "marker"
    content = pickle.dumps(np.array({"a": [call(marker)]}, object), protocol=protocol)
    write_pickle(tmp_path / "a.npy", content)
    with pytest.raises(RecordingError, match=rf"a\.npy: expected arrays.*got ({name}), which is refused"):
        load_dicts(tmp_path / "a.npy")
    assert not marker.exists()


class Claims:
    """Pickled, it is an array of which something false is said."""

    def __init__(self, *state, name="f8"):
        self.state, self.name = state, name

    def __reduce__(self):
        make = np.array([]).__reduce__()[0]
        return make, (np.ndarray, (10**15,), b"b"), self.state


@pytest.mark.parametrize(
    "array",
    [
        Claims(1, (10**6,), np.dtype(object), False, [1]),
        Claims(1, (10**6,), np.dtype(float), False, b"12345678"),
        Claims(1, (-1, -1), np.dtype(object), False, [1]),
        Claims(1, (2,), np.dtype([("a", object)]), False, b"1" * 16),
        Claims(1, (2,), np.dtype("(3,)f8"), False, b"1" * 48),
        Claims(1, (2,), np.dtype("m8[s]"), False, b"1" * 16),
        Claims(1, (1,), np.dtype(object), False, (1,)),
        Claims(1, ("a",), np.dtype(float), False, b""),
        Claims(1, (1,), 5, False, b"1" * 8),
        Claims(1, 2),
        Runs(np.float64(0).__reduce__()[0], np.dtype(object), b"12345678"),
        Runs(np.float64(0).__reduce__()[0], np.dtype(float), b"1234"),
        Runs(np.dtype, "nonsense"),
        Runs(np.dtype, "i4,O"),
        Runs(datetime.datetime, "x"),
    ],
)
def test_false_claims_about_arrays_are_found_out(tmp_path, array):
    write_pickle(tmp_path / "a.npy", np.array({"a": array}, object))
    with pytest.raises(RecordingError, match=r"a\.npy: expected a NumPy file of dictionaries.*cannot be read"):
        load_dicts(tmp_path / "a.npy")


def test_truncated_pickles(tmp_path):
    save_dicts(tmp_path / "a.npy", [PLAIN, PLAIN])
    whole = (tmp_path / "a.npy").read_bytes()
    for length in {*range(0, len(whole), 37), *range(len(whole) - 20, len(whole))}:
        (tmp_path / "b.npy").write_bytes(whole[:length])
        with pytest.raises(RecordingError, match=r"b\.npy: expected a NumPy file of dictionaries"):
            load_dicts(tmp_path / "b.npy")


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY\x01\x00\xff\xff{'descr': '|O'",
        b"\x93NUMPY\x09\x00" + b"\x00" * 60,
        b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
        b"\x93NUMPY\x01\x00\x50\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1e9,), }".ljust(80),
        b"\x93NUMPY\x01\x00\x50\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (10,), }".ljust(80) + b"N.",
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"{" * 50_000,
        b"PK\x03\x04",
    ],
)
def test_absurd_headers(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(RecordingError, match=r"a\.npy: expected a NumPy file of dictionaries.*cannot be read"):
        load_dicts(tmp_path / "a.npy")


def test_a_pickle_that_remembers_an_object_at_an_absurd_place_is_refused(tmp_path):
    whole = pickle.dumps(np.array({"a": "b"}, object), protocol=2)
    at = whole.index(b"q\x00")  # the first that is remembered
    for place in (b"r" + (2**30).to_bytes(4, "little"), b"p1073741824\n"):
        write_pickle(tmp_path / "a.npy", whole[:at] + place + whole[at + 2 :])
        with pytest.raises(RecordingError, match=r"a\.npy.*that hold an object number 1073741824"):
            load_dicts(tmp_path / "a.npy")


def test_the_depth_and_kind_of_what_is_found(tmp_path):
    for content in (
        b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"(" * 100_000 + b".",
        b"N.",
        b"cos\n\n.",
        b"\x80\xff.",
    ):
        write_pickle(tmp_path / "a.npy", content)
        with pytest.raises(RecordingError, match=r"a\.npy: expected"):
            load_dicts(tmp_path / "a.npy")
    write_pickle(tmp_path / "b.npy", np.array([{}, {}], object), shape=(3,))
    with pytest.raises(RecordingError, match=r"no array of shape \(3,\) in it"):
        load_dicts(tmp_path / "b.npy")


def test_what_a_pickle_sets_does_not_last(tmp_path):
    # BUILD on a name that is let through: attributes of what it got.
    content = b"\x80\x04\x8c\x07pathlib\x8c\x09PosixPath\x93N}\x8c\x01x\x8c\x04evils\x86b."
    write_pickle(tmp_path / "a.npy", content)
    with pytest.raises(RecordingError, match="no array of shape"):
        load_dicts(tmp_path / "a.npy")
    assert not hasattr(pathlib.PurePosixPath, "x")
    assert not any(hasattr(made, "x") for made in _pickles._ALLOWED.values())


def test_where_no_settings_say_it_seven_tenths_of_the_neuropil_are_taken_off(tmp_path):
    a_plane(tmp_path / "plane0")
    settings = np.load(tmp_path / "plane0" / "ops.npy", allow_pickle=True).item()
    del settings["neucoeff"]
    np.save(tmp_path / "plane0" / "ops.npy", settings)
    np.testing.assert_allclose(read(tmp_path).values, corrected(tmp_path / "plane0", 0.7), rtol=1e-5)
