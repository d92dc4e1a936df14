"""Spikes while a recording is going on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import napari_calvae as calvae
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recognition import CausalNetwork, FactorizedNetwork
from napari_calvae.recognition.base import trace_features, trace_scale
from napari_calvae.vae import ModelError, SpikeVAE

RATE = 20.0


def model(kind, **settings) -> SpikeVAE:
    torch.manual_seed(0)
    network = kind(**settings)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return SpikeVAE(network.eval(), MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=network.max_count))


@pytest.fixture(scope="module")
def causal() -> SpikeVAE:
    return model(CausalNetwork, width=6, n_levels=4, max_count=3, lags=(0, 2), lag=0)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return 100 + np.random.default_rng(0).normal(size=(3, 300)).cumsum(1).astype(np.float32)


def frame_by_frame(live, values) -> list:
    found = [live.push(frame) for frame in values.T]
    return [*found, live.finish()]


def block_by_block(live, values) -> np.ndarray:
    """Five frames at a time."""
    parts = [live.push(part) for part in np.split(values, range(5, values.shape[1], 5), 1)] + [live.finish()]
    return np.concatenate([part.rate for part in parts], 1)


def test_every_frame_gets_its_rate_once_and_in_order(causal, values):
    live = calvae.stream(causal, RATE, lag=2)
    found = frame_by_frame(live, values)
    assert [part.rate.shape[1] for part in found[:99]] == [0] * 99  # five seconds
    assert found[99].rate.shape == (3, 98)
    assert all(part.rate.shape == (3, 1) for part in found[100:300])
    assert found[300].rate.shape == (3, 2)
    np.testing.assert_array_equal(np.concatenate([part.frames for part in found]), np.arange(300))
    np.testing.assert_allclose(found[150].times, [148 / RATE])
    assert all((part.rate > 0).all() for part in found)
    assert live.n_frames == 300


def test_a_recording_that_ends_before_it_can_be_told_has_no_frames_of_its_rois(causal, values):
    live = calvae.stream(causal, RATE, lag=2)
    parts = [live.push(values[:, :20]).rate, live.finish().rate]
    assert np.concatenate(parts, 1).shape == (3, 0)


def test_rates_are_those_of_the_network_in_units_of_what_came_before(causal, values):
    """Five seconds at once, the next frames: the outputs of the whole trace, had it been measured in these units."""
    live = calvae.stream(causal, RATE, lag=2)
    found = np.concatenate([live.push(values[:, :200]).rate, live.push(values[:, 200:230]).rate], 1)
    seen = torch.from_numpy(values)
    scale, network = trace_scale(seen[:, :200]), live._network
    log_rate = torch.full((3,), RATE).log()
    with torch.inference_mode():
        summary = network.summarise(trace_features(seen[:, :200]), log_rate)
        local = network.local(trace_features(seen[:, :230], None, scale), log_rate, summary)
        expected = network.posterior(local, log_rate, summary).mean.numpy() * RATE
    np.testing.assert_allclose(found[:, :198], expected[:, :198], rtol=1e-4)
    # Within two seconds all are measured again, so the next frames are in slightly other units.
    assert np.corrcoef(np.log(found[:, 198:]).ravel(), np.log(expected[:, 198:228]).ravel())[0, 1] > 0.9


def test_how_frames_are_bundled_hardly_matters(causal, values):
    one = frame_by_frame(calvae.stream(causal, RATE, lag=2), values)
    live = calvae.stream(causal, RATE, lag=2)
    other = [live.push(part) for part in np.split(values, [100, 107, 108, 200], 1)] + [live.finish()]
    one, other = (np.concatenate([part.rate for part in parts], 1) for parts in (one, other))
    np.testing.assert_allclose(one[:, :98], other[:, :98], rtol=1e-4)
    # What they are measured in is looked at again at other moments.
    assert np.corrcoef(np.log(one).ravel(), np.log(other).ravel())[0, 1] > 0.9


def test_rois_know_nothing_of_each_other_and_silent_ones_say_nothing(causal, values):
    dead = np.concatenate([values, np.full((1, 300), 7.0), np.full((1, 300), np.nan)])
    found = calvae.stream(causal, RATE, lag=0).push(dead)
    assert np.isnan(found.rate[3:]).all()
    np.testing.assert_allclose(found.rate[:3], calvae.stream(causal, RATE, lag=0).push(values).rate, rtol=1e-4)


def test_missing_frames_are_bridged(causal, values):
    gap = values.copy()
    gap[:, 150:160] = np.nan
    found = calvae.stream(causal, RATE, lag=2).push(gap)
    assert np.isfinite(found.rate).all()


@pytest.mark.parametrize("nothing", [0.0, np.nan])
def test_a_roi_that_is_not_there_at_first_is_told_soon_after_it_comes(nothing):
    """And one beside it as if nothing had been: neither zeros nor gaps stay in what the network remembers for long."""
    causal = model(CausalNetwork, width=6, n_levels=7, max_count=3, lags=(0, 2), lag=0)
    values = 100 + np.random.default_rng(1).normal(size=(2, 800)).cumsum(1).astype(np.float32) / 5
    late = values.copy()
    late[1, :160] = nothing
    rate, other = (block_by_block(calvae.stream(causal, RATE, lag=2), v) for v in (late, values))
    np.testing.assert_allclose(rate[0], other[0], rtol=1e-5)
    told = np.flatnonzero(np.isfinite(rate[1]))
    assert 160 <= told[0] <= 160 + 80  # once there is enough of it to measure
    assert np.isfinite(rate[1, told[0] :]).all()


def test_after_a_long_gap_a_roi_goes_on_as_before(causal):
    values = 100 + np.random.default_rng(1).normal(size=(1, 3000)).cumsum(1).astype(np.float32) / 5
    values[:, 400:2600] = np.nan  # longer than what is remembered
    assert np.isfinite(block_by_block(calvae.stream(causal, RATE, lag=2), values)).all()


def test_images_are_read_at_the_rois(causal, values):
    rng = np.random.default_rng(1)
    labels = np.zeros((30, 30), np.int32)
    labels[3:8, 3:8], labels[20:25, 10:15] = 1, 2
    movie = rng.normal(100, 5, (300, 30, 30))
    movie[:, labels == 1] += 20 * np.maximum(0, values[0] - 100)[:, None]
    live = calvae.stream(causal, RATE, lag=2, rois=labels)
    found = [live.push(movie[:120]), *(live.push(image) for image in movie[120:])]
    rate = np.concatenate([part.rate for part in found], 1)
    assert rate.shape == (2, 298)
    # Up to a constant, which no network sees, these are the traces that are extracted afterwards.
    traces = calvae.extract(movie, labels, RATE)
    again = np.concatenate([(part := calvae.stream(causal, RATE, lag=2)).push(traces.values[:, :120]).rate], 1)
    np.testing.assert_allclose(rate[:, :118], again, rtol=2e-3)
    assert part.lag == 2
    with pytest.raises(calvae.RecordingError, match=r"30 × 30 pixels like the ROIs, got shape \(2, 20, 30\)"):
        live.push(np.zeros((2, 20, 30)))


def test_a_frame_whose_neuropil_was_not_measured_is_missing_as_in_extraction():
    labels = np.zeros((40, 40), np.int32)
    labels[15:22, 15:22] = 1
    movie = np.random.default_rng(0).normal(100, 5, (60, 40, 40)).astype(np.float32)
    movie[20][labels == 0] = np.nan  # the cell is there
    read = calvae.FrameReader(labels).read(movie)
    np.testing.assert_array_equal(np.isnan(read), ~calvae.extract(movie, labels, RATE).valid)
    assert np.flatnonzero(np.isnan(read[0])).tolist() == [20]
    assert np.isfinite(calvae.FrameReader(labels, neuropil_coefficient=0).read(movie)).all()


@pytest.mark.parametrize("dtype", [np.uint16, ">f4", np.float64, bool])
def test_any_real_numbers_are_taken(causal, values, dtype):
    assert calvae.stream(causal, RATE, lag=0).push(values.astype(dtype)).rate.dtype == np.float32


def test_bad_input_is_a_clear_error(causal, values):
    live = calvae.stream(causal, RATE, lag=2)
    live.push(values[:, 0])
    with pytest.raises(calvae.RecordingError, match=r"expected \(3,\) numbers, one for each ROI.*got shape \(2,\)"):
        live.push(values[:2, 0])
    with pytest.raises(calvae.RecordingError, match="of dtype complex64"):
        live.push(values[:, 0] * 1j)
    with pytest.raises(calvae.RecordingError, match="got shape"):
        live.push(3.0)
    with pytest.raises(calvae.RecordingError, match=r"expected one of 0, 2 frames, got 3\. Choose"):
        calvae.stream(causal, RATE, lag=3)
    with pytest.raises(calvae.RecordingError, match="never guessed"):
        calvae.stream(causal, lag=2)
    with pytest.raises(calvae.RecordingError, match="frame rate: expected 3 to 120 Hz"):
        calvae.stream(causal, 500.0, lag=2)
    with pytest.raises(ModelError, match=r"'factorized', which sees whole traces"):
        calvae.stream(model(FactorizedNetwork, widths=(4, 6)), RATE)
    assert live.finish().rate.shape[1] == 0


def test_no_frames_bring_no_rates(causal, values):
    live = calvae.stream(causal, RATE, lag=0)
    for n_frames in (0, 50, 0, 100, 0):
        part = live.push(values[:, :n_frames])
    assert part.rate.shape == live.finish().rate.shape == (3, 0)
    assert part.first == live.n_frames == 150


def test_a_stream_leaves_the_model_as_it_is(causal, values):
    before = causal.recognition.lag
    calvae.stream(causal, RATE, lag=2).push(values)
    assert causal.recognition.lag == before == 0


def test_what_a_lag_costs_is_measured(causal, tmp_path, monkeypatch):
    """Every lag is scored on the cells on which whole traces are; the answers are those of the stream."""
    from napari_calvae.benchmark import live
    from napari_calvae.formats.ground_truth import Sweep

    rng = np.random.default_rng(3)
    sweeps = []
    for cell in ("a", "b"):
        spikes = np.sort(rng.uniform(0, 20, 30))
        kernel = np.r_[0.0, np.exp(-np.arange(60) / 15)]  # fluorescence follows a frame later
        dff = np.convolve(np.histogram(spikes, np.arange(601) / 30)[0], kernel)[:600]
        sweeps.append(Sweep("D1", cell, "none", 30.0, 0.0, (dff + 0.1 * rng.normal(size=600)).astype("f4"), spikes))
    path = causal.save(tmp_path / "causal.safetensors")
    rows = list(live.iter_live(sweeps, str(path)))
    assert [list(row) for row in rows] == [["data set", "cells", "whole trace", "lag 0", "lag 2"]]
    assert rows[0]["whole trace"] > 0.5
    assert rows[0]["lag 2"] < rows[0]["whole trace"]  # this network has learned nothing
    streamed = live.live_method(causal, 2)(sweeps[0].dff, 30.0)
    whole = calvae.stream(causal, 30.0, lag=2)
    parts = [whole.push(sweeps[0].dff[None, k : k + 30]).rate for k in range(0, 600, 30)] + [whole.finish().rate]
    np.testing.assert_array_equal(streamed, np.concatenate(parts, 1)[0])
    live.write_live(rows, tmp_path, "me")
    page = (tmp_path / "live.md").read_text()
    assert "| lag 2 |" in page
    assert "| D1 | 2 |" in page


def test_units_are_measured_again_eight_times_while_as_much_comes(causal, values, monkeypatch):
    """All ROIs with the first block, then each eight times while the recording doubles, however it comes."""
    from napari_calvae.live import _Cells

    measured, measure = [], _Cells._measure
    monkeypatch.setattr(_Cells, "_measure", lambda self, rows: measured.append(len(rows)) or measure(self, rows))
    many = np.tile(values, (20, 1))
    live = calvae.stream(causal, RATE, lag=0)
    live.push(many[:, :150])
    assert measured == [60]
    for frame in many[:, 150:].T:
        live.push(frame)
    assert sum(measured[1:]) == pytest.approx(8 * 60 * np.log(2), rel=0.02)
    assert max(measured[1:]) <= 1 + 8 * 60 / 150
    measured.clear()
    live.push(many)  # twice as much at once: measured as it is then
    assert measured == [60]
