"""Files, movies and ROIs of any kind: what is written comes back, traces are those of a plain loop, input stays."""

from __future__ import annotations

import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
import zarr
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import napari_calvae as calvae
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recognition import FactorizedNetwork
from napari_calvae.vae import SpikeVAE

SETTINGS = settings(
    settings.get_profile("default"),
    deadline=None,
    derandomize=True,
    max_examples=10,
    suppress_health_check=list(HealthCheck),
)

WRITTEN = (".npz", ".h5", ".parquet", ".zarr", ".mat", ".nwb", ".csv")
#: Names of files as people give them.
STEMS = st.sampled_from(["a", "a b", "ü µ 日本", "a.b.c", "a%20b", "[x]*", "-dash", "roi_1", "~"])
IDS = st.integers(-(2**63), 2**63 - 1)
DTYPES = ("?", "i1", "u1", ">i2", "<u2", ">u4", "i8", "u8", "f2", ">f4", "f8")


def refused(function, *arguments, **options) -> str:
    """The sentence in which it is refused."""
    with pytest.raises(calvae.RecordingError, match="expected") as error:
        function(*arguments, **options)
    return str(error.value)


@st.composite
def masks(draw, shape=(6, 5), n_rois=(1, 4)):
    """ROIs that may overlap, lie at the border and have weights, with ids in any order."""
    n = draw(st.integers(*n_rois))
    ids = draw(st.lists(IDS, min_size=n, max_size=n, unique=True))
    flat = st.lists(st.integers(0, shape[0] * shape[1] - 1), min_size=1, max_size=6, unique=True)
    pixels = tuple(np.array(draw(flat)) for _ in range(n))
    weights = tuple(draw(hnp.arrays(np.float32, len(p), elements=st.floats(0.125, 8, width=16))) for p in pixels)
    return calvae.RoiMasks(shape, pixels, tuple(ids), weights, tuple(draw(st.integers(0, 3)) for _ in range(n)))


@st.composite
def recordings(draw):
    """Traces with or without ROIs and judgements, down to a single frame, with gaps, any ids and any time of day."""
    rois = draw(masks())
    shape = (len(rois), draw(st.integers(1, 40)))
    values = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1e9, 1e9, width=32)))
    values[draw(hnp.arrays(bool, shape))] = np.nan
    return calvae.Traces(
        values,
        draw(st.floats(0.1, 1000.0)),
        draw(st.sampled_from(["raw", "dff"])),
        rois.ids,
        draw(st.sampled_from([0.0, -3.25, 1e5])),
        provenance={"note": np.float32(1), "names": ("ü", 1)},
        rois=rois if draw(st.booleans()) else None,
        accepted=draw(st.one_of(st.none(), hnp.arrays(bool, len(rois)))),
    )


def weighted(rois: calvae.RoiMasks) -> list[dict[int, float]]:
    return [dict(zip(p.tolist(), w.tolist(), strict=True)) for p, w in zip(rois.pixels, rois.weights, strict=True)]


@pytest.mark.parametrize("suffix", WRITTEN)
@settings(SETTINGS, max_examples=6)
@given(traces=recordings(), stem=STEMS, upper=st.booleans())
@example(traces=calvae.Traces([[1.0], [np.nan]], 2.5, "raw", (9, 2), 3.0), stem="a", upper=False)
def test_traces_come_back_from_every_format(suffix, traces, stem, upper):
    pytest.importorskip("pynwb")
    before = traces.values.copy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (stem + (suffix.upper() if upper else suffix))
        calvae.write(traces, path)
        again = calvae.read(path)
        lazy = calvae.open_traces(path)
        assert calvae.is_traces(path)
        with pytest.raises(FileExistsError, match="exists already"):
            calvae.write(traces, path)
        assert not [file.name for file in Path(folder).iterdir() if file.name.endswith((".part", ".old"))]
        some = lazy.select([0])
    np.testing.assert_array_equal(traces.values, before)
    exact = {"rtol": 0} if suffix != ".csv" else {"rtol": 5.1e-6}  # text has six digits
    np.testing.assert_allclose(again.values, traces.values, **exact)
    np.testing.assert_array_equal(some.values[0], again.values[0])
    assert (again.roi_ids, again.unit) == (traces.roi_ids, traces.unit) == (lazy.roi_ids, lazy.unit)
    assert again.frame_rate == pytest.approx(traces.frame_rate, rel=1e-9 if suffix != ".csv" else 1e-4)
    assert again.t0 == pytest.approx(traces.t0, abs=1e-9)
    if traces.accepted is not None:
        np.testing.assert_array_equal(again.accepted, traces.accepted)
    if traces.rois is not None and suffix not in (".csv", ".parquet"):  # tables say nothing of pixels
        assert (again.rois.ids, again.rois.planes) == (traces.rois.ids, traces.rois.planes)
        assert weighted(again.rois) == weighted(traces.rois)


