"""From traces to posteriors: the same answer however it is computed, and clear words where there is none."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from numpy.lib.recfunctions import structured_to_unstructured

import napari_calvae as calvae
from napari_calvae import inference
from napari_calvae.generative import MODELS, DriftingNoise, SpikePrior
from napari_calvae.metrics import describe, score_correlation, smooth_spikes
from napari_calvae.recognition import NETWORKS
from napari_calvae.recording import EVENT_DTYPE, RecordingError, SpikeInference, Traces
from napari_calvae.vae import ModelError, SpikeVAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(4, 6), max_count=3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=3))


def simulated(n_rois=3, n_frames=900, frame_rate=30.0, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0 / frame_rate, (n_rois, n_frames))
    kernel = np.exp(-np.arange(60) / (0.5 * frame_rate))
    clean = np.stack([np.convolve(c, kernel)[:n_frames] for c in counts])
    return Traces(0.3 * clean + 0.05 * rng.standard_normal(clean.shape), frame_rate=frame_rate), counts


def plain(values):
    return structured_to_unstructured(values) if values.dtype.names else values


def test_result_has_the_public_face(vae):
    traces, _ = simulated()
    result = calvae.infer(traces, vae, n_samples=20, device="cpu")
    assert result.rate.shape == result.reconstruction.shape == result.reconstruction_std.shape == (3, 900)
    assert result.rate.dtype == np.float32
    assert (result.rate > 0).all()
    assert result.events.dtype == EVENT_DTYPE
    samples = result.samples()
    assert samples.shape == (20, 3, 900)
    assert samples.sum() == result.events["count"].sum() > 0
    assert samples.max() <= 3
    low, high = result.interval(0.9, window=1.0)
    assert low.shape == (3, 30)
    assert (low <= high).all()
    assert set(result.theta) == {p.name for p in MODELS["linear_ar"].parameters}
    assert np.isfinite(result.reconstruction).all()
    assert (result.reconstruction_std > 0).all()
    assert result.quality.shape == (3,)
    assert result.provenance["settings"]["seed"] == 0


def test_rate_is_the_mean_of_the_samples(vae):
    traces, _ = simulated(1, 300)
    result = calvae.infer(traces, vae, n_samples=1000)
    per_frame = result.samples()[:, 0].astype(float)
    error = np.abs(per_frame.mean(0) * 30 - result.rate[0])
    assert (error <= 5 * per_frame.std(0) * 30 / 1000**0.5 + 0.05).all()


def test_blocks_order_and_company_do_not_change_the_result(vae, monkeypatch):
    traces, _ = simulated(5, 400)
    whole = calvae.infer(traces, vae, n_samples=7)
    monkeypatch.setattr(inference.blocks, "BLOCK_FRAMES", 800)
    blocks = list(calvae.iter_infer(traces, vae, n_samples=7))
    assert [b.traces.n_rois for b in blocks] == [2, 2, 1]
    joined = SpikeInference.concatenate(blocks)
    assert joined.roi_ids == whole.roi_ids
    alone = calvae.infer(traces.select([3]), vae, n_samples=7)
    backwards = calvae.infer(traces.select([4, 3, 2, 1, 0]), vae, n_samples=7)
    for name in ("rate", "reconstruction", "reconstruction_std", "quality"):
        one, some, all_, reverse = (plain(getattr(r, name)) for r in (alone, joined, whole, backwards))
        np.testing.assert_array_equal(some, all_)
        np.testing.assert_array_equal(one[0], all_[3])
        np.testing.assert_array_equal(reverse, all_[::-1])
    np.testing.assert_array_equal(alone.samples()[:, 0], whole.samples([3])[:, 0])
    np.testing.assert_array_equal(backwards.samples(), whole.samples()[:, ::-1])


def test_the_number_of_cores_does_not_change_the_result():
    traces, _ = simulated(2, 4_000)
    results = []
    for cores in (1, 2, 3):
        torch.set_num_threads(cores)
        try:
            results.append(calvae.infer(traces, n_samples=20))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        for name in ("rate", "reconstruction", "reconstruction_std", "events"):
            np.testing.assert_array_equal(getattr(other, name), getattr(results[0], name))


def test_seed_decides_the_samples(vae):
    traces, _ = simulated(1)
    a, b, c = (calvae.infer(traces, vae, n_samples=5, seed=s).events for s in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_raw_traces_become_dff_first(vae):
    traces, _ = simulated(1, 3000)
    raw = traces.replace(values=200 * (1 + traces.values), unit="raw")
    result = calvae.infer(raw, vae, n_samples=2)
    assert result.traces.unit == "dff"
    assert np.corrcoef(result.traces.values[0], traces.values[0])[0, 1] > 0.97


def test_missing_frames_stay_missing_and_everything_else_finite(vae):
    traces, _ = simulated(2)
    values = traces.values.copy()
    values[0, 100:130] = np.nan
    result = calvae.infer(Traces(values, frame_rate=30.0), vae, n_samples=5)
    assert np.isnan(result.traces.values[0, 100:130]).all()
    for array in (result.rate, result.reconstruction, result.reconstruction_std):
        assert np.isfinite(array).all()
    known = [name for name in result.quality.dtype.names if name != "unfamiliarity"]
    assert all(np.isfinite(result.quality[name]).all() for name in known)


def test_a_known_amplitude_sets_the_number_of_spikes_and_narrows_its_interval():
    truth = calvae.simulate(6, 120.0, 30.0, rate=0.8, theta={"amplitude": 0.25, "noise_density": 0.01}, variability=0.3)
    plain = calvae.infer(truth.traces, n_samples=60)
    widths, off = [], []
    for amplitude in (0.25, 0.5):
        told = calvae.infer(truth.traces, n_samples=60, amplitude=amplitude, amplitude_spread=0.3)
        low, high = told.interval(0.9, window=60.0)
        widths.append((high - low).mean())
        off.append(np.log(told.rate.mean(-1) * 120 / truth.counts.sum(-1)))
        assert told.theta["amplitude"] == pytest.approx(np.full(6, amplitude))
        assert told.provenance["settings"]["amplitude"] == amplitude
    # Amplitudes of the cells differ from 0.25 by a factor of e^0.3.
    assert np.abs(off[0]).mean() < 0.4
    np.testing.assert_allclose(off[0] - off[1], np.log(2), atol=0.25)
    low, high = plain.interval(0.9, window=60.0)
    assert widths[0] < 0.8 * (high - low).mean()


def test_intervals_at_a_typical_amplitude_hold_what_cells_differ_about_it():
    truth = calvae.simulate(
        24, 60.0, 30.0, rate=1.0, theta={"amplitude": 0.25, "noise_density": 0.01}, variability=0.45
    )
    true, held = truth.counts.sum(-1), {}
    for spread in (0.05, 0.5):
        told = calvae.infer(truth.traces, amplitude=0.25, amplitude_spread=spread)
        low, high = told.interval(0.9, window=60.0)[..., 0]
        held[spread] = np.mean((low <= true) & (true <= high))
    assert held[0.05] < 0.5 < 0.75 < held[0.5]


def test_an_amplitude_that_a_model_has_no_place_for_is_refused(vae):
    traces, _ = simulated(1)
    other = dataclasses.replace(vae, generative=MODELS["dye_binding"]())
    with pytest.raises(RecordingError, match="amplitude: expected a model with a gain and an amplitude"):
        calvae.infer(traces, other, amplitude=0.2)
    with pytest.raises(ValueError, match="greater than 0"):
        calvae.infer(traces, vae, amplitude=0.0)


def test_a_model_that_knows_its_training_says_how_unfamiliar_a_trace_is(vae):
    traces, _ = simulated(3)
    assert np.isnan(calvae.infer(traces, vae, n_samples=0).quality["unfamiliarity"]).all()
    many, _ = simulated(40)
    taught = dataclasses.replace(vae, trained_on=describe(many.values, many.frame_rate))
    odd = traces.values.copy()
    odd[2] = np.convolve(odd[2], np.ones(30) / 30, "same")
    score = calvae.infer(traces.replace(values=odd), taught, n_samples=0).quality["unfamiliarity"]
    assert (score[:2] < 1.5).all()
    assert score[2] > 3


@pytest.mark.parametrize(
    ("values", "frame_rate", "message"),
    [
        (np.full((1, 100), np.nan), 30.0, "ROI 1"),
        (np.ones((1, 100)), 30.0, "constant"),
        (np.random.default_rng(0).normal(size=(1, 20)), 30.0, "second"),
        (np.random.default_rng(0).normal(size=(1, 2000)), 1000.0, "3 to 120 Hz"),
    ],
)
def test_traces_without_an_answer_say_why(vae, values, frame_rate, message):
    with pytest.raises(RecordingError, match=message):
        calvae.infer(Traces(values, frame_rate=frame_rate), vae)


def test_settings_models_and_devices_that_do_not_exist_are_refused(vae, tmp_path):
    traces, _ = simulated(1)
    with pytest.raises(ValueError, match="n_sample"):
        calvae.infer(traces, vae, n_sample=3)
    with pytest.raises(ModelError, match="expected"):
        calvae.infer(traces, tmp_path / "none.safetensors")
    if not torch.cuda.is_available():
        with pytest.raises(RecordingError, match="cuda"):
            calvae.infer(traces, vae, device="cuda")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, ("cpu",)), (True, False, ("cuda", "cpu")), (False, True, ("mps", "cpu"))],
)
def test_devices_are_those_of_the_machine(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert inference.devices() == expected
    assert inference.pick_device().type == expected[0]
    for name in {"cuda", "mps"} - set(expected):
        with pytest.raises(RecordingError, match=rf"device: expected one of {', '.join(expected)} on this.*'{name}'"):
            inference.pick_device(name)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    traces, _ = simulated(4, 6000)
    cpu = calvae.infer(traces, n_samples=0, device="cpu")
    gpu = calvae.infer(traces, n_samples=0, device="cuda")
    np.testing.assert_allclose(gpu.rate, cpu.rate, rtol=1e-3, atol=1e-3)


def test_the_shipped_model_finds_the_spikes_of_a_simulation():
    traces, counts = simulated(4, 3600)
    result = calvae.infer(traces, n_samples=50)
    # Here fluorescence is at its peak in the frame of the spike, as of no indicator: the spike seems to be one before.
    correlation = score_correlation(np.roll(result.rate, 1, -1), smooth_spikes(counts, 30.0, 0.05))
    assert np.median(correlation) > 0.75
    assert (result.quality["reconstruction_r2"] > 0.7).all()
    inside = result.interval(0.9, window=10.0)
    total = counts.reshape(4, 12, 300).sum(-1)
    assert ((inside[0] <= total) & (total <= inside[1])).mean() > 0.6


@pytest.mark.parametrize("frame_rate", [3.0, 7.5, 30.0, 60.0, 120.0])
def test_the_shipped_model_takes_every_frame_rate_from_3_to_120(frame_rate):
    traces, counts = simulated(2, int(120 * frame_rate), frame_rate)
    result = calvae.infer(traces, n_samples=0)
    truth = smooth_spikes(counts, frame_rate, max(0.05, 1 / frame_rate))
    assert (score_correlation(result.rate, truth) > 0.45).all()
    spikes = result.rate.sum(-1) / frame_rate
    # How much fluorescence one spike makes is unknown to the model, and slow cells like these it takes for bursting
    # ones: the model card says by how much.
    assert (np.abs(np.log(spikes / counts.sum(-1))) < 1.5).all()


def test_a_reconstruction_follows_the_drift_where_the_model_has_one(vae):
    traces, _ = simulated(n_rois=1, n_frames=1800)
    slow = 0.3 * np.sin(np.arange(1800) / 1800 * 2 * np.pi)
    drifting = traces.replace(values=traces.values + slow.astype(np.float32))
    with_drift = SpikeVAE(vae.recognition, MODELS["linear_ar"](DriftingNoise()), vae.prior)
    for n_samples in (0, 5):
        plain, followed = (
            calvae.infer(drifting, model, n_samples=n_samples, device="cpu").reconstruction[0]
            for model in (vae, with_drift)
        )
        # Two whole sweeps of ±0.3 leave, unexplained, a standard deviation of 0.2.
        missed = [float(np.std((drifting.values[0] - x)[100:-100])) for x in (plain, followed)]
        assert missed[1] < missed[0] - 0.05


def test_any_number_of_cores_gives_the_same_samples(vae):
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(calvae.infer(simulated(1)[0], vae, n_samples=23))
    finally:
        torch.set_num_threads(threads)
    one, two = results
    np.testing.assert_array_equal(one.events, two.events)
    np.testing.assert_array_equal(one.reconstruction, two.reconstruction)
    np.testing.assert_array_equal(one.reconstruction_std, two.reconstruction_std)
    assert set(one.events["sample"]) == set(range(23))


def test_calls_at_the_same_time_leave_the_number_of_cores_as_it_was(vae):
    """Torch hands the number that any thread has set last on to all that start later."""
    before, at_once = torch.get_num_threads(), threading.Barrier(2)
    seen = []

    def in_a_thread(task):
        thread = threading.Thread(target=task)
        thread.start()
        return thread

    def infer():
        steps = calvae.iter_infer(simulated(2)[0], vae, n_samples=2)
        next(steps)
        at_once.wait()
        list(steps)

    try:
        torch.set_num_threads(3)
        for thread in [in_a_thread(infer), in_a_thread(infer)]:
            thread.join()
        held = calvae.iter_infer(simulated(2)[0], vae, n_samples=2)
        next(held)
        in_a_thread(lambda: seen.append(torch.get_num_threads())).join()
        held.close()
        in_a_thread(lambda: seen.append(torch.get_num_threads())).join()
        assert seen == [3, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_reconstruction_does_not_hang_on_the_samples(vae):
    traces, _ = simulated(2)
    few, many = (calvae.infer(traces, vae, n_samples=n, device="cpu").reconstruction for n in (0, 30))
    np.testing.assert_array_equal(few, many)


def test_a_sampled_train_has_the_amplitude_that_explains_the_fluorescence_best(vae):
    counts = torch.zeros(3, 1, 300, dtype=torch.uint8)
    counts[0, 0, [40, 150, 151]] = 2
    counts[1, 0, [40, 150, 151]] = 1
    theta = {name: torch.tensor([value]) for name, value in simulate_theta().items()}
    expected = vae.generative.fluorescence(counts[0].float(), theta, 30.0)
    missing = torch.arange(300) > 200
    seen = inference.blocks._Seen(
        torch.where(missing, torch.nan, expected), torch.tensor([1e-3]), counts[0].sum(-1).float()
    )
    shown = inference.blocks._render(counts, seen, vae.generative, theta, 30.0)
    # Half the spikes, twice the response: both are the trace; without spikes there is the baseline alone.
    torch.testing.assert_close(shown[0], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shown[1], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shown[2], torch.full((1, 300), 0.1))


def simulate_theta():
    return {"tau_rise": 0.05, "tau_decay": 0.5, "amplitude": 0.3, "baseline": 0.1, "noise_density": 0.01}


def test_real_cells_are_explained(shared):
    result = calvae.infer(calvae.read(shared / "formats" / "suite2p"), device="cpu")
    r2, coverage = result.quality["reconstruction_r2"], result.quality["band_coverage"]
    assert np.median(r2) > 0.7
    assert r2.min() > 0.3
    assert np.median(coverage) == pytest.approx(0.95, abs=0.03)
