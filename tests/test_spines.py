"""Shaft and spines: the model against enumeration, its network, its training, and the public entry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import napari_calvae as calvae
from napari_calvae import objectives
from napari_calvae.benchmark.paper import spines as proof
from napari_calvae.generative import DendriticSpine, LinearAR, SpikePrior
from napari_calvae.metrics import score_correlation, smooth_spikes
from napari_calvae.pretrained.dendrites import FRAME_RATES, _follow, simulate_dendrites
from napari_calvae.recognition import FactorizedNetwork, SpineNetwork
from napari_calvae.recognition.base import trace_features
from napari_calvae.recognition.spines import _slopes
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.vae import ModelError, SpikeVAE, load_model

FRAME_RATE = 10.0
THETA = {
    "tau_rise": (0.02, 0.03),
    "tau_decay": (0.3, 0.2),
    "amplitude": (0.5, 0.4),
    "synaptic_rise": (0.05, 0.05),
    "synaptic_decay": (0.5, 0.4),
    "synaptic_amplitude": (0.3, 0.5),
    "baseline": (0.1, -0.1),
    "noise_density": (0.05, 0.06),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def theta_of(*columns: int) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64)[list(columns)] for name, values in THETA.items()}


# The model -----------------------------------------------------------------------------------------------------------

#: Every train of one shaft and one spine over 6 frames with at most one spike each: 2^12 of them.
TRAINS = torch.tensor(list(itertools.product((0, 1), repeat=12))).reshape(-1, 2, 6)
PRIOR = SpikePrior(rate=torch.tensor(2.0, dtype=torch.float64), max_count=1)


def enumerate_posterior(observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch,) log-evidence of dendrites (batch, 2, time), and the probability of a spike in each bin."""
    log_p = DendriticSpine().log_prob(observed[:, None], TRAINS, theta_of(0, 1), FRAME_RATE).sum(-1)
    log_p = log_p + PRIOR.log_prob(TRAINS, FRAME_RATE).sum(-1)
    evidence = torch.logsumexp(log_p, -1)
    share = (log_p - evidence[:, None]).exp()
    return evidence, torch.einsum("bn,nct->bct", share, TRAINS.double())


def test_evidence_equals_an_enumeration_by_hand():
    """Every train's fluorescence as a sum of shifted responses to one spike, its likelihood frame by frame."""
    model, theta = DendriticSpine(), theta_of(0, 1)
    observed = model.simulate(TRAINS[777], theta, FRAME_RATE, generator()).numpy()
    one = torch.zeros(6, dtype=torch.float64)
    one[0] = 1
    responses = []
    for column, prefix in ((0, ""), (1, ""), (1, "synaptic_")):
        own = {
            name: torch.tensor(THETA[key][column], dtype=torch.float64)
            for name, key in (
                ("tau_rise", f"{prefix}rise" if prefix else "tau_rise"),
                ("tau_decay", f"{prefix}decay" if prefix else "tau_decay"),
                ("amplitude", f"{prefix}amplitude"),
            )
        }
        responses.append(LinearAR().fluorescence(one, own | {"baseline": torch.tensor(0.0).double()}, FRAME_RATE))
    bap_in_shaft, bap_in_spine, input_in_spine = (r.numpy() for r in responses)
    p = 1 - np.exp(-2.0 / FRAME_RATE)
    total = 0.0
    for baps, inputs in TRAINS.numpy():
        shaft = THETA["baseline"][0] + np.convolve(baps, bap_in_shaft)[:6]
        spine = THETA["baseline"][1] + np.convolve(baps, bap_in_spine)[:6] + np.convolve(inputs, input_in_spine)[:6]
        density = 1.0
        for row, (expected, noise) in enumerate(zip((shaft, spine), THETA["noise_density"], strict=True)):
            sd = noise * np.sqrt(FRAME_RATE)
            density *= np.prod(np.exp(-0.5 * ((observed[row] - expected) / sd) ** 2) / (sd * np.sqrt(2 * np.pi)))
        n = baps.sum() + inputs.sum()
        total += density * p**n * (1 - p) ** (12 - n)
    evidence, _ = enumerate_posterior(torch.from_numpy(observed)[None])
    assert float(evidence) == pytest.approx(np.log(total), abs=1e-9)


