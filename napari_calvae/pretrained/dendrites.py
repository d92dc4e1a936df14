"""Dendrites simulated from a broad prior: a shaft and its spines through `DendriticSpine`, with drift and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from napari_calvae.generative import BurstyPrior, DendriticSpine

#: Frame rates that are simulated (Hz).
FRAME_RATES = (10.0, 60.0)
#: Simulations run at about this rate (Hz) at least, and are averaged down to the frame rate.
FINE_RATE = 100.0
#: Ranges of mean rates (Hz) of action potentials and of synaptic inputs.
BAP_RATES, SYNAPTIC_RATES = (0.1, 5.0), (0.05, 2.0)
#: Range of the bAP's amplitude in a spine, relative to that of the spine's own inputs.
BAP_SHARE = (0.03, 3.0)
#: Ranges of peak response over noise density (√s) of shaft and spines; at 30 Hz a frame's noise is √30 times as large.
SHAFT_SNR, SPINE_SNR = (4.0, 150.0), (3.0, 100.0)
#: Share of the variance of log time constants that the compartments of a dendrite have in common.
ALIKE = 0.75


@dataclass(frozen=True, eq=False)
class Dendrites:
    """Simulated dendrites of equally many spines, all at one frame rate.

    Parameters
    ----------
    fluorescence
        (dendrite, compartment, time) ΔF/F in units of the spines' synaptic amplitude, NaN where missing.
    counts
        (dendrite, compartment, time) action potentials (row 0) and synaptic inputs per frame.
    frame_rate
        Frames per second (Hz).
    """

    fluorescence: Tensor
    counts: Tensor
    frame_rate: float


def simulate_dendrites(n_dendrites: int, n_spines: int, n_frames: int, seed: int) -> Dendrites:
    """Draw parameters, trains and fluorescence of some dendrites.

    Time constants have the prior of `DendriticSpine`, most of which the compartments of a dendrite share; rates,
    amplitudes and noise are log-uniform in the ranges above. Most of the trains come in bursts, some inputs coincide
    with action potentials, some responses saturate, and there is drift, of each compartment and of all together.
    """
    generator = torch.Generator().manual_seed(seed)
    model, shape = DendriticSpine(), (n_dendrites, 1 + n_spines)
    rate = 30.0 if _uniform((), generator) < 0.3 else float(_log_uniform((), FRAME_RATES, generator))
    bins = max(1, math.ceil(FINE_RATE / rate))
    fine = _trains(shape, n_frames * bins, rate * bins, generator)
    theta = _parameters(model, shape, generator)
    clean = model.per_frame(fine, theta, rate, bins)
    clean = _saturate(clean, generator)
    observed = clean + _drift(clean, rate, generator) + _noise(clean, theta, rate, generator)
    return Dendrites(_lose_frames(observed, generator), fine.unflatten(-1, (-1, bins)).sum(-1), rate)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _log_uniform(shape: tuple[int, ...], span: tuple[float, float], generator: torch.Generator) -> Tensor:
    return _uniform(shape, generator, math.log(span[0]), math.log(span[1])).exp()


def _trains(shape: tuple[int, int], n_bins: int, bin_rate: float, generator: torch.Generator) -> Tensor:
    """(dendrite, compartment, bin) counts: action potentials, then the inputs of each spine."""
    mean = _log_uniform(shape, SYNAPTIC_RATES, generator)
    mean[:, 0] = _log_uniform(shape[:1], BAP_RATES, generator)
    onset, duration = _log_uniform(shape, (0.05, 0.5), generator), _log_uniform(shape, (0.1, 3.0), generator)
    factor = torch.where(_uniform(shape, generator) < 0.5, 1.0, _log_uniform(shape, (2.0, 20.0), generator))
    share = onset * duration / (1 + onset * duration)
    # In more than half of the trains events come in bursts of milliseconds, besides.
    again = 0.5 * _uniform(shape, generator) * (_uniform(shape, generator) < 0.6)
    quiet = (1 - again) * mean / (1 + share * (factor - 1))
    counts = BurstyPrior(quiet, factor * quiet, onset, duration).sample((*shape, n_bins), bin_rate, generator)
    counts = _follow(counts, again, _log_uniform(shape, (0.003, 0.03), generator) * bin_rate, generator)
    # In a quarter of the dendrites some inputs are there just when the cell fires.
    coincident = 0.4 * _uniform(shape, generator) * (_uniform(shape[:1], generator) < 0.25)[:, None]
    coincident[:, 0] = 0
    also = _uniform(counts.shape, generator) < coincident[..., None]
    return counts + also * counts[:, :1].clamp_max(1)


def _follow(counts: Tensor, again: Tensor, bins: Tensor, generator: torch.Generator) -> Tensor:
    """Let events be followed by up to three more, each with probability ``again``, ``bins`` after the one before."""
    total, last = counts, counts
    earlier = torch.arange(counts.shape[-1]) - bins.round().long()[..., None]
    for _ in range(3):
        last = torch.where(earlier >= 0, last.gather(-1, earlier.clamp_min(0)), 0)
        last = last * (_uniform(last.shape, generator) < again[..., None])
        total = total + last
    return total


def _parameters(model: DendriticSpine, shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    centre = torch.tensor([p.centre for p in model.parameters])
    spread = torch.tensor([p.spread for p in model.parameters])
    common, own = (torch.randn((*n, len(centre)), generator=generator) for n in ((shape[0], 1), shape))
    # The indicator is the same for both kinds of response: so is half of what the compartments share.
    kinds = common.clone()
    kinds[..., 3:5] = math.sqrt(0.5) * common[..., :2] + math.sqrt(0.5) * common[..., 3:5]
    theta = model.constrain(centre + spread * (math.sqrt(ALIKE) * kinds + math.sqrt(1 - ALIKE) * own))
    bap = _log_uniform(shape, BAP_SHARE, generator)
    bap[:, 0] = 1.0
    snr = _log_uniform(shape, SPINE_SNR, generator)
    snr[:, 0] = _log_uniform(shape[:1], SHAFT_SNR, generator)
    ones = torch.ones(shape)
    return theta | {
        "amplitude": bap,
        "synaptic_amplitude": ones,
        "baseline": torch.zeros(shape),
        "noise_density": ones / snr,
    }


def _saturate(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Let some dendrites' fluorescence saturate, at 1.5 to 10 times what its highest frames reach."""
    peak = clean.quantile(0.995, -1, keepdim=True).clamp_min(1e-3)
    level = peak * _log_uniform((*clean.shape[:2], 1), (1.5, 10.0), generator)
    chosen = _uniform((len(clean), 1, 1), generator) < 0.3
    return torch.where(chosen, clean / (1 + clean / level), clean)


