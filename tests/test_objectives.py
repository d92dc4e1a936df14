"""Objectives against exact enumeration: trains are so short that every tuple of samples can be written down."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from napari_calvae.generative import LinearAR, SpikePrior
from napari_calvae.objectives import elbo, iwae, supervised, vimco

N_FRAMES, FRAME_RATE = 3, 20.0
OBSERVED = torch.tensor([0.05, 0.22, 0.13], dtype=torch.float64)


def all_trains(max_count: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(max_count + 1), repeat=N_FRAMES)), dtype=torch.float64)


class Toy:
    """A correlated q over all trains with parameters φ, and a real generative model with parameters θ."""

    def __init__(self, max_count: int) -> None:
        self.trains = all_trains(max_count)
        generator = torch.Generator().manual_seed(max_count)
        self.phi = torch.randn(N_FRAMES + 1, max_count + 1, generator=generator, dtype=torch.float64)
        self.model = LinearAR()
        self.prior = SpikePrior(2.0, max_count)
        start = {"tau_rise": 0.03, "tau_decay": 0.3, "amplitude": 0.2, "baseline": 0.01, "noise_density": 0.02}
        self.theta = self.model.unconstrain({k: torch.tensor(v, dtype=torch.float64) for k, v in start.items()})

    def log_q(self, phi: torch.Tensor) -> torch.Tensor:
        """(train,): frame-wise logits, and a coupling of neighbouring counts."""
        k = self.trains.long()
        score = phi[torch.arange(N_FRAMES), k].sum(-1) + (phi[-1][k[:, 1:]] * self.trains[:, :-1]).sum(-1)
        return score - torch.logsumexp(score, 0)

    def log_p(self, u: torch.Tensor) -> torch.Tensor:
        """(train,) log joint."""
        theta = self.model.constrain(u)
        prior = self.prior.log_prob(self.trains, FRAME_RATE)
        return self.model.log_prob(OBSERVED, self.trains, theta, FRAME_RATE) + prior


def tuples(n_trains: int, n_samples: int) -> torch.Tensor:
    """(tuple, sample) indices of trains."""
    return torch.tensor(list(itertools.product(range(n_trains), repeat=n_samples)))


def exact_bound(toy: Toy, phi: torch.Tensor, u: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """E_q[log mean of the weights], every tuple of samples enumerated, with nothing of the package's objectives."""
    log_q, log_p = toy.log_q(phi), toy.log_p(u)
    log_w = (log_p - log_q)[index]
    return (log_q[index].sum(1).exp() * (torch.logsumexp(log_w, 1) - math.log(index.shape[1]))).sum()


