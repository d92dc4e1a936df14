"""The loop over time of the kinetic models: free calcium, its buffers and the states of the indicator, step by step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.generative.lobes import BOUND_CALCIUM, BRIGHT, LobeConstants

#: Free calcium at rest, and at saturation (µM).
RESTING, SATURATING = 0.05, 1e4
#: A fast buffer: concentration, and the free calcium at which half of it is bound (µM): 1e4 /s over 1e8 /M/s.
BUFFER, BUFFER_HALF = 4000.0, 100.0
#: Steps through a frame (s): the first one after its spikes, the longest one, and by how much one exceeds the last.
STEPS = (5e-4, 4e-3, 1.6)
#: After this long (s) nothing is left of a state: the slowest rates are 0.46 to 0.99 /s.
MEMORY = 30.0
#: Free calcium (µM) is tabulated between these, on this many points.
_TABLE = (2e-3, 300.0, 600)


class Cells(NamedTuple):
    """What differs between cells, each (batch,): the parameters of `IndicatorKinetics` but for fluorescence."""

    indicator: Tensor
    extrusion: Tensor
    influx: Tensor
    store_in: Tensor
    store_out: Tensor


def simulate_states(
    constants: LobeConstants, cells: Cells, spikes: Float[Tensor, "batch time"], rate: float
) -> Float[Tensor, "batch time"]:
    """Share of bright states beyond that at rest, mean over each frame.

    Recordings of over twice `MEMORY` are cut into pieces of that length that run side by side, each from the state that
    the piece before would leave had it begun at rest.

    Parameters
    ----------
    constants
        Rates of the indicator.
    cells
        Parameters of each cell.
    spikes
        Counts per frame.
    rate
        Frames per second (Hz).
    """
    n_frames, length = spikes.shape[-1], math.ceil(MEMORY * rate)
    n_pieces = math.ceil(n_frames / length)
    if n_pieces <= 2:
        return _Loop.prepare(constants, cells, rate).run(spikes)[0]
    pieces = pad(spikes, (0, n_pieces * length - n_frames)).reshape(-1, length)
    loop = _Loop.prepare(constants, Cells(*(v.repeat_interleave(n_pieces) for v in cells)), rate)
    _, left = loop.run(pieces)
    first = torch.arange(len(pieces), device=pieces.device) % n_pieces == 0
    started = [
        torch.where(first.reshape(-1, *[1] * (end.ndim - 1)), rest, end.roll(1, 0))
        for rest, end in zip(loop.rest(), left, strict=True)
    ]
    return loop.run(pieces, _State(*started))[0].reshape(-1, n_pieces * length)[:, :n_frames]


class _State(NamedTuple):
    """Occupancies (batch, 9), total calcium in the cytosol (batch,) (µM), and the store's excess (batch,) (µM)."""

    occupied: Tensor
    total: Tensor
    store: Tensor


class _Step(NamedTuple):
    """One step of the loop: its length (s), its share of a frame, and its table (calcium, 2, 9, 9)."""

    length: float
    share: float
    table: Tensor


