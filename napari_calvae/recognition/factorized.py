"""A posterior whose frames are independent given the gain of the cell, from a convolutional U-Net.

The factorised network of DeepSpike (Speiser et al. 2017, section 2.3) with two changes that were measured to matter:
counts instead of Bernoulli spikes, and a latent gain per cell that all frames share, since how much fluorescence one
spike makes is what nobody knows of an unseen cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor, nn

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork, SpikePosterior


class GainCategorical(SpikePosterior):
    """Counts per frame, independent given a log-gain g ~ N(μ, σ²) of the cell: p(k | g) ∝ exp(logits_k + k g).

    Parameters
    ----------
    logits
        (roi, count, time) unnormalised log-probabilities at gain 0.
    gain_mean, gain_std
        (roi,) of the log-gain. The integral over the gain is a Gauss–Hermite quadrature.
    n_nodes
        Of the quadrature; 1 is exact where the gain is known, ``gain_std`` 0.
    """

    def __init__(
        self,
        logits: Float[Tensor, "roi count time"],
        gain_mean: Float[Tensor, " roi"],
        gain_std: Float[Tensor, " roi"],
        n_nodes: int = 7,
    ) -> None:
        self.logits = logits
        self.gain_mean = gain_mean
        self.gain_std = gain_std
        self.n_nodes = n_nodes

    @property
    def mean(self) -> Float[Tensor, "roi time"]:
        """Expected spike count of each frame."""
        weights = self._weights()
        gains, probability = self._nodes()
        return sum(p * _moments(weights, g) for p, g in zip(probability, gains.exp(), strict=True))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "sample roi time"]:
        """Draw ``n`` spike trains per ROI, as uint8 counts per frame."""
        weights = self._weights()
        shape = (n, weights.shape[0], weights.shape[2])
        device, dtype = weights.device, weights.dtype
        if n == 0:
            return torch.zeros(shape, dtype=torch.uint8, device=device)
        normal = torch.randn((n, weights.shape[0], 1), generator=generator, device=device, dtype=dtype)
        tilt = self._bounded(self.gain_mean[:, None] + self.gain_std[:, None] * normal).exp()
        u = torch.rand(shape, generator=generator, device=device, dtype=dtype)
        counts = torch.zeros(shape, dtype=torch.uint8, device=device)
        # Counts that have no weight at any gain drawn cost time and change nothing.
        weight = weights.amax((0, 2)) * tilt.amax() ** self._counts()
        top = int((weight > 1e-9).nonzero()[-1])
        # One sample at a time: what it needs stays in the cache. Where its number does not exceed the probability of
        # silence there is no spike; only the few other frames are worked out.
        for row, own in enumerate(tilt):
            total = weights[:, top]
            for k in range(top - 1, -1, -1):
                total = torch.addcmul(weights[:, k], total, own)
            threshold = u[row] * total
            roi, frame = (threshold > weights[:, 0]).nonzero().unbind(1)
            threshold, chosen, power = threshold[roi, frame], weights[roi, :, frame], own[roi, 0]
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
        k = self._counts()[:, None]
        normaliser = torch.stack([torch.logsumexp(self.logits + k * g[:, None, None], 1) for g in gains])
        mask = torch.ones_like(self.logits[:, 0]) if valid is None else valid.to(self.logits.dtype)
        constant = (normaliser * mask).sum(-1)  # node roi
        spikes = (flat * mask[:, None]).sum(-1)  # roi sample
        local = (chosen * mask[:, None]).sum(-1)
        terms = local + gains[..., None] * spikes - constant[..., None]
        log_p = torch.logsumexp(terms + probability.log()[:, None, None], 0)
        return log_p.reshape(index.shape[:-1]).movedim(0, -1)

    def select(self, rois: slice) -> GainCategorical:
        """The same distribution over the spikes of some of the ROIs."""
        return GainCategorical(self.logits[rois], self.gain_mean[rois], self.gain_std[rois], self.n_nodes)

    @staticmethod
    def _bounded(gain: Tensor) -> Tensor:
        """Log-gains whose powers single precision can hold; beyond these all counts are at their limit."""
        return gain.clamp(-8.0, 8.0)

    def _counts(self) -> Float[Tensor, " count"]:
        return torch.arange(self.logits.shape[1], device=self.logits.device, dtype=self.logits.dtype)

    def _weights(self) -> Float[Tensor, "roi count time"]:
        return torch.softmax(self.logits, 1)

    def _nodes(self) -> tuple[Float[Tensor, "node roi"], Float[Tensor, " node"]]:
        """Log-gains and probabilities of the quadrature."""
        x, w = np.polynomial.hermite_e.hermegauss(self.n_nodes)
        node = torch.as_tensor(x, dtype=self.logits.dtype, device=self.logits.device)
        probability = torch.as_tensor(w / w.sum(), dtype=self.logits.dtype, device=self.logits.device)
        return self._bounded(self.gain_mean + self.gain_std * node[:, None]), probability


def _moments(weights: Float[Tensor, "roi count time"], tilt: Float[Tensor, " roi"]) -> Float[Tensor, "roi time"]:
    """Mean count under weights tilted by ``tilt**k``: two Horner schemes."""
    e = tilt[:, None]
    top = weights.shape[1] - 1
    total = weights[:, top]
    first = top * weights[:, top]
    for k in range(top - 1, -1, -1):
        total = torch.addcmul(weights[:, k], total, e)
        first = torch.addcmul(k * weights[:, k], first, e)
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
    """

    name: ClassVar[str] = "factorized"

    def __init__(
        self,
        widths: Sequence[int] = (16, 24, 32, 48, 64),
        max_count: int = 10,
        gain_scale: float = 1.0,
        min_frames: int = 1,
        n_features: int = N_FEATURES,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        self.config: dict[str, Any] = {
            "widths": list(widths),
            "max_count": max_count,
            "gain_scale": gain_scale,
            "min_frames": min_frames,
            "n_features": n_features,
        }
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
        self.head = nn.Conv1d(widths[0], 1 + max_count, 1)
        gain = nn.Linear(32, 2)
        self.gain = nn.Sequential(nn.Linear(n_rate + n_summary, 32), nn.ReLU(), gain)
        with torch.no_grad():
            # Start as a Poisson distribution of about one spike per second, whatever the frame rate.
            self.head.weight[1:] = 0
            cast(Tensor, self.head.bias)[:] = 0
            gain.weight[:] = 0
            gain.bias[:] = torch.tensor([0.0, math.log(0.3)])

    def set_gain_scale(self, gain_scale: float) -> None:
        """Widen the posterior of the log-gain by this factor."""
        self.gain_scale = self.config["gain_scale"] = float(gain_scale)

    def summarise(self, features: Tensor, log_rate: Tensor) -> Tensor:
        """Mean and spread of the coarsest level over time."""
        x = self._encode(features, self._rate(log_rate))[-1]
        return torch.relu(self.pool(torch.cat([x.mean(-1), (x.var(-1, unbiased=False) + 1e-6).sqrt()], 1)))

    def local(self, features: Tensor, log_rate: Tensor, summary: Tensor) -> Tensor:
        """Log-rate (spikes/s) and residual log-weights of the counts 1, 2, …, frame by frame."""
        rate = self._rate(log_rate)
        condition = torch.cat([rate, summary], 1)
        skips = self._encode(features, rate)
        x = self.bottom(skips[-1], condition)
        for grow, up, skip in zip(reversed(self.grow), reversed(self.up), reversed(skips[:-1]), strict=True):
            x = torch.repeat_interleave(grow(x), 2, -1)[..., : skip.shape[-1]]
            x = up(torch.cat([x, skip], 1), condition)
        return self.head(torch.relu(x))[..., : features.shape[-1]]

    def posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor) -> GainCategorical:
        """Poisson log-probabilities of the counts plus the learned residual, and the gain of each cell."""
        mean, log_std = self.gain(torch.cat([self._rate(log_rate), summary], 1)).unbind(-1)
        gain_std = self.gain_scale * log_std.clamp(-4, 1.5).exp()
        return GainCategorical(count_logits(local, log_rate), mean, gain_std)

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
