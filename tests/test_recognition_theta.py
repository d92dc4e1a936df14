"""The Gaussian over θ that any network can predict: its density, what scaling a trace does to it, and recovery."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import napari_calvae as calvae
from napari_calvae.generative import MODELS, SignalDependentNoise, SpikePrior
from napari_calvae.objectives import supervised
from napari_calvae.recognition import NETWORKS, ThetaEntry, ThetaPosterior
from napari_calvae.recognition.amortised import LAGS, autocorrelation
from napari_calvae.recording import Traces
from napari_calvae.training import TrainConfig, iter_train
from napari_calvae.vae import SpikeVAE

SMALL = {
    "convolutional": {"width": 6, "kernels": (5, 3), "max_count": 2},
    "factorized": {"widths": (4, 6, 8), "max_count": 2},
    "causal": {"width": 6, "n_levels": 4, "max_count": 2, "lags": (0, 2), "lag": 2},
    "autoregressive": {"width": 6, "hidden": 5, "max_count": 2, "segment": 128},
}
MODEL = MODELS["linear_ar"]()
ENTRIES = [ThetaEntry.of(p) for p in MODEL.parameters]


@pytest.fixture(params=sorted(name for name, network in NETWORKS.items() if not network.coupled))
def network(request):
    torch.manual_seed(0)
    net = NETWORKS[request.param](**SMALL[request.param])
    net.predict_theta(ENTRIES)
    net.double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def traces(n_rois: int, n_frames: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n_rois, n_frames, generator=generator, dtype=torch.float64).cumsum(-1) * 0.2


def test_autocorrelation_of_an_exponential_response_is_exponential():
    x = 0.9 ** torch.arange(400, dtype=torch.float64)[None]
    # Σ aᵗ aᵗ⁺ᵏ / Σ a²ᵗ = aᵏ, but for the k products that the end of the trace cuts off.
    torch.testing.assert_close(autocorrelation(x)[0], 0.9 ** torch.tensor(LAGS, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (autocorrelation(x[:, :5])[0, 3:] == 0).all()
    assert torch.isfinite(autocorrelation(torch.zeros(1, 9))).all()


def two_parameters() -> ThetaPosterior:
    entries = [ThetaEntry("tau", True, 0, False, 0.0, 1.0), ThetaEntry("baseline", False, 1, False, 0.0, 1.0)]
    scale = torch.tensor([[[0.5, 0.0], [-0.3, 0.4]]], dtype=torch.float64)
    return ThetaPosterior(entries, torch.tensor([[-0.7, 0.2]], dtype=torch.float64), scale)


def test_density_integrates_to_one_and_has_the_moments_it_says():
    posterior = two_parameters()
    # Eight standard deviations around the mean; the trapezoid rule is exact to rounding for a Gaussian this smooth.
    u, v = (torch.linspace(m - 4, m + 4, 401, dtype=torch.float64) for m in posterior.mean[0].tolist())
    density = posterior.log_prob({"tau": u.exp()[:, None, None], "baseline": v[None, :, None]}).exp()[..., 0]
    cell = (u[1] - u[0]) * (v[1] - v[0])
    assert float(density.sum() * cell) == pytest.approx(1, abs=1e-9)
    tau = u.exp()[:, None]
    mean, square = float((density * tau).sum() * cell), float((density * tau**2).sum() * cell)
    assert math.sqrt(square - mean**2) == pytest.approx(float(posterior.std["tau"]), rel=1e-6)
    assert float(posterior.std["baseline"]) == pytest.approx(0.5)
    assert float(posterior.theta["tau"]) == pytest.approx(math.exp(-0.7))


def test_samples_have_the_density():
    posterior, n = two_parameters(), 20_000
    drawn = posterior.sample(n, torch.Generator().manual_seed(0))
    log_p = posterior.log_prob(drawn)[:, 0]
    # Minus the log-density of two normal variables is its least value and half a χ² of two degrees, variance 1.
    expected = -math.log(0.5 * 0.4) - math.log(2 * math.pi) - 1
    assert float(log_p.mean()) == pytest.approx(expected, abs=5 / math.sqrt(n))
    correlation = np.corrcoef(drawn["tau"][:, 0].log(), drawn["baseline"][:, 0])[0, 1]
    assert correlation == pytest.approx(-0.6, abs=5 / math.sqrt(n))
    with pytest.raises(ValueError, match="got none for baseline"):
        posterior.log_prob({"tau": torch.ones(1)})


@pytest.mark.parametrize("noise", [None, SignalDependentNoise()])
def test_scaling_and_shifting_a_trace_does_the_same_to_theta(network, noise):
    model = MODELS["linear_ar"](noise)
    torch.manual_seed(1)
    network.predict_theta([ThetaEntry.of(p) for p in model.parameters])
    with torch.no_grad():
        network.theta_head.out.weight.normal_()
        f = traces(3)
        before, after = network(f, 20.0).theta, network(3.0 * f + 5.0, 20.0).theta
    assert (before.mean[0] - before.mean[1]).abs().min() > 1e-3  # or it would say nothing
    grown = {"amplitude", "baseline", "noise_density"}
    factors = {p.name: 3.0 if p.name in grown else 1 / 3 if p.name == "shot" else 1.0 for p in model.parameters}
    for name, factor in factors.items():
        shift = 5.0 if name == "baseline" else 0.0
        torch.testing.assert_close(after.theta[name], factor * before.theta[name] + shift)
        torch.testing.assert_close(after.std[name], factor * before.std[name])
    # And the density of the same cell in other units differs by the units alone: those of the baseline.
    theta = before.sample(4, torch.Generator().manual_seed(0))
    moved = {name: factors[name] * v + (5.0 if name == "baseline" else 0.0) for name, v in theta.items()}
    torch.testing.assert_close(after.log_prob(moved), before.log_prob(theta) - math.log(3))


def test_spikes_are_what_they_were_without_the_head(network):
    f = traces(2)
    plain = NETWORKS[network.name](**SMALL[network.name]).double()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("theta_head.")})
    with torch.no_grad():
        counts = torch.ones_like(f)
        torch.testing.assert_close(network(f, 20.0).log_prob(counts), plain(f, 20.0).log_prob(counts), rtol=0, atol=0)
        assert plain(f, 20.0).theta is None


def test_chunks_order_of_rois_and_selection_are_irrelevant(network):
    f, order = traces(3, 1000), torch.tensor([2, 0, 1])
    with torch.no_grad():
        whole, pieces, shuffled = (
            network(f, 30.0).theta,
            network(f, 30.0, chunk=256).theta,
            network(f[order], 30.0).theta,
        )
    torch.testing.assert_close(whole.mean, pieces.mean)
    torch.testing.assert_close(whole.mean[order], shuffled.mean)
    torch.testing.assert_close(whole.scale[order], shuffled.scale)
    theta = whole.theta
    one = {name: v[1:2] for name, v in theta.items()}
    torch.testing.assert_close(whole.select(slice(1, 2)).log_prob(one), whole.log_prob(theta)[1:2])


@pytest.mark.parametrize("values", [torch.zeros(1, 64), torch.full((1, 64), torch.nan), torch.eye(1, 64)])
def test_finite_for_traces_without_noise(network, values):
    with torch.no_grad():
        posterior = network(values.double(), 20.0).theta
    assert all(torch.isfinite(v).all() for v in (posterior.mean, posterior.scale))


def test_a_saved_network_keeps_its_head_and_infer_uses_it(network, tmp_path):
    model = SpikeVAE(network.float(), MODEL, SpikePrior(1.0, 2), theta={"tau_rise": 0.05})
    again = SpikeVAE.load(model.save(tmp_path / "model.safetensors"))
    recording = Traces(traces(2).numpy(), frame_rate=20.0)
    result = calvae.infer(recording, again, n_samples=2, device="cpu")
    with torch.no_grad():
        expected = network(torch.from_numpy(recording.values.copy()), 20.0).theta
    assert result.theta["tau_rise"] == pytest.approx([0.05, 0.05])
    np.testing.assert_allclose(result.theta["amplitude"], expected.theta["amplitude"], rtol=1e-5)
    np.testing.assert_allclose(result.theta_std["tau_decay"], expected.std["tau_decay"], rtol=1e-3)
    assert set(result.theta_std) == {p.name for p in MODEL.parameters} - {"tau_rise"}
    # A head for another model says nothing of this one.
    again.generative, again.theta = MODELS["dye_binding"](), {}
    other = calvae.infer(recording, again, n_samples=1, device="cpu")
    assert set(other.theta) == {p.name for p in again.generative.parameters}
    assert other.theta_std == {}


def simulate(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Traces of 20 s at 15 Hz, counts and θ; the noise is low."""
    theta = MODEL.sample_prior(n, generator)
    theta["noise_density"] = theta["noise_density"] / 2
    rate = torch.exp(torch.empty(n).uniform_(math.log(0.5), math.log(2.0), generator=generator))
    counts = SpikePrior(rate, 2).sample((n, 300), 15.0, generator)
    return MODEL.simulate(counts, theta, 15.0, generator), counts, theta


