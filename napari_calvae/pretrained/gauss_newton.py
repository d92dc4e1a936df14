"""Parameters of cells with known spikes by damped Gauss–Newton steps, all cells and finite differences in one batch.

For models that loop over time a batch of hundreds costs little more than one cell, and gradients cost thrice as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from napari_calvae.generative import GenerativeModel
from napari_calvae.generative.parameters import NOISE

#: Step of finite differences, of logarithms or of ΔF/F.
_EPS = 0.01
#: Residuals of neighbouring frames say much the same: each frame counts for this share of an independent one.
INDEPENDENT = 0.2
#: Dampings that are tried beside each other.
_DAMPINGS = (1e-2, 1e-1, 1.0, 30.0)


@dataclass(frozen=True, eq=False)
class Scored:
    """Traces with known spikes, (cell, time), at one frame rate (Hz); only frames in ``scored`` are fitted."""

    dff: Float[Tensor, "cell time"]
    counts: Float[Tensor, "cell time"]
    scored: Bool[Tensor, "cell time"]
    frame_rate: float

    def split(self, model: GenerativeModel, u: Float[Tensor, "cell variant parameter"]) -> Tensor:
        """Residuals (cell, variant, time) of several θ per cell, zero where not scored."""
        theta = model.constrain(u.to(self.dff))
        fitted = model.fluorescence(self.counts.unsqueeze(1), theta, self.frame_rate)
        return torch.where(self.scored.unsqueeze(1), self.dff.unsqueeze(1) - fitted, 0).double()


@dataclass(frozen=True, eq=False)
class Normal:
    """Normal equations of each cell: their matrix, right-hand side, and which parameters they are of."""

    matrix: Float[Tensor, "cell parameter parameter"]
    side: Float[Tensor, "cell parameter"]
    jacobian: Float[Tensor, "cell parameter time"]
    residual: Float[Tensor, "cell time"]


class CellFit:
    """θ of each cell, unconstrained, the noise by which its residuals are measured, and the steps that improve it."""

    def __init__(self, model: GenerativeModel, data: Scored, start: Float[Tensor, "cell parameter"] | None) -> None:
        self.data = data
        with torch.no_grad():
            if start is None:
                guess = model.initial_theta(data.dff, data.counts, data.frame_rate, data.scored)
                start = model.unconstrain(guess).double()
        self.u = start
        names = [p.name for p in model.parameters]
        self.free = [i for i, name in enumerate(names) if name != NOISE.name]
        self.noise = names.index(NOISE.name)
        self.centre = torch.tensor([p.centre for p in model.parameters], dtype=torch.float64)
        self.spread = torch.tensor([p.spread for p in model.parameters], dtype=torch.float64)

    def variance(self, residual: Tensor) -> Tensor:
        """Of each cell's residuals per frame."""
        return (residual**2).sum(-1) / self.data.scored.sum(-1).clamp_min(1)

    def loss(self, residual: Tensor, u: Tensor) -> Tensor:
        """−log posterior (cell, variant) with the noise at its best value, up to a constant."""
        n = INDEPENDENT * self.data.scored.sum(-1, keepdim=True)
        fit = n / 2 * ((residual**2).sum(-1) + 1e-9).log()
        deviation = ((u - self.centre) / self.spread)[..., self.free]
        return fit + 0.5 * (deviation**2).sum(-1)

    def normal(self, model: GenerativeModel) -> Normal:
        """Linearise around the present θ."""
        steps = _EPS * torch.eye(self.u.shape[-1], dtype=torch.float64)[self.free]
        steps = torch.cat([torch.zeros_like(steps[:1]), steps])
        residuals = self.data.split(model, self.u.unsqueeze(1) + steps)
        residual = residuals[:, 0]
        jacobian = (residual.unsqueeze(1) - residuals[:, 1:]) / _EPS
        weight = INDEPENDENT / self.variance(residual).clamp_min(1e-9)
        matrix = jacobian @ jacobian.mT * weight[:, None, None]
        side = (jacobian @ residual.unsqueeze(-1)).squeeze(-1) * weight[:, None]
        prior = self.spread[self.free] ** -2
        side = side - ((self.u - self.centre) * self.spread**-2)[:, self.free]
        return Normal(matrix + torch.diag(prior), side, jacobian * weight.sqrt()[:, None, None], residual)

    def moved(self, step: Float[Tensor, "*batch free"]) -> Float[Tensor, "*batch parameter"]:
        """θ after a step of the free parameters, at most two prior spreads long in each."""
        limit = 2 * self.spread[self.free]
        u = self.u.unsqueeze(1).expand(*step.shape[:-1], -1).clone() if step.ndim == 3 else self.u.clone()
        u[..., self.free] += step.clamp(-limit, limit)
        return u

    def improve(self, model: GenerativeModel) -> Float[Tensor, " cell"]:
        """Take the best of some damped steps, cell by cell; returns the loss that each has come to."""
        normal = self.normal(model)
        diagonal = torch.diag_embed(normal.matrix.diagonal(dim1=1, dim2=2))
        damped = [torch.linalg.solve(normal.matrix + d * diagonal, normal.side) for d in _DAMPINGS]
        steps = torch.stack([torch.zeros_like(normal.side), *damped], 1)
        u = self.moved(steps)
        loss = self.loss(self.data.split(model, u), u).nan_to_num(nan=float("inf"))
        best = loss.argmin(1)
        self.u = u[torch.arange(len(u)), best]
        return loss.gather(1, best[:, None]).squeeze(1)

    def theta(self, model: GenerativeModel) -> dict[str, Tensor]:
        """Physical values; the noise from the residuals."""
        variance = self.variance(self.data.split(model, self.u.unsqueeze(1))[:, 0]).clamp_min(1e-9)
        u = self.u.clone()
        u[:, self.noise] = 0.5 * (variance / self.data.frame_rate).log()
        return {name: value.to(self.data.dff) for name, value in model.constrain(u).items()}


