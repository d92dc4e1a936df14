"""No file, however damaged, brings more than a clear error: no crash, no hang, no gigabyte, no code run."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import napari_calvae as calvae

fuzzing = pytest.importorskip("fuzzing")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")


@pytest.mark.parametrize("reader", ["npz", "h5", "suite2p", "result", "movie.tif"])
def test_damaged_files_are_refused(reader):
    assert fuzzing.survey(reader, 0, 25) == []


@pytest.mark.slow
@pytest.mark.parametrize("reader", fuzzing.READERS)
def test_ten_thousand_damaged_files_are_refused(reader):
    assert fuzzing.survey(reader, 25, 10_025) == []


def test_what_goes_wrong_is_noticed(tmp_path):
    """A stray exception, a hang, too much memory and the end of the process: the survey tells them all."""
    found = fuzzing.survey("trouble", 0, 4)
    assert [text.split(":")[0] for text in found] == [f"trouble {k} (file)" for k in range(3)] + ["trouble 3"]
    for text, word in zip(found, ("ZeroDivisionError", "took too long", "MemoryError", "process ended"), strict=True):
        assert word in text


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".csv", ".mat", ".parquet", ".nwb", ".zarr"])
def test_intact_traces_come_back(tmp_path, suffix):
    traces = fuzzing.small()
    calvae.write(traces, tmp_path / f"a{suffix}")
    again = calvae.read(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(again.values, traces.values, rtol=1e-5)  # tables have six digits
    assert (again.unit, again.roi_ids) == ("raw", traces.roi_ids)
    assert again.frame_rate == pytest.approx(30.0)
