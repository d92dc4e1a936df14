"""How far a cell's spikes can be trusted: simulate it as its model was fitted, infer again, compare with the truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from napari_calvae.inference import infer
from napari_calvae.metrics import score_bias, score_correlation, smooth_spikes
from napari_calvae.preprocess import bin_spikes
from napari_calvae.recording import RecordingError, SpikeInference, Traces, check_seed
from napari_calvae.simulation import simulate_spike_times
from napari_calvae.vae import SpikeVAE, shared_model

#: Spikes are simulated in bins no longer than this (s): within a frame they come at some moment, not spread over it.
_BIN = 0.01
#: A spike is isolated if no other is within twice this (s), and found if half a spike or more is inferred within it.
REACH = 0.25
#: Length (s) of the windows whose counts and intervals are compared, where the recording holds one.
_WINDOW = 1.0
#: Lowest rate (spikes/s) that is simulated: a cell that never fires tells nothing.
_LEAST_RATE = 0.02

SCORES = ("correlation_50ms", "correlation_200ms", "excess", "found", "timing_error", "coverage")


@dataclass(frozen=True, eq=False)
class Expectation:
    """What inference finds in simulated recordings of a cell like this one, whose spikes are known.

    Parameters
    ----------
    scores
        Structured array, one row per simulated recording; NaN where there is nothing to count.
        ``correlation_50ms``, ``correlation_200ms``: of the inferred rate with the true spikes, both smoothed by a
        Gaussian of that σ. ``excess``: inferred spikes beyond the true ones, as a share of them. ``found``: share of
        the isolated spikes that were found; ``timing_error``: median distance of those from where they were inferred
        (s). ``coverage``: share of the one-second windows with true or possible spikes whose 90 % interval holds the
        true count.
    result
        What was inferred, one row per simulated recording.
    spike_times
        Of each simulated recording the true spikes (s).
    roi_id, rate
        The cell, and the rate (spikes/s) that it was simulated with.
    """

    scores: np.ndarray
    result: SpikeInference
    spike_times: tuple[np.ndarray, ...]
    roi_id: int
    rate: float


def expect(
    result: SpikeInference,
    row: int = 0,
    model: str | Path | SpikeVAE = "universal",
    *,
    n_repeats: int = 8,
    seed: int = 0,
) -> Expectation:
    """How well the spikes of one cell can be inferred, if it is as the model says, with the amplitude if it was given.

    The cell's θ, noise and mean rate, the recording's length, frame rate and missing frames, all as in ``result``; the
    spikes of each repeat are drawn anew, with slow changes of the rate and bursts. What no model knows (motion,
    contamination, another indicator) is not in it: real recordings are harder.

    Parameters
    ----------
    result, row
        What was inferred, and of which cell (row).
    model
        What it was inferred with.
    n_repeats
        Number of simulated recordings.
    seed
        Of every random number.

    Raises
    ------
    RecordingError
        If the model is not the one of ``result``, or the row or the number of repeats is none.
    """
    check_seed(seed)
    vae = shared_model(model, coupled=False)
    if result.provenance and not vae.made(result.provenance):
        raise RecordingError(
            f"model: expected the one that the result was inferred with ({result.provenance.get('model', '')}), "
            f"got {vae.description}. Give that model, or infer again."
        )
    whole = all(isinstance(n, int | np.integer) for n in (row, n_repeats))
    if not whole or not 0 <= row < result.traces.n_rois or n_repeats < 1:
        raise RecordingError(
            f"expect: expected a row below {result.traces.n_rois} and at least one repeat, got row {row} and "
            f"{n_repeats} repeats."
        )
    simulated, times, rate = _simulate(result, row, vae, (n_repeats, seed))
    n_samples = max(result.n_samples, 20)
    amplitude = result.provenance.get("settings", {}).get("amplitude")
    found = infer(simulated, vae, n_samples=n_samples, seed=seed, amplitude=amplitude)
    scores = np.array([_score(found, k, times[k]) for k in range(n_repeats)], [(name, "f8") for name in SCORES])
    return Expectation(scores, found, times, result.roi_ids[row], rate)


def _simulate(
    result: SpikeInference, row: int, vae: SpikeVAE, repeats: tuple[int, int]
) -> tuple[Traces, tuple[np.ndarray, ...], float]:
    """Recordings like that of one cell, their spike times, and the rate of those."""
    n_repeats, seed = repeats
    traces, fs = result.traces, result.frame_rate
    valid = traces.valid[row]
    rate = max(float(result.rate[row][valid].mean()), _LEAST_RATE) if valid.any() else _LEAST_RATE
    bins = max(1, int(np.ceil(1 / (fs * _BIN))))
    rng = np.random.default_rng(seed)
    start = traces.t0 - 0.5 / fs
    times = tuple(simulate_spike_times(traces.duration, rate, rng, start) for _ in range(n_repeats))
    clock = start + 0.5 / (fs * bins), fs * bins, traces.n_frames * bins
    counts = torch.from_numpy(np.stack([bin_spikes(t, *clock) for t in times]).astype(np.float32))
    theta = {p.name: torch.full((n_repeats,), float(result.theta[p.name][row])) for p in vae.generative.parameters}
    with torch.no_grad():
        values = vae.generative.simulate(counts, theta, fs, torch.Generator().manual_seed(seed), bins).numpy()
    values[:, ~valid] = np.nan
    return Traces(values, fs, "dff", t0=traces.t0), times, rate


def _score(found: SpikeInference, row: int, times: np.ndarray) -> tuple[float, ...]:
    """Scores of one simulated recording, in the order of ``SCORES``."""
    fs, valid = found.frame_rate, found.traces.valid[row]
    counts = bin_spikes(times, found.traces.t0, fs, found.traces.n_frames)
    rate = found.rate[row]
    both = np.stack([rate / fs, counts])
    correlations = [float(score_correlation(*smooth_spikes(both, fs, sigma)[:, valid])) for sigma in (0.05, 0.2)]
    excess = float(score_bias(rate[valid], counts[valid] * fs))
    return *correlations, excess, *_timing(found, row, times), _coverage(found, row, counts)


def _timing(found: SpikeInference, row: int, times: np.ndarray) -> tuple[float, float]:
    """Share of the isolated spikes that were found, and the median error of their times (s)."""
    fs, t0, n_frames = found.frame_rate, found.traces.t0, found.traces.n_frames
    reach = max(REACH, 2 / fs)
    gaps = np.diff(times, prepend=-np.inf, append=np.inf)
    isolated = times[np.minimum(gaps[:-1], gaps[1:]) > 2 * reach]
    errors, looked_at = [], 0
    for time in isolated:
        centre = (time - t0) * fs
        frames = np.arange(int(np.ceil(centre - reach * fs)), int(np.floor(centre + reach * fs)) + 1)
        frames = frames[(frames >= 0) & (frames < n_frames)]
        if not found.traces.valid[row, frames].all():
            continue
        looked_at += 1
        expected = found.rate[row, frames] / fs
        if expected.sum() >= 0.5:
            errors.append(abs(np.average(t0 + frames / fs, weights=expected) - time))
    share = len(errors) / looked_at if looked_at else np.nan
    return share, float(np.median(errors)) if errors else np.nan


def _coverage(found: SpikeInference, row: int, counts: np.ndarray) -> float:
    """Share of the windows with true or possible spikes whose 90 % interval holds the true count."""
    window = max(min(_WINDOW, found.traces.duration), 1 / found.frame_rate)
    edges = found.window_edges(window)
    low, high = found.interval(0.9, window)[:, row]
    inside = slice(0, edges[-1])  # a last window that the recording does not fill is left out
    true = np.add.reduceat(counts[inside], edges[:-1])
    measured = np.logical_and.reduceat(found.traces.valid[row, inside], edges[:-1])
    told = ((true > 0) | (high > 0)) & measured
    return float(np.mean((low <= true) & (true <= high), where=told)) if told.any() else np.nan
