"""Rank statistics that tell an honest posterior from one that is too narrow, too wide or biased."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_calvae.benchmark.paper.calibration import (
    LEVEL,
    TRAINED,
    TRAINING,
    Cells,
    KnownPrior,
    judge,
    posterior_ranks,
    rank,
    simulated_cells,
    train,
    training_simulator,
)
from napari_calvae.generative import MODELS
from napari_calvae.recognition.factorized import GainCategorical


def gaussian_ranks(width: float, shift: float = 0.0, n: int = 4000) -> np.ndarray:
    """Of x ~ N(0, 1) seen as y ~ N(x, 1): its posterior is N(y/2, 1/2), here ``width`` times as wide and shifted."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(n)
    y = x + rng.standard_normal(n)
    samples = y / 2 + shift + width * np.sqrt(0.5) * rng.standard_normal((99, n))
    return rank(torch.from_numpy(x), torch.from_numpy(samples), rng)


def test_the_exact_posterior_is_calibrated_and_others_are_not():
    exact = judge(gaussian_ranks(1.0))
    assert exact["χ² p"] > 0.001
    # Shares of 4,000 cells: five binomial standard errors.
    assert exact["coverage 50 %"] == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)
    assert exact["coverage 90 %"] == pytest.approx(0.9, abs=5 * 0.3 / 4000**0.5)
    assert abs(exact["mean rank − ½"]) < 5 * 0.29 / 4000**0.5
    narrow, wide, low = judge(gaussian_ranks(0.8)), judge(gaussian_ranks(1.25)), judge(gaussian_ranks(1.0, -0.2))
    assert max(narrow["χ² p"], wide["χ² p"], low["χ² p"]) < 1e-6
    assert narrow["coverage 90 %"] < 0.85 < 0.95 < wide["coverage 90 %"]
    assert low["mean rank − ½"] > 0.05


def test_every_rank_once_is_perfectly_calibrated():
    perfect = judge(np.arange(100))
    assert perfect == pytest.approx({"χ² p": 1, "coverage 50 %": 0.5, "coverage 90 %": 0.9, "mean rank − ½": 0})


def test_ties_between_counts_are_broken_at_random():
    rng = np.random.default_rng(0)
    ranks = rank(torch.zeros(5000), torch.zeros(9, 5000), rng)
    assert np.bincount(ranks, minlength=10) == pytest.approx(np.full(10, 500), abs=5 * 450**0.5)
    assert (rank(torch.ones(3), torch.zeros(9, 3), rng) == 9).all()


class Prior:
    """A network that has not looked: its posterior of every cell is the prior, which is calibrated, if useless."""

    max_count = 4

    def __init__(self, rate: float, prior: KnownPrior) -> None:
        self.rate, self.prior = rate, prior

    def __call__(self, dff, _rate):
        k = torch.arange(self.max_count + 1.0)
        logits = k * np.log(self.rate / self.prior.frame_rate) - torch.lgamma(k + 1)
        known = torch.zeros(len(dff))
        return GainCategorical(logits[None, :, None].expand(len(dff), -1, dff.shape[1]), known, known, n_nodes=1)


def test_spike_counts_of_every_window_are_ranked():
    prior = KnownPrior(rates=(2.0, 2.0 + 1e-9))
    cells = prior.draw(600, torch.Generator().manual_seed(0))
    honest = posterior_ranks(Prior(2.0, prior), cells, seed=0)
    assert set(honest) == {"spikes, whole trace", "spikes in 1 s", "spikes in 10 s"}
    assert all(ranks.shape == (600,) and judge(ranks)["χ² p"] > 0.001 for ranks in honest.values())
    # One that expects a quarter more spikes is found out the sooner, the longer the window.
    biased = {name: judge(ranks) for name, ranks in posterior_ranks(Prior(2.5, prior), cells, seed=0).items()}
    assert biased["spikes, whole trace"]["mean rank − ½"] < biased["spikes in 10 s"]["mean rank − ½"] < -0.1
    assert biased["spikes, whole trace"]["χ² p"] < 1e-6


def test_amplitudes_are_fitted_where_none_are_predicted():
    prior = KnownPrior(n_frames=200)
    cells = prior.draw(4, torch.Generator().manual_seed(0))
    ranks = posterior_ranks(Prior(2.0, prior), cells, 0, 9, MODELS["linear_ar"]())
    assert ranks["amplitude"].shape == (4,)
    assert ((ranks["amplitude"] >= 0) & (ranks["amplitude"] <= 9)).all()


def test_cells_come_from_the_simulators_that_are_named():
    trained = training_simulator(3, 0)
    assert trained.dff.shape == trained.counts.shape == (3, 2048)
    assert len(trained.frame_rate.unique()) > 1
    named = simulated_cells(2, 0)
    assert isinstance(named, Cells)
    assert set(named.theta) == {p.name for p in MODELS["linear_ar"].parameters}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TRAINED))
def test_a_network_is_calibrated_on_the_prior_that_it_was_trained_on(kind):
    prior = KnownPrior()
    network, _ = train(kind, prior, TRAINING)
    ranks = posterior_ranks(network, prior.draw(200, torch.Generator().manual_seed(10**9)), seed=0)
    theta = {p.name for p in prior.model.parameters}
    judged = {name: judge(r) for name, r in ranks.items() if kind == "autoregressive" or name in theta}
    # Were all p-values uniform, the least of them would be below this in one run of a hundred.
    assert min(j["χ² p"] for j in judged.values()) > LEVEL / len(judged)
    # The 90 % intervals of 200 cells: four binomial standard errors.
    assert all(j["coverage 90 %"] == pytest.approx(0.9, abs=4 * 0.3 / 200**0.5) for j in judged.values())
