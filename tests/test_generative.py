"""One oath for every generative model, and each model against closed forms, plain loops and fine steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate

from napari_calvae.generative import (
    MODELS,
    NOISES,
    DyeBinding,
    GCaMP6f,
    GCaMP6s,
    GenerativeModel,
    IndicatorKinetics,
    JGCaMP8f,
    JGCaMP8m,
    LinearAR,
    Physiological,
    SpikePrior,
    kinetic_loop,
    linear_ar,
    lobes,
    sites,
)
from napari_calvae.generative.recursion import exponential_filter, linear_scan

#: The same class with other constants; tested below.
SAME = {"jgcamp8m", "gcamp6f"}


@pytest.fixture(params=sorted(set(MODELS) - SAME))
def model(request) -> GenerativeModel:
    return MODELS[request.param]()


def shorter(model: GenerativeModel, n_frames: int) -> int:
    """A twentieth of the frames for models that loop over time."""
    return n_frames // 20 if isinstance(model, IndicatorKinetics) else n_frames


def rows(model: GenerativeModel) -> tuple[int, ...]:
    """Batch of one cell, or the two compartments that a coupled model needs."""
    return (2,) if model.coupled else ()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def median_theta(model: GenerativeModel, *shape: int, dtype=torch.float64, **changes: float) -> dict[str, torch.Tensor]:
    values = {p.name: p.median for p in model.parameters} | changes
    return {name: torch.full(shape, float(value), dtype=dtype) for name, value in values.items()}


def poisson(rate: float, frame_rate: float, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.poisson(torch.full(shape, rate / frame_rate, dtype=torch.float64), generator=generator(seed))


# Contract ------------------------------------------------------------------------------------------------------------


def test_parameters_describe_themselves(model):
    names = [p.name for p in model.parameters]
    assert names[-2:] == ["baseline", "noise_density"]
    assert len(set(names)) == len(names)
    assert all(p.label and p.help and p.spread > 0 for p in model.parameters)


def test_constrain_inverts_unconstrain(model):
    theta = model.sample_prior(20, generator())
    back = model.constrain(model.unconstrain(theta))
    assert list(back) == [p.name for p in model.parameters]
    for name, value in theta.items():
        assert torch.allclose(value, back[name], rtol=1e-5)
    with pytest.raises(ValueError, match="got none for baseline"):
        model.unconstrain({k: v for k, v in theta.items() if k != "baseline"})


def test_prior_draws_have_the_density_that_log_prior_says(model):
    # E[log p] of n independent normals is −Σ log(σ √(2πe)); its sampling variance is n/2 per draw.
    n = 4000
    theta = model.sample_prior(n, generator())
    expected = -sum(math.log(p.spread * math.sqrt(2 * math.pi * math.e)) for p in model.parameters)
    tolerance = 4 * math.sqrt(len(model.parameters) / 2 / n)
    assert abs(float(model.log_prior(theta).mean()) - expected) < tolerance


@pytest.mark.parametrize("frame_rate", [7.5, 60.0])
def test_log_prob_is_the_density_of_simulate(model, frame_rate):
    n_rois, n_frames = 8, shorter(model, 2000)
    theta = median_theta(model, n_rois)
    counts = poisson(1.0, frame_rate, n_rois, n_frames)
    observed = model.simulate(counts, theta, frame_rate, generator(1))
    std = theta["noise_density"][0] * math.sqrt(frame_rate)
    entropy = 0.5 + float(torch.log(std)) + 0.5 * math.log(2 * math.pi)
    per_frame = float(model.log_prob(observed, counts, theta, frame_rate).sum()) / (n_rois * n_frames)
    # Half a chi-square variable per frame has variance 1/2.
    assert abs(per_frame + entropy) < 4 * math.sqrt(0.5 / (n_rois * n_frames))


def test_missing_frames_drop_out(model):
    theta, counts = median_theta(model, *rows(model)), poisson(2.0, 20.0, *rows(model), 60)
    observed = model.simulate(counts, theta, 20.0, generator())
    valid = torch.ones(60, dtype=torch.bool)
    valid[10:25] = False
    masked = model.log_prob(observed, counts, theta, 20.0, valid)
    holed = observed.masked_fill(~valid, torch.nan)
    assert torch.equal(masked, model.log_prob(holed, counts, theta, 20.0))
    std = model.noise_std(theta, 20.0)[..., None]
    by_hand = torch.distributions.Normal(model.fluorescence(counts, theta, 20.0), std)
    assert torch.allclose(masked, by_hand.log_prob(observed)[..., valid].sum(-1))
    missing = torch.full((60,), torch.nan, dtype=torch.float64)
    assert torch.isfinite(model.log_prob(missing, counts, theta, 20.0)).all()


def test_gradients(model):
    counts = 0.3 + torch.rand(2, 3 if model.coupled else 1, 9, dtype=torch.float64, generator=generator())
    u = model.unconstrain(median_theta(model, 3)) + 0.3 * torch.randn(
        3, len(model.parameters), dtype=torch.float64, generator=generator(1)
    )
    rate = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda c, x: model.fluorescence(c, model.constrain(x), rate),
        (counts.requires_grad_(), u.requires_grad_()),
        fast_mode=isinstance(model, IndicatorKinetics),
    )


def test_gradients_stay_finite_without_spikes(model):
    u = model.unconstrain(median_theta(model, 2, dtype=torch.float32)).requires_grad_()
    counts = torch.zeros(2, 50, requires_grad=True)
    log_p = model.log_prob(torch.zeros(2, 50), counts, model.constrain(u), 30.0).sum()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(log_p, (u, counts)))


def test_nothing_changes_before_a_spike(model):
    theta = median_theta(model, *rows(model), baseline=0.1)
    counts = torch.zeros(*rows(model), 100, dtype=torch.float64)
    counts[..., 40] = 1
    trace = model.fluorescence(counts, theta, 30.0)
    assert (trace[..., :40] - 0.1).abs().max() < 1e-12
    assert (trace[..., 40] > 0.1 + 1e-4).all()


def test_batches_broadcast(model):
    theta = {k: v.double() for k, v in model.sample_prior(3, generator()).items()}
    n_frames = shorter(model, 70)
    counts = poisson(9.0, 25.0, 4, 3, n_frames)
    rates = torch.tensor([10.0, 25.0, 40.0], dtype=torch.float64)
    whole = model.fluorescence(counts, theta, rates)
    assert whole.shape == (4, 3, n_frames)
    if model.coupled:
        for i in range(4):
            assert torch.allclose(whole[i], model.fluorescence(counts[i], theta, rates))
        return
    for i, j in itertools.product(range(4), range(3)):
        one = model.fluorescence(counts[i, j], {k: v[j] for k, v in theta.items()}, float(rates[j]))
        assert torch.allclose(whole[i, j], one)


def test_bin_width_matters_to_first_order_at_most(model):
    """The same spikes, each in the middle of a frame at every width, against frames of 2.5 ms."""
    if isinstance(model, IndicatorKinetics):
        pytest.skip("rises within one of these frames: see test_kinetics_agree_with_a_stiff_solver_at_two_frame_rates")
    theta, fine = median_theta(model, *rows(model)), 405
    spikes = torch.tensor([13, 40, 41, 42, 80])  # in frames of 27/405 s

    def trace(factor: int) -> torch.Tensor:
        counts = torch.zeros(*rows(model), 120 * 27 // factor, dtype=torch.float64)
        counts[..., (spikes * 27 + 13) // factor] = 1
        return model.fluorescence(counts, theta, fine / factor)

    finest = trace(1)

    def error(factor: int) -> float:
        # Within its own frame a spike may have been anywhere, so that there the widths differ by definition.
        elsewhere = torch.ones(120 * 27 // factor, dtype=torch.bool)
        elsewhere[(spikes * 27 + 13) // factor] = False
        return float((trace(factor) - finest[..., factor // 2 :: factor])[..., elsewhere].abs().max())

    errors = [error(factor) for factor in (27, 9, 3)]
    assert errors[0] < 0.08 * float(finest.max())
    # An error c·dt leaves (9 − 1)/(27 − 1) = 0.31, then (3 − 1)/(9 − 1) = 0.25 of itself; zeroth order leaves all.
    # The widest frames are no shorter than the rise, where errors of two signs may partly cancel.
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.4 * errors[1]


def test_spikes_may_be_finer_than_frames(model):
    frame_rate, bins, n_frames = 12.0, 3, shorter(model, 200)
    theta = median_theta(model, 2)
    fine = poisson(2.0, frame_rate * bins, 2, n_frames * bins)
    by_hand = model.fluorescence(fine, theta, frame_rate * bins).reshape(2, n_frames, bins).mean(-1)
    assert torch.equal(model.per_frame(fine, theta, frame_rate, bins), by_hand)
    observed = model.simulate(fine, theta, frame_rate, generator(), bins)
    normal = torch.distributions.Normal(by_hand, model.noise_std(theta, frame_rate)[:, None])
    found = model.log_prob(observed, fine, theta, frame_rate, bins=bins)
    assert torch.allclose(found, normal.log_prob(observed).sum(-1))
    assert torch.equal(model.per_frame(fine, theta, frame_rate * bins), model.fluorescence(fine, theta, 36.0))
    with pytest.raises(ValueError, match="multiple of bins = 4"):
        model.per_frame(fine[:, :-1], theta, frame_rate, 4)


def test_initial_theta_and_fit_theta_recover_the_response(model):
    """θ itself trades off within a model; what must come back is what one spike does, baseline and noise."""
    if isinstance(model, IndicatorKinetics):
        pytest.skip("too slow for that many gradient steps: see test_kinetics_initial_theta")
    n_rois, frame_rate = 6, 30.0
    theta = median_theta(model, n_rois, dtype=torch.float32)
    theta[next(n for n in ("tau_decay", "tau_unbind", "tau_calcium") if n in theta)] *= torch.linspace(0.5, 2.0, n_rois)
    theta["amplitude" if "amplitude" in theta else "saturation"] *= torch.linspace(2.0, 0.7, n_rois)
    theta["baseline"] += torch.linspace(-0.1, 0.3, n_rois)
    counts = poisson(1.0, frame_rate, n_rois, 5400).float()
    observed = model.simulate(counts, theta, frame_rate, generator(1))
    observed[:, 100:200] = torch.nan
    guess = model.initial_theta(observed, counts, frame_rate)
    fit = model.fit_theta(observed, counts, frame_rate, start=guess, n_steps=80)
    burst = torch.zeros(n_rois, 150)
    burst[:, 5] = 3

    def response(t):
        return model.fluorescence(burst, t, frame_rate) - t["baseline"][:, None]

    truth = response(theta)
    size = truth.norm(dim=1)
    # The grids are coarse: a quarter of the response; gradient steps get it within noise.
    assert ((response(guess) - truth).norm(dim=1) / size).max() < 0.3
    assert ((response(fit) - truth).norm(dim=1) / size).max() < 0.1
    # Three minutes leave the baseline that uncertain where an exponent makes the slow part of a decay small.
    for found, tolerance in ((guess, 0.06), (fit, 0.03)):
        assert (found["baseline"] - theta["baseline"]).abs().max() < tolerance
        assert (found["noise_density"] / theta["noise_density"] - 1).abs().max() < 0.1
    before = model.log_prob(observed, counts, guess, frame_rate) + model.log_prior(guess)
    after = model.log_prob(observed, counts, fit, frame_rate) + model.log_prior(fit)
    assert (after >= before - 1e-2).all()


def test_fit_theta_accepts_posterior_samples(model):
    theta = median_theta(model, 2, dtype=torch.float32)
    counts = poisson(1.0, 20.0, 3, 2, shorter(model, 400)).to(torch.uint8)
    observed = model.simulate(counts[0], theta, 20.0, generator())
    fit = model.fit_theta(observed, counts, 20.0, n_steps=3)
    assert all(v.shape == (2,) and torch.isfinite(v).all() for v in fit.values())


@pytest.mark.parametrize(
    ("observed", "counts"),
    [
        (torch.full((2, 90), torch.nan), torch.zeros(2, 90)),
        (torch.full((2, 90), 0.7), torch.ones(2, 90)),
        (torch.zeros(2, 1), torch.ones(2, 1)),
        (torch.randn(2, 90, generator=generator()), torch.zeros(2, 90)),
        (1e6 * torch.randn(2, 90, generator=generator()), torch.rand(2, 90, generator=generator())),
        (1e-6 * torch.randn(2, 90, generator=generator()), torch.full((2, 90), torch.nan)),
    ],
    ids=["all NaN", "constant", "one frame", "no spikes", "huge", "NaN counts"],
)
def test_initial_theta_is_finite_whatever_comes(model, observed, counts):
    theta = model.initial_theta(observed, counts, 15.0)
    for p in model.parameters:
        assert theta[p.name].shape == (2,)
        assert torch.isfinite(theta[p.name]).all()
        assert not p.positive or (theta[p.name] > 0).all()
    if not counts.nan_to_num().any():
        for p in model.parameters[:-2]:
            assert (theta[p.name] / p.median).log().abs().max() < p.spread


# Recursions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 64, 100])
def test_recursions_equal_a_loop(n):
    a, b, x = torch.rand(3, 2, n, dtype=torch.float64, generator=generator(n)).unbind()
    loop, state = torch.zeros(2, n, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for t in range(n):
        state = a[:, t] * state + b[:, t]
        loop[:, t] = state
    assert torch.allclose(linear_scan(a, b), loop, atol=1e-12)
    first = torch.tensor([0.5, 0.2], dtype=torch.float64)
    tails, decays = torch.tensor([[[1.0, -2.0], [0.3, 0.1]], [[0.9, 0.4], [0.99, 0.0]]], dtype=torch.float64).unbind()
    for t in range(n):
        y = first * x[:, t]
        for lag in range(1, t + 1):
            y = y + (tails * decays ** (lag - 1)).sum(-1) * x[:, t - lag]
        loop[:, t] = y
    assert torch.allclose(exponential_filter(x, first, tails, decays), loop, atol=1e-12)


def test_scan_stops_early_only_where_it_does_not_matter():
    a = torch.full((1, 5000), 0.5)
    a[0, 2500:2600] = 1.0
    b = torch.zeros(1, 5000)
    b[0, 2499] = 1.0
    x = linear_scan(a, b)
    assert torch.equal(x[0, 2499:2600], torch.ones(101))
    assert x[0, 2600] == 0.5


# Linear ---------------------------------------------------------------------------------------------------------------


def kernel(t: np.ndarray, tau_rise: float, tau_decay: float) -> np.ndarray:
    """Continuous response to a spike at time 0 with peak 1, the peak found numerically."""

    def raw(s):
        return np.where(s >= 0, np.exp(-np.maximum(s, 0) / tau_decay) - np.exp(-np.maximum(s, 0) / tau_rise), 0.0)

    return raw(t) / raw(np.linspace(0, 5 * tau_decay, 2_000_001)).max()


@pytest.mark.parametrize(("tau_rise", "frame_rate"), [(0.05, 30.0), (0.2, 3.0), (0.004, 120.0)])
def test_linear_response_is_the_kernel_averaged_over_the_frame(tau_rise, frame_rate):
    tau_decay, n = 0.6, 40
    theta = median_theta(LinearAR(), tau_rise=tau_rise, tau_decay=tau_decay, amplitude=0.25)
    counts = torch.zeros(n, dtype=torch.float64)
    counts[0] = 1
    response = LinearAR().fluorescence(counts, theta, frame_rate).numpy()
    places = (np.arange(4000) + 0.5) / 4000 - 0.5
    lags = np.arange(n)[:, None] - places
    expected = 0.25 * kernel(lags / frame_rate, tau_rise, tau_decay).mean(1)
    # The midpoint rule with 4000 points is off by at most one point where the kernel starts, and 1e-7 elsewhere.
    assert np.abs(response - expected).max() < 0.25 / 4000


def test_linear_equals_a_plain_loop():
    tau_rise, tau_decay, dt = 0.08, 0.5, 1 / 20
    theta = median_theta(LinearAR(), tau_rise=tau_rise, tau_decay=tau_decay, amplitude=0.3, baseline=0.1)
    counts = poisson(2.0, 20.0, 200)
    ratio = tau_rise / tau_decay
    peak_time = tau_rise * math.log(1 / ratio) / (1 - ratio)
    peak = math.exp(-peak_time / tau_decay) - math.exp(-peak_time / tau_rise)
    expected, states = [], {tau_decay: 0.0, tau_rise: 0.0}
    for s in counts.tolist():
        value = 0.0
        for sign, tau in ((1, tau_decay), (-1, tau_rise)):
            whole = tau / dt * (1 - math.exp(-dt / tau)) * math.exp(-dt / 2 / tau)
            own = tau / dt * (1 - math.exp(-dt / 2 / tau))
            value += sign * (whole * states[tau] + own * s)
            states[tau] = math.exp(-dt / tau) * states[tau] + s
        expected.append(0.1 + 0.3 / peak * value)
    trace = LinearAR().fluorescence(counts, theta, 20.0)
    assert torch.allclose(trace, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_linear_without_rise_is_ar1_and_equal_time_constants_are_no_singularity():
    frame_rate, counts = 30.0, torch.zeros(90, dtype=torch.float64)
    counts[3] = 1
    ar1 = LinearAR().fluorescence(counts, median_theta(LinearAR(), tau_rise=0.0), frame_rate)
    gamma = math.exp(-1 / 30 / 0.5)
    assert torch.allclose(ar1[5:] / ar1[4:-1], torch.tensor(gamma, dtype=torch.float64), rtol=1e-6)
    assert ar1[4] == pytest.approx(0.2 * gamma**1, rel=2e-3)
    assert ar1[3] == pytest.approx(0.1, rel=0.03)
    for dtype, tolerance in ((torch.float64, 2e-3), (torch.float32, 2e-3)):
        close = [
            LinearAR().fluorescence(counts, median_theta(LinearAR(), dtype=dtype, tau_rise=tau), frame_rate)
            for tau in (0.499, 0.5, 0.501)
        ]
        assert (close[1] - close[0]).abs().max() < tolerance * 0.2
        assert (close[1] - close[2]).abs().max() < tolerance * 0.2
        assert close[1].max() == pytest.approx(0.2, rel=5e-3)


def test_linear_amplitude_is_the_peak_of_one_spike():
    theta = median_theta(LinearAR(), 3)
    theta["tau_rise"] = torch.tensor([0.01, 0.1, 0.9], dtype=torch.float64)
    counts = torch.zeros(3, 3000, dtype=torch.float64)
    counts[:, 10] = 1
    assert torch.allclose(LinearAR().fluorescence(counts, theta, 1000.0).amax(-1), theta["amplitude"], rtol=1e-2)


def test_linear_initial_theta_finds_amplitude_and_decay():
    model, frame_rate = LinearAR(), 30.0
    theta = median_theta(model, 4, dtype=torch.float32, noise_density=0.01)
    theta["tau_decay"] = torch.tensor([0.25, 0.5, 1.0, 2.0])
    theta["amplitude"] = torch.tensor([0.6, 0.1, 0.2, 0.3])
    counts = poisson(0.5, frame_rate, 4, 9000).float()
    observed = model.simulate(counts, theta, frame_rate, generator(2))
    observed += 0.1 * torch.sin(torch.arange(9000) / frame_rate / 25)  # drift of a period of 157 s
    found = model.initial_theta(observed, counts, frame_rate)
    assert (found["tau_decay"] / theta["tau_decay"]).log().abs().max() < math.log(1.2)
    assert (found["amplitude"] / theta["amplitude"]).log().abs().max() < math.log(1.15)


# Dye ------------------------------------------------------------------------------------------------------------------


def test_dye_equals_a_plain_loop():
    theta = median_theta(DyeBinding(), k_on=30.0, hill=2.5, baseline=-0.2)
    counts, dt = poisson(3.0, 15.0, 150), 1 / 15
    x = dt / 0.2
    calcium, bound, expected = 0.0, 0.0, []
    for s in counts.tolist():
        before = calcium * math.exp(-x / 3)
        after = calcium * math.exp(-2 * x / 3) + s * math.exp(-x / 3)
        binding = 30.0 * (before**2.5 + after**2.5) / 2
        calcium = calcium * math.exp(-x) + s * (1 - math.exp(-x)) / x
        rate = binding + 1 / 0.4
        target = binding / rate
        end = target + (bound - target) * math.exp(-rate * dt)
        expected.append(-0.2 + 3.0 * (bound + end) / 2)
        bound = end
    trace = DyeBinding().fluorescence(counts, theta, 15.0)
    assert torch.allclose(trace, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_dye_agrees_with_a_fine_integration():
    theta = median_theta(DyeBinding())
    frame_rate, fine = 100.0, 200  # Euler steps per frame
    counts = torch.zeros(300, dtype=torch.float64)
    counts[[20, 60, 61, 62, 200]] = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    h = 1 / frame_rate / fine
    c = d = 0.0
    expected = []
    for s in counts.tolist():
        for i in range(fine):
            if i == fine // 2:
                expected.append(3.0 * d)
                c += s  # in the middle of their frame, the mean of where they may be
            d += h * (1.0 * c**2 * (1 - d) - d / 0.4)
            c -= h * c / 0.2
    expected = torch.tensor(expected, dtype=torch.float64)
    trace = DyeBinding().fluorescence(counts, theta, frame_rate)
    # Within a spike's own frame the model averages over where it may be. Elsewhere dt/(2 τ_calcium) = 2.5 % would be
    # first order, (h dt/τ_calcium)² = 1 % is second.
    error = (trace - expected).abs()[counts == 0]
    assert error.max() < 0.01 * expected.max(), error.max() / expected.max()


def test_dye_stays_bound_between_none_and_all():
    theta = median_theta(DyeBinding(), k_on=1e5, hill=4.0, baseline=0.0)
    trace = DyeBinding().fluorescence(torch.full((200,), 20.0, dtype=torch.float64), theta, 3.0)
    assert trace.min() > 0
    assert trace.max() <= 3.0 + 1e-12
    assert trace[-1] == pytest.approx(3.0, rel=1e-3)


# Physiological --------------------------------------------------------------------------------------------------------


def test_physiological_small_signals_equal_linear_ar():
    counts = poisson(2.0, 30.0, 300)
    for rise, frame_rate in ((0.04, 30.0), (0.2, 30.0), (0.02, 120.0)):
        theta = median_theta(Physiological(), hill=1.0, saturation=1e-9, tau_rise=rise, baseline=0.1)
        linear = LinearAR().fluorescence(counts, theta | {"tau_decay": theta["tau_calcium"]}, frame_rate)
        trace = Physiological().fluorescence(counts, theta, frame_rate)
        # The target goes linearly over half a frame instead of exponentially: (dt/2/τ)²/8 = 6e-5 of it at 30 Hz.
        assert (trace - linear).abs().max() < 1e-4 * linear.max()


def test_physiological_agrees_with_a_fine_integration():
    """A plain loop of Euler steps of 20 µs, averaged over each frame, each spike in the middle of its frame."""
    theta = median_theta(Physiological(), hill=2.2, saturation=0.3, tau_rise=0.06, tau_calcium=0.4, amplitude=1.0)
    frame_rate, fine = 50.0, 1000
    counts = torch.zeros(100, dtype=torch.float64)
    counts[[10, 40, 41, 42, 44]] = torch.tensor([1.0, 1.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    step = 1 / frame_rate / fine
    c, p, means, peak = 0.0, 0.0, [], 0.0
    for k, s in enumerate(counts.tolist()):
        total = 0.0
        for i in range(fine):
            c += s * (i == fine // 2)
            total += p
            power = c**2.2
            p += step * (power - (1 + 0.3 * power) * p) / 0.06
            c -= step * c / 0.4
            peak = max(peak, p if k < 40 else 0.0)
        means.append(total / fine)
    expected = torch.tensor(means, dtype=torch.float64) / peak
    trace = Physiological().fluorescence(counts, theta, frame_rate)
    assert trace[:40].max() == pytest.approx(1, abs=0.05)  # amplitude is the peak of one spike
    scaled = trace * float(expected[45] / trace[45])
    # Second order in half a frame: (hill · 10 ms/τ_calcium)² / 12 = 3e-4, and as much for each of the rates.
    assert (scaled - expected).abs().max() < 2e-3 * expected.max()


def test_physiological_peak_and_bounds():
    counts = torch.zeros(4, 4000, dtype=torch.float64)
    counts[:, 10] = 1
    theta = median_theta(Physiological(), 4, saturation=1e-6)
    theta["hill"] = torch.tensor([1.0, 1.7, 2.5, 4.0], dtype=torch.float64)
    assert torch.allclose(Physiological().fluorescence(counts, theta, 2000.0).amax(-1), theta["amplitude"], rtol=1e-3)
    burst = torch.full((4, 200), 50.0, dtype=torch.float64)
    full = median_theta(Physiological(), 4, saturation=0.2, hill=4.0, amplitude=1.0, tau_rise=1e-3)
    for frame_rate in (0.5, 3.0, 300.0):
        trace = Physiological().fluorescence(burst, full, frame_rate)
        assert trace.min() > 0
        # All bound reads 1/γ = 5, six times the 1/(1 + γ) of a single spike.
        assert float(trace.max()) == pytest.approx(6.0, rel=0.03)  # by then 2 % have left


# Kinetics -------------------------------------------------------------------------------------------------------------

INDICATORS = [JGCaMP8f, JGCaMP8m, GCaMP6s, GCaMP6f]
CONSTANTS = [
    lobes.JGCAMP8F, lobes.JGCAMP8M, lobes.JGCAMP8F_IN_VITRO, sites.GCAMP6S, sites.GCAMP6F, sites.GCAMP6S_GREENBERG
]  # fmt: skip


@pytest.mark.parametrize("constants", CONSTANTS)
def test_schemes_conserve_indicator_and_calcium(constants):
    scheme = constants.scheme
    calcium = torch.tensor([0.0, 0.05, 1.0, 100.0], dtype=torch.float64)
    rates = scheme.rate_matrix(calcium)
    assert torch.allclose(rates.sum(-2), torch.zeros_like(rates[:, 0]), atol=1e-12 * float(rates.abs().max()))
    assert (rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1)) >= 0).all()
    # Binding takes up ions; every other step keeps them or lets some go.
    change = scheme.bound[:, None] - scheme.bound
    assert (change[(scheme.binding > 0).any(0)] > 0).all()
    assert (change[scheme.fixed > 0] <= 0).all()
    for x in (0.0, 0.05, 1.0, 1e4):
        steady = scheme.steady_state(x)
        assert steady.min() > -1e-9
        assert float(steady.sum()) == pytest.approx(1)
    assert float(scheme.steady_state(0.0)[0]) == pytest.approx(1)
    # Tables: columns of a stochastic matrix, and a brightness between those of the states.
    for step in (1e-4, 0.3):
        moves, bound = scheme.table(step)
        assert torch.allclose(moves[:, 0, :-1].sum(-2), torch.ones(1, dtype=torch.float64))
        assert moves[:, 0].min() > -1e-12
        assert moves[:, 0].max() < 1 + 1e-12
        assert bound[:, 0].max() <= scheme.bound.max() + 1e-9


def test_lobes_bind_two_ions_at_once():
    bound = lobes.BOUND_CALCIUM
    for origin, target, rate in lobes.TRANSITIONS:
        expected = 2.0 if rate in ("n", "c") else 0.0 if not rate.endswith("off") else -2.0
        assert bound[target] - bound[origin] == expected, (origin, target)


def test_sites_bind_as_adair_and_klotz_have_it():
    """At rest the share with i ions goes as the product of the first i affinities times calcium."""
    constants, x = sites.GCAMP6S_GREENBERG, 0.3
    weights = np.cumprod([1.0, *(x * np.array(constants.on) / np.array(constants.off))])
    np.testing.assert_allclose(constants.scheme.steady_state(x).numpy(), weights / weights.sum(), rtol=1e-9)


def stiff_solution(model, cell: dict[str, float], spikes: dict[float, int], times: np.ndarray) -> np.ndarray:
    """(time, state) occupancies by scipy's BDF, with the fast buffer as a reaction of its own (1e4 /s)."""
    scheme, (buffer, half) = model.medium
    rates, kinds, bound = scheme.fixed.numpy(), scheme.binding.numpy(), scheme.bound.numpy()
    per_half, hill, n = 1 / scheme.half.numpy(), scheme.hill.numpy(), len(bound)

    def derivative(_, y):
        free, excess = max(y[n], 0.0), y[n] - 0.05
        occupied = (rates + np.tensordot((free * per_half) ** hill, kinds, 1)) @ y[:n]
        buffered = 1e4 / half * y[n] * (buffer - y[n + 2]) - 1e4 * y[n + 2]
        stored = cell["store_in"] * excess - cell["store_out"] * y[n + 1]
        lost = cell["extrusion"] * excess + stored + cell["indicator"] * (bound @ occupied) + buffered
        return np.r_[occupied, -lost, stored, buffered]

    y = np.r_[scheme.steady_state(0.05).numpy(), 0.05, 0.0, buffer * 0.05 / (half + 0.05)]
    edges, parts = [0.0, *spikes, times[-1]], []
    for start, end in itertools.pairwise(edges):
        # A spike's calcium is added in equilibrium with the buffer.
        total = y[n] + y[n + 2] + spikes.get(start, 0) * cell["calcium_per_spike"]
        b = buffer + half - total
        y[n] = (-b + math.sqrt(b**2 + 4 * half * total)) / 2
        y[n + 2] = total - y[n]
        inside = times[(times >= start) & (times < end)]
        solution = integrate.solve_ivp(
            derivative, (start, end), y, method="BDF", t_eval=np.r_[inside, end], rtol=1e-7, atol=1e-9
        )
        parts.append(solution.y[:n, :-1].T)
        y = solution.y[:, -1].copy()
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", INDICATORS)
def test_kinetics_agree_with_a_stiff_solver_at_two_frame_rates(kind):
    model, fine = kind(), 4000
    theta = median_theta(model, baseline=0.0)
    spikes = {1.5 / 10: 1, 3.5 / 10: 2, 5.5 / 10: 5}  # in the middle of frames of 10 and of 50 Hz
    times = (np.arange(fine) + 0.5) / fine
    occupied = stiff_solution(model, {k: float(v) for k, v in theta.items()}, spikes, times)
    bright = occupied @ model.medium.scheme.bright.numpy()
    rest, full = (float(model.medium.scheme.steady_state(x) @ model.medium.scheme.bright) for x in (0.05, 1e4))
    exact = (bright - rest) / (rest + full / (float(theta["dynamic_range"]) - 1))
    exact = np.append(exact, exact[-1])
    for frame_rate in (10, 50):
        counts = torch.zeros(frame_rate, dtype=torch.float64)
        for t, n in spikes.items():
            counts[int(t * frame_rate)] = n
        trace = model.fluorescence(counts, theta, float(frame_rate)).numpy()
        expected = exact[:fine].reshape(frame_rate, -1).mean(1)
        assert np.abs(trace - expected).max() < 0.01 * exact.max()


