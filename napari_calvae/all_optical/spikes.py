"""Moves of single spikes that leave p(s | F, θ) of a coupled network invariant, many at once.

Spikes are born, die and shift by a frame or two (Metropolis–Hastings). Births are proposed where a recognition network
saw something, so that few are wasted. Moves in frames so far apart that neither calcium nor coupling reaches from one
to the next do not depend on each other, and are decided together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.generative.all_optical import AllOptical, Illumination
from napari_calvae.generative.parameters import Theta

#: Furthest that a spike shifts at once (frames).
_FAR = 2
#: A response is followed for this many time constants.
_MEMORY = 7.0
#: Length of the stretches in which one move is made at a time (s), and at least so many frames.
_ZONE, _MIN_ZONE = 0.8, 8
#: Moves per spell of this many frames, on average, in one call of `move_spikes`.
_MOVES = 3.0


@dataclass(frozen=True, eq=False)
class Recording:
    """What is given: fluorescence, stimulation and where spikes may have been.

    Parameters
    ----------
    observed
        (cell, time) ΔF/F, zero where it is missing.
    valid
        (cell, time) one where it was measured, else zero.
    frame_rate
        Frames per second (Hz).
    light
        The stimulation.
    proposal
        (cell, time) how often births are proposed in each frame, relative to others; above zero.
    """

    observed: Float[Tensor, "cell time"]
    valid: Float[Tensor, "cell time"]
    frame_rate: float
    light: Illumination
    proposal: Float[Tensor, "cell time"]


@torch.no_grad()
def move_spikes(
    model: AllOptical,
    recording: Recording,
    counts: Float[Tensor, "cell time"],
    theta: Theta,
    generator: torch.Generator,
) -> Float[Tensor, "cell time"]:
    """Spike counts after some moves in every stretch of every cell's time, θ as it is."""
    field = _Field(model, recording, counts, theta)
    n_rounds = max(1, round(_MOVES * field.period / field.zone))
    for _ in range(n_rounds):
        for cell in torch.randperm(len(counts), generator=generator).tolist():
            field.move(cell, generator)
    return field.counts[:, : counts.shape[1]].clone()


@dataclass
class _Moves:
    """At most one per zone: a spike more in frame ``base + to`` if ``add``, one less in ``base + off`` if ``drop``."""

    base: Tensor
    to: Tensor
    off: Tensor
    add: Tensor
    drop: Tensor
    log_ratio: Tensor  # of proposals, backward over forward

    def change(self, shifted: Float[Tensor, "offset lag"]) -> Float[Tensor, "zone lag"]:
        """What the move adds to filtered spikes from ``base`` on; ``shifted`` is from `_shifted`."""
        gained = shifted[self.to] * self.add[:, None]
        return gained.sub_(shifted[self.off] * self.drop[:, None])


def _shifted(response: Float[Tensor, "*cell lag"]) -> Float[Tensor, "*cell offset lag"]:
    """A response to a spike 0, 1, … `_FAR` frames later."""
    return torch.stack([pad(response, (k, _FAR - k)) for k in range(_FAR + 1)], -2)