def finite_differences(function, x: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[i] = step
        shift = shift.view_as(x)
        gradient.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


def expected_gradient(objective, toy: Toy, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expectation over all tuples of the loss and of its autograd gradient for φ and θ."""
    phi, u = toy.phi.clone().requires_grad_(), toy.theta.clone().requires_grad_()
    log_q, log_p = toy.log_q(phi), toy.log_p(u)
    probability = log_q.detach()[index].sum(1).exp()
    # One column per tuple, as if it were a ROI; scaling the columns turns the mean over ROIs into the expectation.
    losses = torch.stack([objective(log_p[i, None], log_q[i, None]) for i in index])
    expected = (probability * losses).sum()
    return expected.detach(), *torch.autograd.grad(expected, (phi, u))


CASES = [(1, 2), (1, 3), (2, 2)]


@pytest.mark.parametrize(("max_count", "n_samples"), CASES)
def test_vimco_gradient_is_that_of_the_enumerated_bound(max_count, n_samples):
    toy = Toy(max_count)
    index = tuples(len(toy.trains), n_samples)
    loss, grad_phi, grad_theta = expected_gradient(vimco, toy, index)
    with torch.no_grad():
        assert abs(loss + exact_bound(toy, toy.phi, toy.theta, index)) < 1e-10
        by_phi = finite_differences(lambda x: -exact_bound(toy, x, toy.theta, index), toy.phi)
        by_theta = finite_differences(lambda x: -exact_bound(toy, toy.phi, x, index), toy.theta)
    assert by_phi.abs().max() > 1e-2
    # Central differences of step h are off by h² times the third derivative, which grows with the residuals in θ.
    assert (grad_phi - by_phi).abs().max() < 1e-6
    assert (grad_theta - by_theta).abs().max() < 1e-6 * (1 + by_theta.abs().max())


@pytest.mark.parametrize("n_samples", [1, 2])
def test_elbo_gradient_is_that_of_the_enumerated_bound(n_samples):
    toy = Toy(2)
    index = tuples(len(toy.trains), n_samples)
    loss, grad_phi, grad_theta = expected_gradient(elbo, toy, index)
    single = tuples(len(toy.trains), 1)
    with torch.no_grad():
        assert abs(loss + exact_bound(toy, toy.phi, toy.theta, single)) < 1e-10
        by_phi = finite_differences(lambda x: -exact_bound(toy, x, toy.theta, single), toy.phi)
        by_theta = finite_differences(lambda x: -exact_bound(toy, toy.phi, x, single), toy.theta)
    assert (grad_phi - by_phi).abs().max() < 1e-6
    assert (grad_theta - by_theta).abs().max() < 1e-6 * (1 + by_theta.abs().max())


def test_vimco_baseline_is_the_geometric_mean_of_the_others():
    """Any baseline that leaves the sample out passes enumeration; this one is the paper's, written as a loop."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = torch.randn(2, 4, 1, generator=generator, dtype=torch.float64).unbind()
    log_q.requires_grad_()
    (gradient,) = torch.autograd.grad(-vimco(log_p, log_q), log_q)
    w = [math.exp(float(x)) for x in (log_p - log_q).detach()[:, 0]]
    for k in range(4):
        others = [w[j] for j in range(4) if j != k]
        without = math.log((sum(others) + math.prod(others) ** (1 / 3)) / 4)
        expected = math.log(sum(w) / 4) - without - w[k] / sum(w)
        assert float(gradient[k, 0]) == pytest.approx(expected, abs=1e-12)


def test_elbo_baseline_is_the_mean_of_the_others():
    log_p, log_q = torch.tensor([[1.0], [2.0], [6.0]]), torch.zeros(3, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(-elbo(log_p, log_q), log_q)
    # Learning signals −3, −1.5 and 4.5, less the one of the pathwise term, over three samples.
    assert torch.allclose(gradient[:, 0], torch.tensor([-4.0, -2.5, 3.5]) / 3)


def test_iwae_tightens_with_samples_up_to_the_evidence():
    toy = Toy(1)
    evidence = float(torch.logsumexp(toy.log_p(toy.theta), 0))
    bounds = []
    for n in (1, 2, 3, 4):
        index = tuples(len(toy.trains), n)
        log_q, log_p = toy.log_q(toy.phi), toy.log_p(toy.theta)
        per_tuple = torch.stack([iwae(log_p[i, None], log_q[i, None]) for i in index])
        bounds.append(-float((log_q[index].sum(1).exp() * per_tuple).sum()))
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert bounds[-1] < evidence


def test_iwae_at_the_true_posterior_is_the_evidence_and_leaves_vimco_no_signal():
    toy = Toy(2)
    log_p = toy.log_p(toy.theta)
    log_q = (log_p - torch.logsumexp(log_p, 0)).detach().requires_grad_()
    i = torch.tensor([0, 5, 9])
    assert torch.allclose(iwae(log_p[i, None], log_q[i, None]), -torch.logsumexp(log_p, 0))
    (signal,) = torch.autograd.grad(vimco(log_p[i, None], log_q[i, None]) - log_q[i].mean(), log_q)
    # All weights alike: what is left is the pathwise term, one K-th of ∇ log q each, which cancels here.
    assert signal.abs().max() < 1e-12


def test_losses_average_over_rois_and_agree_on_the_value():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).unbind()
    for objective in (elbo, iwae, vimco):
        whole = objective(log_p, log_q)
        apart = torch.stack([objective(log_p[:, i : i + 1], log_q[:, i : i + 1]) for i in range(3)])
        assert torch.allclose(whole, apart.mean())
    assert torch.allclose(vimco(log_p, log_q), iwae(log_p, log_q))


def test_supervised_leaves_out_rois_without_frames():
    log_q = torch.tensor([-4.0, -9.0, 0.0])
    assert supervised(log_q) == pytest.approx(13 / 3)
    assert supervised(log_q, torch.tensor([2.0, 3.0, 0.0])) == pytest.approx((2 + 3) / 2)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="at least 2 sample"):
        vimco(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises((ValueError, TypeError)):  # TypeError where jaxtyping checks shapes first
        elbo(torch.zeros(2, 2), torch.zeros(2, 3))
