"""A result carries what is needed to make it again, and is proven by doing so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

import napari_calvae as calvae
from napari_calvae.cli import app


@pytest.fixture(scope="module")
def traces() -> calvae.Traces:
    values = calvae.simulate(5, 10.0, 30.0, rate=1.0, seed=0).traces.values
    return calvae.Traces(values, 30.0, unit="dff", roi_ids=(4, 2, 9, 11, 3))


@pytest.fixture(scope="module")
def folder(traces, tmp_path_factory):
    """Traces and results of them, in files."""
    path = tmp_path_factory.mktemp("results")
    calvae.write(traces, path / "traces.npz")
    calvae.infer(traces, out=path / "result.zarr", n_samples=5, seed=3, device="cpu", block_rois=2)
    calvae.write(calvae.infer(traces, n_samples=5, seed=3, device="cpu"), path / "result.npz")
    return path


@pytest.mark.parametrize("name", ["result.zarr", "result.npz"])
def test_a_result_is_made_again_from_its_file(folder, name):
    found = calvae.repeat(folder / name, folder / "traces.npz")
    assert found.same
    assert (found.n_rois, found.differing, found.changed) == (5, (), ())
    assert str(found) == "5 ROIs inferred again, the same to the last bit."


def test_some_of_the_rois_in_any_order_are_found_by_their_ids(traces):
    some = calvae.infer(traces.select([3, 0]), n_samples=5)
    found = calvae.repeat(some, traces)
    assert found.same
    assert found.n_rois == 2
    assert found.changed == ("the recording: values, ROIs, frame rate or unit",)


def test_cells_may_be_judged_anew(traces, tmp_path):
    calvae.write(calvae.infer(traces.replace(accepted=[True] * 5), n_samples=2), tmp_path / "judged.npz")
    assert calvae.repeat(tmp_path / "judged.npz", traces.replace(accepted=[True] * 4 + [False])).same


def test_rois_without_signal_are_the_same_too(traces, tmp_path):
    values = np.array(traces.values)
    values[1] = 0.25
    dead = calvae.Traces(values, 30.0, unit="dff")
    store = calvae.infer(dead, out=tmp_path / "dead.zarr", n_samples=4)
    assert store.without_signal == (2,)
    assert calvae.repeat(store, dead).same


def test_one_changed_number_is_found(folder, tmp_path):
    with np.load(folder / "result.npz") as file:
        arrays = dict(file)
    arrays["rate"][2, 100] = np.nextafter(arrays["rate"][2, 100], np.float32(np.inf))
    np.savez(tmp_path / "other.npz", **arrays)
    found = calvae.repeat(tmp_path / "other.npz", folder / "traces.npz")
    assert not found.same
    assert found.differing == ("rate (1 values)",)
    asked = CliRunner().invoke(app, ["repeat", str(tmp_path / "other.npz"), str(folder / "traces.npz")])
    assert asked.exit_code == 1
    assert "not the same: rate (1 values)" in asked.stdout


def test_other_values_seeds_and_versions_are_told(folder, traces, tmp_path):
    values = np.array(traces.values)
    values[0] *= 1.5
    values[0, 50:60] += 1
    other = calvae.repeat(folder / "result.zarr", traces.replace(values=values))
    assert not other.same
    assert "the recording: values, ROIs, frame rate or unit" in other.changed
    old = folder.parent / "old.zarr"
    calvae.infer(traces, out=old, n_samples=5)
    attributes = zarr.open_group(old).attrs.asdict()["calvae"]
    attributes["provenance"]["inference"]["versions"]["torch"] = "2.0"
    attributes["provenance"]["inference"]["settings"]["device"] = "cuda"
    zarr.open_group(old, mode="r+").attrs["calvae"] = attributes
    found = calvae.repeat(old, traces)
    assert found.same
    assert found.changed[0].startswith("torch 2.0 → ")
    assert found.changed[1] == "device cuda → cpu"


def test_a_model_of_ones_own_has_to_be_given(traces, tmp_path):
    own = calvae.load_model().save(tmp_path / "own.safetensors")
    model = calvae.SpikeVAE.load(own)
    model.theta = {"tau_decay": 0.7}
    model.save(own)
    result = calvae.infer(traces, own, n_samples=2)
    with pytest.raises(
        calvae.RecordingError, match=r"does not ship with this version\. Give it, or its file \(--model\)"
    ):
        calvae.repeat(result, traces)
    with pytest.raises(calvae.RecordingError, match="by which the result was made, got"):
        calvae.repeat(result, traces, "universal")
    assert calvae.repeat(result, traces, own).same


def test_a_refined_result_is_not_taken_for_an_inferred_one(traces):
    refined = calvae.refine(traces.select([0]), n_steps=1, n_samples=2)
    with pytest.raises(calvae.RecordingError, match="expected a result of infer, got one that was refined"):
        calvae.repeat(refined, traces)


def test_bad_input_is_a_clear_error(folder, traces, tmp_path):
    with pytest.raises(calvae.RecordingError, match="got one without ROI 2"):
        calvae.repeat(folder / "result.zarr", traces.select([0, 2]))
    with pytest.raises(calvae.RecordingError, match=r"expected a result that napari-calvae wrote"):
        calvae.repeat(folder / "traces.npz", traces)
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        calvae.repeat(tmp_path / "none.npz", traces)
    with np.load(folder / "result.npz") as file:
        arrays = dict(file)
    arrays["provenance"] = np.asarray(json.dumps({"inference": {}}))
    np.savez(tmp_path / "bare.npz", **arrays)
    with pytest.raises(calvae.RecordingError, match="that tells how it was made, got one that does not"):
        calvae.repeat(tmp_path / "bare.npz", traces)


def test_the_command_proves_it(folder):
    done = CliRunner().invoke(app, ["repeat", str(folder / "result.zarr"), str(folder / "traces.npz")])
    assert done.exit_code == 0, done.output
    assert "5 ROIs inferred again, the same to the last bit." in done.stdout