@pytest.mark.parametrize(("kind", "peak", "half"), [(JGCaMP8f, 0.126, 0.042), (JGCaMP8m, 0.188, 0.170)])
def test_kinetics_of_a_single_spike(kind, peak, half):
    """Pinned to what the stiff solver gives for the median cell."""
    counts = torch.zeros(200, dtype=torch.float64)
    counts[5] = 1
    trace = kind().fluorescence(counts, median_theta(kind(), baseline=0.0), 500.0)
    assert float(trace.max()) == pytest.approx(peak, rel=0.02)
    top = int(trace.argmax())
    below = top + int((trace[top:] < trace.max() / 2).int().argmax())
    assert (below - top) / 500 == pytest.approx(half, abs=0.004)


@pytest.mark.parametrize("kind", [JGCaMP8f, GCaMP6s])
@pytest.mark.parametrize("frame_rate", [0.7, 30.0])
def test_kinetics_stay_sound_whatever_comes(kind, frame_rate):
    model = kind()
    usual = model.unconstrain(median_theta(model, dtype=torch.float32))
    spread = torch.tensor([p.spread for p in model.parameters])
    theta = model.constrain(usual + 4 * spread * torch.randn(16, len(spread), generator=generator()))
    theta["baseline"] = torch.zeros(16)
    counts = torch.zeros(16, 20)
    counts[:, 4:8] = 300.0
    rest, full = (float(value) for value in model._brightness())
    bright = model.fluorescence(counts, theta, frame_rate) / model._gain(theta["dynamic_range"])[:, None] + rest
    assert bright.min() > -1e-5
    assert bright.max() < 1 + 1e-5
    assert bright.max() > 0.9 * full


