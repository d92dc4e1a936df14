"""Preprocessing against plain loops and closed forms."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from scipy import ndimage

from napari_calvae import _extraction
from napari_calvae.preprocess import (
    bin_spikes,
    check_traces,
    delta_f_over_f,
    extract,
    iter_extract,
    noise_level,
    resample,
)
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.roi_masks import RoiMasks


def a_movie(n_frames=120, size=40, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(100, 4000, (n_frames, size, size)).astype(dtype)


def some_rois(size=40, n=3):
    return RoiMasks.from_discs([(8 + 12 * (i // 3), 8 + 12 * (i % 3)) for i in range(n)], 7, (size, size))


def plain_extract(movie, rois, r):
    """What `extract` must do, frame by frame and ROI by ROI."""
    movie = np.asarray(movie, float)
    taken = rois.to_labels() > 0
    out = []
    for roi in rois.ids:
        inside = rois.to_labels() == roi
        distance = ndimage.distance_transform_edt(~inside)
        free = (distance > 2) & ~taken & (distance <= max(4 * np.sqrt(4 / np.pi * inside.sum()), 20))
        limit = np.sort(distance[free])[max(350, 3 * inside.sum()) - 1] if free.sum() > 350 else np.inf
        ring = free & (distance <= limit)
        f, neuropil = movie[:, inside].mean(1), movie[:, ring].mean(1)
        out.append(f - r * (neuropil - np.median(neuropil)))
    return np.array(out)


@pytest.mark.parametrize("n_rois", [1, 3, 9])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64, ">u2"])
def test_extraction_equals_the_plain_loop(n_rois, dtype):
    movie, rois = a_movie(dtype=dtype), some_rois(n=n_rois)
    for r in (0.0, 0.7):
        traces = extract(movie, rois, 30.0, neuropil_coefficient=r, t0=1.5)
        np.testing.assert_allclose(traces.values, plain_extract(movie, rois, r), rtol=2e-6)
        assert traces.unit == "raw"
        assert traces.roi_ids == rois.ids
        assert traces.t0 == 1.5


@pytest.mark.parametrize("few", [0, 99])
def test_single_boxes_and_the_sparse_product_agree(few, monkeypatch):
    monkeypatch.setattr(_extraction, "FEW_ROIS", few)
    movie, rois = a_movie(), some_rois(n=5)
    np.testing.assert_allclose(extract(movie, rois, 30.0).values, plain_extract(movie, rois, 0.7), rtol=2e-6)


def test_label_images_weights_and_lazy_arrays(tmp_path):
    zarr = pytest.importorskip("zarr")
    import h5py

    movie, rois = a_movie(), some_rois()
    expected = extract(movie, rois, 30.0).values
    np.save(tmp_path / "movie.npy", movie)
    with h5py.File(tmp_path / "movie.h5", "w") as file:
        lazy = {
            "memmap": np.load(tmp_path / "movie.npy", mmap_mode="r"),
            "dask": da.from_array(movie, chunks=(50, 20, 20)),
            "zarr": zarr.create_array(str(tmp_path / "movie.zarr"), data=movie, chunks=(33, 40, 40)),
            "h5py": file.create_dataset("movie", data=movie, chunks=(7, 40, 40)),
        }
        for name, array in lazy.items():
            np.testing.assert_array_equal(extract(array, rois.to_labels(), 30.0).values, expected, err_msg=name)
    weighted = RoiMasks((40, 40), ([0, 1],), weights=([3, 1],))
    values = extract(movie, weighted, 30.0, neuropil_coefficient=0).values
    np.testing.assert_allclose(values[0], 0.75 * movie[:, 0, 0] + 0.25 * movie[:, 0, 1], rtol=1e-6)


def test_movies_are_read_in_whole_chunks_and_never_at_once(monkeypatch):
    monkeypatch.setattr(_extraction, "READ_BYTES", 20 * 40 * 40 * 2)
    read = []

    class Spy:
        shape, dtype, ndim, chunks = (120, 40, 40), np.dtype(np.uint16), 3, (8, 40, 40)

        def __getitem__(self, key):
            read.append(key[0])
            return a_movie()[key]

    progress = list(iter_extract(Spy(), some_rois(), 30.0))
    assert progress[-1] == 1
    assert len(read) == len(progress) == 3
    assert all(part.start % 8 == 0 and part.stop - part.start < 60 for part in read)


@pytest.mark.parametrize("n_rois", [2, 9])
def test_frames_with_nan_are_missing_where_they_touch_a_roi(n_rois):
    movie, rois = a_movie(dtype=np.float32), some_rois(n=n_rois)
    movie[10, 8, 8] = np.nan  # in ROI 1 only
    movie[20] = np.nan
    movie[:, 39, 39] = np.nan  # outside: only rings that reach it lose one pixel
    traces = extract(movie, rois, 30.0)
    expected = np.ones((n_rois, 120), bool)
    expected[0, 10] = expected[:, 20] = False
    np.testing.assert_array_equal(traces.valid, expected)
    whole = plain_extract(a_movie(), rois, 0.7)
    np.testing.assert_allclose(traces.values[expected], whole[expected], rtol=0.02)


def test_neuropil_is_subtracted_and_the_baseline_kept():
    rois = some_rois(n=1)
    wave = 50 * np.sin(np.arange(600) / 20)
    movie = np.full((600, 40, 40), 500.0) + wave[:, None, None]
    traces = extract(movie, rois, 30.0, neuropil_coefficient=1.0)
    np.testing.assert_allclose(traces.values, 500 + np.median(wave), atol=0.01)


def test_a_roi_that_fills_the_image_goes_without_a_ring():
    rois = RoiMasks((8, 8), (np.arange(64),))
    movie = a_movie(size=8)
    traces = extract(movie, rois, 30.0)
    np.testing.assert_allclose(traces.values[0], movie.mean((1, 2)), rtol=1e-6)
    assert traces.provenance["extraction"]["rois_without_ring"] == [1]


@pytest.mark.parametrize(
    ("movie", "rois", "message"),
    [
        (np.zeros((40, 40)), None, r"three dimensions \(time, y, x\), got shape \(40, 40\)"),
        (np.zeros((90, 2, 40, 40)), None, r"three dimensions.*got shape \(90, 2, 40, 40\).*movie\[:, 0\]"),
        (np.zeros((90, 40, 40), complex), None, "real numbers, got dtype complex128"),
        (np.zeros((20, 40, 40)), None, "at least one second, got 20 frames at 30 Hz"),
        (np.zeros((90, 64, 64)), None, "expected ROIs of 64 × 64 pixels like the movie, got 40 × 40"),
        (np.zeros((90, 40, 40)), np.zeros((40, 40), int), "at least one label above 0"),
    ],
)
def test_bad_movies_and_rois(movie, rois, message):
    with pytest.raises(RecordingError, match=message):
        extract(movie, some_rois() if rois is None else rois, 30.0)


def test_extraction_needs_a_frame_rate_and_a_sane_coefficient():
    with pytest.raises(RecordingError, match=r"frame_rate: expected.*got none"):
        extract(a_movie(), some_rois(), None)
    with pytest.raises(RecordingError, match=r"neuropil_coefficient: expected.*got -1"):
        extract(a_movie(), some_rois(), 30.0, neuropil_coefficient=-1)


def test_noise_level_of_white_noise():
    sigma, rate, n = 0.05, 30.0, 200_000
    values = sigma * np.random.default_rng(0).standard_normal((2, n))
    # Differences have standard deviation σ√2; the median of |normal| is 0.6745 σ.
    expected = 100 * 0.674490 * np.sqrt(2) * sigma / np.sqrt(rate)
    np.testing.assert_allclose(noise_level(values, rate), expected, rtol=0.01)
    values[0, ::7] = np.nan
    values[1] = np.nan
    level = noise_level(values, rate)
    assert level[0] == pytest.approx(expected, rel=0.01)
    assert np.isnan(level[1])
    assert noise_level(values[0], rate).shape == ()
    assert noise_level([0, 1, 0, 1], 4.0) == 50
    assert np.isnan(noise_level(np.ones((2, 1)), 4.0)).all()


def test_delta_f_over_f_undoes_a_slow_baseline():
    rng = np.random.default_rng(0)
    t = np.arange(9000) / 30
    f0 = 400 + 100 * t / t[-1]
    signal = np.convolve(rng.random(9000) < 0.005, np.exp(-np.arange(60) / 15))[:9000]
    raw = Traces((f0 * (1 + signal))[None], 30.0, "raw", valid=(np.arange(9000) % 100 != 7)[None])
    dff = delta_f_over_f(raw)
    assert dff.unit == "dff"
    np.testing.assert_array_equal(dff.valid, raw.valid)
    inner = slice(1000, 8000)
    assert np.nanmax(np.abs(dff.values[0, inner] - signal[inner])) < 0.12
    assert np.nanmedian(np.abs(dff.values[0] - signal)) < 0.02
    assert dff.provenance["preprocessing"]["baseline"] == {"window_s": 60.0, "percentile": 10.0}
    assert delta_f_over_f(dff) is dff


@pytest.mark.parametrize("n", [61, 300])
def test_short_recordings_have_one_baseline(n):
    values = np.random.default_rng(0).uniform(90, 110, (2, n)).astype(np.float32)
    dff = delta_f_over_f(Traces(values, 30.0, "raw"), window=60.0)
    f0 = np.percentile(values, 10, axis=1, keepdims=True)
    np.testing.assert_allclose(dff.values, values / f0 - 1, atol=1e-5)


@pytest.mark.parametrize("percentile", [0, 0.5, 10, 99.5, 100])
@pytest.mark.parametrize(("n", "window"), [(40, 3), (100, 20), (103, 21), (103, 22), (50, 1)])
@pytest.mark.parametrize("missing", [False, True])
def test_the_baseline_equals_the_plain_loop(n, window, percentile, missing):
    values = np.random.default_rng(0).uniform(0.5, 1.5, (2, n))
    if missing:
        values[0, 30:37] = np.nan
    dff = delta_f_over_f(Traces(values, 10.0, "raw"), window / 10, percentile)
    # Evenly from the first window to the last, a quarter of a window apart at most, on whole frames.
    n_steps = -(-(n - window) // max(window // 4, 1))
    starts = np.array([round(k * (n - window) / n_steps) for k in range(n_steps + 1)])
    for row, found in zip(values, dff.values, strict=True):
        windows = [row[s : s + window][np.isfinite(row[s : s + window])] for s in starts]
        known = [
            (s + (window - 1) / 2, np.percentile(w, percentile)) for s, w in zip(starts, windows, strict=True) if len(w)
        ]
        baseline = np.interp(np.arange(n), *np.transpose(known))
        np.testing.assert_allclose(found, row / baseline - 1, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "percentile"), [(0, 10), (-1, 10), (np.nan, 10), (60, -0.5), (60, 100.5), (60, np.nan)]
)
def test_baselines_of_no_length_or_beyond_all_ranks_are_refused(window, percentile):
    traces = Traces(np.random.default_rng(0).uniform(90, 110, (2, 90)), 30.0, "raw")
    with pytest.raises(RecordingError, match="baseline: expected a window of more than 0 s and a percentile between"):
        delta_f_over_f(traces, window, percentile)


def test_a_window_is_a_frame_at_least():
    traces = Traces(np.random.default_rng(0).uniform(90, 110, (2, 90)), 30.0, "raw")
    np.testing.assert_allclose(delta_f_over_f(traces, 0.001).values, 0, atol=1e-6)


def test_a_baseline_that_falls_to_zero_is_refused_and_its_roi_named():
    values = np.random.default_rng(0).uniform(9, 11, (4, 900))
    values[1, 600:] -= 13
    values[3, 600:] -= 33
    with pytest.raises(RecordingError, match=r"ROIs 2, 4: expected raw fluorescence .* got -3\.99\."):
        delta_f_over_f(Traces(values, 30.0, "raw"), 2.0, 0)


def test_percentiles_with_and_without_missing_frames_agree():
    values = np.random.default_rng(0).uniform(90, 110, (1, 4000)).astype(np.float32)
    whole = delta_f_over_f(Traces(values, 10.0, "raw"))
    one_missing = delta_f_over_f(Traces(values, 10.0, "raw", valid=np.arange(4000) != 2000))
    np.testing.assert_allclose(one_missing.values[:, :1000], whole.values[:, :1000], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 90), 7.0), "ROIs 1, 2: expected fluorescence that changes over time, got the constant 7"),
        (np.full((1, 90), np.nan), "ROI 1: expected fluorescence, got only missing values"),
        (np.sin(np.arange(90.0))[None], "ROI 1: expected raw fluorescence with a baseline above 0.*ΔF/F already"),
        (np.arange(20.0)[None], r"at least one second, got 20 frames at 30 Hz \(0.667 s\)"),
    ],
)
def test_delta_f_over_f_refuses(values, message):
    with pytest.raises(RecordingError, match=message):
        delta_f_over_f(Traces(values, 30.0, "raw"))


def test_check_traces_names_the_roi():
    values = np.random.default_rng(0).random((9, 90))
    check_traces(Traces(values, 30.0))
    values[3] = 1
    with pytest.raises(RecordingError, match="ROI 13:"):
        check_traces(Traces(values, 30.0, roi_ids=tuple(range(10, 19))))
    values[3] = np.nan
    with pytest.raises(RecordingError, match="ROI 4: expected fluorescence, got only missing"):
        check_traces(Traces(values, 30.0))


def test_a_second_is_long_enough():
    values = np.random.default_rng(0).random((1, 45))
    check_traces(Traces(values, 30.0))
    check_traces(Traces(values, 45.0))


@pytest.mark.parametrize(
    ("n", "names"), [(4, "ROIs 1, 2, 3, 4"), (5, "ROIs 1, 2, 3, 4, 5"), (6, "ROIs 1, 2, 3, 4, 5 and 1 more")]
)
def test_the_first_few_rois_are_named_and_the_first_value(n, names):
    constant = np.arange(7.0, 7 + n)[:, None] + np.zeros(90)
    with pytest.raises(RecordingError, match=f"^{names}: .* got the constant 7"):
        check_traces(Traces(constant, 30.0))


@pytest.mark.parametrize("new", [7.5, 11.3, 29.0])
def test_fewer_frames_keep_the_integral(new):
    rng = np.random.default_rng(0)
    n = 3000
    values = rng.standard_normal((2, 3, n))
    out, shift = resample(values, 30.0, new)
    assert out.shape == (2, 3, round(n * new / 30))
    # What the new frames cover, exactly: whole old frames and a part of the last one.
    end = min(out.shape[-1] / new * 30, n)
    whole = int(end)
    total = values[..., :whole].sum(-1) + (end - whole) * values[..., min(whole, n - 1)]
    widths = np.diff(np.minimum(np.arange(out.shape[-1] + 1) * 30 / new, n))
    np.testing.assert_allclose((out * widths).sum(-1), total, atol=1e-8)
    assert shift == pytest.approx(0.5 / new - 0.5 / 30.0)


@pytest.mark.parametrize("new", [10.0, 17.0, 30.0, 47.0, 120.0])
def test_resampling_moves_nothing_in_time(new):
    rate, t0, n = 30.0, 0.3, 2000
    slope = 2.0 * (t0 + np.arange(n) / rate) + 1
    out, shift = resample(slope, rate, new)
    times = t0 + shift + np.arange(len(out)) / new
    inner = slice(2, -8)
    error = out[inner] - 2 * times[inner] - 1
    # A frame that is cut in the ratio f : 1 − f moves the mean by f (1 − f) / 2 of its length, to either side alike.
    bound = 2 * new / rate**2 / 8 if rate % new and new < rate else 0
    assert np.abs(error).max() <= bound + 1e-9
    assert abs(error.mean()) <= 1e-3 * bound + 1e-9


def test_resampling_keeps_spikes_and_frames_aligned():
    spikes = np.sort(np.random.default_rng(0).uniform(0, 300, 500))
    fine = bin_spikes(spikes, 0.0, 300.0, 90_000).astype(float)
    out, shift = resample(fine, 300.0, 30.0)
    np.testing.assert_allclose(out * 10, bin_spikes(spikes, shift, 30.0, len(out)), atol=1e-9)


def test_missing_frames_when_resampling():
    values = np.arange(12.0)
    values[[0, 1, 2, 5, 8, 9]] = np.nan
    out, _ = resample(values, 40.0, 10.0)
    np.testing.assert_allclose(out, [np.nan, (4 + 6 + 7) / 3, 10.5])  # one, three, two of four measured
    up, _ = resample(np.array([0.0, np.nan, 2.0, 3.0]), 10.0, 30.0)
    np.testing.assert_array_equal(np.isnan(up), [*[False] * 3, *[True] * 3, *[False] * 6])
    assert np.isnan(resample(np.full(10, np.nan), 10.0, 20.0)[0]).all()
    values = np.full(90, 4.0)
    values[[7, 20, 21, 22, 50, 65]] = np.nan
    out, _ = resample(values, 30.0, 29.0)  # some new frames are measured in part, others not at all
    assert np.isnan(out).any()
    np.testing.assert_allclose(out[np.isfinite(out)], 4)


def test_more_frames_are_interpolated_to_the_ends_and_one_too_few_is_missing():
    np.testing.assert_allclose(resample(np.arange(4.0), 10.0, 20.0)[0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    assert resample(np.array([5.0]), 10.0, 20.0)[0].tolist() == [5, 5]
    np.testing.assert_array_equal(resample(np.array([1.0, 2.0]), 30.0, 1.0)[0], [np.nan])


def test_a_last_frame_counts_if_half_of_it_was_recorded():
    assert resample(np.arange(14.0), 40.0, 10.0)[0].tolist() == [1.5, 5.5, 9.5, 12.5]
    assert len(resample(np.arange(13.0), 40.0, 10.0)[0]) == 3


def test_resampling_keeps_float32_and_refuses_nonsense():
    assert resample(np.zeros(10, np.float32), 10.0, 5.0)[0].dtype == np.float32
    assert resample(np.zeros(10, np.uint8), 10.0, 20.0)[0].dtype == np.float32
    with pytest.raises(RecordingError, match="frame_rate: expected a positive number"):
        resample(np.zeros(10), 10.0, -1)


def test_spikes_fall_into_the_frame_around_them():
    rate, t0 = 4.0, 1.0  # frames centred on 1, 1.25, 1.5: edges at 0.875, 1.125, 1.375, 1.625, exact in binary
    times = [0.874, 0.875, 1.0, 1.124, 1.125, 1.374, 1.6249, 1.625, 9.0, np.nan]
    np.testing.assert_array_equal(bin_spikes(times, t0, rate, 3), [3, 2, 1])
    assert bin_spikes([], t0, rate, 3).tolist() == [0, 0, 0]


def test_the_hybrid_movie_gives_the_traces_that_were_put_into_it(shared):
    from napari_calvae.formats import read_labels, read_movie

    folder = shared / "movies"
    movie, rate = read_movie(folder / "hybrid_gcamp6f.tif")
    traces = delta_f_over_f(extract(movie, read_labels(folder / "hybrid_gcamp6f_rois.tif"), rate))
    truth = np.load(folder / "hybrid_gcamp6f_spikes.npz")["dff"]
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(traces.values, truth, strict=True)]
    assert np.median(correlation) > 0.97
    assert min(correlation) > 0.8
