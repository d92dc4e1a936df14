"""The training loop: resumes bit for bit, averages, and fits recordings with and without true spikes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from napari_calvae.fitting import fit, iter_fit
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
    with pytest.raises(RecordingError, match="expected 'vimco' or 'supervised'"):
        fit(traces, untrained(), "magic")
    with pytest.raises(RecordingError, match="expected one of linear_ar"):
        fit(traces, untrained(), generative="nonesuch")
