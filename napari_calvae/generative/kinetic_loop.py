"""The loop over time of the kinetic models: free calcium, its buffers and the states of the indicator, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae import interruption
from napari_calvae.generative.states import RESTING, SCALE, StateScheme, Table, find


class Pace(NamedTuple):
    """How a run goes through a frame.

    Parameters
    ----------
    first, longest, growth
        Length of the first step after the frame's spikes (s), of the longest one (s), and by how much each exceeds the
        one before.
    rounds
        Newton's steps to the calcium of each step.
    """

    first: float
    longest: float
    growth: float
    rounds: int


#: Of the result, and of the states that pieces of it start from.
FINE, COARSE = Pace(1e-3, 1.2e-2, 2.0, 3), Pace(3e-3, 2.4e-2, 6.0, 5)
#: Frames are merged to about this length (s) for the coarse run.
MERGED = 0.035
#: Length of the pieces (s), and how much earlier (s) than needed each begins: by then fast errors are gone.
PIECE, LEAD = 2.0, 0.5
#: After this long (s) next to nothing is left of a state: the slowest rates are those of stores, 0.06 /s.
MEMORY = 60.0


class Cytosol(NamedTuple):
    """A fast buffer in equilibrium with free calcium: its concentration, and the calcium that half fills it (µM)."""

    buffer: float
    half: float


class Cells(NamedTuple):
    """What differs between cells, each (batch,): the parameters of `IndicatorKinetics` but for fluorescence."""

    indicator: Tensor
    extrusion: Tensor
    influx: Tensor
    store_in: Tensor
    store_out: Tensor

    def repeat(self, n: int) -> Cells:
        """Each cell ``n`` times."""
        return Cells(*(value.repeat_interleave(n) for value in self))


class State(NamedTuple):
    """Occupancies (batch, state), total calcium in the cytosol (batch,) (µM), and the store's excess (batch,) (µM)."""

    occupied: Tensor
    total: Tensor
    store: Tensor


class Medium(NamedTuple):
    """What does not differ between cells: the indicator and the cytosol that it is in."""

    scheme: StateScheme
    cytosol: Cytosol


def simulate_states(
    medium: Medium, cells: Cells, spikes: Float[Tensor, "batch time"], rate: float
) -> Float[Tensor, "batch time"]:
    """Brightness beyond that at rest, mean over each frame.

    All but short recordings are cut into pieces that run side by side. Each begins a little early, from the state to
    which a run of few, long steps comes: it makes slow errors of some per cent of what is slow, and fast ones that are
    forgotten before the piece's own frames.

    Parameters
    ----------
    medium
        Indicator and buffer.
    cells
        Parameters of each cell.
    spikes
        Counts per frame.
    rate
        Frames per second (Hz).
    """
    n_frames = spikes.shape[-1]
    merged = max(1, round(MERGED * rate))
    length, lead = (merged * math.ceil(seconds * rate / merged) for seconds in (PIECE, LEAD))
    if n_frames <= lead + 2 * length:
        return Loop.prepare(medium, cells, rate, FINE).run(spikes)[0]
    padded = pad(spikes, (lead, -n_frames % length))
    n_pieces = (padded.shape[-1] - lead) // length
    chunks = padded[:, : n_pieces * length].reshape(len(spikes), n_pieces, -1, merged).sum(-1)
    starts = _starts(Loop.prepare(medium, cells, rate / merged, COARSE), chunks, math.ceil(MEMORY * rate / length))
    pieces = padded.unfold(-1, length + lead, length).flatten(0, 1)
    trace, _ = Loop.prepare(medium, cells.repeat(n_pieces), rate, FINE).run(pieces, starts)
    return trace[:, lead:].reshape(len(spikes), -1)[:, :n_frames]


def _starts(loop: Loop, chunks: Float[Tensor, "batch chunk time"], memory: int) -> State:
    """States (batch · chunk) before each chunk.

    More than twice ``memory`` chunks are run in groups of that many, side by side, each from the state that the group
    before would leave had it begun at rest.
    """
    n = chunks.shape[1]
    if n > 2 * memory:
        groups = pad(chunks, (0, 0, 0, -n % memory)).unflatten(1, (-1, memory))
        n_groups = groups.shape[1]
        loop, groups = loop.repeat(n_groups), groups.flatten(0, 1)
        _, left = loop.run(groups.flatten(1))
        first = torch.arange(len(groups), device=groups.device) % n_groups == 0
        state = State(
            *(
                torch.where(first.reshape(-1, *[1] * (end.ndim - 1)), rest, end.roll(1, 0))
                for rest, end in zip(loop.rest(), left, strict=True)
            )
        )
    else:
        groups, state = chunks, loop.rest()
    states = [state]
    for chunk in groups.unbind(1)[:-1]:
        states.append(loop.run(chunk, states[-1])[1])
    stacked = (torch.stack(values, 1) for values in zip(*states, strict=True))
    return State(*(v.reshape(len(chunks), -1, *v.shape[2:])[:, :n].flatten(0, 1) for v in stacked))


class _Step(NamedTuple):
    """One step of the loop: its length (s), its share of a frame, and its table (see `StateScheme.table`)."""

    length: float
    share: float
    table: Table


class _Passage(NamedTuple):
    """What a step has of each cell, (batch,) each.

    Parameters
    ----------
    half_stored, stored
        Share of the way to its target that the store goes in half of the step, and in all of it.
    volume
        One, and what leaves in half of the step, per free calcium.
    entering
        What enters in half of the step against that at rest (µM).
    """

    step: _Step
    half_stored: Tensor
    stored: Tensor
    volume: Tensor
    entering: Tensor


