"""A posterior for a recording that is still going on: spikes of a frame from what came up to a few frames after it.

Dilated causal convolutions (van den Oord et al. 2016, WaveNet, section 2.1) with the gain of `FactorizedNetwork`. Whole
traces pass through as through any other network; `step` and `advance` make the same outputs as frames come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork, trace_features, trace_scale
from napari_calvae.recognition.factorized import GAIN_LIMIT, GainCategorical, count_logits, gain_deviation, gain_layers

#: Frames that the first layer sees, the last of them the newest.
_STEM = 5
#: Traces are at least this long (frames) where they are summarised.
_SHORTEST = 64
#: From so many ROIs on a product of all of them for one frame is as fast as one over many frames.
_MANY_ROIS = 64


@dataclass
class CausalState:
    """What `CausalNetwork.step` remembers: the last features, and each block's input as far back as its taps reach.

    ``history`` (4, channel, roi) features; ``rings`` one (2 · dilation, width, roi) per block; ``recent`` (lag, width,
    roi) what the blocks made of the last frames. Of these rings the newest frame takes the place of the oldest: frame k
    is in row k modulo their length. ``films`` (block, 2, width, roi) scale and shift of each block; ``layers`` what is
    applied frame by frame; ``now`` frames so far. ROIs come last: products are with all of them at once.
    """

    history: Tensor
    rings: list[Tensor]
    recent: Tensor
    films: Tensor
    layers: list[_OneFrame]
    now: int = 0


class _Block(nn.Module):
    """Three taps ``dilation`` frames apart around a residual path, scaled and shifted by a condition (FiLM)."""

    def __init__(self, width: int, dilation: int, n_condition: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.taps = nn.Conv1d(3 * width, width, 1)
        self.out = nn.Conv1d(width, width, 1)
        self.film = nn.Linear(n_condition, 2 * width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        with torch.no_grad():
            self.out.weight.mul_(0.5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, None].chunk(2, -1)
        return self.after(nn.functional.pad(x, (0, 0, 2 * self.dilation, 0)), x, 1 + scale, shift)

    def after(self, past: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """(roi, time, width) for ``x``, which ends ``past``, that begins 2 · dilation frames earlier."""
        n, d = x.shape[1], self.dilation
        taps = _linear(self.taps, torch.cat([past[:, :n], past[:, d : d + n], x], -1))
        return x + _linear(self.out, torch.relu_(torch.addcmul(shift, taps, scale)))


class _OneFrame:
    """A convolution for one frame of many ROIs: a product of matrices for each of the frames that its filters see."""

    def __init__(self, layer: nn.Module, n_frames: int) -> None:
        weight, bias = cast(Tensor, layer.weight).detach(), cast(Tensor, layer.bias).detach()
        if weight.shape[2] != n_frames:  # frames are side by side as channels
            weight = weight[..., 0].unflatten(1, (n_frames, -1)).mT
        self.filters = [part.contiguous() for part in weight.unbind(2)]
        self.bias = bias[:, None]

    def __call__(self, *frames: Float[Tensor, "input roi"]) -> Float[Tensor, "output roi"]:
        """(output, roi) for the newest of the frames, which come oldest first."""
        out = torch.mm(self.filters[0], frames[0])
        for weight, frame in zip(self.filters[1:], frames[1:], strict=True):
            out.addmm_(weight, frame)
        return out.add_(self.bias)


class _Head(nn.Module):
    """Outputs for the frame ``lag`` before the newest, from what the blocks made of all frames since."""

    def __init__(self, width: int, lag: int, n_outputs: int) -> None:
        super().__init__()
        self.lag = lag
        self.since = nn.Conv1d(width, width, lag + 1)
        self.out = nn.Conv1d(width, n_outputs, 1)

    def forward(self, trunk: Tensor) -> Tensor:
        """(roi, output, time) from (roi, time + lag, width)."""
        return _linear(self.out, torch.relu(_linear(self.since, _windows(trunk, self.lag + 1)))).mT


class CausalNetwork(RecognitionNetwork):
    """Counts per frame, given a latent gain of the cell, from the frames up to ``lag`` after it.

    Parameters
    ----------
    width
        Channels.
    n_levels
        Blocks; the taps of each are twice as far apart as those of the one before.
    lags
        Lags (frames) that it is trained for.
    lag
        The one of them that it answers with.
    max_count
        Highest spike count per frame.
    gain_scale
        Factor on the standard deviation of the log-gain.
    min_frames
        Shortest trace that it is trained on.
    gain_limit
        Highest standard deviation of the log-gain before ``gain_scale``; None in networks from before there was one.
    """

    name: ClassVar[str] = "causal"
    unnamed: ClassVar[Mapping[str, Any]] = {"gain_limit": None}
    causal: ClassVar[bool] = True

    def __init__(
        self,
        width: int = 32,
        n_levels: int = 8,
        lags: Sequence[int] = (0, 1, 2, 4, 8),
        lag: int = 4,
        max_count: int = 10,
        gain_scale: float = 1.0,
        min_frames: int = 1,
        gain_limit: float | None = GAIN_LIMIT,
    ) -> None:
        super().__init__()
        self.lags = tuple(lags)
        self.config: dict[str, Any] = {
            "width": width,
            "n_levels": n_levels,
            "lags": list(lags),
            "lag": lag,
            "max_count": max_count,
            "gain_scale": gain_scale,
            "min_frames": min_frames,
            "gain_limit": gain_limit,
        }
        self.set_lag(lag)
        self.gain_limit = gain_limit
        self.max_count = max_count
        self.gain_scale = gain_scale
        self.min_frames = min_frames
        self.stride = 1
        self.halo = max(_STEM - 1 + 2 * (2**n_levels - 1), *self.lags)
        n_rate, n_summary = 8, 32
        self.rate = nn.Sequential(nn.Linear(2, n_rate), nn.ReLU(), nn.Linear(n_rate, n_rate))
        widths = (N_FEATURES, 16, 24, n_summary)
        self.coarse = nn.ModuleList(nn.Conv1d(a, b, 4, stride=4) for a, b in itertools.pairwise(widths))
        self.pool = nn.Linear(2 * n_summary, n_summary)
        self.stem = nn.Conv1d(N_FEATURES, width, _STEM)
        self.blocks = nn.ModuleList(_Block(width, 2**level, n_rate + n_summary) for level in range(n_levels))
        self.heads = nn.ModuleList(_Head(width, lag, 2 + max_count) for lag in self.lags)
        self.gain = gain_layers(n_rate + n_summary)
        with torch.no_grad():
            # Start as a Poisson distribution of about one spike per second, whatever the frame rate.
            for head in self.heads:
                out = cast(_Head, head).out
                weight, bias = out.weight, cast(Tensor, out.bias)
                weight[1:] = 0
                bias[:] = 0
                bias[1 + max_count :] = 2.0

    def set_lag(self, lag: int) -> None:
        """Answer with this lag (frames) from now on.

        Raises
        ------
        ValueError
            If the network is not trained for it.
        """
        if lag not in self.lags:
            raise ValueError(f"lag: expected one of {', '.join(map(str, self.lags))} frames, got {lag}.")
        self.lag = self.config["lag"] = lag

    def set_gain_scale(self, gain_scale: float) -> None:
        """Widen the posterior of the log-gain by this factor."""
        self.gain_scale = self.config["gain_scale"] = float(gain_scale)

    def summarise(self, features: Tensor, log_rate: Tensor) -> Tensor:
        """Mean and spread over time of what strided convolutions make of the trace."""
        x = nn.functional.pad(features, (0, max(0, _SHORTEST - features.shape[-1]))).mT
        for layer in self.coarse:
            x = torch.relu(_linear(layer, _windows(x, 4, 4)))
        spread = (x.var(1, unbiased=False) + 1e-6).sqrt()
        return torch.relu(self.pool(torch.cat([x.mean(1), spread], 1)))

    def local(self, features: Tensor, log_rate: Tensor, summary: Tensor) -> Tensor:
        """Log-rate (spikes/s), residual log-weights of the counts 1, 2, …, and log-odds of the gain's response."""
        return self._answer(self._trunk(features, log_rate, summary, self.lag), self.lag, features.shape[-1])

    def summary_and_local(self, features: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
        """Summary and outputs of whole traces."""
        summary = self.summarise(features, log_rate)
        return summary, self.local(features, log_rate, summary)

    def posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor) -> GainCategorical:
        """Poisson log-probabilities of the counts plus the learned residual, and the gain of each cell."""
        return self.given_gain(local, log_rate, *self.gain_of(log_rate, summary))

    def gain_of(self, log_rate: Tensor, summary: Tensor) -> tuple[Float[Tensor, " roi"], Float[Tensor, " roi"]]:
        """Mean and standard deviation of the log-gain of each cell, before ``gain_scale``."""
        mean, width = self.gain(self._condition(log_rate, summary)).unbind(-1)
        return mean, gain_deviation(width, self.gain_limit)

    def given_gain(self, local: Tensor, log_rate: Tensor, gain_mean: Tensor, gain_std: Tensor) -> GainCategorical:
        """`posterior` where `gain_of` is known already."""
        n = 1 + self.max_count
        logits, response = count_logits(local[:, :n], log_rate), torch.sigmoid(local[:, n])
        return GainCategorical(logits, gain_mean, gain_std, response).widened(self.gain_scale)

    def every_lag(
        self,
        fluorescence: Float[Tensor, "roi time"],
        frame_rate: Float[Tensor, " roi"],
        valid: Bool[Tensor, "roi time"] | None = None,
        lags: Sequence[int] = (),
        n_known: int | None = None,
    ) -> dict[int, GainCategorical]:
        """Posterior by lag, all of them unless told which, of traces that pass through once.

        What a trace is as a whole is told from the first ``n_known`` frames, as in a recording that is going on.
        """
        known = slice(n_known)
        scale = trace_scale(fluorescence[:, known], None if valid is None else valid[:, known])
        features, log_rate = trace_features(fluorescence, valid, scale), frame_rate.log()
        summary = self.summarise(features[..., known], log_rate)
        lags = lags or self.lags
        trunk = self._trunk(features, log_rate, summary, max(lags))
        n = features.shape[-1]
        return {lag: self.posterior(self._answer(trunk, lag, n), log_rate, summary) for lag in lags}

    def start(self, n_rois: int) -> CausalState:
        """State before the first frame: nothing was measured, and no ROI is conditioned yet."""
        like = next(self.parameters())
        width = self.config["width"]
        return CausalState(
            history=like.new_zeros(_STEM - 1, N_FEATURES, n_rois),
            rings=[like.new_zeros(2 * block.dilation, width, n_rois) for block in self._blocks],
            recent=like.new_zeros(self.lag, width, n_rois),
            films=like.new_zeros(len(self.blocks), 2, width, n_rois),
            layers=[
                _OneFrame(self.stem, _STEM),
                *(layer for b in self._blocks for layer in (_OneFrame(b.taps, 3), _OneFrame(b.out, 1))),
                _OneFrame(self._head.since, 1 + self.lag),
                _OneFrame(self._head.out, 1),
            ],
        )

    def condition(self, state: CausalState, rois: Tensor, log_rate: Tensor, summary: Tensor) -> None:
        """Let some ROIs (their rows) be seen in the light of a summary from now on."""
        weight, bias = (torch.cat([getattr(block.film, name) for block in self._blocks]) for name in ("weight", "bias"))
        films = nn.functional.linear(self._condition(log_rate, summary), weight, bias).T
        films = films.reshape(len(self.blocks), 2, -1, len(rois))
        films[:, 0] += 1
        state.films[..., rois] = films

    def step(self, state: CausalState, features: Float[Tensor, "roi channel"]) -> Float[Tensor, "roi output 1"]:
        """Take one more frame of every ROI: `local` of the frame ``lag`` before it."""
        now = state.now
        stem, *blocks, since, out = state.layers
        x = stem(*_followed(state.history, features.T, now))
        layers = zip(blocks[::2], blocks[1::2], strict=True)
        for (first, second), ring, (scale, shift) in zip(layers, state.rings, state.films, strict=True):
            reach = len(ring)
            h = first(ring[now % reach], ring[(now + reach // 2) % reach], x)
            ring[now % reach] = x
            x = second(torch.addcmul(shift, h, scale, out=h).relu_()).add_(x)
        hidden = since(*_followed(state.recent, x.relu_(), now)).relu_()
        state.now += 1
        return out(hidden).T[..., None]

    def advance(
        self, state: CausalState, features: Float[Tensor, "roi channel time"]
    ) -> Float[Tensor, "roi output time"]:
        """`step` frame by frame, faster where there are many."""
        n_rois, _, n = features.shape
        if n_rois >= _MANY_ROIS or n <= len(self.blocks):
            return torch.cat([self.step(state, frame) for frame in features.unbind(-1)], -1)
        x = _linear(self.stem, _windows(_joined(state.history, features.mT, state.now), _STEM))
        for block, ring, (scale, shift) in zip(self._blocks, state.rings, state.films, strict=True):
            x = block.after(_joined(ring, x, state.now), x, scale.T[:, None], shift.T[:, None])
        out = self._head(_joined(state.recent, torch.relu(x), state.now))
        state.now += n
        return out

    def _trunk(self, features: Tensor, log_rate: Tensor, summary: Tensor, ahead: int) -> Tensor:
        """(roi, time + ahead, width): frames after the last are missing."""
        condition = self._condition(log_rate, summary)
        x = _linear(self.stem, _windows(nn.functional.pad(features, (_STEM - 1, ahead)).mT, _STEM))
        for block in self._blocks:
            x = block(x, condition)
        return torch.relu(x)

    @property
    def _blocks(self) -> list[_Block]:
        return [cast(_Block, block) for block in self.blocks]

    @property
    def _head(self) -> _Head:
        return cast(_Head, self.heads[self.lags.index(self.lag)])

    def _answer(self, trunk: Tensor, lag: int, n_frames: int) -> Tensor:
        return self.heads[self.lags.index(lag)](trunk[:, : lag + n_frames])

    def _condition(self, log_rate: Tensor, summary: Tensor) -> Tensor:
        x = log_rate - math.log(30.0)
        return torch.cat([self.rate(torch.stack([x, x**2], -1)), summary], 1)


# Layers are convolutions by name and shape of their weights, but are applied as products of matrices: with few channels
# that takes a tenth to a third less time.


def _windows(x: Float[Tensor, "roi time channel"], n: int, step: int = 1) -> Float[Tensor, "roi frame input"]:
    """As many frames as filters are long, side by side."""
    return x.unfold(1, n, step).flatten(2)


def _linear(layer: nn.Module, x: Float[Tensor, "roi time input"]) -> Float[Tensor, "roi time output"]:
    """What a convolution makes of frames, each beside those that its filters see with it."""
    conv = cast(nn.Conv1d, layer)
    return nn.functional.linear(x, conv.weight.flatten(1), conv.bias)


def _followed(ring: Tensor, newest: Tensor, now: int) -> list[Tensor]:
    """The frames of a ring, oldest first, and the newest, which takes the place of the oldest once they are used."""
    reach = len(ring)
    if not reach:
        return [newest]
    frames = [ring[(now + k) % reach] for k in range(1, reach)]
    oldest = ring[now % reach].clone()
    ring[now % reach] = newest
    return [oldest, *frames, newest]


def _joined(ring: Tensor, new: Float[Tensor, "roi time channel"], now: int) -> Float[Tensor, "roi frame channel"]:
    """The frames of a ring, oldest first, and new ones, the last of which take their place."""
    reach = len(ring)
    if not reach:
        return new
    past = torch.cat([ring.roll(-(now % reach), 0).permute(2, 0, 1), new], 1)
    ring[:] = past[:, -reach:].permute(1, 2, 0).roll((now + new.shape[1]) % reach, 0)
    return past
