"""What the shipped models are trained on, and how a GCaMP6's constants are fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.generative import MODELS, GCaMP6s, Physiological
from napari_calvae.generative.sites import GCAMP6S_GREENBERG
from napari_calvae.pretrained import fit_kinetics
from napari_calvae.pretrained.gauss_newton import CellFit, Scored, fit_cells, improve_shared
from napari_calvae.pretrained.kernels import DELAY_LINE, align_clocks, kernel_rows, simulated_delays
from napari_calvae.pretrained.recordings import CLOCK_ERROR, RecordingSampler, Snippets, clock_errors
from napari_calvae.pretrained.simulations import SimulationSampler, delayed
from napari_calvae.pretrained.train import snippet_loss
from napari_calvae.recognition import CausalNetwork


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"jgcamp8m", "gcamp6f"}))
def test_simulated_snippets_have_transients_after_their_spikes(name):
    sampler, out = SimulationSampler([name]), Snippets(24, 192)
    sampler.fill(out, range(24), np.random.default_rng(5))
    measured = np.isfinite(out.fluorescence)
    assert measured.mean() > 0.9
    assert out.scored.all()
    assert out.counts.sum() > 10
    # Over the seconds after spikes fluorescence is higher than elsewhere in most of the cells that fire, noise or not.
    higher = []
    for trace, counts, rate in zip(out.fluorescence, out.counts, out.frame_rate, strict=True):
        recent = np.convolve(counts, np.ones(1 + round(0.5 * float(rate))))[: len(counts)] > 0
        if 5 < recent.sum() < len(counts) - 5:
            higher.append(np.nanmean(trace[recent]) > np.nanmean(trace[~recent]))
    assert np.mean(higher) > 0.7


def recording(name: str, rise: float, late: float, seed: int) -> Sweep:
    """Two minutes of a cell whose fluorescence rises in so many seconds, with a clock that is late."""
    rng = np.random.default_rng(seed)
    rate, n = 60.0, 7200
    spikes = np.sort(rng.uniform(0, n / rate, 150))
    after = (np.arange(n) / rate)[:, None] - spikes
    dff = np.where(after > 0, (1 - np.exp(-after.clip(0) / rise)) * np.exp(-after.clip(0) / 0.8), 0).sum(1)
    return Sweep(name, "c", "x", rate, late, (dff + 0.02 * rng.standard_normal(n)).astype(np.float32), spikes)


def test_clocks_are_put_right_where_a_data_set_lies_beside_the_others():
    late = [0.0, 0.06, 0.0, 0.0, -0.04, 0.0, 0.0]
    sweeps = [recording(f"D{k}", 0.02 + 0.01 * k, shift, k) for k, shift in enumerate(late)]
    aligned, line = align_clocks(sweeps)
    # Lags are 25 ms apart, and how a rise is measured depends a little on where it falls between them.
    np.testing.assert_allclose([b.t0 for b in aligned], 0, atol=0.012)
    assert 0.2 < line.slope < 0.8
    rows = list(kernel_rows(aligned))
    half = np.array([row["50% (ms)"] for row in rows]) / 1000
    rise = np.array([row["90% (ms)"] - row["10% (ms)"] for row in rows]) / 1000
    np.testing.assert_allclose(half, line.half(rise), atol=0.008)


def test_few_data_sets_are_put_on_the_line_of_all():
    aligned, line = align_clocks([recording(f"D{k}", 0.03, late, k) for k, late in enumerate((0.0, 0.2, -0.1))])
    assert line == DELAY_LINE
    np.testing.assert_allclose(np.diff([s.t0 for s in aligned]), 0, atol=0.012)
    assert abs(aligned[0].t0) < 0.03


@pytest.mark.parametrize("name", ["linear_ar", "dye_binding", "physiological"])
def test_simulations_lie_on_the_line_of_recordings(name):
    """With the delay that is said, responses measured as those of recordings are half risen when the line says."""
    model, n, rate, n_frames = MODELS[name](), 8, 100.0, 20_000
    theta = model.sample_prior(n, torch.Generator().manual_seed(3))
    rng = np.random.default_rng(0)
    counts = (rng.random((n, n_frames)) < 0.005).astype(float)
    beside = []
    for delay in (np.zeros(n), simulated_delays(model, theta)):
        late = torch.as_tensor(delayed(counts, delay * rate), dtype=torch.float32)
        dff = model.fluorescence(late, theta, rate).numpy()
        spikes = [np.flatnonzero(row) / rate for row in counts]
        rows = list(kernel_rows([Sweep(str(k), "c", "x", rate, 0.0, dff[k], spikes[k]) for k in range(n)]))
        half = np.array([row["50% (ms)"] for row in rows]) / 1000
        rise = np.array([row["90% (ms)"] - row["10% (ms)"] for row in rows]) / 1000
        beside.append(np.median(np.abs(half - DELAY_LINE.half(rise))))
    assert beside[1] < 0.005 < beside[0], beside


def test_clocks_of_snippets_are_off(monkeypatch):
    """With a clock a tenth of a second ahead the same fluorescence has its spikes three frames of 30 Hz earlier."""
    sampler, found = RecordingSampler([recording("D", 0.02, 0.0, 3)]), []
    for seconds in (0.0, 0.1):
        monkeypatch.setattr(
            "napari_calvae.pretrained.recordings.clock_errors", lambda n, *_, by=seconds: np.full(n, by)
        )
        out = Snippets(20, 256)
        sampler.fill(out, range(20), np.random.default_rng(0))
        found.append(out)
    right, ahead = found
    np.testing.assert_array_equal(right.fluorescence, ahead.fluorescence)
    rows = right.frame_rate == 30
    assert right.counts[rows].sum() > 50
    # A spike on the edge of two frames may fall to either side of it.
    differ = right.counts[rows, 3:-3] != ahead.counts[rows, :-6]
    assert differ.mean() < 0.01
    assert (right.counts[rows] != ahead.counts[rows]).mean() > 0.03


def test_clocks_are_off_by_as_much_as_is_said():
    errors = clock_errors(20_000, 10.0, np.random.default_rng(0))
    assert np.std(errors) == pytest.approx(np.hypot(CLOCK_ERROR, 0.1 / np.sqrt(12)), rel=0.02)


def test_spikes_move_either_way():
    counts = np.tile([0.0, 0, 4, 0, 0], (3, 1))
    moved = delayed(counts, np.array([1.25, -1.25, 0.0]))
    np.testing.assert_allclose(moved, [[0, 0, 0, 3, 1], [1, 3, 0, 0, 0], [0, 0, 4, 0, 0]])


def responses(n_cells: int, n_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.poisson(torch.full((n_cells, n_frames), 0.05), generator=torch.Generator().manual_seed(0))
    scored = torch.ones(n_cells, n_frames, dtype=torch.bool)
    scored[:, :20] = False
    return counts, scored


def test_gauss_newton_recovers_each_cell():
    model, (counts, scored) = Physiological(), responses(4, 600)
    truth = model.sample_prior(4, torch.Generator().manual_seed(1)) | {"noise_density": torch.full((4,), 0.002)}
    observed = model.simulate(counts, truth, 30.0, torch.Generator().manual_seed(2))
    observed[:, :20] = 9.0  # not scored
    found = fit_cells(model, Scored(observed, counts, scored, 30.0), 12)
    clean, fitted = (model.fluorescence(counts, t, 30.0)[:, 20:] for t in (truth, found))
    noise = 0.002 * 30**0.5
    # Six parameters from 580 frames leave √(6/580) = 10 % of the noise; the prior and a stop at 12 steps some more.
    assert ((fitted - clean).square().mean(1).sqrt() < 0.5 * noise).all()
    assert (found["noise_density"] / 0.002 - 1).abs().max() < 0.15


def test_shared_constants_come_back():
    """Two rates wrong by a factor of 1.6, cells known: one step takes most of the way back to what they did."""
    counts, scored = responses(2, 60)
    truth = torch.tensor([*GCAMP6S_GREENBERG.on, *GCAMP6S_GREENBERG.off], dtype=torch.float64).log()
    model = GCaMP6s()
    theta = {p.name: torch.full((2,), p.median) for p in model.parameters} | {"dynamic_range": torch.full((2,), 60.0)}

    def build(two):
        return fit_kinetics.build("gcamp6s", torch.cat([two[:1], truth[1:7], two[1:]]))

    ends = truth[[0, 7]]
    observed = build(ends).fluorescence(counts, theta, 30.0)
    observed = observed + 0.01 * torch.randn(observed.shape, generator=torch.Generator().manual_seed(1))
    wrong = ends + torch.tensor([0.5, -0.5], dtype=torch.float64)
    data = Scored(observed, counts, scored, 30.0)
    fit = CellFit(model, data, model.unconstrain(theta).double())
    before = data.split(build(wrong), fit.u.unsqueeze(1))[:, 0]
    found, _ = improve_shared(build, wrong, (ends, torch.ones_like(ends)), fit)
    after = data.split(build(found), fit.u.unsqueeze(1))[:, 0]
    # Beyond the noise: in a quadratic bowl one step would leave nothing.
    assert (fit.variance(after) - 1e-4).sum() < 0.2 * (fit.variance(before) - 1e-4).sum()


def test_every_third_cell_is_left_out():
    cells = [fit_kinetics.Cell(d, str(i), np.zeros(9), np.zeros(9)) for d in "ab" for i in range(7)]
    fitted, left = fit_kinetics.left_out(cells)
    assert [(c.dataset, c.name) for c in left] == [(d, i) for d in "ab" for i in "036"]
    assert len(fitted) + len(left) == len(cells)


def test_a_causal_network_learns_every_lag_and_from_beginnings(monkeypatch):
    """Two lags a batch; in four batches of ten traces are known as a whole, in the others from any share of them."""
    torch.manual_seed(0)
    network = CausalNetwork(width=4, n_levels=2, max_count=2, lags=(0, 1, 3), lag=0)
    asked, every_lag = [], network.every_lag

    def noted(*args, lags, n_known):
        asked.append((lags, n_known))
        return every_lag(*args, lags=lags, n_known=n_known)

    monkeypatch.setattr(network, "every_lag", noted)
    batch = Snippets(2, 130)
    SimulationSampler(["linear_ar"]).fill(batch, range(2), np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = [float(snippet_loss(network, batch, generator)) for _ in range(200)]
    assert {lag for lags, _ in asked for lag in lags} == {0, 1, 3}
    assert all(len(set(lags)) == 2 for lags, _ in asked)
    known = np.array([n for _, n in asked])
    assert (known == 130).mean() == pytest.approx(0.4, abs=0.1)
    assert 96 <= known.min() < 100
    lags, n_known = asked[-1]
    counts, scored = torch.from_numpy(batch.counts).clamp_max(2), torch.from_numpy(batch.scored)
    rate = torch.from_numpy(batch.frame_rate)
    with torch.no_grad():
        found = every_lag(torch.from_numpy(batch.fluorescence), rate, lags=lags, n_known=n_known)
        log_p = sum(found[lag].log_prob(counts, scored) for lag in lags) / 2
    weight = (rate / 30).sqrt()
    assert losses[-1] == pytest.approx(-float((weight * log_p).sum() / (weight * scored.sum(-1)).sum()), rel=1e-5)
