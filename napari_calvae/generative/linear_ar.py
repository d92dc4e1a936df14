"""Spikes to fluorescence through linear calcium dynamics: the SCF model, an autoregressive process of order 1 or 2."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.generative.base import BASELINE, NOISE, GenerativeModel, Parameter, Theta, as_rate
from napari_calvae.generative.recursion import exponential_filter
from napari_calvae.generative.regression import baseline_and_noise, evidence, log_normal, measured_frames, shrunk_gain

RISE = Parameter("tau_rise", "s", "Rise time", "Time constant of the rise after a spike", 0.04, 0.8)
DECAY = Parameter("tau_decay", "s", "Decay time", "Time constant of the decay after a spike", 0.5, 0.7)
AMPLITUDE = Parameter("amplitude", "ΔF/F", "Amplitude", "Peak of the response to a single spike", 0.2, 1.0)

#: Time constants (s) that `initial_theta` compares; two refinements divide the step by about four each.
_GRID = (0.004, 4.0, 20)
#: Slower changes than this (s) are taken for drift when shapes are compared.
_DRIFT = 20.0
#: Frames that tell the shape of a response as well as any number of them.
_ENOUGH = 16_384
#: At most this many numbers are worked on at once.
_BUDGET = 8_000_000


@final
class LinearAR(GenerativeModel):
    """Every spike adds amplitude · k(t), k(t) = (e^{−t/τ_decay} − e^{−t/τ_rise}) / peak, to the fluorescence.

    The response in each frame is k averaged over where in its own frame the spike may have been, in closed form. Hence
    a spike shows in its own frame (half risen, were the rise instantaneous) and fully from the next on, and two frame
    rates agree to second order in dt. As τ_rise → 0 this is AR(1); with γ = e^{−dt/τ_decay} the calcium
    c_t = γ c_{t−1} + s_t of Speiser et al. (2017), section 2.2, up to that average.
    """

    name: ClassVar[str] = "linear_ar"
    label: ClassVar[str] = "Linear calcium (AR)"
    parameters: tuple[Parameter, ...] = (RISE, DECAY, AMPLITUDE, BASELINE, NOISE)

    def fluorescence(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F of each frame: baseline and the sum of all responses."""
        decay = theta["tau_decay"]
        ratio = theta["tau_rise"].clamp_min(1e-6) / decay
        # At equal time constants both numerator and peak vanish; a rise 0.1 % faster is the same cell.
        ratio = torch.where((ratio - 1).abs() < 1e-3, 1 - 1e-3, ratio)
        scale = theta["amplitude"] / _peak(ratio)
        first, tail, factor = _average_response(
            torch.stack([decay, decay * ratio], -1), as_rate(frame_rate, decay).unsqueeze(-1)
        )
        sign = scale.unsqueeze(-1) * scale.new_tensor([1.0, -1.0])
        response = exponential_filter(counts.to(decay.dtype), (sign * first).sum(-1), sign * tail, factor)
        return response + theta["baseline"].unsqueeze(-1)

    def first_guess(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """Most probable (τ_rise, τ_decay) on a grid, the best amplitude for each in closed form.

        The response of any pair is a difference of two exponential responses, so that all pairs follow from the inner
        products of one set of filtered traces. Drift slower than 20 s is ignored. Of a long recording the stretch with
        most spikes tells shape and amplitude, all of it baseline and noise.
        """
        n_rois, n_frames = observed.shape
        rate = as_rate(frame_rate, observed).expand(n_rois)
        counts = counts.to(observed.dtype).nan_to_num()
        measured, weights = measured_frames(observed, valid)
        busy = _busiest(counts * weights, _ENOUGH)
        step = max(1, _BUDGET // (min(n_frames, _ENOUGH) * (_GRID[2] + 1)))
        seen, fired, weight = (x.gather(1, busy) for x in (measured, counts, weights))
        theta = {name: torch.empty_like(rate) for name in (RISE.name, DECAY.name, AMPLITUDE.name)}
        for alike in (rate == r for r in rate.unique()):  # drift is told apart by the clock
            for rows in alike.nonzero()[:, 0].split(step):
                for name, found in _fit_shape(seen[rows], fired[rows], weight[rows], rate[rows]).items():
                    theta[name][rows] = found
        unit = theta | {"baseline": torch.zeros_like(rate), "noise_density": torch.ones_like(rate)}
        predicted = self.fluorescence(counts, unit, rate)
        return theta | baseline_and_noise(measured, predicted, weights, rate)


def _peak(ratio: Tensor) -> Tensor:
    """Largest value of e^{−t/τ} − e^{−t/(τ ratio)} over t; negative for a ratio above one."""
    return ratio ** (ratio / (1 - ratio)) * (1 - ratio)


def _average_response(tau: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e^{−t/τ} averaged over the spike's place in its frame: there, one frame later, and the factor from then on."""
    x = 1 / (rate * tau)
    return -torch.expm1(-x / 2) / x, -torch.expm1(-x) * torch.exp(-x / 2) / x, torch.exp(-x)


def _busiest(counts: Float[Tensor, "roi time"], n: int) -> Int[Tensor, "roi frame"]:
    """Frames of the stretch of at most ``n`` frames in which each ROI has most spikes."""
    n = min(n, counts.shape[-1])
    total = pad(counts.double().cumsum(-1), (1, 0))
    first = (total[:, n:] - total[:, :-n]).argmax(-1, keepdim=True)
    return first + torch.arange(n, device=counts.device)


def _fit_shape(observed: Tensor, counts: Tensor, weights: Tensor, rate: Tensor) -> dict[str, Tensor]:
    """Time constants and amplitude of each ROI: a coarse grid, then two finer ones around its best point."""
    low, high, n = _GRID
    grid = torch.logspace(math.log10(low), math.log10(high), n, dtype=rate.dtype, device=rate.device)
    rows, columns = torch.triu_indices(n, n, 1, device=rate.device)
    best = _best_pair(observed, counts, weights, rate, grid.expand(len(rate), n), (rows, columns))
    step = (high / low) ** (1 / (n - 1))
    exponents = torch.arange(-2, 3, dtype=rate.dtype, device=rate.device)
    rise, decay = torch.arange(5, device=rate.device), torch.arange(5, 10, device=rate.device)
    rows, columns = (i.flatten() for i in torch.meshgrid(rise, decay, indexing="ij"))
    for share in (0.3, 0.08):
        factors = step ** (share * exponents)
        around = torch.cat([best["tau_rise"][:, None] * factors, best["tau_decay"][:, None] * factors], 1)
        best = _best_pair(observed, counts, weights, rate, around, (rows, columns))
    return best


def _best_pair(
    observed: Tensor,
    counts: Tensor,
    weights: Tensor,
    rate: Tensor,
    tau: Float[Tensor, "roi tau"],
    pairs: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Most probable of the ``pairs`` (rise, decay: indices into ``tau``), and the amplitude that goes with it."""
    first, tail, factor = _average_response(tau, rate[:, None])
    responses = exponential_filter(counts[:, None], first, tail[..., None], factor[..., None])
    columns = torch.cat([responses, observed[:, None]], 1) * weights[:, None]
    # A constant per window of `_DRIFT` seconds is projected out of everything.
    window = min(max(16, round(_DRIFT * float(rate.max()))), observed.shape[-1])
    padding = (0, -observed.shape[-1] % window)
    n = pad(weights, padding).unflatten(-1, (-1, window)).sum(-1)
    sums = pad(columns, padding).unflatten(-1, (-1, window)).sum(-1)
    gram = columns @ columns.mT - (sums / n.clamp_min(1)[:, None]) @ sums.mT
    r, d = pairs
    scale = _peak(tau[:, r] / tau[:, d])
    diagonal = gram.diagonal(dim1=1, dim2=2)
    xx = (diagonal[:, r] + diagonal[:, d] - 2 * gram[:, r, d]).clamp_min(0) / scale**2
    xy = (gram[:, d, -1] - gram[:, r, -1]) / scale
    yy = diagonal[:, -1:]
    explained = xy.clamp_min(0) ** 2 / xx.clamp_min(torch.finfo(xx.dtype).tiny)
    freedom = (n.sum(-1) - (n > 0).sum(-1) - 1).clamp_min(1)[:, None]
    floor = 1e-6 * yy / freedom + 1e-10
    noise_var = torch.maximum((yy - explained.amax(1, keepdim=True)) / freedom, floor)
    gain = shrunk_gain(xx, xy, noise_var, AMPLITUDE)
    score = evidence(xx, xy, gain, noise_var, AMPLITUDE) + log_normal(tau[:, r], RISE) + log_normal(tau[:, d], DECAY)
    best = score.argmax(1, keepdim=True)
    return {
        "tau_rise": tau.gather(1, r[best]).squeeze(1),
        "tau_decay": tau.gather(1, d[best]).squeeze(1),
        "amplitude": gain.gather(1, best).squeeze(1),
    }