class _Field:
    """Spikes and everything that follows from them, kept up to date move by move.

    All (cell, time) tensors are longer than the recording by what a response may reach beyond its end; nothing is
    measured and nothing can fire there.
    """

    def __init__(self, model: AllOptical, recording: Recording, counts: Tensor, theta: Theta) -> None:
        self.model, self.weights = model, theta["weights"]
        fs, (n_cells, self.n_frames) = recording.frame_rate, counts.shape
        slowest = torch.maximum(theta["tau_decay"], theta["tau_rise"]).max()
        reach = int(torch.ceil(_MEMORY * fs * slowest))
        reach_coupling = int(torch.ceil(_MEMORY * fs * theta["tau_coupling"])) + 1
        impulse = pad(torch.ones(n_cells, 1), (0, reach - 1))
        self.response = _shifted(model.calcium.fluorescence(impulse, theta, fs) - theta["baseline"][:, None])
        impulse = pad(torch.ones(1, 1), (0, reach_coupling - 1))
        self.coupling = _shifted(model.filtered(impulse, theta, fs)[0])
        self.zone = max(_MIN_ZONE, round(_ZONE * fs))
        self.period = self.zone + _FAR + max(reach, reach_coupling)
        beyond = (0, self.period)
        self.counts = pad(counts, beyond)
        expected = model.fluorescence(counts, theta, fs, recording.light)
        self.residual = pad(recording.observed - expected, beyond)
        variance = (model.calcium.noise_std(theta, fs) ** 2)[:, None]
        self.precision = pad(recording.valid / variance, beyond)
        inputs = pad(model.inputs(counts, theta, fs, recording.light), beyond)
        rates = model.rates(inputs)
        # What all cells do in a frame lies side by side in memory: (time, what, cell).
        self.network = torch.stack([inputs, rates, rates.log(), self.counts]).permute(2, 0, 1).contiguous()
        # Cells whose input a spike of each cell changes, and itself.
        coupled = (self.weights != 0) | torch.eye(n_cells, dtype=torch.bool)
        self.reached = [column.nonzero()[:, 0] for column in coupled.mT]
        self.frame = pad(torch.full((self.n_frames,), 1 / fs), beyond)
        self.births = pad(recording.proposal.double().cumsum(1), (1, 0))
        self.proposal = pad(recording.proposal, beyond)

    def move(self, cell: int, generator: torch.Generator) -> None:
        """Propose one move per zone of one cell; make those that are accepted."""
        m = self._propose(cell, generator)
        if not len(m.base):
            return
        response = m.change(self.response[cell])
        residual, precision = (
            x[cell].unfold(0, response.shape[1], 1).index_select(0, m.base) for x in (self.residual, self.precision)
        )
        gain = (precision * response * (residual - 0.5 * response)).sum(1)
        coupling = m.change(self.coupling)
        near = (m.base[:, None] + torch.arange(coupling.shape[1])).flatten()
        reached = self.reached[cell]
        network = self.network.index_select(0, near).index_select(2, reached)
        now, rates_now, log_now, counts = network.unbind(1)
        inputs = torch.addcmul(now, coupling.flatten()[:, None], self.weights[reached, cell])
        rates = self.model.rates(inputs)
        log_rates = rates.log()
        others = (counts * (log_rates - log_now) - (rates - rates_now) * self.frame[near, None]).sum(1)
        gain = gain + others.view(coupling.shape).sum(1)
        own, here = log_rates[:, reached == cell].view(coupling.shape), self.counts[cell]
        for offset, sign, moved in ((m.to, 1, m.add), (m.off, -1, m.drop)):
            at = (m.base + offset).clamp_max(self.n_frames - 1)
            log_mean = own.gather(1, offset[:, None])[:, 0] + self.frame[0].log()
            number = (here[at] + (sign + 1) / 2).clamp_min(1)
            gain = gain + sign * moved * (log_mean - number.log())
        taken = torch.rand(len(m.base), generator=generator).log() < gain + m.log_ratio
        if not bool(taken.any()):
            return
        window = m.base[taken, None] + torch.arange(response.shape[1])
        self.residual[cell, window] = residual[taken] - response[taken]
        touched = taken.repeat_interleave(coupling.shape[1])
        for what, values in enumerate((inputs, rates, log_rates)):
            self.network[near[touched, None], what, reached] = values[touched]
        for offset, change in ((m.to, m.add), (m.off, -m.drop)):
            at = (m.base + offset)[taken]
            here[at] += change[taken]
            self.network[at, 3, cell] = here[at]

    def _propose(self, cell: int, generator: torch.Generator) -> _Moves:
        """A birth, a death or a shift in each zone, with what makes the move reversible."""
        first = int(torch.randint(1 - self.zone, self.period - self.zone + 1, (), generator=generator))
        start = torch.arange(first, max(first, self.n_frames), self.period)
        end = (start + self.zone).clamp_max(self.n_frames)
        start = start.clamp_min(0)
        kind, u, v, w = torch.rand((4, len(start)), generator=generator, dtype=torch.double)
        births, spikes = self.births[cell], self.counts[cell]
        # Births are as likely as `proposal` says.
        low, total = births[start], births[end] - births[start]
        born = torch.searchsorted(births, low + u * total, right=True) - 1
        born = torch.minimum(born.clamp_min(0), end - 1).maximum(start)
        # Deaths and shifts take any of the spikes there are.
        fallen = pad(spikes[: self.n_frames].double().cumsum(0), (1, 0))
        n = fallen[end] - fallen[start]
        chosen = torch.searchsorted(fallen, fallen[start] + torch.floor(v * n) + 1) - 1
        chosen = torch.minimum(chosen.clamp_min(0), end - 1).maximum(start)
        step = torch.floor(w * 2 * _FAR).long() - _FAR
        step = step + (step >= 0)
        shift, birth, some = kind >= 0.5, kind < 0.25, n > 0
        goal = torch.where(shift, chosen + step, born)
        inside = (goal >= start) & (goal < end)
        goal = torch.where(inside, goal, chosen)
        add, drop = birth | shift, ~birth
        base = torch.where(birth, born, torch.where(shift, torch.minimum(goal, chosen), chosen))
        share = self.proposal[cell].double()[torch.where(birth, born, chosen)] / total
        more = spikes[goal].double() + 1
        ratio = torch.where(
            birth,
            (more / (n + 1)).log() - share.log(),
            torch.where(shift, (more / spikes[chosen].clamp_min(1)).log(), share.log() - (spikes[chosen] / n).log()),
        )
        to, off = torch.where(add, goal - base, 0), torch.where(drop, chosen - base, 0)
        possible = birth | (some & (~shift | inside))
        return _Moves(*(x[possible] for x in (base, to, off, add.float(), drop.float(), ratio.float())))
