"""Whatever comes: right, or refused in one sentence. Examples are drawn by hypothesis, the same ones every time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import napari_calvae as calvae
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.preprocess import noise_level, resample
from napari_calvae.recognition import FactorizedNetwork
from napari_calvae.vae import SpikeVAE

settings.register_profile(
    "calvae", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("calvae")

RATES = st.floats(3.0, 120.0)
FINITE = st.floats(-1e9, 1e9, width=32)


def taken(function, *arguments, **options):
    """What it returns, or None where it is refused in a sentence that says what was expected."""
    try:
        return function(*arguments, **options)
    except calvae.RecordingError as error:
        if "expected" not in str(error):
            raise
        return None


def matrices(elements=FINITE, rows=(1, 4), frames=(1, 60)):
    shape = st.tuples(st.integers(*rows), st.integers(*frames))
    return hnp.arrays(np.float32, shape, elements=elements)


@st.composite
def recordings(draw, frames=(1, 60)):
    """Traces of any numbers with any frames missing, at any rate, with any ids."""
    values = draw(matrices(frames=frames))
    values[draw(hnp.arrays(bool, values.shape))] = np.nan
    ids = draw(st.lists(st.integers(1, 2**31 - 1), min_size=len(values), max_size=len(values), unique=True))
    unit, t0 = draw(st.sampled_from(["raw", "dff"])), draw(st.floats(-1e5, 1e5))
    return calvae.Traces(values, draw(RATES), unit, tuple(ids), t0)


@pytest.fixture(scope="module")
def model() -> SpikeVAE:
    torch.manual_seed(0)
    network = FactorizedNetwork(widths=(4, 6), max_count=4, local_gain=True)
    return SpikeVAE(network.eval(), MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=4))


@given(
    hnp.arrays(
        st.one_of(hnp.integer_dtypes(), hnp.floating_dtypes(), hnp.complex_number_dtypes(), hnp.boolean_dtypes()),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    st.one_of(st.floats(), st.none()),
)
def test_any_array_is_taken_or_refused(values, rate):
    traces = taken(calvae.Traces, values, rate)
    if traces is None:
        return
    assert traces.values.dtype == np.float32
    assert (np.isfinite(traces.values) == traces.valid).all()
    assert np.isfinite(traces.frame_rate)
    assert traces.frame_rate > 0


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".parquet", ".zarr", ".mat"])
@settings(max_examples=8)
@given(traces=recordings())
def test_traces_come_back_from_files(suffix, traces):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        calvae.write(traces, path)
        again = calvae.read(path)
    np.testing.assert_array_equal(again.values, traces.values)
    assert (again.roi_ids, again.unit) == (traces.roi_ids, traces.unit)
    assert again.frame_rate == pytest.approx(traces.frame_rate, rel=1e-12)
    assert again.t0 == pytest.approx(traces.t0, rel=1e-9, abs=1e-9)


@given(recordings())
def test_doubts_are_sentences_whatever_the_traces(traces):
    for doubt in calvae.check(traces):
        assert set(doubt.roi_ids) <= set(traces.roi_ids)
        assert "expected" in doubt.found
        assert str(doubt).startswith(doubt.code)


@given(recordings(), st.floats(0.1, 100.0), st.floats(0, 100))
def test_a_baseline_is_divided_by_or_refused(traces, window, percentile):
    found = taken(calvae.delta_f_over_f, traces, window, percentile)
    if found is None:
        return
    assert found.unit == "dff"
    np.testing.assert_array_equal(found.valid, traces.valid)


@given(st.lists(st.floats(-1, 12), max_size=50), st.floats(-0.5, 0.5), RATES, st.integers(1, 300))
def test_every_spike_within_the_recording_is_in_one_frame(times, t0, rate, n_frames):
    counts = calvae.bin_spikes(times, t0, rate, n_frames)
    assert counts.shape == (n_frames,)
    inside = (np.asarray(times) >= t0 - 0.5 / rate) & (np.asarray(times) < t0 + (n_frames - 0.5) / rate)
    assert abs(int(counts.sum()) - int(inside.sum())) <= np.sum(np.isclose((np.asarray(times) - t0) * rate % 1, 0.5))


@given(matrices(frames=(2, 200)), RATES, RATES)
def test_another_frame_rate_keeps_the_mean_and_the_time(values, old, new):
    found, shift = resample(values, old, new)
    assert abs(shift - (0.5 / new - 0.5 / old)) < 1e-9 or old == new
    assert found.shape[1] == 1 or abs(found.shape[1] / new - values.shape[1] / old) <= 0.5 / new + 1e-9
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    slack = 1e-5 * np.abs(values).max() + 1e-12
    assert ((found >= low - slack) & (found <= high + slack) | np.isnan(found)).all()


@given(matrices(st.floats(-1e6, 1e6, width=32), frames=(3, 80)), RATES, st.floats(1e-3, 1e3))
def test_noise_goes_with_the_scale(values, rate, factor):
    one, other = noise_level(values, rate), noise_level(values.astype(float) * factor, rate)
    np.testing.assert_allclose(other, one * factor, rtol=1e-6)


@st.composite
def changing(draw):
    """Traces long enough to be inferred, of any scale and offset, with gaps, steps and repeated values."""
    n_rois, n_frames = draw(st.integers(1, 3)), draw(st.integers(120, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.normal(size=(n_rois, n_frames)) * 10.0 ** draw(st.floats(-9, 9)) + draw(st.floats(-1e9, 1e9))
    if draw(st.booleans()):
        values = np.round(values, draw(st.integers(-8, 8)))
    values[:, draw(st.integers(0, n_frames)) :] *= draw(st.sampled_from([0.0, 1.0, 1e3]))
    start = draw(st.integers(0, n_frames))
    values[:, start : start + draw(st.integers(0, n_frames))] = np.nan
    return calvae.Traces(values, draw(RATES), draw(st.sampled_from(["raw", "dff"])))


@settings(max_examples=60)
@given(changing(), st.integers(0, 4))
def test_inference_is_finite_or_refused(model, traces, n_samples):
    found = taken(calvae.infer, traces, model, n_samples=n_samples, device="cpu")
    if found is None:
        return
    assert found.rate.shape == traces.values.shape
    for array in (found.rate, found.reconstruction, found.reconstruction_std, *found.theta.values()):
        assert np.isfinite(array).all()
    assert (found.rate >= 0).all()
    assert found.events["count"].max(initial=0) <= 4


@pytest.fixture(scope="module")
def minute() -> np.ndarray:
    """(roi, time) ΔF/F of three cells, 30 s at 60 Hz."""
    return calvae.simulate(3, 30.0, 60.0, rate=1.0, seed=3).traces.values


def rates(values, frame_rate: float = 60.0) -> np.ndarray:
    return calvae.infer(calvae.Traces(values, frame_rate), n_samples=0, device="cpu").rate


DRESSES = {
    "big-endian": lambda a: a.astype(">f4"),
    "double": lambda a: a.astype(float),
    "by columns": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "list": np.ndarray.tolist,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "masked array": lambda a: np.ma.masked_invalid(np.where(np.isnan(a), np.inf, a)),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_numbers_are_the_same_in_any_dress(minute, dress):
    values = minute.copy()
    values[1, 300:340] = np.nan
    np.testing.assert_array_equal(rates(DRESSES[dress](values)), rates(values))


def test_what_a_mask_hides_is_missing_in_movies_and_frames_too():
    movie = np.random.default_rng(0).integers(100, 200, (60, 8, 8)).astype(np.uint16)
    rois = calvae.RoiMasks.from_discs([(4.0, 4.0)], 3.0, (8, 8))
    masked = np.ma.array(movie, mask=np.zeros(movie.shape, bool))
    masked[20:23] = np.ma.masked
    traces = calvae.extract(masked, rois, 30.0)
    assert np.flatnonzero(~traces.valid[0]).tolist() == [20, 21, 22]
    whole = calvae.extract(movie, rois, 30.0)
    np.testing.assert_allclose(traces.values[traces.valid], whole.values[traces.valid], rtol=1e-2)
    live = calvae.stream(frame_rate=30.0, rois=rois)
    assert np.isnan(live._reader.read(masked[20])).all()
    assert np.isfinite(live._reader.read(masked[19])).all()


def test_rates_go_with_their_trace_wherever_it_stands(minute):
    """A constant more, a recording twice with a gap between, its end alone: what is away from the edges is the same."""
    own, edge = rates(minute), 60
    np.testing.assert_allclose(rates(minute + 5.0), own, atol=1e-4 * own.max())
    twice = rates(np.concatenate([minute, np.full((3, 400), np.nan), minute], axis=1))
    n = minute.shape[1]
    parts = [(twice[:, :n], own), (twice[:, -n:], own), (rates(minute[:, 400:]), own[:, 400:])]
    for found, expected in parts:
        for one, other in zip(found[:, edge:-edge], expected[:, edge:-edge], strict=True):
            assert np.corrcoef(one, other)[0, 1] > 0.99
            # Less of a recording tells less of how large a spike shows.
            assert one.sum() == pytest.approx(other.sum(), rel=0.3)


def test_half_the_frame_rate_finds_the_same_spikes(minute):
    halved, _ = resample(minute, 60.0, 30.0)
    own = rates(minute)[:, : 2 * halved.shape[1]].reshape(3, -1, 2).mean(-1)
    for one, other in zip(rates(halved, 30.0), own, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.9
        # How much fluorescence a spike makes is in doubt by a factor of two, and is guessed anew.
        assert 0.5 < one.sum() / other.sum() < 2


@settings(max_examples=15)
@given(st.integers(0, 1000), st.floats(-9, 9), st.permutations(range(3)))
def test_neither_scale_nor_order_of_traces_matters(model, seed, exponent, order):
    values = calvae.simulate(3, 8.0, 20.0, rate=1.0, seed=seed).traces.values
    one = calvae.infer(calvae.Traces(values, 20.0), model, n_samples=3, device="cpu")
    other = calvae.infer(
        calvae.Traces(10.0**exponent * values[order], 20.0, roi_ids=tuple(k + 1 for k in order)),
        model,
        n_samples=3,
        device="cpu",
    )
    np.testing.assert_allclose(other.rate, one.rate[list(order)], rtol=2e-3, atol=1e-4)
