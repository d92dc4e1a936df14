"""Losses of one training step on random snippets of a recording, one class per objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from napari_calvae import objectives
from napari_calvae.generative import SpikePrior
from napari_calvae.recognition import CHUNK
from napari_calvae.recording import Traces
from napari_calvae.training import TrainConfig
from napari_calvae.vae import SpikeVAE

#: Lowest rate (Hz) that a cell's prior may have.
MIN_RATE = 0.02
#: Snippets with a smaller share of measured frames are not drawn where others are to be had.
_LEAST_MEASURED = 0.5


class Snippets:
    """Random pieces of the traces, all of one length.

    Attributes
    ----------
    observed, valid
        (roi, time) ΔF/F and the frames that were measured.
    frame_rate
        Frames per second (Hz).
    """

    def __init__(self, dff: Traces, config: TrainConfig) -> None:
        self.observed = torch.from_numpy(dff.values.copy())
        self.valid = torch.from_numpy(dff.valid.copy())
        self.frame_rate = dff.frame_rate
        self.window = min(config.window, dff.n_frames)
        self.batch = config.batch

    def draw(self, generator: torch.Generator, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(snippet, 1) rows and (snippet, time) frames, to index (roi, time) arrays with; ``rows`` to choose from."""
        among = torch.arange(len(self.observed)) if rows is None else rows
        chosen = among[torch.randint(len(among), (4 * self.batch,), generator=generator)]
        starts = torch.randint(self.observed.shape[1] - self.window + 1, (4 * self.batch,), generator=generator)
        # Of four times as many, the first that hold enough data.
        frames = starts[:, None] + torch.arange(self.window)
        poor = self.valid[chosen[:, None], frames].float().mean(-1) < _LEAST_MEASURED
        kept = poor.int().argsort(stable=True)[: self.batch]
        return chosen[kept, None], frames[kept]


