"""How measured frames differ from the noise-free fluorescence: the noise part of a generative model."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from napari_calvae.generative.parameters import Parameter, Theta

#: Log-density of a standard normal number at zero.
_AT_ZERO = -0.5 * math.log(2 * math.pi)


class Noise(abc.ABC):
    """A distribution of residuals (time) given the noise-free fluorescence, with parameters that join the model's θ.

    ``noise_density`` (ΔF/F/√Hz), which every model has, is the density at low frequencies and at baseline, so that all
    kinds of noise that are described by θ alone mean the same by it, at any frame rate.

    Attributes
    ----------
    config
        Keyword arguments that build it again, JSON-like.
    learned
        What it knows from data beyond θ, the same for all cells: a module without parameters where that is nothing.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    #: Those beyond ``noise_density``.
    parameters: tuple[Parameter, ...] = ()

    def __init__(self, **config: Any) -> None:
        self.config = config
        self.learned = nn.Module()

    @abc.abstractmethod
    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame at baseline (ΔF/F), drift aside."""

    @abc.abstractmethod
    def log_prob(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out"]:
        """Log-density of the measured frames' residuals; the others are zero and left out.

        Parameters
        ----------
        residual, expected
            (batch, time) ΔF/F beyond the noise-free fluorescence, and that.
        theta
            Physical parameters of the whole model, each (batch,).
        frame_rate
            Frames per second (Hz).
        measured
            Which frames were measured.
        """

    @abc.abstractmethod
    def drift(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out time"]:
        """Expected slow change of the baseline (ΔF/F) given the residuals, as in `log_prob`; zero without drift."""

    @abc.abstractmethod
    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals for a given noise-free fluorescence."""

    @abc.abstractmethod
    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """Where a fit begins, from the density at which independent noise has the residuals' variance."""


class NormalNoise(Noise):
    """Jointly normal residuals r, each of which depends on the measured one before it and on no other.

    z_t = gain_t (r_t − carry_t r_p), where p is the measured frame before t, are independent standard normal numbers.
    """

    @abc.abstractmethod
    def whitening(
        self,
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> tuple[Float[Tensor, "*gain #time"], Float[Tensor, "*carry time"] | None]:
        """Gain and carry of each frame; None where none depends on another. Where p is none the carry is zero."""

    @final
    def log_prob(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out"]:
        """That of the multivariate normal distribution of what was measured: exact."""
        gain, carry = self.whitening(expected, theta, frame_rate, measured)
        z = whiten(residual, gain, carry, measured)
        return torch.where(measured, _AT_ZERO - 0.5 * z**2 + gain.log(), 0).sum(-1)

    @final
    def drift(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out time"]:
        """None."""
        return torch.zeros_like(residual)


def previous_frame(measured: Bool[Tensor, "*measured time"]) -> Int[Tensor, "*measured time"]:
    """Index of the last measured frame before each frame, −1 where there is none."""
    frames = torch.arange(measured.shape[-1], device=measured.device)
    latest = torch.where(measured, frames, -1).cummax(-1).values
    return torch.cat([torch.full_like(latest[..., :1], -1), latest[..., :-1]], -1)


def whiten(
    residual: Float[Tensor, "*out time"],
    gain: Float[Tensor, "*gain #time"],
    carry: Float[Tensor, "*carry time"] | None,
    measured: Bool[Tensor, "*measured time"],
) -> Float[Tensor, "*out time"]:
    """Make residuals independent and standard normal; see `NormalNoise`. Missing frames hold anything."""
    if carry is None:
        return gain * residual
    before = previous_frame(measured).clamp_min(0).expand(residual.shape)
    return gain * (residual - carry * residual.gather(-1, before))


def standard_normal(like: Float[Tensor, "*shape"], generator: torch.Generator | None) -> Float[Tensor, "*shape"]:
    """Independent standard normal numbers."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