@pytest.mark.parametrize("kind", [JGCaMP8f, GCaMP6s])
def test_kinetics_in_pieces_are_those_of_one_run(kind, monkeypatch):
    model, frame_rate = kind(), 10.0
    theta, counts = median_theta(model, 2), poisson(1.0, frame_rate, 2, 12 * 10)
    pieces = model.fluorescence(counts, theta, frame_rate)
    monkeypatch.setattr(kinetic_loop, "PIECE", 12.0)
    whole = model.fluorescence(counts, theta, frame_rate)
    # Frames are as long as the coarse ones, so that only the slow part of what long steps err by is left.
    assert 0 < (pieces - whole).abs().max() < 0.01 * whole.max()


def test_kinetics_of_long_recordings_start_pieces_from_memory(monkeypatch):
    model, frame_rate = JGCaMP8m(), 2.0
    theta, counts = median_theta(model, 2), poisson(2.0, frame_rate, 2, 2 * 30)
    one_run = model.fluorescence(counts, theta, frame_rate)
    monkeypatch.setattr(kinetic_loop, "MEMORY", 10.0)
    groups = model.fluorescence(counts, theta, frame_rate)
    # Ten seconds of the slowest rate, 0.9 /s.
    assert 0 < (groups - one_run).abs().max() < 2 * math.exp(-9) * one_run.max()


