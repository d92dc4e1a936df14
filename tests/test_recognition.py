"""Every recognition network keeps the same oath; the factorised one has exact answers besides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_calvae.benchmark.paper.enumeration import all_trains
from napari_calvae.recognition import NETWORKS
from napari_calvae.recognition.base import trace_features, trace_scale
from napari_calvae.recognition.factorized import REACH, GainCategorical
from napari_calvae.recognition.layers import to_channels_last, upsample

SMALL = {
    "convolutional": {"width": 6, "kernels": (5, 3), "max_count": 2},
    "factorized": {"widths": (4, 6, 8), "max_count": 2},
    "spines": {"shaft_widths": (4, 6, 8), "spine_widths": (4, 5, 6), "n_shared": 3, "max_count": 2},
    "causal": {"width": 6, "n_levels": 4, "max_count": 2, "lags": (0, 2), "lag": 2},
    "autoregressive": {"width": 6, "hidden": 5, "max_count": 2, "segment": 128},
}
#: Networks with settings that change what their posterior is, held to the same.
OTHERS = {
    "factorized, local gain": ("factorized", SMALL["factorized"] | {"local_gain": True}),
    "factorized, light": ("factorized", SMALL["factorized"] | {"light": True, "local_gain": True}),
}


@pytest.fixture(params=[*sorted(NETWORKS), *OTHERS])
def network(request):
    torch.manual_seed(0)
    name, settings = OTHERS.get(request.param) or (request.param, SMALL[request.param])
    net = NETWORKS[name](**settings).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def traces(n_rois: int, n_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n_rois, n_frames, generator=generator, dtype=torch.float64).cumsum(-1) * 0.2


def test_log_prob_sums_to_one_over_all_short_trains(network):
    posterior = network(traces(2, 5), 30.0)
    trains = all_trains(5, 2)[:, None].expand(-1, 2, -1)
    total = torch.logsumexp(posterior.log_prob(trains), 0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-9, rtol=0)


def test_masked_frames_are_marginalised_out_or_left_out(network):
    posterior = network(traces(2, 3), 30.0)
    valid = torch.tensor([[True, False, True]]).expand(2, -1)
    trains = torch.tensor([[[a, 0, b]] for a in range(3) for b in range(3)]).expand(-1, 2, -1)
    total = torch.logsumexp(posterior.log_prob(trains, valid), 0)
    assert torch.isfinite(total).all()
    if isinstance(posterior, GainCategorical):
        torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-9, rtol=0)


def test_mean_of_samples_is_the_mean(network):
    posterior = network(traces(2, 40), 30.0)
    samples = posterior.sample(4000, torch.Generator().manual_seed(2)).double()
    error = (samples.mean(0) - posterior.mean).abs()
    # Five standard errors of each frame, and the share of the tilt that seven nodes leave out.
    assert (error <= 5 * samples.std(0) / 4000**0.5 + 2e-3).all()


def test_no_samples_are_no_error(network):
    assert network(traces(2, 40), 30.0).sample(0).shape == (0, 2, 40)


def test_roi_order_is_irrelevant(network):
    f = traces(4, 64)
    # The first of coupled rows is the shaft; all of one structure are recorded at one rate.
    order = torch.tensor([0, 3, 1, 2]) if network.coupled else torch.tensor([2, 0, 3, 1])
    rates = torch.tensor([20.0] * 4 if network.coupled else [10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    counts = torch.randint(0, 3, (4, 64), generator=torch.Generator().manual_seed(4))
    a = network(f, rates).log_prob(counts)
    b = network(f[order], rates[order]).log_prob(counts[order])
    torch.testing.assert_close(a[order], b)


def test_a_trace_is_inferred_alone_as_among_others(network):
    if network.coupled:
        pytest.skip("its rows belong together")
    dff, counts = traces(3, 64), torch.randint(0, 3, (3, 64), generator=torch.Generator().manual_seed(4))
    together = network(dff, 30.0).log_prob(counts)
    alone = [network(dff[k : k + 1], 30.0).log_prob(counts[k : k + 1]) for k in range(3)]
    torch.testing.assert_close(torch.cat(alone), together)


@pytest.mark.parametrize("add", [True, False])
def test_a_coarser_level_counts_twice_for_a_finer_one(add):
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(5, 3, 1)
    coarse, fine = torch.randn(2, 5, 40), torch.randn(2, 3, 80)
    twice = layer(coarse).repeat_interleave(2, -1)
    wanted = twice + fine if add else torch.cat([twice, fine], 1)
    found = upsample(layer, to_channels_last(coarse), to_channels_last(fine), add)
    torch.testing.assert_close(found.squeeze(2), wanted, rtol=1e-5, atol=1e-6)


def test_chunks_with_halo_equal_the_whole(network):
    f = traces(2, 1000)
    counts = torch.randint(0, 3, (2, 1000), generator=torch.Generator().manual_seed(3))
    whole, pieces = network(f, 30.0), network(f, 30.0, chunk=256)
    torch.testing.assert_close(whole.log_prob(counts), pieces.log_prob(counts), rtol=1e-9, atol=0)


def test_local_outputs_reach_no_further_than_the_halo(network):
    if network.name == "autoregressive":
        pytest.skip("a recurrent network's memory has no end; its halo is where it has faded")
    features = trace_features(traces(2, 800))
    rate = torch.zeros(2, dtype=torch.float64)
    summary = network.summarise(features, rate)
    other = features.clone()
    other[..., 400] += 1
    moved = (network.local(features, rate, summary) != network.local(other, rate, summary)).any(1).any(0).nonzero()
    assert 400 - network.halo <= int(moved.min()) < 400 < int(moved.max()) <= 400 + network.halo


def test_scale_offset_and_missing_frames_of_dff_do_not_matter(network):
    f = traces(2, 200)
    torch.testing.assert_close(network(f, 30.0).mean, network(3.0 * f + 5.0, 30.0).mean)
    gap = f.clone()
    gap[:, 50:60] = torch.nan
    valid = torch.isfinite(gap)
    other = torch.where(valid, f, 1e6)
    torch.testing.assert_close(network(gap, 30.0).mean, network(other, 30.0, valid).mean)


def test_short_traces_are_taken_as_in_training():
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(4, 6), min_frames=64).eval()
    f = torch.randn(2, 40)
    followed = torch.cat([f, torch.full((2, 24), torch.nan)], 1)
    torch.testing.assert_close(network(f, 30.0).mean, network(followed, 30.0).mean[:, :40])


@pytest.mark.parametrize("values", [torch.zeros(1, 30), torch.full((1, 30), torch.nan), torch.eye(1, 30)])
def test_features_are_finite_for_traces_without_noise(values):
    assert torch.isfinite(trace_features(values)).all()


def test_missing_frames_do_not_touch_the_units_of_a_trace():
    """A trace of which nine tenths are missing is measured as the rest alone, row by row."""
    found = traces(3, 400)
    gappy = torch.full((3, 4000), torch.nan, dtype=found.dtype)
    for row, start in enumerate((0, 1700, 3600)):
        gappy[row, start : start + 400] = found[row]
    for a, b in zip(trace_scale(gappy), trace_scale(found), strict=True):
        assert torch.allclose(a, b)
    valid = gappy.isfinite()
    for a, b in zip(trace_scale(gappy.nan_to_num(), valid), trace_scale(found), strict=True):
        assert torch.allclose(a, b)


def test_gain_posterior_agrees_with_a_fine_integral():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(1, 4, 6)))
    logits[:, 1:] -= torch.lgamma(torch.arange(2.0, 5.0, dtype=torch.float64))[:, None]
    response = torch.tensor([[1.0, 0.0, 0.3, 1.0, 0.7, 0.2]], dtype=torch.float64)
    posterior = GainCategorical(logits, torch.tensor([0.2]).double(), torch.tensor([0.5]).double(), response)
    counts = torch.tensor([[1, 0, 2, 0, 3, 0]])
    g = torch.linspace(0.2 - 4, 0.2 + 4, 20001, dtype=torch.float64)
    weight = torch.exp(-0.5 * ((g - 0.2) / 0.5) ** 2)
    k = torch.arange(4.0, dtype=torch.float64)
    table = torch.log_softmax(logits[0] + k[:, None] * g[:, None, None] * response[0], 1)
    log_p = table.gather(1, counts.expand(len(g), -1)[:, None]).sum((1, 2))
    expected = torch.log((weight * log_p.exp()).sum() / weight.sum())
    torch.testing.assert_close(posterior.log_prob(counts)[0], expected, rtol=0, atol=1e-3)
    posterior.n_nodes = 61
    torch.testing.assert_close(posterior.log_prob(counts)[0], expected, rtol=0, atol=1e-6)
    mean = ((k[:, None] * table.exp()).sum(1) * (weight / weight.sum())[:, None]).sum(0)
    torch.testing.assert_close(posterior.mean[0], mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_log_probability_has_the_gradient_of_its_value(scale):
    torch.manual_seed(0)
    counts = torch.randint(0, 3, (2, 8))
    inputs = (torch.randn(2, 4, 8), torch.tensor([0.1, -0.3]), torch.tensor([0.4, 0.6]), torch.rand(2, 8))

    def log_prob(logits, mean, std, response):
        posterior = GainCategorical(logits, mean, std, response, n_nodes=31).widened(scale)
        with torch.no_grad():
            assert posterior.mean.isfinite().all()  # what is kept of this must not end up in a gradient
        return posterior.log_prob(counts)

    assert torch.autograd.gradcheck(log_prob, [x.double().requires_grad_() for x in inputs], atol=1e-5)


@pytest.mark.parametrize("place", [0.0, 1.0, 1.7, -1.7, 3.0, -4.0])
def test_a_widened_gain_gives_counts_beyond_its_reach_the_probability_of_its_end(place):
    torch.manual_seed(1)
    k = torch.arange(5.0, dtype=torch.float64)
    logits = (k * np.log(0.05) - torch.lgamma(k + 1))[None, :, None] + 0.3 * torch.randn(2, 5, 1000).double()
    mean, std = torch.tensor([-0.2, 0.3]).double(), torch.full((2,), 0.6).double()
    posterior = GainCategorical(logits, mean, std, 0.5 + 0.5 * torch.rand(2, 1000).double()).widened(2.0)
    at_place = posterior.given(posterior.gain_mean + place * posterior.gain_std, torch.zeros(2).double())
    at_place.reach = np.inf
    counts = at_place.sample(1, torch.Generator().manual_seed(0))[0].long()

    def term(z):
        log_p = torch.log_softmax(posterior.at_gain(posterior.gain_mean + posterior.gain_std * z), 1)
        return log_p.gather(1, counts[:, None]).sum((1, 2))

    z = torch.linspace(-REACH, REACH, 8001, dtype=torch.float64)
    density = -(z**2) / 2 - 0.5 * np.log(2 * np.pi) + torch.log(z[1] - z[0])
    density[[0, -1]] -= np.log(2)  # of the trapezoidal rule
    end = torch.special.log_ndtr(torch.tensor(-REACH, dtype=torch.float64))
    ends = [term(-REACH) + end, term(REACH) + end]
    expected = torch.logsumexp(torch.stack([*(term(x) + d for x, d in zip(z, density, strict=True)), *ends]), 0)
    torch.testing.assert_close(posterior.log_prob(counts), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("n_frames", "spread"), [(100, 0.3), (1000, 1.0), (4000, 2.0)])
def test_long_trains_tell_the_gain_without_loss_of_probability(n_frames, spread):
    torch.manual_seed(n_frames)
    k = torch.arange(5.0, dtype=torch.float64)
    logits = (k * np.log(0.05) - torch.lgamma(k + 1))[None, :, None] + 0.3 * torch.randn(2, 5, n_frames).double()
    mean, std = torch.tensor([-0.2, 0.3]).double(), torch.full((2,), spread).double()
    posterior = GainCategorical(logits, mean, std, 0.5 + 0.5 * torch.rand(2, n_frames).double())
    counts = posterior.sample(1)[0].long()
    z = torch.linspace(-7, 7, 2801, dtype=torch.float64)

    def term(gain):
        log_p = torch.log_softmax(posterior.at_gain(mean + std * gain), 1).gather(1, counts[:, None]).sum((1, 2))
        return log_p - gain**2 / 2 - 0.5 * np.log(2 * np.pi)

    expected = torch.logsumexp(torch.stack([term(gain) for gain in z]), 0) + np.log(14 / 2800)
    torch.testing.assert_close(posterior.log_prob(counts), expected, rtol=0, atol=1e-4)
    # Of several trains at once each has its own place of the nodes.
    torch.testing.assert_close(posterior.log_prob(torch.stack([0 * counts, counts]))[1], expected, rtol=0, atol=1e-4)


def test_samples_are_those_of_comparing_every_frame_with_its_distribution():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 400) - 2 * torch.arange(5.0)[:, None]
    posterior = GainCategorical(logits, torch.zeros(2), torch.tensor([0.3, 1.5]), torch.rand(2, 400))
    drawn = posterior.sample(20, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    gain = posterior.gain_mean + posterior.gain_std * torch.randn((20, 2, 1), generator=generator)[..., 0]
    u = torch.rand((20, 2, 400), generator=generator)
    below = torch.stack([torch.softmax(posterior.at_gain(g), 1).cumsum(1) for g in gain])
    plain = (u[:, :, None] > below[:, :, :-1]).sum(2)
    assert (drawn != plain).sum() <= 2  # of 16,000, by rounding
    assert drawn.sum() > 1000


def test_frames_of_the_convolutional_posterior_are_independent_and_bernoulli_where_asked():
    torch.manual_seed(0)
    net = NETWORKS["convolutional"](width=6, kernels=(5, 3), max_count=1).double()
    with torch.no_grad():
        net.head.weight.normal_()
        posterior = net(traces(2, 6), 5.0)
    p = posterior.mean  # of one spike
    assert ((p > 0.01) & (p < 0.99)).all()
    trains = all_trains(6, 1)[:, None].expand(-1, 2, -1)
    product = torch.where(trains == 1, p, 1 - p).log().sum(-1)
    torch.testing.assert_close(posterior.log_prob(trains), product, rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior.select(slice(1, 2)).log_prob(trains[:, 1:]), product[:, 1:], rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="odd kernels"):
        NETWORKS["convolutional"](kernels=(4,))


def test_the_gain_leaves_frames_alone_where_it_has_no_say():
    logits = torch.tensor([0.0, -3.0])[None, :, None].expand(1, 2, 2000)
    silent = torch.cat([torch.ones(1, 1000), torch.zeros(1, 1000)], 1)
    posterior = GainCategorical(logits, torch.ones(1), torch.full((1,), 0.7), silent)
    spread = posterior.sample(400, torch.Generator().manual_seed(0)).float().unflatten(-1, (2, 1000)).sum(-1).std(0)[0]
    p = torch.sigmoid(torch.tensor(-3.0))
    binomial = float((1000 * p * (1 - p)).sqrt())
    assert float(spread[1]) == pytest.approx(binomial, rel=0.15)
    assert float(spread[0]) > 4 * binomial
    torch.testing.assert_close(posterior.mean[0, 1000:], p.expand(1000))
    both = GainCategorical.join([posterior, posterior], [slice(1), slice(0)])
    assert torch.equal(both.response, silent)


def test_more_doubt_about_the_gain_does_not_mean_more_spikes():
    logits = torch.tensor([0.0, -6.0])[None, :, None].expand(1, 2, 500)
    narrow = GainCategorical(logits, torch.zeros(1), torch.full((1,), 0.4), n_nodes=21)
    wide = narrow.widened(2.0)
    assert float(wide.gain_std) == pytest.approx(0.8)
    # Counts are nearly proportional to the gain where they are rare.
    torch.testing.assert_close(wide.mean, narrow.mean, rtol=0.01, atol=0)
    assert float(narrow.gain_for(narrow.mean.sum(-1))) == pytest.approx(0.08, abs=0.005)
    same = narrow.widened(1.0)
    assert torch.equal(same.gain_mean, narrow.gain_mean)


def test_a_widened_gain_reaches_the_ends_of_its_intervals_and_no_further():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 300) - 2 * torch.arange(4.0)[:, None]
    narrow = GainCategorical(logits, torch.tensor([0.0, 0.5]), torch.tensor([0.3, 0.6]))
    wide = narrow.widened(2.5)
    drawn = wide.sample(4000, torch.Generator().manual_seed(0)).float()
    low, high = (wide.at_gain(wide.gain_mean + sign * REACH * wide.gain_std) for sign in (-1, 1))
    ends = [(torch.softmax(x, 1) * torch.arange(4.0)[:, None]).sum((1, 2)) for x in (low, high)]
    totals = drawn.sum(-1)
    assert (totals.quantile(0.5, 0) > ends[0]).all()
    assert (totals.quantile(0.5, 0) < ends[1]).all()
    torch.testing.assert_close(totals.quantile(0.98, 0), ends[1], rtol=0.1, atol=0)
    torch.testing.assert_close(drawn.mean(0).sum(-1), wide.mean.sum(-1), rtol=0.02, atol=0)
    both = GainCategorical.join([wide, wide])
    torch.testing.assert_close(both.mean[2:], wide.mean)


def test_summary_and_outputs_in_one_go_are_those_of_two(network):
    features, rate = trace_features(traces(2, 200)), torch.zeros(2, dtype=torch.float64)
    summary, local = network.summary_and_local(features, rate)
    torch.testing.assert_close(summary, network.summarise(features, rate))
    torch.testing.assert_close(local, network.local(features, rate, summary))


def test_samples_share_the_gain_of_their_cell():
    logits = torch.tensor([0.0, -3.0])[None, :, None].expand(1, 2, 2000)
    tight = GainCategorical(logits, torch.zeros(1), torch.full((1,), 0.01))
    wide = GainCategorical(logits, torch.zeros(1), torch.full((1,), 0.7))
    spread = [p.sample(400, torch.Generator().manual_seed(0)).float().sum(-1).std() for p in (tight, wide)]
    p = torch.sigmoid(torch.tensor(-3.0))
    binomial = float((2000 * p * (1 - p)).sqrt())
    assert spread[0] == pytest.approx(binomial, rel=0.15)
    assert spread[1] > 4 * binomial


def a_causal_network():
    torch.manual_seed(0)
    network = NETWORKS["causal"](**SMALL["causal"]).double().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def test_frame_by_frame_equals_the_whole_trace():
    """What a causal network says as frames come in is what it says of the trace once it is complete."""
    network = a_causal_network()
    with torch.no_grad():
        features = trace_features(traces(3, 90))
        log_rate = torch.tensor([20.0, 30.0, 100.0], dtype=torch.float64).log()
        summary = network.summarise(features, log_rate)
        for lag in network.lags:
            network.set_lag(lag)
            state = network.start(3)
            for row in range(3):  # ROIs are conditioned one by one, as their summaries come
                part = slice(row, row + 1)
                network.condition(state, torch.tensor([row]), log_rate[part], summary[part])
            stepped = torch.cat([network.step(state, frame) for frame in features.unbind(-1)], -1)
            whole = network.local(features, log_rate, summary)
            torch.testing.assert_close(stepped[..., lag:], whole[..., : 90 - lag])
            in_blocks = network.start(3)
            network.condition(in_blocks, torch.arange(3), log_rate, summary)
            blocks = [network.advance(in_blocks, part) for part in features.split([1, 40, 3, 7, 39], -1)]
            torch.testing.assert_close(torch.cat(blocks, -1), stepped)
            assert in_blocks.now == state.now == 90
            for one, other in zip(in_blocks.rings, state.rings, strict=True):
                torch.testing.assert_close(one, other)
            posterior = network.every_lag(traces(3, 90), log_rate.exp())[lag]
            torch.testing.assert_close(posterior.mean, network.posterior(whole, log_rate, summary).mean)
    with pytest.raises(ValueError, match="expected one of 0, 2 frames, got 1"):
        network.set_lag(1)


def test_a_causal_network_may_know_but_the_beginning_of_a_trace():
    """What comes later then changes no answer before it, neither through its scale nor through its summary."""
    network = a_causal_network()
    with torch.no_grad():
        now, rate = traces(3, 120), torch.full((3,), 30.0, dtype=torch.float64)
        later = now.clone()
        later[:, 80:] = 7 * later[:, 80:] + 3
        known, other = (network.every_lag(x, rate, lags=[2], n_known=80)[2].mean[:, :78] for x in (now, later))
        torch.testing.assert_close(known, other)
        assert not torch.allclose(known, network.every_lag(later, rate, lags=[2])[2].mean[:, :78], rtol=1e-3)
