"""A posterior whose frames are independent given the gain of the cell, from a convolutional U-Net.

The factorised network of DeepSpike (Speiser et al. 2017, section 2.3) with two changes that were measured to matter:
counts instead of Bernoulli spikes, and a latent gain per cell that all frames share, since how much fluorescence one
spike makes is what nobody knows of an unseen cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor, nn

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork, SpikePosterior
from napari_calvae.recognition.layers import FilmBlock, convolve, to_channels_last, to_frames, upsample

#: Usual limit to the standard deviation of the log-gain in training.
GAIN_LIMIT = 0.6
#: How far a widened gain reaches, in standard deviations: just beyond the ends of the 90 % in the middle, ±1.645.
REACH = 1.7
#: Frames for which all gains are worked out together, so that they stay in the cache.
_FRAMES = 8192


class GainCategorical(SpikePosterior):
    """Counts per frame, independent given a log-gain g ~ N(μ, σ²) of the cell: p(k | g) ∝ exp(logits_k + k h g).

    Parameters
    ----------
    logits
        (roi, count, time) unnormalised log-probabilities at gain 0.
    gain_mean, gain_std
        (roi,) of the log-gain. The integral over the gain is a Gaussian quadrature.
    response
        (roi, time) how far the gain acts on each frame, h; everywhere 1 if not given. How many spikes make up an event
        depends on how large a single one shows, whether there is an event at all hardly does.
    n_nodes
        Of the quadrature; 1 is exact where the gain is known, ``gain_std`` 0.
    reach
        Standard deviations that the gain may be off its mean; one that would be farther off is just so far.
    """

    def __init__(
        self,
        logits: Float[Tensor, "roi count time"],
        gain_mean: Float[Tensor, " roi"],
        gain_std: Float[Tensor, " roi"],
        response: Float[Tensor, "roi time"] | None = None,
        n_nodes: int = 7,
        reach: float = math.inf,
    ) -> None:
        self.logits = logits
        self.response = logits.new_ones(()).expand_as(logits[:, 0]) if response is None else response
        self.gain_mean = gain_mean
        self.gain_std = gain_std
        self.n_nodes = n_nodes
        self.reach = reach
        self._probability: Tensor | None = None

    @property
    def mean(self) -> Float[Tensor, "roi time"]:
        """Expected spike count of each frame."""
        gains, probability = self._nodes()
        parts = zip(self._weights.split(_FRAMES, -1), self.response.split(_FRAMES, -1), strict=True)
        at_nodes = (_moments(weights, (gains[..., None] * response).exp())[0] for weights, response in parts)
        return torch.cat([torch.einsum("n,nrt->rt", probability, mean) for mean in at_nodes], -1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "sample roi time"]:
        """Draw ``n`` spike trains per ROI, as uint8 counts per frame."""
        weights = self._weights
        shape = (n, weights.shape[0], weights.shape[2])
        device, dtype = weights.device, weights.dtype
        if n == 0:
            return torch.zeros(shape, dtype=torch.uint8, device=device)
        normal = torch.randn((n, weights.shape[0], 1), generator=generator, device=device, dtype=dtype)
        gain = self._gain(normal)
        u = torch.rand(shape, generator=generator, device=device, dtype=dtype)
        counts = torch.zeros(shape, dtype=torch.uint8, device=device)
        # Counts that have no weight at any gain drawn cost time and change nothing.
        highest = gain.amax(0)
        weight = weights.amax((0, 2)) * highest.amax().clamp_min(0).exp() ** self._counts()
        top = int((weight > 1e-9).nonzero()[-1])
        # The higher the gain, the less silent a frame. Where a number does not exceed the probability of silence at the
        # highest gain there is no spike at any; only the few other frames are worked out. The margin is for rounding.
        silent = weights[:, 0] / _total(weights, (highest * self.response).exp(), top) - 1e-5
        row, roi, frame = (u > silent).nonzero().unbind(1)
        every = weights[:, : top + 1].movedim(1, 0).flatten(1)  # one index finds what three do, five times as fast
        chosen = every.index_select(1, roi * shape[2] + frame)
        power = own = (gain[row, roi, 0] * self.response[roi, frame]).exp()
        threshold = u[row, roi, frame] * _total(chosen[None], own[None], top)[0]
        below = chosen[0]
        drawn = (threshold > below).to(torch.uint8)
        for k in range(1, top):
            below = torch.addcmul(below, chosen[k], power)
            power = power * own
            drawn += threshold > below
        counts[row, roi, frame] = drawn
        return counts

    def log_prob(
        self, counts: Num[Tensor, "*sample roi time"], valid: Bool[Tensor, "roi time"] | None = None
    ) -> Float[Tensor, "*sample roi"]:
        """Log-probability of whole trains; frames where ``valid`` is False are left out of the product.

        Given the counts a gain is known far better than before, so the nodes of the quadrature go to where they say it
        is (adaptive quadrature, Naylor & Smith 1982): at nodes of the prior, which are apart by more than that is wide,
        a gain would seem the more certain the closer its nodes.
        """
        index = counts.long().movedim(-2, 0)  # roi *sample time
        flat = index.reshape(len(self.logits), -1, index.shape[-1])
        mask = torch.ones_like(self.logits[:, 0]) if valid is None else valid.to(self.logits.dtype)
        local = (torch.log_softmax(self.logits, 1).gather(1, flat) * mask[:, None]).sum(-1)  # roi sample
        response = self.response * mask
        spikes = (flat * response[:, None]).sum(-1)
        z, log_weight = self._nodes_given(spikes, response)
        gain = self._gain(z)
        constant = torch.stack([self._log_total(g, response, mask) for g in gain])
        log_p = local + torch.logsumexp(log_weight + gain * spikes - constant, 0)
        return log_p.reshape(index.shape[:-1]).movedim(0, -1)

    def select(self, rois: slice) -> GainCategorical:
        """The same distribution over the spikes of some of the ROIs."""
        return self.join([self], [rois])

    def at_gain(self, gain: Float[Tensor, " roi"]) -> Float[Tensor, "roi count time"]:
        """Unnormalised log-probabilities at a log-gain of each cell."""
        return torch.addcmul(self.logits, self._counts()[:, None], (gain[:, None] * self.response)[:, None])

    def given(self, gain_mean: Float[Tensor, " roi"], gain_std: Float[Tensor, " roi"]) -> GainCategorical:
        """The same with another belief about the gain."""
        return GainCategorical(self.logits, gain_mean, gain_std, self.response, self.n_nodes, self.reach)

    def widened(self, scale: float) -> GainCategorical:
        """The gain ``scale`` times as uncertain, about the same mean of the gain itself, not of its logarithm.

        Otherwise more doubt would mean more spikes: on left-out data sets half as many again, at a scale of 1.5. What
        lies beyond the 90 % that intervals are judged by is put at their ends: in the tail of a normal log-gain one
        sample of fifty had spikes in nearly every frame, and the mean was that of a few such.
        """
        if scale == 1:
            return self
        std = scale * self.gain_std
        wide = GainCategorical(self.logits, self.gain_mean, std, self.response, self.n_nodes, REACH)
        return wide.given(self.gain_mean + self._log_mean_gain() - wide._log_mean_gain(), std)

    def gain_for(self, total: Float[Tensor, " roi"]) -> Float[Tensor, " roi"]:
        """The log-gain at which each cell is expected to have ``total`` spikes, by bisection."""
        low, high = torch.full_like(total, -8.0), torch.full_like(total, 8.0)
        weights = self._weights
        for _ in range(16):
            middle = (low + high) / 2
            few = _moments(weights, (middle[:, None] * self.response).exp())[0].sum(-1) < total
            low, high = torch.where(few, middle, low), torch.where(few, high, middle)
        return (low + high) / 2

    @staticmethod
    def join(posteriors: Sequence[GainCategorical], rois: Sequence[slice] | None = None) -> GainCategorical:
        """Posteriors over traces of one length, one below the other; of each only some ``rois`` if told.

        All have to have the same quadrature and reach.
        """
        if len({(q.n_nodes, q.reach) for q in posteriors}) > 1:
            raise ValueError("GainCategorical.join: expected posteriors of one reach and number of nodes, got several.")
        chosen = [slice(None)] * len(posteriors) if rois is None else rois

        def rows(name: str) -> Tensor:
            parts = [getattr(q, name)[r] for q, r in zip(posteriors, chosen, strict=True)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        first = posteriors[0]
        gain = rows("gain_mean"), rows("gain_std")
        return GainCategorical(rows("logits"), *gain, rows("response"), first.n_nodes, first.reach)

    @staticmethod
    def _bounded(gain: Tensor) -> Tensor:
        """Log-gains whose powers single precision can hold; beyond these all counts are at their limit."""
        return gain.clamp(-8.0, 8.0)

    def _counts(self) -> Float[Tensor, " count"]:
        return torch.arange(self.logits.shape[1], device=self.logits.device, dtype=self.logits.dtype)

    @property
    def _weights(self) -> Float[Tensor, "roi count time"]:
        """Probabilities at gain 0, worked out once, and again if gradients are wanted for the first time."""
        kept = self._probability
        if kept is None or (torch.is_grad_enabled() and self.logits.requires_grad and not kept.requires_grad):
            kept = self._probability = torch.softmax(self.logits, 1)
        return kept

    def _nodes(self) -> tuple[Float[Tensor, "node roi"], Float[Tensor, " node"]]:
        """Log-gains and probabilities of the quadrature."""
        if math.isinf(self.reach):
            node, probability = self._hermite_nodes()
        else:  # both ends, and Legendre's nodes in between
            inner, share = np.polynomial.legendre.leggauss(self.n_nodes - 2)
            ends = self._beyond()
            share = share * np.exp(-0.5 * (self.reach * inner) ** 2)
            node = self.logits.new_tensor(self.reach * np.array([-1.0, *inner, 1.0]))
            probability = self.logits.new_tensor([ends, *((1 - 2 * ends) * share / share.sum()), ends])
        return self._gain(node[:, None, None])[..., 0], probability

    def _gain(self, z: Float[Tensor, "*node #roi sample"]) -> Float[Tensor, "*node roi sample"]:
        """Log-gains of each cell at standard normal numbers."""
        return self._bounded(self.gain_mean[:, None] + self.gain_std[:, None] * z.clamp(-self.reach, self.reach))

    def _log_mean_gain(self) -> Float[Tensor, " roi"]:
        """Logarithm of the mean of e^g, in units of e^``gain_mean``."""
        s, r = self.gain_std, self.reach
        if math.isinf(r):
            return s**2 / 2
        inside = (s**2 / 2).exp() * (torch.special.ndtr(r - s) - torch.special.ndtr(-r - s))
        return torch.log(inside + 2 * torch.cosh(r * s) * self._beyond())

    def _hermite_nodes(self) -> tuple[Float[Tensor, " node"], Float[Tensor, " node"]]:
        """Nodes and probabilities for a standard normal number."""
        node, weight = np.polynomial.hermite_e.hermegauss(self.n_nodes)
        like = self.logits
        return like.new_tensor(node), like.new_tensor(weight / weight.sum())

    def _log_total(
        self, gain: Float[Tensor, "roi sample"], response: Float[Tensor, "roi time"], mask: Float[Tensor, "roi time"]
    ) -> Float[Tensor, "roi sample"]:
        """Log of the normalisers at a log-gain, summed over the measured frames."""
        tilt = (gain[..., None] * response[:, None]).exp()
        total = _total(self._weights[:, :, None], tilt, self._weights.shape[1] - 1)
        return (total.log() * mask[:, None]).sum(-1)

    @torch.no_grad()
    def _nodes_given(
        self, spikes: Float[Tensor, "roi sample"], response: Float[Tensor, "roi time"]
    ) -> tuple[Float[Tensor, "node roi sample"], Float[Tensor, "node roi sample"]]:
        """Nodes, in standard units, around where the counts say that the gain is, and logarithms of their weights.

        Of a gain that ends somewhere the ends have a probability of their own, and the density in between may be cut
        off or steep there: Legendre's nodes over as far as it is within e^−12 of its highest value.
        """
        mode, slope, width = self._mode_given(spikes, response)
        if math.isinf(self.reach):
            x, weight = (t[:, None, None] for t in self._hermite_nodes())
            z = mode + width * x
            return z, weight.log() + width.log() + (x**2 - z**2) / 2
        steep = slope.abs()
        far = width**2 * ((steep**2 + 24 / width**2).sqrt() - steep)
        low, high = (mode - far).clamp_min(-self.reach), (mode + far).clamp_max(self.reach)
        node, share = (
            self.logits.new_tensor(t)[:, None, None] for t in np.polynomial.legendre.leggauss(2 * self.n_nodes)
        )
        inner = (low + high) / 2 + (high - low) / 2 * node
        log_inner = share.log() + ((high - low) / 2).log() - inner**2 / 2 - 0.5 * math.log(2 * math.pi)
        ends = self.reach * torch.ones_like(mode)
        log_end = torch.full_like(mode, math.log(self._beyond()))
        return torch.cat([-ends[None], inner, ends[None]]), torch.cat([log_end[None], log_inner, log_end[None]])

    def _mode_given(
        self, spikes: Float[Tensor, "roi sample"], response: Float[Tensor, "roi time"], n_steps: int = 6
    ) -> tuple[Float[Tensor, "roi sample"], Float[Tensor, "roi sample"], Float[Tensor, "roi sample"]]:
        """Mode of the gain given the counts, slope of the log-density there, and width, all in standard units.

        By Newton's steps, none beyond two units, nor beyond reach.
        """
        std = self.gain_std[:, None]

        def derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
            tilt = (self._gain(z)[..., None] * response[:, None]).exp()
            first, second = _moments(self._weights[:, :, None], tilt, 2)
            slope = std * (spikes - (first * response[:, None]).sum(-1)) - z
            return slope, 1 + std**2 * ((second - first**2) * response[:, None] ** 2).sum(-1)

        z = torch.zeros_like(spikes)
        for _ in range(n_steps):
            slope, curvature = derivatives(z)
            z = (z + (slope / curvature).clamp(-2, 2)).clamp(-self.reach, self.reach)
        slope, curvature = derivatives(z)
        return z, slope, curvature.rsqrt()

    def _beyond(self) -> float:
        """Probability of a gain at either end of its reach."""
        return math.erfc(self.reach / math.sqrt(2)) / 2


def _total(
    weights: Float[Tensor, "roi count *time"], tilt: Float[Tensor, "*shape"], top: int, power: int = 0
) -> Float[Tensor, "*shape"]:
    """Sum over the counts k up to ``top`` of ``k**power * weights * tilt**k``: a Horner scheme.

    ``tilt`` and the sum are (node …, roi, time …).
    """
    factors = weights.unbind(1)
    total = top**power * factors[top]
    for k in range(top - 1, -1, -1):
        total = torch.addcmul(factors[k] if power == 0 else k**power * factors[k], total, tilt)
    return total


def _moments(
    weights: Float[Tensor, "roi count *time"], tilt: Float[Tensor, "*shape"], order: int = 1
) -> list[Float[Tensor, "*shape"]]:
    """Mean count, mean squared count … under weights tilted by ``tilt**k``."""
    top = weights.shape[1] - 1
    total = _total(weights, tilt, top)
    return [_total(weights, tilt, top, power) / total for power in range(1, order + 1)]


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
    logits = torch.addcmul(-torch.lgamma(k + 1), k, log_mean)
    logits[:, 1:] += residual
    return logits


def gain_layers(n_condition: int) -> nn.Sequential:
    """From what is known of a trace as a whole to the mean of its log-gain, and what `gain_deviation` takes."""
    last = nn.Linear(32, 2)
    with torch.no_grad():
        last.weight[:] = 0
        last.bias[:] = torch.tensor([0.0, math.log(0.3)])
    return nn.Sequential(nn.Linear(n_condition, 32), nn.ReLU(), last)


def gain_deviation(width: Float[Tensor, " roi"], limit: float | None) -> Float[Tensor, " roi"]:
    """Standard deviation of a log-gain, below ``limit`` if there is one.

    A snippet says hardly anything against a far wider prior of one number, so that without a limit the deviation drifts
    to several units, at which the mean over gains is that of a few absurd ones. The shift by a half lets an untrained
    network begin at a third of the limit, as without one it begins at 0.3.
    """
    return width.clamp(-4, 1.5).exp() if limit is None else limit * torch.sigmoid(width + 0.5)


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
    light
        Half the multiplications for as good an answer: the finest level takes two frames at once, filters are 3 long
        instead of 5, and what a level has seen is added to what comes from the coarser ones instead of put beside it.
    gain_limit
        Highest standard deviation of the log-gain before ``gain_scale``; None in networks from before there was one.
    """

    name: ClassVar[str] = "factorized"
    unnamed: ClassVar[Mapping[str, Any]] = {"gain_limit": None}

    def __init__(
        self,
        widths: Sequence[int] = (16, 24, 32, 48, 64),
        max_count: int = 10,
        gain_scale: float = 1.0,
        min_frames: int = 1,
        n_features: int = N_FEATURES,
        local_gain: bool = False,
        light: bool = False,
        gain_limit: float | None = GAIN_LIMIT,
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
            "light": light,
            "gain_limit": gain_limit,
        }
        self.gain_limit = gain_limit
        self.local_gain = local_gain
        self.max_count = max_count
        self.min_frames = min_frames
        self.gain_scale = gain_scale
        self.light = light
        step, kernel = (2, 3) if light else (1, 5)
        self.stride = step * 2 ** (len(widths) - 1)
        # Two filters per block, one block on the way down and one up, reach so far in either direction at the rate of
        # each level, and the changes of rate one more each.
        self.halo = sum((4 * (kernel // 2) + 2) * step * 2**level for level in range(len(widths)))
        n_summary, n_rate = widths[-1], 8
        self.rate = nn.Sequential(nn.Linear(2, n_rate), nn.ReLU(), nn.Linear(n_rate, n_rate))
        self.stem = nn.Conv1d(n_features, widths[0], 4 + step, stride=step, padding=2)
        self.down = nn.ModuleList(FilmBlock(w, w, n_rate, kernel) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv1d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.pool = nn.Linear(2 * widths[-1], n_summary)
        self.bottom = FilmBlock(widths[-1], widths[-1], n_rate + n_summary, kernel)
        self.grow = nn.ModuleList(nn.Conv1d(b, a, 1) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(FilmBlock(w if light else 2 * w, w, n_rate + n_summary, kernel) for w in widths[:-1])
        n_out = 1 + max_count + local_gain
        self.head = nn.Conv1d(widths[0], step * n_out, 1)
        self.gain = gain_layers(n_rate + n_summary)
        with torch.no_grad():
            # Start as a Poisson distribution of about one spike per second, whatever the frame rate.
            weight, bias = (x.unflatten(0, (step, n_out)) for x in (self.head.weight, cast(Tensor, self.head.bias)))
            weight[:, 1:] = 0
            bias[:] = 0
            bias[:, 1 + max_count :] = 2.0

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
        frames = coarsest.squeeze(2).mT  # contiguous: sums over time run over channels side by side
        mean = frames.mean(1, keepdim=True)
        # What `torch.var` over the first of two axes does as well, in a fraction of its time.
        spread = ((frames - mean).square().mean(1) + 1e-6).sqrt()
        return torch.relu(self.pool(torch.cat([mean[:, 0], spread], 1)))

    def _decode(self, skips: list[Tensor], rate: Tensor, summary: Tensor) -> Tensor:
        condition = torch.cat([rate, summary], 1)
        x = self.bottom(skips[-1], condition)
        for grow, up, skip in zip(reversed(self.grow), reversed(self.up), reversed(skips[:-1]), strict=True):
            x = up(upsample(cast(nn.Conv1d, grow), x, skip, add=self.light), condition)
        out = to_frames(self.head, torch.relu(x))
        return out.unflatten(1, (2, -1)).movedim(1, -1).flatten(-2) if self.light else out

    def posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor) -> GainCategorical:
        """Poisson log-probabilities of the counts plus the learned residual, and the gain of each cell."""
        mean, width = self.gain(torch.cat([self._rate(log_rate), summary], 1)).unbind(-1)
        gain_std = gain_deviation(width, self.gain_limit)
        n = 1 + self.max_count
        response = torch.sigmoid(local[:, n]) if self.local_gain else None
        return GainCategorical(count_logits(local[:, :n], log_rate), mean, gain_std, response).widened(self.gain_scale)

    def _rate(self, log_rate: Tensor) -> Tensor:
        x = log_rate - math.log(30.0)
        return self.rate(torch.stack([x, x**2], -1))

    def _encode(self, features: Tensor, rate: Tensor) -> list[Tensor]:
        """Outputs of every level, finest first; the trace is padded to a multiple of ``stride``."""
        padding = -features.shape[-1] % self.stride
        x = convolve(self.stem, to_channels_last(nn.functional.pad(features, (0, padding))))
        skips = [self.down[0](x, rate)]
        for shrink, block in zip(self.shrink, self.down[1:], strict=True):
            skips.append(block(convolve(cast(nn.Conv1d, shrink), skips[-1]), rate))
        return skips
