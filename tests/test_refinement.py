"""Refinement and gaps against enumeration: traces so short that every spike train can be written down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import napari_calvae as calvae
from napari_calvae.benchmark.paper.enumeration import all_trains
from napari_calvae.generative import MODELS, DriftingNoise, SpikePrior
from napari_calvae.recognition import NETWORKS
from napari_calvae.recognition.factorized import GainCategorical
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.refinement import RefineConfig, _refine_one, particles
from napari_calvae.refinement.particles import log_evidence
from napari_calvae.refinement.target import Target, at_each_gain
from napari_calvae.vae import SpikeVAE

N_FRAMES, FRAME_RATE = 6, 10.0
TRAINS = all_trains(N_FRAMES, 1).long()[:, None]  # (train, 1, time)


@pytest.fixture(scope="module")
def target():
    """Two ROIs of known θ, the second noisier, and a network that is to be ignored."""
    generator = torch.Generator().manual_seed(0)
    theta = {
        "tau_rise": torch.full((2,), 0.02),
        "tau_decay": torch.full((2,), 0.3),
        "amplitude": torch.full((2,), 0.2),
        "baseline": torch.zeros(2),
        "noise_density": torch.tensor([0.03, 0.05]),
    }
    counts = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]])
    model = MODELS["linear_ar"]()
    observed = model.simulate(counts, theta, FRAME_RATE, generator)
    vae = SpikeVAE(NETWORKS["factorized"](widths=(4, 6), max_count=1), model, SpikePrior(1.0, 1))
    dff = Traces(observed.numpy(), frame_rate=FRAME_RATE)
    prior = SpikePrior(torch.tensor([2.0, 2.0]), 1)
    return Target(dff, vae, observed, torch.ones_like(observed, dtype=torch.bool), theta, prior)


@pytest.fixture(scope="module")
def start():
    """A posterior that knows nothing: about the prior, gain in doubt."""
    logits = torch.zeros(2, 2, N_FRAMES)
    logits[:, 1] = -1.5
    return GainCategorical(logits, torch.zeros(2), torch.full((2,), 0.4))


def each(target, posterior):
    """ROI by ROI."""
    for row in range(len(target.observed)):
        one = slice(row, row + 1)
        yield (
            replace(
                target,
                dff=target.dff.select([row]),
                observed=target.observed[one],
                valid=target.valid[one],
                theta={name: value[one] for name, value in target.theta.items()},
                prior=SpikePrior(target.prior.rate[one], target.prior.max_count),
            ),
            posterior.select(one),
        )


def refined_by(config, target, posterior):
    parts = [
        _refine_one(one, q, config, torch.Generator().manual_seed(row))
        for row, (one, q) in enumerate(each(target, posterior))
    ]
    return GainCategorical.join(parts)


def exact(target, posterior):
    """(roi,) bound, evidence, by summing over all trains."""
    log_joint = target.log_joint(TRAINS.expand(-1, 2, -1).float())
    log_q = posterior.log_prob(TRAINS.expand(-1, 2, -1))
    assert torch.allclose(log_q.exp().sum(0), torch.ones(2), atol=1e-5)
    return (log_q.exp() * (log_joint - log_q)).sum(0), torch.logsumexp(log_joint, 0)


def best_factorised(target):
    """(roi,) the highest bound that independent frames reach: coordinate ascent from many starts, by enumeration."""
    log_joint = target.log_joint(TRAINS.expand(-1, 2, -1).float())
    trains = TRAINS[:, 0].float()
    best = torch.full((2,), -torch.inf)
    for seed in range(20):
        p = torch.rand(N_FRAMES, 2, generator=torch.Generator().manual_seed(seed))
        for _ in range(50):
            for t in range(N_FRAMES):
                log_bins = trains[..., None] * p.log() + (1 - trains[..., None]) * (1 - p).log()  # train time roi
                others = (log_bins.sum(1) - log_bins[:, t]).exp()
                field = ((2 * trains[:, t, None] - 1) * others * log_joint).sum(0)
                p[t] = torch.sigmoid(field).clamp(1e-5, 1 - 1e-5)
        log_q = (trains[..., None] * p.log() + (1 - trains[..., None]) * (1 - p).log()).sum(1)
        best = torch.maximum(best, (log_q.exp() * (log_joint - log_q)).sum(0))
    return best


def test_refinement_reaches_the_best_bound_of_its_family_by_enumeration(target, start):
    config = RefineConfig(n_steps=150, learning_rate=0.1, n_gradient=32)
    refined = refined_by(config, target, start)
    before, evidence = exact(target, start)
    after, _ = exact(target, refined)
    best = best_factorised(target)
    assert (best - before).min() > 0.2
    # Independent frames are a member of the family (gain deviation 0), so that it can do a little better, too.
    assert (best - after).max() < 0.1
    assert (after < evidence + 1e-4).all()


def test_bounds_and_evidence_agree_with_enumeration(target, start):
    generator = torch.Generator().manual_seed(0)
    log_weight = target.log_weights(start, 20_000, generator)
    bound, evidence = exact(target, start)
    error = log_weight.std(0) / 20_000**0.5
    assert ((log_weight.mean(0) - bound).abs() < 4 * error).all()
    estimate = torch.logsumexp(log_weight, 0) - np.log(20_000)
    relative = (log_weight - evidence).exp().std(0) / 20_000**0.5
    assert ((estimate - evidence).abs() < 4 * relative).all()


@pytest.mark.parametrize("memory", [5.0, 0.1])
def test_the_particle_filter_has_the_evidence_without_bias(target, start, memory, monkeypatch):
    """Its mean over runs against enumeration, from a posterior that knows nothing, with few particles.

    Also where it takes for over, on its way, what still glows.
    """
    monkeypatch.setattr(particles, "MEMORY", memory)
    _, evidence = exact(target, start)
    for row, (one, q) in enumerate(each(target, start)):
        generator = torch.Generator().manual_seed(row)
        runs = torch.tensor([log_evidence(one, q, 20, generator) for _ in range(64)], dtype=torch.float64)
        weight = (runs[:, 0] - evidence[row]).exp()
        assert float(weight.mean()) == pytest.approx(1, abs=4 * float(weight.std()) / 8)
        assert weight.std() > 0.01  # or the test could not fail
        assert ((runs[:, 1] >= 1) & (runs[:, 1] <= 20)).all()


def test_each_gain_has_its_share_of_the_posterior(start):
    table, log_node = at_each_gain(start)
    log_p = table[:, :, 1].cumsum(-1)[..., -1] + log_node[:, None]  # of the train with a spike in every frame
    assert torch.allclose(torch.logsumexp(log_p, 0), start.log_prob(torch.ones(2, N_FRAMES)), atol=1e-5)


def chain_evidence(target):
    """Log-evidence of a trace whose spikes show in their own frame and the next one: forward recursion over pairs."""
    theta, rate = target.theta, FRAME_RATE
    pairs = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])  # before, now
    clean = target.vae.generative.fluorescence(pairs[:, None], theta, rate)[:, 0, 1]
    seen = torch.distributions.Normal(clean.double(), target.vae.generative.noise_std(theta, rate).double())
    prior = target.prior.log_prob(torch.tensor([[0.0], [1.0]])[:, None], rate)[:, 0].double()
    log_p = torch.stack([seen.log_prob(target.observed[0, t]).reshape(2, 2) for t in range(target.observed.shape[-1])])
    forward = prior + log_p[0, 0]  # nothing before the first frame
    for t in range(1, len(log_p)):
        forward = torch.logsumexp(forward[:, None] + log_p[t], 0) + prior
    return float(torch.logsumexp(forward, 0))


def test_the_particle_filter_is_tight_on_a_long_trace():
    """60 s with some hundred spikes, where the importance-weighted bound with as many trains is tens of nats off."""
    n_frames, generator = 600, torch.Generator().manual_seed(0)
    # What is left of a spike two frames later is e^{−0.1/0.006} = 6e-8.
    values = {"tau_rise": 0.002, "tau_decay": 0.006, "amplitude": 3.0, "baseline": 0.0, "noise_density": 0.03}
    theta = {name: torch.full((1,), value) for name, value in values.items()}
    model, prior = MODELS["linear_ar"](), SpikePrior(torch.tensor([2.0]), 1)
    counts = prior.sample((1, n_frames), FRAME_RATE, generator)
    observed = model.simulate(counts, theta, FRAME_RATE, generator)
    vae = SpikeVAE(NETWORKS["factorized"](widths=(4, 6), max_count=1), model, prior)
    valid = torch.ones_like(observed, dtype=torch.bool)
    target = Target(Traces(observed.numpy(), frame_rate=FRAME_RATE), vae, observed, valid, theta, prior)
    # A posterior that sees each frame by itself and too little in it, expects too many spikes and doubts its gain.
    clean = model.fluorescence(torch.tensor([[1.0, 0]]), theta, FRAME_RATE)[0, 0]
    std = model.noise_std(theta, FRAME_RATE)
    logits = torch.stack([0 * observed, 0.3 * (observed - clean / 2) * clean / std**2 - 1.5], 1)
    q = GainCategorical(logits, torch.ones(1), torch.full((1,), 0.3))
    evidence = chain_evidence(target)
    runs = torch.tensor([log_evidence(target, q, 200, generator)[0] for _ in range(4)], dtype=torch.float64)
    log_weight = target.log_weights(q, 800, generator)[:, 0]
    bound = float(torch.logsumexp(log_weight, 0)) - np.log(800)
    # The logarithm of an unbiased estimate is low by half its variance, which the spread of four runs tells roughly.
    assert abs(float(runs.mean()) - evidence) < 4 * float(runs.std()) / 2 + float(runs.var()) + 0.05
    assert float(runs.std()) < 2
    assert bound < evidence - 20


def test_refinement_that_finds_nothing_better_returns_the_start(target, start):
    refined = refined_by(RefineConfig(n_steps=150, learning_rate=0.1, n_gradient=32), target, start)
    again = refined_by(RefineConfig(n_steps=3, learning_rate=8.0), target, refined)
    assert torch.equal(again.logits, refined.logits)
    assert torch.equal(again.gain_std, refined.gain_std)


@pytest.fixture(scope="module")
def recording():
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(4, 6), max_count=3)
    vae = SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(1.0, 3), description="untrained")
    model = MODELS["linear_ar"]()
    generator = torch.Generator().manual_seed(1)
    counts = SpikePrior(1.0, 3).sample((2, 300), 30.0, generator)
    theta = {
        "tau_rise": torch.full((2,), 0.02),
        "tau_decay": torch.full((2,), 0.4),
        "amplitude": torch.full((2,), 0.3),
        "baseline": torch.zeros(2),
        "noise_density": torch.full((2,), 0.01),
    }
    return Traces(model.simulate(counts, theta, 30.0, generator).numpy(), frame_rate=30.0, roi_ids=(4, 9)), vae, counts


def test_diagnose_orders_bounds_below_the_evidence(recording):
    traces, vae, _ = recording
    gaps = calvae.diagnose(traces, vae, n_steps=40, n_evidence=400)
    assert gaps.roi_ids == (4, 9)
    doubt = np.hypot(gaps.amortized_error, gaps.refined_error)
    assert (gaps.amortization_gap > 3 * doubt).all()  # the network is untrained
    assert (gaps.approximation_gap > -3 * np.hypot(gaps.refined_error, gaps.evidence_error)).all()
    assert ((gaps.effective_samples >= 1) & (gaps.effective_samples <= 400)).all()
    same = calvae.diagnose(traces, vae, n_steps=0, n_evidence=400)
    assert (np.abs(same.amortization_gap) < 4 * np.hypot(same.amortized_error, same.refined_error)).all()


def test_refinement_works_on_a_drifting_baseline(recording):
    """The drift is no spike's doing, and the evidence has it integrated out."""
    traces, vae, _ = recording
    slow = (0.2 * np.sin(np.arange(300) / 50)).astype(np.float32)
    drifting = traces.replace(values=traces.values + slow).select([0])
    model = SpikeVAE(vae.recognition, MODELS["linear_ar"](DriftingNoise(spacing=1.0)), vae.prior)
    plain, drift = (calvae.diagnose(drifting, m, n_steps=40, n_evidence=64) for m in (vae, model))
    assert drift.amortization_gap[0] > 3 * np.hypot(drift.amortized_error, drift.refined_error)[0]
    assert drift.evidence[0] > plain.evidence[0] + 3 * np.hypot(plain.evidence_error, drift.evidence_error)[0]