def test_kinetics_initial_theta():
    model, frame_rate = JGCaMP8m(), 15.0
    theta = median_theta(model, 3, dtype=torch.float32, noise_density=0.01)
    theta["calcium_per_spike"] *= torch.tensor([0.7, 1.0, 1.5])
    theta["dynamic_range"] *= torch.tensor([1.4, 1.0, 0.8])
    counts = poisson(1.0, frame_rate, 3, 150).float()
    observed = model.simulate(counts, theta, frame_rate, generator(1))
    guess = model.initial_theta(observed, counts, frame_rate)
    burst = torch.zeros(3, 30)
    burst[:, 3] = 2
    truth, found = (model.fluorescence(burst, t, frame_rate) - t["baseline"][:, None] for t in (theta, guess))
    assert ((found - truth).norm(dim=1) / truth.norm(dim=1)).max() < 0.3
    assert (guess["baseline"] - theta["baseline"]).abs().max() < 0.02
    fit = model.fit_theta(observed[:, :20], counts[:, :20], frame_rate, start=guess, n_steps=2)
    before, after = (
        model.log_prob(observed[:, :20], counts[:, :20], t, frame_rate) + model.log_prior(t) for t in (guess, fit)
    )
    assert (after >= before - 1e-3).all()
    assert (after > before + 1e-3).any()