def test_posterior_is_calibrated_on_what_the_model_simulates():
    n = 150
    counts = PRIOR.sample((n, 2, 6), FRAME_RATE, generator()).double()
    observed = DendriticSpine().simulate(counts, theta_of(0, 1), FRAME_RATE, generator(1))
    _, p = enumerate_posterior(observed)
    # The truth is a draw from the posterior: its sum differs by the root of Σ p(1 − p), neighbours anticorrelate.
    for row in range(2):
        spread = float((p[:, row] * (1 - p[:, row])).sum().sqrt())
        assert abs(float(counts[:, row].sum() - p[:, row].sum())) < 4 * spread
    # And it knows something: the truth is much more probable than the prior makes it.
    assert p[counts > 0].mean() > 2 * (1 - np.exp(-2.0 / FRAME_RATE))


def test_a_transient_of_the_spine_is_explained_by_that_of_the_shaft():
    theta = theta_of(0, 1)
    counts = torch.zeros(2, 6, dtype=torch.float64)
    counts[0, 2] = 1
    both = DendriticSpine().fluorescence(counts, theta, FRAME_RATE)
    apart = both.clone()
    apart[0] = theta["baseline"][0]
    _, p = enumerate_posterior(torch.stack([both, apart]))
    assert p[0, 0, 2] > 0.9 > 0.5 > p[1, 0, 2]
    assert p[0, 1].sum() < 0.5 * p[1, 1].sum()


def test_inputs_stay_in_their_spine_and_action_potentials_reach_all():
    model = DendriticSpine()
    theta = theta_of(0, 1, 1)
    none = torch.zeros(3, 30, dtype=torch.float64)
    for row in range(3):
        counts = none.clone()
        counts[row, 4] = 1
        changed = (model.fluorescence(counts, theta, 20.0) - model.fluorescence(none, theta, 20.0)).abs().amax(-1) > 0
        assert changed.tolist() == ([True] * 3 if row == 0 else [r == row for r in range(3)])
        bap, synaptic = model.parts(counts, theta, 20.0)
        torch.testing.assert_close(bap + synaptic + theta["baseline"][:, None], model.fluorescence(counts, theta, 20.0))
        assert not synaptic[0].any()
    with pytest.raises(ValueError, match="compartment, time"):
        model.fluorescence(none[0], theta, 20.0)


def test_both_parts_of_theta_are_recovered():
    model, n_frames = DendriticSpine(), 6000
    theta = {name: value.float() for name, value in theta_of(0, 1, 1, 1).items()}
    theta["amplitude"] = theta["amplitude"] * torch.tensor([1.0, 0.3, 1.0, 3.0])
    counts = torch.poisson(torch.tensor([1.0, 0.5, 0.5, 0.5])[:, None].expand(-1, n_frames) / 30, generator=generator())
    observed = model.simulate(counts, theta, 30.0, generator(1))
    guess = model.initial_theta(observed, counts, 30.0)
    # A tenth of its size is the standard error of the smallest amplitude, 0.12: σ/√(Σ k²) = 0.33/√(200 · 3.5), and the
    # others' is smaller; three of them.
    assert ((guess["amplitude"] / theta["amplitude"]).log().abs() < 0.3).all()
    assert ((guess["synaptic_amplitude"] / theta["synaptic_amplitude"]).log().abs()[1:] < 0.3).all()


# The network ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = SpineNetwork((4, 6), (5, 4), n_shared=3, max_count=1).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def test_bounds_from_the_network_meet_the_enumerated_evidence(network):
    observed = DendriticSpine().simulate(TRAINS[2048 + 5], theta_of(0, 1), FRAME_RATE, generator())
    evidence, _ = enumerate_posterior(observed[None])
    with torch.no_grad():
        posterior = network(observed, FRAME_RATE)
        counts = posterior.sample(20_000, generator())
        log_q = posterior.log_prob(counts).sum(-1)
        log_p = DendriticSpine().log_prob(observed, counts, theta_of(0, 1), FRAME_RATE).sum(-1)
        log_p = log_p + PRIOR.log_prob(counts, FRAME_RATE).sum(-1)
    weight = (log_p - log_q - evidence).exp()
    error = float(weight.std() / len(weight) ** 0.5)
    assert error < 0.1
    # The quadrature of the gain leaves a hundredth.
    assert abs(float(weight.mean()) - 1) < 4 * error + 0.01
    bound = -float(objectives.elbo(log_p[:, None], log_q[:, None]))
    assert bound < float(evidence)
    assert -float(objectives.iwae(log_p[:, None], log_q[:, None])) == pytest.approx(
        float(evidence), abs=4 * error + 0.01
    )


