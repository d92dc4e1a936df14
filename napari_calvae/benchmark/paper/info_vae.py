"""InfoVAE (Zhao, Song & Ermon 2019) against the evidence lower bound, on simulated cells."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from napari_calvae import objectives
from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.generative import LinearAR, SpikePrior
from napari_calvae.recognition import FactorizedNetwork, RecognitionNetwork, SpikePosterior
from napari_calvae.training import TrainConfig, iter_train

_RATE, _FRAMES = 20.0, 96
#: θ of the cell in the middle.
_CELL = {"tau_rise": 0.04, "tau_decay": 0.5, "amplitude": 0.3, "baseline": 0.0, "noise_density": 0.02}
#: The mutual information is that of so many frames in the middle of a window, where its estimate is not at its limit.
_PIECE = slice(44, 52)
#: Criteria by name: α and weight of `objectives.info_vae`, None for the bound itself.
_CRITERIA: dict[str, tuple[float, float] | None] = {
    "ELBO": None,
    "InfoVAE, α = 0, weight 10³": (0.0, 1e3),
    "InfoVAE, α = 0, weight 10⁴": (0.0, 1e4),
    "InfoVAE, α = 0, weight 10⁵": (0.0, 1e5),
    "MMD-VAE (α = 1), weight 10⁴": (1.0, 1e4),
}


@dataclass(frozen=True)
class _Size:
    n_train: int = 384
    n_held_out: int = 192
    n_start: int = 60
    n_steps: int = 250
    n_samples: int = 12
    batch: int = 16
    n_seeds: int = 3


@dataclass(frozen=True, eq=False)
class _Cells:
    """Windows of simulated cells of known θ, (cell, time)."""

    dff: Tensor
    counts: Tensor
    theta: dict[str, Tensor]

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> _Cells:
        """Cells at 1 spike/s that differ from `_CELL` by a third of the prior's spread."""
        model = LinearAR()
        around = model.unconstrain({name: torch.tensor(value) for name, value in _CELL.items()})
        drawn = model.unconstrain(model.sample_prior(n, generator))
        centre = model.unconstrain({p.name: torch.tensor(p.median) for p in model.parameters})
        theta = model.constrain(around + (drawn - centre) / 3)
        counts = _prior().sample((n, _FRAMES), _RATE, generator)
        return cls(model.simulate(counts, theta, _RATE, generator), counts, theta)

    def log_likelihood(self, trains: Tensor, rows: Tensor) -> Tensor:
        """(sample, cell) log p(F | s, θ)."""
        theta = {name: value[rows] for name, value in self.theta.items()}
        return LinearAR().log_prob(self.dff[rows], trains, theta, _RATE)


def _prior() -> SpikePrior:
    return SpikePrior(1.0, 3)


def _run(setting: Setting) -> Iterator[Row]:
    size = _Size(24, 12, 3, 3, 3, 4, 1) if setting.quick else _Size()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("start (simulations)", *_CRITERIA)}
    for seed in range(setting.seed, setting.seed + size.n_seeds):
        generator = torch.Generator().manual_seed(seed)
        train, held_out = _Cells.draw(size.n_train, generator), _Cells.draw(size.n_held_out, generator)
        start = _start(size, seed)
        found["start (simulations)"].append(_measure(start, held_out, size.n_samples))
        for name, criterion in _CRITERIA.items():
            network = copy.deepcopy(start)
            config = TrainConfig(n_steps=size.n_steps, learning_rate=1e-3, seed=seed)
            for _ in iter_train(network, _Loss(network, train, criterion, size), config):
                pass
            found[name].append(_measure(network, held_out, size.n_samples))
    for name, seeds in found.items():
        row: Row = {"criterion": name, "seeds": len(seeds)}
        for key in seeds[0]:
            values = [one[key] for one in seeds]
            row |= {key: float(np.mean(values)), f"± {key.split(' (')[0]}": float(np.std(values))}
        yield row


