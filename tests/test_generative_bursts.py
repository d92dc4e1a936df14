"""The bursty prior against enumeration of all trains and all paths of its state."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from napari_calvae.generative import BurstyPrior, SpikePrior


def prior(max_count: int = 3, **changes: float) -> BurstyPrior:
    values = {"quiet": 0.5, "burst": 12.0, "onset": 0.7, "duration": 0.3} | changes
    return BurstyPrior(**{k: torch.tensor([v], dtype=torch.float64) for k, v in values.items()}, max_count=max_count)


def by_hand(counts: list[int], frame_rate: float, max_count: int, seen: list[bool]) -> float:
    """Sum over all paths, with the chain's matrix exponential by scipy."""
    switching = np.array([[-0.7, 0.7], [1 / 0.3, -1 / 0.3]])
    move = expm(switching / frame_rate)
    start = np.array([1 / 0.3, 0.7]) / (0.7 + 1 / 0.3)
    total = 0.0
    for path in itertools.product((0, 1), repeat=len(counts)):
        p = start[path[0]] * math.prod(move[a, b] for a, b in itertools.pairwise(path))
        for k, state, known in zip(counts, path, seen, strict=True):
            mean = (0.5, 12.0)[state] / frame_rate
            pmf = [math.exp(-mean) * mean**i / math.factorial(i) for i in range(max_count)]
            p *= ([*pmf, 1 - sum(pmf)][k]) if known else 1.0
        total += p
    return math.log(total)


@pytest.mark.parametrize("seen", [[True] * 5, [True, False, False, True, True], [False] * 5])
def test_log_prob_is_the_sum_over_all_paths(seen):
    trains = torch.tensor([[0, 0, 0, 0, 0], [3, 2, 0, 1, 0], [0, 0, 1, 3, 3]], dtype=torch.float64)
    found = prior().log_prob(trains, 8.0, torch.tensor(seen))
    expected = [by_hand([int(k) for k in train], 8.0, 3, seen) for train in trains]
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("n_frames", [1, 2, 5])
def test_all_trains_sum_to_one(n_frames):
    trains = torch.tensor(list(itertools.product(range(4), repeat=n_frames)), dtype=torch.float64)
    assert float(prior().log_prob(trains, 8.0).exp().sum()) == pytest.approx(1, abs=1e-10)


def test_equal_rates_are_a_plain_prior():
    counts = torch.poisson(torch.full((4, 300), 0.2, dtype=torch.float64)).clamp_max(3)
    plain = SpikePrior(torch.tensor([2.0], dtype=torch.float64), 3).log_prob(counts, 10.0)
    assert torch.allclose(prior(quiet=2.0, burst=2.0).log_prob(counts, 10.0), plain)


def test_two_bin_widths_agree_to_first_order():
    """What is said of a silent second, and of a burst, at ever finer bins."""
    values = []
    for frame_rate in (20, 40, 80, 1280):
        counts = torch.zeros(2, frame_rate, dtype=torch.float64)
        for spike in (0.31, 0.36, 0.41):
            counts[1, int(spike * frame_rate)] += 1
        # A density of spike times: that of a spike anywhere in its bin, divided by the bin.
        log_p = prior().log_prob(counts, float(frame_rate))
        values.append(log_p + torch.tensor([0.0, 3 * math.log(frame_rate)]))
    errors = [(v - values[-1]).abs() for v in values[:-1]]
    assert (errors[0] < 0.1).all()
    assert (errors[1] < 0.65 * errors[0]).all()
    assert (errors[2] < 0.65 * errors[1]).all()


def test_samples_have_the_rate_and_the_bursts():
    for frame_rate in (10.0, 40.0):
        generator = torch.Generator().manual_seed(0)
        counts = prior(max_count=30).sample((400, int(100 * frame_rate)), frame_rate, generator)
        assert float(prior().rate) == pytest.approx(0.5 + 11.5 * 0.21 / 1.21)
        per_second = counts.sum(-1) / 100
        error = float(per_second.std()) / math.sqrt(400)
        assert float(per_second.mean()) == pytest.approx(float(prior().rate), abs=4 * error)
        # A two-state Poisson process over T: variance = mean T + 2 (12 − 0.5)² p (1 − p) (k T − 1 + e^{−kT}) / k².
        p, k = 0.21 / 1.21, 0.7 + 1 / 0.3
        variance = float(prior().rate) * 100 + 2 * 11.5**2 * p * (1 - p) * (k * 100 - 1) / k**2
        assert float(counts.sum(-1).var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / 400))


def test_batches_gradients_and_refusals():
    quiet = torch.tensor([0.5, 2.0], requires_grad=True)
    both = BurstyPrior(quiet, torch.tensor([10.0, 20.0]), max_count=4)
    counts = both.sample((3, 2, 500), 30.0, torch.Generator().manual_seed(1))
    together = both.log_prob(counts, 30.0)
    assert together.shape == (3, 2)
    for j in range(2):
        one = BurstyPrior(float(quiet[j].detach()), (10.0, 20.0)[j], max_count=4)
        assert torch.allclose(one.log_prob(counts[:, j], 30.0), together[:, j], rtol=1e-4)
    assert torch.isfinite(torch.autograd.grad(together.sum(), quiet)[0]).all()
    impossible = torch.tensor([[0.0, 9.0], [0.5, 0.0], [-1.0, 0.0]])
    assert (BurstyPrior(1.0, 9.0, max_count=4).log_prob(impossible, 30.0) == -math.inf).all()
    with pytest.raises(ValueError, match="above 0"):
        BurstyPrior(1.0, -2.0)
    with pytest.raises(ValueError, match="max_count"):
        BurstyPrior(1.0, 2.0, max_count=0)
