"""Benchmarks on the recordings that a person would try first; rivals see the same traces in the same run."""

from __future__ import annotations

import numpy as np
import pytest

from napari_calvae import benchmark
from napari_calvae.formats.ground_truth import Sweep, read_ground_truth
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


def test_speed_rows_name_what_was_timed():
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    rows = list(benchmark.speed(n_frames=600, repeats=1))
    assert [row["task"] for row in rows][:2] == ["calvae, mean rate", "calvae, 50 samples and reconstruction"]
    assert all(row["seconds"] > 0 for row in rows)
