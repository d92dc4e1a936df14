"""Amortization gaps on request, without Qt."""

from __future__ import annotations

import numpy as np
import pytest
from plugin_helpers import posterior_of

import napari_calvae as calvae
from napari_calvae._napari import answers, gaps


def result(n_frames=4000, frame_rate=20.0):
    rng = np.random.default_rng(0)
    values = 0.05 * rng.normal(size=(2, n_frames))
    values[1, 2000:3000:40] += 3.0  # fires there alone
    return posterior_of(calvae.Traces(values, frame_rate, roi_ids=(4, 9)), 10)


def test_the_busiest_minute_is_where_the_spikes_are():
    whole = result()
    part = gaps.busiest(answers.one_roi(whole, 1))
    assert part.roi_ids == (9,)
    assert part.n_frames == 1200
    first = round((part.t0 - whole.traces.t0) * 20)
    np.testing.assert_array_equal(part.values[0], whole.traces.values[1, first : first + 1200])
    every = np.convolve(whole.rate[1], np.ones(1200), "valid")
    assert whole.rate[1, first : first + 1200].sum() == pytest.approx(every.max())
    assert every.min() < 0.9 * every.max()
    short = result(400)
    assert gaps.busiest(answers.one_roi(short, 0)).n_frames == 400


def test_a_gap_holds_for_its_own_result_only():
    one, other = result(), result()
    known = gaps.KnownGaps()
    known.add(gaps.Gap(1, 9, one, 0.25, 0))
    assert known.of({9: (one, 1), 4: (one, 0)}) == {9: 0.25}
    assert known.of({9: (other, 1)}) == {}


def test_gaps_are_those_of_the_model_and_errors_are_a_sentence():
    simulated = calvae.simulate(1, 3.0, 20.0, rate=2.0, seed=1)
    whole = calvae.infer(simulated.traces, n_samples=10)
    roi = whole.roi_ids[0]
    (found,) = gaps.iter_gaps(3, {roi: (whole, 0)}, [roi], "universal")
    assert found.value == pytest.approx(float(calvae.diagnose(whole.traces, "universal").amortization_gap[0]), rel=1e-6)
    assert (found.number, found.roi, found.left) == (3, roi, 0)
    (failed,) = gaps.iter_gaps(4, {roi: (whole, 0)}, [roi], "nonesuch")
    assert isinstance(failed, answers.Failure)
    assert "nonesuch" in failed.sentence