class Cells(nn.Module):
    """θ of every cell, (roi, parameter): steps away from a first guess, in units of the prior's spread."""

    start: Tensor
    spread: Tensor

    def __init__(self, start: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("spread", spread)
        self.move = nn.Parameter(torch.zeros_like(start))

    def forward(self, rows: Tensor) -> Tensor:
        """Unconstrained θ of some cells."""
        return (self.start + self.spread * self.move)[rows]


class SupervisedLoss:
    """Minus log q of the true counts, per frame."""

    def __init__(self, model: SpikeVAE, snippets: Snippets, truth: Tensor) -> None:
        self.network, self.snippets = model.recognition, snippets
        self.truth = truth.clamp_max(model.recognition.max_count)

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and terms of one step."""
        index = self.snippets.draw(generator)
        valid = self.snippets.valid[index]
        posterior = self.network(self.snippets.observed[index], self.snippets.frame_rate, valid)
        return objectives.supervised(posterior.log_prob(self.truth[index], valid), valid.sum(-1)), {}


class BoundLoss:
    """Minus the importance-weighted bound per frame over network and θ, by VIMCO or reweighted wake-sleep.

    The gauge (twice the spikes at half the amplitude) is anchored twice: each cell's prior rate is the mean rate that
    the network gave it at the start, and its amplitude has the prior of the generative model.

    Parameters
    ----------
    model
        What is trained; its network must be the one that the rates are to be taken from.
    snippets
        The recording.
    config
        Number of samples.
    objective
        `objectives.vimco` or `objectives.wake_sleep`.
    rows
        Indices of the cells to draw snippets of, by default all.
    """

    def __init__(
        self,
        model: SpikeVAE,
        snippets: Snippets,
        config: TrainConfig,
        objective: Callable[[Tensor, Tensor], Tensor] = objectives.vimco,
        rows: Tensor | None = None,
    ) -> None:
        self.model, self.snippets, self.n_samples = model, snippets, config.n_samples
        self.objective, self.rows = objective, rows
        rate = snippets.frame_rate
        with torch.no_grad():
            mean = model.recognition(snippets.observed, rate, snippets.valid, chunk=CHUNK).mean
            theta = model.generative.initial_theta(snippets.observed, mean, rate, snippets.valid)
        self.rates = (mean.mean(-1) * rate).clamp_min(MIN_RATE)
        spread = torch.tensor([p.spread for p in model.generative.parameters])
        self.cells = Cells(model.generative.unconstrain(theta), spread)
        # What fired before the snippet still glows in it: no spike that q can draw explains its first frames.
        self.warm_up = snippets.window // 4

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and terms of one step."""
        index = self.snippets.draw(generator, self.rows)
        log_joint, log_posterior, theta = self.weights(index, generator)
        loss = self.objective(log_joint, log_posterior)
        n_frames = index[1].shape[-1]
        theta_prior = self.theta_prior(theta, n_frames)
        return (loss - theta_prior) / n_frames, {"bound": -float(loss.detach()), **medians(theta)}

    def weights(
        self, index: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sample, snippet) log p(F, s | θ) and log q(s | F) of trains from q, and θ of each snippet."""
        observed, valid = self.snippets.observed[index], self.snippets.valid[index]
        posterior = self.model.recognition(observed, self.snippets.frame_rate, valid)
        with torch.no_grad():
            counts = posterior.sample(self.n_samples, generator).to(observed.dtype)
        theta = self.model.generative.constrain(self.cells(index[0][:, 0]))
        return self.log_joint(index, counts, theta), posterior.log_prob(counts), theta

    def log_joint(self, index: tuple[Tensor, Tensor], counts: Tensor, theta: dict[str, Tensor]) -> Tensor:
        """(…, snippet) log p(s) + log p(F | s, θ) of snippets, their first frames aside."""
        rate = self.snippets.frame_rate
        explained = self.snippets.valid[index].clone()
        explained[:, : self.warm_up] = False
        prior = SpikePrior(rate=self.rates[index[0][:, 0]], max_count=self.model.recognition.max_count)
        return prior.log_prob(counts, rate) + self.model.generative.log_prob(
            self.snippets.observed[index], counts, theta, rate, explained
        )

    def theta_prior(self, theta: dict[str, Tensor], n_frames: int) -> Tensor:
        """Log-prior of θ, as much of it as a snippet is of the recording."""
        share = n_frames / self.snippets.observed.shape[-1]
        return self.model.generative.log_prior(theta).mean() * share


class SemiSupervisedLoss:
    """The truth for cells whose spikes are known, VIMCO for the rest (`objectives.semi_supervised`), per frame."""

    def __init__(self, bound: BoundLoss, truth: Tensor, labelled: Tensor, weight: float) -> None:
        self.bound, self.weight = bound, weight
        self.truth = truth.clamp_max(bound.model.recognition.max_count)
        self.labelled = labelled.nonzero()[:, 0]
        self.share = float(labelled.float().mean())
        bound.rows = (~labelled).nonzero()[:, 0]

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and terms of one step."""
        bound = self.bound
        index = bound.snippets.draw(generator, self.labelled)
        counts, valid = self.truth[index], bound.snippets.valid[index]
        theta = bound.model.generative.constrain(bound.cells(index[0][:, 0]))
        log_joint = bound.log_joint(index, counts, theta)
        posterior = bound.model.recognition(bound.snippets.observed[index], bound.snippets.frame_rate, valid)
        log_posterior = posterior.log_prob(counts, valid)
        unlabelled, terms = torch.zeros(()), medians(theta)
        prior = bound.theta_prior(theta, counts.shape[-1]) * self.share
        if len(bound.rows if bound.rows is not None else ()):
            others = bound.snippets.draw(generator, bound.rows)
            weights, log_q, their_theta = bound.weights(others, generator)
            unlabelled = bound.objective(weights, log_q)
            terms = {"bound": -float(unlabelled.detach()), **medians(their_theta)}
            prior = prior + bound.theta_prior(their_theta, counts.shape[-1]) * (1 - self.share)
        loss = objectives.semi_supervised(unlabelled, log_joint, log_posterior, self.share, self.weight)
        terms["log_truth"] = float(log_posterior.detach().mean())
        return (loss - prior) / counts.shape[-1], terms


def medians(theta: dict[str, Tensor]) -> dict[str, float]:
    """Median of each parameter, to report."""
    return {name: float(value.detach().median()) for name, value in theta.items()}
