"""Losses of one training step on random snippets of a recording, one class per objective."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from napari_calvae import objectives
from napari_calvae.generative import SpikePrior
from napari_calvae.recognition import CHUNK, RecognitionNetwork, SpikePosterior
from napari_calvae.recognition.autoregressive import AutoregressivePosterior
from napari_calvae.recognition.base import trace_features
from napari_calvae.recording import Traces
from napari_calvae.training import TrainConfig
from napari_calvae.vae import SpikeVAE

#: Lowest rate (Hz) that a cell's prior may have.
MIN_RATE = 0.02
#: Snippets with a smaller share of measured frames are not drawn where others are to be had.
_LEAST_MEASURED = 0.5
#: Frames of all ROIs that expected counts are worked out for at once.
_BLOCK_FRAMES = 65_536
#: Frames of each trace, and gradient steps, that the first guess of θ is improved with.
_START_FRAMES, _START_STEPS = 4000, 40
#: Samples that stand for the mean of an autoregressive posterior at the start of a fit.
_N_EXPECTED = 16
#: Frames around a snippet that the network summarises.
_SUMMARY = 2048


class Snippets:
    """Random pieces of the traces, all of one length.

    Attributes
    ----------
    observed, valid
        (roi, time) ΔF/F and the frames that were measured.
    frame_rate
        Frames per second (Hz).
    features
        (roi, channel, time) of the whole traces.
    """

    def __init__(self, dff: Traces, config: TrainConfig) -> None:
        self.observed = torch.from_numpy(dff.values.copy())
        self.valid = torch.from_numpy(dff.valid.copy())
        self.frame_rate = dff.frame_rate
        self.features = trace_features(self.observed, self.valid)
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

    def posterior(self, network: RecognitionNetwork, index: tuple[Tensor, Tensor]) -> SpikePosterior:
        """What a network says of snippets that it sees in units of their whole traces, as it will in inference.

        It summarises `_SUMMARY` frames around each snippet; beyond the snippet it sees nothing else.
        """
        rows, frames = index
        n_frames = self.features.shape[-1]
        wide = max(self.window, min(_SUMMARY, n_frames))
        first = (frames[:, :1] - (wide - self.window) // 2).clamp(0, n_frames - wide)
        channels = torch.arange(self.features.shape[1])[:, None]
        log_rate = torch.full((len(rows),), math.log(self.frame_rate))
        around = self.features[rows[..., None], channels, (first + torch.arange(wide))[:, None]]
        summary = network.summarise(around, log_rate)
        local = network.local(self.features[rows[..., None], channels, frames[:, None]], log_rate, summary)
        return network.posterior(local[..., : frames.shape[-1]], log_rate, summary)


def expected(posterior: SpikePosterior, snippets: Snippets) -> Float[Tensor, "roi time"]:
    """Expected counts of all traces, a few ROIs at a time; of trains that know their own spikes, from a few samples."""
    n_rois, n_frames = snippets.observed.shape
    step = max(1, _BLOCK_FRAMES // n_frames)
    parts = [posterior.select(slice(k, k + step)) for k in range(0, n_rois, step)]
    if not isinstance(posterior, AutoregressivePosterior):
        return torch.cat([part.mean for part in parts])
    generator = torch.Generator().manual_seed(0)
    return torch.cat([part.sample(_N_EXPECTED, generator).float().mean(0) for part in parts])


def mean_rate(
    mean: Float[Tensor, "roi time"], valid: Bool[Tensor, "roi time"], frame_rate: float
) -> Float[Tensor, " roi"]:
    """Expected spikes per second (Hz) over the measured frames, where alone a network's answer says something."""
    return (mean * valid).sum(-1) / valid.sum(-1).clamp_min(1) * frame_rate