def test_theta_is_recovered_from_simulations():
    torch.manual_seed(0)
    net = NETWORKS["convolutional"](width=2, kernels=(3,), max_count=2)
    net.predict_theta(ENTRIES)

    def loss(generator):
        f, _, theta = simulate(32, generator)
        return supervised(net(f, 15.0).theta.log_prob(theta)), {}

    for _ in iter_train(net, loss, TrainConfig(n_steps=300, learning_rate=6e-3)):
        pass
    f, _, theta = simulate(500, torch.Generator().manual_seed(99))
    with torch.no_grad():
        posterior = net(f, 15.0).theta
        gained = (posterior.log_prob(theta) - MODEL.log_prior(theta)).mean()
    truth, found = (torch.stack([t["tau_decay"], t["amplitude"]]).log() for t in (theta, posterior.theta))
    explained = 1 - ((truth - found) ** 2).mean(1) / truth.var(1)
    # Longer training explains 0.6 and 0.88 (at 15 Hz and with responses below the noise among them).
    assert explained[0] > 0.35
    assert explained[1] > 0.75
    # A nat more than the prior for each, and for the noise; as wide as its errors: 0.68 lie within one deviation.
    assert gained > 3
    sd = posterior.scale.square().sum(-1).sqrt()[:, 1:3].mT
    inside = ((truth - found).abs() < sd).float().mean(1)
    assert ((inside - 0.683).abs() < 0.12).all()
