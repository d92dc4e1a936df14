"""Every kind of noise against the multivariate normal distribution that it is, missing frames and all."""

from __future__ import annotations

import math

import pytest
import torch

from napari_calvae.generative import NOISES, LinearAR, Noise

FRAME_RATE = 20.0


@pytest.fixture(params=sorted(NOISES))
def noise(request) -> Noise:
    return NOISES[request.param]()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_theta(noise: Noise, *shape: int, **changes: float) -> dict[str, torch.Tensor]:
    values = {"baseline": 0.1, "noise_density": 0.03} | {p.name: p.median for p in noise.parameters} | changes
    return {name: torch.full(shape, value, dtype=torch.float64) for name, value in values.items()}


def covariance(noise: Noise, expected: torch.Tensor, theta: dict[str, torch.Tensor], rate: float) -> torch.Tensor:
    """Frame by frame from the definitions in words."""
    n, white = len(expected), float(theta["noise_density"]) ** 2 * rate
    frames = torch.arange(n, dtype=torch.float64)
    if noise.name == "correlated":
        tau = float(theta["tau_noise"])
        return white * math.tanh(1 / rate / 2 / tau) * torch.exp(-(frames - frames[:, None]).abs() / rate / tau)
    growth = float(theta["shot"]) * (expected - 0.1).clamp_min(0) if noise.name == "signal_dependent" else 0 * expected
    return torch.diag(white * (1 + growth))


def test_log_prob_is_that_of_the_multivariate_normal_of_what_was_measured(noise):
    theta, expected = some_theta(noise), torch.rand(9, dtype=torch.float64, generator=generator())
    residual = 0.1 * torch.randn(9, dtype=torch.float64, generator=generator(1))
    matrix = covariance(noise, expected, theta, FRAME_RATE)
    for missing in ([], [0], [8], [3, 4, 5], [0, 1, 4, 7, 8]):
        measured = torch.ones(9, dtype=torch.bool)
        measured[missing] = False
        there = matrix[measured][:, measured]
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(there), dtype=torch.float64), there)
        found = noise.log_prob(residual * measured, expected, theta, FRAME_RATE, measured)
        assert float(found) == pytest.approx(float(normal.log_prob(residual[measured])), abs=1e-9), missing
    nothing = noise.log_prob(0 * residual, expected, theta, FRAME_RATE, torch.zeros(9, dtype=torch.bool))
    assert float(nothing) == 0


def test_samples_have_the_covariance_that_log_prob_says(noise):
    n, theta = 20_000, some_theta(noise)
    expected = torch.linspace(0, 2, 4, dtype=torch.float64)
    drawn = noise.sample(expected.expand(n, 4), theta, FRAME_RATE, generator())
    matrix = covariance(noise, expected, theta, FRAME_RATE)
    # The variance of a sample covariance of normal variables is (C_ii C_jj + C_ij²)/n.
    error = 5 * torch.sqrt((torch.outer(matrix.diag(), matrix.diag()) + matrix**2) / n)
    assert ((drawn.mT @ drawn / n - matrix).abs() < error).all()


def test_a_model_with_this_noise_keeps_its_promises(noise):
    model, rate = LinearAR(noise), 25.0
    assert [p.name for p in model.parameters[:5]] == [p.name for p in LinearAR.parameters]
    assert model.parameters[5:] == noise.parameters
    theta = {k: v.double() for k, v in model.sample_prior(3, generator()).items()}
    back = model.constrain(model.unconstrain(theta))
    assert all(torch.allclose(v, back[k]) for k, v in theta.items())
    counts = torch.poisson(torch.full((2, 3, 40), 0.1, dtype=torch.float64), generator=generator())
    observed = model.simulate(counts, theta, rate, generator(1))
    valid = torch.rand(2, 3, 40, generator=generator(2)) > 0.3
    together = model.log_prob(observed, counts, theta, rate, valid)
    for j in range(3):
        one = {k: v[j] for k, v in theta.items()}
        assert torch.allclose(together[:, j], model.log_prob(observed[:, j], counts[:, j], one, rate, valid[:, j]))
    u = model.unconstrain(theta).requires_grad_()
    torch.autograd.gradcheck(lambda x: model.log_prob(observed, counts, model.constrain(x), rate, valid), (u,))


def test_a_fit_recovers_the_noise(noise):
    model = LinearAR(noise)
    changes = {p.name: p.median * 2 for p in noise.parameters}
    values = {p.name: p.median for p in model.parameters} | {"amplitude": 0.5} | changes
    theta = {name: torch.full((2,), value) for name, value in values.items()}
    counts = torch.poisson(torch.full((2, 6000), 1 / 30), generator=generator())
    observed = model.simulate(counts, theta, 30.0, generator(1))
    fit = model.fit_theta(observed, counts, 30.0, n_steps=80)
    for name, tolerance in (("noise_density", 0.15), *((p.name, 0.3) for p in noise.parameters)):
        assert ((fit[name] / theta[name]).log().abs() < tolerance).all(), (name, fit[name], theta[name])


def test_correlated_noise_is_the_same_process_at_any_frame_rate():
    noise = NOISES["correlated"]()
    theta = some_theta(noise, tau_noise=0.2)
    for rate in (5.0, 50.0):
        n = round(100 * rate)
        drawn = noise.sample(torch.zeros(200, n, dtype=torch.float64), theta, rate, generator())
        # Means over 100 s: variance noise_density²/100 s, with 200 draws known to 5 √(2/200).
        assert float(drawn.mean(-1).var()) == pytest.approx(0.03**2 / 100, rel=0.5)
    fast = some_theta(noise, tau_noise=1e-6)
    assert float(noise.std(fast, 30.0)) == pytest.approx(0.03 * math.sqrt(30), rel=1e-6)