def test_many_dendrites_in_one_pass_are_each_by_itself(network):
    f = torch.randn(3, 4, 50, generator=generator(), dtype=torch.float64).cumsum(-1)
    f[1, :, 10:20] = torch.nan
    rates = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64)
    whole = network.together(f, rates).mean.unflatten(0, (3, 4))
    for i in range(3):
        torch.testing.assert_close(whole[i], network(f[i], float(rates[i])).mean)
    assert network(f[0, :2], 30.0).mean.shape == (2, 50)
    with pytest.raises(ValueError, match="at least one spine"):
        network(f[0, :1], 30.0)


def test_the_shaft_listens_to_its_spines_and_they_to_it(network):
    f = torch.randn(3, 60, generator=generator(), dtype=torch.float64).cumsum(-1)
    before = network(f, 30.0).mean
    for row in range(3):
        other = f.clone()
        other[row] = other[row].flip(-1)
        moved = (network(other, 30.0).mean - before).abs().amax(-1)
        assert (moved > 1e-9).all()


def test_the_slope_is_that_of_action_potentials_alone():
    rng = np.random.default_rng(0)
    kernel = np.exp(-np.arange(30) / 8)
    baps, inputs = (np.convolve(rng.poisson(rate, 6000), kernel)[:6000] for rate in (0.02, 0.01))
    shares = torch.tensor([1.0, 0.2, 0.6, 1.5], dtype=torch.float64)
    values = shares[:, None] * torch.from_numpy(baps) + 0.05 * torch.from_numpy(rng.standard_normal((4, 6000)))
    values[1:] += 1.5 * torch.from_numpy(inputs)
    features = trace_features(values)
    # Features are in units of each trace's own noise, as estimated: slopes are, too.
    unit = (values - values.median(-1, keepdim=True).values).std(-1) / features[:, 0].sinh().std(-1)
    found = _slopes(features, 4) * unit / unit[0]
    assert found[0] == pytest.approx(1.0)
    # Inputs are there in a fifth of the frames. Noise dilutes slopes by a hundredth.
    torch.testing.assert_close(found, shares, atol=0.1, rtol=0)


# Training ------------------------------------------------------------------------------------------------------------


def test_simulated_dendrites_are_what_they_are_said_to_be():
    batch, again, other = (simulate_dendrites(3, 2, 400, seed) for seed in (5, 5, 6))
    assert batch.fluorescence.shape == batch.counts.shape == (3, 3, 400)
    assert torch.equal(batch.counts, again.counts)
    assert not torch.equal(batch.counts, other.counts)
    assert all(FRAME_RATES[0] <= simulate_dendrites(1, 1, 20, seed).frame_rate <= FRAME_RATES[1] for seed in range(20))
    assert (batch.counts == batch.counts.round()).all()
    many = [simulate_dendrites(8, 1, 200, seed) for seed in range(20)]
    missing = np.mean([b.fluorescence.isnan().any(-1).float().mean() for b in many])
    # One in twelve of 160, all of whose compartments lose the same frames.
    assert abs(missing - 1 / 12) < 4 * np.sqrt(1 / 12 * 11 / 12 / 160)


def test_followers_come_when_and_as_often_as_they_should():
    counts = torch.zeros(1, 60_000)
    counts[0, ::20] = 1
    burst = _follow(counts, torch.tensor([0.4]), torch.tensor([3.0]), generator())
    assert set(burst.nonzero()[:, 1].remainder(20).tolist()) == {0, 3, 6, 9}
    # Of 3,000 events 0.4, 0.16 and 0.064 are followed by a first, a second and a third.
    for step, p in enumerate((0.4, 0.16, 0.064), 1):
        assert abs(float(burst[0, 3 * step :: 20].mean()) - p) < 4 * (p * (1 - p) / 3000) ** 0.5


