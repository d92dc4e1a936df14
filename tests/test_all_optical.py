"""All-optical: stimulation as a value, the coupled network against enumeration, the sampler against both."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import napari_calvae as calvae
from napari_calvae.all_optical.chain import Chain
from napari_calvae.all_optical.coupling import Coupling, stack
from napari_calvae.all_optical.spikes import Recording, move_spikes
from napari_calvae.generative.all_optical import AllOptical, Illumination, SparseWeights
from napari_calvae.metrics import score_correlation
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.stimulation import Stimulation, check_positions


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_theta(n_cells: int, dtype=torch.float64, **changes) -> dict[str, torch.Tensor]:
    """Cells alike, uncoupled unless ``weights`` are given."""
    values = {
        "tau_rise": 0.03,
        "tau_decay": 0.5,
        "amplitude": 0.3,
        "baseline": 0.05,
        "noise_density": 0.015,
        "drive": 0.8,
        "excitability": 12.0,
        "artefact": 0.4,
    } | {name: value for name, value in changes.items() if name not in ("falloff", "glare", "tau_coupling", "weights")}
    theta = {k: torch.as_tensor(v, dtype=dtype).expand(n_cells).clone() for k, v in values.items()}
    for name, value in (("falloff", 12.0), ("glare", 50.0), ("tau_coupling", 0.06)):
        theta[name] = torch.tensor(changes.get(name, value), dtype=dtype)
    weights = changes.get("weights", np.zeros((n_cells, n_cells)))
    return theta | {"weights": torch.as_tensor(np.asarray(weights), dtype=dtype)}


def dark(n_cells: int, n_frames: int, dtype=torch.float64) -> Illumination:
    return Illumination(torch.zeros(1, n_frames, dtype=dtype), torch.zeros(n_cells, 1, dtype=dtype))


def lit(n_cells: int, n_frames: int, frame_rate: float = 30.0, dtype=torch.float64) -> Illumination:
    """Pulses of 0.1 s on cells 0, 1, 0, … that stand 20 apart in a row."""
    positions = np.stack([20.0 * np.arange(n_cells), np.zeros(n_cells)], 1)
    onset = np.arange(0.3, n_frames / frame_rate - 0.2, 0.5)
    stimulation = Stimulation(onset, 0.1, tuple(positions[[k % 2]] for k in range(len(onset))))
    light = Illumination.of(stimulation, positions, n_frames, frame_rate)
    return Illumination(light.light.to(dtype), light.squared_distance.to(dtype))


# Stimulation ---------------------------------------------------------------------------------------------------------


def test_light_is_power_times_the_share_of_the_frame_with_the_laser_on():
    s = Stimulation([0.95, 2.0], [0.3, 0.05], ([(3.0, 4.0), (0.0, 1.0)], (3.0, 4.0)), power=[2.0, 1.0])
    np.testing.assert_array_equal(s.sites, [[0.0, 1.0], [3.0, 4.0]])
    # At 10 Hz and t0 = 0 frame k covers [k − ½, k + ½) / 10 s: the first pulse is all of frames 10 to 12, no more; the
    # second the last half of frame 20's… which begins at 1.95 and ends at 2.05.
    light = s.light(30, 10.0)
    expected = np.zeros((2, 30))
    expected[:, 10:13] = 2.0
    expected[1, 20] = 0.5
    np.testing.assert_allclose(light, expected, atol=1e-9)
    np.testing.assert_array_equal(s.lit(30, 10.0), expected.any(0))
    # Whatever frame rate and clock, power times duration is what arrives.
    for rate, t0 in ((7.3, 0.0), (30.0, -0.4), (211.0, 0.11)):
        n = int(5 * rate)
        np.testing.assert_allclose(s.light(n, rate, t0).sum(1) / rate, [0.6, 0.65])


def test_a_pulse_of_one_frame_lights_that_frame_alone():
    """Where it ends the next one begins, up to rounding."""
    begins = (np.arange(1, 300) - 0.5) / 30
    lit = np.array([Stimulation([t], 1 / 30, [(0.0, 0.0)]).lit(301, 30.0) for t in begins])
    np.testing.assert_array_equal(lit.argmax(1), np.arange(1, 300))
    assert (lit.sum(1) == 1).all()


def test_pulses_beyond_the_recording_are_cut_off():
    s = Stimulation([-1.0, 0.9, 7.0], 0.4, ((0, 0),) * 3)
    light = s.light(10, 10.0)
    # The recording ends at 0.95 s.
    assert light.sum() == pytest.approx(0.5)
    assert Stimulation([], 0.1, ()).light(5, 10.0).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([0.0, 1.0], 0.1, ((0, 0),)), "one set of positions for each of 2 pulses, got 1"),
        (([0.0], 0.0, ((0, 0),)), "duration: expected one number above 0"),
        (([0.0], 0.1, ((0, 0),), -1.0), "power: expected one number above 0"),
        (([0.0], [0.1, 0.2], ((0, 0),)), "duration: expected one number above 0 for each of 1"),
        (([math.nan], 0.1, ((0, 0),)), "onset: expected one finite time"),
        (([0.0], 0.1, ((0, 0, 0),)), "targets of pulse 0: expected finite positions"),
    ],
)
def test_contradictions_are_told(arguments, told):
    with pytest.raises(RecordingError, match=told):
        Stimulation(*arguments)


def test_positions_are_the_centroids_of_rois():
    labels = np.zeros((5, 8), int)
    labels[1:4, 2] = 3
    labels[4, 5:7] = 9
    np.testing.assert_allclose(RoiMasks.from_labels(labels).centroids, [[2, 2], [5.5, 4]])
    with pytest.raises(RecordingError, match="each of 3 cells, got 2"):
        check_positions([[0, 0], [1, 1]], 3)


# Model ---------------------------------------------------------------------------------------------------------------


def trains(n_cells: int, n_bins: int, most: int) -> torch.Tensor:
    """(train, cell, time) all counts up to ``most``."""
    every = torch.tensor(list(itertools.product(range(most + 1), repeat=n_cells * n_bins)))
    return every.reshape(-1, n_cells, n_bins)


def test_probabilities_of_all_trains_sum_to_one_and_are_those_of_simulate():
    n_bins, rate = 3, 10.0
    theta = make_theta(2, weights=[[-0.2, 0.0], [0.8, 0.0]], drive=[4.0, 1.0])
    light = lit(2, n_bins, rate)
    model = AllOptical()
    every = trains(2, n_bins, 5)
    p = model.log_prob_counts(every, theta, rate, light).exp()
    # No bin expects more than about 1.5 spikes, of which more than 5 come with a probability below 0.005.
    assert 0.98 < p.sum() <= 1
    n = 800
    g = generator()
    drawn = torch.stack([model.simulate(theta, rate, light, g)[0] for _ in range(n)])
    for statistic in (lambda s: s[:, 1, 2], lambda s: s[:, 0, 0] * s[:, 1, 1], lambda s: s[:, 1, 0] * s[:, 0, 1]):
        values = statistic(every.double())
        mean = (p * values).sum() / p.sum()
        std = ((p * values**2).sum() / p.sum() - mean**2).sqrt()
        assert abs(statistic(drawn).double().mean() - mean) < 4 * std / math.sqrt(n) + 0.02 * mean


def test_fluorescence_of_simulate_has_the_density_that_log_prob_says():
    theta, n_frames, rate = make_theta(3), 3000, 30.0
    light = lit(3, n_frames)
    model = AllOptical()
    counts, observed = model.simulate(theta, rate, light, generator())
    seen = model.log_prob(observed, counts, theta, rate, light) - model.log_prob_counts(counts, theta, rate, light)
    std = 0.015 * math.sqrt(rate)
    entropy = 0.5 + math.log(std) + 0.5 * math.log(2 * math.pi)
    # Half a chi-square variable per frame has variance 1/2.
    assert abs(float(seen) / observed.numel() + entropy) < 4 * math.sqrt(0.5 / observed.numel())
    holed = observed.clone()
    holed[:, 5:40] = torch.nan
    valid = torch.isfinite(holed)
    by_mask = model.log_prob(observed, counts, theta, rate, light, valid)
    assert torch.equal(by_mask, model.log_prob(holed, counts, theta, rate, light))


def test_gradients():
    model, light = AllOptical(), lit(2, 12, 10.0)
    theta = make_theta(2, weights=[[-0.1, 0.3], [0.2, -0.1]])
    u = model.unconstrain(theta)
    names = list(u)
    counts = torch.rand(2, 12, dtype=torch.float64, generator=generator()) + 0.1
    observed = torch.randn(2, 12, dtype=torch.float64, generator=generator(1))

    def log_p(s, *values):
        return model.log_prob(observed, s, model.constrain(dict(zip(names, values, strict=True))), 10.0, light)

    inputs = [counts.requires_grad_(), *(v.clone().requires_grad_() for v in u.values())]
    assert torch.autograd.gradcheck(log_p, inputs)
    with pytest.raises(ValueError, match="got none for glare"):
        model.unconstrain({k: v for k, v in theta.items() if k != "glare"})


def test_nothing_comes_before_its_cause():
    model, n_frames, rate = AllOptical(), 60, 30.0
    theta = make_theta(2, weights=[[-0.2, 0.0], [0.4, 0.0]])
    counts = torch.zeros(2, n_frames, dtype=torch.float64)
    counts[0, 20] = 1
    none = torch.zeros_like(counts)
    light = dark(2, n_frames)
    change = model.inputs(counts, theta, rate, light) - model.inputs(none, theta, rate, light)
    # A spike acts from the next frame on: on its own cell by −0.2, on the other by 0.4 spikes in all.
    assert change[:, :21].abs().max() == 0
    assert (change[:, 21].sign() == torch.tensor([-1.0, 1.0])).all()
    # e^{−39 / 1.8} of it is left at the end.
    assert torch.allclose(change.sum(1) / rate, torch.tensor([-0.2, 0.4], dtype=torch.float64), atol=1e-6)
    trace = model.fluorescence(counts, theta, rate, light)
    assert (trace[:, :20] - 0.05).abs().max() < 1e-12
    assert trace[0, 20] > 0.06
    assert (trace[1] - 0.05).abs().max() < 1e-12
    # Light acts while it is on, on cells and on fluorescence, and less further away.
    light = lit(2, n_frames)
    on = light.light[0] > 0
    inputs = model.inputs(none, theta, rate, light) - theta["drive"][:, None]
    assert (inputs[:, :9] == 0).all()
    assert inputs[0, 10] == pytest.approx(12.0)
    assert inputs[1, 10] == pytest.approx(12.0 * math.exp(-(20**2) / (2 * 12.0**2)))
    trace = model.fluorescence(none, theta, rate, light)
    assert trace[0, 10] == pytest.approx(0.05 + 0.4)
    assert trace[1, 10] == pytest.approx(0.05 + 0.4 * math.exp(-(20**2) / (2 * 50.0**2)))
    assert on.sum() >= 3


def test_frame_rate_matters_to_first_order_at_most():
    """Expected spikes of the other cell after one spike and one pulse, against frames of 1 ms."""
    model, theta = AllOptical(), make_theta(2, weights=[[0.0, 0.0], [0.5, 0.0]], drive=0.3)
    stimulation = Stimulation([0.41], 0.1, ((20.0, 0.0),))

    def expected(rate: float) -> float:
        n_frames = round(rate)
        counts = torch.zeros(2, n_frames, dtype=torch.float64)
        counts[0, round(0.4 * rate)] = 1
        light = Illumination.of(stimulation, np.array([[0.0, 0.0], [20.0, 0.0]]), n_frames, rate)
        light = Illumination(light.light.double(), light.squared_distance.double())
        return float(model.rates(model.inputs(counts, theta, rate, light))[1].sum() / rate)

    finest = expected(1000.0)
    errors = [abs(expected(rate) - finest) for rate in (20.0, 60.0, 180.0)]
    assert errors[0] < 0.05 * finest
    assert errors[2] < 0.3 * errors[0] + 1e-6


def test_an_activity_that_does_not_die_out_is_refused():
    with pytest.raises(ValueError, match=r"got 1\.20"):
        AllOptical().simulate(make_theta(2, weights=[[0.0, 1.2], [1.2, 0.0]]), 30.0, dark(2, 10))


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.0}, {"spike": 0.3}, {"spike": -1.0}])
def test_a_prior_of_weights_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="SparseWeights: expected a share between 0 and 1"):
        SparseWeights(**wrong)


def test_priors_are_densities():
    prior = SparseWeights()
    w = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    absent, present = prior.parts(w)
    assert torch.trapezoid(torch.logaddexp(absent, present).exp(), w) == pytest.approx(1, abs=1e-6)
    assert torch.trapezoid(present.exp(), w) == pytest.approx(prior.share, abs=1e-6)
    model = AllOptical()
    theta = model.sample_prior(2000, generator())
    weights = theta.pop("weights")
    others = ~torch.eye(2000, dtype=torch.bool)
    # The share of weights beyond five spike widths is that of the slab there: P(|z| > 5 · 0.02 / 0.3) = 0.739.
    assert float((weights[others].abs() > 0.1).float().mean()) == pytest.approx(0.1 * 0.739, rel=0.02)
    theta["weights"] = torch.zeros(1, 1)
    zero = float(model.prior.log_prob(theta["weights"]))
    # E[log p] of n normals is −Σ log(σ √(2πe)) with sampling variance n/2; the three shared ones are one draw each.
    cells = 2000 * sum(math.log(p.spread * math.sqrt(2 * math.pi * math.e)) for p in model.cell_parameters)
    shared = sum(math.log(p.spread * math.sqrt(2 * math.pi * math.e)) for p in model.shared_parameters)
    assert abs(float(model.log_prior(theta)) - zero + cells + shared) < 4 * math.sqrt(2000 * 8 / 2)


# Sampler -------------------------------------------------------------------------------------------------------------


def test_spike_moves_leave_the_enumerated_posterior_as_it_is():
    """Two coupled cells, four bins, all trains written down; a hundred copies of them lie side by side in time.

    Between the copies nothing is measured, and light on cells that it silences keeps spikes away.
    """
    rate, n_bins, n_copies, apart = 10.0, 4, 100, 40
    theta = make_theta(
        2,
        torch.float32,
        tau_decay=0.25,
        noise_density=0.06,
        drive=[2.0, 1.0],
        excitability=-60.0,
        artefact=0.0,
        tau_coupling=0.08,
        weights=[[-0.3, 0.0], [0.8, -0.1]],
    )
    model = AllOptical()
    _, seen = model.simulate(theta, rate, dark(2, n_bins, torch.float32), generator(5))
    every = trains(2, n_bins, 4)
    log_p = model.log_prob(seen, every, theta, rate, dark(2, n_bins, torch.float32))
    p = torch.softmax(log_p.double(), 0)

    n_frames = n_copies * apart
    inside = (torch.arange(n_frames) % apart) < n_bins
    light = Illumination((~inside).float()[None], torch.zeros(2, 1))
    observed = torch.zeros(2, n_frames)
    observed[:, inside] = seen.repeat(1, n_copies)
    valid = inside.float().expand(2, -1)
    proposal = 0.2 + torch.rand(2, n_frames, generator=generator(1))
    recording = Recording(observed, valid, rate, light, proposal)
    counts, g, kept = torch.zeros(2, n_frames), generator(2), []
    for k in range(65):
        counts = move_spikes(model, recording, counts, theta, g)
        if k >= 15:
            assert counts[:, ~inside].sum() == 0
            kept.append(counts[:, inside].reshape(2, n_copies, n_bins).transpose(0, 1))
    drawn = torch.stack(kept).double()  # sweep copy cell bin

    def compare(statistic):
        exact = (p * statistic(every.double())).sum()
        per_copy = statistic(drawn).mean(0)
        # Copies are independent, so that their spread says how far the mean may be off.
        assert abs(per_copy.mean() - exact) < 4.5 * per_copy.std() / math.sqrt(n_copies) + 1e-3

    for cell, t in itertools.product(range(2), range(n_bins)):
        compare(lambda s, i=cell, t=t: s[..., i, t])
    for t in range(n_bins - 1):
        compare(lambda s, t=t: s[..., 0, t] * s[..., 1, t + 1])
        compare(lambda s, t=t: s[..., 0, t] * s[..., 0, t + 1])
        compare(lambda s, t=t: s[..., 1, t] * s[..., 1, t + 1])
    compare(lambda s: (s.sum((-2, -1)) == 0).double())


@pytest.mark.slow
def test_the_chain_keeps_the_prior_where_data_are_made_anew_in_every_step():
    """Geweke's joint distribution test: F from p(F | s, θ), then s and θ by a sweep; θ must stay as the prior says."""
    rate, n_frames, n_cells = 10.0, 8, 2
    model, g = AllOptical(), generator(11)
    light = lit(n_cells, n_frames, rate, torch.float32)
    theta = make_theta(n_cells, torch.float32)
    counts, observed = model.simulate(theta, rate, light, g)
    ones = torch.ones_like(observed)
    chain = Chain(model, Recording(observed, ones, rate, light, 0.3 * ones), counts, theta, g)
    values: dict[str, list[np.ndarray]] = {p.name: [] for p in model.parameters} | {"own": [], "others": []}
    # As wide as the prior: so few frames say little.
    chain._steps = {name: torch.full_like(step, 0.7) for name, step in chain._steps.items()}
    for k in range(6000):
        clean = model.fluorescence(chain.counts, chain.theta, rate, light)
        noise = model.calcium.noise_std(chain.theta, rate)[:, None] * torch.randn(clean.shape, generator=g)
        chain.recording = replace(chain.recording, observed=clean + noise)
        chain.sweep()
        if k < 600:
            continue
        u = model.unconstrain(chain.theta)
        for p in model.parameters:
            values[p.name].append(((u[p.name] - p.centre) / p.spread).reshape(-1).numpy())
        weights = chain.theta["weights"].numpy()
        values["own"].append(np.diag(weights) / model.prior.slab)
        values["others"].append((np.abs(weights[[0, 1], [1, 0]]) > 0.1).astype(float))
    for name, rows in values.items():
        draws = np.array(rows)
        # P(|weight| > 0.1) is as in test_priors_are_densities; all else is standard normal.
        moments = [(draws, 0.0739)] if name == "others" else [(draws, 0.0), (draws**2, 1.0)]
        for x, expected in moments:
            blocks = x.mean(1)[: len(x) // 20 * 20].reshape(20, -1).mean(1)
            # The 20 block means are about independent; t with 19 degrees of freedom exceeds 4.5 with p = 2e-4.
            assert abs(blocks.mean() - expected) < 4.5 * blocks.std(ddof=1) / math.sqrt(20), name


def test_coupling_finds_the_mode_and_curvature_of_the_log_density():
    theta = make_theta(3, weights=0.1 * np.ones((3, 3)))
    model, rate, light = AllOptical(), 20.0, lit(3, 400, 20.0)
    counts, _ = model.simulate(theta, rate, light, generator())
    filtered, power = model.filtered(counts, theta, rate), light.reaching(theta["falloff"])
    connected = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    coupling = Coupling(model, counts, filtered, power, rate, connected)
    found = coupling.fit(stack(theta))
    for cell in range(3):

        def density(row, cell=cell):
            return coupling.log_density(found.mode.index_put((torch.tensor(cell),), row))[cell]

        slope = torch.autograd.functional.jacobian(density, found.mode[cell])
        hessian = torch.autograd.functional.hessian(density, found.mode[cell])
        precision = found.factor[cell] @ found.factor[cell].mT
        # Newton's method ends where a step would gain less than 1e-3 nats.
        assert slope @ torch.linalg.solve(precision, slope) < 1e-3
        assert torch.allclose(precision, -hessian, rtol=0.05, atol=0.05 * float(precision.abs().max()))


def small_experiment(seed: int, **changes) -> tuple[Traces, Stimulation, np.ndarray, dict, torch.Tensor]:
    """Four cells, cell 0 excites cell 1, cell 2 excites cell 3; two minutes."""
    n_frames, rate = 3600, 30.0
    positions = np.array([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    onset = np.arange(1.0, 119.0, 0.8)
    rng = np.random.default_rng(seed)
    stimulation = Stimulation(onset, 0.1, tuple(positions[[k]] for k in rng.integers(0, 4, len(onset))))
    weights = np.diag([-0.1] * 4)
    weights[1, 0], weights[3, 2] = 0.6, 0.5
    theta = make_theta(4, torch.float32, weights=changes.pop("weights", weights), **changes)
    light = Illumination.of(stimulation, positions, n_frames, rate)
    counts, observed = AllOptical().simulate(theta, rate, light, generator(seed))
    return Traces(observed.numpy(), rate), stimulation, positions, theta, counts


#: With fewer sweeps at the start the chain has not settled on some processors, whose roundings take it elsewhere.
QUICK = {"n_start": 12, "n_settle": 24, "n_samples": 16}


@pytest.fixture(scope="module")
def recovered():
    traces, stimulation, positions, theta, counts = small_experiment(0)
    return calvae.infer_all_optical(traces, stimulation, positions, **QUICK), theta, counts


def test_connections_spikes_and_artefact_are_recovered(recovered):
    result, theta, counts = recovered
    true = theta["weights"].numpy()
    others = ~np.eye(4, dtype=bool)
    assert (np.abs(result.connectivity - true)[others] < 4 * result.connectivity_std[others] + 0.05).all()
    assert (result.connection[others & (true > 0)] > 0.9).all()
    assert (result.connection[others & (true == 0)] < 0.5).all()
    low, high = result.interval(0.9)
    assert (low <= high).all()
    # Every cell's spikes are better than those that the network sees between the pulses.
    unlit = np.where(result.stimulation.lit(3600, 30.0), np.nan, result.spikes.traces.values)
    network = calvae.infer(result.spikes.traces.replace(values=unlit), n_samples=0)
    ours, theirs = (score_correlation(x.rate, counts.numpy()) for x in (result, network))
    assert (ours > theirs).all()
    assert ours.mean() > theirs.mean() + 0.05
    # Fluorescence says what spikes make together; how many share in it, a cell's few bursts tell less well.
    number, amplitude = result.rate.sum(1) / 30.0, result.spikes.theta["amplitude"]
    np.testing.assert_allclose(number * amplitude, counts.sum(1).numpy() * 0.3, rtol=0.1)
    np.testing.assert_allclose(number, counts.sum(1).numpy(), rtol=0.25)
    np.testing.assert_allclose(result.spikes.theta["artefact"], 0.4, rtol=0.1)
    assert result.shared["tau_coupling"] == pytest.approx(0.06, rel=0.6)


def test_the_reconstruction_is_response_artefact_and_baseline(recovered):
    result, _, _ = recovered
    baseline = result.spikes.theta["baseline"][:, None]
    np.testing.assert_allclose(result.response + result.artefact + baseline, result.spikes.reconstruction, atol=1e-4)
    residual = result.spikes.traces.values - result.spikes.reconstruction
    # The spread is that of noise and samples together: what is left over has to fit it.
    assert np.mean(np.abs(residual) < 2 * result.spikes.reconstruction_std) == pytest.approx(0.954, abs=0.03)
    assert result.samples().shape == (16, 4, 3600)
    assert result.spikes.provenance["all_optical"]["n_samples"] == 16
    assert result.spikes.provenance["generative_model"] == "all_optical"
    np.testing.assert_allclose(result.samples().mean(0) * 30.0, result.rate, atol=1e-3)


@pytest.mark.parametrize(("excitability", "artefact"), [(0.0, 0.6), pytest.param(15.0, 0.0, marks=pytest.mark.slow)])
def test_artefact_and_evoked_spikes_are_not_taken_for_each_other(excitability, artefact):
    traces, stimulation, positions, _, counts = small_experiment(
        3, excitability=excitability, artefact=artefact, weights=np.zeros((4, 4))
    )
    first = traces.replace(values=traces.values[:, :1800])
    result = calvae.infer_all_optical(first, stimulation, positions, n_start=4, n_settle=8, n_samples=10)
    np.testing.assert_allclose(result.spikes.theta["artefact"], artefact, atol=0.04)
    lit_frames = stimulation.lit(1800, 30.0)
    evoked, true = (x[:, lit_frames].sum() for x in (result.rate / 30.0, counts[:, :1800].numpy()))
    # Of N spikes a Poisson number is there by chance; a spike is put into a lit frame or its neighbour.
    assert abs(evoked - true) < 3 * math.sqrt(true) + 3
    # Where light evokes nothing, how far below zero its input is stays open.
    assert (np.abs(result.excitability - excitability) < 4 * result.excitability_std).all()


def test_every_sweep_is_reported_and_repeatable():
    traces, stimulation, positions, _, _ = small_experiment(1)
    short = traces.replace(values=traces.values[:, :300])
    runs = []
    for _ in range(2):
        steps = calvae.iter_all_optical(short, stimulation, positions, n_start=1, n_settle=2, n_samples=3)
        records = list(steps)
        assert [r.stage for r in records] == ["start"] * 4 + ["settle"] * 2 + ["sample"] * 3
        assert [r.step for r in records] == list(range(1, 10))
        assert {r.n_steps for r in records} == {9}
        runs.append(records)
    for a, b in zip(*runs, strict=True):
        assert a.log_joint == b.log_joint
        np.testing.assert_array_equal(a.connectivity, b.connectivity)


def test_a_recording_of_a_second_is_no_error():
    traces, stimulation, positions, _, _ = small_experiment(1)
    short = traces.replace(values=traces.values[:, 20:50], t0=20 / 30)
    result = calvae.infer_all_optical(short, stimulation, positions, n_start=1, n_settle=1, n_samples=2)
    assert np.isfinite(result.connectivity).all()
    assert np.isfinite(result.rate).all()


def test_input_that_does_not_go_together_is_told():
    traces, stimulation, positions, _, _ = small_experiment(1)
    short = traces.replace(values=traces.values[:, :200])
    with pytest.raises(RecordingError, match="each of 4 cells, got 3"):
        calvae.infer_all_optical(short, stimulation, positions[:3])
    late = Stimulation([500.0], 0.1, (positions[:1],))
    with pytest.raises(RecordingError, match="got none among 1"):
        calvae.infer_all_optical(short, late, positions)
    always = Stimulation([-1.0], 100.0, (positions[:1],))
    with pytest.raises(RecordingError, match="frames without light"):
        calvae.infer_all_optical(short, always, positions)
    with pytest.raises(ValueError, match="n_sweeps"):
        calvae.infer_all_optical(short, stimulation, positions, n_sweeps=3)
