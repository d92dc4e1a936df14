"""One oath for every proof: it runs, and its table is whole."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from napari_calvae.benchmark import paper
from napari_calvae.benchmark.paper import scdf_cells
from napari_calvae.recording import RecordingError

#: Proofs of which even a quick run is short.
SHORT = {"exact", "kinetics", "scdf", "spines"}


@pytest.fixture(params=[n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in sorted(paper.PROOFS)])
def proof(request) -> paper.Proof:
    return paper.PROOFS[request.param]


def test_a_quick_run_yields_a_whole_table(proof, tmp_path, request):
    data = request.getfixturevalue("shared") / "ground_truth" if proof.real else None
    rows = list(proof.run(paper.Setting(cache=tmp_path, data=data, quick=True)))
    assert rows
    for row in rows:
        assert list(row) == list(rows[0])
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
        assert row.get("holds", "yes") == "yes"


def test_the_scdf_cells_come_from_the_recursion_that_is_fitted():
    cells = scdf_cells.simulate(4, 400, 0)
    assert cells.spikes.sum() > 10
    theta = {name: torch.from_numpy(value) for name, value in cells.theta.items()}
    fluorescence = scdf_cells.PaperStep().fluorescence(torch.from_numpy(cells.spikes), theta, scdf_cells.FRAME_RATE)
    assert np.abs(fluorescence.numpy() - cells.clean).max() < 1e-12


def _count(setting):
    for k in range(3):
        yield {"k": k, "square": float(k * k + setting.seed), "word": f"p(w{k} | s)"}


COUNTING = paper.Proof("counting", "Counting", "Squares grow.", _count)


def test_a_record_says_how_to_repeat_it(tmp_path):
    setting = paper.Setting(cache=tmp_path / "cache", seed=3)
    rows = list(paper.run(COUNTING, setting, tmp_path))
    record = json.loads((tmp_path / "counting.json").read_text())
    assert record["rows"] == rows
    assert record["command"] == "calvae benchmark paper counting --seed 3"
    assert record["cpu_seconds"] >= 0
    report = paper.to_markdown({"counting": COUNTING, "other": COUNTING}, paper.read_records(tmp_path))
    assert r"| 2 | 7 | p(w2 \| s) |" in report
    assert "*Not run.*" in report


def test_a_proof_that_was_stopped_leaves_no_record(tmp_path):
    next(paper.run(COUNTING, paper.Setting(cache=tmp_path), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_proof_on_real_recordings_asks_for_them(tmp_path):
    with pytest.raises(RecordingError, match="--data FOLDER"):
        paper.Setting(cache=tmp_path).ground_truth()
