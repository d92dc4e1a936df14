"""What looks wrong with traces: each doubt arises from what it is about, and from nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

import napari_calvae as calvae
from napari_calvae.doubts import CHECKS

RATE = 30.0


@pytest.fixture(scope="module")
def dff() -> np.ndarray:
    """(roi, time) two minutes of ten cells."""
    return calvae.simulate(10, 120.0, RATE, rate=1.0, seed=0).traces.values


def codes(values, unit="dff", roi_ids=()) -> dict[str, tuple[int, ...]]:
    traces = calvae.Traces(np.asarray(values, np.float32), RATE, unit=unit, roi_ids=roi_ids)
    return {doubt.code: doubt.roi_ids for doubt in calvae.check(traces)}


def spoiled(dff: np.ndarray) -> dict[str, tuple[np.ndarray, str]]:
    """What each doubt is about, in all ROIs or in the recording."""
    rng = np.random.default_rng(0)
    raw, fading = 100 * (1 + dff), np.exp(-np.arange(dff.shape[1]) / 2000)
    jump, late = raw.copy(), raw.copy()
    jump[:, 1000:1003] += 400
    late[:, :6] += 3000
    top = np.quantile(dff, 0.99, axis=1, keepdims=True)
    return {
        "time-axis": (raw.T, "raw"),
        "raw-as-dff": (raw, "dff"),
        "percent": (100 * dff, "dff"),
        "dff-as-raw": (dff, "raw"),
        "smoothed": (gaussian_filter1d(dff, 3, axis=1), "dff"),
        "clipped": (np.minimum(dff, top), "dff"),
        "bleached": (raw * fading, "raw"),
        "common-frames": (jump, "raw"),
        "first-frames": (late, "raw"),
        "repeated": (np.repeat(raw[:5], 2, axis=0), "raw"),
        "missing": (np.where(rng.random(raw.shape) < 0.4, np.nan, raw), "raw"),
    }


def test_a_frame_rate_that_contradicts_the_file_is_doubted(dff, tmp_path):
    traces = calvae.Traces(dff[:, :600], RATE)
    for name in ("a.npz", "a.csv", "a.nwb", "a.zarr", "a.parquet", "a.h5", "a.mat"):
        calvae.write(traces, tmp_path / name)
        told = {rate: calvae.check(calvae.read(tmp_path / name, rate)) for rate in (None, 30.1, 15.0)}
        assert told[None] == told[30.1] == (), name
        assert [str(doubt) for doubt in told[15.0]] == [
            "frame-rate: expected the frame rate that the file tells, 30 Hz, got 15 Hz. "
            "If the file is right, leave the frame rate out."
        ], name
        assert calvae.read(tmp_path / name, 15.0).frame_rate == 15.0


def test_good_traces_are_not_doubted(dff):
    assert codes(dff) == {}
    assert codes(100 * (1 + dff), "raw") == {}
    assert codes(np.round(300 * (1 + dff)), "raw") == {}  # whole numbers, as photon counts


@pytest.mark.parametrize("code", [code for code in CHECKS if code != "frame-rate"])
def test_each_doubt_is_about_what_it_says(dff, code):
    values, unit = spoiled(dff)[code]
    found = codes(values, unit)
    assert code in found
    whole = {"time-axis", "percent", "common-frames", "first-frames"}
    if code not in whole:
        assert len(found[code]) >= 9
    # A recording that starts far off jumps there in all cells, too; turned around nothing makes sense.
    allowed = {"first-frames": {"common-frames"}, "time-axis": set(CHECKS)}.get(code, set())
    assert set(found) <= {code} | allowed


def test_percent_is_told_by_its_transients_where_noise_was_taken_away(dff):
    smooth = gaussian_filter1d(dff, 3, axis=1)
    assert set(codes(100 * smooth)) == {"smoothed", "percent"}
    assert "percent" not in codes(100 * smooth, "raw")
    assert codes(np.concatenate([100 * dff[:3], dff[3:]])) == {}  # most are a fraction: it concerns a recording


def test_only_the_rois_concerned_are_named(dff):
    raw = 100 * (1 + dff)
    raw[3] *= np.exp(-np.arange(raw.shape[1]) / 2000)
    assert codes(raw, "raw", roi_ids=range(20, 30)) == {"bleached": (23,)}
    raw[7] = raw[2]
    assert codes(raw, "raw")["repeated"] == (3, 8)


def test_scale_does_not_matter_to_what_is_not_about_it(dff):
    values, _ = spoiled(dff)["smoothed"]
    for factor in (1e-6, 1.0, 1e6):
        assert "smoothed" in codes(factor * values)
        assert "smoothed" not in codes(factor * dff)


@pytest.mark.parametrize(
    "values", [np.zeros((2, 400)), np.full((3, 400), np.nan), np.eye(2, 40), np.ones((1, 1)), np.zeros((300, 60))]
)
def test_degenerate_traces_are_no_error(values):
    for unit in ("raw", "dff"):
        for doubt in calvae.check(calvae.Traces(values, RATE, unit=unit)):
            assert doubt.code in CHECKS


def test_published_recordings_are_not_doubted(shared):
    """As published, these are what users bring: a doubt about them would be ignored soon."""
    from napari_calvae.formats.ground_truth import read_ground_truth

    sweeps = list(read_ground_truth(shared / "ground_truth", min_duration=20.0))[::5]
    doubted = [s.dataset for s in sweeps if codes(s.dff[None]) and "spinal" not in s.dataset]
    assert len(sweeps) > 50
    assert doubted == []
    assert np.mean(["percent" in codes(100 * s.dff[None]) for s in sweeps]) > 0.98


def test_every_code_is_explained():
    page = (Path(__file__).parents[1] / "docs" / "doubts.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `(.+)`$", page, re.M) == list(CHECKS)


def test_a_doubt_is_a_sentence_that_names_what_to_do(dff):
    (doubt,) = calvae.check(calvae.Traces(100 * (1 + dff), RATE, unit="dff"))
    assert str(doubt) == (
        "raw-as-dff: ROIs 1, 2, 3, 4, 5, 6, 7, 8 …: expected ΔF/F, which rests near 0, got values that never come "
        "below 2. If this is raw fluorescence, say unit='raw' (--unit raw)."
    )


def test_traces_in_a_file_are_looked_at_without_loading_them_all(dff, tmp_path):
    np.save(tmp_path / "many.npy", np.tile(dff[:, :300], (30, 1)).astype(np.float32))
    source = calvae.open_traces(tmp_path / "many.npy", RATE, "dff")
    assert {doubt.code for doubt in calvae.check(source)} == {"repeated"}