def test_training_resumes_and_what_it_saves_can_be_loaded(tmp_path):
    from napari_calvae.pretrained import train_spines

    out = tmp_path / "spines.safetensors"
    train_spines.main(out, steps=2)
    first = SpikeVAE.load(out)
    assert first.recognition.coupled
    assert first.generative.name == "dendritic_spine"
    assert (tmp_path / "spines.checkpoint").is_file()
    train_spines.main(out, steps=2)  # nothing is left to do
    for a, b in zip(first.recognition.parameters(), SpikeVAE.load(out).recognition.parameters(), strict=True):
        assert torch.equal(a, b)


# The public entry ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dendrite():
    return proof.simulate_dendrite(0.5, np.inf, 2, 120.0, np.random.default_rng(3))


@pytest.fixture(scope="module")
def result(dendrite):
    traces = dendrite.traces.select([1, 0, 2]).replace(roi_ids=(7, 4, 9))
    return calvae.infer_spines(traces, shaft=4, n_samples=30, seed=1, device="cpu")


def test_inputs_and_action_potentials_are_found(dendrite, result):
    assert (result.shaft, result.spines) == (4, (7, 9))
    assert result.bap_rate.shape == (3600,)
    assert result.synaptic_rate.shape == (2, 3600)
    truth, found = (smooth_spikes(x, 30.0, 0.1) for x in (dendrite.counts, result.inference.rate))
    assert score_correlation(found[0], truth[0]) > 0.8
    assert (score_correlation(found[1:], truth[1:]) > 0.7).all()
    baps, inputs = result.samples()
    assert baps.shape == (30, 3600)
    assert inputs.shape == (30, 2, 3600)
    low, high = result.interval(0.9, window=10.0)[1]
    assert low.shape == (2, 12)
    assert (low <= high).all()


def test_explaining_action_potentials_away_leaves_fewer_false_inputs():
    found = {0: [], 2: []}
    for seed in range(3):
        dendrite = proof.simulate_dendrite(0.5, np.inf, 2, 120.0, np.random.default_rng([20, seed]))
        for n_rounds, group in found.items():
            ours = calvae.infer_spines(dendrite.traces, shaft=1, n_rounds=n_rounds, n_samples=0, device="cpu")
            group.append(proof.Found(dendrite, {proof.OURS: ours.synaptic_rate}, ours))
    once, thrice = found.values()
    form = proof._form(proof.OURS, 0)
    assert proof.false_inputs(thrice, form) < 0.8 * proof.false_inputs(once, form)
    assert proof.correlations(thrice, form).mean() > proof.correlations(once, form).mean()
    # What is known of the shaft stays as it was.
    assert all(np.array_equal(a.ours.bap_rate, b.ours.bap_rate) for a, b in zip(once, thrice, strict=True))


def test_parts_add_up_to_the_reconstruction(result):
    whole = result.bap + result.synaptic + result.theta["baseline"][:, None]
    assert not result.synaptic[0].any()
    assert result.bap.max() > 0.1
    assert result.synaptic[1:].max() > 0.1
    # The mean over 30 samples differs from the mean of the posterior by a fifth of their spread, and their spread is
    # below the signal's.
    reconstruction = result.inference.reconstruction
    assert np.abs(reconstruction - whole).mean() < 0.2 * (whole.std(-1)).mean()
    assert (result.inference.quality["reconstruction_r2"] > 0.3).all()


def test_the_answer_repeats_and_depends_on_the_shaft(dendrite, result):
    traces = dendrite.traces.select([1, 0, 2]).replace(roi_ids=(7, 4, 9))
    again = calvae.infer_spines(traces, shaft=4, n_samples=30, seed=1, device="cpu")
    assert np.array_equal(again.inference.events, result.inference.events)
    other = calvae.infer_spines(traces, shaft=7, n_samples=0, device="cpu")
    assert other.spines == (4, 9)
    assert other.inference.n_samples == 0
    assert not np.array_equal(other.bap_rate, result.bap_rate)


