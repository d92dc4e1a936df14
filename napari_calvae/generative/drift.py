"""Noise on a baseline that drifts: a slow normal process, integrated out exactly."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from napari_calvae.generative.noise import Noise, NormalNoise, previous_frame, standard_normal, whiten
from napari_calvae.generative.normal_noise import CorrelatedNoise, GaussianNoise, SignalDependentNoise
from napari_calvae.generative.parameters import Parameter, Theta, as_rate
from napari_calvae.generative.recursion import linear_scan

DRIFT = Parameter("drift", "ΔF/F", "Drift", "Standard deviation of the baseline around its mean", 0.03, 1.0)
DRIFT_TIME = Parameter("tau_drift", "s", "Drift time", "Time over which the baseline changes", 20.0, 0.7, own=True)

#: Noises that a drift may be added to: those that are normal, so that the sum is.
_AROUND: dict[str, type[NormalNoise]] = {
    cls.name: cls for cls in (GaussianNoise, SignalDependentNoise, CorrelatedNoise)
}


@final
class DriftingNoise(Noise):
    """Another noise plus a slow drift of the baseline.

    The drift is linear between knots ``spacing`` seconds apart, the first at the beginning of the first frame; its
    values there are a stationary Ornstein–Uhlenbeck process of standard deviation ``drift`` and correlation time
    ``tau_drift``. Nothing depends on the frame rate. In between, the standard deviation is smaller, by
    √((1 + e^{−spacing/tau_drift})/2) midway.

    With residuals r = B u + n, B the hat functions of the knots, u ~ N(0, K) and n of covariance D, the density is that
    of N(0, D + B K Bᵀ). The matrix inversion and determinant lemmas (Rasmussen & Williams 2006, eqs. A.9 and A.10) turn
    it into that of n and a Cholesky factor of K⁻¹ + BᵀD⁻¹B, which has as many rows as there are knots: 451 for half an
    hour at the usual spacing, whatever the frame rate. K⁻¹ is tridiagonal and B has two entries per frame.

    Parameters
    ----------
    around
        Name of the noise around the drift, which must be a normal one.
    spacing
        Of the knots (s).
    """

    name: ClassVar[str] = "drift"
    label: ClassVar[str] = "On a drifting baseline"

    def __init__(self, around: str = "gaussian", spacing: float = 4.0) -> None:
        super().__init__(around=around, spacing=spacing)
        if around not in _AROUND or not spacing > 0:
            raise ValueError(
                f"DriftingNoise: expected one of {', '.join(_AROUND)} and a spacing above 0 s, got {around!r} and "
                f"{spacing}. Under any other noise a drift cannot be integrated out exactly; a flow learns its own."
            )
        self.around = _AROUND[around]()
        self.spacing = spacing
        self.parameters = (*self.around.parameters, DRIFT, DRIFT_TIME)

    def std(self, theta: Theta, frame_rate: float | Num[Tensor, "*rate"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of the noise around the drift in one frame at baseline (ΔF/F)."""
        return self.around.std(theta, frame_rate)

    def log_prob(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out"]:
        """Log-density with the drift integrated out: exact."""
        factor, projected = self._posterior(residual, expected, theta, frame_rate, measured)
        explained = torch.linalg.solve_triangular(factor, projected.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - _log_det_precision(
            theta, self.spacing, factor.shape[-1]
        )
        around = self.around.log_prob(residual, expected, theta, frame_rate, measured)
        return around + 0.5 * ((explained**2).sum(-1) - log_det)

    def drift(
        self,
        residual: Float[Tensor, "*out time"],
        expected: Float[Tensor, "*clean time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        measured: Bool[Tensor, "*measured time"],
    ) -> Float[Tensor, "*out time"]:
        """Posterior mean of the drift (ΔF/F) in every frame, measured or not."""
        factor, projected = self._posterior(residual, expected, theta, frame_rate, measured)
        knots = torch.cholesky_solve(projected.unsqueeze(-1), factor).squeeze(-1)
        return self._between(knots, residual, frame_rate)

    def sample(
        self,
        expected: Float[Tensor, "*out time"],
        theta: Theta,
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*out time"]:
        """Draw drift and noise."""
        n_knots = _n_knots(expected.shape[-1], frame_rate, self.spacing)
        normal = standard_normal(expected.new_empty(*expected.shape[:-1], n_knots), generator)
        kept = torch.exp(-self.spacing / theta[DRIFT_TIME.name]).unsqueeze(-1)
        gained = torch.sqrt(1 - kept**2).expand(normal.shape)
        gained = torch.cat([torch.ones_like(gained[..., :1]), gained[..., 1:]], -1)
        knots = theta[DRIFT.name].unsqueeze(-1) * linear_scan(kept, gained * normal)
        slow = self._between(knots, expected, frame_rate)
        return slow + self.around.sample(expected, theta, frame_rate, generator)

    def start(self, density: Float[Tensor, "*batch"], frame_rate: float | Num[Tensor, "*rate"]) -> dict[str, Tensor]:
        """As without drift, and a usual one."""
        usual = {p.name: torch.full_like(density, p.median) for p in (DRIFT, DRIFT_TIME)}
        return self.around.start(density, frame_rate) | usual

    def _posterior(
        self, residual: Tensor, expected: Tensor, theta: Theta, frame_rate: float | Tensor, measured: Tensor
    ) -> tuple[Float[Tensor, "*batch knot knot"], Float[Tensor, "*out knot"]]:
        """Cholesky factor of the knots' precision given the residuals, and Bᵀ D⁻¹ r."""
        n_knots = _n_knots(residual.shape[-1], frame_rate, self.spacing)
        gain, carry = self.around.whitening(expected, theta, frame_rate, measured)
        z = whiten(residual, gain, carry, measured)
        knot, weight = _hats(residual, frame_rate, self.spacing, n_knots)
        if carry is not None:
            # The same linear map as of the residuals makes two more entries of every row.
            before = previous_frame(measured).clamp_min(0)
            carried = -carry.unsqueeze(-1) * _take(weight, before)
            shape = torch.broadcast_shapes(carried.shape, weight.shape)
            knot = torch.cat([knot.expand(shape), _take(knot, before).expand(shape)], -1)
            weight = torch.cat([weight.expand(shape), carried.expand(shape)], -1)
        weight = torch.where(measured, gain, 0).unsqueeze(-1) * weight
        pairs = (knot.unsqueeze(-1) * n_knots + knot.unsqueeze(-2)).flatten(-3)
        added = _sum_at(pairs, (weight.unsqueeze(-1) * weight.unsqueeze(-2)).flatten(-3), n_knots**2)
        precision = _precision(theta, self.spacing, n_knots) + added.unflatten(-1, (n_knots, n_knots))
        projected = _sum_at(knot.flatten(-2), (weight * z.unsqueeze(-1)).flatten(-2), n_knots)
        return torch.linalg.cholesky(precision), projected

    def _between(self, knots: Tensor, like: Tensor, frame_rate: float | Tensor) -> Tensor:
        """Values at the knots to values in the frames."""
        index, weight = _hats(like, frame_rate, self.spacing, knots.shape[-1])
        around = knots.gather(-1, index.flatten(-2).expand(*knots.shape[:-1], -1)).unflatten(-1, (-1, 2))
        return (weight * around).sum(-1)


def _n_knots(n_frames: int, frame_rate: float | Tensor, spacing: float) -> int:
    slowest = float(torch.as_tensor(frame_rate).min())
    return math.ceil(n_frames / slowest / spacing) + 1


def _hats(
    like: Tensor, frame_rate: float | Tensor, spacing: float, n_knots: int
) -> tuple[Int[Tensor, "*rate time 2"], Float[Tensor, "*rate time 2"]]:
    """The two knots around the middle of each frame, and how much of each is in it."""
    frames = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)
    place = (frames + 0.5) / (as_rate(frame_rate, like).unsqueeze(-1) * spacing)
    left = place.floor().clamp_max(n_knots - 2)
    share = place - left
    return torch.stack([left, left + 1], -1).long(), torch.stack([1 - share, share], -1)


def _take(entries: Tensor, frame: Int[Tensor, "*batch time"]) -> Tensor:
    """(batch, time, entry) entries of other frames."""
    shape = torch.broadcast_shapes(entries.shape[:-2], frame.shape[:-1])
    entries, frame = entries.expand(*shape, -1, -1), frame.expand(*shape, -1)
    return entries.gather(-2, frame.unsqueeze(-1).expand(*frame.shape, entries.shape[-1]))


def _sum_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum of the values along the last axis that have the same index, (batch, size)."""
    total = values.new_zeros(*values.shape[:-1], size)
    return total.scatter_add(-1, index.expand(values.shape), values)


def _left(theta: Theta, spacing: float) -> tuple[Tensor, Tensor]:
    """What is left of the drift after one spacing, and the variance that it gained, relative to the stationary one."""
    exponent = spacing / theta[DRIFT_TIME.name]
    return torch.exp(-exponent), -torch.expm1(-2 * exponent)


def _precision(theta: Theta, spacing: float, n_knots: int) -> Float[Tensor, "*batch knot knot"]:
    """Inverse covariance of the knots: that of a stationary AR(1) process."""
    left, gained = (x.unsqueeze(-1) for x in _left(theta, spacing))
    scale = 1 / (theta[DRIFT.name].unsqueeze(-1) ** 2 * gained)
    inner = torch.ones(n_knots, dtype=left.dtype, device=left.device)
    inner[[0, -1]] = 0
    beside = (-left * scale).expand(*left.shape[:-1], n_knots - 1)
    return torch.diag_embed(scale * (1 + left**2 * inner)) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)


def _log_det_precision(theta: Theta, spacing: float, n_knots: int) -> Float[Tensor, "*batch"]:
    _, gained = _left(theta, spacing)
    return -2 * n_knots * theta[DRIFT.name].log() - (n_knots - 1) * gained.log()
