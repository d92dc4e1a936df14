"""Benchmarks on the recordings that a person would try first; rivals see the same traces in the same run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import savemat

from napari_calvae import benchmark
from napari_calvae.benchmark import ablation, accuracy, adaptation, speed
from napari_calvae.formats.ground_truth import Sweep, read_ground_truth
from napari_calvae.pretrained.train import Recipe, universal_model
from napari_calvae.recognition import AutoregressiveNetwork, FactorizedNetwork
from napari_calvae.recognition.factorized import GainCategorical
from napari_calvae.recording import RecordingError


def sweep(frame_rate=60.0, n=6000, seed=0):
    rng = np.random.default_rng(seed)
    spikes = np.sort(rng.uniform(0, n / frame_rate, 120))
    counts = np.histogram(spikes, np.arange(n + 1) / frame_rate)[0]
    dff = np.convolve(counts, np.exp(-np.arange(200) / 30))[:n] * 0.3 + 0.05 * rng.standard_normal(n)
    return Sweep("D1", "c1", "none", frame_rate, 0.5 / frame_rate, dff.astype(np.float32), spikes)


def test_prepared_pieces_keep_spikes_and_fluorescence_together():
    piece = benchmark.prepare([sweep()], 30.0)[0]
    assert piece.frame_rate == 30.0
    assert len(piece.dff) == len(piece.counts) == 3000
    assert piece.counts.sum() == 120
    # Fluorescence follows the spikes: it correlates best with those of the same and the previous frames.
    lags = [np.corrcoef(np.roll(piece.counts, k), piece.dff)[0, 1] for k in range(-3, 4)]
    assert np.argmax(lags) in (3, 4)


def test_added_noise_has_the_level_asked_for():
    from napari_calvae.metrics import noise_level

    quiet, noisy = (benchmark.prepare([sweep()], 60.0, noise=v)[0].dff for v in (0.0, 8.0))
    nu = noise_level(noisy - quiet, 60.0)
    # The median of 6,000 absolute differences is good to about 2 %.
    assert nu == pytest.approx(8.0, rel=0.06)


def test_a_shifted_truth_is_found_at_its_shift():
    piece = benchmark.prepare([sweep()], 30.0)[0]
    truth = np.asarray(piece.counts, float)
    table = benchmark.correlations(lambda dff, rate: np.roll(truth, 2), [piece], sigma=0.001)
    values = table["D1/c1"]
    assert benchmark.SHIFTS[int(np.argmax(values))] == -2
    assert values.max() == pytest.approx(1)


def test_the_median_is_taken_over_cells_of_a_data_set():
    values = {"A/1": np.array([1.0]), "A/2": np.array([3.0]), "A/3": np.array([2.0]), "B/1": np.array([5.0])}
    assert {k: float(v[0]) for k, v in benchmark.by_dataset(values).items()} == {"A": 2.0, "B": 5.0}


def test_ours_beats_oasis_on_the_movie_with_real_cells(shared):
    """Issue proof: ours as it comes against OASIS AR1 and AR2 at their best constant shift, σ = 50 ms."""
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    folder = shared / "movies"
    files = [folder / f"hybrid_gcamp6f{end}" for end in (".tif", "_rois.tif", "_spikes.npz")]
    rows = list(benchmark.movie(*files))
    assert len(rows) == 14
    median = {name: np.median([row[name] for row in rows]) for name in ("calvae", "OASIS AR1", "OASIS AR2")}
    assert median["calvae"] > max(median["OASIS AR1"], median["OASIS AR2"])


def test_ground_truth_is_read_as_it_says(shared):
    sweeps = read_ground_truth(shared / "ground_truth" / "DS13-GCaMP6s-m-V1-neuropil-corrected.npz")
    assert len({s.cell for s in sweeps}) == 26
    assert all(len(s.dff) > 0 and s.frame_rate > 100 for s in sweeps)
    assert len(sweeps[0].spike_times) > 0


def test_foreign_ground_truth_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=1)
    with pytest.raises(RecordingError, match="got none named cell"):
        read_ground_truth(tmp_path)
    with pytest.raises(RecordingError, match="found none"):
        read_ground_truth(tmp_path / "nowhere")


def test_cascades_cells_are_read(shared):
    sweeps = read_ground_truth(shared / "formats" / "cascade_mat")
    assert {s.cell for s in sweeps} >= {"CAttached_S1_cell2_mini", "CAttached_Theis16_set5_GCaMP6s_V1_1_mini"}
    assert all(s.dataset == "cascade_mat" and len(s.dff) > 100 for s in sweeps)
    slow = next(s for s in sweeps if s.cell == "CAttached_S1_cell2_mini")
    assert slow.frame_rate == pytest.approx(15, rel=1e-3)
    assert slow.t0 == pytest.approx(0.0357, abs=1e-4)
    assert slow.spike_times[0] == pytest.approx(0.2446)


def attached(folder, name, **changes):
    times = np.arange(200) / 10 + 1.0
    sweep = {"fluo_time": times, "fluo_mean": np.sin(times), "events_AP": np.array([15_000.0, np.nan, 105_000.0])}
    savemat(folder / name, {"CAttached": np.array([sweep | changes], dtype=object)})


def test_a_jump_of_the_time_stamps_begins_a_new_sweep(tmp_path):
    (tmp_path / "DS99-test").mkdir()
    times = np.arange(200) / 10 + 1.0
    times[120:] += 5.0
    attached(tmp_path / "DS99-test", "c.mat", fluo_time=times)
    one, two = read_ground_truth(tmp_path)
    assert (one.dataset, one.cell, len(one.dff), len(two.dff)) == ("DS99-test", "c", 120, 80)
    assert (one.frame_rate, two.t0) == (pytest.approx(10.0), pytest.approx(18.0))
    # Spikes are in units of 0.1 ms; those between the sweeps belong to none.
    assert one.spike_times == pytest.approx([1.5, 10.5])
    assert len(two.spike_times) == 0


def test_foreign_mat_files_are_refused(tmp_path):
    savemat(tmp_path / "a.mat", {"x": 1})
    with pytest.raises(RecordingError, match=r"a\.mat: expected CASCADE's layout"):
        read_ground_truth(tmp_path)
    (tmp_path / "a.mat").write_bytes(b"no matlab file at all")
    with pytest.raises(RecordingError, match=r"a\.mat: expected CASCADE's layout"):
        read_ground_truth(tmp_path)


def test_suite2ps_way_finds_the_spikes():
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    piece = benchmark.prepare([sweep()], 30.0)[0]
    rate = benchmark.suite2p_method()(piece.dff, 30.0)
    assert np.corrcoef(rate, piece.counts)[0, 1] > 0.5


def test_calibration_takes_the_scale_that_covers_as_it_should():
    rows = [
        {"window": window, "gain scale": scale, "90%": 0.9 + error, "50%": 0.5 + error}
        for window in accuracy.WINDOWS
        for scale, error in ((1.0, -0.1), (1.5, 0.02), (2.0, 0.05))
    ]
    assert accuracy.calibrate(rows) == 1.5


def test_the_oracle_knows_how_many_spikes_there_are():
    logits = torch.tensor([2.0, 0.0, -2.0])[None, :, None].expand(1, 3, 500)
    q = GainCategorical(logits, torch.zeros(1), torch.ones(1))
    known = accuracy._oracle(q, 100.0)
    assert float(known.mean.sum()) == pytest.approx(100.0, abs=0.5)
    assert float(known.gain_std) == 0


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A study of three simulated cells by models of folds that have learned nothing."""
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    for k in range(len(accuracy.FOLDS)):
        universal_model(FactorizedNetwork((4, 6), local_gain=True), "untrained").save(
            folder / f"fold{k + 1}.safetensors"
        )
    for name, rate in (("DS10-a", 120.0), ("DS24-b", 30.0)):
        s = sweep(rate, n=int(100 * rate))
        np.savez(
            folder / f"{name}.npz", cell=["c"], sweep=["0"], indicator=["x"], frame_rate=[rate], t0=[s.t0], dff=s.dff,
            trace_offsets=[0, len(s.dff)], spike_times=s.spike_times, spike_offsets=[0, len(s.spike_times)],
        )  # fmt: skip
    return accuracy.study(folder, folder)


