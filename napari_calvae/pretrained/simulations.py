"""Training snippets simulated from a broad prior: bursting cells of any rate, through the generative models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from napari_calvae.generative import MODELS
from napari_calvae.pretrained.kernels import DELAY_LINE, DelayLine, simulated_delays
from napari_calvae.pretrained.recordings import FRAME_RATES, Snippets, clock_errors, lose_frames

#: Simulations run at about this rate (Hz) at least, and are averaged down to the frame rate.
FINE_RATE = 90.0


class SimulationSampler:
    """Draws snippets from the generative models with parameters and firing from broad priors.

    Parameters
    ----------
    models
        Their names. Those of an indicator's kinetics loop over time: a batch takes seconds, not tenths of them.
    line
        How late fluorescence is for its rise.
    """

    def __init__(
        self, models: Sequence[str] = ("linear_ar", "dye_binding", "physiological"), line: DelayLine = DELAY_LINE
    ) -> None:
        self.models = [MODELS[name]() for name in models]
        self.line = line

    def fill(self, out: Snippets, rows: Sequence[int], rng: np.random.Generator) -> None:
        """Fill ``rows`` of ``out``; those of one call share frame rate and model."""
        if not len(rows):
            return
        n, window = len(rows), out.fluorescence.shape[1]
        rate = 30.0 if rng.random() < 0.4 else float(np.exp(rng.uniform(*np.log(FRAME_RATES))))
        substeps = int(np.clip(np.ceil(FINE_RATE / rate), 1, 16))
        fine_rate = rate * substeps
        fine = [simulate_spikes(window * substeps, fine_rate, rng) for _ in rows]
        model = self.models[rng.integers(len(self.models))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        theta = model.sample_prior(n, generator)
        delay = simulated_delays(model, theta, self.line) + clock_errors(n, rate, rng)
        # Float64 holds a long simulation's scans without loss; it is small beside the network.
        late = delayed(np.stack(fine), delay * fine_rate)
        with torch.no_grad():
            clean = model.fluorescence(torch.as_tensor(late, dtype=torch.float32), theta, fine_rate).double().numpy()
        clean = clean.reshape(n, window, substeps)
        clean = clean[..., -1] if rng.random() < 0.3 else clean.mean(-1)
        for row, trace, counts in zip(rows, clean, fine, strict=True):
            noisy = _observe(trace, rate, rng)
            out.put(row, lose_frames(noisy, rng), counts.reshape(window, substeps).sum(-1), rate)


def simulate_spikes(n_bins: int, bin_rate: float, rng: np.random.Generator) -> np.ndarray:
    """(time,) spike counts of a doubly stochastic, bursting cell.

    The log-rate is an Ornstein–Uhlenbeck process (0.2 to 20 s) around a mean rate of 0.03 to 20 spikes/s, and each of
    its events may carry a burst of spikes 3 to 60 ms apart.
    """
    mean_rate = np.exp(rng.normal(np.log(0.8), 1.3))
    mean_rate = float(np.clip(mean_rate, 0.03, 20.0))
    burst = rng.uniform(0.05, 0.75) if rng.random() < 0.6 else 0.0
    spread, tau = rng.uniform(0, 1.8), np.exp(rng.uniform(np.log(0.2), np.log(20)))
    step = max(1, round(bin_rate * tau / 10))
    n_knots = n_bins // step + 2
    decay = np.exp(-step / (bin_rate * tau))
    noise = rng.standard_normal(n_knots)
    path = np.empty(n_knots)
    path[0] = noise[0]
    for k in range(1, n_knots):
        path[k] = decay * path[k - 1] + np.sqrt(1 - decay**2) * noise[k]
    log_rate = np.interp(np.arange(n_bins), np.arange(n_knots) * step, spread * path) - spread**2 / 2
    event_rate = mean_rate * (1 - burst) * np.exp(log_rate)
    counts = rng.poisson(np.minimum(event_rate, 60.0) / bin_rate)
    if burst:
        events = np.repeat(np.flatnonzero(counts), counts[counts > 0])
        interval = np.exp(rng.uniform(np.log(0.003), np.log(0.06)))
        extra = rng.geometric(1 - burst, len(events)) - 1
        parent = np.repeat(events, np.minimum(extra, 12)).astype(float)
        order = np.concatenate([np.arange(1, min(e, 12) + 1) for e in extra]) if len(extra) else np.empty(0)
        times = parent + bin_rate * interval * order * rng.uniform(0.6, 1.4, len(parent))
        times = times[times < n_bins - 1].astype(np.int64)
        np.add.at(counts, times, 1)
    return counts


def delayed(counts: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """(row, time) counts, each row moved later by so many bins, or earlier; shared between the two nearest ones."""
    return np.stack([_delay(row, by) for row, by in zip(counts, bins, strict=True)])


def _delay(counts: np.ndarray, bins: float) -> np.ndarray:
    if bins < 0:
        return _delay(counts[::-1], -bins)[::-1]
    whole, part = int(bins), bins - int(bins)
    padded = np.concatenate([np.zeros(whole + 1), counts])
    return ((1 - part) * padded[1:] + part * padded[:-1])[: len(counts)]


def _observe(clean: np.ndarray, frame_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Add drift and noise, sized by what the transients of this trace look like."""
    signal = np.quantile(clean, 0.995) - np.median(clean)
    size = max(float(signal), 1e-3)
    # Peak over noise per √Hz; at 30 Hz a frame's noise is √30 times as large.
    density = size / np.exp(rng.uniform(np.log(8.0), np.log(300.0)))
    time = np.arange(len(clean)) / frame_rate
    drift = np.zeros_like(clean)
    if rng.random() < 0.6:
        depth = rng.uniform(0, 0.15)
        for _ in range(3):
            period = np.exp(rng.uniform(np.log(15), np.log(300)))
            drift += depth * rng.standard_normal() * size * np.sin(2 * np.pi * (time / period + rng.random()))
    sd = density * np.sqrt(frame_rate)
    if rng.random() < 0.4:
        sd = sd * np.sqrt(1 + rng.uniform(0, 2) * np.maximum(clean - np.median(clean), 0) / size)
    noise = sd * rng.standard_normal(len(clean))
    if rng.random() < 0.25:
        mix = rng.uniform(0.1, 0.5)
        noise[1:] += mix * noise[:-1]
    return clean + drift + noise
