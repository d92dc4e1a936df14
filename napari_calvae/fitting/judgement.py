"""Whether a model that was fitted without true spikes is to be kept: decided on cells that training did not see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from napari_calvae import objectives
from napari_calvae.fitting.losses import BoundLoss, Snippets
from napari_calvae.fitting.sleep import Dreams
from napari_calvae.metrics import score_correlation, smooth_spikes
from napari_calvae.recording import Traces
from napari_calvae.training import TrainConfig
from napari_calvae.vae import SpikeVAE

#: Share of the cells that are held out, at least one; of one cell's time where it is the only one.
HELD_OUT_CELLS, HELD_OUT_TIME = 0.2, 0.25


def split(dff: Traces, seed: int) -> tuple[Traces, Traces]:
    """Traces to train on and traces to judge by: other cells, or of a single cell the end."""
    if dff.n_rois == 1:
        cut = round(dff.n_frames * (1 - HELD_OUT_TIME))
        return _between(dff, 0, cut), _between(dff, cut, dff.n_frames)
    order = torch.randperm(dff.n_rois, generator=torch.Generator().manual_seed(seed)).numpy()
    n_held = max(1, round(HELD_OUT_CELLS * dff.n_rois))
    return dff.select(sorted(order[n_held:])), dff.select(sorted(order[:n_held]))


class Judge(ABC):
    """Compares fitted networks with the one they started from, on held-out snippets and with the same random numbers.

    Attributes
    ----------
    measure, unit
        What is compared, in words.
    least
        Gain from which on a fit is kept.
    shares
        How far from the old weights to the fitted ones a network may be that is offered to the judge.
    """

    measure: ClassVar[str]
    unit: ClassVar[str]
    least: ClassVar[float]
    shares: ClassVar[Sequence[float]] = (1.0,)

    def __init__(self, start: SpikeVAE, held: Traces, config: TrainConfig, n_snippets: int, window: int) -> None:
        self.config = config.model_copy(update={"window": window, "batch": n_snippets})
        self.snippets = Snippets(held, self.config)
        self.index = self.snippets.draw(self.generator())

    def generator(self) -> torch.Generator:
        """The random numbers of every comparison."""
        return torch.Generator().manual_seed(self.config.seed)

    @abstractmethod
    def gain(self, model: SpikeVAE) -> float:
        """How much better a model is than the one at the start; −∞ if its network broke."""

    def told(self, gain: float) -> str:
        """A gain in words, as the description of a model has it."""
        return f"{self.measure} {gain:+.3f}{self.unit} (more than {self.least:g} is kept)"


class DreamJudge(Judge):
    """By the spikes of fluorescence that the start's generative model renders of held-out cells, as ``sleep`` does.

    What counts is the correlation with true spikes (σ = 25 ms) that benchmarks report; a probability would mostly say
    how many spikes there are, which rendered pairs have from the start. On data sets that the starting network had not
    seen (22, two fits each), where this rose by more than 0.02 the correlation with measured spikes rose by 0.018 in
    the mean of 17 fits, and fell by more than 0.01 in three; over all fits the two have a rank correlation of 0.34, and
    the importance-weighted bound on the fluorescence has −0.19. A network in between, whose weights are a mean of both,
    is often better than either (Wortsman et al. 2022, Robust fine-tuning of zero-shot models).
    """

    measure = "correlation with the spikes of simulated copies of held-out cells"
    unit = ""
    least = 0.02
    shares = (0.25, 0.5, 0.75, 1.0)

    def __init__(self, start: SpikeVAE, held: Traces, config: TrainConfig) -> None:
        super().__init__(start, held, config, n_snippets=96, window=512)
        self.dff, self.counts = Dreams(start, self.snippets).render(self.index, self.generator())
        self.before = self._correlation(start)

    def gain(self, model: SpikeVAE) -> float:
        """Mean over the snippets that have spikes; 0 where none has."""
        known = np.isfinite(self.before)
        gain = self._correlation(model)[known] - self.before[known]
        return float(np.nan_to_num(gain, nan=-np.inf).mean()) if known.any() else 0.0

    @torch.no_grad()
    def _correlation(self, model: SpikeVAE) -> Float[np.ndarray, " snippet"]:
        """NaN where a snippet has no spikes."""
        rate, valid = self.snippets.frame_rate, self.snippets.valid[self.index]
        mean = model.recognition.eval()(self.dff, rate, valid).mean
        return score_correlation(mean.numpy(), smooth_spikes(self.counts.numpy(), rate, 0.025))


class BoundJudge(Judge):
    """By the importance-weighted bound on held-out fluorescence, whichever of mean and median over snippets is lower.

    A few snippets with large transients, which no model of fixed noise explains, can outweigh all others in the mean,
    and they are all that a median does not see. Each network gets the θ that fits its own spikes; the prior rate of
    each cell is the starting network's for both, or the gauge (more and smaller spikes) would decide.
    """

    measure = "bound on the fluorescence of held-out cells"
    unit = " nats/s"
    least = 0.0

    def __init__(self, start: SpikeVAE, held: Traces, config: TrainConfig) -> None:
        # Long snippets leave a single sample with all of the weight.
        super().__init__(start, held, config.model_copy(update={"n_samples": 32}), n_snippets=96, window=192)
        start.recognition.eval()
        bound = BoundLoss(start, self.snippets, self.config)
        self.log_rate = bound.cells.log_rate
        self.before = self._nats_per_second(bound)

    @torch.no_grad()
    def gain(self, model: SpikeVAE) -> float:
        """The lower of mean and median over snippets (nats/s)."""
        observed, valid = (x[self.index] for x in (self.snippets.observed, self.snippets.valid))
        if not bool(model.recognition(observed, self.snippets.frame_rate, valid).mean.isfinite().all()):
            return -np.inf  # from such a network no trains can be drawn
        model.recognition.eval()
        bound = BoundLoss(model, self.snippets, self.config)
        bound.cells.log_rate = self.log_rate
        gain = (self._nats_per_second(bound) - self.before).nan_to_num(nan=-torch.inf)
        return float(torch.minimum(gain.median(), gain.mean()))

    @torch.no_grad()
    def _nats_per_second(self, bound: BoundLoss) -> Float[Tensor, " snippet"]:
        log_joint, log_posterior, _ = bound.weights(self.index, self.generator())
        # One snippet at a time: the loss is a mean over them.
        pairs = zip(log_joint.split(1, 1), log_posterior.split(1, 1), strict=True)
        real = -torch.stack([objectives.iwae(p, q) for p, q in pairs])
        return real / bound.n_counted * self.snippets.frame_rate


def _between(dff: Traces, first: int, last: int) -> Traces:
    window = slice(first, last)
    return dff.replace(values=dff.values[:, window], valid=dff.valid[:, window])