def test_refine_returns_an_inference_that_does_not_depend_on_company(recording):
    traces, vae, counts = recording
    result = calvae.refine(traces, vae, n_steps=60, n_samples=4, seed=3)
    assert result.rate.shape == traces.values.shape
    assert result.provenance["refinement"]["n_steps"] == 60
    alone = calvae.refine(traces.select([1]), vae, n_steps=60, n_samples=4, seed=3)
    np.testing.assert_allclose(alone.rate[0], result.rate[1], rtol=1e-3, atol=1e-3)
    truth = counts.numpy().ravel()
    before = np.corrcoef(calvae.infer(traces, vae, n_samples=0).rate.ravel(), truth)[0, 1]
    assert np.corrcoef(result.rate.ravel(), truth)[0, 1] > before + 0.1


def test_a_roi_that_keeps_the_answer_of_the_network_keeps_it_in_any_company(recording, monkeypatch):
    """Of which the gain has an end, as a refined one's has not."""
    traces, vae, _ = recording
    model = vae.copy()
    model.recognition.set_gain_scale(3.0)
    ends = []

    def second_is_kept(target, posterior, config, generator):
        found = posterior if target.dff.roi_ids == (9,) else posterior.given(posterior.gain_mean, posterior.gain_std)
        found.reach = posterior.reach if target.dff.roi_ids == (9,) else np.inf
        ends.append(found.reach)
        return found

    monkeypatch.setattr("napari_calvae.refinement._refine_one", second_is_kept)
    both, alone = (calvae.refine(t, model, n_samples=30) for t in (traces, traces.select([1])))
    assert len(set(ends)) == 2
    np.testing.assert_array_equal(both.rate[1], alone.rate[0])
    np.testing.assert_array_equal(both.samples([1]), alone.samples())


def test_a_posterior_without_a_gain_is_refined_with_one(recording):
    traces, vae, _ = recording
    torch.manual_seed(0)
    plain = SpikeVAE(NETWORKS["convolutional"](width=4, kernels=(5, 3), max_count=3), vae.generative, vae.prior)
    gaps = calvae.diagnose(traces, plain, n_steps=40, n_evidence=400)
    assert (gaps.amortization_gap > 3 * np.hypot(gaps.amortized_error, gaps.refined_error)).all()


def test_only_posteriors_with_parameters_can_be_refined(recording):
    traces, vae, _ = recording
    network = NETWORKS["autoregressive"](width=4, hidden=4, max_count=2)
    other = SpikeVAE(network, vae.generative, vae.prior)
    with pytest.raises(RecordingError, match="got 'autoregressive'"):
        calvae.refine(traces, other)
    with pytest.raises(ValueError, match="stepps"):
        calvae.refine(traces, vae, stepps=3)
