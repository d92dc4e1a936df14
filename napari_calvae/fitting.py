"""Fit a model to one recording: with true spikes, or without by maximising a bound on the evidence."""

from __future__ import annotations

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from napari_calvae import objectives
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.training import Loss, TrainConfig, TrainRecord, iter_train
from napari_calvae.vae import SpikeVAE, load_model

Objective = Literal["vimco", "supervised"]


def fit(
    traces: Traces,
    base: str | Path | SpikeVAE = "universal",
    objective: Objective = "vimco",
    *,
    spikes: np.ndarray | None = None,
    generative: str | None = None,
    config: TrainConfig | None = None,
) -> SpikeVAE:
    """Fit a model to a recording; see ``iter_fit``, which reports every step."""
    steps = iter_fit(traces, base, objective, spikes=spikes, generative=generative, config=config)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def iter_fit(
    traces: Traces,
    base: str | Path | SpikeVAE = "universal",
    objective: Objective = "vimco",
    *,
    spikes: np.ndarray | None = None,
    generative: str | None = None,
    config: TrainConfig | None = None,
) -> Generator[TrainRecord, None, SpikeVAE]:
    """Fit recognition network and generative model to a recording; yields a record per step and returns the model.

    Parameters
    ----------
    traces
        (roi, time) fluorescence.
    base
        Where to start: a shipped model, a file or a ``SpikeVAE``. It is left as it is.
    objective
        ``"vimco"``: unsupervised, the importance-weighted bound (Mnih & Rezende 2016) over network and per-cell θ.
        ``"supervised"``: the log-probability of ``spikes``.
    spikes
        (roi, time) true counts per frame, for the supervised objective.
    generative
        Name in ``generative.MODELS``; by default the one of ``base``.
    config
        How to train.

    Raises
    ------
    RecordingError
        If traces and settings do not go together.
    """
    config = config or TrainConfig()
    model = copy.copy(load_model(base))
    model.recognition = copy.deepcopy(model.recognition)
    if generative is not None:
        model.generative, model.theta = _model_named(generative), {}
    dff = model.preprocessing.apply(traces)
    snippets = _Snippets(dff, config)
    torch.manual_seed(config.seed)
    if objective == "supervised":
        truth = _check_spikes(spikes, dff)
        loss: Loss = _SupervisedLoss(model, snippets, truth)
        trained: nn.Module = model.recognition
    elif objective == "vimco":
        loss = _VimcoLoss(model, snippets, config)
        trained = nn.ModuleList([model.recognition, loss.cells])
    else:
        raise RecordingError(f"objective: expected 'vimco' or 'supervised', got {objective!r}.")
    yield from iter_train(trained, loss, config)
    model.description = f"{model.description}; fitted by {objective}, {config.n_steps} steps, seed {config.seed}"
    model.sha256 = ""
    return model


class _Snippets:
    """Random pieces of the traces, all of one length."""

    def __init__(self, dff: Traces, config: TrainConfig) -> None:
        self.observed = torch.from_numpy(dff.values.copy())
        self.valid = torch.from_numpy(dff.valid.copy())
        self.frame_rate = dff.frame_rate
        self.window = min(config.window, dff.n_frames)
        self.batch = config.batch

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(snippet, 1) rows and (snippet, time) frames, to index (roi, time) arrays with."""
        rows = torch.randint(len(self.observed), (self.batch, 1), generator=generator)
        last = self.observed.shape[1] - self.window
        starts = torch.randint(last + 1, (self.batch, 1), generator=generator)
        return rows, starts + torch.arange(self.window)


class _SupervisedLoss:
    """Minus log q of the true counts, per frame."""

    def __init__(self, model: SpikeVAE, snippets: _Snippets, truth: Tensor) -> None:
        self.network, self.snippets = model.recognition, snippets
        self.truth = truth.clamp_max(model.recognition.max_count)

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = self.snippets.draw(generator)
        valid = self.snippets.valid[index]
        posterior = self.network(self.snippets.observed[index], self.snippets.frame_rate, valid)
        return objectives.supervised(posterior.log_prob(self.truth[index], valid), valid.sum(-1)), {}


class _Cells(nn.Module):
    """θ of every cell: steps away from a first guess, in units of the prior's spread."""

    start: Tensor
    unit: Tensor

    def __init__(self, start: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        # Ten times the spread, so that cells move faster than the weights of the network at one learning rate.
        self.register_buffer("unit", 10 * spread)
        self.move = nn.Parameter(torch.zeros_like(start))

    def forward(self, rows: Tensor) -> Tensor:
        return (self.start + self.unit * self.move)[rows]


class _VimcoLoss:
    """Minus the importance-weighted bound per frame over network and θ.

    The gauge (twice the spikes at half the amplitude) is anchored twice: each cell's prior rate is the mean rate that
    the network gave it at the start, and its amplitude has the prior of the generative model.
    """

    def __init__(self, model: SpikeVAE, snippets: _Snippets, config: TrainConfig) -> None:
        self.model, self.snippets, self.n_samples = model, snippets, config.n_samples
        rate = snippets.frame_rate
        with torch.no_grad():
            mean = model.recognition(snippets.observed, rate, snippets.valid, chunk=65_536).mean
            theta = model.generative.initial_theta(snippets.observed, mean, rate, snippets.valid)
        self.rates = (mean.mean(-1) * rate).clamp_min(0.02)
        spread = torch.tensor([p.spread for p in model.generative.parameters])
        self.cells = _Cells(model.generative.unconstrain(theta), spread)
        # What fired before the snippet still glows in it: no spike that q can draw explains its first frames.
        self.warm_up = snippets.window // 4

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows, frames = self.snippets.draw(generator)
        rate = self.snippets.frame_rate
        observed, valid = self.snippets.observed[rows, frames], self.snippets.valid[rows, frames]
        posterior = self.model.recognition(observed, rate, valid)
        with torch.no_grad():
            counts = posterior.sample(self.n_samples, generator).to(observed.dtype)
        theta = self.model.generative.constrain(self.cells(rows[:, 0]))
        explained = valid.clone()
        explained[:, : self.warm_up] = False
        prior = SpikePrior(rate=self.rates[rows[:, 0]], max_count=self.model.recognition.max_count)
        log_joint = prior.log_prob(counts, rate) + self.model.generative.log_prob(
            observed, counts, theta, rate, explained
        )
        loss = objectives.vimco(log_joint, posterior.log_prob(counts))
        share = observed.shape[-1] / self.snippets.observed.shape[-1]
        theta_prior = self.model.generative.log_prior(theta).mean() * share
        medians = {name: float(value.detach().median()) for name, value in theta.items()}
        return (loss - theta_prior) / observed.shape[-1], {"bound": -float(loss.detach()), **medians}


def _model_named(name: str) -> Any:
    if name not in MODELS:
        raise RecordingError(f"generative model: expected one of {', '.join(MODELS)}, got {name!r}.")
    return MODELS[name]()


def _check_spikes(spikes: np.ndarray | None, dff: Traces) -> Tensor:
    if spikes is None:
        raise RecordingError(
            "spikes: the supervised objective expects true counts (roi, time), got none. Give spikes=…."
        )
    counts = np.atleast_2d(np.asarray(spikes))
    if counts.shape != dff.values.shape:
        raise RecordingError(
            f"spikes: expected counts of shape {dff.values.shape} like the traces, got {counts.shape}."
        )
    if not np.array_equal(counts, np.round(counts)) or counts.min() < 0:
        raise RecordingError("spikes: expected whole counts per frame, 0 or more. Bin the spike times first.")
    return torch.from_numpy(counts.astype(np.int64))
