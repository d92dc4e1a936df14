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


@settings(max_examples=20)
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
