"""Spikes that come in bursts: a hidden Markov chain of two states, quiet and bursting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from napari_calvae.generative.parameters import as_rate
from napari_calvae.generative.prior import SpikePrior, typical


@dataclass(frozen=True, eq=False)
class BurstyPrior:
    """Poisson counts at one of two rates, between which the cell switches in continuous time.

    Bursts begin at ``onset`` and end at ``1 / duration`` per second, so that the cell spends onset · duration /
    (1 + onset · duration) of its time in them. Each frame counts spikes at the rate of its middle; the chain between
    two middles is exact. Hence all is in seconds, and the frame rate changes what is said of a train to first order in
    dt / duration at most. Like `SpikePrior`, counts of ``max_count`` stand for that many or more.

    Parameters
    ----------
    quiet, burst
        Spikes per second (Hz) in either state, one for all or one per ROI; tensors may require gradients.
    onset
        Bursts per second that begin while quiet (Hz).
    duration
        Mean length of a burst (s).
    max_count
        Highest count per frame.
    """

    name: ClassVar[str] = "bursty"

    quiet: float | Tensor
    burst: float | Tensor
    onset: float | Tensor = 0.2
    duration: float | Tensor = 0.2
    max_count: int = 10

    def __post_init__(self) -> None:
        for name in ("quiet", "burst", "onset", "duration"):
            value = torch.as_tensor(getattr(self, name))
            if not bool(torch.all(torch.isfinite(value) & (value > 0))):
                raise ValueError(
                    f"BurstyPrior: expected {name} finite and above 0, got {getattr(self, name)}. "
                    "Give rates in Hz and the duration in seconds."
                )
        if self.max_count < 1:
            raise ValueError(f"BurstyPrior: expected max_count ≥ 1, got {self.max_count}. Use 1 for Bernoulli spikes.")

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of a prior for cells in general: of values that differ by cell, the `typical` one."""
        values = {name: typical(getattr(self, name)) for name in ("quiet", "burst", "onset", "duration")}
        return values | {"max_count": self.max_count}

    @property
    def rate(self) -> Tensor:
        """Mean spikes per second over both states (Hz)."""
        quiet, burst, onset, duration = self._values()
        share = onset * duration / (1 + onset * duration)
        return quiet + share * (burst - quiet)

    def log_prob(
        self,
        counts: Num[Tensor, "*counts time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "*valid time"] | None = None,
    ) -> Float[Tensor, "*out"]:
        """Log-probability of whole trains, summed over all paths of the state.

        Frames where ``valid`` is False may hold anything; the state goes on through them. Counts that are no integers
        from 0 to ``max_count`` are impossible.
        """
        quiet, burst, onset, duration = self._values(counts.device)
        rate = as_rate(frame_rate, quiet)
        share, left = _chain(onset, duration, rate)
        # Probability of each count in each state, (batch, 2, count).
        both = SpikePrior(torch.stack([quiet, burst], -1), self.max_count)
        table = both.log_table(rate.unsqueeze(-1), counts.device)
        measured = torch.ones_like(counts, dtype=torch.bool) if valid is None else valid.expand(counts.shape)
        possible = (counts == counts.round()) & (counts >= 0) & (counts <= self.max_count)
        index = torch.where(possible, counts, 0).long().clamp(0, self.max_count)
        batch = torch.broadcast_shapes(index.shape[:-1], table.shape[:-2])
        index = index.expand(*batch, -1).unsqueeze(-2).expand(*batch, 2, -1)
        seen = table.expand(*batch, 2, -1).gather(-1, index).mT * measured.unsqueeze(-1)
        stationary = torch.stack([1 - share, share], -1)
        identity = torch.eye(2, dtype=share.dtype, device=share.device)
        left = left[..., None, None]
        move = left * identity + (1 - left) * stationary.unsqueeze(-2)  # row: from, column: to
        scale = seen.amax(-1)
        steps = move.unsqueeze(-3) * torch.exp(seen - scale.unsqueeze(-1)).unsqueeze(-2)
        product, log_scale = _product(steps.expand(*batch, -1, 2, 2), scale)
        total = (stationary.unsqueeze(-2) @ product).sum((-2, -1)).log() + log_scale
        return torch.where((possible | ~measured).all(-1), total, -math.inf)

    def sample(
        self,
        shape: tuple[int, ...],
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch time"]:
        """Draw spike counts of the given shape (batch, time); parameters broadcast against the batch."""
        device = None if generator is None else generator.device
        quiet, burst, onset, duration = (v.detach() for v in self._values(device))
        rate = as_rate(frame_rate, quiet)
        share, left = _chain(onset, duration, rate)
        # From frame to frame the state is kept or drawn anew, which is the same chain.
        drawn = torch.rand(shape, generator=generator, device=device) < share.unsqueeze(-1)
        anew = torch.rand(shape, generator=generator, device=device) >= left.unsqueeze(-1)
        frames = torch.arange(shape[-1], device=device)
        latest = torch.where(anew, frames, 0).cummax(-1).values
        state = drawn.gather(-1, latest)
        mean = torch.where(state, burst.unsqueeze(-1), quiet.unsqueeze(-1)) / rate.unsqueeze(-1)
        return torch.poisson(mean.expand(shape), generator=generator).clamp_max(self.max_count)

    def _values(self, device: torch.device | None = None) -> list[Tensor]:
        values = [torch.as_tensor(v, device=device) for v in (self.quiet, self.burst, self.onset, self.duration)]
        dtypes = [v.dtype for v in values if v.ndim and v.is_floating_point()]
        dtype = dtypes[0] if dtypes else torch.get_default_dtype()
        return [v.to(dtype) for v in torch.broadcast_tensors(*values)]


def _chain(onset: Tensor, duration: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Share of time in bursts, and how much of a state's difference to that is left a frame later."""
    share = onset * duration / (1 + onset * duration)
    left = torch.exp(-(onset + 1 / duration) / rate)
    return torch.broadcast_tensors(share, left)  # type: ignore[return-value]


def _product(
    steps: Float[Tensor, "*batch time 2 2"], log_scale: Float[Tensor, "*batch time"]
) -> tuple[Float[Tensor, "*batch 2 2"], Float[Tensor, "*batch"]]:
    """Product over time, pairwise in log depth; each product is scaled to a largest entry of one."""
    total = log_scale.sum(-1)
    while steps.shape[-3] > 1:
        odd = steps[..., -1:, :, :] if steps.shape[-3] % 2 else steps[..., :0, :, :]
        even = 2 * (steps.shape[-3] // 2)
        steps = steps[..., 0:even:2, :, :] @ steps[..., 1:even:2, :, :]
        largest = steps.detach().amax((-2, -1), keepdim=True)
        total = total + largest.log().sum((-3, -2, -1))
        steps = torch.cat([steps / largest, odd], -3)
    return steps.squeeze(-3), total
