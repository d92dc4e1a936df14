"""How measured frames differ from the noise-free fluorescence: the noise part of a generative model."""

from __future__ import annotations

import abc
import math
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from napari_calvae.generative.parameters import BASELINE, NOISE, Parameter, Theta, as_rate
from napari_calvae.generative.recursion import linear_scan

SHOT = Parameter(
    "shot", "1/(ΔF/F)", "Shot noise", "Growth of the variance with fluorescence; 1 is photon noise alone", 1.0, 0.8
)
CORRELATION = Parameter("tau_noise", "s", "Noise correlation", "Time over which the noise is correlated", 0.1, 1.0)


class Noise(abc.ABC):
    """A distribution of residuals (time) given the noise-free fluorescence, with parameters that join the model's θ.

    ``noise_density`` (ΔF/F/√Hz), which every model has, is the density at low frequencies and at baseline, so that all
    kinds of noise mean the same by it, at any frame rate.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    #: Those beyond ``noise_density``.
    parameters: ClassVar[tuple[Parameter, ...]] = ()

    @abc.abstractmethod
    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame at baseline (ΔF/F)."""

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


@final
class GaussianNoise(Noise):
    """Independent from frame to frame: standard deviation noise_density · √(frame rate)."""

    name: ClassVar[str] = "gaussian"
    label: ClassVar[str] = "Independent"

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame (ΔF/F)."""
        return theta[NOISE.name] * as_rate(frame_rate, theta[NOISE.name]).sqrt()

    def log_prob(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out"]:
        """Sum of normal log-densities."""
        per_frame = _normal(residual, self.std(theta, frame_rate).unsqueeze(-1))
        return torch.where(measured, per_frame, 0).sum(-1)

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals."""
        return self.std(theta, frame_rate).unsqueeze(-1) * _standard(expected, generator)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """The density as it is."""
        return {NOISE.name: density}


@final
class SignalDependentNoise(Noise):
    """Independent, with a variance that grows with fluorescence: noise_density² · frame rate · (1 + shot · signal).

    The signal is ΔF/F above baseline, where it is positive. Photon counts have a variance proportional to their mean
    F₀ (1 + ΔF/F), which is shot = 1; light that does not come from the cell makes it less.
    """

    name: ClassVar[str] = "signal_dependent"
    label: ClassVar[str] = "Grows with fluorescence"
    parameters: ClassVar[tuple[Parameter, ...]] = (SHOT,)

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame at baseline (ΔF/F)."""
        return theta[NOISE.name] * as_rate(frame_rate, theta[NOISE.name]).sqrt()

    def log_prob(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out"]:
        """Sum of normal log-densities, each of its frame's variance."""
        per_frame = _normal(residual, self._stds(expected, theta, frame_rate))
        return torch.where(measured, per_frame, 0).sum(-1)

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals."""
        return self._stds(expected, theta, frame_rate) * _standard(expected, generator)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """The density as it is, and photon noise."""
        return {NOISE.name: density, SHOT.name: torch.full_like(density, SHOT.median)}

    def _stds(self, expected: Tensor, theta: Theta, frame_rate: float | Tensor) -> Tensor:
        signal = (expected - theta[BASELINE.name].unsqueeze(-1)).clamp_min(0)
        growth = torch.sqrt(1 + theta[SHOT.name].unsqueeze(-1) * signal)
        return self.std(theta, frame_rate).unsqueeze(-1) * growth


@final
class CorrelatedNoise(Noise):
    """A stationary AR(1) process: from frame to frame its correlation is ρ = e^{−dt/tau_noise}.

    Its variance is noise_density² · frame rate · tanh(dt / (2 tau_noise)), which makes its spectral density at low
    frequencies the same at every frame rate: independent noise where tau_noise is far below dt, an Ornstein–Uhlenbeck
    process of variance noise_density² / (2 tau_noise) where it is far above.
    """

    name: ClassVar[str] = "correlated"
    label: ClassVar[str] = "Correlated in time"
    parameters: ClassVar[tuple[Parameter, ...]] = (CORRELATION,)

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame (ΔF/F)."""
        rate = as_rate(frame_rate, theta[NOISE.name])
        return theta[NOISE.name] * torch.sqrt(rate * torch.tanh(0.5 / (rate * theta[CORRELATION.name])))

    def log_prob(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out"]:
        """Each measured frame given the measured one before, across however many missing ones: exact."""
        frames = torch.arange(residual.shape[-1], device=residual.device)
        latest = torch.where(measured, frames, -1).cummax(-1).values.expand(residual.shape)
        previous = torch.cat([torch.full_like(latest[..., :1], -1), latest[..., :-1]], -1)
        known = torch.where(previous >= 0, residual.gather(-1, previous.clamp_min(0)), 0)
        steps = (frames - previous).to(residual.dtype)
        exponent = steps / (as_rate(frame_rate, residual) * theta[CORRELATION.name]).unsqueeze(-1)
        first = previous < 0
        left = torch.where(first, 0, torch.exp(-exponent))
        gained = torch.where(first, 1, torch.sqrt(-torch.expm1(-2 * exponent)))
        per_frame = _normal(residual - left * known, self.std(theta, frame_rate).unsqueeze(-1) * gained)
        return torch.where(measured, per_frame, 0).sum(-1)

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals; the first frame is from the stationary distribution."""
        normal = _standard(expected, generator)
        exponent = (1 / (as_rate(frame_rate, normal) * theta[CORRELATION.name])).unsqueeze(-1).expand(expected.shape)
        gained = torch.sqrt(-torch.expm1(-2 * exponent))
        gained = torch.cat([torch.ones_like(gained[..., :1]), gained[..., 1:]], -1)
        return self.std(theta, frame_rate).unsqueeze(-1) * linear_scan(torch.exp(-exponent), gained * normal)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """The density that gives the residuals' variance at the usual correlation time."""
        usual = {NOISE.name: torch.ones_like(density), CORRELATION.name: torch.full_like(density, CORRELATION.median)}
        usual[NOISE.name] = density * as_rate(frame_rate, density).sqrt() / self.std(usual, frame_rate)
        return usual


#: Every kind of noise that a saved model may name.
NOISES: dict[str, type[Noise]] = {cls.name: cls for cls in (GaussianNoise, SignalDependentNoise, CorrelatedNoise)}


def _normal(residual: Tensor, std: Tensor) -> Tensor:
    return -0.5 * (residual / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)


def _standard(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