class Cells(nn.Module):
    """θ and prior rate of every cell: steps away from a first guess, in units of their priors' spreads.

    Parameters
    ----------
    start, spread
        (roi, parameter) unconstrained θ to begin with, and (parameter,) its prior's spread.
    rates, rate_spread
        (roi,) median (Hz) and spread (of the logarithm) of the log-normal prior of each cell's rate, which is where
        the rate begins, too.
    shared
        (parameter,) which parameters all cells have in common; by default none.
    """

    shared: Tensor
    start: Tensor
    spread: Tensor
    log_rate: Tensor

    def __init__(
        self,
        start: Float[Tensor, "roi parameter"],
        spread: Tensor,
        rates: Float[Tensor, " roi"],
        rate_spread: float,
        shared: Bool[Tensor, " parameter"] | None = None,
    ) -> None:
        super().__init__()
        shared = torch.zeros(len(spread), dtype=torch.bool) if shared is None else shared
        start = torch.where(shared, start.median(0).values, start)
        self.register_buffer("shared", shared, persistent=False)
        self.register_buffer("start", start)
        self.register_buffer("spread", spread)
        self.register_buffer("log_rate", rates.clamp_min(MIN_RATE).log())
        self.rate_spread = rate_spread
        self.move = nn.Parameter(torch.zeros_like(start))
        self.rate_move = nn.Parameter(torch.zeros_like(rates))

    def forward(self, rows: Tensor) -> Tensor:
        """Unconstrained θ of some cells."""
        move = torch.where(self.shared, self.move.mean(0), self.move)
        return (self.start + self.spread * move)[rows]

    def rates(self, rows: Tensor) -> Float[Tensor, " cell"]:
        """Spikes per second (Hz) of the prior of some cells."""
        return torch.exp(self.log_rate + self.rate_spread * self.rate_move)[rows].clamp_min(MIN_RATE)

    def log_prior_rate(self, rows: Tensor) -> Float[Tensor, " cell"]:
        """Log-density of the rates, in units of their spread."""
        return -0.5 * self.rate_move[rows] ** 2


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
    """Minus the importance-weighted bound per frame over network, θ and rates, by VIMCO or reweighted wake-sleep.

    The gauge (twice the spikes at half the amplitude) is anchored by two explicit priors: log-normal around the rate
    that the network gave each cell at the start (`TrainConfig.rate_spread`), and that of the generative model for the
    amplitude.

    The margins of a snippet (`TrainConfig.margin`) are context. What fired before it still glows at its beginning:
    those frames are not asked to be explained. Spikes in either margin are drawn, since they glow in other frames, but
    count neither in p nor in q. So the bound is that on the fluorescence behind the first margin, with a spike prior
    that is q itself in the margins, held as it is: no gradient passes through them.

    Parameters
    ----------
    model
        What is trained; its network must be the one that the rates are to be taken from.
    snippets
        The recording.
    config
        Number of samples, margins and the rates' prior.
    objective
        `objectives.vimco` or `objectives.wake_sleep`.
    rows
        Indices of the cells to draw snippets of, by default all.
    cells
        θ and rates to go on from, by default a first guess from what the network expects.
    """

    def __init__(
        self,
        model: SpikeVAE,
        snippets: Snippets,
        config: TrainConfig,
        objective: Callable[[Tensor, Tensor], Tensor] = objectives.vimco,
        *,
        rows: Tensor | None = None,
        cells: Cells | None = None,
    ) -> None:
        self.model, self.snippets, self.n_samples = model, snippets, config.n_samples
        self.objective, self.rows = objective, rows
        self.cells = self._first_guess(config) if cells is None else cells
        before = round(config.margin * snippets.window)
        self.counted = slice(before, snippets.window - before // 2)
        self.n_counted = self.counted.stop - self.counted.start

    def _first_guess(self, config: TrainConfig) -> Cells:
        model, snippets, rate = self.model, self.snippets, self.snippets.frame_rate
        with torch.no_grad():
            mean = expected(model.recognition(snippets.observed, rate, snippets.valid, chunk=CHUNK), snippets)
            # Whole spikes: fractions of one, spread over frames, make another response where calcium acts together.
            counts = torch.floor(mean.double().cumsum(-1) + 0.5).diff(dim=-1, prepend=mean.new_zeros(len(mean), 1))
            counts = counts.to(mean.dtype)
            theta = model.generative.initial_theta(snippets.observed, counts, rate, snippets.valid)
        few = slice(0, _START_FRAMES)
        theta = model.generative.fit_theta(
            snippets.observed[:, few], counts[:, few], rate, snippets.valid[:, few], theta, _START_STEPS
        )
        parameters = model.generative.parameters
        spread = torch.tensor([p.spread for p in parameters])
        shared = torch.tensor([p.kinetic and config.shared_kinetics for p in parameters])
        rates = mean_rate(mean, snippets.valid, rate)
        return Cells(model.generative.unconstrain(theta), spread, rates, config.rate_spread, shared)

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and terms of one step."""
        index = self.snippets.draw(generator, self.rows)
        log_joint, log_posterior, theta = self.weights(index, generator)
        bound = -self.objective(log_joint, log_posterior)
        share = torch.softmax((log_joint - log_posterior).detach(), 0)
        terms = {"effective_samples": float((1 / (share**2).sum(0)).mean())}
        loss, told = self.with_prior(bound, index[0][:, 0], theta)
        return loss, told | terms

    def with_prior(
        self, bound: Float[Tensor, ""], rows: Tensor, theta: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss per frame from a bound on some cells' fluorescence and the log-prior of what is learned of them."""
        log_prior = self.log_prior(rows, theta)
        terms = {
            "bound": float(bound.detach()),
            "log_prior": float(log_prior.detach()),
            "rate": float(self.cells.rates(rows).detach().median()),
        }
        return -(bound + log_prior) / self.n_counted, terms | medians(theta)

    def weights(
        self, index: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sample, snippet) log p(F, s | θ) and log q(s | F) of trains from q, and θ of each snippet."""
        counts, log_posterior = self.draw(index, generator)
        theta = self.theta(index)
        return self.log_joint(index, counts, theta), log_posterior, theta

    def draw(self, index: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(sample, snippet, time) trains from q, and (sample, snippet) log q of them, their margins aside."""
        posterior = self.snippets.posterior(self.model.recognition, index)
        if isinstance(posterior, AutoregressivePosterior):
            counts, each = posterior.draw(self.n_samples, generator)
            log_posterior = each[..., self.counted].sum(-1)
        else:
            with torch.no_grad():
                counts = posterior.sample(self.n_samples, generator)
            counted = torch.zeros(index[1].shape, dtype=torch.bool)
            counted[:, self.counted] = True
            log_posterior = posterior.log_prob(counts, counted)
        return counts.to(self.snippets.observed.dtype), log_posterior

    def theta(self, index: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Physical parameters of each snippet's cell."""
        return self.model.generative.constrain(self.cells(index[0][:, 0]))

    def prior(self, index: tuple[Tensor, Tensor]) -> SpikePrior:
        """What is believed of the spikes of each snippet's cell."""
        return SpikePrior(rate=self.cells.rates(index[0][:, 0]), max_count=self.model.recognition.max_count)

    def log_joint(self, index: tuple[Tensor, Tensor], counts: Tensor, theta: dict[str, Tensor]) -> Tensor:
        """(…, snippet) log p(s) + log p(F | s, θ) of snippets, their margins aside."""
        rate = self.snippets.frame_rate
        explained = self.snippets.valid[index].clone()
        explained[:, : self.counted.start] = False
        return self.prior(index).log_prob(counts[..., self.counted], rate) + self.model.generative.log_prob(
            self.snippets.observed[index], counts, theta, rate, explained
        )

    def log_prior(self, rows: Tensor, theta: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Log-prior of θ and rates of some cells, as much of it as the counted frames are of the recording."""
        share = self.n_counted / self.snippets.observed.shape[-1]
        return (self.model.generative.log_prior(theta) + self.cells.log_prior_rate(rows)).mean() * share


class InfoVAELoss:
    """The evidence lower bound, and the spikes of all cells together like their prior's: InfoVAE with α = 0, per frame.

    Parameters
    ----------
    bound
        The bound, whose own objective is not used.
    weight
        Of the discrepancy (`objectives.mmd` of `objectives.window_counts`), in nats per snippet.
    """

    def __init__(self, bound: BoundLoss, weight: float) -> None:
        self.bound, self.weight = bound, weight

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and terms of one step."""
        bound = self.bound
        index = bound.snippets.draw(generator, bound.rows)
        counts, log_posterior = bound.draw(index, generator)
        theta = bound.theta(index)
        log_joint = bound.log_joint(index, counts, theta)
        counted = counts[..., bound.counted]
        drawn = bound.prior(index).sample(tuple(counted.shape), bound.snippets.frame_rate, generator)
        discrepancy = objectives.mmd(
            log_posterior, objectives.window_counts(counted), objectives.window_counts(drawn).flatten(0, 1)
        )
        elbo = -objectives.elbo(log_joint, log_posterior)
        loss, terms = bound.with_prior(elbo, index[0][:, 0], theta)
        loss = loss + self.weight * discrepancy / bound.n_counted
        return loss, terms | {"discrepancy": float(discrepancy.detach())}


class SemiSupervisedLoss:
    """The truth for cells whose spikes are known, a bound for the rest (`objectives.semi_supervised`), per frame."""

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
        theta = bound.theta(index)
        log_joint = bound.log_joint(index, counts, theta)
        # The truth of the margins is known as well; it counts as much as if it were that of the other frames alone.
        n_frames = bound.n_counted
        log_q = bound.snippets.posterior(bound.model.recognition, index).log_prob(counts, valid)
        log_posterior = log_q * n_frames / counts.shape[-1]
        unlabelled, terms = torch.zeros(()), medians(theta)
        prior = bound.log_prior(index[0][:, 0], theta) * self.share
        if len(bound.rows if bound.rows is not None else ()):
            others = bound.snippets.draw(generator, bound.rows)
            weights, their_log_q, their_theta = bound.weights(others, generator)
            unlabelled = bound.objective(weights, their_log_q)
            terms = {"bound": -float(unlabelled.detach()), **medians(their_theta)}
            prior = prior + bound.log_prior(others[0][:, 0], their_theta) * (1 - self.share)
        loss = objectives.semi_supervised(unlabelled, log_joint, log_posterior, self.share, self.weight)
        terms["log_truth"] = float(log_q.detach().mean())
        return (loss - prior) / n_frames, terms


def medians(theta: dict[str, Tensor]) -> dict[str, float]:
    """Median of each parameter, to report."""
    return {name: float(value.detach().median()) for name, value in theta.items()}
