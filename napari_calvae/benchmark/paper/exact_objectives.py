"""Objectives against enumeration: the expectation over all tuples of samples that q may draw."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from napari_calvae import objectives
from napari_calvae.benchmark.paper.base import Setting
from napari_calvae.benchmark.paper.enumeration import (
    Check,
    Objective,
    ShortProblem,
    divergence,
    exact_bound,
    exact_mmd,
    expected_gradient,
    expected_wake_phi,
    finite_differences,
    leading_bias_of_wake_phi,
    tuples,
)

#: Objectives whose expected value, and gradient for θ, are those of a bound; and whether that for φ is, too.
_BOUNDS: dict[str, tuple[Objective, bool]] = {
    "vimco": (objectives.vimco, True),
    "iwae": (objectives.iwae, False),
    "wake_theta": (objectives.wake_theta, False),
    "wake_sleep": (objectives.wake_sleep, False),
    "elbo": (objectives.elbo, True),
}


def check_objectives(setting: Setting) -> Iterator[Check]:
    """Expected value and gradient of every objective, over all tuples of samples, against the enumerated bound."""
    cases = [(1, 2)] if setting.quick else [(1, 2), (1, 3), (2, 2)]
    for max_count, n_samples in cases:
        problem = ShortProblem(max_count)
        index = tuples(len(problem.trains), n_samples)
        single = tuples(len(problem.trains), 1)
        for name, (objective, trains_q) in _BOUNDS.items():
            # The bound that `elbo` estimates is the same with any number of samples.
            bounded = single if name == "elbo" else index
            value, by_phi, by_theta = expected_gradient(objective, problem, index)
            bound = functools.partial(_minus_bound, problem, bounded)
            of = f"{name}, {n_samples} samples, counts to {max_count}"
            with torch.no_grad():
                error = abs(float(value) - float(bound(problem.phi, problem.theta)))
                yield Check("expected value", of, len(index), error, 1e-9)
                if trains_q:
                    exact = finite_differences(functools.partial(_of_phi, bound, problem), problem.phi)
                    yield _gradient("φ", of, len(index), by_phi, exact)
                exact = finite_differences(functools.partial(bound, problem.phi), problem.theta)
                yield _gradient("θ", of, len(index), by_theta, exact)
    yield from _check_info_vae(n_samples=2 if setting.quick else 3)
    yield _check_wake_phi()


def _check_wake_phi(few: int = 8, many: int = 12) -> Check:
    """The gradient tends to that of the divergence, with the bias that is stated."""
    problem = ShortProblem(1)
    exact = finite_differences(functools.partial(divergence, problem), problem.phi)
    bias = {k: expected_wake_phi(problem, k) - exact for k in (few, many)}
    # Two numbers of samples eliminate the term in 1/K² and leave one in 1/K³.
    extrapolated = (many**2 * bias[many] - few**2 * bias[few]) / (many - few)
    leading = leading_bias_of_wake_phi(problem)
    error = float((extrapolated - leading).abs().max() / leading.abs().max())
    of = f"wake_phi, {few} and {many} samples, counts to 1"
    return Check("K × bias of the gradient for φ", of, math.comb(many + 7, 7), error, 0.2, "relative")


def _check_info_vae(n_samples: int, alpha: float = 0.4, weight: float = 3.0, bandwidth: float = 0.6) -> Iterator[Check]:
    """Criterion and gradient for φ, with the discrepancy of the same trains from draws of the prior."""
    problem = ShortProblem(1)
    index = tuples(len(problem.trains), n_samples)
    statistic = objectives.window_counts(problem.trains, (1, 2)).double()
    draws = torch.tensor([6, 1, 3])
    prior = problem.prior.log_prob(problem.trains, problem.frame_rate)
    log_likelihood = problem.log_p(problem.theta) - prior

    def criterion(phi: Tensor) -> Tensor:
        log_q = problem.log_q(phi)
        gain = log_likelihood + (1 - alpha) * (prior - log_q)
        return weight * exact_mmd(statistic, log_q.exp(), draws, bandwidth) - (log_q.exp() * gain).sum()

    phi = problem.phi.clone().requires_grad_()
    log_q = problem.log_q(phi)
    losses = []
    for i in index:
        apart = objectives.mmd(log_q[i, None], statistic[i, None], statistic[draws], bandwidth)
        parts = (log_likelihood[i, None], prior[i, None], log_q[i, None])
        losses.append(objectives.info_vae(*parts, apart, alpha=alpha, weight=weight))
    expected = (log_q.detach()[index].sum(1).exp() * torch.stack(losses)).sum()
    (gradient,) = torch.autograd.grad(expected, phi)
    of = f"info_vae with mmd, {n_samples} samples, counts to 1"
    with torch.no_grad():
        error = abs(float(expected) - float(criterion(problem.phi)))
        yield Check("expected value", of, len(index), error, 1e-9)
        yield _gradient("φ", of, len(index), gradient, finite_differences(criterion, problem.phi))


def _minus_bound(problem: ShortProblem, index: Tensor, phi: Tensor, u: Tensor) -> Tensor:
    return -exact_bound(problem, phi, u, index)


def _of_phi(bound: Callable[[Tensor, Tensor], Tensor], problem: ShortProblem, phi: Tensor) -> Tensor:
    return bound(phi, problem.theta)


def _gradient(symbol: str, of: str, n: int, found: Tensor, exact: Tensor) -> Check:
    """Central differences of step h are off by h² times the third derivative, which grows with the gradient."""
    error = (found - exact).abs().max() / (1 + exact.abs().max())
    return Check(f"gradient for {symbol}", of, n, float(error), 1e-6, "relative")