def _drift(clean: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Slow waves of each compartment, and some that all have in common as neuropil does."""
    n, c, n_frames = clean.shape
    time = torch.arange(n_frames) / rate
    size = (clean.quantile(0.995, -1, keepdim=True) - clean.median(-1, keepdim=True).values).clamp_min(0.3)
    total = torch.zeros_like(clean)
    for rows, fastest, chance, depth in ((c, 15.0, 0.6, 0.15), (1, 2.0, 0.3, 0.1)):
        waves = torch.zeros(n, rows, n_frames)
        for _ in range(3):
            period = _log_uniform((n, rows, 1), (fastest, 300.0), generator)
            phase = _uniform((n, rows, 1), generator)
            height = torch.randn((n, rows, 1), generator=generator)
            waves = waves + height * torch.sin(2 * math.pi * (time / period + phase))
        chosen = _uniform((n, 1, 1), generator) < chance
        total = total + chosen * depth * _uniform((n, c, 1), generator) * size * waves
    return total


def _noise(clean: Tensor, theta: dict[str, Tensor], rate: float, generator: torch.Generator) -> Tensor:
    """White noise, in a third of the dendrites larger where fluorescence is."""
    growth = 2 * _uniform((len(clean), 1, 1), generator) * (_uniform((len(clean), 1, 1), generator) < 0.33)
    sd = theta["noise_density"][..., None] * math.sqrt(rate) * torch.sqrt(1 + growth * clean.clamp_min(0))
    return sd * torch.randn(clean.shape, generator=generator)


def _lose_frames(observed: Tensor, generator: torch.Generator) -> Tensor:
    """Mark a stretch of frames as missing in all compartments, one dendrite in twelve."""
    n_frames = observed.shape[-1]
    start, length = _uniform((len(observed), 1, 1), generator, 0, n_frames), n_frames / 8
    frames = torch.arange(n_frames)
    lost = (frames >= start) & (frames < start + length) & (_uniform((len(observed), 1, 1), generator) < 1 / 12)
    return observed.masked_fill(lost, torch.nan)