# Prior ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_count", "rate"), [(1, 0.5), (1, 30.0), (3, 2.0), (10, 0.01), (10, 100.0)])
def test_spike_prior_sums_to_one_and_is_poisson_below_its_top(max_count, rate):
    prior = SpikePrior(torch.tensor(rate, dtype=torch.float64), max_count)
    log_p = prior.log_prob(torch.arange(max_count + 1.0)[:, None], 10.0)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
    poisson_log_p = torch.distributions.Poisson(rate / 10).log_prob(torch.arange(max_count * 1.0))
    assert torch.allclose(log_p[:-1], poisson_log_p.double(), atol=1e-5)
    if max_count == 1:
        assert float(log_p[1].exp()) == pytest.approx(1 - math.exp(-rate / 10))


def test_spike_prior_says_the_same_of_a_second_at_any_frame_rate():
    silent = [float(SpikePrior(2.0).log_prob(torch.zeros(n), float(n))) for n in (3, 30, 120)]
    assert silent == pytest.approx([-2.0] * 3, rel=1e-5)
    for frame_rate in (5.0, 50.0):
        counts = SpikePrior(2.0).sample((50, int(400 * frame_rate)), frame_rate, generator())
        # 20,000 s at 2 Hz: the standard error of the rate is √(2/20000).
        assert float(counts.sum() / 20_000) == pytest.approx(2.0, abs=4 * math.sqrt(2 / 20_000))


