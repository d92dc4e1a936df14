"""What every generative model p(F | s, θ) is: spike counts per frame in, a distribution over fluorescence out.

θ holds physical values, in seconds, ΔF/F and Hz, and nothing of the frame rate: the same θ at two frame rates describes
the same cell. A model writes ``fluorescence`` and ``initial_theta``; the rest is final and the same for all.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from napari_calvae import interruption
from napari_calvae.generative.noise import Noise
from napari_calvae.generative.normal_noise import GaussianNoise
from napari_calvae.generative.parameters import BASELINE, NOISE, Parameter, Theta, as_rate

__all__ = ["BASELINE", "NOISE", "GenerativeModel", "Parameter", "Theta", "as_rate"]


class GenerativeModel(abc.ABC):
    """p(F | s, θ): a noise-free response to spikes, and around it noise, which is a part of its own.

    Frame k is centred on t_k and ``counts`` holds the spikes of [t_k − dt/2, t_k + dt/2), dt = 1/frame_rate, which are
    taken to be spread evenly over that interval. Batches of ``counts``, θ and ``frame_rate`` broadcast: θ of shape
    (roi,) serves counts (sample, roi, time).

    Parameters
    ----------
    noise
        How frames differ from the noise-free fluorescence, by default independently; see `Noise`.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    #: Whether the rows of one batch are compartments of one structure rather than independent cells; the last axis of
    #: the batch, of counts and of θ, is then that of the compartments.
    coupled: ClassVar[bool] = False
    #: The class's end with ``baseline`` and ``noise_density``, which every model has; an instance adds those of its
    #: noise, if it has more.
    parameters: tuple[Parameter, ...]

    def __init__(self, noise: Noise | None = None) -> None:
        self.noise = GaussianNoise() if noise is None else noise
        self.parameters = (*type(self).parameters, *self.noise.parameters)

    @abc.abstractmethod
    def fluorescence(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F of each frame.

        Parameters
        ----------
        counts
            (batch, time) spikes per frame; fractions are fine.
        theta
            Physical parameters, each (batch,).
        frame_rate
            Frames per second (Hz), one for all or (batch,).
        """

    @abc.abstractmethod
    def first_guess(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """What `initial_theta` returns, were the noise independent from frame to frame."""

    @final
    def initial_theta(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """Guess θ from ΔF/F and expected spike counts without gradient steps; without spikes, about the prior median.

        Finite whatever comes: missing frames (NaN, or ``valid`` False) are left out.
        """
        theta = self.first_guess(observed, counts, frame_rate, valid)
        return theta | self.noise.start(theta[NOISE.name], frame_rate)

    @final
    def log_prob(
        self,
        observed: Float[Tensor, "*observed time"],
        counts: Num[Tensor, "*counts bin"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "*valid time"] | None = None,
        bins: int = 1,
    ) -> Float[Tensor, "*out"]:
        """Log-density of whole traces given their spikes; missing frames (NaN, or ``valid`` False) drop out.

        With ``bins`` above 1 counts are that much finer than frames; see `per_frame`.
        """
        residual, expected, measured = self.residual(observed, counts, theta, frame_rate, valid, bins)
        return self.noise.log_prob(residual, expected, theta, frame_rate, measured)

    @final
    def residual(
        self,
        observed: Float[Tensor, "*observed time"],
        counts: Num[Tensor, "*counts bin"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "*valid time"] | None = None,
        bins: int = 1,
    ) -> tuple[Float[Tensor, "*out time"], Float[Tensor, "*clean time"], Bool[Tensor, "*measured time"]]:
        """What the noise has to explain: ΔF/F beyond the noise-free one, that, and which frames were measured.

        Arguments are those of `log_prob`; residuals are zero where a frame is missing.
        """
        measured = torch.isfinite(observed) if valid is None else torch.isfinite(observed) & valid
        expected = self.per_frame(counts, theta, frame_rate, bins)
        return torch.where(measured, observed - expected, 0), expected, measured

    @final
    def explanation(
        self,
        observed: Float[Tensor, "*observed time"],
        counts: Num[Tensor, "*counts bin"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "*valid time"] | None = None,
        bins: int = 1,
    ) -> tuple[Float[Tensor, "*out time"], Float[Tensor, "*out time"]]:
        """Expected slow change of the baseline (ΔF/F) given fluorescence and spikes, and expected ΔF/F, that included.

        Arguments are those of `log_prob`. Every frame has both, measured or not. Where the noise has no
        drift the change is zero.
        """
        residual, expected, measured = self.residual(observed, counts, theta, frame_rate, valid, bins)
        drift = self.noise.drift(residual, expected, theta, frame_rate, measured)
        return drift, expected + drift

    @final
    def simulate(
        self,
        counts: Num[Tensor, "*counts bin"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
        bins: int = 1,
    ) -> Float[Tensor, "*out time"]:
        """Draw noisy ΔF/F for given spike counts, ``bins`` of them per frame."""
        clean = self.per_frame(counts, theta, frame_rate, bins)
        return clean + self.noise.sample(clean, theta, frame_rate, generator)

    @final
    def per_frame(
        self,
        counts: Num[Tensor, "*counts bin"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        bins: int = 1,
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F of each frame from spikes in bins finer than frames: the mean over the frame's bins.

        Parameters
        ----------
        counts
            (batch, time · bins) spikes per bin.
        theta
            Physical parameters, each (batch,).
        frame_rate
            Frames, not bins, per second (Hz).
        bins
            Bins per frame.
        """
        if bins < 1 or counts.shape[-1] % bins:
            raise ValueError(
                f"counts: expected a multiple of bins = {bins} per trace, got {counts.shape[-1]}. "
                "Give frames times bins counts."
            )
        fine = self.fluorescence(counts, theta, frame_rate * bins)
        return fine if bins == 1 else fine.unflatten(-1, (-1, bins)).mean(-1)

    @final
    def noise_std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of the noise in one frame at baseline (ΔF/F)."""
        return self.noise.std(theta, frame_rate)

    @final
    def constrain(self, unconstrained: Float[Tensor, "*batch parameter"]) -> dict[str, Tensor]:
        """Physical values of unconstrained ones: the exponential of positive parameters, the others as they are."""
        return {
            p.name: value.exp() if p.positive else value
            for p, value in zip(self.parameters, unconstrained.unbind(-1), strict=True)
        }

    @final
    def unconstrain(self, theta: Theta) -> Float[Tensor, "*batch parameter"]:
        """Inverse of `constrain`."""
        missing = [p.name for p in self.parameters if p.name not in theta]
        if missing:
            raise ValueError(
                f"theta of {self.name}: expected {', '.join(p.name for p in self.parameters)}, "
                f"got none for {', '.join(missing)}. Add them, or start from initial_theta."
            )
        values = torch.broadcast_tensors(*(theta[p.name] for p in self.parameters))
        return torch.stack([v.log() if p.positive else v for p, v in zip(self.parameters, values, strict=True)], -1)

    @final
    def log_prior(self, theta: Theta) -> Float[Tensor, "*batch"]:
        """Log-density of θ in the unconstrained space."""
        u = self.unconstrain(theta)
        centre, spread = self._prior(u)
        return (-0.5 * ((u - centre) / spread) ** 2 - spread.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    @final
    def sample_prior(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw θ for ``n`` cells."""
        normal = torch.randn((n, len(self.parameters)), generator=generator)
        centre, spread = self._prior(normal)
        return self.constrain(centre + spread * normal)

    @final
    def fit_theta(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "*sample roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
        start: Theta | None = None,
        n_steps: int = 150,
    ) -> dict[str, Tensor]:
        """Most probable θ of each ROI given its spikes, by gradient steps in the unconstrained space.

        Parameters
        ----------
        observed, counts, valid
            (roi, time) ΔF/F and spike counts; with (sample, roi, time) counts the log-likelihood is averaged over the
            samples.
        frame_rate
            Frames per second (Hz).
        start
            Where to begin, by default at `initial_theta`. The result is never less probable than this.
        n_steps
            Steps of Adam, of length 0.05 prior spreads at first and falling to nothing along a cosine.
        """
        counts = counts.to(observed.dtype)
        if start is None:
            start = self.initial_theta(observed, counts.reshape(-1, *observed.shape).mean(0), frame_rate, valid)
        origin = self.unconstrain(start).detach()
        _, spread = self._prior(origin)
        move = torch.zeros_like(origin, requires_grad=True)
        optimiser = torch.optim.Adam([move], lr=0.05, betas=(0.8, 0.95))
        best, best_value = origin, torch.full(origin.shape[:-1], -math.inf, dtype=origin.dtype, device=origin.device)
        with torch.enable_grad():
            for step in range(n_steps + 1):
                interruption.go_on()
                optimiser.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / max(n_steps, 1)))
                u = origin + spread * move
                theta = self.constrain(u)
                value = self.log_prob(observed, counts, theta, frame_rate, valid)
                value = value.reshape(-1, *observed.shape[:-1]).mean(0) + self.log_prior(theta)
                better = value.detach() > best_value
                best = torch.where(better.unsqueeze(-1), u.detach(), best)
                best_value = torch.where(better, value.detach(), best_value)
                (move.grad,) = torch.autograd.grad(-value.sum(), move)
                move.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                optimiser.step()
        return self.constrain(best)

    def _prior(self, like: Tensor) -> tuple[Float[Tensor, " parameter"], Float[Tensor, " parameter"]]:
        return like.new_tensor([p.centre for p in self.parameters]), like.new_tensor(
            [p.spread for p in self.parameters]
        )
