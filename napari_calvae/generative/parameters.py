"""What θ is made of: named physical parameters with units and priors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Physical value of each parameter by name, each of shape (*batch).
Theta = Mapping[str, Tensor]


@dataclass(frozen=True)
class Parameter:
    """One entry of θ and what is known of it before seeing data.

    Parameters
    ----------
    name, unit, label, help
        Key in θ, physical unit, and what a form shows for it.
    median, spread
        The prior is normal around the transformed median with standard deviation ``spread``: of the logarithm for
        positive parameters (0.7 is about a factor of two), of the value itself for others.
    positive
        Whether the value must be above zero.
    own
        Whether cells of one recording differ in it, and do not share it as they do the indicator's kinetics.
    """

    name: str
    unit: str
    label: str
    help: str
    median: float
    spread: float
    positive: bool = True
    own: bool = False

    @property
    def centre(self) -> float:
        """Prior mean in the unconstrained space."""
        return math.log(self.median) if self.positive else self.median

    @property
    def kinetic(self) -> bool:
        """Whether it belongs to the indicator (times, rates, cooperativity), not to a cell, its light or its noise."""
        return not self.own and "ΔF/F" not in self.unit


BASELINE = Parameter("baseline", "ΔF/F", "Baseline", "Fluorescence without spikes", 0.0, 0.2, positive=False)
NOISE = Parameter(
    "noise_density",
    "ΔF/F/√Hz",
    "Noise",
    "Standard deviation of one frame is this times √(frame rate); 0.01 is CASCADE's ν = 1 %/√Hz",
    0.02,
    0.8,
)


def as_rate(frame_rate: float | Tensor, like: Tensor) -> Tensor:
    """Frame rate (Hz) as a tensor of the kind of ``like``."""
    return torch.as_tensor(frame_rate, dtype=like.dtype, device=like.device)