@pytest.fixture(scope="module")
def model() -> SpikeVAE:
    torch.manual_seed(0)
    network = FactorizedNetwork(widths=(4, 6), max_count=4)
    return SpikeVAE(network.eval(), MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=4))


@pytest.mark.parametrize("suffix", [*WRITTEN, "spks.npy"])
@settings(SETTINGS, max_examples=3)
@given(rois=masks(), n_samples=st.integers(0, 3), t0=st.sampled_from([0.0, -7.5]))
def test_results_are_written_to_every_format(model, suffix, rois, n_samples, t0):
    pytest.importorskip("pynwb")
    values = np.random.default_rng(0).normal(size=(len(rois), 130))
    traces = calvae.Traces(values, 30.0, "dff", rois.ids, t0, rois=rois)
    result = calvae.infer(traces, model, n_samples=n_samples, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (suffix if suffix == "spks.npy" else f"a b{suffix}")
        calvae.write(result, path)
        if suffix == ".zarr":
            stored = calvae.open_result(path)
            np.testing.assert_array_equal(stored.load().rate, result.rate)
            one = stored.select([-1])
            np.testing.assert_array_equal(one.events_of(0)["count"], result.events_of(-1)["count"])
        elif suffix == "spks.npy":
            np.testing.assert_allclose(np.load(path), result.rate / 30.0, rtol=1e-6)
        elif suffix not in (".csv", ".parquet"):  # whose tables of results are no traces
            again = calvae.read(path)
            np.testing.assert_array_equal(again.values, result.traces.values)
            assert (again.roi_ids, again.t0) == (rois.ids, t0)
        if suffix != ".zarr":
            refused(calvae.open_result, path)
        assert not [file.name for file in Path(folder).iterdir() if file.name.endswith((".part", ".old"))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: calvae.Traces([[1.0, 2.0]], 5.0, roi_ids=(2**63,)),
        lambda: calvae.Traces([[1.0, 2.0]], 5.0, roi_ids=(1.5,)),
        lambda: calvae.Traces([[1.0, 2.0]], 5.0, t0=np.nan),
        lambda: calvae.TraceSource(np.ones, 1, 2, 5.0, t0=np.inf),
        lambda: calvae.TraceSource(np.ones, 1, 2, 5.0, roi_ids=(-(2**63) - 1,)),
        lambda: calvae.RoiMasks((2, 2), ([0],), ids=("a",)),
        lambda: calvae.RoiMasks((2, 2), ([0],), ids=(2**64,)),
        lambda: calvae.RoiMasks((2, 2), ([0, 1],), weights=([1.0, np.inf],)),
        lambda: calvae.RoiMasks((2, 2), ([0, 1],), weights=([3e38, 3e38],)),
        lambda: calvae.RoiMasks((2, 2), ([0, 1],), weights=([1.0, np.nan],)),
    ],
)
def test_what_no_file_could_hold_is_refused_where_it_is_made(make):
    refused(make)