@torch.no_grad()
def fit_cells(model: GenerativeModel, data: Scored, n_steps: int = 8) -> dict[str, Tensor]:
    """Most probable θ of each cell given its spikes, started from `GenerativeModel.initial_theta`."""
    fit = CellFit(model, data, None)
    for _ in range(n_steps):
        fit.improve(model)
    return fit.theta(model)


@torch.no_grad()
def improve_shared(
    build: Callable[[Tensor], GenerativeModel],
    shared: Float[Tensor, " constant"],
    prior: tuple[Tensor, Tensor],
    fit: CellFit,
) -> tuple[Tensor, float]:
    """One step of constants that all cells share, and of each cell's θ with them; returns the constants and the loss.

    Parameters
    ----------
    build
        A model from unconstrained constants.
    shared
        Where they are.
    prior
        Their prior's centre and spread.
    fit
        The cells, moved in place.
    """
    centre, spread = prior
    model = build(shared)
    normal = fit.normal(model)
    weight = (INDEPENDENT / fit.variance(normal.residual).clamp_min(1e-9)).sqrt()
    columns = []
    for step in _EPS * torch.eye(len(shared), dtype=torch.float64):
        residual = fit.data.split(build(shared + step), fit.u.unsqueeze(1))[:, 0]
        columns.append((normal.residual - residual) / _EPS * weight[:, None])
    common = torch.stack(columns, 1)  # cell, constant, time
    weighted = normal.residual * weight[:, None]
    corner = normal.jacobian @ common.mT
    block = (common @ common.mT).sum(0) + torch.diag(spread**-2)
    side = (common @ weighted.unsqueeze(-1)).squeeze(-1).sum(0) - (shared - centre) / spread**2

    def total(model: GenerativeModel, at: Tensor, u: Tensor) -> float:
        residual = fit.data.split(model, u.unsqueeze(1))
        own = 0.5 * (((at - centre) / spread) ** 2).sum()
        return float(fit.loss(residual, u.unsqueeze(1)).sum() + own)

    best = (total(model, shared, fit.u), shared, fit.u)
    for damping in _DAMPINGS:
        diagonal = torch.diag_embed(normal.matrix.diagonal(dim1=1, dim2=2))
        solved = torch.linalg.solve(
            normal.matrix + damping * diagonal, torch.cat([corner, normal.side.unsqueeze(-1)], -1)
        )
        reduced = block * (1 + damping * torch.eye(len(shared))) - (corner.mT @ solved[..., :-1]).sum(0)
        move = torch.linalg.solve(reduced, side - (corner.mT @ solved[..., -1:]).sum(0).squeeze(-1))
        move = move.clamp(-spread, spread)
        u = fit.moved(solved[..., -1] - (solved[..., :-1] @ move))
        value = total(build(shared + move), shared + move, u)
        if value < best[0]:
            best = (value, shared + move, u)
    fit.u = best[2]
    return best[1], best[0]