@dataclass(frozen=True)
class _Loop:
    """The loop over time, with all that does not change in it; batches are flat."""

    cells: Cells
    constants: LobeConstants
    #: Through a frame, whose spikes come before number ``spike_at``.
    steps: list[_Step]
    spike_at: int
    #: Per state, the indicator's calcium, and its change: without calcium, per unit of binding to N, and to C.
    carried: Tensor
    #: Of N and C: 1 / half-binding calcium, Hill exponent, rate of letting go.
    lobes: Tensor

    @classmethod
    def prepare(cls, constants: LobeConstants, cells: Cells, rate: float) -> _Loop:
        """Choose the steps through a frame and tabulate their exponentials."""
        half = 0.5 / rate
        n_before = math.ceil(half / STEPS[1])
        after = [STEPS[0]]
        while sum(after) < half:
            after.append(min(after[-1] * STEPS[2], STEPS[1]))
        values = cells.indicator
        lengths = [half / n_before] * n_before + [half * length / sum(after) for length in after]
        tables = {length: _exponentials(constants, length).to(values) for length in set(lengths)}
        steps = [_Step(length, length * rate, tables[length]) for length in lengths]
        bound = torch.tensor(BOUND_CALCIUM, dtype=torch.float64)
        carried = torch.cat([bound[None], bound @ constants.generators()]).mT
        c = constants
        lobes = values.new_tensor([[1 / c.n_half, 1 / c.c_half], [c.n_hill, c.c_hill], [c.n_off, c.c_off]])
        return cls(cells, constants, steps, n_before, carried.to(values), lobes)

    def rest(self) -> _State:
        """The state without spikes."""
        like = self.cells.indicator
        occupied = self.constants.steady_state(RESTING).to(like).expand(len(like), 9)
        bound = float(self.constants.steady_state(RESTING) @ torch.tensor(BOUND_CALCIUM, dtype=torch.float64))
        free = RESTING + BUFFER * RESTING / (BUFFER_HALF + RESTING)
        return _State(occupied, free + like * bound, torch.zeros_like(like))

    def run(self, spikes: Float[Tensor, "batch time"], state: _State | None = None) -> tuple[Tensor, _State]:
        """Share of bright states beyond that at rest, mean over each frame, and the state at the end."""
        rest = self.rest()
        state = rest if state is None else state
        influx = spikes * self.cells.influx.unsqueeze(-1)
        means = []
        # By the trapezoidal rule each state counts for half of the steps at its two sides.
        following = [step.share for step in self.steps[1:]] + [0.0]
        for calcium in influx.unbind(-1):
            mean = state.occupied * (self.steps[0].share / 2)
            for i, (step, share) in enumerate(zip(self.steps, following, strict=True)):
                if i == self.spike_at:
                    state = state._replace(total=state.total + calcium)
                state = self._advance(state, step)
                mean = torch.add(mean, state.occupied, alpha=(step.share + share) / 2)
            means.append(mean)
        return (torch.stack(means, -2) - rest.occupied.unsqueeze(-2)) @ spikes.new_tensor(BRIGHT), state

    def _advance(self, state: _State, step: _Step) -> _State:
        middle = self._middle(state, step.length)
        place = (middle.clamp_min(_TABLE[0]).log() - _LOG_LOW).mul(_SCALE).clamp(0, _TABLE[2] - 1.01)
        index = place.detach().long()
        lower, slope = step.table.index_select(0, index).unbind(1)
        moves = torch.addcmul(lower, (place - index)[:, None, None], slope)
        occupied = torch.bmm(moves, state.occupied.unsqueeze(-1)).squeeze(-1)
        excess = step.length * (middle - RESTING)
        stored = self.cells.store_in * excess - self.cells.store_out * step.length * state.store
        return _State(occupied, state.total - self.cells.extrusion * excess - stored, state.store + stored)

    def _middle(self, state: _State, step: float) -> Tensor:
        """Free calcium (µM) half a step later, linearly implicit: where the indicator binds in no time, it still fits.

        Free calcium is x in T − indicator-bound = x + B x / (K_B + x).
        """
        bound, flux, n_flux, c_flux = (state.occupied @ self.carried).unbind(-1)
        rest = torch.addcmul(state.total, self.cells.indicator, bound, value=-1).clamp_min(1e-3)
        b = (BUFFER + BUFFER_HALF) - rest
        free = (2 * BUFFER_HALF) * rest / (b + torch.sqrt(torch.addcmul(4 * BUFFER_HALF * rest, b, b)))
        per_half, hill, off = self.lobes
        leaving = self.cells.extrusion + self.cells.store_in
        binding = torch.stack([n_flux, c_flux], -1) * off * (free.unsqueeze(-1) * per_half) ** hill
        flux = self.cells.indicator * (flux + binding.sum(-1))
        change = self.cells.store_out * state.store - leaving * (free - RESTING) - flux
        steeper = leaving + self.cells.indicator * (binding @ hill) / free
        capacity = 1 + BUFFER * BUFFER_HALF / (BUFFER_HALF + free) ** 2
        return free + change / (2 / step * capacity + steeper)


#: Place of resting calcium in the table: a whole number, so that rest is a steady state without interpolation.
_SCALE = (_TABLE[2] - 1) / math.log(_TABLE[1] / _TABLE[0])
_REST_INDEX = round(math.log(RESTING / _TABLE[0]) * _SCALE)
_LOG_LOW = math.log(RESTING) - _REST_INDEX / _SCALE


@functools.lru_cache(maxsize=256)
def _exponentials(constants: LobeConstants, step: float) -> Float[Tensor, "calcium 2 9 9"]:
    """Matrix exponentials of one step at each calcium of the table, and their differences to the next."""
    calcium = torch.exp(_LOG_LOW + torch.arange(_TABLE[2], dtype=torch.float64) / _SCALE)
    moves = torch.matrix_exp(constants.rate_matrix(calcium) * step)
    return torch.stack([moves, torch.cat([moves[1:], moves[-1:]]) - moves], 1)
