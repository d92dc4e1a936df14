"""Noise learned from data: a normalising flow on the residual, one frame given those before it."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn.functional import pad

from napari_calvae.generative.noise import Noise, standard_normal
from napari_calvae.generative.normal_noise import GaussianNoise
from napari_calvae.generative.parameters import BASELINE, NOISE, Theta, as_rate
from napari_calvae.generative.recursion import exponential_filter

#: Frames before the present one that are seen one by one.
_LAGS = 3
#: Over these times (s) what came before is seen as an average.
_MEMORY = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
#: Residuals beyond this many standard deviations look no larger to the frames after them.
_CLIP = 8.0
#: E|z| of a standard normal number.
_MEAN_SIZE = math.sqrt(2 / math.pi)
#: Of `FlowNoise.fit`.
_BATCH, _LEARNING_RATE = 16, 5e-3


class _Past(NamedTuple):
    """What a frame sees of the residuals (in standard deviations) before it."""

    recent: Tensor  # (batch, time, lag) residuals, zero where missing
    there: Tensor  # (batch, time, lag) 1 where measured
    totals: Tensor  # (batch, time, 3, memory) fading sums of residuals, of their sizes and of how many there were


@final
class FlowNoise(Noise):
    """An autoregressive flow: z_t = f(r_t; what came before, what is expected), z independent standard normal numbers.

    In units u = r / (noise_density √(frame rate)) the map is z = sinh(δ asinh((u − μ)/s) − ε), whose tails are heavier
    than normal for δ < 1 and skewed for ε ≠ 0 (sinh-arcsinh, Jones & Pewsey 2009). Location μ, scale s, ε and δ come
    from a small network that sees the three frames before, averages of residuals and of their sizes over 0.1 to 30 s,
    the expected fluorescence around the frame in standard deviations of the noise, and the frame rate. What is learned
    is therefore the same for cells of any noise level, and its memory is in seconds. The density is exact, the inverse
    in closed form. Weights that were never fitted make it `GaussianNoise`.

    ``noise_density`` is here the unit that the network works in: the standard deviation of one frame, divided by
    √(frame rate), in the recordings that it was fitted to.

    Missing frames are left out of the product and are missing to the frames after them. That is a normalised density
    for every set of measured frames, but not the marginal of that for all frames, which has no closed form.

    Parameters
    ----------
    width
        Hidden units of the network.
    """

    name: ClassVar[str] = "flow"
    label: ClassVar[str] = "Learned from recordings"

    def __init__(self, width: int = 32) -> None:
        super().__init__(width=width)
        self.learned = _Conditioner(width)

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """The unit (ΔF/F) in which the flow works: the standard deviation of one frame in what it was fitted to."""
        return GaussianNoise().std(theta, frame_rate)

    def log_prob(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out"]:
        """Sum over the measured frames of their log-densities given the measured frames before."""
        z, log_slope = self.to_normal(residual, expected, theta, frame_rate, measured)
        per_frame = log_slope - 0.5 * z**2 - 0.5 * math.log(2 * math.pi)
        return torch.where(measured, per_frame, 0).sum(-1)

    def drift(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out time"]:
        """None that could be told from the rest."""
        return torch.zeros_like(residual)

    def to_normal(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> tuple[Float[Tensor, "*out time"], Float[Tensor, "*out time"]]:
        """The z of every frame, and log dz/dr."""
        std = self.std(theta, frame_rate).unsqueeze(-1)
        u = residual / std
        rate = as_rate(frame_rate, u)
        past = _past(u, measured.expand(u.shape), rate)
        shape = self.learned(past, self._signal(expected, theta, std), rate)
        z, log_slope = _forward(u, shape)
        return z, log_slope - std.log()

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals, frame by frame."""
        with torch.no_grad():
            std = self.std(theta, frame_rate).unsqueeze(-1)
            rate = as_rate(frame_rate, std)
            signal = self._signal(expected, theta, std)
            normal = standard_normal(expected, generator)
            past, drawn = _nothing(expected), []
            for t in range(expected.shape[-1]):
                shape = self.learned(past, signal[..., t : t + 1, :], rate)
                drawn.append(_backward(normal[..., t : t + 1], shape))
                past = _later(past, drawn[-1], rate)
            return std * torch.cat(drawn, -1)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """The density as it is."""
        return {NOISE.name: density}

    def fit(
        self,
        residual: Float[Tensor, "window time"],
        expected: Float[Tensor, "window time"],
        theta: Theta,
        frame_rate: Float[Tensor, " window"],
        measured: Bool[Tensor, "window time"],
        n_steps: int = 500,
        seed: int = 0,
    ) -> None:
        """Learn from residuals of recordings, by maximum likelihood of random batches of windows.

        Parameters
        ----------
        residual, expected, measured
            (window, time) as in `log_prob`; `GenerativeModel.residual` makes them. Windows shorter than the longest
            memory, 30 s, cannot teach it.
        theta
            Of each window's cell, (window,); not changed. Its noise density is the unit that the flow works in.
        frame_rate
            (window,) frames per second (Hz).
        n_steps
            Steps of Adam, along a cosine.
        seed
            Of the choice of windows.
        """
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(self.learned.parameters(), lr=_LEARNING_RATE)
        for step in range(n_steps):
            optimiser.param_groups[0]["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / n_steps))
            rows = torch.randint(len(residual), (min(_BATCH, len(residual)),), generator=generator)
            own = {name: value[rows] for name, value in theta.items()}
            log_p = self.log_prob(residual[rows], expected[rows], own, frame_rate[rows], measured[rows])
            optimiser.zero_grad(set_to_none=True)
            (-log_p.sum() / measured[rows].sum().clamp_min(1)).backward()
            nn.utils.clip_grad_norm_(self.learned.parameters(), 1.0)
            optimiser.step()

    def _signal(self, expected: Tensor, theta: Theta, std: Tensor) -> Float[Tensor, "*batch time 3"]:
        """Expected fluorescence before, in and after each frame, above baseline and in standard deviations."""
        signal = torch.asinh((expected - theta[BASELINE.name].unsqueeze(-1)) / std)
        first, last = signal[..., :1], signal[..., -1:]
        before, after = torch.cat([first, signal[..., :-1]], -1), torch.cat([signal[..., 1:], last], -1)
        return torch.stack([before, signal, after], -1)


class _Conditioner(nn.Module):
    """Location, log-scale, ε and log δ of each frame's map; zero, the identity, before it is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        n_input = 2 * _LAGS + 3 * len(_MEMORY) + 3 + 1
        with torch.random.fork_rng(devices=[]):  # it starts the same every time, and leaves others' numbers alone
            torch.manual_seed(0)
            self.hidden = nn.Sequential(nn.Linear(n_input, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.head = nn.Linear(width + n_input, 4)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, past: _Past, signal: Tensor, rate: Tensor) -> Float[Tensor, "*batch time 4"]:
        residuals, sizes, n = past.totals.unbind(-2)
        # Averages that one frame more, of residual zero and of usual size, would be in: few frames say little.
        means = torch.cat([residuals, sizes - _MEAN_SIZE * n], -1) / (torch.cat([n, n], -1) + 1)
        fps = (rate / 30.0).log()[..., None, None]
        parts = [past.recent, past.there, means, torch.log1p(n) / 4, signal, fps]
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
        x = torch.cat([p.expand(*batch, -1) for p in parts], -1).to(self.head.weight.dtype)
        return self.head(torch.cat([self.hidden(x), x], -1)).to(signal.dtype)


def _bounded(shape: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Location, log-scale, ε and log δ, the last three within what a residual can plausibly look like."""
    location, scale, skew, tail = shape.unbind(-1)
    return location, 2 * torch.tanh(scale / 2), 2 * torch.tanh(skew / 2), torch.tanh(tail)


def _forward(u: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    """The z of every frame, and log dz/du."""
    location, log_scale, skew, log_tail = _bounded(shape)
    x = (u - location) * torch.exp(-log_scale)
    y = torch.exp(log_tail) * torch.asinh(x) - skew
    log_cosh = y.abs() + torch.log1p(torch.exp(-2 * y.abs())) - math.log(2)
    return torch.sinh(y), log_cosh + log_tail - 0.5 * torch.log1p(x**2) - log_scale


def _backward(z: Tensor, shape: Tensor) -> Tensor:
    location, log_scale, skew, log_tail = _bounded(shape)
    return location + torch.exp(log_scale) * torch.sinh((torch.asinh(z) + skew) * torch.exp(-log_tail))


def _seen(u: Tensor, measured: Tensor) -> Tensor:
    """(batch, 3, time): residual, its size and 1, all zero where missing."""
    u = u.clamp(-_CLIP, _CLIP)
    return torch.stack([u, u.abs(), torch.ones_like(u)], -2) * measured.unsqueeze(-2)


def _decays(rate: Tensor) -> Float[Tensor, "*rate memory"]:
    return torch.exp(-1 / (rate.unsqueeze(-1) * rate.new_tensor(_MEMORY)))


def _past(u: Tensor, measured: Tensor, rate: Tensor) -> _Past:
    """Of all frames at once."""
    seen = _seen(u, measured)
    lags = [pad(seen, (k, 0))[..., : u.shape[-1]] for k in range(1, _LAGS + 1)]
    recent, there = torch.stack([x[..., 0, :] for x in lags], -1), torch.stack([x[..., 2, :] for x in lags], -1)
    decays = _decays(rate).unsqueeze(-2)  # (rate, 1, memory)
    one = torch.ones_like(decays)
    totals = exponential_filter(seen.unsqueeze(-2), 0 * decays, one.unsqueeze(-1), decays.unsqueeze(-1))
    return _Past(recent, there, totals.movedim(-1, -3))


def _nothing(like: Tensor) -> _Past:
    """Before the first frame."""
    batch = like.shape[:-1]
    lags = like.new_zeros(*batch, 1, _LAGS)
    return _Past(lags, lags, like.new_zeros(*batch, 1, 3, len(_MEMORY)))


def _later(past: _Past, u: Float[Tensor, "*batch 1"], rate: Tensor) -> _Past:
    """One measured frame later."""
    seen = _seen(u, torch.ones_like(u)).movedim(-1, -2)  # (batch, 1, 3)
    recent = torch.cat([seen[..., :1], past.recent[..., :-1]], -1)
    there = torch.cat([seen[..., 2:], past.there[..., :-1]], -1)
    totals = past.totals * _decays(rate)[..., None, None, :] + seen.unsqueeze(-1)
    return _Past(recent, there, totals)