def test_spike_prior_masks_refuses_and_differentiates():
    prior = SpikePrior(torch.tensor([1.0, 4.0], requires_grad=True), 3)
    counts = torch.tensor([[0.0, 1.0, 9.0], [2.0, 0.0, 0.5]])
    valid = torch.tensor([True, True, False])
    masked = prior.log_prob(counts, 10.0, valid)
    assert torch.allclose(masked, prior.log_prob(counts[:, :2], 10.0))
    assert (prior.log_prob(counts, 10.0) == -math.inf).all()
    assert torch.isfinite(torch.autograd.grad(masked.sum(), prior.rate)[0]).all()
    with pytest.raises(ValueError, match="above 0 Hz"):
        SpikePrior(-1.0)
    with pytest.raises(ValueError, match="max_count"):
        SpikePrior(1.0, 0)


def test_the_busiest_stretch_tells_the_shape_of_a_long_recording(monkeypatch):
    model = MODELS["linear_ar"]()
    monkeypatch.setattr(linear_ar, "_ENOUGH", 900)
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.full((2, 6000), 0.002), generator=generator)
    counts[0, 1000:1900] = torch.poisson(torch.full((900,), 0.05), generator=generator)
    counts[1, 4000:4900] = torch.poisson(torch.full((900,), 0.05), generator=generator)
    truth = {p.name: torch.full((2,), p.median) for p in model.parameters} | {"noise_density": torch.full((2,), 0.004)}
    observed = model.simulate(counts, truth, 30.0, generator)
    found = model.first_guess(observed, counts, 30.0)
    stretch = torch.stack([torch.arange(1000, 1900), torch.arange(4000, 4900)])
    alone = model.first_guess(observed.gather(1, stretch), counts.gather(1, stretch), 30.0)
    for name in ("tau_decay", "amplitude"):
        # Earlier spikes still glow in the stretch; a frame more or less at its ends changes little.
        assert torch.allclose(found[name], alone[name], rtol=0.1)
        assert torch.allclose(found[name], truth[name], rtol=0.2)
    assert torch.allclose(found["noise_density"], truth["noise_density"], rtol=0.05)


