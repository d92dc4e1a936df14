"""A posterior whose frames are independent given the gain of the cell, from a convolutional U-Net.

The factorised network of DeepSpike (Speiser et al. 2017, section 2.3) with two changes that were measured to matter:
counts instead of Bernoulli spikes, and a latent gain per cell that all frames share, since how much fluorescence one
spike makes is what nobody knows of an unseen cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor, nn

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork, SpikePosterior


class GainCategorical(SpikePosterior):
    """Counts per frame, independent given a log-gain g ~ N(μ, σ²) of the cell: p(k | g) ∝ exp(logits_k + k h g).

    Parameters
    ----------
    logits
        (roi, count, time) unnormalised log-probabilities at gain 0.
    gain_mean, gain_std
        (roi,) of the log-gain. The integral over the gain is a Gauss–Hermite quadrature.
    response
        (roi, time) how far the gain acts on each frame, h; everywhere 1 if not given. How many spikes make up an event
        depends on how large a single one shows, whether there is an event at all hardly does.
    n_nodes
        Of the quadrature; 1 is exact where the gain is known, ``gain_std`` 0.
    """

    def __init__(
        self,
        logits: Float[Tensor, "roi count time"],
        gain_mean: Float[Tensor, " roi"],
        gain_std: Float[Tensor, " roi"],
        response: Float[Tensor, "roi time"] | None = None,
        n_nodes: int = 7,
    ) -> None:
        self.logits = logits
        self.response = logits.new_ones(()).expand_as(logits[:, 0]) if response is None else response
        self.gain_mean = gain_mean
        self.gain_std = gain_std
        self.n_nodes = n_nodes

    @property
    def mean(self) -> Float[Tensor, "roi time"]:
        """Expected spike count of each frame."""
        weights = self._weights
        gains, probability = self._nodes()
        if weights.shape[-1] == 1:  # a frame of a recording that is going on: one pass, where each step is a handful
            tilt = (gains[..., None] * self.response).exp()
            return torch.einsum("n,nrt->rt", probability, _moments(weights, tilt))
        tilts = ((g[:, None] * self.response).exp() for g in gains)
        return sum(p * _moments(weights, tilt) for p, tilt in zip(probability, tilts, strict=True))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "sample roi time"]:
        """Draw ``n`` spike trains per ROI, as uint8 counts per frame."""
        weights = self._weights
        shape = (n, weights.shape[0], weights.shape[2])
        device, dtype = weights.device, weights.dtype
        if n == 0:
            return torch.zeros(shape, dtype=torch.uint8, device=device)
        normal = torch.randn((n, weights.shape[0], 1), generator=generator, device=device, dtype=dtype)
        gain = self._bounded(self.gain_mean[:, None] + self.gain_std[:, None] * normal)
        u = torch.rand(shape, generator=generator, device=device, dtype=dtype)
        counts = torch.zeros(shape, dtype=torch.uint8, device=device)
        # Counts that have no weight at any gain drawn cost time and change nothing.
        weight = weights.amax((0, 2)) * gain.amax().clamp_min(0).exp() ** self._counts()
        top = int((weight > 1e-9).nonzero()[-1])
        # One sample at a time: what it needs stays in the cache. Where its number does not exceed the probability of
        # silence there is no spike; only the few other frames are worked out.
        for row, drawn_gain in enumerate(gain):
            own = (drawn_gain * self.response).exp()
            total = weights[:, top]
            for k in range(top - 1, -1, -1):
                total = torch.addcmul(weights[:, k], total, own)
            threshold = u[row] * total
            roi, frame = (threshold > weights[:, 0]).nonzero().unbind(1)
            threshold, chosen, power = threshold[roi, frame], weights[roi, :, frame], own[roi, frame]
            below, factor = chosen[:, 0], power
            drawn = torch.ones_like(roi, dtype=torch.uint8)
            for k in range(1, top):
                below = torch.addcmul(below, chosen[:, k], factor)
                factor = factor * power
                drawn += threshold > below
            counts[row, roi, frame] = drawn
        return counts

    def log_prob(
        self, counts: Num[Tensor, "*sample roi time"], valid: Bool[Tensor, "roi time"] | None = None
    ) -> Float[Tensor, "*sample roi"]:
        """Log-probability of whole trains; frames where ``valid`` is False are left out of the product."""
        gains, probability = self._nodes()
        counts = counts.long()
        index = counts.movedim(-2, 0)  # roi *sample time
        flat = index.reshape(len(self.logits), -1, index.shape[-1])
        chosen = self.logits.gather(1, flat)
        normaliser = torch.stack([torch.logsumexp(self.at_gain(g), 1) for g in gains])
        mask = torch.ones_like(self.logits[:, 0]) if valid is None else valid.to(self.logits.dtype)
        constant = (normaliser * mask).sum(-1)  # node roi
        spikes = (flat * (self.response * mask)[:, None]).sum(-1)  # roi sample
        local = (chosen * mask[:, None]).sum(-1)
        terms = local + gains[..., None] * spikes - constant[..., None]
        log_p = torch.logsumexp(terms + probability.log()[:, None, None], 0)
        return log_p.reshape(index.shape[:-1]).movedim(0, -1)

    def select(self, rois: slice) -> GainCategorical:
        """The same distribution over the spikes of some of the ROIs."""
        return self.join([self], [rois])

    def at_gain(self, gain: Float[Tensor, " roi"]) -> Float[Tensor, "roi count time"]:
        """Unnormalised log-probabilities at a log-gain of each cell."""
        return torch.addcmul(self.logits, self._counts()[:, None], (gain[:, None] * self.response)[:, None])

    def given(self, gain_mean: Float[Tensor, " roi"], gain_std: Float[Tensor, " roi"]) -> GainCategorical:
        """The same with another belief about the gain."""
        return GainCategorical(self.logits, gain_mean, gain_std, self.response, self.n_nodes)

    def widened(self, scale: float) -> GainCategorical:
        """The gain ``scale`` times as uncertain, about the same mean of the gain itself, not of its logarithm.

        Otherwise more doubt would mean more spikes: on left-out data sets half as many again, at a scale of 1.5.
        """
        return self.given(self.gain_mean - 0.5 * (scale**2 - 1) * self.gain_std**2, scale * self.gain_std)

    def gain_for(self, total: Float[Tensor, " roi"]) -> Float[Tensor, " roi"]:
        """The log-gain at which each cell is expected to have ``total`` spikes, by bisection."""
        low, high = torch.full_like(total, -8.0), torch.full_like(total, 8.0)
        weights = self._weights
        for _ in range(16):
            middle = (low + high) / 2
            few = _moments(weights, (middle[:, None] * self.response).exp()).sum(-1) < total
            low, high = torch.where(few, middle, low), torch.where(few, high, middle)
        return (low + high) / 2

    @staticmethod
    def join(posteriors: Sequence[GainCategorical], rois: Sequence[slice] | None = None) -> GainCategorical:
        """Posteriors over traces of one length, one below the other; of each only some ``rois`` if told."""
        chosen = [slice(None)] * len(posteriors) if rois is None else rois

        def rows(name: str) -> Tensor:
            parts = [getattr(q, name)[r] for q, r in zip(posteriors, chosen, strict=True)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        n_nodes = posteriors[0].n_nodes
        return GainCategorical(rows("logits"), rows("gain_mean"), rows("gain_std"), rows("response"), n_nodes)

    @staticmethod
    def _bounded(gain: Tensor) -> Tensor:
        """Log-gains whose powers single precision can hold; beyond these all counts are at their limit."""
        return gain.clamp(-8.0, 8.0)

    def _counts(self) -> Float[Tensor, " count"]:
        return torch.arange(self.logits.shape[1], device=self.logits.device, dtype=self.logits.dtype)

    @cached_property
    def _weights(self) -> Float[Tensor, "roi count time"]:
        return torch.softmax(self.logits, 1)

    def _nodes(self) -> tuple[Float[Tensor, "node roi"], Float[Tensor, " node"]]:
        """Log-gains and probabilities of the quadrature."""
        x, w = np.polynomial.hermite_e.hermegauss(self.n_nodes)
        node = torch.as_tensor(x, dtype=self.logits.dtype, device=self.logits.device)
        probability = torch.as_tensor(w / w.sum(), dtype=self.logits.dtype, device=self.logits.device)
        return self._bounded(self.gain_mean + self.gain_std * node[:, None]), probability


def _moments(
    weights: Float[Tensor, "roi count time"], tilt: Float[Tensor, "*node roi time"]
) -> Float[Tensor, "*node roi time"]:
    """Mean count under weights tilted by ``tilt**k``: two Horner schemes."""
    top = weights.shape[1] - 1
    total = weights[:, top]
    first = top * weights[:, top]
    for k in range(top - 1, -1, -1):
        total = torch.addcmul(weights[:, k], total, tilt)
        first = torch.addcmul(k * weights[:, k], first, tilt)
    return first / total


def count_logits(
    local: Float[Tensor, "roi output time"], log_rate: Float[Tensor, " roi"]
) -> Float[Tensor, "roi count time"]:
    """Poisson log-probabilities of the counts, unnormalised, plus a learned residual.

    Parameters
    ----------
    local
        (roi, output, time) log-rate (spikes/s), and log-weights of the counts 1, 2, … beyond a Poisson distribution.
    log_rate
        (roi,) logarithm of the frame rate (Hz).
    """
    # Expected spikes per frame, before the residual. Beyond what counts can mean both hardly grow: a single wild
    # frame would otherwise outweigh all others in training. Their slope never vanishes, or it could not come back.
    log_mean = local[:, :1] - log_rate[:, None, None]
    log_mean = torch.where(log_mean > 3.0, 3.0 + 0.02 * (log_mean - 3.0), log_mean)
    residual = 8 * torch.tanh(local[:, 1:] / 8)
    k = torch.arange(local.shape[1], device=local.device, dtype=local.dtype)[:, None]
    logits = k * log_mean - torch.lgamma(k + 1)
    return torch.cat([logits[:, :1], logits[:, 1:] + residual], 1)


class _Block(nn.Module):
    """Two convolutions around a residual path, scaled and shifted by a condition (FiLM)."""

    def __init__(self, n_in: int, n_out: int, n_condition: int, kernel: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv1d(n_in, n_out, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(n_out, n_out, kernel, padding=kernel // 2)
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.film = nn.Linear(n_condition, 2 * n_out)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        with torch.no_grad():
            self.second.weight.mul_(0.5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[..., None].chunk(2, 1)
        h = torch.addcmul(shift, self.first(x), 1 + scale)
        return self.skip(x) + self.second(torch.relu_(h))


class FactorizedNetwork(RecognitionNetwork):
    """U-Net over time whose outputs are counts per frame given a latent gain of the cell.

    Parameters
    ----------
    widths
        Channels of each level; every level halves the rate. The full rate is what costs.
    max_count
        Highest spike count per frame.
    gain_scale
        Factor on the standard deviation of the log-gain, calibrated on data sets that the network did not see.
    min_frames
        Shortest trace that it is trained on.
    n_features
        Channels of the features that it is given, where it is part of another network.
    local_gain
        Whether it says frame by frame how far the gain acts; else it acts on all alike.
    """

    name: ClassVar[str] = "factorized"

    def __init__(
        self,
        widths: Sequence[int] = (16, 24, 32, 48, 64),
        max_count: int = 10,
        gain_scale: float = 1.0,
        min_frames: int = 1,
        n_features: int = N_FEATURES,
        local_gain: bool = False,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        self.config: dict[str, Any] = {
            "widths": list(widths),
            "max_count": max_count,
            "gain_scale": gain_scale,
            "min_frames": min_frames,
            "n_features": n_features,
            "local_gain": local_gain,
        }
        self.local_gain = local_gain
        self.max_count = max_count
        self.min_frames = min_frames
        self.gain_scale = gain_scale
        self.stride = 2 ** (len(widths) - 1)
        # Each level reaches 4 frames of its own rate in either direction per block (one on the way down, one up), and
        # the changes of rate one more each.
        self.halo = sum(10 * 2**level for level in range(len(widths)))
        n_summary, n_rate = widths[-1], 8
        self.rate = nn.Sequential(nn.Linear(2, n_rate), nn.ReLU(), nn.Linear(n_rate, n_rate))
        self.stem = nn.Conv1d(n_features, widths[0], 5, padding=2)
        self.down = nn.ModuleList(_Block(w, w, n_rate) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv1d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.pool = nn.Linear(2 * widths[-1], n_summary)
        self.bottom = _Block(widths[-1], widths[-1], n_rate + n_summary)
        self.grow = nn.ModuleList(nn.Conv1d(b, a, 1) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(_Block(2 * w, w, n_rate + n_summary) for w in widths[:-1])
        self.head = nn.Conv1d(widths[0], 1 + max_count + local_gain, 1)
        gain = nn.Linear(32, 2)
        self.gain = nn.Sequential(nn.Linear(n_rate + n_summary, 32), nn.ReLU(), gain)
        with torch.no_grad():
            # Start as a Poisson distribution of about one spike per second, whatever the frame rate.
            self.head.weight[1:] = 0
            cast(Tensor, self.head.bias)[:] = 0
            cast(Tensor, self.head.bias)[1 + max_count :] = 2.0
            gain.weight[:] = 0
            gain.bias[:] = torch.tensor([0.0, math.log(0.3)])

    def set_gain_scale(self, gain_scale: float) -> None:
        """Widen the posterior of the log-gain by this factor."""
        self.gain_scale = self.config["gain_scale"] = float(gain_scale)

    def summarise(self, features: Tensor, log_rate: Tensor) -> Tensor:
        """Mean and spread of the coarsest level over time."""
        return self._pool(self._encode(features, self._rate(log_rate))[-1])

    def local(self, features: Tensor, log_rate: Tensor, summary: Tensor) -> Tensor:
        """Log-rate (spikes/s), residual log-weights of the counts 1, 2, …, and log-odds of the gain's response."""
        rate = self._rate(log_rate)
        return self._decode(self._encode(features, rate), rate, summary)[..., : features.shape[-1]]

    def summary_and_local(self, features: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
        """Summary and outputs of whole traces, encoded once."""
        rate = self._rate(log_rate)
        skips = self._encode(features, rate)
        summary = self._pool(skips[-1])
        return summary, self._decode(skips, rate, summary)[..., : features.shape[-1]]

    def _pool(self, coarsest: Tensor) -> Tensor:
        spread = (coarsest.var(-1, unbiased=False) + 1e-6).sqrt()
        return torch.relu(self.pool(torch.cat([coarsest.mean(-1), spread], 1)))

    def _decode(self, skips: list[Tensor], rate: Tensor, summary: Tensor) -> Tensor:
        condition = torch.cat([rate, summary], 1)
        x = self.bottom(skips[-1], condition)
        for grow, up, skip in zip(reversed(self.grow), reversed(self.up), reversed(skips[:-1]), strict=True):
            x = torch.repeat_interleave(grow(x), 2, -1)[..., : skip.shape[-1]]
            x = up(torch.cat([x, skip], 1), condition)
        return self.head(torch.relu(x))

    def posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor) -> GainCategorical:
        """Poisson log-probabilities of the counts plus the learned residual, and the gain of each cell."""
        mean, log_std = self.gain(torch.cat([self._rate(log_rate), summary], 1)).unbind(-1)
        gain_std = log_std.clamp(-4, 1.5).exp()
        n = 1 + self.max_count
        response = torch.sigmoid(local[:, n]) if self.local_gain else None
        return GainCategorical(count_logits(local[:, :n], log_rate), mean, gain_std, response).widened(self.gain_scale)

    def _rate(self, log_rate: Tensor) -> Tensor:
        x = log_rate - math.log(30.0)
        return self.rate(torch.stack([x, x**2], -1))

    def _encode(self, features: Tensor, rate: Tensor) -> list[Tensor]:
        """Outputs of every level, finest first; the trace is padded to a multiple of ``stride``."""
        padding = -features.shape[-1] % self.stride
        x = self.stem(nn.functional.pad(features, (0, padding)))
        skips = [self.down[0](x, rate)]
        for shrink, block in zip(self.shrink, self.down[1:], strict=True):
            skips.append(block(shrink(skips[-1]), rate))
        return skips
