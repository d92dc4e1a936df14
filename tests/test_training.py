"""The training loop: resumes bit for bit, averages, and fits recordings with and without true spikes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from napari_calvae.fitting import fit, iter_fit
from napari_calvae.fitting.losses import Snippets
from napari_calvae.fitting.sleep import Dreams
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recognition import NETWORKS
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.training import TrainConfig, iter_train
from napari_calvae.vae import SpikeVAE


def noisy_regression(module):
    def loss(generator):
        x = torch.randn(32, 3, generator=generator)
        return ((module(x) - x.sum(-1, keepdim=True)) ** 2).mean(), {}

    return loss


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_training_resumes_bit_for_bit(tmp_path):
    config = TrainConfig(n_steps=40, learning_rate=0.05, ema=0.9, checkpoint_every=10)
    undisturbed = linear()
    losses = [r.loss for r in iter_train(undisturbed, noisy_regression(undisturbed), config)]
    broken = linear()
    for record in iter_train(broken, noisy_regression(broken), config, tmp_path / "c"):
        if record.step == 25:
            break
    resumed = nn.Linear(3, 1)
    rest = [r.loss for r in iter_train(resumed, noisy_regression(resumed), config, tmp_path / "c")]
    assert rest == losses[20:]
    assert torch.equal(undisturbed.weight, resumed.weight)
    assert losses[-1] < 0.1 * losses[0]


def test_training_stops_when_what_is_held_out_gets_worse_and_goes_back():
    """Each step adds to the only weight; what is held out likes it best at 0.5."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    values = []

    def loss(generator):
        return -module.weight.sum(), {}

    def held_out():
        values.append(abs(float(module.weight.detach()) - 0.5))
        return values[-1]

    config = TrainConfig(
        n_steps=200, learning_rate=0.02, warmup=0, cosine=False, weight_decay=0, check_every=5, patience=3
    )
    records = list(iter_train(module, loss, config, held_out=held_out))
    assert len(records) == 40  # 25 steps to the best, three checks of five steps beyond
    assert float(module.weight.detach()) == pytest.approx(0.5, abs=1e-3)
    assert [r.terms["held_out"] for r in records if r.terms] == values[1:]


def test_checkpoints_remember_what_was_best(tmp_path):
    config = TrainConfig(n_steps=60, learning_rate=0.05, ema=0.5, check_every=5, patience=4, checkpoint_every=10)

    def run(module, checkpoint, stop=None):
        def held_out():
            # Best when the first weight is half way to its goal of one.
            return float((module.weight[0, 0] - 0.5).abs())

        records = []
        steps = iter_train(module, noisy_regression(module), config, checkpoint, held_out=held_out, rates={"bias": 0.2})
        for record in steps:
            records.append(record)
            if record.step == stop:
                break
        return records

    undisturbed = linear()
    whole = run(undisturbed, None)
    broken, resumed, again = linear(), linear(), linear()
    run(broken, tmp_path / "c", 25)
    rest = run(resumed, tmp_path / "c")
    assert len(whole) < 60
    assert [(r.loss, r.terms) for r in rest] == [(r.loss, r.terms) for r in whole[20:]]
    assert torch.equal(undisturbed.weight, resumed.weight)
    assert torch.equal(undisturbed.bias, resumed.bias)
    assert run(again, tmp_path / "c") == []  # it had stopped
    assert torch.equal(undisturbed.weight, again.weight)


def test_parameters_learn_at_rates_of_their_own():
    module = nn.ModuleDict({"cells": nn.Linear(1, 1), "network": nn.Linear(1, 1)})
    before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss(generator):
        return sum(p.sum() for p in module.parameters()), {}

    config = TrainConfig(n_steps=1, learning_rate=1e-3, warmup=0, weight_decay=0)
    list(iter_train(module, loss, config, rates={"cells": 0.1}))
    moved = {name: float((before[name] - p.detach()).abs()) for name, p in module.named_parameters()}
    # The first step of Adam is as long as the learning rate.
    assert moved == pytest.approx(
        {"cells.weight": 0.1, "cells.bias": 0.1, "network.weight": 1e-3, "network.bias": 1e-3}, rel=1e-3
    )


def test_a_loss_that_is_not_finite_moves_nothing():
    module = linear()
    before = module.weight.clone()

    def loss(generator):
        return module(torch.full((1, 3), torch.inf)).sum() * 0, {}

    list(iter_train(module, loss, TrainConfig(n_steps=3)))
    assert torch.equal(before, module.weight)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="learning_rat"):
        TrainConfig(learning_rat=1)


@pytest.fixture(scope="module")
def recording():
    """Six cells of known kinetics whose spikes are plain to see."""
    model = MODELS["linear_ar"]()
    generator = torch.Generator().manual_seed(0)
    counts = SpikePrior(rate=1.0, max_count=3).sample((6, 1800), 30.0, generator)
    theta = {
        "tau_rise": torch.full((6,), 0.02),
        "tau_decay": torch.full((6,), 0.4),
        "amplitude": torch.full((6,), 0.3),
        "baseline": torch.zeros(6),
        "noise_density": torch.full((6,), 0.01),
    }
    dff = model.simulate(counts, theta, 30.0, generator)
    return Traces(dff.numpy(), frame_rate=30.0), counts.numpy().astype(int)


def untrained():
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(8, 8, 8), max_count=3)
    return SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=3))


def log_prob_of_truth(vae, traces, counts):
    with torch.no_grad():
        posterior = vae.recognition.eval()(torch.tensor(traces.values), traces.frame_rate)
        return float(posterior.log_prob(torch.tensor(counts).clamp_max(3)).mean())