def test_a_gap_does_not_hide_the_shape_of_the_rest():
    """Of a long trace the busiest stretch tells the shape, by the spikes in frames that were measured."""
    model, n = MODELS["linear_ar"](), 40_000
    counts = torch.poisson(torch.full((1, n), 0.02), generator=torch.Generator().manual_seed(0))
    theta = {"tau_rise": 0.08, "tau_decay": 1.2, "amplitude": 0.6, "baseline": 0.0, "noise_density": 0.01}
    theta = {name: torch.tensor([value]) for name, value in theta.items()}
    seen = model.simulate(counts, theta, 30.0, torch.Generator().manual_seed(1))
    seen[:, :17_000] = torch.nan
    counts[:, :17_000] += 1  # what a network may say of frames that it has not seen
    found = model.initial_theta(seen, counts, 30.0)
    for name in ("tau_rise", "tau_decay", "amplitude"):
        assert float(found[name]) == pytest.approx(float(theta[name]), rel=0.1)


def test_a_roi_has_its_theta_whatever_the_frame_rates_of_others():
    model, n = MODELS["linear_ar"](), 600
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.full((2, n), 0.1), generator=generator)
    theta = {p.name: torch.full((2,), p.median) for p in model.parameters}
    rate = torch.tensor([3.0, 120.0])
    seen = model.simulate(counts, theta, rate, generator) + 0.1 * torch.sin(torch.arange(n) / 48)
    both = model.initial_theta(seen, counts, rate)
    alone = model.initial_theta(seen[:1], counts[:1], rate[:1])
    for name, value in alone.items():
        assert float(both[name][0]) == pytest.approx(float(value[0]), rel=1e-4, abs=1e-6)


