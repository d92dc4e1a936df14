"""Pieces of `initial_theta`: the response's shape from a grid; amplitude, baseline and noise in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.generative.base import BASELINE, NOISE, Parameter, Theta, as_rate

#: At most this many numbers are worked on at once.
_BUDGET = 4_000_000


def measured_frames(
    observed: Float[Tensor, "roi time"], valid: Bool[Tensor, "roi time"] | None
) -> tuple[Float[Tensor, "roi time"], Float[Tensor, "roi time"]]:
    """ΔF/F with zeros where it is missing, and weights that are 1 where it was measured and 0 elsewhere."""
    measured = torch.isfinite(observed) if valid is None else torch.isfinite(observed) & valid
    return torch.where(measured, observed, 0), measured.to(observed.dtype)


def shrunk_gain(
    xx: Float[Tensor, "*batch"], xy: Float[Tensor, "*batch"], noise_var: Float[Tensor, "*#batch"], prior: Parameter
) -> Float[Tensor, "*batch"]:
    """Most probable positive g in y = g x + noise, under the log-normal prior of a parameter.

    Gauss–Newton steps on log g, from least squares. Without signal (``xx`` = 0) it is the prior's median.

    Parameters
    ----------
    xx, xy
        Inner products of the regressor with itself and with the data.
    noise_var
        Variance of the noise.
    """
    precision = 1 / prior.spread**2
    least_squares = xy / xx.clamp_min(torch.finfo(xx.dtype).tiny)
    low, high = prior.median * 1e-3, prior.median * 1e3
    u = least_squares.nan_to_num(nan=prior.median, posinf=high, neginf=low).clamp(low, high).log()
    u = torch.where(xx * high**2 * 1e-6 > noise_var, u, prior.centre)
    own, both = xx / noise_var, xy / noise_var
    for _ in range(12):
        g = u.exp()
        curvature = g * own
        slope = g * (curvature - both) + precision * (u - prior.centre)
        step = (slope / (g * curvature + precision)).clamp(-1, 1)
        u = u - step
        if bool(step.abs().amax() < 1e-6):  # the next one, squared, is below what float32 resolves
            break
    return u.exp()


def evidence(
    xx: Float[Tensor, "*batch"],
    xy: Float[Tensor, "*batch"],
    gain: Float[Tensor, "*batch"],
    noise_var: Float[Tensor, "*#batch"],
    prior: Parameter,
) -> Float[Tensor, "*batch"]:
    """Log-probability of y and the gain, up to what does not depend on the regressor."""
    deviation = (gain.log() - prior.centre) / prior.spread
    return gain * (2 * xy - gain * xx) / (2 * noise_var) - 0.5 * deviation**2


def log_normal(values: Float[Tensor, "*batch"], prior: Parameter) -> Float[Tensor, "*batch"]:
    """Log-prior density of a positive parameter's logarithm, up to a constant."""
    return -0.5 * ((values.log() - prior.centre) / prior.spread) ** 2


def baseline_and_noise(
    observed: Float[Tensor, "roi time"],
    predicted: Float[Tensor, "roi time"],
    weights: Float[Tensor, "roi time"],
    frame_rate: float | Shaped[Tensor, "*rate"],
) -> dict[str, Tensor]:
    """Baseline and noise density from what ``predicted`` (ΔF/F above baseline) leaves over.

    Both are weighted means of data and prior, with the precision that each has.
    """
    n = weights.sum(-1)
    residual = (observed - predicted) * weights
    mean = residual.sum(-1) / n.clamp_min(1)
    variance = ((residual - mean.unsqueeze(-1) * weights) ** 2).sum(-1) / (n - 1).clamp_min(1)
    variance = variance.clamp_min(1e-8)
    data, prior = n / variance, 1 / BASELINE.spread**2
    baseline = (data * mean + prior * BASELINE.median) / (data + prior)
    density = (variance / as_rate(frame_rate, variance)).sqrt()
    data, prior = 2 * (n - 1).clamp_min(0), 1 / NOISE.spread**2
    log_density = (data * density.log() + prior * NOISE.centre) / (data + prior)
    return {BASELINE.name: baseline, NOISE.name: log_density.exp()}


@dataclass(frozen=True)
class ShapeGrid:
    """Finds the most probable shape of the response among all combinations of some values.

    Parameters
    ----------
    steps
        For each positive parameter of the shape the values to try, in prior spreads from its median.
    gain
        The parameter that scales the response.
    respond
        Response of gain one and baseline zero from counts, θ and frame rate.
    n_frames
        Shapes are compared on this many frames of each trace, those around the most spikes.
    """

    steps: Mapping[Parameter, tuple[float, ...]]
    gain: Parameter
    respond: Callable[[Tensor, Theta, Tensor], Tensor]
    n_frames: int = 3000

    def fit(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Float[Tensor, "roi time"],
        weights: Float[Tensor, "roi time"],
        rate: Float[Tensor, " roi"],
    ) -> dict[str, Tensor]:
        """Shape and gain of each ROI from `measured_frames`, spikes and frame rate (Hz)."""
        window = _busiest(counts * weights, self.n_frames)
        y, s, w = (x.gather(1, window) for x in (observed, counts, weights))
        deviations = observed.new_tensor(list(itertools.product(*self.steps.values())))
        step = max(1, _BUDGET // (window.shape[1] * len(deviations)))
        rows = [slice(i, i + step) for i in range(0, len(observed), step)]
        parts = [self._best(y[i], s[i], w[i], rate[i], deviations) for i in rows]
        return {key: torch.cat([p[key] for p in parts]) for key in parts[0]}

    def _best(
        self, observed: Tensor, counts: Tensor, weights: Tensor, rate: Tensor, deviations: Tensor
    ) -> dict[str, Tensor]:
        grid = {p.name: p.median * torch.exp(p.spread * x) for p, x in zip(self.steps, deviations.mT, strict=True)}
        response = self.respond(counts[:, None], grid, rate[:, None])  # roi, candidate, time
        n = weights.sum(-1, keepdim=True).clamp_min(1)
        centred = (response - (response @ weights[..., None]).squeeze(-1)[..., None] / n[..., None]) * weights[:, None]
        y = (observed - observed.sum(-1, keepdim=True) / n) * weights
        xx, xy = (centred**2).sum(-1), (centred @ y[..., None]).squeeze(-1)
        yy = (y**2).sum(-1, keepdim=True)
        explained = xy.clamp_min(0) ** 2 / xx.clamp_min(torch.finfo(xx.dtype).tiny)
        freedom = (n - 2).clamp_min(1)
        noise_var = torch.maximum((yy - explained.amax(1, keepdim=True)) / freedom, 1e-6 * yy / freedom + 1e-10)
        gain = shrunk_gain(xx, xy, noise_var, self.gain)
        best = (evidence(xx, xy, gain, noise_var, self.gain) - 0.5 * (deviations**2).sum(-1)).argmax(1)
        theta = {name: values[best] for name, values in grid.items()}
        return theta | {self.gain.name: gain.gather(1, best[:, None]).squeeze(1)}


def _busiest(counts: Float[Tensor, "roi time"], length: int) -> Num[Tensor, "roi frame"]:
    """Indices of the ``length`` successive frames of each ROI that hold the most spikes."""
    n_frames = counts.shape[-1]
    length = min(length, n_frames)
    before = pad(counts.cumsum(-1), (1, 0))
    start = (before[:, length:] - before[:, : n_frames + 1 - length]).argmax(-1, keepdim=True)
    return start + torch.arange(length, device=counts.device)
