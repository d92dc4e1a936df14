"""What the docs offer to pipelines, run as they are: a Snakemake rule and a notebook."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import napari_calvae as calvae
from napari_calvae.simulation import simulate

PIPELINES = Path(__file__).parents[1] / "docs" / "pipelines"


@pytest.fixture
def recording(tmp_path, request):
    """A small recording in suite2p's layout, ROIs of eight pixels each."""
    plane = tmp_path / "mouse1" / "suite2p" / "plane0"
    plane.mkdir(parents=True)
    traces = simulate(4, 15.0, 20.0, seed=1).traces
    np.save(plane / "F.npy", 500 * (1 + traces.values))
    np.save(plane / "Fneu.npy", np.full_like(traces.values, 300.0))
    np.save(plane / "iscell.npy", np.array([[1, 0.9], [0, 0.1], [1, 0.8], [1, 0.7]]))
    stat = [
        {
            "ypix": np.full(8, 3 * k + 1),
            "xpix": np.arange(8),
            "lam": np.ones(8, np.float32),
            "overlap": np.zeros(8, bool),
        }
        for k in range(4)
    ]
    np.save(plane / "stat.npy", np.array(stat, dtype=object))
    np.save(plane / "ops.npy", {"fs": 20.0, "Ly": 16, "Lx": 16, "neucoeff": 0.7})
    return tmp_path / "mouse1" / "suite2p"


def test_the_snakemake_rule(recording, tmp_path):
    pytest.importorskip("snakemake", reason="install napari-calvae[test]")
    pynwb = pytest.importorskip("pynwb", reason="install napari-calvae[formats]")
    shutil.copy(PIPELINES / "Snakefile", tmp_path)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", "--config", "samples=5"]
    paths = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert calvae.open_result(tmp_path / "spikes" / "mouse1.zarr").done.all()
    with pynwb.NWBHDF5IO(tmp_path / "spikes" / "mouse1.nwb", "r") as file:
        assert "ophys" in file.read().processing
    again = subprocess.run(
        [*command, "--dry-run"], cwd=tmp_path, env=paths, capture_output=True, text=True, check=False
    )
    assert "rule infer" not in again.stdout + again.stderr


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook(recording, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="install napari-calvae[test]")
    import nbformat

    notebook = nbformat.read(PIPELINES / "suite2p_to_rates.ipynb", as_version=4)
    assert notebook.cells[1].source.startswith("FOLDER = ")
    notebook.cells[1].source = f"FOLDER = {str(recording)!r}"
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("4 ROIs, 15 s at 20 Hz" in output.get("text", "") for output in shown)
    assert any("image/png" in output.get("data", {}) for output in shown)
    table = np.genfromtxt(tmp_path / "rates.csv", delimiter=",", names=True)
    assert len(table) == 300
    assert table.dtype.names[1:] == ("1", "3", "4")
    assert (tmp_path / "spikes.nwb").is_file()
