"""Noises that are normal: independent, growing with fluorescence, correlated in time."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from napari_calvae.generative.noise import NormalNoise, previous_frame, standard_normal
from napari_calvae.generative.parameters import BASELINE, NOISE, Parameter, Theta, as_rate
from napari_calvae.generative.recursion import linear_scan

SHOT = Parameter(
    "shot", "1/(ΔF/F)", "Shot noise", "Growth of the variance with fluorescence; 1 is photon noise alone", 1.0, 0.8
)
CORRELATION = Parameter(
    "tau_noise", "s", "Noise correlation", "Time over which the noise is correlated", 0.1, 1.0, own=True
)


@final
class GaussianNoise(NormalNoise):
    """Independent from frame to frame: standard deviation noise_density · √(frame rate)."""

    name: ClassVar[str] = "gaussian"
    label: ClassVar[str] = "Independent"

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame (ΔF/F)."""
        return theta[NOISE.name] * as_rate(frame_rate, theta[NOISE.name]).sqrt()

    def whitening(
        self,
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> tuple[Float[Tensor, "*gain #time"], Float[Tensor, "*carry time"] | None]:
        """One over the standard deviation."""
        return 1 / self.std(theta, frame_rate).unsqueeze(-1), None

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals."""
        return self.std(theta, frame_rate).unsqueeze(-1) * standard_normal(expected, generator)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """The density as it is."""
        return {NOISE.name: density}


@final
class SignalDependentNoise(NormalNoise):
    """Independent, with a variance that grows with fluorescence: noise_density² · frame rate · (1 + shot · signal).

    The signal is ΔF/F above baseline, where it is positive. Photon counts have a variance proportional to their mean
    F₀ (1 + ΔF/F), which is shot = 1; light that does not come from the cell makes it less.
    """

    name: ClassVar[str] = "signal_dependent"
    label: ClassVar[str] = "Grows with fluorescence"
    parameters: tuple[Parameter, ...] = (SHOT,)

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame at baseline (ΔF/F)."""
        return theta[NOISE.name] * as_rate(frame_rate, theta[NOISE.name]).sqrt()

    def whitening(
        self,
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> tuple[Float[Tensor, "*gain #time"], Float[Tensor, "*carry time"] | None]:
        """One over each frame's own standard deviation."""
        return 1 / self._stds(expected, theta, frame_rate), None

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals."""
        return self._stds(expected, theta, frame_rate) * standard_normal(expected, generator)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """The density as it is, and photon noise."""
        return {NOISE.name: density, SHOT.name: torch.full_like(density, SHOT.median)}

    def _stds(self, expected: Tensor, theta: Theta, frame_rate: float | Tensor) -> Tensor:
        signal = (expected - theta[BASELINE.name].unsqueeze(-1)).clamp_min(0)
        growth = torch.sqrt(1 + theta[SHOT.name].unsqueeze(-1) * signal)
        return self.std(theta, frame_rate).unsqueeze(-1) * growth


@final
class CorrelatedNoise(NormalNoise):
    """A stationary AR(1) process: from frame to frame its correlation is ρ = e^{−dt/tau_noise}.

    Its variance is noise_density² · frame rate · tanh(dt / (2 tau_noise)), which makes its spectral density at low
    frequencies the same at every frame rate: independent noise where tau_noise is far below dt, an Ornstein–Uhlenbeck
    process of variance noise_density² / (2 tau_noise) where it is far above.
    """

    name: ClassVar[str] = "correlated"
    label: ClassVar[str] = "Correlated in time"
    parameters: tuple[Parameter, ...] = (CORRELATION,)

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of one frame (ΔF/F)."""
        rate = as_rate(frame_rate, theta[NOISE.name])
        return theta[NOISE.name] * torch.sqrt(rate * torch.tanh(0.5 / (rate * theta[CORRELATION.name])))

    def whitening(
        self,
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> tuple[Float[Tensor, "*gain #time"], Float[Tensor, "*carry time"] | None]:
        """Each measured frame given the measured one before, across however many missing ones."""
        frames = torch.arange(measured.shape[-1], device=measured.device)
        previous = previous_frame(measured)
        tau = theta[CORRELATION.name]
        exponent = (frames - previous).to(tau.dtype) / (as_rate(frame_rate, tau) * tau).unsqueeze(-1)
        first = previous < 0
        gained = torch.where(first, 1, torch.sqrt(-torch.expm1(-2 * exponent)))
        carry = torch.where(first, 0, torch.exp(-exponent))
        return 1 / (self.std(theta, frame_rate).unsqueeze(-1) * gained), carry

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw residuals; the first frame is from the stationary distribution."""
        normal = standard_normal(expected, generator)
        exponent = (1 / (as_rate(frame_rate, normal) * theta[CORRELATION.name])).unsqueeze(-1).expand(expected.shape)
        gained = torch.sqrt(-torch.expm1(-2 * exponent))
        gained = torch.cat([torch.ones_like(gained[..., :1]), gained[..., 1:]], -1)
        return self.std(theta, frame_rate).unsqueeze(-1) * linear_scan(torch.exp(-exponent), gained * normal)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """The density that gives the residuals' variance at the usual correlation time."""
        usual = {NOISE.name: torch.ones_like(density), CORRELATION.name: torch.full_like(density, CORRELATION.median)}
        usual[NOISE.name] = density * as_rate(frame_rate, density).sqrt() / self.std(usual, frame_rate)
        return usual