def test_a_study_measures_all_that_it_should(record, tmp_path):
    rows = record["accuracy"]
    assert {r["method"] for r in rows} == {"calvae", "OASIS AR1", "OASIS AR2", "suite2p"}
    fast = {r["data set"] for r in rows if r["condition"] == "100 Hz"}
    assert fast == {"DS10-a"}
    assert all(r["shift"] == 0 for r in rows if r["method"] == "calvae")
    assert all(r["at best shift"] >= r["correlation"] for r in rows)
    assert set(record["gain scales"]) == {"all", *(f"fold {k + 1}" for k in range(5))}
    summary = benchmark.summary_rows(record)
    assert [r["data sets"] for r in summary] == [2, 2, 2, 2, 2, 1]
    # Untrained networks are behind.
    assert summary[0]["lead"] < 0
    assert summary[0]["ahead in"] == 0
    assert len(benchmark.other_rows(record)) >= 8
    assert [e["data set"] for e in record["examples"]] == ["DS10-a", "DS24-b"]
    assert all(len(e["dff"]) == 600 and len(e["samples"]) == 20 for e in record["examples"])
    benchmark.write_study(record, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text(encoding="utf-8")) == record
    text = (tmp_path / "out" / "accuracy.md").read_text(encoding="utf-8")
    assert "| DS10-a | 1 |" in text
    for name in ("accuracy.png", "reliability.png", "examples.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_cells_of_a_data_set_become_one_recording():
    pieces = benchmark.prepare([sweep(n=900), sweep(n=1800, seed=1)], 30.0)
    recording = adaptation.as_recording([*pieces, accuracy.Piece("D1", "D1/c2", 30.0, pieces[0].dff, pieces[0].counts)])
    assert recording.values.shape == (2, 450 + 64 + 900 + 64)
    assert np.isnan(recording.values[0, 450:514]).all()
    np.testing.assert_allclose(recording.values[0, 514:1414], pieces[1].dff, rtol=1e-6)
    assert not recording.valid[1, 450:].any()


def test_adaptation_is_scored_before_and_after(monkeypatch):
    torch.manual_seed(0)
    start, better = (universal_model(FactorizedNetwork((4, 6)), "x") for _ in range(2))
    models = accuracy.Models("universal")
    models.models = {0: start}
    monkeypatch.setattr(adaptation, "fit", lambda traces, base: better if base is start else None)
    (row,) = adaptation.adaptation_rows(models, [sweep()])
    assert (row["data set"], row["cells"]) == ("D1", 1)
    assert row["gain"] == row["after"] - row["before"] != 0


def test_the_amplitude_of_other_cells_sets_the_number_of_spikes():
    # Cells of three times the amplitude: without being told, we find about three times too many spikes.
    cells = [replace(s, cell=f"c{k}", dff=3 * s.dff) for k, s in enumerate(sweep(seed=seed) for seed in range(3))]
    models = accuracy.Models("universal")
    nothing, told = benchmark.amplitude_rows(models, cells, spread=0.2)
    assert (nothing["known"], told["known"]) == ("nothing", "amplitude, spread 0.2")
    assert nothing["cells"] == told["cells"] == 3
    assert told["abs(log counts)"] < min(0.2, nothing["abs(log counts)"])
    assert nothing["width, 10 s"] > 1.5 * told["width, 10 s"] > 1.5
    assert told["cells differ by"] < 0.3
    wide = benchmark.amplitude_rows(models, cells, spread=1.0)[1]
    assert wide["width, 10 s"] > 1.5 * told["width, 10 s"]


def test_variants_are_trained_without_a_fold_and_scored_on_it(tmp_path, monkeypatch):
    trained = []
    fill = ablation.RecordingSampler.fill

    def noted(self, *args):
        trained.append(len(self.datasets))
        return fill(self, *args)

    monkeypatch.setattr(ablation.RecordingSampler, "fill", noted)
    sweeps = [replace(sweep(n=6000, seed=k), dataset=name) for k, name in enumerate(("DS10-a", "DS24-b"))]
    small = [
        ablation.Variant("small", lambda: FactorizedNetwork((4, 6))),
        ablation.Variant("recurrent", lambda: AutoregressiveNetwork(4, 4, 2), simulated=0.5),
    ]
    rows = list(benchmark.ablation_rows(sweeps, tmp_path, Recipe(n_steps=2), 1, small))
    assert [r["variant"] for r in rows] == ["small", "recurrent"]
    assert set(trained) == {1}
    assert all(0 <= r["90 % in 1 s"] <= 1 for r in rows)
    assert rows[0]["parameters"] != rows[1]["parameters"]
    assert json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))["rows"] == rows


