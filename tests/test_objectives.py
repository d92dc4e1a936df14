"""Objectives against exact enumeration: trains are so short that every tuple of samples can be written down."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from napari_calvae.benchmark.paper.enumeration import ShortProblem as Toy
from napari_calvae.benchmark.paper.enumeration import (
    divergence,
    exact_bound,
    exact_mmd,
    expected_gradient,
    expected_wake_phi,
    finite_differences,
    leading_bias_of_wake_phi,
    tuples,
)
from napari_calvae.objectives import (
    elbo,
    info_vae,
    iwae,
    mmd,
    semi_supervised,
    supervised,
    vimco,
    wake_phi,
    wake_sleep,
    wake_theta,
    window_counts,
)

FRAME_RATE = Toy.frame_rate
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
    assert supervised(log_q[:1], torch.tensor([0.5])) == 4
    assert supervised(log_q[:1], torch.tensor([0.0])) == 0


@pytest.mark.parametrize(
    ("objective", "least"), [(elbo, 1), (iwae, 1), (vimco, 2), (wake_theta, 1), (wake_phi, 2), (wake_sleep, 2)]
)
def test_too_few_samples_are_refused(objective, least):
    assert torch.isfinite(objective(torch.zeros(least, 2), torch.zeros(least, 2)))
    with pytest.raises(
        ValueError, match=rf"at least {least} sample\(s\), got \({least - 1}, 2\) and \({least - 1}, 2\)"
    ):
        objective(torch.zeros(least - 1, 2), torch.zeros(least - 1, 2))
    with pytest.raises((ValueError, TypeError)):  # TypeError where jaxtyping checks shapes first
        objective(torch.zeros(least + 1, 2), torch.zeros(least, 2))


def test_info_vae_and_mmd_refuse_what_is_too_little():
    none, one, two = torch.zeros(0, 2), torch.zeros(1, 2), torch.zeros(2, 2)
    discrepancy = torch.tensor(1.0)
    assert info_vae(one, one, one, discrepancy) == 1  # with the default weight
    assert info_vae(one, 3 + one, one, discrepancy, alpha=1.0) == 1
    assert info_vae(one, 3 + one, one, discrepancy) == -2
    with pytest.raises(ValueError, match=r"at least 1 sample\(s\), got \(0, 2\)"):
        info_vae(none, none, none, discrepancy)
    statistic, prior = torch.zeros(2, 2, 3), torch.zeros(2, 3)
    assert mmd(two, statistic, prior) == 0
    with pytest.raises(ValueError, match="two samples or more of both posterior and prior, got 1 and 2"):
        mmd(one, statistic[:1], prior)
    with pytest.raises(ValueError, match="two samples or more of both posterior and prior, got 2 and 1"):
        mmd(two, statistic, prior[:1])


def test_mmd_of_known_distances_in_closed_form():
    statistic, prior = torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[0.0], [2.0]])
    near, far = math.exp(-0.5 / 0.5**2), math.exp(-0.5 * 4 / 0.5**2)
    expected = near - 2 * (1 + far + near + near) / 4 + far
    assert mmd(torch.zeros(2, 1), statistic, prior).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("max_count", "n_samples"), CASES)
def test_wake_theta_gradient_is_that_of_the_enumerated_bound_and_passes_q_by(max_count, n_samples):
    toy = Toy(max_count)
    index = tuples(len(toy.trains), n_samples)
    loss, grad_phi, grad_theta = expected_gradient(wake_theta, toy, index)
    with torch.no_grad():
        assert abs(loss + exact_bound(toy, toy.phi, toy.theta, index)) < 1e-10
        by_theta = finite_differences(lambda x: -exact_bound(toy, toy.phi, x, index), toy.theta)
    assert torch.equal(grad_phi, torch.zeros_like(grad_phi))
    assert (grad_theta - by_theta).abs().max() < 1e-6 * (1 + by_theta.abs().max())


def test_wake_phi_gradient_tends_to_that_of_the_enumerated_divergence_with_the_stated_bias():
    toy = Toy(1)
    exact = finite_differences(lambda phi: divergence(toy, phi), toy.phi)
    assert exact.abs().max() > 0.05
    leading = leading_bias_of_wake_phi(toy)
    bias = {k: expected_wake_phi(toy, k) - exact for k in (2, 4, 8, 12)}
    sizes = [float(b.abs().max()) for b in bias.values()]
    assert sizes == sorted(sizes, reverse=True)
    # Two sample sizes eliminate the term in 1/K² and leave one in 1/K³.
    extrapolated = (12**2 * bias[12] - 8**2 * bias[8]) / (12 - 8)
    assert leading.abs().max() > 0.05
    assert (extrapolated - leading).abs().max() < 0.2 * leading.abs().max()


def test_wake_sleep_is_both_wakes():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (x.requires_grad_() for x in torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).unbind())
    both = torch.autograd.grad(wake_sleep(log_p, log_q), (log_p, log_q))
    weights = torch.softmax(log_p - log_q, 0).detach() / 3
    assert torch.allclose(both[0], -weights)
    assert torch.allclose(both[1], -weights)
    assert torch.allclose(torch.autograd.grad(wake_theta(log_p, log_q), log_p)[0], both[0])
    assert torch.allclose(torch.autograd.grad(wake_phi(log_p, log_q), log_q)[0], both[1])
    for objective in (wake_theta, wake_phi, wake_sleep):
        assert torch.allclose(objective(log_p, log_q), iwae(log_p, log_q))


def two_cells() -> tuple[Toy, torch.Tensor, torch.Tensor]:
    """Two posteriors over the same trains, as functions of one φ: that of the toy, and that at −φ/2."""
    toy = Toy(1)
    return toy, window_counts(toy.trains, (1, 2)).double(), torch.tensor([6, 1, 3])


@pytest.mark.parametrize("n_samples", [2, 3])
def test_mmd_and_its_gradient_are_those_of_the_enumerated_pooled_posterior(n_samples):
    toy, statistic, draws = two_cells()
    n_rois = 2 if n_samples == 2 else 1
    index = tuples(len(toy.trains), n_samples * n_rois)

    def log_qs(phi):
        return torch.stack([toy.log_q(phi), toy.log_q(-phi / 2)][:n_rois], 1)  # train roi

    phi = toy.phi.clone().requires_grad_()
    log_q = log_qs(phi)
    rois = torch.arange(n_rois)
    probability, losses = [], []
    for i in index:
        trains = i.reshape(n_samples, n_rois)
        chosen = log_q[trains, rois]
        probability.append(chosen.detach().sum().exp())
        losses.append(mmd(chosen, statistic[trains], statistic[draws], 0.6))
    expected = (torch.stack(probability) * torch.stack(losses)).sum()
    (gradient,) = torch.autograd.grad(expected, phi)
    with torch.no_grad():
        value = exact_mmd(statistic, log_qs(toy.phi).exp().mean(1), draws, 0.6)
        exact = finite_differences(lambda x: exact_mmd(statistic, log_qs(x).exp().mean(1), draws, 0.6), toy.phi)
    assert abs(float(expected.detach()) - float(value)) < 1e-10
    assert exact.abs().max() > 1e-2
    assert (gradient - exact).abs().max() < 1e-6


def test_mmd_is_zero_for_equal_distributions_and_positive_for_others():
    generator = torch.Generator().manual_seed(0)

    def trains(rate, n):
        return window_counts(torch.poisson(torch.full((n, 64), rate), generator=generator), (1, 8, 64))

    def values(rate):
        log_q = torch.zeros(20, 1)
        return torch.stack([mmd(log_q, trains(rate, 20)[:, None], trains(0.2, 20)) for _ in range(40)])

    same, other = values(0.2), values(0.4)
    assert abs(float(same.mean())) < 3 * float(same.std()) / math.sqrt(40)
    assert float(other.mean()) > 5 * float(other.std()) / math.sqrt(40)


def test_mmd_sees_bursts_that_single_frames_hide():
    """The same share of spikes per frame, once spread at random and once in blocks: only longer windows tell."""
    generator = torch.Generator().manual_seed(0)
    spread = (torch.rand(200, 64, generator=generator) < 0.25).float()
    blocks = (torch.rand(200, 8, generator=generator) < 0.25).float().repeat_interleave(8, -1)
    values = {
        lengths: float(
            mmd(torch.zeros(200, 1), window_counts(blocks, lengths)[:, None], window_counts(spread, lengths))
        )
        for lengths in ((1,), (8,))
    }
    assert values[1,] < 0.01 < 0.1 < values[8,]


def test_window_counts_leave_out_what_does_not_fit():
    counts = torch.tensor([1.0, 0, 3, 1, 4])
    assert window_counts(counts, (1, 2, 8)).pow(2).round().tolist() == [1, 0, 3, 1, 4, 1, 4]
    assert window_counts(counts, (5, 6)).pow(2).round().tolist() == [9]
    long = torch.arange(64.0)
    whole = window_counts(long).pow(2)
    assert torch.allclose(whole, torch.cat([long, long.reshape(8, 8).sum(1), long.sum(0, keepdim=True)]))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_info_vae_gradient_is_that_of_the_enumerated_criterion(alpha):
    toy = Toy(2)
    prior = toy.prior.log_prob(toy.trains, FRAME_RATE)
    index = tuples(len(toy.trains), 2)

    def criterion(phi):
        log_q = toy.log_q(phi)
        return (
            -(log_q.exp() * (toy.log_p(toy.theta) - prior - (1 - alpha) * (log_q - prior))).sum() + 3 * phi[0, 0] ** 2
        )

    phi = toy.phi.clone().requires_grad_()
    log_q, log_likelihood = toy.log_q(phi), toy.log_p(toy.theta) - prior
    extra = phi[0, 0] ** 2  # stands for the discrepancy
    losses = [
        info_vae(log_likelihood[i, None], prior[i, None], log_q[i, None], extra, alpha=alpha, weight=3.0) for i in index
    ]
    expected = (log_q.detach()[index].sum(1).exp() * torch.stack(losses)).sum()
    (gradient,) = torch.autograd.grad(expected, phi)
    with torch.no_grad():
        exact = finite_differences(criterion, toy.phi)
        assert abs(float(expected.detach()) - float(criterion(toy.phi))) < 1e-9
    assert (gradient - exact).abs().max() < 1e-6 * (1 + exact.abs().max())


def test_semi_supervised_weighs_cells_with_and_without_truth():
    bound, log_p, log_q = torch.tensor(7.0), torch.tensor([-3.0, -5.0]), torch.tensor([-1.0, -2.0])
    assert semi_supervised(bound, log_p, log_q, share=0.25, weight=2.0) == pytest.approx(
        0.75 * 7 + 0.25 * (4 + 2 * 1.5)
    )
    assert semi_supervised(bound, log_p[:0], log_q[:0], share=0.0) == pytest.approx(7)
    toy = Toy(1)
    phi = toy.phi.clone().requires_grad_()
    loss = semi_supervised(bound, toy.log_p(toy.theta)[2:3], toy.log_q(phi)[2:3], share=1.0, weight=2.0)
    exact = finite_differences(lambda x: -2 * toy.log_q(x)[2], toy.phi)
    assert (torch.autograd.grad(loss, phi)[0] - exact).abs().max() < 1e-6
    assert semi_supervised(bound, log_p, log_q, share=1.0) == pytest.approx(4 + 1.5)
    assert semi_supervised(bound, log_p, log_q, share=1.0, weight=0.0) == pytest.approx(4)
    for share, weight in ((1.5, 1.0), (-0.5, 1.0), (0.5, -0.5)):
        with pytest.raises(ValueError, match="share from 0 to 1"):
            semi_supervised(bound, log_p, log_q, share, weight)
