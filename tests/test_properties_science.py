"""What the science gives for extreme but legal recordings: finite where measured, or refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import napari_calvae as calvae

settings.register_profile(
    "calvae", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("calvae")


def taken(function, *arguments, **options):
    """What it returns, or None where it is refused in a sentence that says what was expected."""
    try:
        return function(*arguments, **options)
    except ValueError as error:  # pydantic's and the house's own are among these
        if "expected" not in str(error) and "Input should be" not in str(error):
            raise
        return None


def cells(seed: int, n_rois: int = 3, n_frames: int = 160, frame_rate: float = 20.0) -> np.ndarray:
    """(roi, time) ΔF/F of cells that fire."""
    return calvae.simulate(n_rois, n_frames / frame_rate, frame_rate, rate=1.0, seed=seed).traces.values.copy()


@st.composite
def extreme(draw, n_rois=(1, 3), n_frames=(3, 160), rates=(3.0, 120.0), gaps=True):
    """Traces of any scale, offset, frame rate and ids, rounded or not, with frames missing, flat or doubled."""
    seed, n, frames = draw(st.integers(0, 99)), draw(st.integers(*n_rois)), draw(st.integers(*n_frames))
    values = cells(seed, n, frames) * 10.0 ** draw(st.floats(-9, 9)) + draw(st.sampled_from([0.0, 1.0, -1.0, 1e3, 1e6]))
    if draw(st.booleans()):
        values = np.round(values, draw(st.integers(-2, 3)))
    if n > 1 and draw(st.booleans()):
        values[-1] = values[0]
    if gaps:
        start = draw(st.integers(0, frames))
        values[draw(st.integers(0, n - 1)), start : start + draw(st.integers(0, frames))] = np.nan
    ids = draw(st.lists(st.integers(1, 2**31 - 1), min_size=n, max_size=n, unique=True))
    t0 = draw(st.sampled_from([0.0, -3.0, 1e5]))
    return calvae.Traces(values, draw(st.floats(*rates)), draw(st.sampled_from(["dff", "raw"])), tuple(ids), t0)


@settings(max_examples=12)
@example(calvae.Traces(np.round(np.random.default_rng(200).normal(size=(1, 7))), 5.0))
@example(calvae.Traces([[1.0] * 20, [np.nan] * 20], 20.0))
@given(extreme())
def test_oasis_is_finite_or_refused_and_always_the_same(traces):
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    np.random.seed(5)  # noqa: NPY002 - whoever uses numpy's own stream is not to notice
    wanted = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    found = taken(calvae.oasis, traces)
    assert np.random.random() == wanted  # noqa: NPY002
    if found is None:
        return
    assert found.shape == traces.values.shape
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(calvae.oasis(traces), found)
    np.testing.assert_array_equal(calvae.oasis(traces.select([-1])), found[-1:])


def test_oasis_goes_with_the_scale_wherever_the_trace_stands():
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    values = cells(0).astype(float)
    own = calvae.oasis(calvae.Traces(values, 20.0))
    np.testing.assert_allclose(calvae.oasis(calvae.Traces(values * 1e-9, 20.0)), own * 1e-9, rtol=1e-2, atol=1e-11)
    np.testing.assert_allclose(calvae.oasis(calvae.Traces(values + 100, 20.0)), own, rtol=1e-2, atol=1e-3)


ODD = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, -1, 1e-9, 1e9]))


@settings(max_examples=60)
@given(st.lists(st.floats(), max_size=8), ODD, st.one_of(st.floats(), st.floats(3, 120)), st.integers(-2, 300))
def test_spikes_are_counted_or_the_clock_is_refused(times, t0, frame_rate, n_frames):
    counts = taken(calvae.bin_spikes, times, t0, frame_rate, n_frames)
    if counts is not None:
        assert counts.shape == (n_frames,)
        assert counts.sum() <= np.isfinite(times).sum()


@example([1.5, 2.5], 0.0)
@example([1, 2], np.nan)
@example([1, 2**64], 0.0)
@given(st.lists(st.one_of(st.integers(), st.floats()), min_size=2, max_size=2), st.floats())
def test_ids_and_times_come_back_as_they_were_given_or_are_refused(ids, t0):
    traces = taken(calvae.Traces, np.eye(2, 9), 5.0, "dff", tuple(ids), t0)
    if traces is not None:
        assert list(traces.roi_ids) == ids
        assert np.isfinite(traces.times).all()


@pytest.mark.parametrize("rate", ["20 Hz", [20.0], 1j, np.array([1.0, 2.0])])
def test_a_frame_rate_that_is_no_number_is_refused(rate):
    with pytest.raises(calvae.RecordingError, match="frame_rate: expected a positive number"):
        calvae.Traces(np.eye(2), rate)


SIMULATED = {
    "n_rois": st.one_of(st.integers(-1, 4), st.floats(0, 4)),
    "duration": st.one_of(st.floats(-1, 3), st.sampled_from([np.nan, np.inf])),
    "frame_rate": st.floats(0.5, 1e3),
    "rate": st.one_of(st.floats(0, 1e9), st.sampled_from([np.nan, np.inf])),
    "variability": st.one_of(st.floats(0, 3), st.floats(-1, 1e9), st.sampled_from([np.nan, np.inf])),
    "seed": st.integers(-1, 2**70),
    "theta": st.dictionaries(st.sampled_from(["amplitude", "baseline", "noise", "tau"]), st.floats(), max_size=2),
}


@example({"rate": 1e9})
@example({"duration": np.inf})
@example({"variability": 100.0})
@example({"theta": {"baseline": np.nan}})
@example({"seed": 2**64})
@example({"n_rois": 1.5})
@given(st.fixed_dictionaries({}, optional=SIMULATED))
def test_what_is_simulated_is_finite_and_the_same_again_or_refused(odd):
    wanted = {"n_rois": 2, "duration": 1.0, "frame_rate": 20.0, **odd}
    found = taken(calvae.simulate, **wanted)
    if found is None:
        return
    assert found.traces.n_rois == wanted["n_rois"]
    assert found.traces.n_frames == round(wanted["duration"] * wanted["frame_rate"])
    assert found.traces.valid.all()
    assert all(np.isfinite(values).all() for values in found.theta.values())
    for times, counts in zip(found.spike_times, found.counts, strict=True):
        again = calvae.bin_spikes(times, found.traces.t0, found.traces.frame_rate, found.traces.n_frames)
        np.testing.assert_array_equal(again, counts)
    np.testing.assert_array_equal(calvae.simulate(**wanted).traces.values, found.traces.values)