@dataclass(frozen=True)
class Loop:
    """The loop over time, with all that does not change in it; batches are flat."""

    cells: Cells
    medium: Medium
    #: Through a frame, whose spikes come before number ``spike_at``.
    steps: list[_Step]
    spike_at: int
    #: Newton's steps to the calcium of each.
    rounds: int

    @classmethod
    def prepare(cls, medium: Medium, cells: Cells, rate: float, pace: Pace) -> Loop:
        """Choose the steps through a frame and tabulate their exponentials."""
        half = 0.5 / rate
        n_before = math.ceil(half / pace.longest)
        after = [pace.first]
        while sum(after) < half:
            after.append(min(after[-1] * pace.growth, pace.longest))
        lengths = [half / n_before] * n_before + [half * length / sum(after) for length in after]
        tables = {length: medium.scheme.table(length) for length in set(lengths)}
        like = cells.indicator
        steps = [_Step(x, x * rate, Table(*(part.to(like) for part in tables[x]))) for x in lengths]
        return cls(cells, medium, steps, n_before, pace.rounds)

    def repeat(self, n: int) -> Loop:
        """The same for each cell ``n`` times."""
        return replace(self, cells=self.cells.repeat(n))

    def rest(self) -> State:
        """The state without spikes."""
        like, (scheme, cytosol) = self.cells.indicator, self.medium
        steady = scheme.steady_state(RESTING)
        free = RESTING + cytosol.buffer * RESTING / (cytosol.half + RESTING)
        occupied = steady.to(like).expand(len(like), -1)
        return State(occupied, free + like * (steady @ scheme.bound).to(like), torch.zeros_like(like))

    def run(self, spikes: Float[Tensor, "batch time"], state: State | None = None) -> tuple[Tensor, State]:
        """Brightness beyond that at rest, mean over each frame, and the state at the end."""
        rest = self.rest()
        state = rest if state is None else state
        influx = spikes * self.cells.influx.unsqueeze(-1)
        passages = [self._passage(step) for step in self.steps]
        bound = self.medium.scheme.bound.to(influx)
        means = []
        for calcium in influx.unbind(-1):
            interruption.go_on()
            if state.total.requires_grad:
                state.total.register_hook(interruption.go_on)  # on the way back, too
            mean = torch.zeros_like(calcium)
            for i, passage in enumerate(passages):
                if i == self.spike_at:
                    state = state._replace(total=state.total + calcium)
                brightness, state = self._advance(state, passage, bound)
                mean = torch.add(mean, brightness, alpha=passage.step.share)
            means.append(mean)
        at_rest = rest.occupied[0] @ self.medium.scheme.bright.to(rest.occupied)
        return torch.stack(means, -1) - at_rest, state

    def _passage(self, step: _Step) -> _Passage:
        _, extrusion, _, store_in, store_out = self.cells
        half_stored, stored = (-torch.expm1(store_out * -seconds) for seconds in (step.length / 2, step.length))
        leaving = extrusion * (step.length / 2) + half_stored * store_in / store_out
        return _Passage(step, half_stored, stored, 1 + leaving, leaving * RESTING)

    def _advance(self, state: State, passage: _Passage, bound: Tensor) -> tuple[Tensor, State]:
        """Mean brightness over a step, and the state after it."""
        step = passage.step
        calcium = self._middle(state, passage, bound)
        index, share = find(calcium)
        lower, slope = step.table.moves.index_select(0, index).unbind(1)
        moves = torch.addcmul(lower, share[:, None, None], slope)
        moved = torch.bmm(moves, state.occupied.unsqueeze(-1)).squeeze(-1)
        excess = calcium - RESTING
        stored = passage.stored * (self.cells.store_in / self.cells.store_out * excess - state.store)
        total = torch.addcmul(state.total - stored, self.cells.extrusion, excess, value=-step.length)
        return moved[:, -1], State(moved[:, :-1], total, state.store + stored)

    def _middle(self, state: State, passage: _Passage, bound: Tensor) -> Tensor:
        """Free calcium (µM) in the middle of a step.

        There total calcium less what left is x + B x / (K_B + x) and what the indicator bound, were calcium x since
        the step began: Newton's steps on log x, from the calcium at that beginning.
        """
        (buffer, half), indicator, table = self.medium.cytosol, self.cells.indicator, passage.step.table.bound
        rest = (state.total - indicator * (state.occupied @ bound)).clamp_min(1e-3)
        b = (buffer + half) - rest
        free = (2 * half) * rest / (b + torch.sqrt(torch.addcmul(4 * half * rest, b, b)))
        given = torch.addcmul(state.total + passage.entering, passage.half_stored, state.store)
        occupied, steep = state.occupied.unsqueeze(-1), SCALE * indicator
        for _ in range(self.rounds):
            index, share = find(free)
            lower, slope = torch.bmm(table.index_select(0, index), occupied).squeeze(-1).unbind(1)
            filled = free / (half + free)
            own = torch.addcmul(free * passage.volume, filled, filled, value=-buffer)
            rising = torch.addcmul(torch.add(own, filled, alpha=buffer), steep, slope.clamp_min(0))
            kept = torch.addcmul(free * passage.volume + buffer * filled, indicator, torch.addcmul(lower, share, slope))
            free = free * torch.exp(((given - kept) / rising).clamp(-3, 3))
        return free
