"""The autoregressive posterior against enumeration of all short trains."""

from __future__ import annotations

import itertools

import pytest
import torch

from napari_calvae.recognition.autoregressive import AutoregressiveNetwork, AutoregressivePosterior

N_FRAMES = 3


def network(max_count: int = 2, segment: int = 512, **changes) -> AutoregressiveNetwork:
    """A network with large random weights, so that its posterior is far from its start and from independence."""
    torch.manual_seed(0)
    net = AutoregressiveNetwork(max_count=max_count, segment=segment, **({"width": 8, "hidden": 6} | changes)).double()
    with torch.no_grad():
        net.decoder.gru.weight_ih_l0[:, net.decoder.n_input :].normal_(0, 3)
        net.decoder.head.weight.normal_(0, 0.8)
        net.decoder.head.bias[0] = 3.0
    return net.eval()


def fluorescence(n_rois: int, n_frames: int) -> torch.Tensor:
    return torch.randn(n_rois, n_frames, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def all_trains(max_count: int, n_frames: int = N_FRAMES) -> torch.Tensor:
    """(train, 1, time)."""
    return torch.tensor(list(itertools.product(range(max_count + 1), repeat=n_frames)))[:, None]


def short_posterior(max_count: int, segment: int = 512, n_rois: int = 2) -> AutoregressivePosterior:
    with torch.no_grad():
        return network(max_count, segment)(fluorescence(n_rois, N_FRAMES), 10.0)


@pytest.mark.parametrize(("max_count", "segment"), [(1, 512), (2, 512), (3, 2), (2, 1)])
def test_log_prob_sums_to_one_over_all_trains(max_count, segment):
    posterior = short_posterior(max_count, segment)
    p = posterior.log_prob(all_trains(max_count).expand(-1, 2, -1)).exp()
    assert p.shape == ((max_count + 1) ** N_FRAMES, 2)
    assert (p.sum(0) - 1).abs().max() < 1e-9
    assert p.max() < 0.95  # or the sum would say nothing


def test_masked_frames_are_neither_counted_nor_looked_at():
    posterior = short_posterior(2)
    valid = torch.tensor([[True, False, True]] * 2)
    trains = all_trains(2).expand(-1, 2, -1)
    log_p = posterior.log_prob(trains, valid).unflatten(0, (3, 3, 3))
    assert torch.equal(log_p[:, 0], log_p[:, 1])
    assert (log_p[:, 0].exp().sum((0, 1)) - 1).abs().max() < 1e-9
    # But a frame that is known matters to those after it.
    whole = posterior.log_prob(trains).unflatten(0, (3, 3, 3))
    last = whole - whole.logsumexp(2, keepdim=True)
    assert (last[:, 0] - last[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize(("max_count", "segment"), [(1, 512), (2, 512), (2, 2)])
def test_samples_are_as_frequent_as_log_prob_says(max_count, segment):
    posterior, n = short_posterior(max_count, segment), 20_000
    trains = all_trains(max_count)
    expected = n * posterior.log_prob(trains.expand(-1, 2, -1)).exp().detach()
    samples = posterior.sample(n, torch.Generator().manual_seed(3))
    assert samples.dtype == torch.uint8
    assert samples.shape == (n, 2, N_FRAMES)
    code = (samples.long() * (max_count + 1) ** torch.arange(N_FRAMES - 1, -1, -1)).sum(-1)
    for roi in range(2):
        observed = torch.bincount(code[:, roi], minlength=len(trains))
        chi_square = float(((observed - expected[:, roi]) ** 2 / expected[:, roi]).sum())
        freedom = len(trains) - 1
        # Mean k and variance 2 k, to within five standard deviations.
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_mean_is_that_of_all_trains():
    posterior = short_posterior(2)
    trains = all_trains(2).double()
    exact = (posterior.log_prob(all_trains(2).expand(-1, 2, -1)).exp()[..., None] * trains).sum(0)
    # Averages of conditional means over 64 samples: each lies in [0, 2], so its standard deviation is at most 1.
    assert (posterior.mean - exact).abs().max() < 4 / posterior.n_mean**0.5
    assert (posterior.mean[:, 0] - exact[:, 0]).abs().max() < 1e-9
    assert torch.equal(posterior.mean, short_posterior(2).mean)


@pytest.mark.parametrize("segment", [1, 2])
def test_spikes_are_correlated_in_time_across_the_borders_of_parts(segment):
    def probabilities(segment: int) -> torch.Tensor:
        return short_posterior(2, segment).log_prob(all_trains(2).expand(-1, 2, -1))[:, 0].exp().detach()

    trains = all_trains(2).double()[:, 0]
    p = probabilities(512)
    mean = p @ trains
    assert abs(p @ (trains[:, 0] * trains[:, 1]) - mean[0] * mean[1]) > 1e-2
    assert (probabilities(segment) - p).abs().max() < 1e-12


@pytest.mark.parametrize("memory", [0.0, 4.0])
def test_parts_side_by_side_give_the_trains_of_one_pass(memory):
    """With the same random numbers the same spikes, though the parts start at once and, with memory, hardly forget.

    A train that is one draw from the distribution stays that however it is computed, borders of parts included.
    """

    def posterior(segment: int) -> AutoregressivePosterior:
        net = network(2, segment)
        with torch.no_grad():
            net.decoder.gru.bias_ih_l0[6:12] += memory  # keeps the state: 0.98 of it from frame to frame
            return net(fluorescence(2, 700), 10.0)

    whole, parts = posterior(1024), posterior(60)
    one, many = (q.sample(20, torch.Generator().manual_seed(5)) for q in (whole, parts))
    # Each of 28,000 counts may differ with a probability of about the tolerance of 1e-4 times the weights' size.
    assert (one != many).float().mean() < 1e-3
    assert one.float().mean() > 0.05
    # Only borders could do harm, and harm in two of the trains would leave the rest of both wrong.
    assert (one == many).all(-1).float().mean() > 0.9
    with torch.no_grad():
        assert (whole.log_prob(one) - parts.log_prob(one)).abs().max() < 0.05


def test_drawing_scores_its_own_spikes():
    for n_frames in (50, 200):
        q = network(2, 64)(fluorescence(2, n_frames), 10.0)
        counts, log_p = q.draw(7, torch.Generator().manual_seed(5))
        assert torch.equal(counts, q.sample(7, torch.Generator().manual_seed(5)))
        assert (log_p.sum(-1) - q.log_prob(counts)).abs().max() < 1e-9
        with torch.no_grad():
            assert (q.draw(7, torch.Generator().manual_seed(5))[1] - log_p).abs().max() < 1e-9


def test_gradients_are_those_of_the_recurrent_unit_of_torch():
    net = network(3)
    q = net(fluorescence(2, 30), 10.0)
    counts = q.sample(4, torch.Generator().manual_seed(5)).long()
    weight = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    ours = (q.log_prob(counts) * weight).sum()
    # The same by nn.GRU on all inputs at once, as the definition of the posterior has it.
    decoder = net.decoder
    q = net(fluorescence(2, 30), 10.0)
    before = torch.nn.functional.pad(counts[..., :-1], (1, 0), value=4)
    recalled = torch.nn.functional.one_hot(before, 5).double()
    x = q.inputs.mT.expand(4, -1, -1, -1)
    hidden, _ = decoder.gru(torch.cat([x, recalled], -1).flatten(0, 1))
    out = decoder.head(torch.cat([hidden.unflatten(0, (4, 2)), x], -1))
    k = torch.arange(4)
    odds = k * (out[..., :1] - q.log_rate[:, None, None]) - decoder.log_factorial
    odds[..., 1:] += out[..., 1:]
    theirs = (torch.log_softmax(odds, -1).gather(-1, counts[..., None])[..., 0].sum(-1) * weight).sum()
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(f, list(net.parameters())) for f in (ours, theirs)), strict=True):
        assert (a - b).abs().max() < 1e-9 * (1 + b.abs().max())


def test_order_of_rois_is_irrelevant():
    net, traces = network(), fluorescence(4, 150)
    rates = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        posterior, shuffled = net(traces, rates), net(traces[order], rates[order])
    counts = torch.randint(0, 3, (5, 4, 150), generator=torch.Generator().manual_seed(2))
    log_p = posterior.log_prob(counts)
    assert torch.allclose(log_p[:, order], shuffled.log_prob(counts[:, order]), rtol=1e-9)
    assert torch.allclose(posterior.select(slice(1, 3)).log_prob(counts[:, 1:3]), log_p[:, 1:3], rtol=1e-9)


@pytest.mark.parametrize("n_frames", [300, 1024, 1501])
def test_chunks_with_halo_equal_the_whole_trace(n_frames):
    """Recurrent memory is cut at the same frames whatever the chunk, so only rounding differs."""
    net, traces = network(), fluorescence(2, n_frames)
    with torch.no_grad():
        whole, chunked = net(traces, 30.0), net(traces, 30.0, chunk=256)
    assert (whole.inputs - chunked.inputs).abs().max() < 1e-12
    assert torch.equal(
        whole.sample(2, torch.Generator().manual_seed(0)), chunked.sample(2, torch.Generator().manual_seed(0))
    )


def test_the_future_reaches_back_through_the_halo_and_no_further():
    net, traces = network(), fluorescence(1, 900)
    traces.requires_grad_(False)
    summary = torch.zeros(1, net.n_summary, dtype=torch.float64)
    features = torch.randn(1, 4, 900, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = net.local(features, torch.zeros(1, dtype=torch.float64), summary)
    for frame in (384, 450, 511):
        (grad,) = torch.autograd.grad(out[0, :, frame].sum(), features, retain_graph=True)
        reached = torch.nonzero(grad.abs().amax((0, 1)) > 0).squeeze(-1)
        assert frame - net.halo <= reached.min() < frame
        assert frame + net.look_ahead <= reached.max() <= frame + net.halo


def test_starts_as_a_poisson_train_of_one_spike_per_second():
    torch.manual_seed(0)
    for frame_rate in (5.0, 60.0):
        with torch.no_grad():
            posterior = AutoregressiveNetwork()(fluorescence(3, 600).float(), frame_rate)
        assert (posterior.mean * frame_rate).mean() == pytest.approx(1.0, rel=0.15)


def test_gradients_reach_every_parameter():
    net = network(max_count=3)
    counts = torch.randint(0, 4, (2, 2, 40), generator=torch.Generator().manual_seed(2))
    net(fluorescence(2, 40), 30.0).log_prob(counts).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_rebuilds_from_its_config_and_refuses_impossible_counts():
    net = network(max_count=3, segment=64)
    again = AutoregressiveNetwork(**net.config).double()
    again.load_state_dict(net.state_dict())
    traces, counts = fluorescence(1, 200), torch.ones(1, 200)
    with torch.no_grad():
        assert torch.equal(net(traces, 30.0).log_prob(counts), again(traces, 30.0).log_prob(counts))
        with pytest.raises(ValueError, match="expected counts from 0 to 3, got 0 to 4"):
            net(traces, 30.0).log_prob(torch.arange(200)[None] % 5)
    with pytest.raises(ValueError, match="max_count"):
        AutoregressiveNetwork(max_count=0)