def test_cells_share_the_kinetics_of_an_indicator_and_neither_light_nor_noise():
    shared = {p.name for p in MODELS["jgcamp8f"](NOISES["correlated"]()).parameters if p.kinetic}
    assert shared == {"extrusion", "store_in", "store_out"}
    assert {p.name for p in MODELS["linear_ar"](NOISES["drift"]()).parameters if p.kinetic} == {"tau_rise", "tau_decay"}


@pytest.mark.parametrize("max_count", [1, 3, 10, 100])
def test_a_prior_sums_to_one_however_many_are_expected(max_count):
    mean = torch.logspace(-6, 3.5, 60, dtype=torch.float64).requires_grad_()
    table = SpikePrior(mean * 30, max_count).log_table(30.0, torch.device("cpu"))
    torch.testing.assert_close(table.exp().sum(-1), torch.ones_like(mean))
    assert torch.isfinite(table[:, -1]).all()
    (gradient,) = torch.autograd.grad(table[:, -1].sum(), mean)
    assert (gradient >= 0).all()  # more expected, more in the last


def test_a_flow_begins_the_same_every_time():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    one = NOISES["flow"]().learned.state_dict()
    assert torch.equal(torch.rand(2), wanted)
    torch.rand(5)
    for name, weight in NOISES["flow"]().learned.state_dict().items():
        assert torch.equal(weight, one[name])