def test_what_cannot_be_is_refused_in_words(dendrite):
    traces = dendrite.traces
    with pytest.raises(RecordingError, match=r"shaft: expected the id of a ROI \(1, 2, 3\), got 8"):
        calvae.infer_spines(traces, shaft=8)
    with pytest.raises(RecordingError, match="at least one ROI beside the shaft"):
        calvae.infer_spines(traces.select([0]), shaft=1)
    with pytest.raises(RecordingError, match="n_rounds: expected 0 or more, got -1"):
        calvae.infer_spines(traces, shaft=1, n_rounds=-1)
    with pytest.raises(RecordingError, match="amplitude: expected a model with a gain and an amplitude"):
        calvae.infer_spines(traces, shaft=1, amplitude=0.3)
    with pytest.raises(RecordingError, match="expected 10 to 60 Hz"):
        calvae.infer_spines(Traces(traces.values, 200.0), shaft=1)
    with pytest.raises(ModelError, match="expected one for a shaft with its spines"):
        calvae.infer_spines(traces, shaft=1, model="universal")
    for call in (calvae.infer, calvae.fit, calvae.refine, calvae.diagnose):
        with pytest.raises(ModelError, match="infer_spines"):
            call(traces, "spines")
    with pytest.raises(RecordingError, match="expected one of linear_ar"):
        calvae.fit(traces, generative="dendritic_spine")
    single = FactorizedNetwork((4, 6))
    with pytest.raises(ModelError, match="got one for traces that are each a cell's"):
        load_model(SpikeVAE(single, LinearAR(), PRIOR), coupled=True)


# The proof's own pieces ----------------------------------------------------------------------------------------------


def test_robust_regression_takes_out_the_shaft():
    rng = np.random.default_rng(0)
    shaft = np.convolve(rng.poisson(0.03, 3000), np.exp(-np.arange(40) / 10))[:3000]
    inputs = np.zeros(3000)
    inputs[rng.choice(3000, 150)] = 2.0
    noise = 0.02 * rng.standard_normal(3000)
    left = proof.robust_residual(0.7 * shaft + 0.3 + inputs + noise, shaft)
    # Slope and offset have standard errors below 0.002; inputs, far off, have no weight.
    assert np.abs(left - inputs - noise).max() < 0.02


def test_correlation_at_action_potentials_sees_nothing_else():
    counts = np.zeros((2, 300))
    counts[0, [60, 150, 240]] = 1
    counts[1, [61, 200]] = 1
    dendrite = proof.Dendrite(Traces(np.random.default_rng(0).normal(size=(2, 300)), 30.0), counts, np.ones(1))
    train = counts[1:].copy()
    train[0, 200] = 0  # missed, far from any action potential: 1.3 s
    found = proof.Found(dendrite, {"x": train}, None)
    assert proof.correlations([found], lambda f: f.trains["x"], at_baps=True)[0] == pytest.approx(1.0)
    assert proof.correlations([found], lambda f: f.trains["x"])[0] < 0.8


def test_false_inputs_are_those_at_lone_action_potentials():
    counts = np.zeros((2, 300))
    counts[0, [50, 150, 250]] = 1
    counts[1, [160, 20]] = 1  # the second action potential is not alone
    dendrite = proof.Dendrite(Traces(np.random.default_rng(0).normal(size=(2, 300)), 30.0), counts, np.ones(1))
    train = np.zeros((1, 300))
    train[0, [51, 160, 100, 20]] = 0.5
    found = proof.Found(dendrite, {"x": train}, None)
    # Scaled to two inputs, a quarter of them at one of two lone action potentials.
    assert proof.false_inputs([found], lambda f: f.trains["x"]) == pytest.approx(2 * 0.25 / 2)


def test_widened_gains_of_a_dendrite_end_where_those_of_its_parts_do():
    torch.manual_seed(0)
    network = SpineNetwork((4, 6, 8), (4, 5, 6), n_shared=3, max_count=2, gain_scale=3.0)
    seen = torch.randn(3, 200, generator=generator())
    found = network(seen, FRAME_RATE)
    shaft = network.shaft.posterior(torch.zeros(1, 3, 8), torch.zeros(1), torch.zeros(1, 8))
    assert found.reach == shaft.reach < torch.inf
    assert network.set_gain_scale(1.0) is None
    assert network(seen, FRAME_RATE).reach == torch.inf
