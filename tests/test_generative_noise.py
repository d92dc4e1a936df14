"""Every kind of noise against the multivariate normal distribution that it is, missing frames and all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from napari_calvae.generative import NOISES, DriftingNoise, FlowNoise, GaussianNoise, LinearAR, Noise

FRAME_RATE = 20.0
#: Knots closer than usual, so that a few frames have several of them.
CASES = {name: {"spacing": 0.1} if name == "drift" else {} for name in NOISES} | {
    f"drift {around}": {"around": around, "spacing": 0.1} for around in ("signal_dependent", "correlated")
}


@pytest.fixture(params=sorted(CASES))
def noise(request) -> Noise:
    """An untrained flow is independent noise, so that it may take the same oath."""
    noise = NOISES[request.param.split()[0]](**CASES[request.param])
    noise.learned.double()
    return noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_theta(noise: Noise, *shape: int, **changes: float) -> dict[str, torch.Tensor]:
    values = {"baseline": 0.1, "noise_density": 0.03} | {p.name: p.median for p in noise.parameters}
    values |= {"tau_drift": 0.2} if "tau_drift" in values else {}
    return {name: torch.full(shape, value, dtype=torch.float64) for name, value in (values | changes).items()}


def covariance(noise: Noise, expected: torch.Tensor, theta: dict[str, torch.Tensor], rate: float) -> torch.Tensor:
    """Frame by frame from the definitions in words."""
    n, white = len(expected), float(theta["noise_density"]) ** 2 * rate
    frames = torch.arange(n, dtype=torch.float64)
    if isinstance(noise, DriftingNoise):
        knots = noise.spacing * np.arange(n)  # more of them than frames
        hats = np.stack([np.interp((frames + 0.5) / rate, knots, one) for one in np.eye(n)], 1)
        apart = np.abs(knots - knots[:, None])
        slow = float(theta["drift"]) ** 2 * hats @ np.exp(-apart / float(theta["tau_drift"])) @ hats.T
        return torch.from_numpy(slow) + covariance(noise.around, expected, theta, rate)
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
        assert float(found.detach()) == pytest.approx(float(normal.log_prob(residual[measured])), abs=1e-9), missing
    nothing = noise.log_prob(0 * residual, expected, theta, FRAME_RATE, torch.zeros(9, dtype=torch.bool))
    assert float(nothing.detach()) == 0


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "flow" else name for name in sorted(NOISES)]
)
def test_a_fit_recovers_the_noise(name):
    model = LinearAR(NOISES[name]())
    changes = {p.name: p.median * 2 for p in model.noise.parameters}
    tolerances = {"noise_density": 0.15} | {p.name: 0.3 for p in model.noise.parameters}
    rate = 30.0
    if name == "drift":
        # A process of correlation time τ seen for T has log τ to √(2τ/T): here 1200 s, 10 s and 0.13.
        rate = 5.0
        changes["tau_drift"], tolerances["tau_drift"] = 10.0, 0.5
    values = {p.name: p.median for p in model.parameters} | {"amplitude": 0.5} | changes
    theta = {name: torch.full((2,), value) for name, value in values.items()}
    counts = torch.poisson(torch.full((2, 6000), 1 / rate), generator=generator())
    observed = model.simulate(counts, theta, rate, generator(1))
    fit = model.fit_theta(observed, counts, rate, n_steps=80)
    for name, tolerance in tolerances.items():
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


# Drift --------------------------------------------------------------------------------------------------------------


def test_drift_has_the_posterior_mean_of_the_multivariate_normal():
    for around in ("gaussian", "signal_dependent", "correlated"):
        noise = DriftingNoise(around, spacing=0.1)
        theta, expected = some_theta(noise), torch.rand(9, dtype=torch.float64, generator=generator())
        residual = 0.1 * torch.randn(9, dtype=torch.float64, generator=generator(1))
        measured = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
        whole = covariance(noise, expected, theta, FRAME_RATE)
        slow = whole - covariance(noise.around, expected, theta, FRAME_RATE)
        there = torch.linalg.solve(whole[measured][:, measured], residual[measured])
        found = noise.drift(residual * measured, expected, theta, FRAME_RATE, measured)
        assert torch.allclose(found, slow[:, measured] @ there, atol=1e-10), around


def test_drift_is_the_same_process_at_any_frame_rate():
    """Frames three times as wide, centred on every third one of the others, see the same drift there."""
    noise = DriftingNoise(spacing=0.5)
    theta = some_theta(noise, tau_drift=2.0, noise_density=1e-4)
    residual = torch.zeros(90, dtype=torch.float64)
    residual[1::3] = 0.05 * torch.sin(torch.arange(30, dtype=torch.float64) / 5)
    only = torch.zeros(90, dtype=torch.bool)
    only[1::3] = True
    wide = theta | {"noise_density": theta["noise_density"] * math.sqrt(3)}  # the same standard deviation per frame
    all_of_them = torch.ones(30, dtype=torch.bool)
    fine = noise.log_prob(residual, residual, theta, 30.0, only)
    assert torch.allclose(fine, noise.log_prob(residual[1::3], residual[1::3], wide, 10.0, all_of_them))
    drift = noise.drift(residual, residual, theta, 30.0, only)[1::3]
    assert torch.allclose(drift, noise.drift(residual[1::3], residual[1::3], wide, 10.0, all_of_them))


def test_cells_of_two_frame_rates_have_their_own_knots():
    noise = DriftingNoise("correlated", spacing=0.3)
    theta, rates = some_theta(noise, 2), torch.tensor([10.0, 25.0], dtype=torch.float64)
    residual = 0.1 * torch.randn(3, 2, 40, dtype=torch.float64, generator=generator())
    measured = torch.rand(2, 40, generator=generator(1)) > 0.2
    both = noise.log_prob(residual * measured, residual, theta, rates, measured)
    for j, rate in enumerate(rates.tolist()):
        one = {name: value[j] for name, value in theta.items()}
        alone = noise.log_prob(residual[:, j] * measured[j], residual[:, j], one, rate, measured[j])
        # A knot beyond the end of a trace has nothing to say.
        assert torch.allclose(both[:, j], alone)


def test_drift_is_found_in_half_an_hour_at_thirty_hertz():
    """54,000 frames in single precision: a dense basis would take 100 MB, a dense covariance 12 GB."""
    model, n = LinearAR(DriftingNoise()), 54_000
    theta = {p.name: torch.full((1,), float(p.median)) for p in model.parameters} | {
        "noise_density": torch.full((1,), 0.02)
    }
    counts = torch.poisson(torch.full((1, n), 0.5 / 30), generator=generator())
    observed = model.simulate(counts, theta, 30.0, generator(1))
    observed[:, 20_000:21_000] = torch.nan
    drift, whole = model.explanation(observed, counts, theta, 30.0)
    clean = torch.nan_to_num(observed - model.fluorescence(counts, theta, 30.0))
    smooth = torch.nn.functional.avg_pool1d(clean, 151, 1, 75)
    assert drift.shape == (1, n)
    assert torch.allclose(whole, model.fluorescence(counts, theta, 30.0) + drift)
    assert float(drift.std()) == pytest.approx(0.03, rel=0.3)  # 90 correlation times: √(1/90) = 0.1
    # Both follow the true drift; a mean over 5 s adds noise of 0.02 √30/√151 = 0.009 to a drift of 0.03.
    assert float(torch.corrcoef(torch.cat([drift, smooth])[:, 21_500:])[0, 1]) > 0.9
    better = model.log_prob(observed, counts, theta, 30.0) - LinearAR().log_prob(observed, counts, theta, 30.0)
    assert float(better) > 100
    assert (LinearAR().explanation(observed, counts, theta, 30.0)[0] == 0).all()


def test_a_drift_is_refused_around_what_is_not_normal():
    with pytest.raises(ValueError, match="got 'flow'"):
        DriftingNoise("flow")
    with pytest.raises(ValueError, match="spacing above 0"):
        DriftingNoise(spacing=0.0)


# Flow ---------------------------------------------------------------------------------------------------------------


def some_flow(scale: float = 0.3) -> FlowNoise:
    """Weights as if trained, in double precision."""
    flow = FlowNoise(width=8)
    flow.learned.double()
    with torch.no_grad():
        for p in flow.learned.parameters():
            p.copy_(scale * torch.randn(p.shape, dtype=torch.float64, generator=generator(len(p))))
    return flow


def test_an_untrained_flow_is_independent_noise():
    flow, theta = FlowNoise(), {k: v.float() for k, v in some_theta(FlowNoise(), 3).items()}
    residual = 0.3 * torch.randn(2, 3, 50, generator=generator())
    measured = torch.rand(3, 50, generator=generator(1)) > 0.3
    arguments = (residual * measured, residual.abs(), theta, 30.0, measured)
    torch.testing.assert_close(flow.log_prob(*arguments), GaussianNoise().log_prob(*arguments), rtol=1e-5, atol=1e-4)
    drawn = flow.sample(residual, theta, 30.0, generator())
    torch.testing.assert_close(drawn, GaussianNoise().sample(residual, theta, 30.0, generator()), rtol=1e-5, atol=1e-6)


def test_a_flow_integrates_to_one_over_all_residuals():
    """Two frames of three, the one between them missing, on a grid that is fine in standard deviations."""
    flow, rate = some_flow(), 7.0
    theta = some_theta(flow)
    std = 0.03 * math.sqrt(rate)
    # A map to a uniform grid of t: the tails of a sinh-arcsinh law end slowly.
    t = torch.linspace(-6, 6, 241, dtype=torch.float64)
    u, step = torch.sinh(t), torch.cosh(t) * (t[1] - t[0])
    pairs = torch.stack(torch.meshgrid(u, u, indexing="ij"), -1).flatten(0, 1) * std
    residual = torch.stack([pairs[:, 0], 0 * pairs[:, 0], pairs[:, 1]], -1)
    expected = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    log_p = flow.log_prob(residual, expected, theta, rate, torch.tensor([True, False, True]))
    weight = torch.outer(step, step).flatten() * std**2
    assert float((log_p.detach().exp() * weight).sum()) == pytest.approx(1, abs=1e-4)


def test_a_flow_gives_back_the_normal_numbers_that_it_was_drawn_from():
    """Its samples are made frame by frame, its density all at once: they must be inverses with one memory."""
    flow, rates = some_flow(), torch.tensor([10.0, 40.0], dtype=torch.float64)
    theta = some_theta(flow, 2)
    expected = torch.rand(3, 2, 60, dtype=torch.float64, generator=generator(1))
    drawn = flow.sample(expected, theta, rates, generator())
    z, _ = flow.to_normal(drawn, expected, theta, rates, torch.ones(2, 60, dtype=torch.bool))
    normal = torch.randn(3, 2, 60, dtype=torch.float64, generator=generator())
    assert torch.allclose(z, normal, atol=1e-6)


def test_the_density_of_a_flow_is_the_slope_of_its_map():
    flow, theta = some_flow(), some_theta(some_flow())
    residual = 0.2 * torch.randn(12, dtype=torch.float64, generator=generator())
    measured = torch.ones(12, dtype=torch.bool)
    measured[[2, 3, 7]] = False
    expected = torch.rand(12, dtype=torch.float64, generator=generator(1))
    slope = torch.autograd.functional.jacobian(
        lambda r: flow.to_normal(r, expected, theta, 15.0, measured)[0], residual * measured
    )
    # No frame depends on later ones, nor on missing ones.
    assert (slope.triu(1) == 0).all()
    assert (slope[:, ~measured] == torch.diag(slope.diag())[:, ~measured]).all()
    z, log_slope = flow.to_normal(residual * measured, expected, theta, 15.0, measured)
    assert torch.allclose(slope.diag().log(), log_slope, atol=1e-9)
    by_hand = (log_slope + torch.distributions.Normal(0, 1).log_prob(z))[measured].sum()
    assert torch.allclose(flow.log_prob(residual * measured, expected, theta, 15.0, measured), by_hand)


def test_gradients_of_a_flow():
    flow = some_flow()
    u = torch.tensor([0.1, -3.0], dtype=torch.float64, requires_grad=True)
    residual = 0.2 * torch.randn(2, 8, dtype=torch.float64, generator=generator())
    weights = list(flow.learned.parameters())

    def log_prob(u, residual, *_):
        theta = {"baseline": u[0], "noise_density": u[1].exp()}
        return flow.log_prob(residual, residual + 1, theta, 20.0, torch.ones(8, dtype=torch.bool))

    torch.autograd.gradcheck(log_prob, (u, residual.requires_grad_(), *weights), fast_mode=True)


def test_a_flow_means_the_same_for_cells_of_any_noise_level():
    flow, residual = some_flow(), 0.2 * torch.randn(20, dtype=torch.float64, generator=generator())
    measured, expected = torch.ones(20, dtype=torch.bool), torch.rand(20, dtype=torch.float64, generator=generator(1))
    quiet, loud = some_theta(flow, baseline=0.0), some_theta(flow, baseline=0.0, noise_density=0.09)
    found = flow.log_prob(3 * residual, 3 * expected, loud, 20.0, measured) + 20 * math.log(3)
    assert torch.allclose(found, flow.log_prob(residual, expected, quiet, 20.0, measured))


def test_a_flow_learns_tails_and_correlation():
    """Student's t innovations of an AR(1) process, whose true log-density is known."""
    n_windows, n_frames, rho = 48, 400, 0.7
    student = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    noise = student.sample((n_windows, n_frames))
    residual = torch.zeros(n_windows, n_frames)
    for t in range(n_frames):
        residual[:, t] = rho * residual[:, t - 1] + noise[:, t] if t else noise[:, t]
    rate, measured = torch.full((n_windows,), 20.0), torch.ones(n_windows, n_frames, dtype=torch.bool)
    density = residual.std() / math.sqrt(20.0)
    theta = {"baseline": torch.zeros(n_windows), "noise_density": density.expand(n_windows)}
    torch.manual_seed(0)
    flow, half = FlowNoise(width=16), n_windows // 2

    def arguments(rows: slice):
        some = {name: value[rows] for name, value in theta.items()}
        return residual[rows], torch.zeros_like(residual[rows]), some, rate[rows], measured[rows]

    flow.fit(*arguments(slice(half)), n_steps=250)
    with torch.no_grad():
        others = arguments(slice(half, None))
        found, normal = (float(x.log_prob(*others).mean()) / n_frames for x in (flow, GaussianNoise()))
    truth = float(student.log_prob(noise[half:]).mean())
    # Of the gain that the true process has over independent normal frames, nine tenths on windows not seen.
    assert found - normal > 0.9 * (truth - normal) > 0.4