@pytest.mark.parametrize("delay", [0.0, 0.08])
def test_kernels_tell_when_fluorescence_follows(delay):
    rng = np.random.default_rng(3)
    rate, n = 60.0, 12_000
    spikes = np.sort(rng.uniform(0, n / rate, 300))
    time = np.arange(n) / rate
    after = time[:, None] - (spikes + delay)
    dff = 0.3 * np.where(after > 0, (1 - np.exp(-after.clip(0) / 0.03)) * np.exp(-after.clip(0) / 0.8), 0).sum(1)
    s = Sweep("D", "c", "x", rate, 0.0, (dff + 0.02 * rng.standard_normal(n)).astype(np.float32), spikes)
    (row,) = benchmark.kernel_rows([s])
    assert row["cells"] == 1
    # Half of the rise of 30 ms comes after 20 ms; lags are 25 ms apart.
    assert row["50% (ms)"] == pytest.approx(1000 * delay + 20, abs=10)
    assert row["10% (ms)"] < row["50% (ms)"] < row["90% (ms)"]


def test_folds_must_be_whole_and_know_the_data_set(tmp_path):
    with pytest.raises(RecordingError, match=r"found no fold1\.safetensors, fold2"):
        accuracy.Models(tmp_path)
    one = accuracy.Models("universal")
    assert one.fold("anything") == 0
    one.folds = True
    assert one.fold("DS31-GCaMP8m-m-V1") == one.fold("DS30-GCaMP8f-m-V1")
    with pytest.raises(RecordingError, match="leaves out DS99"):
        one.fold("DS99-x")
    universal_model(FactorizedNetwork((4, 6)), "third").save(tmp_path / "fold3.safetensors")
    some = accuracy.Models(tmp_path, ["DS30-a", "DS31-b"])
    assert some["DS31-b"].description == "third"
    assert list(some.networks) == [2]
    with pytest.raises(RecordingError, match=r"found no fold1\.safetensors\."):
        accuracy.Models(tmp_path, ["DS30-a", "DS10-b"])


