"""What is expected of inference on a cell agrees with simulating such cells by hand and looking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import napari_calvae as calvae
from napari_calvae.expectation import SCORES, _score
from napari_calvae.metrics import smooth_spikes
from napari_calvae.recording import EVENT_DTYPE

FS = 25.0


@pytest.fixture(scope="module")
def result():
    values = calvae.simulate(2, 60.0, FS, variability=0, rate=0.6, seed=3).traces
    return calvae.infer(values, n_samples=30)


def test_it_agrees_with_a_direct_simulation(result):
    theta = {"tau_rise": 0.05, "tau_decay": 0.6, "amplitude": 0.2, "baseline": 0.0, "noise_density": 0.02}
    row = 1
    known = replace(
        result,
        theta={name: np.full(2, value, np.float32) for name, value in theta.items()},
        rate=np.full_like(result.rate, 0.6),
    )
    found = calvae.expect(known, row, n_repeats=16)
    assert found.scores.dtype.names == SCORES
    assert found.roi_id == 2
    assert found.rate == pytest.approx(0.6)
    direct = calvae.simulate(40, 60.0, FS, variability=0, rate=0.6, theta=theta, seed=11)
    again = calvae.infer(direct.traces, n_samples=2)
    for name, sigma in (("correlation_50ms", 0.05), ("correlation_200ms", 0.2)):
        by_hand = [
            np.corrcoef(smooth_spikes(rate / FS, FS, sigma), smooth_spikes(counts, FS, sigma))[0, 1]
            for rate, counts in zip(again.rate, direct.counts, strict=True)
        ]
        expected = found.scores[name]
        error = np.sqrt(np.var(by_hand) / len(by_hand) + np.var(expected) / len(expected))
        # Rates vary from cell to cell in the one and not in the other, which moves the mean a little.
        assert abs(expected.mean() - np.mean(by_hand)) < 4 * error + 0.02


def test_more_noise_is_less_trust(result):
    def at(noise):
        theta = {**result.theta, "noise_density": np.full(2, noise, np.float32)}
        return calvae.expect(replace(result, theta=theta), 0, n_repeats=4).scores["correlation_50ms"].mean()

    assert at(0.01) > at(0.3) + 0.2


def test_scores_of_a_perfect_and_of_an_empty_answer(result):
    times = np.array([2.0, 10.01, 20.0, 20.02, 40.3])
    counts = np.zeros(result.traces.n_frames)
    np.add.at(counts, np.floor(times * FS + 0.5).astype(int), 1)
    events = np.zeros(5 * 30, EVENT_DTYPE)
    events["sample"] = np.repeat(np.arange(30), 5)
    events["frame"] = np.tile(np.floor(times * FS + 0.5).astype(int), 30)
    events["count"] = 1
    one = replace(result, traces=result.traces.select([0]), n_samples=30)
    perfect = dict(zip(SCORES, _score(replace(one, rate=counts[None] * FS, events=events), 0, times), strict=True))
    assert perfect["excess"] == pytest.approx(0)
    assert perfect["found"] == 1
    assert perfect["timing_error"] <= 0.5 / FS
    assert perfect["coverage"] == 1
    assert perfect["correlation_50ms"] == pytest.approx(1)
    silent = replace(one, rate=np.zeros((1, len(counts))), events=events[:0])
    empty = dict(zip(SCORES, _score(silent, 0, times), strict=True))
    assert empty["excess"] == -1
    assert empty["found"] == 0
    assert empty["coverage"] == 0
    assert np.isnan([empty["timing_error"], empty["correlation_50ms"]]).all()


def test_missing_frames_are_missing_in_the_simulation_too(result):
    valid = result.traces.valid.copy()
    valid[0, 100:300] = False
    holed = replace(result, traces=result.traces.replace(values=result.traces.values, valid=valid))
    found = calvae.expect(holed, 0, n_repeats=2)
    assert not found.result.traces.valid[:, 100:300].any()
    assert np.isfinite(found.scores["correlation_200ms"]).all()


def test_another_model_is_refused(result):
    other = replace(result, provenance={**result.provenance, "model_sha256": "0" * 64, "model_checksum": "0" * 64})
    with pytest.raises(calvae.RecordingError, match="expected the one that the result was inferred with"):
        calvae.expect(other)
    with pytest.raises(calvae.RecordingError, match="at least one repeat"):
        calvae.expect(result, 5)


def test_an_amplitude_that_was_known_is_known_to_what_follows():
    traces = calvae.simulate(1, 20.0, 30.0, rate=1.0, seed=0).traces
    plain = calvae.infer(traces, n_samples=4)
    known = calvae.infer(traces, n_samples=4, amplitude=3 * float(plain.theta["amplitude"][0]))
    assert known.rate.sum() < 0.6 * plain.rate.sum()
    again = calvae.expect(known, n_repeats=1)
    assert again.result.theta["amplitude"][0] == pytest.approx(known.theta["amplitude"][0])
    amplitude = float(known.theta["amplitude"][0])
    refined = calvae.refine(traces, n_steps=1, n_samples=4, amplitude=amplitude)
    assert refined.theta["amplitude"][0] == pytest.approx(amplitude)
    assert refined.rate.sum() == pytest.approx(known.rate.sum(), rel=0.5)
    one, two = (calvae.diagnose(traces, n_steps=1, n_evidence=32, amplitude=a).amortized[0] for a in (None, amplitude))
    assert one != two
