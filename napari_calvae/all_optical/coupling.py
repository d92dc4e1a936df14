"""What the cells' inputs are made of, given their spikes: a generalised linear model per cell with sparse weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from napari_calvae.generative.all_optical import DRIVE, EXCITABILITY, AllOptical, Illumination
from napari_calvae.generative.parameters import Theta

#: Newton steps at most, and the gain in log-density (nats) that is worth another.
_N_STEPS, _ENOUGH = 20, 1e-3
#: Degrees of freedom of the distribution that draws are proposed from.
_FREEDOM = 10


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Drive, excitability and weights of all cells, about as they are distributed given the spikes.

    Parameters
    ----------
    mode
        The most probable ones, given which weights are connections.
    factor
        (cell, coefficient, coefficient) Cholesky factor of the precision around them.
    """

    mode: Float[Tensor, "cell coefficient"]
    factor: Float[Tensor, "cell coefficient coefficient"]

    @property
    def variance(self) -> Float[Tensor, "cell coefficient"]:
        """Of each coefficient."""
        return torch.cholesky_inverse(self.factor).diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The log-density of all cells' coefficients given their spikes, concave since the link is convex and log-concave.

    Parameters
    ----------
    counts, power
        (cell, time) spikes per frame, and power of the light that reaches each cell.
    filtered
        (source, time) filtered earlier spikes (spikes/s) of the cells that may act on others; none are fine.
    frame_rate
        Frames per second (Hz).
    connected
        (cell, source) whose weights have the prior of connections.
    """

    model: AllOptical
    counts: Float[Tensor, "cell time"]
    filtered: Float[Tensor, "source time"]
    power: Float[Tensor, "cell time"]
    frame_rate: float
    connected: Bool[Tensor, "cell source"]

    def log_density(self, coefficients: Float[Tensor, "cell coefficient"]) -> Float[Tensor, " cell"]:
        """Of each cell's spikes and coefficients, up to a constant."""
        mean = self.model.rates(self._inputs(coefficients)) / self.frame_rate
        spikes = (self.counts * mean.log() - mean).sum(-1, dtype=torch.double)
        centre, precision = self._prior()
        return spikes - 0.5 * (precision * (coefficients - centre) ** 2).sum(-1, dtype=torch.double)

    def fit(self, start: Float[Tensor, "cell coefficient"]) -> Coefficients:
        """Newton's method, with steps halved until they do not lead down."""
        at, value = start, self.log_density(start)
        centre, precision = self._prior()
        for _ in range(_N_STEPS):
            slope, curvature = self._derivatives(at)
            # The small matrices in double precision: scales of drive and weights differ by orders of magnitude.
            slope = (slope - precision * (at - centre)).double()
            factor = torch.linalg.cholesky(curvature.double() + torch.diag_embed(precision.double()))
            step = torch.cholesky_solve(slope[..., None], factor)[..., 0]
            expected = (slope * step).sum(-1)
            step = step.to(at.dtype)
            if bool((expected < _ENOUGH).all()):
                break
            for _ in range(8):
                new = self.log_density(at + step)
                worse = new < value - _ENOUGH
                if not bool(worse.any()):
                    break
                step = torch.where(worse[:, None], 0.5 * step, step)
            else:
                step, new = torch.where(worse[:, None], 0, step), torch.where(worse, value, new)
            at, value = at + step, new
        return Coefficients(at, factor)

    def draw(
        self,
        now: Float[Tensor, "cell coefficient"],
        around: Coefficients,
        generator: torch.Generator,
        settling: bool = False,
    ) -> Float[Tensor, "cell coefficient"]:
        """A draw from Student's t distribution around the mode, accepted by Metropolis–Hastings, cell by cell.

        Tails heavier than the target's, lest the chain stay for ever where it once came to be; ``settling`` it takes
        whatever comes.
        """
        normal = torch.randn(now.shape, generator=generator, dtype=torch.double)
        scale = (
            torch.randn((len(now), _FREEDOM), generator=generator, dtype=torch.double)
            .square()
            .mean(1, keepdim=True)
            .rsqrt()
        )
        step = torch.linalg.solve_triangular(around.factor.mT, (scale * normal)[..., None], upper=True)[..., 0]
        new = around.mode + step.to(now.dtype)
        there = ((scale * normal) ** 2).sum(-1)
        here = ((around.factor.mT @ (now - around.mode).double()[..., None])[..., 0] ** 2).sum(-1)
        power = 0.5 * (_FREEDOM + now.shape[1])
        log_ratio = self.log_density(new) - self.log_density(now)
        log_ratio = log_ratio + power * (torch.log1p(there / _FREEDOM) - torch.log1p(here / _FREEDOM))
        taken = (torch.rand(len(now), generator=generator).log() < log_ratio) | settling
        return torch.where(taken[:, None], new, now)

    def _inputs(self, coefficients: Tensor) -> Float[Tensor, "cell time"]:
        drive, excitability, weights = coefficients[:, :1], coefficients[:, 1:2], coefficients[:, 2:]
        return torch.addcmul(drive, excitability, self.power).addmm_(weights, self.filtered)

    def _derivatives(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and negative curvature of the log-probability of the spikes."""
        inputs, softness = self._inputs(coefficients), self.model.softness
        rate = self.model.rates(inputs)
        first = torch.sigmoid(inputs / softness)
        second = first * (1 - first) / softness
        slope = self.counts * first / rate - first / self.frame_rate
        bend = second / self.frame_rate - self.counts * (second / rate - (first / rate) ** 2)
        bend = bend.clamp_min(0)  # it is, but for rounding
        own = torch.stack([torch.ones_like(self.power), self.power], 1)  # cell, 2, time
        bent = own * bend[:, None]
        across = bent @ self.filtered.mT
        weights = torch.stack([(self.filtered * row) @ self.filtered.mT for row in bend])
        curvature = torch.cat([torch.cat([bent @ own.mT, across], 2), torch.cat([across.mT, weights], 2)], 1)
        return torch.cat([(own @ slope[..., None])[..., 0], slope @ self.filtered.mT], 1), curvature

    def _prior(self) -> tuple[Tensor, Tensor]:
        """Mean and precision of each coefficient."""
        prior = self.model.prior
        weights = torch.where(self.connected, prior.slab, prior.spike) ** -2
        own = self.filtered.new_tensor([[DRIVE.spread, EXCITABILITY.spread]]).expand(len(weights), 2) ** -2
        centre = torch.zeros((len(weights), 2 + weights.shape[1]), dtype=own.dtype)
        centre[:, 0], centre[:, 1] = DRIVE.median, EXCITABILITY.median
        return centre, torch.cat([own, weights.to(own.dtype)], 1)


def stack(theta: Theta) -> Float[Tensor, "cell coefficient"]:
    """Coefficients of θ."""
    return torch.cat([theta["drive"][:, None], theta["excitability"][:, None], theta["weights"]], 1)


def unstack(coefficients: Float[Tensor, "cell coefficient"]) -> dict[str, Tensor]:
    """Inverse of `stack`."""
    return {"drive": coefficients[:, 0], "excitability": coefficients[:, 1], "weights": coefficients[:, 2:]}


def draw_connections(
    model: AllOptical, weights: Float[Tensor, "cell cell"], generator: torch.Generator
) -> tuple[Bool[Tensor, "cell cell"], Float[Tensor, "cell cell"]]:
    """Which weights are connections, drawn given their values, and the probability of each."""
    absent, present = model.prior.parts(weights)
    own = torch.eye(len(weights), dtype=torch.bool)
    probability = torch.where(own, 1.0, torch.sigmoid(present - absent))
    return torch.rand(weights.shape, generator=generator) < probability, probability


@torch.no_grad()
def iter_coupling(
    model: AllOptical,
    counts: Float[Tensor, "cell time"],
    frame_rate: float,
    light: Illumination,
    theta: Theta,
    generator: torch.Generator,
) -> Iterator[tuple[Float[Tensor, "cell coefficient"], Coefficients]]:
    """Draws of the coefficients given spikes that stay as they are (fractions are fine), for ever.

    Parameters
    ----------
    model, counts, frame_rate, light
        As for `AllOptical.log_prob_counts`.
    theta
        Where to begin; ``falloff`` and ``tau_coupling`` are kept.
    """
    filtered, power = model.filtered(counts, theta, frame_rate), light.reaching(theta["falloff"])
    connected = torch.ones_like(theta["weights"], dtype=torch.bool)
    now = start = stack(theta)
    while True:
        coupling = Coupling(model, counts, filtered, power, frame_rate, connected)
        around = coupling.fit(start)
        now, start = coupling.draw(now, around, generator), around.mode
        connected, _ = draw_connections(model, now[:, 2:], generator)
        yield now, around