def test_speed_is_measured_part_by_part_and_recorded(tmp_path):
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    size = speed.Size(frames=300, rois=4, roi_frames=300, repeats=1)
    for parts in (("trace", "rois", "machine"), ("growth",)):
        rows = list(speed.iter_speed(size, out=tmp_path, parts=parts))
        assert all(np.isfinite(row["value"]) for row in rows)
        assert all(row["value"] > 0 for row in rows if row["part"] != "growth")
    record = json.loads((tmp_path / "speed.json").read_text())
    assert list(record) == ["trace", "rois", "machine", "growth"]
    by_name = {row["what"]: row["value"] for row in record["rois"]["rows"]}
    own, rival = by_name["mean, one core, per ROI"], by_name["OASIS AR1, one core, per ROI"]
    assert by_name["speed against OASIS AR1: mean"] == pytest.approx(rival / own)
    page = (tmp_path / "speed.md").read_text()
    assert "`calvae benchmark speed growth --model universal --frames 300 --rois 4" in page
    assert page.count("\n| growth | exponent") == 3
    with pytest.raises(RecordingError, match="expected some of trace, rois, growth, machine, latency, fit, got clicks"):
        next(speed.iter_speed(size, parts=["clicks"]))


def test_cost_that_is_known_has_its_exponent(monkeypatch):
    """Where a task takes a second per square of the number of samples, the exponent is two."""
    now = [0.0]

    def pretend(traces, vae, n_samples=50):
        now[0] += traces.n_rois**2 * traces.n_frames * n_samples**0.5

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "infer", pretend)
    found = [
        row["value"] for row in speed.PARTS["growth"](speed.Size(rois=160, roi_frames=800, repeats=1), "universal")
    ]
    np.testing.assert_allclose(found, [2.0, 1.0, 0.5], atol=0.02)


def test_data_sets_that_are_not_there_are_told(shared):
    folder = shared / "ground_truth"
    assert {s.dataset[:4] for s in read_ground_truth(folder, only="DS20,DS04")} == {"DS04", "DS20"}
    with pytest.raises(RecordingError, match=r"names begin with DS99, got DS01"):
        read_ground_truth(folder, only="DS99")
