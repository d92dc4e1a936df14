"""What training minimises: log-weights in, one number out.

``log_joint`` is log p(F, s | θ) and ``log_posterior`` is log q(s | F) of spike trains s drawn from q, (sample, roi);
their difference is the log-weight. Losses are averages over ROIs. The gradients of `elbo`, `vimco`, `mmd` and
`info_vae` are unbiased for the parameters of q and for θ, though spikes are discrete; what those of `iwae` and of
wake-sleep miss, their docstrings say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor


def elbo(log_joint: Float[Tensor, "sample roi"], log_posterior: Float[Tensor, "sample roi"]) -> Float[Tensor, ""]:
    """Minus the evidence lower bound, with the score-function gradient.

    ∇ E_q[log w] = E_q[(log w − b) ∇ log q + ∇ log p], where the baseline b of each sample is the mean of the others'
    log-weights (Kool, van Hoof & Welling 2019); a single sample has none.
    """
    _check(log_joint, log_posterior, least=1)
    return -_expectation(log_joint - log_posterior, log_posterior)


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


def wake_theta(log_joint: Float[Tensor, "sample roi"], log_posterior: Float[Tensor, "sample roi"]) -> Float[Tensor, ""]:
    """Wake update of the generative model (Bornschein & Bengio 2015, eq. 5): Σ_k w̃_k ∇ log p(F, s_k | θ).

    With w̃_k = w_k / Σ_j w_j this is the gradient of the importance-weighted bound for θ, without bias; q gets none. The
    value is minus that bound.
    """
    _check(log_joint, log_posterior, least=1)
    log_weight = log_joint - log_posterior
    return _loss(_log_mean(log_weight), (_normalised(log_weight) * log_joint).sum(0))


def wake_phi(log_joint: Float[Tensor, "sample roi"], log_posterior: Float[Tensor, "sample roi"]) -> Float[Tensor, ""]:
    """Wake update of the recognition network (Bornschein & Bengio 2015, eq. 9): Σ_k w̃_k ∇ log q(s_k | F).

    Estimates −∇KL(p(s | F) ‖ q) = E_p[∇ log q], so that q covers the posterior rather than picks one of its modes.
    Normalising the weights biases it, for K samples by −E_q[(w/p(F))² (∇ log q − E_p[∇ log q])]/K + O(1/K²). The
    value is minus the importance-weighted bound.
    """
    _check(log_joint, log_posterior, least=2)
    log_weight = log_joint - log_posterior
    return _loss(_log_mean(log_weight), (_normalised(log_weight) * log_posterior).sum(0))


def wake_sleep(log_joint: Float[Tensor, "sample roi"], log_posterior: Float[Tensor, "sample roi"]) -> Float[Tensor, ""]:
    """Both wake updates of reweighted wake-sleep (Bornschein & Bengio 2015): `wake_theta` for θ, `wake_phi` for q.

    The sleep update is `supervised` on spike trains and fluorescence drawn from the generative model.
    """
    _check(log_joint, log_posterior, least=2)
    log_weight = log_joint - log_posterior
    signal = _normalised(log_weight) * (log_joint + log_posterior)
    return _loss(_log_mean(log_weight), signal.sum(0))


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


def semi_supervised(
    unlabelled: Float[Tensor, ""],
    log_joint: Float[Tensor, " labelled"],
    log_posterior: Float[Tensor, " labelled"],
    share: float,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Bound on cells without, log-probability of the truth on cells with known spikes (Kingma et al. 2014, eq. 9).

    (1 − share) · unlabelled − share · mean(log p(F, s | θ) + weight · log q(s | F)), s the true spikes: where all that
    is latent is known, the bound on log p(F, s) is that joint itself, and q would learn nothing without the other term.

    Parameters
    ----------
    unlabelled
        Loss on the other cells, such as `vimco`.
    log_joint, log_posterior
        (labelled,) log p(F, s | θ) and log q(s | F) of the true counts.
    share
        Share of the cells that are labelled, 0 to 1.
    weight
        What the truth counts to q, in units of the bound (nats).
    """
    if not (0 <= share <= 1 and weight >= 0):
        raise ValueError(
            f"semi_supervised: expected a share from 0 to 1 and a weight of 0 or more, got {share} and {weight}."
        )
    known = (log_joint + weight * log_posterior).sum() / max(len(log_joint), 1)
    return (1 - share) * unlabelled - share * known


