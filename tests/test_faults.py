"""Whatever happens in the middle of long work, results are whole or absent, and what is resumed is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import napari_calvae as calvae

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
SCRIPT = Path(__file__).with_name("faults.py")


def survey(*arguments: object) -> tuple[int, list[str]]:
    """Run the script in a process of its own, which may fork: this one has threads."""
    words = [sys.executable, str(SCRIPT), *map(str, arguments)]
    # What is freed goes back to the system at once: otherwise there may be enough below a limit of memory.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=3000, check=False, env=settings)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def test_a_store_survives_kills():
    assert survey("infer", 5) == (5, [])


@pytest.mark.slow
@pytest.mark.parametrize("work", ["infer", "export", "train"])
def test_two_hundred_kills(work):
    kills, wrong = survey(work, 200)
    assert kills >= 190  # as many for each format
    assert wrong == []


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path], check=False).returncode
    ):
        pytest.skip("a file system of 20 MB can be mounted by root alone")
    try:
        assert survey("full_disk", tmp_path) == (0, [])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_files_that_cannot_be_written_to_their_end_leave_all_as_it_was(tmp_path):
    assert survey("short_files", tmp_path) == (0, [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")
def test_memory_that_runs_out_leaves_what_was_inferred(tmp_path):
    assert survey("little_memory", tmp_path) == (0, [])


def test_a_store_has_one_writer(tmp_path):
    traces = calvae.simulate(3, 4.0, 30.0, rate=1.0, seed=0).traces
    out = tmp_path / "result.zarr"
    steps = calvae.iter_batch(traces, out, n_samples=2, block_rois=1)
    next(steps)
    with pytest.raises(calvae.RecordingError, match=r"one that another run is writing now\. Wait"):
        calvae.infer(traces, out=out, n_samples=2, block_rois=1)
    with pytest.raises(calvae.RecordingError, match=r"one that another run is writing now\. Wait"):
        calvae.infer(traces, out=out, n_samples=9, overwrite=True)
    steps.close()
    assert calvae.infer(traces, out=out, n_samples=2, block_rois=1).done.all()
    assert [path.name for path in tmp_path.iterdir()] == ["result.zarr"]