class _Loss:
    """One step of a criterion on some of the training cells; without one, the bound."""

    def __init__(
        self, network: RecognitionNetwork, cells: _Cells, criterion: tuple[float, float] | None, size: _Size
    ) -> None:
        self.network, self.cells, self.criterion, self.size = network, cells, criterion, size

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(self.cells.dff), (self.size.batch,), generator=generator)
        posterior = self.network(self.cells.dff[rows], _RATE)
        trains = posterior.sample(self.size.n_samples, generator).float()
        log_q, log_prior = posterior.log_prob(trains), _prior().log_prob(trains, _RATE)
        log_p = self.cells.log_likelihood(trains, rows)
        if self.criterion is None:
            return objectives.elbo(log_p + log_prior, log_q) / _FRAMES, {}
        alpha, weight = self.criterion
        other = _prior().sample((64, _FRAMES), _RATE, generator)
        apart = objectives.mmd(log_q, objectives.window_counts(trains), objectives.window_counts(other))
        return objectives.info_vae(log_p, log_prior, log_q, apart, alpha, weight) / _FRAMES, {}


def _start(size: _Size, seed: int) -> RecognitionNetwork:
    """A small network after few steps on pairs drawn from the model: where all criteria begin."""
    torch.manual_seed(seed)
    network = FactorizedNetwork(widths=(8, 16, 16), max_count=3)

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        cells = _Cells.draw(4 * size.batch, generator)
        return objectives.supervised(network(cells.dff, _RATE).log_prob(cells.counts), _FRAMES), {}

    for _ in iter_train(network, loss, TrainConfig(n_steps=size.n_start, learning_rate=5e-3, seed=seed)):
        pass
    return network


@torch.no_grad()
def _measure(network: RecognitionNetwork, cells: _Cells, n: int) -> dict[str, float]:
    """What a network is worth on cells that it has not seen."""
    generator = torch.Generator().manual_seed(0)
    posterior, rows = network(cells.dff, _RATE), torch.arange(len(cells.dff))
    trains = posterior.sample(n, generator).float()
    log_weight = cells.log_likelihood(trains, rows) + _prior().log_prob(trains, _RATE) - posterior.log_prob(trains)
    seconds = _FRAMES / _RATE
    mean, truth = posterior.mean.flatten(), cells.counts.flatten()
    few = trains[:4]
    other = objectives.window_counts(_prior().sample((256, _FRAMES), _RATE, generator))
    apart = objectives.mmd(posterior.log_prob(few), objectives.window_counts(few), other)
    # Few wild samples make up most of a mean of log-weights: its median over cells is told beside it.
    return {
        "bound (nats/s)": float(log_weight.mean()) / seconds,
        "its median over cells": float(log_weight.mean(0).median()) / seconds,
        f"bound of {n} samples (nats/s)": -float(objectives.iwae(log_weight, torch.zeros_like(log_weight))) / seconds,
        "correlation": float(torch.corrcoef(torch.stack([mean, truth]))[0, 1]),
        "spikes/s": float(mean.mean()) * _RATE,
        "discrepancy from the prior (10⁻³)": 1e3 * float(apart),
        "information (nats)": _information(posterior, trains[0]),
    }


def _information(posterior: SpikePosterior, trains: Tensor) -> float:
    """Between fluorescence and the spikes of `_PIECE` under q: E[log q(s | F) − log E_F′ q(s | F′)]."""
    inside = torch.zeros(len(trains), _FRAMES, dtype=torch.bool)
    inside[:, _PIECE] = True
    pairs = posterior.log_prob(trains[:, None].expand(-1, len(trains), -1), inside)  # [train, cell it is judged by]
    return float((pairs.diagonal() - torch.logsumexp(pairs, 1) + math.log(len(trains))).mean())


PROOF = Proof(
    "info_vae",
    "InfoVAE against the evidence lower bound",
    "One small network, trained on simulated cells of known θ by either criterion from the same start, judged on other "
    "cells: means and standard deviations over three seeds. InfoVAE is to bring the pooled posterior closer to the "
    "prior, to keep more information on the spikes, and not to cost correlation; the bound is what ELBO is made for.",
    _run,
)