@st.composite
def movies(draw):
    """A movie of any dtype and layout with ROIs in it, few or many, overlapping, named pixels twice perhaps."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    movie = (rng.random(shape) * 100).astype(dtype)
    if dtype.kind == "f" and draw(st.booleans()):
        movie[rng.random(shape) < 0.1] = np.nan
    n = draw(st.sampled_from([1, 2, 9, 12]))
    pixels = tuple(rng.integers(0, shape[1] * shape[2], rng.integers(1, 5)) for _ in range(n))
    weights = tuple(np.r_[1, rng.integers(0, 4, len(p) - 1)] for p in pixels)
    ids = tuple((rng.permutation(n) + 2**40).tolist())
    return movie, calvae.RoiMasks(shape[1:], pixels, ids, weights)


def plain(movie: np.ndarray, rois: calvae.RoiMasks) -> np.ndarray:
    """(roi, time) weighted means of pixels, one ROI after the other."""
    flat = np.asarray(movie, float).reshape(len(movie), -1)
    rows = []
    for pixels, weights in zip(rois.pixels, rois.weights, strict=True):
        used = weights > 0
        rows.append((flat[:, pixels[used]] * weights[used]).sum(1) / weights.sum())
    return np.array(rows)


LAYOUTS = {
    "as it is": lambda a: a,
    "by columns": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
    "backwards": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "masked": lambda a: np.ma.masked_invalid(a) if a.dtype.kind == "f" else np.ma.array(a, mask=False),
}
TWICE = calvae.RoiMasks((2, 3), ([4, 4, 1],), (7,))


@settings(SETTINGS, max_examples=60)
@given(movies(), st.sampled_from(list(LAYOUTS)))
@example((np.arange(12.0).reshape(2, 2, 3), TWICE), "as it is")
def test_traces_are_those_of_a_plain_loop(drawn, layout):
    movie, rois = drawn
    before, dressed = movie.copy(), LAYOUTS[layout](movie)
    rate = float(len(movie))
    found = calvae.extract(dressed, rois, rate, neuropil_coefficient=0, t0=-2.5)
    np.testing.assert_array_equal(movie, before)
    assert (found.roi_ids, found.unit, found.t0) == (rois.ids, "raw", -2.5)
    np.testing.assert_allclose(found.values, plain(movie, rois), rtol=1e-5, atol=1e-5)
    *fractions, last = calvae.iter_extract(dressed, rois, rate, neuropil_coefficient=0)
    assert last == 1
    assert fractions == sorted(fractions)
    wanted = rois.ids[::-2]
    chosen = calvae.extract(dressed, rois, rate, wanted=wanted)
    whole = calvae.extract(dressed, rois, rate)
    np.testing.assert_allclose(chosen.values, whole.values[::-2], rtol=1e-5, atol=1e-5)
    live = calvae.FrameReader(rois, 0.0).read(dressed)
    np.testing.assert_allclose(live, found.values, rtol=1e-5, atol=1e-5)


@settings(SETTINGS, max_examples=40)
@given(movies(), st.sampled_from([(0, 0), (-5, 100), (3, 2), (1e300, 0), (9, 1, 2), (3,), (np.nan, 1), (0, np.inf)]))
@example((np.ones((3, 4, 4)), TWICE), (1, 1))
def test_the_cell_next_to_a_click_is_no_further_than_it_may_be(drawn, position):
    movie, _ = drawn
    for diameter in (0.01, 3.0, 1e9, np.inf):
        if len(position) < 2 or not np.isfinite(position).all():
            assert "positions: " in refused(calvae.correlation_peak, movie, position, diameter)
            continue
        y, x = calvae.correlation_peak(movie, position, diameter)
        assert (y, x) == position[-2:] or np.hypot(y - position[-2], x - position[-1]) <= diameter
    for wrong in (movie[0], movie[:, None], movie[:0], movie.tolist()):
        assert "movie: " in refused(calvae.correlation_peak, wrong, (0, 0), 3.0)


@given(masks())
@settings(SETTINGS, max_examples=30)
def test_the_mark_of_a_roi_is_that_of_its_own_trace(rois):
    marks = calvae.roi_marks(rois, neuropil=False)
    assert list(marks) == list(rois.ids)
    alone = calvae.roi_marks(rois.select([-1]), neuropil=False)
    assert alone[rois.ids[-1]] == marks[rois.ids[-1]]
    image = rois.to_labels()
    assert set(np.unique(image)) <= {0, *rois.ids}


@settings(SETTINGS, max_examples=20)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 3, 2), (4, 3, 2), (4, 1, 1), (4, 2, 3, 5)]),
    st.sampled_from([".npy", ".h5", ".zarr", ".tif", ".NPY", ".HDF5", ".TIFF"]),
    STEMS,
)
def test_movies_come_back(dtype, shape, suffix, stem):
    movie = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    assume(suffix.lower() in (".npy", ".h5", ".hdf5") or np.dtype(dtype).isnative)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{stem}{suffix}"
        if suffix.lower() == ".npy":
            with open(path, "wb") as file:
                np.save(file, movie)
        elif suffix in (".h5", ".HDF5"):
            with h5py.File(path, "w") as file:
                file["mov"] = movie
        elif suffix == ".zarr":
            zarr.open_array(str(path), mode="w", shape=shape, chunks=(2, *shape[1:]), dtype=dtype)[:] = movie
        else:
            tifffile.imwrite(path, movie, photometric="minisblack")
        assert calvae.is_movie(path)
        assert not calvae.is_traces(path) or suffix.lower() == ".npy"  # which by its name may be either
        found, rate = calvae.read_movie(path)
        assert rate is None
        np.testing.assert_array_equal(np.asarray(found), movie.reshape(found.shape))
        if shape == (4, 3, 2) and suffix in (".zarr", ".tif"):
            growing = calvae.open_growing(path)
            assert growing.poll() >= len(movie) - 2
            growing.poll()
            np.testing.assert_array_equal(growing.so_far(2)[1], movie[1])


KEYS = (0, -1, slice(None), slice(None, None, -1), slice(5, 2), [0, 2], (slice(1, 3), 0), (..., 0), (0, 0, 0), 99)


@settings(SETTINGS, max_examples=20)
@given(hnp.arrays(np.int16, (4, 3, 2)), st.sampled_from(KEYS))
def test_frames_so_far_are_indexed_as_an_array_is(movie, key):
    growing = calvae.open_growing(movie)
    frames = growing.so_far(growing.poll())
    assert (frames.shape, frames.dtype, len(frames)) == (movie.shape, movie.dtype, 4)
    if key == 99:
        with pytest.raises(IndexError):
            frames[key]
        return
    np.testing.assert_array_equal(frames[key], movie[key])


@settings(SETTINGS, max_examples=20)
@given(hnp.arrays(st.sampled_from(["u1", ">u2", "i4", "i8", "f4", "f8", "?"]), (3, 4), elements={"min_value": 0}))
@example(np.array([[1.0, 1e300, 0.0]]))
@example(np.array([[1.0, np.inf, 0.0]]))
@example(np.arange(3))
@example(np.float64(3))
def test_label_images_come_back_or_are_refused(image):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ü rois.npy"
        np.save(path, image)
        if image.ndim < 2:
            assert "label image (y, x)" in refused(calvae.read_labels, path)
            return
        found = calvae.read_labels(path)
        np.testing.assert_array_equal(found, image)
        if image.dtype.kind == "f" and np.array_equal(image, np.round(np.clip(image, 0, 2**53))):
            assert found.dtype.kind == "i"
        if found.dtype.kind == "f":
            assert "integers" in refused(calvae.RoiMasks.from_labels, found)


@settings(SETTINGS, max_examples=20)
@given(st.lists(st.floats(), max_size=5), st.sampled_from([".npz", ".csv"]), st.integers(1, 2**31))
@example([np.nan], ".npz", 1)
def test_spike_times_come_back_or_are_refused(times, suffix, roi):
    assume(times or suffix == ".npz")  # a table without rows has no ROIs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"spikes{suffix}"
        if suffix == ".npz":
            np.savez(path, **{f"spike_times_{roi}": times})
        else:
            path.write_text("\n".join(["roi,time_s", *(f"{roi},{t!r}" for t in times)]))
        if not np.isfinite(times).all():
            refused(calvae.read_spikes, path)
            return
        np.testing.assert_array_equal(np.sort(calvae.read_spikes(path)[roi]), np.sort(times))


@settings(SETTINGS, max_examples=30)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4, unique=True),
    st.sampled_from([0.05, 1.0, 1e9, 1e300]),
    st.booleans(),
)
@example([1.0, 2.0], 1e9, True)
def test_pulses_come_back_and_light_fits_the_recording(onsets, duration, as_file):
    arrays = {"onset": np.array(onsets), "duration": np.array(duration), "targets": np.ones((len(onsets), 2))}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "p.npz", **arrays)
        found = calvae.read_stimulation(Path(folder) / "p.npz" if as_file else arrays)
    np.testing.assert_array_equal(found.onset, onsets)
    light = found.light(20, 10.0)
    begin = np.arange(20) / 10.0 - 0.05
    shares = [(np.minimum(t + duration, begin + 0.1) - np.maximum(t, begin)).clip(0) / 0.1 for t in onsets]
    np.testing.assert_allclose(light[0], np.sum(shares, axis=0), atol=1e-6)
