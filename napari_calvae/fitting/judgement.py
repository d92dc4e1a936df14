"""Whether a model that was fitted without true spikes is to be kept: decided on cells that training did not see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from napari_calvae import objectives
from napari_calvae.fitting.losses import BoundLoss, Snippets
from napari_calvae.fitting.sleep import Dreams
from napari_calvae.recording import Traces
from napari_calvae.training import TrainConfig
from napari_calvae.vae import SpikeVAE

#: Share of the cells that are held out, at least one; of one cell's time where it is the only one.
HELD_OUT_CELLS, HELD_OUT_TIME = 0.2, 0.25
#: Snippets that are compared, and their length (frames): long ones leave a single sample with all of the weight.
_N_SNIPPETS, _WINDOW = 96, 192
#: Spike trains per snippet for the importance-weighted bound.
_N_SAMPLES = 32


@dataclass(frozen=True)
class Verdict:
    """What held-out data say of a fitted model: nats per second more than of the one it started from.

    Both the mean and the median over snippets count, whichever is lower: a few snippets with large transients, which no
    model of fixed noise explains, can outweigh all others in the mean, and they are all that a median does not see.

    Parameters
    ----------
    bound
        Importance-weighted bound on the real fluorescence.
    pairs
        Log-probability of the spikes of rendered pairs; zero where training made none.
    """

    bound: float
    pairs: float

    @property
    def better(self) -> bool:
        """Whether to keep it: neither may have got worse, and their sum must have got better."""
        return self.bound >= 0 and self.pairs >= 0 and self.bound + self.pairs > 0


def split(dff: Traces, seed: int) -> tuple[Traces, Traces]:
    """Traces to train on and traces to judge by: other cells, or of a single cell the end."""
    if dff.n_rois == 1:
        cut = round(dff.n_frames * (1 - HELD_OUT_TIME))
        return _between(dff, 0, cut), _between(dff, cut, dff.n_frames)
    order = torch.randperm(dff.n_rois, generator=torch.Generator().manual_seed(seed)).numpy()
    n_held = max(1, round(HELD_OUT_CELLS * dff.n_rois))
    return dff.select(sorted(order[n_held:])), dff.select(sorted(order[:n_held]))


class Judge:
    """Compares a fitted network with the one it started from, on the same snippets and with the same random numbers.

    For the bound each network gets the θ that fits its own spikes; the prior rate of each cell is the starting
    network's for both, or the gauge (more and smaller spikes) would decide.
    """

    def __init__(self, start: SpikeVAE, held: Traces, config: TrainConfig, *, pairs: bool) -> None:
        window = config.model_copy(update={"window": _WINDOW, "batch": _N_SNIPPETS, "n_samples": _N_SAMPLES})
        self.snippets, self.config = Snippets(held, window), window
        self.index = self.snippets.draw(torch.Generator().manual_seed(config.seed))
        self.dreams = Dreams(start, self.snippets) if pairs else None
        self.log_rate = BoundLoss(start, self.snippets, window).cells.log_rate
        self.before = self._values(start)

    def verdict(self, model: SpikeVAE) -> Verdict:
        """Held-out values of a fitted model, less those at the start."""
        gain = (self._values(model) - self.before).nan_to_num(nan=-torch.inf)
        bound, pairs = torch.minimum(gain.median(-1).values, gain.mean(-1)).tolist()
        return Verdict(bound, pairs)

    def loss(self, model: SpikeVAE) -> float:
        """What a fit does worse than its start, in nats per second; infinite where it would not be kept."""
        verdict = self.verdict(model)
        return -(verdict.bound + verdict.pairs) if verdict.bound >= 0 and verdict.pairs >= 0 else math.inf

    @torch.no_grad()
    def _values(self, model: SpikeVAE) -> Float[Tensor, "value snippet"]:
        """Bound, and log-probability of the spikes of rendered pairs (nats per second); NaN if the network broke."""
        model.recognition.eval()
        observed, valid = self.snippets.observed[self.index], self.snippets.valid[self.index]
        rate = self.snippets.frame_rate
        if not bool(torch.isfinite(model.recognition(observed, rate, valid).mean).all()):
            return torch.full((2, len(observed)), torch.nan)
        bound = BoundLoss(model, self.snippets, self.config)
        bound.cells.log_rate = self.log_rate
        log_joint, log_posterior, _ = bound.weights(self.index, torch.Generator().manual_seed(self.config.seed))
        # One snippet at a time: the loss is a mean over them.
        pairs = zip(log_joint.split(1, 1), log_posterior.split(1, 1), strict=True)
        real = -torch.stack([objectives.iwae(p, q) for p, q in pairs])
        rendered = torch.zeros_like(real)
        if self.dreams is not None:
            dff, counts = self.dreams.render(self.index, torch.Generator().manual_seed(self.config.seed))
            rendered = model.recognition(dff, rate, valid).log_prob(counts, valid)
        return torch.stack([real / bound.n_counted, rendered / observed.shape[-1]]) * rate


def _between(dff: Traces, first: int, last: int) -> Traces:
    window = slice(first, last)
    return dff.replace(values=dff.values[:, window], valid=dff.valid[:, window])
