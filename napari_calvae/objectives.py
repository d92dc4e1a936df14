"""What training minimises: log-weights in, one number out.

``log_joint`` is log p(F, s | θ) and ``log_posterior`` is log q(s | F) of spike trains s drawn from q, (sample, roi);
their difference is the log-weight. Each loss has the value of minus a bound on log p(F), averaged over ROIs, and a
gradient that is an unbiased estimate of the bound's, for the parameters of q and for θ, though spikes are discrete.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor


def elbo(log_joint: Float[Tensor, "sample roi"], log_posterior: Float[Tensor, "sample roi"]) -> Float[Tensor, ""]:
    """Minus the evidence lower bound, with the score-function gradient.

    ∇ E_q[log w] = E_q[(log w − b) ∇ log q + ∇ log p], where the baseline b of each sample is the mean of the others'
    log-weights (Kool, van Hoof & Welling 2019); a single sample has none.
    """
    n = _check(log_joint, log_posterior, least=1)
    log_weight = log_joint - log_posterior
    signal = log_weight.detach()
    if n > 1:
        signal = signal - (signal.sum(0) - signal) / (n - 1)
    return _loss(log_weight.mean(0), log_weight.mean(0) + (signal * log_posterior).mean(0))


def iwae(log_joint: Float[Tensor, "sample roi"], log_posterior: Float[Tensor, "sample roi"]) -> Float[Tensor, ""]:
    """Minus the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016, eq. 8).

    Its gradient is unbiased for θ only: discrete samples pass none to the parameters of q that drew them. To train q,
    use `vimco`.
    """
    _check(log_joint, log_posterior, least=1)
    return -_log_mean(log_joint - log_posterior).mean()


def vimco(log_joint: Float[Tensor, "sample roi"], log_posterior: Float[Tensor, "sample roi"]) -> Float[Tensor, ""]:
    """Minus the importance-weighted bound, with the VIMCO gradient (Mnih & Rezende 2016, "local learning signals").

    With L = log (1/K) Σ_k w_k: ∇ E[L] = E[Σ_k (L − L_{−k}) ∇ log q(s_k) + Σ_k (w_k / Σ_j w_j) ∇ log w_k], where L_{−k}
    is L with the geometric mean of the other weights in place of w_k. Needs two samples or more.
    """
    n = _check(log_joint, log_posterior, least=2)
    log_weight = log_joint - log_posterior
    bound = _log_mean(log_weight)
    w = log_weight.detach()
    others = (w.sum(0) - w) / (n - 1)
    own = torch.eye(n, dtype=torch.bool, device=w.device).reshape(n, n, *[1] * (w.ndim - 1))
    without = _log_mean(torch.where(own, others, w.unsqueeze(1)))  # [k]: the bound without sample k
    signal = bound.detach() - without
    return _loss(bound, bound + (signal * log_posterior).sum(0))


def supervised(log_posterior: Float[Tensor, " roi"], n_frames: Num[Tensor, " roi"] | int = 1) -> Float[Tensor, ""]:
    """Minus the log-probability of the true spike counts, averaged over ROIs.

    Parameters
    ----------
    log_posterior
        (roi,) log q of the true counts.
    n_frames
        Measured frames of each ROI, to get the loss per frame. ROIs without any are left out.
    """
    frames = torch.as_tensor(n_frames, dtype=log_posterior.dtype, device=log_posterior.device)
    frames = frames.expand(log_posterior.shape)
    used = frames > 0
    per_frame = torch.where(used, log_posterior, 0) / frames.clamp_min(1)
    return -per_frame.sum() / used.sum().clamp_min(1)


def _log_mean(log_weight: Tensor) -> Tensor:
    """Logarithm of the mean over the first axis."""
    return torch.logsumexp(log_weight, 0) - math.log(len(log_weight))


def _loss(value: Tensor, surrogate: Tensor) -> Tensor:
    """Minus the mean over ROIs: the number from ``value``, the gradient from ``surrogate``."""
    return -(surrogate + (value - surrogate).detach()).mean()


def _check(log_joint: Tensor, log_posterior: Tensor, least: int) -> int:
    if log_joint.shape != log_posterior.shape or log_joint.ndim < 1 or len(log_joint) < least:
        raise ValueError(
            f"log-weights: expected two tensors (sample, roi) of one shape with at least {least} sample(s), got "
            f"{tuple(log_joint.shape)} and {tuple(log_posterior.shape)}. Draw more samples with posterior.sample(n)."
        )
    return len(log_joint)
