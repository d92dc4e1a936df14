"""What is believed of spikes before seeing fluorescence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from napari_calvae.generative.base import as_rate


@dataclass(frozen=True, eq=False)
class SpikePrior:
    """Independent Poisson counts per frame at a rate in Hz, so that no frame rate can change what it says of a second.

    Counts of ``max_count`` stand for that many or more: the tail of the Poisson distribution is theirs. With
    ``max_count`` 1 this is a Bernoulli distribution, p = 1 − e^{−rate/frame_rate}.

    Parameters
    ----------
    rate
        Spikes per second (Hz), one for all or one per ROI; a tensor may require gradients.
    max_count
        Highest count per frame.
    """

    name: ClassVar[str] = "poisson"

    rate: float | Tensor
    max_count: int = 10

    def __post_init__(self) -> None:
        if self.max_count < 1 or not bool(torch.all(torch.isfinite(torch.as_tensor(self.rate)))):
            raise ValueError(
                f"SpikePrior: expected a rate in Hz and max_count ≥ 1, got rate {self.rate} and max_count "
                f"{self.max_count}. Use 1 for Bernoulli spikes."
            )
        if not bool(torch.all(torch.as_tensor(self.rate) > 0)):
            raise ValueError(f"SpikePrior: expected rates above 0 Hz, got {self.rate}. Give spikes per second.")

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of a prior for cells in general: of values that differ by cell, the `typical` one."""
        return {"rate": typical(self.rate), "max_count": self.max_count}

    def log_prob(
        self,
        counts: Num[Tensor, "*counts time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "*valid time"] | None = None,
    ) -> Float[Tensor, "*out"]:
        """Log-probability of whole trains; frames where ``valid`` is False are left out of the product.

        Counts that are no integers from 0 to ``max_count`` are impossible.
        """
        table = self.log_table(frame_rate, torch.device(counts.device))
        measured = torch.ones_like(counts, dtype=torch.bool) if valid is None else valid
        log_p, n_left = torch.zeros((), dtype=table.dtype, device=table.device), measured.sum(-1)
        # The frames are alike, so that it only matters how many hold how many spikes.
        for k in range(self.max_count + 1):
            n = ((counts == k) & measured).sum(-1)
            log_p = log_p + n * table[..., k]
            n_left = n_left - n
        return torch.where(n_left == 0, log_p, -math.inf)

    def sample(
        self,
        shape: tuple[int, ...],
        frame_rate: float | Num[Tensor, "*rate"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*batch time"]:
        """Draw spike counts of the given shape (batch, time); the rate broadcasts against the batch."""
        device = None if generator is None else generator.device
        rate = torch.as_tensor(self.rate, dtype=torch.get_default_dtype(), device=device)
        mean = (rate / as_rate(frame_rate, rate)).detach().unsqueeze(-1).expand(shape)
        return torch.poisson(mean, generator=generator).clamp_max(self.max_count)

    def log_table(self, frame_rate: float | Tensor, device: torch.device) -> Float[Tensor, "*batch count"]:
        """Log-probability of each count in one frame."""
        rate = torch.as_tensor(self.rate, device=device)
        rate = rate if rate.is_floating_point() else rate.to(torch.get_default_dtype())
        mean = (rate / as_rate(frame_rate, rate)).unsqueeze(-1)
        k = torch.arange(self.max_count + 1, dtype=mean.dtype, device=device)
        poisson = k * mean.log() - mean - torch.lgamma(k + 1)
        # P(K ≥ m) = P(m) (1 + λ/(m+1) + λ²/((m+1)(m+2)) + …): exact where 1 − P(K < m) would round to zero.
        later = self.max_count + torch.arange(1, 200, dtype=mean.dtype, device=device)
        terms = (mean.log() - later.log()).cumsum(-1)
        tail = poisson[..., -1:] + torch.logsumexp(torch.cat([torch.zeros_like(mean), terms], -1), -1, keepdim=True)
        many = mean > self.max_count
        if self.max_count and bool(many.any()):  # the series would be long, and the other is no longer small
            below = torch.logsumexp(poisson[..., :-1], -1, keepdim=True).exp()
            tail = torch.where(many, torch.log1p(-torch.where(many, below, 0)), tail)
        return torch.cat([poisson[..., :-1], tail], -1)


def typical(value: float | Tensor) -> float:
    """Geometric mean of a positive value over all cells: what a new cell may be expected to have."""
    values = torch.as_tensor(value, dtype=torch.float64).detach()
    return float(values) if values.numel() == 1 else float(values.log().mean().exp())
