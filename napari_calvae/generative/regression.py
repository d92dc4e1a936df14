"""Closed-form pieces of `initial_theta`: amplitude, baseline and noise given the shape of the response."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from napari_calvae.generative.base import BASELINE, NOISE, Parameter, as_rate


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
    for _ in range(12):
        g = u.exp()
        slope = g * (g * xx - xy) / noise_var + precision * (u - prior.centre)
        curvature = g * g * xx / noise_var + precision
        u = u - (slope / curvature).clamp(-1, 1)
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
