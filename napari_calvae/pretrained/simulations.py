"""Training snippets simulated from a broad prior: bursting cells of any rate, through the generative models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from napari_calvae.generative import MODELS, GenerativeModel
from napari_calvae.generative.base import Theta
from napari_calvae.generative.linear_ar import RISE
from napari_calvae.preprocess import bin_spikes, resample
from napari_calvae.pretrained.recordings import FRAME_RATES, Snippets, lose_frames

#: Simulations run at about this rate (Hz) at least, and are averaged down to the frame rate.
FINE_RATE = 90.0


class SimulationSampler:
    """Draws snippets from the generative models with parameters and firing from broad priors.

    Parameters
    ----------
    models
        Their names. Those of an indicator's kinetics loop over time: a batch takes seconds, not tenths of them.
    """

    def __init__(self, models: Sequence[str] = ("linear_ar", "dye_binding", "physiological")) -> None:
        self.models = [MODELS[name]() for name in models]

    def fill(self, out: Snippets, rows: Sequence[int], rng: np.random.Generator) -> None:
        """Fill ``rows`` of ``out``; those of one call share frame rate and model."""
        if not len(rows):
            return
        n, window = len(rows), out.fluorescence.shape[1]
        target = 30.0 if rng.random() < 0.4 else float(np.exp(rng.uniform(*np.log(FRAME_RATES))))
        # People bring slow recordings that were interpolated to a higher rate: make some.
        rate = float(rng.uniform(5, 15)) if target == 30.0 and rng.random() < 0.4 else target
        n_frames = window if rate == target else int(np.ceil(window * rate / target)) + 2
        substeps = int(np.clip(np.ceil(FINE_RATE / rate), 1, 16))
        fine_rate = rate * substeps
        fine = np.stack([simulate_spikes(n_frames * substeps, fine_rate, rng) for _ in range(n)])
        model = self.models[rng.integers(len(self.models))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        theta = model.sample_prior(n, generator)
        late = [_delay(c, d * fine_rate) for c, d in zip(fine, _onset(theta, n, rate, rng), strict=True)]
        clean = _respond(model, np.stack(late), theta, fine_rate, rng).reshape(n, n_frames, substeps)
        clean = clean[..., -1] if rng.random() < 0.3 else clean.mean(-1)
        time = (np.arange(n_frames * substeps) + 0.5) / fine_rate - 0.5 / rate
        for row, trace, counts in zip(rows, clean, fine, strict=True):
            dff, shift = resample(_observe(trace, rate, rng), rate, target)
            per_frame = bin_spikes(np.repeat(time, counts), shift, target, len(dff))
            out.put(row, lose_frames(dff, rng), per_frame, target)


def _onset(theta: Theta, n: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(n,) seconds from a spike to the first of its fluorescence.

    In recordings with known spikes it goes with the rise: next to nothing where that takes 35 ms, 15 to 90 ms where it
    takes 50 to 85 ms. A delay that a trace does not show would make timing a guess. Time stamps add part of a frame.
    """
    rise = theta["tau_rise"].numpy() if "tau_rise" in theta else np.exp(rng.normal(np.log(RISE.median), 0.5, n))
    return np.minimum(rise * rng.uniform(0, 1.2, n), 0.12) + rng.uniform(0, 0.01, n) + rng.uniform(0, 0.3, n) / rate


def _respond(
    model: GenerativeModel, counts: np.ndarray, theta: Theta, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """(n, time) noise-free fluorescence; a part of the linear ones decays in two steps, as that of jGCaMP8 does."""

    def fluorescence(parameters: Theta) -> np.ndarray:
        with torch.no_grad():
            spikes = torch.as_tensor(counts, dtype=torch.float32)
            # Float64 holds a long simulation's averages without loss; it is small beside the network.
            return model.fluorescence(spikes, parameters, rate).double().numpy()

    clean = fluorescence(theta)
    if "tau_decay" not in theta:
        return clean
    n = len(clean)
    factor = torch.from_numpy(np.exp(rng.uniform(np.log(0.05), np.log(0.4), n)).astype(np.float32))
    fast = torch.maximum(theta["tau_decay"] * factor, 1.1 * theta["tau_rise"])
    share = np.where(rng.random(n) < 0.4, rng.uniform(0.2, 0.8, n), 0.0)[:, None]
    return (1 - share) * clean + share * fluorescence(dict(theta) | {"tau_decay": fast})


def simulate_spikes(n_bins: int, bin_rate: float, rng: np.random.Generator) -> np.ndarray:
    """(time,) spike counts of a doubly stochastic, bursting cell.

    The log-rate is an Ornstein–Uhlenbeck process (0.2 to 20 s) around a mean rate of 0.03 to 25 spikes/s, and each of
    its events may carry a burst of spikes 3 to 60 ms apart.
    """
    mean_rate = float(np.clip(np.exp(rng.normal(np.log(0.8), 1.3)), 0.03, 20.0))
    if rng.random() < 0.15:
        # Interneurons.
        mean_rate = float(np.exp(rng.uniform(np.log(2.0), np.log(25.0))))
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


def _delay(counts: np.ndarray, bins: float) -> np.ndarray:
    """Move spikes later by a number of bins, shared between the two nearest ones."""
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
