"""States of a calcium indicator and the rates between them, whatever the scheme: what the kinetic loop runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn.functional import pad

#: Free calcium at rest, and at saturation (µM).
RESTING, SATURATING = 0.05, 1e4
#: Free calcium (µM) is tabulated between these, on this many points.
_LOW, _HIGH, _POINTS = 2e-3, 300.0, 600
#: Points per unit of log calcium.
SCALE = (_POINTS - 1) / math.log(_HIGH / _LOW)
#: Place of resting calcium in the table: a whole number, so that rest is a steady state without interpolation.
_REST_INDEX = round(math.log(RESTING / _LOW) * SCALE)
_LOG_LOW = math.log(RESTING) - _REST_INDEX / SCALE
#: So many tables are kept per scheme; each takes 0.1 to 1 MB.
_KEPT = 64


class Table(NamedTuple):
    """What a step makes of occupancies, exact at constant calcium, and the differences to the next calcium.

    A weighted mean of two stochastic matrices is one, so that interpolation keeps occupancies within [0, 1] and their
    sum at one.

    Parameters
    ----------
    moves
        (calcium, 2, row, state): rows are the occupancies after the step, and last the mean brightness over it.
    bound
        (calcium, 2, state): calcium ions bound at the middle of the step.
    """

    moves: Tensor
    bound: Tensor


def rate_matrix_of(n_states: int, transitions: Iterable[tuple[int, int, float]]) -> Float[Tensor, "state state"]:
    """Rate matrix (column: from, row: to) of transitions (from, to, rate in 1/s); its columns sum to zero."""
    rates = torch.zeros((n_states, n_states), dtype=torch.float64)
    for origin, target, rate in transitions:
        rates[target, origin] += rate
        rates[origin, origin] -= rate
    return rates


@dataclass(frozen=True, eq=False)
class StateScheme:
    """d(occupancies)/dt = (fixed + Σ_k (x / half_k)^hill_k binding_k) @ occupancies at free calcium x (µM).

    All are float64 tensors and may require gradients.

    Parameters
    ----------
    bound, bright
        (state,) calcium ions bound in each state, and how bright it is, from 0 to 1.
    fixed
        (state, state) rates that need no calcium (1/s).
    binding
        (kind, state, state) rates of each kind of binding at its half-binding calcium (1/s).
    half, hill
        (kind,) that calcium (µM), and the power of calcium with which binding goes.
    """

    bound: Float[Tensor, " state"]
    bright: Float[Tensor, " state"]
    fixed: Float[Tensor, "state state"]
    binding: Float[Tensor, "kind state state"]
    half: Float[Tensor, " kind"]
    hill: Float[Tensor, " kind"]
    _tables: dict[float, Table] = field(default_factory=dict, init=False, repr=False)

    def rate_matrix(self, calcium: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch state state"]:
        """Rates (column: from, row: to; 1/s) at some free calcium (µM)."""
        weights = (calcium.unsqueeze(-1) / self.half) ** self.hill
        return self.fixed + torch.einsum("...k,kij->...ij", weights, self.binding)

    def steady_state(self, calcium: float) -> Float[Tensor, " state"]:
        """Occupancies after a long time at some free calcium (µM); they sum to one."""
        rates = self.rate_matrix(torch.tensor(calcium, dtype=torch.float64))
        total = torch.ones_like(rates[:1])
        return torch.linalg.solve(torch.cat([rates[:-1], total]), torch.eye(len(rates), dtype=torch.float64)[-1])

    def table(self, step: float) -> Table:
        """What a step (s) makes of the occupancies, at each calcium of the table."""
        table = self._tables.get(step)
        if table is None:
            calcium = torch.exp(_LOG_LOW + torch.arange(_POINTS, dtype=torch.float64) / SCALE)
            rates = self.rate_matrix(calcium) * (step / 2)
            # The integral of brightness is one state more, which nothing leaves.
            brightness = torch.cat([self.bright / 2, self.bright.new_zeros(1)]).expand(_POINTS, 1, -1)
            half_way = torch.matrix_exp(torch.cat([pad(rates, (0, 1)), brightness], 1))
            table = Table(
                *(_with_slopes(x) for x in ((half_way @ half_way)[..., :-1], self.bound @ half_way[:, :-1, :-1]))
            )
            # Rates that are being fitted change; other threads may tidy up at the same time.
            if not table.moves.requires_grad:
                if len(self._tables) >= _KEPT:
                    self._tables.pop(next(iter(self._tables)), None)
                self._tables[step] = table
        return table


def _with_slopes(values: Tensor) -> Tensor:
    return torch.stack([values, torch.cat([values[1:], values[-1:]]) - values], 1)


def find(calcium: Float[Tensor, " batch"]) -> tuple[Num[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Where in a `Table` some calcium (µM) lies: the point below, and the share of the way to the next."""
    place = (calcium.log() * SCALE - _LOG_LOW * SCALE).clamp(0, _POINTS - 1.01)
    # A cell whose calcium is not a number stays alone with that.
    index = place.nan_to_num().long()
    return index, place - index
