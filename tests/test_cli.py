"""The command line: what it writes, and one clear line where it cannot."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import napari_calvae
from napari_calvae.cli import app
from napari_calvae.formats import read, read_movie, write, write_arrays, write_movie
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.inference import infer
from napari_calvae.recognition import NETWORKS
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.simulation import simulate, write_simulation
from napari_calvae.vae import SpikeVAE, load_model


def calvae(*arguments):
    """Run a command: exit code, what it said, and its one line of error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments):
    """Error of a command that must be refused: one line, exit code 2."""
    result = calvae(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(4, 6), max_count=3)
    vae = SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=3), description="tiny")
    return vae.save(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Traces with spikes, and a movie with ROIs."""
    folder = tmp_path_factory.mktemp("recording")
    write_simulation(simulate(3, 20.0, 20.0, seed=1), folder / "traces.npz")
    rng = np.random.default_rng(0)
    write_movie(rng.integers(100, 200, (60, 24, 24)).astype(np.uint16), folder / "movie.tif", 20.0)
    write_movie(rng.integers(100, 200, (60, 24, 24)).astype(np.uint16), folder / "rateless.tif", None)
    labels = RoiMasks.from_discs([(6, 6), (16, 16)], 6, (24, 24)).to_labels().astype(np.uint16)
    write_movie(labels, folder / "rois.tif", None)
    write_movie(labels[:20], folder / "other.tif", None)
    write_movie(labels * 0, folder / "empty.tif", None)
    np.save(folder / "matrix.npy", np.random.default_rng(0).random((2, 90)))
    return folder


def test_help_is_quick_and_heavy_libraries_wait():
    code = "import sys; from napari_calvae.cli import app\ntry:\n app(['--help'])\nfinally:\n print('LOADED', "
    code += "[m for m in ('torch', 'numpy', 'napari', 'qtpy', 'scipy', 'dask') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "infer" in output
    assert "LOADED []" in output


def test_version():
    assert calvae("--version").stdout == f"calvae {napari_calvae.__version__}\n"


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".csv"])
def test_infer_traces(tmp_path, recording, model, suffix):
    output = tmp_path / f"spikes{suffix}"
    result = calvae("infer", recording / "traces.npz", "-o", output, "--model", model, "--samples", 5, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "3 ROIs, 20.0 s at 20 Hz" in result.stdout
    expected = napari_calvae.infer(read(recording / "traces.npz"), model, n_samples=5, seed=3)
    if suffix == ".npz":
        with np.load(output) as z:
            rate, provenance = z["rate"], json.loads(str(z["provenance"]))
    elif suffix == ".h5":
        with h5py.File(output) as file:
            rate, provenance = file["rate"][()], json.loads(file.attrs["provenance"])
    else:
        rows = list(csv.DictReader(output.read_text().splitlines()))
        rate = np.reshape([float(r["rate"]) for r in rows], (3, -1))
        provenance = json.loads((tmp_path / "spikes.provenance.json").read_text())
    np.testing.assert_allclose(rate, expected.rate, rtol=1e-4, atol=1e-5)
    assert provenance["inference"]["settings"]["seed"] == 3


def test_infer_a_movie(tmp_path, recording, model):
    output = tmp_path / "spikes.npz"
    arguments = ["infer", recording / "movie.tif", "--rois", recording / "rois.tif", "-o", output, "--model", model]
    result = calvae(*arguments, "--samples", 2)
    assert result.exit_code == 0, result.output
    with np.load(output) as z:
        assert z["rate"].shape == (2, 60)
        source = json.loads(str(z["provenance"]))["traces"]
    assert source["source"] == "movie.tif"
    assert source["extraction"]["neuropil_coefficient"] == 0.7
    assert "exists already" in refused(*arguments)
    assert calvae(*arguments, "--samples", 2, "--overwrite", "--neuropil", 0).exit_code == 0
    rateless = ["infer", recording / "rateless.tif", *arguments[2:], "--overwrite"]
    assert "frame_rate: expected the frames per second" in refused(*rateless)
    assert calvae(*rateless, "--samples", 2, "--frame-rate", 12).exit_code == 0
    assert read(output).frame_rate == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["movie.tif"], "expected ROIs for a movie, got none. Give a label image with --rois FILE"),
        (["movie.tif", "--rois", "other.tif"], "expected ROIs of 24 × 24 pixels like the movie, got 20 × 24"),
        (["movie.tif", "--rois", "empty.tif"], "at least one label above 0"),
        (["movie.tif", "--rois", "rois.tif", "--frame-rate", "100"], "at least one second, got 60 frames at 100 Hz"),
        (["rois.tif", "--rois", "rois.tif", "--frame-rate", "9"], "three dimensions (time, y, x), got shape (24, 24)"),
        (["traces.npz", "--rois", "rois.tif"], "expected a movie to go with them, got traces.npz"),
        (["traces.npz", "--neuropil", "0.7"], "neuropil: expected a movie or a suite2p folder to subtract it from"),
        (["matrix.npy"], "frame_rate: expected the frames per second"),
        (["matrix.npy", "--frame-rate", "100"], "at least one second"),
        (["matrix.npy", "--frame-rate", "-3"], "frame_rate: expected a positive number"),
        (["matrix.npy", "--frame-rate", "1"], "frame rate: expected 3 to 120 Hz"),
        (["traces.npz", "--unit", "raw"], "baseline above 0"),
        (["nan.npy", "--frame-rate", "30"], "1 ROIs with only missing values (NaN)"),
        (["traces.npz", "--append"], "append: expected the name of an NWB file"),
        (["traces.npz", "--pattern", "*"], "INPUT: expected a folder with --pattern"),
        (["none.npy"], "expected a file, found nothing there"),
        (["traces.npz", "--model", "junk.safetensors"], "expected a safetensors header"),
        (["traces.npz", "--model", "nothing"], "got 'nothing'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(recording, model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(recording)
    np.save("nan.npy", np.full((1, 90), np.nan))
    (recording / "junk.safetensors").write_bytes(b"junk" * 100)
    options = [] if "--model" in arguments else ["--model", model]
    assert message in refused("infer", *arguments, *options, "-o", tmp_path / "out.npz")
    assert list(tmp_path.iterdir()) == []


def test_output_is_checked_before_any_work(recording, tmp_path):
    assert "name that ends in" in refused("infer", "nothing.npz", "-o", tmp_path / "out.txt")
    assert "expected an existing folder" in refused("infer", "nothing.npz", "-o", tmp_path / "none" / "out.npz")


def test_a_device_that_is_missing_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("infer", "nothing.npz", "--device", "cuda", "-o", tmp_path / "out.zarr")
    assert "device: expected one of" in refused(*words)
    traces = simulate(1, 5.0, 20.0, model="linear_ar").traces
    with pytest.raises(RecordingError, match=r"device: expected one of.*got 'cuda'"):
        napari_calvae.infer(traces, device="cuda", out=tmp_path / "out.zarr")
    assert list(tmp_path.iterdir()) == []


def test_tables_that_are_piped_are_whole():
    row = {f"a column with a long name {k}": "words that take some room" for k in range(9)}
    said = subprocess.run(
        [sys.executable, "-c", f"from napari_calvae.cli._support import show; show([{row!r}])"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    ).stdout
    assert said.count("words that take some room") == 9
    assert all(name in said for name in row)
    assert max(map(len, said.splitlines())) < 400  # and no wider than they need be


def test_what_cannot_be_added_to_is_told_before_any_work(recording, model, tmp_path):
    pytest.importorskip("pynwb")
    traces = read(recording / "traces.npz")
    write(traces.replace(roi_ids=(7, 8, 9)), tmp_path / "others.nwb")
    words = ("infer", recording / "traces.npz", "--append", "-o")
    assert "without the ROIs [1, 2, 3]" in refused(*words, tmp_path / "others.nwb", "--model", "nothing")
    write(traces, tmp_path / "own.nwb")
    calvae(*words, tmp_path / "own.nwb", "--model", model, "--samples", 2)
    assert "SpikeInference already" in refused("infer", "nothing.npz", "--append", "-o", tmp_path / "own.nwb")


def test_simulate_traces_and_movies(tmp_path):
    result = calvae("simulate", tmp_path / "a.npz", "--cells", 2, "--duration", 10, "--model", "linear_ar")
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "a.npz").values.shape == (2, 300)
    movie = ["simulate", tmp_path / "m", "--movie", "--size", 32, "--cells", 2, "--duration", 4, "--theta", "hill=2"]
    assert calvae(*movie).stdout.split() == [str(tmp_path / "m" / n) for n in ("movie.tif", "rois.tif", "spikes.npz")]
    assert read_movie(tmp_path / "m" / "movie.tif")[0].shape == (120, 32, 32)
    assert "exists already" in refused(*movie)
    assert "expected some of tau_calcium" in refused("simulate", tmp_path / "b.npz", "--theta", "colour=1")
    assert "model: expected one of" in refused("simulate", tmp_path / "b.npz", "--model", "none")
    assert "size: expected a value greater than or equal to 16, got 2" in refused(
        "simulate", tmp_path / "b", "--movie", "--size", 2
    )
    assert calvae("simulate", tmp_path / "b.npz", "--theta", "hill").exit_code == 2
    assert not (tmp_path / "b.npz").exists()


def test_train_with_and_without_spikes(tmp_path, recording, model):
    common = [recording / "traces.npz", "--base", model, "--steps", 2]
    for name, options in {
        "a.safetensors": [],
        "b.safetensors": ["--objective", "supervised", "--spikes", recording / "traces.npz"],
        "d.safetensors": ["--objective", "semi_supervised", "--spikes", recording / "traces.npz"],
        "e.safetensors": ["--objective", "wake_sleep"],
    }.items():
        result = calvae("train", *common, "-o", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert "trained for 2 steps on 3 ROIs" in result.stdout
        assert isinstance(load_model(tmp_path / name), SpikeVAE)
        objective = options[1] if options else "sleep"
        assert f"tiny; fitted by {objective}, 2 steps" in result.stdout
    assert "ends in .safetensors" in refused("train", *common, "-o", tmp_path / "c.pt")
    assert "exists already" in refused("train", *common, "-o", tmp_path / "a.safetensors")
    supervised = ["train", *common, "-o", tmp_path / "c.safetensors", "--objective", "supervised"]
    assert "spikes: expected a file with --objective supervised or semi_supervised" in refused(*supervised)
    np.savez(tmp_path / "some.npz", spike_times_1=[1.0])
    some = ["--spikes", tmp_path / "some.npz"]
    assert "expected spikes of every ROI, got none of ROI 2" in refused(*supervised, *some)
    assert calvae(*supervised[:-1], "semi_supervised", *some).exit_code == 0


def test_models_are_listed(model, monkeypatch):
    monkeypatch.setattr("napari_calvae.vae.models", lambda: {"universal": model})
    result = calvae("models")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("universal", "factorized", "linear_ar", "tiny"))


def test_demo_hands_over(tmp_path, monkeypatch):
    seen = []
    window = types.ModuleType("napari_calvae._napari.demo")
    window.run = lambda screenshot: seen.append(screenshot) or screenshot
    monkeypatch.setitem(sys.modules, "napari_calvae._napari.demo", window)
    monkeypatch.setattr("napari_calvae._napari.demo", window, raising=False)
    assert calvae("demo", "--screenshot", tmp_path / "a.png").stdout.strip() == str(tmp_path / "a.png")
    assert calvae("demo").stdout == ""
    assert seen == [tmp_path / "a.png", None]
    assert "expected an existing folder" in refused("demo", "--screenshot", tmp_path / "none" / "a.png")


def test_demo_without_napari_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "napari_calvae._napari.demo", None)
    monkeypatch.delattr("napari_calvae._napari.demo", raising=False)
    assert "pip install 'napari-calvae[all]'" in refused("demo")


def test_what_looks_wrong_is_told_and_inferred_all_the_same(tmp_path):
    values = 100 * (1 + napari_calvae.simulate(2, 20.0, 30.0, rate=1.0, seed=0).traces.values)
    np.save(tmp_path / "raw.npy", values)
    rate = ("--frame-rate", "30")
    good = calvae("check", tmp_path / "raw.npy", *rate, "--unit", "raw")
    assert good.exit_code == 0, good.output
    assert "nothing looks wrong with 2 ROIs." in good.stdout
    doubted = calvae("check", tmp_path / "raw.npy", *rate, "--unit", "dff")
    assert doubted.exit_code == 1
    assert doubted.stdout.startswith("raw-as-dff: ROIs 1, 2: expected ΔF/F")
    wanted = ("-o", tmp_path / "out.npz", "--unit", "dff", "--samples", "0")
    inferred = calvae("infer", tmp_path / "raw.npy", *rate, *wanted)
    assert inferred.exit_code == 0
    assert "Note: raw-as-dff: ROIs 1, 2" in inferred.stderr
    assert (tmp_path / "out.npz").exists()


def test_the_benchmark_of_a_movie_is_a_table(monkeypatch, tmp_path, recording):
    rows = [{"name": "one", "score": 0.5}, {"name": "two", "score": 0.7}, {"name": "three", "score": 0.9}]
    measure = types.ModuleType("napari_calvae.benchmark")
    measure.movie = lambda *arguments, **settings: iter(rows)
    monkeypatch.setitem(sys.modules, "napari_calvae.benchmark", measure)
    monkeypatch.setattr(napari_calvae, "benchmark", measure, raising=False)
    write_arrays({f"spike_times_{roi}": np.array([0.5]) for roi in (1, 2)}, tmp_path / "spikes.npz")
    result = calvae("benchmark", "movie", recording / "movie.tif", recording / "rois.tif", tmp_path / "spikes.npz")
    assert result.exit_code == 0, result.output
    assert "three" in result.stdout
    assert "median" in result.stdout


def test_the_benchmark_of_a_movie_needs_the_spikes_of_every_roi(tmp_path, recording):
    write_arrays({"spike_times_1": np.array([0.5])}, tmp_path / "wrong.npz")
    said = refused("benchmark", "movie", recording / "movie.tif", recording / "rois.tif", tmp_path / "wrong.npz")
    assert "wrong.npz: expected spike_times_<ROI id> (s) of every ROI in rois.tif, got none of ROI 2" in said


def test_the_benchmark_of_speed_shows_and_writes(tmp_path):
    result = calvae("benchmark", "speed", "machine", "--roi-frames", "300", "--repeats", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "GFLOP/s" in result.stdout
    assert "calvae benchmark speed machine" in (tmp_path / "speed.md").read_text()
    assert calvae("benchmark", "speed", "nonesuch").exit_code == 2


def test_the_benchmark_of_accuracy_shows_and_writes(monkeypatch, tmp_path):
    asked, written = [], []
    measure = types.ModuleType("napari_calvae.benchmark")
    measure.study = lambda *arguments: asked.append(arguments) or {"model": "x"}
    measure.write_study = lambda *arguments: written.append(arguments)
    measure.summary_rows = lambda record: [{"condition": "fast", "lead": 0.25}]
    measure.other_rows = lambda record: [{"measure": "counts", "value": 0.5}]
    monkeypatch.setitem(sys.modules, "napari_calvae.benchmark", measure)
    monkeypatch.setattr(napari_calvae, "benchmark", measure, raising=False)
    result = calvae("benchmark", "accuracy", "--data", tmp_path, "--only", "DS0", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "0.25" in result.stdout
    assert "counts" in result.stdout
    assert asked == [(tmp_path, "universal", "DS0")]
    assert written == [({"model": "x"}, tmp_path / "out")]


def test_errors_that_nobody_expected_are_not_hidden(monkeypatch):
    def broken():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("napari_calvae.vae.models", broken)
    with pytest.raises(ZeroDivisionError):
        calvae("models")


def test_the_hybrid_movie_end_to_end(shared, tmp_path, model):
    folder = shared / "movies"
    result = calvae(
        "infer", folder / "hybrid_gcamp6f.tif", "--rois", folder / "hybrid_gcamp6f_rois.tif", "--model", model,
        "-o", tmp_path / "spikes.h5", "--samples", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert isinstance(read(tmp_path / "spikes.h5"), Traces)
    assert "14 ROIs, 120.0 s at 30 Hz" in result.stdout


def test_a_store_is_resumed_and_exported(tmp_path, recording, model):
    out = tmp_path / "a.zarr"
    words = ("infer", recording / "traces.npz", "-o", out, "--model", model, "--samples", 5, "--block-rois", 1)
    assert "3 ROIs, 20.0 s at 20 Hz" in calvae(*words).stdout
    (out / "done" / "c" / "1").unlink()
    assert "3 ROIs, 20.0 s at 20 Hz" in calvae(*words).stdout
    assert "seed 0 instead of 1" in refused(*words, "--seed", 1)
    calvae("infer", recording / "traces.npz", "-o", tmp_path / "a.npz", "--model", model, "--samples", 5)
    calvae("export", out, "-o", tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        for name in ("rate", "events_frame", "interval", "reconstruction_std"):
            np.testing.assert_array_equal(a[name], b[name])
    assert "exists already" in refused("export", out, "-o", tmp_path / "b.npz")
    assert "found nothing there" in refused("export", tmp_path / "c.zarr", "-o", tmp_path / "c.npz")


def test_what_is_no_store_of_results_is_not_called_damaged(tmp_path, recording, shared):
    write_simulation(simulate(2, 20.0, 20.0, seed=1), tmp_path / "traces.npz")
    write(read(tmp_path / "traces.npz"), tmp_path / "traces.zarr")
    (tmp_path / "spikes.nwb").write_bytes(b"junk")
    (tmp_path / "notes").mkdir()
    for source, what in (
        (recording / "traces.npz", "a file .npz of the format numpy"),
        (shared / "formats" / "suite2p", "a folder of the format suite2p"),
        (tmp_path / "spikes.nwb", "a file .nwb"),
        (tmp_path / "notes", "a folder"),
    ):
        for command in (["export", source, "-o", tmp_path / "out.nwb"], ["repeat", source, recording / "traces.npz"]):
            if source.suffix == ".npz" and command[0] == "repeat":
                continue  # which takes it
            said = refused(*command)
            assert f"{source.name}: expected a Zarr store of results" in said
            assert f", got {what}" in said
            assert "(repeat takes an .npz, too.)" in said
            assert "Copy it again" not in said
    said = refused("export", tmp_path / "traces.zarr", "-o", tmp_path / "out.nwb")
    assert "traces.zarr: expected a store of results, got one of traces" in said
    assert "calvae infer … -o NAME.zarr" in said
    assert not (tmp_path / "out.nwb").exists()


def test_rois_without_signal_are_left_empty_and_named(tmp_path, model):
    values = np.random.default_rng(0).random((3, 90))
    values[1] = 1.0
    np.save(tmp_path / "matrix.npy", values)
    words = ("infer", tmp_path / "matrix.npy", "-o", tmp_path / "a.npz", "--model", model, "--frame-rate", 30)
    assert "1 ROIs without signal left empty (2)" in calvae(*words).stdout
    with np.load(tmp_path / "a.npz") as z:
        assert np.isfinite(z["rate"][[0, 2]]).all()
        assert np.isnan(z["rate"][1]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "matrix.npy"]


def test_traces_are_extracted(tmp_path, recording):
    for name in ("a.npz", "a.zarr"):
        words = ("extract", recording / "movie.tif", "--rois", recording / "rois.tif", "-o", tmp_path / name)
        assert "3.0 s at 20 Hz" in calvae(*words).stdout
    a, b = (read(tmp_path / name) for name in ("a.npz", "a.zarr"))
    np.testing.assert_array_equal(a.values, b.values)
    assert a.unit == b.unit == "raw"
    assert "expected a movie" in refused("extract", recording / "traces.npz", "-o", tmp_path / "b.npz")


def test_many_recordings_one_of_which_fails(tmp_path, recording, model):
    folder = tmp_path / "days"
    for day in ("one", "two", "three"):
        (folder / day).mkdir(parents=True)
        (folder / day / "traces.npz").write_bytes((recording / "traces.npz").read_bytes())
    (folder / "two" / "traces.npz").write_bytes(b"PK damaged")
    words = ("infer", folder, "--pattern", "*/traces.npz", "-o", tmp_path / "out", "--model", model, "--samples", 3)
    result = calvae(*words)
    assert result.exit_code == 1
    assert "2 of 3 recordings inferred" in result.stdout
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        rows = {row["recording"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["one/traces.npz", "three/traces.npz", "two/traces.npz"]
    assert "cannot be read" in rows["two/traces.npz"]["error"]
    assert rows["one/traces.npz"]["error"] == ""
    assert rows["one/traces.npz"]["rois"] == "3"
    assert float(rows["one/traces.npz"]["spikes_expected"]) > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.csv", "one_traces.zarr", "three_traces.zarr"
    }  # fmt: skip
    (folder / "two" / "traces.npz").write_bytes((recording / "traces.npz").read_bytes())
    assert "3 of 3 recordings inferred" in calvae(*words).stdout
    assert "found none" in refused(*words[:3], "*.xyz", *words[4:])


def test_movies_of_a_folder_find_their_rois_beside_them(tmp_path, recording, model):
    for day in ("one", "two"):
        (tmp_path / day).mkdir()
        for name in ("movie.tif", "rois.tif"):
            (tmp_path / day / name).write_bytes((recording / name).read_bytes())
    words = ("infer", tmp_path, "--pattern", "*/movie.tif", "--rois", "rois.tif", "-o", tmp_path / "out")
    assert "2 of 2" in calvae(*words, "--model", model, "--samples", 3, "--suffix", ".csv").stdout
    assert (tmp_path / "out" / "one_movie.csv").is_file()


def test_suite2p_gets_its_spikes_in_a_folder_of_their_own(tmp_path, shared, model):
    folder = shared / "formats" / "suite2p"
    done = calvae("infer", folder, "-o", tmp_path / "new" / "spks.npy", "--model", model)
    n_accepted = np.count_nonzero(np.load(folder / "plane0" / "iscell.npy")[:, 0])
    assert f"spks.npy: 13 ROIs ({n_accepted} accepted), 120.0 s at 30 Hz" in done.stdout
    calvae("infer", folder, "-o", tmp_path / "less.zarr", "--model", model, "--neuropil", 0.25)
    planes = read(tmp_path / "less.zarr").provenance["suite2p"]["planes"]
    assert [plane["neuropil_coefficient"] for plane in planes] == [0.25]
    assert np.load(tmp_path / "new" / "spks.npy").shape == np.load(folder / "plane0" / "F.npy").shape
    assert not list(tmp_path.glob(".*"))


def test_what_is_read_is_never_what_is_written(recording, model, tmp_path):
    traces = simulate(2, 4.0, 20.0, seed=0).traces
    write(traces, tmp_path / "in.zarr")
    for output in (tmp_path / "in.zarr", tmp_path / "." / "in.zarr"):
        words = ("infer", tmp_path / "in.zarr", "-o", output, "--overwrite", "--model", model)
        assert "output: expected another name than that of the input" in refused(*words)
    with pytest.raises(RecordingError, match="output: expected another name"):
        infer(tmp_path / "in.zarr", model, out=tmp_path / "in.zarr", overwrite=True)
    np.testing.assert_array_equal(read(tmp_path / "in.zarr").values, traces.values)


def test_many_recordings_have_a_result_each_and_results_are_no_recordings(model, tmp_path, monkeypatch):
    names = ("a/b.npz", "a_b.npz", "a_b.csv", "x.npy.npz", "x.npy.csv")
    (tmp_path / "in" / "a").mkdir(parents=True)
    for n_rois, name in enumerate(names, 1):
        write(simulate(n_rois, 4.0, 20.0, seed=0).traces, tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path / "in")
    words = ("infer", tmp_path / "in", "--pattern", "**/*.[nc][ps][zv]", "-o", "out", "--suffix", ".npz")
    for again in ([], ["--overwrite"]):
        result = calvae(*words, "--samples", 2, "--model", model, *again)
        assert result.exit_code == 0, result.output
        written = sorted(tmp_path.glob("in/out/*.npz"))
        assert sorted(read(path, 20.0).n_rois for path in written) == [1, 2, 3, 4, 5]
