"""CaImAn's files, written as CaImAn writes them: a group per object, the text NoneType for what is not there."""

from __future__ import annotations

import pickle
import warnings

import h5py
import numpy as np
import pytest
from scipy import sparse

from napari_calvae.formats import caiman, open_traces, read
from napari_calvae.preprocess import delta_f_over_f
from napari_calvae.recording import RecordingError

HEIGHT, WIDTH, N_FRAMES = 7, 5, 60
RNG = np.random.default_rng(0)
C = RNG.random((3, N_FRAMES)).astype(np.float32)
YRA = RNG.normal(0, 0.1, C.shape).astype(np.float32)
F_DFF = RNG.random(C.shape)
B, F = RNG.uniform(50, 60, (HEIGHT * WIDTH, 2)), RNG.uniform(0.9, 1.1, (2, N_FRAMES))


def footprints():
    """Three ROIs with weights, as images (y, x)."""
    images = np.zeros((3, HEIGHT, WIDTH))
    images[0, 1, 2:4] = [0.6, 0.8]
    images[1, 2:5, 0] = [0.2, 0.4, 0.1]
    images[2, 6, 4] = 1
    return images


def columns(images):
    """Pixels × components, pixels counted down the columns of the image."""
    return sparse.csc_matrix(np.stack([image.ravel(order="F") for image in images], axis=1))


def a_file(path, **changes):
    """A saved CNMF object with all its parts but those that are changed or, if None, left out."""
    parts = {
        "estimates/A": columns(footprints()),
        "estimates/C": C,
        "estimates/YrA": YRA,
        "estimates/F_dff": F_DFF,
        "estimates/b": B,
        "estimates/f": F,
        "estimates/b0": "NoneType",
        "estimates/S": C,
        "estimates/idx_components": np.array([0, 2]),
        "estimates/dims": "NoneType",
        "dims": np.array([HEIGHT, WIDTH]),
        "params/data/fr": 12.5,
    } | {name.replace("__", "/"): value for name, value in changes.items()}
    with h5py.File(path, "w") as file:
        for name, value in parts.items():
            if sparse.issparse(value):
                for part in ("data", "indices", "indptr", "shape"):
                    file[f"{name}/{part}"] = getattr(value, part)
            elif value is not None:
                file[name] = value
    return path


def test_dff_masks_and_judgements(tmp_path):
    traces = read(a_file(tmp_path / "a.hdf5"))
    np.testing.assert_allclose(traces.values, F_DFF, rtol=1e-6)
    assert (traces.frame_rate, traces.unit, traces.roi_ids) == (12.5, "dff", (1, 2, 3))
    assert traces.accepted.tolist() == [True, False, True]
    assert traces.rois.shape == (HEIGHT, WIDTH)
    for row, image in enumerate(footprints()):
        found = np.zeros(HEIGHT * WIDTH)
        found[traces.rois.pixels[row]] = traces.rois.weights[row]
        np.testing.assert_allclose(found.reshape(HEIGHT, WIDTH), image, rtol=1e-6)
    assert traces.provenance == {"source": "a.hdf5", "caiman": {"traces": "F_dff", "baseline_restored": False}}
    assert read(tmp_path / "a.hdf5", 20.0, "raw").frame_rate == 20
    assert read(tmp_path / "a.hdf5", 20.0, "raw").unit == "raw"


@pytest.mark.parametrize("residual", ["YrA", "R"])
@pytest.mark.parametrize("spatial", [B, sparse.csc_matrix(B)], ids=["dense", "sparse"])
def test_traces_get_back_the_baseline_that_the_background_took(tmp_path, residual, spatial):
    none = dict.fromkeys(("estimates__F_dff", "estimates__YrA"), "NoneType")
    a_file(tmp_path / "a.h5", **none | {"estimates__b": spatial, f"estimates__{residual}": YRA})
    traces = read(tmp_path / "a.h5")
    for row, image in enumerate(footprints()):
        weights = image.ravel(order="F")
        background = np.median(weights @ B @ F) / (weights @ weights)
        np.testing.assert_allclose(traces.values[row], C[row] + YRA[row] + background, rtol=1e-6)
    assert traces.unit == "raw"
    assert traces.provenance["caiman"] == {"traces": f"C + {residual}", "baseline_restored": True}
    assert (delta_f_over_f(traces).values < 0.2).all()


def test_one_photon_files_have_a_constant_background(tmp_path):
    a_file(tmp_path / "a.h5", estimates__F_dff=None, estimates__b="NoneType", estimates__f=None, estimates__b0=B[:, 0])
    weights = footprints()[0].ravel(order="F")
    expected = C[0] + YRA[0] + weights @ B[:, 0] / (weights @ weights)
    np.testing.assert_allclose(read(tmp_path / "a.h5").values[0], expected, rtol=1e-6)


def test_without_background_the_baseline_stays_at_zero(tmp_path):
    a_file(tmp_path / "a.h5", estimates__F_dff=None, estimates__b=None, estimates__f=None)
    traces = read(tmp_path / "a.h5")
    np.testing.assert_allclose(traces.values, C + YRA, rtol=1e-6)
    assert traces.provenance["caiman"]["baseline_restored"] is False


