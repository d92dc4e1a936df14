"""Spikes to fluorescence through calcium, a Hill curve and a finite rise time: the physiological model of MLspike."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.generative.base import BASELINE, NOISE, GenerativeModel, Parameter, Theta, as_rate
from napari_calvae.generative.recursion import exponential_filter, linear_scan
from napari_calvae.generative.regression import ShapeGrid, baseline_and_noise, measured_frames

AMPLITUDE = Parameter("amplitude", "ΔF/F", "Amplitude", "Peak of the response to a single spike", 0.2, 1.0)
CALCIUM = Parameter("tau_calcium", "s", "Calcium decay", "Time constant at which a spike's calcium leaves", 0.8, 0.6)
RISE = Parameter("tau_rise", "s", "Rise time", "Time constant at which the indicator follows calcium", 0.04, 0.8)
HILL = Parameter("hill", "", "Hill exponent", "Fluorescence grows as calcium to this power", 1.7, 0.3)
SATURATION = Parameter(
    "saturation", "", "Saturation", "γ: calcium^hill of n spikes at once reads as calcium^hill / (1 + γ calcium^hill)",
    0.05, 1.0,
)  # fmt: skip

#: Values that `initial_theta` compares, in prior spreads from the median: all combinations.
_GRID = {
    CALCIUM: (-1.6, -0.8, 0.0, 0.8, 1.6),
    RISE: (-1.0, 0.5),
    HILL: (-1.4, -0.5, 0.4, 1.3),
    SATURATION: (-0.8, 0.8),
}


@final
class Physiological(GenerativeModel):
    """Calcium c jumps by one per spike and decays; the indicator p follows a saturating power of it.

    c' = −c/τ_calcium, p' = (c^n − (1 + γ c^n) p) / τ_rise, F = baseline + amplitude · p / peak. At constant calcium p
    is the Hill curve c^n / (1 + γ c^n), and its rise is the faster the more calcium there is, as mass action has it:
    the nonlinear model with finite rise time of Deneux et al. (2016), Nature Communications 7:12190. Checked against
    the authors' program (MLspike, spk_calcium), this differs in three ways. Resting calcium c₀, which makes c^n into
    (c₀ + c)^n − c₀^n there, is zero here, as it is there by default. Their drift, a random walk, multiplies
    fluorescence; here it is a matter of the noise (`DriftingNoise`) and stays around its mean. Their alternative to
    the Hill curve, a cubic polynomial, is left out: with their values for GCaMP6s it falls again beyond about ten
    spikes at once. ``peak`` makes the amplitude that of one spike's peak: exact without saturation, and with a rise
    as slow as the decay 1 % too large at γ = 0.05 and 16 % at γ = 1. These are the equations of `DyeBinding` (k_on
    = γ/τ_rise, τ_unbind = τ_rise, saturation = amplitude/γ) in coordinates that stay good where binding is fast and
    far from saturated.

    A frame's spikes come in its middle, and F is the mean over the frame; for a linear response that equals `LinearAR`,
    where spikes are spread over the frame and F is taken in its middle. Each half of a frame is one exponential step of
    second order: the target c^n / (1 + γ c^n) goes linearly from its value at one end to the other, at a mean rate. Its
    result is a weighted mean of p and two targets, so that p stays within [0, 1/γ] at any frame rate.
    """

    name: ClassVar[str] = "physiological"
    label: ClassVar[str] = "Physiological (MLspike)"
    parameters: tuple[Parameter, ...] = (AMPLITUDE, CALCIUM, RISE, HILL, SATURATION, BASELINE, NOISE)

    def fluorescence(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F of each frame: baseline, and what the indicator reads over the frame."""
        return theta["baseline"].unsqueeze(-1) + theta["amplitude"].unsqueeze(-1) * _read(counts, theta, frame_rate)

    def first_guess(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """Most probable shape on a coarse grid, the best amplitude for each in closed form.

        Shapes are compared on the 3000 frames that hold the most spikes; baseline and noise are the whole trace's.
        """
        rate = as_rate(frame_rate, observed).expand(len(observed))
        counts = counts.to(observed.dtype).nan_to_num()
        measured, weights = measured_frames(observed, valid)
        theta = ShapeGrid(_GRID, AMPLITUDE, _read).fit(measured, counts, weights, rate)
        predicted = theta["amplitude"].unsqueeze(-1) * _read(counts, theta, rate)
        return theta | baseline_and_noise(measured, predicted, weights, rate)


def _read(
    counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
) -> Float[Tensor, "*out time"]:
    """Mean over each frame of what the indicator reads, relative to the peak after one spike."""
    tau, rise, hill, gamma = (theta[p.name].unsqueeze(-1) for p in (CALCIUM, RISE, HILL, SATURATION))
    half = 0.5 / as_rate(frame_rate, rise).unsqueeze(-1)
    decay = torch.exp(-half / tau)
    counts = counts.to(decay.dtype)
    factor = (decay**2).squeeze(-1)
    # Just before the middle of each frame; after its spikes; half a frame later; a whole frame later.
    before = exponential_filter(counts, torch.zeros_like(factor), factor.unsqueeze(-1), factor.unsqueeze(-1))
    after = before + counts
    targets, rates = [], []
    for calcium in (after, after * decay, after * decay**2):
        power = calcium.clamp_min(1e-9) ** hill * (calcium > 0)
        rates.append(1 + gamma * power)
        targets.append(power / rates[-1])
    first = _Step(half / rise * (rates[0] + rates[1]) / 2, targets[0], targets[1])
    second = _Step(half / rise * (rates[1] + rates[2]) / 2, targets[1], targets[2])
    # In the middle of the following frame.
    later = linear_scan(first.factor * second.factor, second.factor * first.offset + second.offset)
    middle = pad(later[..., :-1], (1, 0))
    edge = first.factor * middle + first.offset
    mean_after, mean_before = first.mean(middle, edge), second.mean(edge, later)
    return (mean_after + pad(mean_before[..., :-1], (1, 0))) / 2 / _peak(theta).unsqueeze(-1)


class _Step:
    """p' = r (g − p) over a step with r·step = z and g from g₀ to g₁ linearly: p ← factor · p + offset."""

    def __init__(self, z: Tensor, start: Tensor, end: Tensor) -> None:
        self.z, self.start, self.end = z, start, end
        self.factor = torch.exp(-z)
        mean = -torch.expm1(-z) / z
        self.offset = (mean - self.factor) * start + (1 - mean) * end

    def mean(self, before: Tensor, after: Tensor) -> Tensor:
        """Mean of p over the step, from p at its two ends."""
        return (self.start + self.end) / 2 - (after - before) / self.z


def _peak(theta: Theta) -> Float[Tensor, "*batch"]:
    """Largest p after one spike.

    Without saturation p is a difference of exponentials, of τ_calcium/hill and τ_rise, with the largest value
    r^{r/(1−r)}, r their ratio. Saturation scales it, and speeds up the rise, by about 1 + γ.
    """
    one = 1 + theta["saturation"]
    ratio = theta["hill"] * theta["tau_rise"] / (theta["tau_calcium"] * one)
    # At a ratio of one the exponent's limit is −1/e's logarithm; a thousandth beside it is the same cell.
    ratio = torch.where((ratio - 1).abs() < 1e-3, 1 - 1e-3, ratio)
    return ratio ** (ratio / (1 - ratio)) / one
