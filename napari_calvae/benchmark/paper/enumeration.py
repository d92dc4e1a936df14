"""Exact answers for trains so short that all of them, and all tuples of them that may be drawn, can be written down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from napari_calvae import objectives
from napari_calvae.generative import LinearAR, SpikePrior

#: From log-joint and log-posterior (sample, roi) to a loss.
Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """A number that has to be small.

    Parameters
    ----------
    what, of
        Which property, of which part.
    trains
        How many trains, or tuples of trains, were enumerated; 0 where there is nothing to enumerate.
    error, tolerance
        The largest deviation from the exact answer, and what rounding, the step of finite differences or the number of
        samples allows.
    unit
        Of both.
    """

    what: str
    of: str
    trains: int
    error: float
    tolerance: float
    unit: str = "absolute"


def all_trains(n_frames: int, max_count: int) -> Float[Tensor, "train time"]:
    """Every spike train there is, in double precision."""
    return torch.tensor(list(itertools.product(range(max_count + 1), repeat=n_frames)), dtype=torch.float64)


def tuples(n_trains: int, n_samples: int) -> Int[Tensor, "tuple sample"]:
    """Every way to draw samples in order, as indices of trains."""
    return torch.tensor(list(itertools.product(range(n_trains), repeat=n_samples)))


def compositions(n_samples: int, n_trains: int) -> Int[Tensor, "composition train"]:
    """How often each train is drawn, all ways there are: far fewer than `tuples`, where the order does not matter."""
    bars = torch.tensor(list(itertools.combinations(range(n_samples + n_trains - 1), n_trains - 1)))
    left = torch.nn.functional.pad(bars, (1, 0), value=-1)
    edges = torch.nn.functional.pad(left, (0, 1), value=n_samples + n_trains - 1)
    return edges.diff() - 1


def finite_differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of a scalar function by central differences."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[i] = step
        shift = shift.view_as(x)
        gradient.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


class ShortProblem:
    """A trace of three frames, a posterior q with parameters φ that couples neighbouring counts, and `LinearAR` with θ.

    Parameters
    ----------
    max_count
        Highest count per frame.
    """

    n_frames = 3
    frame_rate = 20.0
    observed = torch.tensor([0.05, 0.22, 0.13], dtype=torch.float64)

    def __init__(self, max_count: int) -> None:
        self.trains = all_trains(self.n_frames, max_count)
        generator = torch.Generator().manual_seed(max_count)
        self.phi = torch.randn(self.n_frames + 1, max_count + 1, generator=generator, dtype=torch.float64)
        self.model = LinearAR()
        self.prior = SpikePrior(2.0, max_count)
        start = {"tau_rise": 0.03, "tau_decay": 0.3, "amplitude": 0.2, "baseline": 0.01, "noise_density": 0.02}
        self.theta = self.model.unconstrain({k: torch.tensor(v, dtype=torch.float64) for k, v in start.items()})

    def log_q(self, phi: Tensor) -> Float[Tensor, " train"]:
        """Frame-wise logits, and a coupling of neighbouring counts."""
        k = self.trains.long()
        score = phi[torch.arange(self.n_frames), k].sum(-1) + (phi[-1][k[:, 1:]] * self.trains[:, :-1]).sum(-1)
        return score - torch.logsumexp(score, 0)

    def log_p(self, u: Tensor) -> Float[Tensor, " train"]:
        """Log joint of trains and fluorescence at unconstrained θ."""
        theta = self.model.constrain(u)
        prior = self.prior.log_prob(self.trains, self.frame_rate)
        return self.model.log_prob(self.observed, self.trains, theta, self.frame_rate) + prior


def exact_bound(problem: ShortProblem, phi: Tensor, u: Tensor, index: Int[Tensor, "tuple sample"]) -> Float[Tensor, ""]:
    """E_q[log mean of the weights], every tuple of samples enumerated, with nothing of the package's objectives."""
    log_q, log_p = problem.log_q(phi), problem.log_p(u)
    log_w = (log_p - log_q)[index]
    return (log_q[index].sum(1).exp() * (torch.logsumexp(log_w, 1) - math.log(index.shape[1]))).sum()


def divergence(problem: ShortProblem, phi: Tensor) -> Float[Tensor, ""]:
    """KL(p(s | F) ‖ q)."""
    log_p = problem.log_p(problem.theta)
    log_p = log_p - torch.logsumexp(log_p, 0)
    return (log_p.exp() * (log_p - problem.log_q(phi))).sum()


def expected_gradient(
    objective: Objective, problem: ShortProblem, index: Int[Tensor, "tuple sample"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Expectation over all tuples of the loss and of its autograd gradient for φ and θ; no gradient is zero."""
    phi, u = problem.phi.clone().requires_grad_(), problem.theta.clone().requires_grad_()
    log_q, log_p = problem.log_q(phi), problem.log_p(u)
    probability = log_q.detach()[index].sum(1).exp()
    # One column per tuple, as if it were a ROI.
    losses = torch.stack([objective(log_p[i, None], log_q[i, None]) for i in index])
    expected = (probability * losses).sum()
    by_phi, by_theta = torch.autograd.grad(expected, (phi, u), allow_unused=True, materialize_grads=True)
    return expected.detach(), by_phi, by_theta


def expected_wake_phi(problem: ShortProblem, n_samples: int) -> Tensor:
    """Expectation of the gradient of `objectives.wake_phi` for φ over all sets of samples."""
    times = compositions(n_samples, len(problem.trains)).double()
    phi = problem.phi.clone().requires_grad_()
    log_q, log_p = problem.log_q(phi), problem.log_p(problem.theta)
    coefficient = math.lgamma(n_samples + 1) - torch.lgamma(times + 1).sum(1)
    probability = (coefficient + times @ log_q.detach()).exp()
    trains = torch.arange(len(problem.trains)).repeat(len(times))
    rows = torch.repeat_interleave(trains, times.flatten().long()).reshape(-1, n_samples).T  # (sample, composition)
    leaf = log_q.detach()[rows].requires_grad_()
    (signal,) = torch.autograd.grad(objectives.wake_phi(log_p[rows], leaf) * rows.shape[1], leaf)
    per_train = torch.zeros(len(problem.trains), dtype=torch.float64)
    per_train = per_train.index_add(0, rows.flatten(), (signal * probability).flatten())
    return torch.autograd.grad(log_q, phi, per_train)[0]


def leading_bias_of_wake_phi(problem: ShortProblem) -> Tensor:
    """E_q[(w/p(F))² (∇ log q − E_p[∇ log q])], which a K-th part of is what `expected_wake_phi` is off by."""
    posterior = torch.softmax(problem.log_p(problem.theta), 0)
    phi = problem.phi.clone().requires_grad_()
    log_q = problem.log_q(phi)
    ratio = (posterior / log_q.detach().exp()) ** 2 * log_q.detach().exp()
    return torch.autograd.grad((ratio * log_q).sum() - ratio.sum() * (posterior * log_q).sum(), phi)[0]


def exact_mmd(
    statistic: Float[Tensor, "train feature"], q: Float[Tensor, " train"], draws: Int[Tensor, " draw"], bandwidth: float
) -> Float[Tensor, ""]:
    """Squared discrepancy between a posterior and draws from the prior (indices), pairs of the same draw left out."""
    k = torch.exp(-0.5 * ((statistic[:, None] - statistic) / bandwidth) ** 2).mean(-1)
    n = len(draws)
    among = (k[draws][:, draws].sum() - k[draws, draws].sum()) / (n * (n - 1))
    return q @ k @ q - 2 * (k[:, draws].mean(1) * q).sum() + among
