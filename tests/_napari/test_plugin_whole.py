"""The whole way with the trained network: the sample movie, a click, spikes; and the demo without a display."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import napari_calvae as calvae
from napari_calvae._napari.contributions import open_sample, sample_folder


def test_a_click_on_the_sample_movie_shows_what_the_network_infers(qtbot, viewer, open_widget, canvas):
    for data, options, kind in open_sample():
        getattr(viewer, f"add_{kind}")(data, **options)
    widget = open_widget()
    labels = viewer.layers["ROIs"].data
    with np.load(sample_folder() / "spikes.npz") as truth:
        true = {int(name.rsplit("_", 1)[1]): truth[name] for name in truth if name.startswith("spike_times_")}
    roi = max(true, key=lambda r: len(true[r]))
    canvas.click(*np.argwhere(labels == roi).mean(axis=0))
    qtbot.waitUntil(lambda: widget.plots.picture is not None, timeout=60_000)
    movie = viewer.layers["two-photon movie"]
    rate = movie.metadata["frame_rate"]
    traces = calvae.extract(movie.data, labels, rate)
    expected = calvae.infer(traces.select([traces.index(roi)]))
    shown = widget.plots.picture
    assert shown.roi_ids == (roi,)
    np.testing.assert_allclose(shown.rate, expected.rate, rtol=1e-3, atol=1e-3)
    counts = np.histogram(true[roi], np.append(shown.traces.times, shown.traces.times[-1] + 1 / rate) - 0.5 / rate)[0]
    smooth = np.hanning(round(rate) | 1)
    correlation = np.corrcoef(np.convolve(shown.rate[0], smooth, "same"), np.convolve(counts, smooth, "same"))[0, 1]
    assert correlation > 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a display can be made on Linux alone")
def test_the_demo_without_a_display_writes_a_picture(tmp_path):
    from vispy.io import imread

    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    target = tmp_path / "demo.png"
    code = f"from napari_calvae._napari import demo; from pathlib import Path; demo.run(Path({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    picture = imread(target)
    assert picture.shape[0] >= 700
    assert picture.shape[1] >= 1200
    teal = (np.abs(picture[..., :3].astype(int) - (0x35, 0xC9, 0xB5)).sum(-1) < 30).sum()
    assert teal > 300


def test_the_demo_says_how_to_get_a_display(monkeypatch):
    from napari_calvae._napari import demo

    monkeypatch.setattr(demo, "has_display", lambda: False)
    monkeypatch.setattr(demo.shutil, "which", lambda _: None)
    with pytest.raises(calvae.RecordingError, match="apt-get install -y xvfb"):
        demo.run()


@pytest.mark.slow
def test_waiting_is_measured_in_a_window_of_its_own():
    code = "from napari_calvae._napari.latency import iter_latency; print([r['times'] for r in iter_latency(600, 2)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[1, 2, 2, 30, 30, 1, 1]")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a display can be made on Linux alone")
def test_the_tour_comes_to_its_end_with_a_picture_of_every_step(tmp_path):
    from napari_calvae._napari import demo

    pictures = demo.run_tour(tmp_path)
    names = [path.stem.split("-", 1)[1] for path in pictures]
    assert names[0] == "opened"
    assert {"clicked-5", "edited", "all-inferred", "sorted", "rejected", "exported", "retraining", "lit-up"} <= set(
        names
    )
    assert all(path.stat().st_size > 50_000 for path in pictures)
    assert (tmp_path / "cells.csv").read_text().count("\n") == 10
    assert "<svg" in (tmp_path / "cell.svg").read_text()
