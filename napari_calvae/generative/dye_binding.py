"""Spikes to fluorescence through calcium that binds to a dye: the SCDF model, which supersedes linearity."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.generative.base import BASELINE, NOISE, GenerativeModel, Parameter, Theta, as_rate
from napari_calvae.generative.recursion import exponential_filter, linear_scan
from napari_calvae.generative.regression import ShapeGrid, baseline_and_noise, measured_frames

CALCIUM = Parameter("tau_calcium", "s", "Calcium decay", "Time constant at which a spike's calcium leaves", 0.2, 0.6)
BINDING = Parameter("k_on", "1/s", "Binding rate", "Rate at which free dye binds right after a single spike", 1.0, 1.2)
HILL = Parameter(
    "hill", "", "Hill exponent", "Cooperativity of binding: its rate grows as calcium to this power", 2.0, 0.3
)
UNBINDING = Parameter("tau_unbind", "s", "Unbinding time", "Time constant at which bound dye lets go", 0.4, 0.7)
SATURATION = Parameter("saturation", "ΔF/F", "Saturation", "Fluorescence above baseline with all dye bound", 3.0, 0.8)

#: Values that `initial_theta` compares, in prior spreads from the median: all combinations.
_GRID = {
    CALCIUM: (-1.0, 0.0, 1.0),
    BINDING: (-1.5, -0.5, 0.5, 1.5),
    HILL: (-1.0, 0.5),
    UNBINDING: (-1.0, 0.0, 1.0),
}


@final
class DyeBinding(GenerativeModel):
    """Calcium jumps by one per spike and decays; dye binds it with cooperativity and saturates.

    c' = −c/τ_calcium, d' = k_on c^h (1 − d) − d/τ_unbind, F = saturation · d + baseline, where d in [0, 1] is the bound
    share of the dye (the paper's d/d_max; its α is saturation/d_max).

    In each frame d relaxes exactly as it does at constant binding: with r = k_on c^h + 1/τ_unbind,
    d ← d∞ + (d − d∞) e^{−r dt}, d∞ = k_on c^h / r. This is stable and within [0, 1] however large k_on c^h dt.
    c^h is its average over the frame, half of which lies before the frame's spikes and half after, wherever they are.
    Expanded to first order in dt this is the step of Speiser et al. (2017), section 2.2,
    d_t = k_on dt c_t^h (1 − d_{t−1}) + κ d_{t−1} with κ = 1 − dt/τ_unbind. F is taken at the middle of the frame,
    halfway between d at its two ends. Two frame rates agree to first order in dt and better.
    """

    name: ClassVar[str] = "dye_binding"
    label: ClassVar[str] = "Calcium and saturating dye"
    parameters: tuple[Parameter, ...] = (CALCIUM, BINDING, HILL, UNBINDING, SATURATION, BASELINE, NOISE)

    def fluorescence(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F of each frame: baseline and the bound share of the dye."""
        bound = _bound(counts, theta, frame_rate)
        return theta["baseline"].unsqueeze(-1) + theta["saturation"].unsqueeze(-1) * bound

    def first_guess(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """Most probable kinetics on a coarse grid, the best saturation for each in closed form.

        Kinetics are compared on the 3000 frames that hold the most spikes; baseline and noise are the whole trace's.
        """
        rate = as_rate(frame_rate, observed).expand(len(observed))
        counts = counts.to(observed.dtype).nan_to_num()
        measured, weights = measured_frames(observed, valid)
        theta = ShapeGrid(_GRID, SATURATION, _bound).fit(measured, counts, weights, rate)
        predicted = theta["saturation"].unsqueeze(-1) * _bound(counts, theta, rate)
        return theta | baseline_and_noise(measured, predicted, weights, rate)


def _bound(
    counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
) -> Float[Tensor, "*out time"]:
    """Bound share of the dye at the middle of each frame."""
    dt = 1 / as_rate(frame_rate, theta["tau_calcium"])
    x = dt / theta["tau_calcium"]
    counts = counts.to(x.dtype)
    left = -torch.expm1(-x) / x  # of a spike's calcium at the end of its frame, averaged over where in it the spike was
    start = exponential_filter(counts, torch.zeros_like(x), left.unsqueeze(-1), torch.exp(-x).unsqueeze(-1))
    third = torch.exp(-x / 3).unsqueeze(-1)
    hill = theta["hill"].unsqueeze(-1)
    before = _power(start * third, hill)
    after = _power((start * third + counts) * third, hill)
    binding = theta["k_on"].unsqueeze(-1) * (before + after) / 2
    total = binding + 1 / theta["tau_unbind"].unsqueeze(-1)
    exponent = -total * dt.unsqueeze(-1)
    end = linear_scan(torch.exp(exponent), -torch.expm1(exponent) * binding / total)
    return (end + pad(end[..., :-1], (1, 0))) / 2


def _power(c: Tensor, exponent: Tensor) -> Tensor:
    """c^h, whose slope at c = 0 is taken as zero (for h < 1 it is infinite)."""
    return c.clamp_min(1e-9) ** exponent * (c > 0)
