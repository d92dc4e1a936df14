"""Simulated recordings: what is true of them by construction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import napari_calvae
from napari_calvae.formats import read, read_labels, read_movie, read_spikes
from napari_calvae.generative import MODELS
from napari_calvae.preprocess import bin_spikes, delta_f_over_f, extract
from napari_calvae.recording import RecordingError
from napari_calvae.simulation import (
    MovieConfig,
    simulate,
    simulate_movie,
    simulate_spike_times,
    write_simulation,
)


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"jgcamp8m", "gcamp6f", "gcamp6s"}))
def test_traces_carry_the_spikes_that_made_them(model):
    simulated = simulate(4, 20.0, 25.0, model=model, seed=3)
    traces = simulated.traces
    assert traces.values.shape == simulated.counts.shape == (4, 500)
    for times, counts in zip(simulated.spike_times, simulated.counts, strict=True):
        np.testing.assert_array_equal(bin_spikes(times, traces.t0, 25.0, 500), counts)
        assert len(times) == counts.sum()
    assert set(simulated.theta) == {p.name for p in MODELS[model].parameters}
    assert np.isfinite(traces.values).all()


def test_a_seed_is_a_recording():
    one, same, other = (simulate(2, 10.0, 20.0, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.traces.values, same.traces.values)
    assert not np.array_equal(one.traces.values, other.traces.values)


def test_parameters_can_be_fixed():
    simulated = simulate(3, 5.0, 20.0, theta={"amplitude": 0.5, "baseline": -0.1}, variability=0)
    np.testing.assert_allclose(simulated.theta["amplitude"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(simulated.theta["baseline"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(simulated.theta["tau_decay"], simulated.theta["tau_decay"][0])


def test_spike_trains_have_the_rate_they_should():
    rng = np.random.default_rng(0)
    trains = [simulate_spike_times(200.0, 2.0, rng, start=5.0) for _ in range(200)]
    counts = np.array([len(t) for t in trains])
    # Counts are over-dispersed by the drifting rate: their mean is judged by their own spread.
    assert abs(counts.mean() - 400) < 4 * counts.std() / np.sqrt(len(counts))
    assert all((t >= 5).all() and (t < 205).all() and (np.diff(t) >= 0.002 - 1e-12).all() for t in trains)
    bursts = np.concatenate([np.diff(t) for t in trains]) < 0.02
    plain = np.concatenate([np.diff(simulate_spike_times(200.0, 2.0, rng, burstiness=0.0)) for _ in range(50)]) < 0.02
    assert bursts.mean() > 0.2
    assert plain.mean() < 0.12
    assert len(simulate_spike_times(1.0, 1e-9, rng)) == 0


@pytest.fixture(scope="module")
def movie():
    return simulate_movie(
        size=48, n_cells=5, duration=40.0, frame_rate=15.0, theta={"saturation": 6.0, "k_on": 2.0}, photons=20.0, seed=1
    )


def test_a_movie_shows_the_cells_that_it_says(movie):
    assert movie.movie.shape == (600, 48, 48)
    assert movie.movie.dtype == np.uint16
    assert set(np.unique(movie.labels)) == {0, *movie.truth.traces.roi_ids}
    mean = movie.movie.mean(0)
    assert mean[movie.labels > 0].mean() > 1.5 * mean[movie.labels == 0].mean()
    traces = delta_f_over_f(extract(movie.movie, movie.labels, 15.0))
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(traces.values, movie.truth.traces.values, strict=True)]
    assert np.median(correlation) > 0.9


def test_light_comes_in_photons(movie):
    gain = MovieConfig().gain
    np.testing.assert_array_equal(movie.movie % round(gain), 0)
    still = simulate_movie(
        size=32, n_cells=1, duration=100.0, frame_rate=10.0, rate=1e-6, motion=0, neuropil=0, gain=1, seed=2
    ).movie.astype(float)
    bright = still.mean(0) > 1
    # Poisson: the variance is the mean.
    assert (still.var(0)[bright] / still.mean(0)[bright]).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "none"}, "model: expected one of linear_ar, dye_binding"),
        ({"n_rois": 0}, "expected at least one ROI, one frame and a rate above 0, got 0 ROIs"),
        ({"frame_rate": None}, "frame_rate: expected"),
        ({"theta": {"colour": 1.0}}, r"theta of linear_ar: expected some of tau_rise.*got \{'colour': 1.0\}"),
        ({"theta": {"tau_decay": -1.0}}, r"above 0 but for the baseline"),
    ],
)
def test_simulations_that_cannot_be(settings, message):
    with pytest.raises(RecordingError, match=message):
        simulate(**settings)


@pytest.mark.parametrize(("setting", "value"), [("size", 3), ("motoin", 1.0), ("frame_rate", -1.0)])
def test_movies_that_cannot_be(setting, value):
    with pytest.raises(RecordingError, match=rf"{setting}: .*got {value}"):
        simulate_movie(**{setting: value})


def test_what_is_written_comes_back(tmp_path, movie):
    traces = simulate(2, 10.0, 20.0)
    assert write_simulation(traces, tmp_path / "a.npz") == [tmp_path / "a.npz"]
    np.testing.assert_array_equal(read(tmp_path / "a.npz").values, traces.traces.values)
    files = write_simulation(movie, tmp_path / "sample")
    assert [f.name for f in files] == ["movie.tif", "rois.tif", "spikes.npz"]
    frames, rate = read_movie(files[0])
    assert rate == pytest.approx(15.0)
    np.testing.assert_array_equal(np.asarray(frames), movie.movie)
    np.testing.assert_array_equal(read_labels(files[1]), movie.labels)
    np.testing.assert_array_equal(read_spikes(files[2])[3], movie.truth.spike_times[2])
    with pytest.raises(FileExistsError, match="exists already"):
        write_simulation(movie, tmp_path / "sample")
    with pytest.raises(RecordingError, match=r"ends in \.npz"):
        write_simulation(traces, tmp_path / "a.tif")
    with pytest.raises(RecordingError, match="name of a folder"):
        write_simulation(movie, tmp_path / "a.tif")


def test_the_sample_is_small_and_what_its_readme_says():
    folder = Path(napari_calvae.__file__).parent / "sample_data"
    frames, rate = read_movie(folder / "movie.tif")
    labels = read_labels(folder / "rois.tif")
    spikes = read_spikes(folder / "spikes.npz")
    assert frames.shape == (450, 64, 64)
    assert rate == pytest.approx(10.0)
    assert set(np.unique(labels)) == {0, *spikes}
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1e6
    again = simulate_movie(
        n_cells=9,
        size=64,
        duration=45.0,
        frame_rate=10.0,
        rate=0.4,
        theta={"saturation": 5.0, "k_on": 1.5},
        photons=4.0,
        gain=1.0,
        seed=57,
    )
    np.testing.assert_array_equal(again.labels, labels)
    # Photons differ as soon as anything upstream rounds differently; cells, spikes and the picture must not.
    for roi, times in zip(again.truth.traces.roi_ids, again.truth.spike_times, strict=True):
        np.testing.assert_allclose(spikes[roi], times)
    assert np.corrcoef(again.movie.mean(0).ravel(), np.asarray(frames).mean(0).ravel())[0, 1] > 0.99
    traces = delta_f_over_f(extract(frames, labels, rate))
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(traces.values, again.truth.traces.values, strict=True)]
    assert min(correlation) > 0.8


def test_settings_take_the_place_of_those_of_a_configuration():
    config = MovieConfig(duration=2, frame_rate=10, n_cells=2, size=64)
    longer = simulate_movie(config, duration=3.0)
    assert len(longer.movie) == 30
    assert len(simulate_movie(config).movie) == 20
    with pytest.raises(RecordingError):
        simulate_movie(config, durration=3.0)


def test_more_spikes_than_a_count_holds_are_refused():
    with pytest.raises(RecordingError, match="at most 255 spikes per frame, got"):
        simulate(2, 2000.0, 0.05, rate=60.0)