def test_denoised_traces_are_read_with_a_warning(tmp_path):
    a_file(tmp_path / "a.h5", estimates__F_dff=None, estimates__YrA="NoneType", estimates__b=None)
    with pytest.warns(UserWarning, match=r"a\.h5: expected F_dff or the residuals YrA, got only the denoised traces C"):
        traces = read(tmp_path / "a.h5")
    np.testing.assert_allclose(traces.values, C, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(a_file(tmp_path / "b.h5"))


def test_what_may_be_missing(tmp_path):
    a_file(
        tmp_path / "a.h5",
        estimates__A=None,
        estimates__idx_components="NoneType",
        params__data__fr=None,
    )
    with pytest.raises(RecordingError, match=r"frame_rate: expected.*got none"):
        read(tmp_path / "a.h5")
    traces = read(tmp_path / "a.h5", 30.0)
    assert (traces.rois, traces.accepted) == (None, None)
    a_file(tmp_path / "b.h5", params__data__fr=None, params__fr=np.array([7.5]), dims=None)
    traces = read(tmp_path / "b.h5")
    assert (traces.frame_rate, traces.rois) == (7.5, None)
    a_file(tmp_path / "c.h5", dims=None, params__data__dims=np.array([HEIGHT, WIDTH]))
    assert len(read(tmp_path / "c.h5").rois) == 3
    for name, size in (("d.h5", [7, 5, 1]), ("e.h5", [7, 6])):
        assert read(a_file(tmp_path / name, dims=np.array(size))).rois is None
    empty = footprints()
    empty[1] = 0
    assert read(a_file(tmp_path / "f.h5", estimates__A=columns(empty))).rois is None


def test_missing_frames_and_other_numbers(tmp_path):
    values = F_DFF.copy()
    values[1, 4] = np.nan
    assert np.argwhere(~read(a_file(tmp_path / "a.h5", estimates__F_dff=values)).valid).tolist() == [[1, 4]]
    integers = np.arange(2 * N_FRAMES, dtype=np.int16).reshape(2, N_FRAMES)
    a_file(tmp_path / "b.h5", estimates__F_dff=integers, estimates__A=None, estimates__idx_components=None)
    np.testing.assert_array_equal(read(tmp_path / "b.h5").values, integers)


def test_traces_stay_in_their_file_and_survive_pickling(tmp_path):
    a_file(tmp_path / "a.h5", estimates__F_dff=None)
    source = open_traces(tmp_path / "a.h5")
    fetch = pickle.loads(pickle.dumps(source.fetch))
    whole = source.load().values
    for rows in ([0], [0, 2], [1, 2], [0, 1, 2], [2, 0], [1, 0, 2]):
        np.testing.assert_array_equal(fetch(np.array(rows)), whole[rows])
    assert source.chunk_rows == 1
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["estimates/C"]
        file.create_dataset("estimates/C", data=C, chunks=(2, 30))
    assert open_traces(tmp_path / "a.h5").chunk_rows == 2
    (tmp_path / "a.h5").write_bytes(b"gone")
    with pytest.raises(RecordingError, match=r"a\.h5: expected CaImAn's estimates"):
        source.load()


def test_only_caimans_files_are_taken_for_some(tmp_path):
    assert caiman.matches(a_file(tmp_path / "a.hdf5"))
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file["dff"] = F_DFF
    (tmp_path / "c.hdf5").write_bytes(b"junk")
    (tmp_path / "d.hdf5").mkdir()
    for name in ("b.hdf5", "c.hdf5", "d.hdf5", "e.hdf5"):
        assert not caiman.matches(tmp_path / name)
    assert read(tmp_path / "b.hdf5", 30.0).n_rois == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"F_dff": None, "C": None}, r"expected estimates/F_dff, or estimates/C and YrA, got \['A', "),
        ({"F_dff": None, "C": "NoneType"}, r"expected estimates/F_dff, or estimates/C and YrA"),
        ({"F_dff": F_DFF[0]}, r"expected F_dff \(component, time\), got shape \(60,\)"),
        ({"F_dff": None, "YrA": YRA[:, 1:]}, r"expected C and YrA of one shape, got \(3, 60\) and \(3, 59\)"),
        ({"A": columns(footprints()[:2])}, r"expected a footprint for each of 3 traces, got 2"),
        ({"idx_components": np.array([0, 3])}, r"expected idx_components from 0 to 2, got 3"),
        ({"F_dff": None, "b": B[1:]}, r"expected CaImAn's estimates, got a file that cannot be read"),
        ({"F_dff": None, "f": F[:1]}, r"expected CaImAn's estimates, got a file that cannot be read"),
        ({"A": {"data": np.ones(3)}}, r"expected CaImAn's estimates, got a file that cannot be read"),
    ],
)
def test_parts_that_contradict_each_other(tmp_path, changes, message):
    group = changes.get("A")
    if isinstance(group, dict):
        changes = {"A": None}
    path = a_file(tmp_path / "a.hdf5", **{f"estimates__{name}": value for name, value in changes.items()})
    if isinstance(group, dict):
        with h5py.File(path, "a") as file:
            file["estimates/A/data"] = group["data"]
    with pytest.raises(RecordingError, match=rf"a\.hdf5: {message}"):
        read(path)


@pytest.mark.parametrize(("part", "values"), [("indices", [99] * 6), ("indptr", [0, 9, 1, 6]), ("shape", [35, 9])])
def test_damaged_footprints(tmp_path, part, values):
    path = a_file(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        del file[f"estimates/A/{part}"]
        file[f"estimates/A/{part}"] = np.array(values)
    with pytest.raises(RecordingError, match=r"a\.hdf5: expected"):
        read(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files(tmp_path, share):
    path = a_file(tmp_path / "a.hdf5")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RecordingError, match=r"a\.hdf5: expected"):
        caiman.open_source(path)
    assert not caiman.matches(path)