def test_supervised_fit_learns_the_spikes_and_leaves_the_base_alone(recording):
    traces, counts = recording
    base = untrained()
    before = log_prob_of_truth(base, traces, counts)
    model = fit(traces, base, "supervised", spikes=counts, config=TrainConfig(n_steps=120, learning_rate=3e-3))
    assert log_prob_of_truth(model, traces, counts) > before + 60
    assert log_prob_of_truth(base, traces, counts) == before


def test_vimco_raises_the_bound_and_the_truth_without_seeing_it(recording):
    traces, counts = recording
    start = fit(traces, untrained(), "supervised", spikes=counts, config=TrainConfig(n_steps=25, learning_rate=3e-3))
    before = log_prob_of_truth(start, traces, counts)
    config = TrainConfig(n_steps=80, learning_rate=2e-3, window=256, n_samples=8)
    records = []
    steps = iter_fit(traces, start, "vimco", config=config)
    while True:
        try:
            records.append(next(steps))
        except StopIteration as stop:
            model = stop.value
            break
    bounds = [r.terms["bound"] for r in records]
    assert np.mean(bounds[-10:]) > np.mean(bounds[:10]) + 10
    assert log_prob_of_truth(model, traces, counts) > before
    assert 0.1 < records[-1].terms["amplitude"] < 0.9


def test_fitting_says_what_it_needs(recording):
    traces, counts = recording
    with pytest.raises(RecordingError, match="expects true counts"):
        fit(traces, untrained(), "supervised")
    with pytest.raises(RecordingError, match="expected counts of shape"):
        fit(traces, untrained(), "supervised", spikes=counts[:, :-1])
    with pytest.raises(RecordingError, match="of some cells, got none"):
        fit(traces, untrained(), "semi_supervised", spikes=np.full(counts.shape, np.nan))
    with pytest.raises(RecordingError, match="expected one of sleep, vimco"):
        fit(traces, untrained(), "magic")
    with pytest.raises(RecordingError, match="expected one of linear_ar"):
        fit(traces, untrained(), generative="nonesuch")


def test_semi_supervised_fit_uses_labels_and_the_rest(recording):
    traces, counts = recording
    some = np.where(np.arange(6)[:, None] < 3, counts, np.nan)
    config = TrainConfig(n_steps=50, learning_rate=5e-3, window=256, n_samples=4)
    base = untrained()
    model = fit(traces, base, "semi_supervised", spikes=some, config=config)
    others = traces.select(slice(3, 6)), counts[3:]
    assert log_prob_of_truth(model, *others) > log_prob_of_truth(base, *others) + 40


@pytest.fixture(scope="module")
def half_trained(recording):
    traces, counts = recording
    config = TrainConfig(n_steps=50, learning_rate=4e-3, batch=4)
    return fit(traces, untrained(), "supervised", spikes=counts, config=config)


def fainter(traces, factor=0.12, seed=1):
    """The same recording with noise that the network has not met."""
    noise = np.random.default_rng(seed).normal(size=traces.values.shape)
    return traces.replace(values=traces.values + factor * noise)


def test_sleep_adapts_to_noise_that_the_network_has_not_met(recording, half_trained):
    traces, counts = fainter(recording[0]), recording[1]
    before = half_trained.recognition.state_dict()
    model = fit(traces, half_trained, config=TrainConfig(n_steps=40, learning_rate=1e-3, batch=4))
    assert "fitted by sleep, 40 steps, seed 0, kept: held-out bound +" in model.description
    assert log_prob_of_truth(model, traces, counts) > log_prob_of_truth(half_trained, traces, counts) + 20
    assert all(torch.equal(value, before[name]) for name, value in half_trained.recognition.state_dict().items())


@pytest.mark.parametrize("n_rois", [1, 6])
def test_a_fit_that_got_worse_is_not_kept(recording, half_trained, n_rois):
    traces = recording[0].select(slice(0, n_rois))
    model = fit(traces, half_trained, config=TrainConfig(n_steps=3, learning_rate=0.1, clip=100.0))
    assert "not kept, weights of the base: held-out bound -" in model.description
    now, before = model.recognition.state_dict(), half_trained.recognition.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_rendered_spikes_keep_the_rate_and_explain_the_fluorescence(recording, half_trained):
    traces = recording[0]
    snippets = Snippets(traces, TrainConfig(batch=24, window=600))
    dreams = Dreams(half_trained, snippets)
    assert float(dreams.theta["amplitude"].median()) == pytest.approx(0.3, rel=0.3)
    index = snippets.draw(torch.Generator().manual_seed(0))
    dff, laid = dreams.render(index, torch.Generator().manual_seed(1))
    expected = dreams.mean[index]
    # Systematic sampling is off by less than one spike, times the doubt about the number of spikes.
    assert float(laid.sum()) == pytest.approx(float(expected.sum()), rel=0.15)
    real = snippets.observed[index]
    similarity = torch.corrcoef(torch.stack([dff.flatten(), real.flatten()]))[0, 1]
    assert similarity > 0.7


def test_snippets_keep_to_what_was_measured(recording):
    values = recording[0].values.copy()
    values[:, 600:] = np.nan
    snippets = Snippets(recording[0].replace(values=values, valid=None), TrainConfig(window=256, batch=8))
    index = snippets.draw(torch.Generator().manual_seed(0), torch.tensor([2, 4]))
    assert set(index[0].flatten().tolist()) <= {2, 4}
    assert float(snippets.valid[index].float().mean(-1).min()) > 0.4