def window_counts(
    counts: Num[Tensor, "*sample time"], lengths: Sequence[int] = (1, 8, 64)
) -> Float[Tensor, "*sample feature"]:
    """Statistic that `mmd` compares: square roots of the spike counts in successive windows of some lengths (frames).

    Single frames carry rate and multiple spikes, longer windows bursts and pauses. The square root makes the spread of
    a Poisson count the same everywhere. Windows that do not fit are left out.
    """
    n_frames = counts.shape[-1]
    cut = [counts[..., : n_frames // n * n].unflatten(-1, (-1, n)) for n in lengths if n <= n_frames]
    return torch.cat([windows.sum(-1) for windows in cut], -1).to(torch.get_default_dtype()).sqrt()


def mmd(
    log_posterior: Float[Tensor, "sample roi"],
    statistic: Float[Tensor, "sample roi feature"],
    prior_statistic: Float[Tensor, "draw feature"],
    bandwidth: float = 0.5,
) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy of q's trains, pooled over ROIs, from the prior's (Gretton et al. 2012, eq. 3).

    InfoVAE matches the pooled posterior E_F[q(s | F)] to the prior: one cell may differ from it, all together may not.
    Whole trains have too many dimensions for a kernel to tell them apart; the kernel is therefore the mean over
    features of exp(−(x − y)²/(2 bandwidth²)), and the discrepancy zero exactly where every feature has the same
    marginal distribution under both. Correlations between frames count where a window of `window_counts` spans them.

    The value is an unbiased estimate, which may be below zero. So is its gradient, by score function: each train's
    signal is the witness function at it, less a baseline from the same ROI's other trains.

    Parameters
    ----------
    log_posterior
        (sample, roi) log q of the trains; two samples or more.
    statistic, prior_statistic
        `window_counts` of these trains, and of two or more independent ones from the prior.
    bandwidth
        Of the kernel, in units of the statistic.
    """
    n, m = len(log_posterior), len(prior_statistic)
    if n < 2 or m < 2:
        raise ValueError(
            f"mmd: expected two samples or more of both posterior and prior, got {n} and {m}. Draw more of them."
        )
    n_rois = log_posterior.shape[1]
    x, y = statistic.detach().flatten(0, 1), prior_statistic.detach()
    pairs = _kernel(x, x, bandwidth).unflatten(1, (n, n_rois)).unflatten(0, (n, n_rois))
    # A train is compared with those of other sample numbers, of its own ROI and of all others.
    to_others = pairs.sum((2, 3)) - pairs.diagonal(dim1=0, dim2=2).sum(1).mT
    to_prior = _kernel(x, y, bandwidth).mean(-1).unflatten(0, (n, n_rois))
    among_prior = _kernel(y, y, bandwidth)
    among_prior = (among_prior.sum() - among_prior.diagonal().sum()) / (m * (m - 1))
    n_others = (n - 1) * n_rois
    witness = to_others / n_others - to_prior
    # The mean witness of the same ROI's other trains, as it would be without this one.
    same_roi = pairs.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # sample roi sample
    apart = (to_others.mT - same_roi) / max(n_others - 1, 1) - to_prior.mT  # [i, roi, j]: witness of j without i
    baseline = (apart.sum(-1) - apart.diagonal(dim1=0, dim2=2).mT) / (n - 1)
    value = (to_others / n_others - 2 * to_prior).mean() + among_prior
    surrogate = (2 * (witness - baseline) * log_posterior).mean()
    return surrogate + (value - surrogate).detach()


def info_vae(
    log_likelihood: Float[Tensor, "sample roi"],
    log_prior: Float[Tensor, "sample roi"],
    log_posterior: Float[Tensor, "sample roi"],
    discrepancy: Float[Tensor, ""],
    alpha: float = 0.0,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """InfoVAE criterion (Zhao, Song & Ermon 2019, eq. 6), with the score-function gradient of `elbo`.

    −E_q[log p(F | s, θ) − (1 − α)(log q(s | F) − log p(s))] + weight · discrepancy; weight is the paper's α + λ − 1.

    Parameters
    ----------
    log_likelihood, log_prior, log_posterior
        (sample, roi) log p(F | s, θ), log p(s) and log q(s | F).
    discrepancy
        `mmd` of the same trains.
    alpha
        0 is the evidence lower bound plus the discrepancy, 1 the MMD-VAE, which asks no single posterior to be like the
        prior.
    weight
        In units of the bound (nats per ROI).
    """
    _check(log_likelihood, log_posterior, least=1)
    gain = log_likelihood + (1 - alpha) * (log_prior - log_posterior)
    return weight * discrepancy - _expectation(gain, log_posterior)


def _kernel(x: Float[Tensor, "x feature"], y: Float[Tensor, "y feature"], bandwidth: float) -> Float[Tensor, "x y"]:
    """Mean over features of a Gaussian kernel, a feature at a time: all at once would take their number in memory."""
    total = x.new_zeros(len(x), len(y))
    for a, b in zip(x.T, y.T, strict=True):
        total = total + torch.exp(-0.5 * ((a[:, None] - b) / bandwidth) ** 2)
    return total / x.shape[1]


def _expectation(value: Tensor, log_posterior: Tensor) -> Tensor:
    """Mean of ``value`` over samples from q and over ROIs, with the score-function gradient and a baseline each.

    A sample's baseline is the mean of the others' values (Kool, van Hoof & Welling 2019); a single sample has none.
    """
    n = len(value)
    signal = value.detach()
    if n > 1:
        signal = signal - (signal.sum(0) - signal) / (n - 1)
    return -_loss(value.mean(0), value.mean(0) + (signal * log_posterior).mean(0))


def _normalised(log_weight: Tensor) -> Tensor:
    """Weights that sum to one over the samples, without gradient."""
    return torch.softmax(log_weight.detach(), 0)


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
