"""Any words on the command line: what they say is done, or refused in a line; input stays as it was."""

from __future__ import annotations

import csv
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import napari_calvae as calvae
from napari_calvae.cli import app
from napari_calvae.formats import outputs_of, write_movie
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recognition import NETWORKS
from napari_calvae.simulation import simulate, write_simulation
from napari_calvae.vae import SpikeVAE

settings.register_profile(
    "calvae-cli", deadline=None, derandomize=True, max_examples=10, suppress_health_check=list(HealthCheck)
)
SETTINGS = settings.get_profile("calvae-cli")

#: Numbers that an option may be given, most of them wrong.
NUMBERS = ("nan", "inf", "-1", "0", "1e-300", "1e300", "20")
SEEDS = ("0", str(2**32), str(2**63), str(2**70), "-1")
FLAG = (None,)
READING = {"--rois": ("r.tif", "r.npy", "m.tif", "none.tif"), "--frame-rate": NUMBERS, "--unit": ("raw", "dff")}
READING |= {"--neuropil": ("nan", "0", "0.7", "9")}
SOURCES = ("t.npz", "t t.CSV", "ü.x.nwb", "t.zarr", "m.tif", "m.h5", "r.tif", "none.npz", ".")
OUTPUTS = ("o.npz", "o ö.H5", "o.csv", "o.x.zarr", "spks.npy", "o.txt", "none/o.npz", "ü.x.nwb", "m.h5", "t.npz", ".")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Folder of a recording in several formats, a movie in two and its ROIs, a model and a result."""
    folder = tmp_path_factory.mktemp("inputs")
    write_simulation(simulate(2, 4.0, 20.0, seed=1), folder / "t.npz")
    for name in ("t t.CSV", "ü.x.nwb", "t.zarr"):
        calvae.write(calvae.read(folder / "t.npz"), folder / name)
    movie = np.random.default_rng(0).integers(100, 200, (40, 16, 16)).astype(np.uint16)
    write_movie(movie, folder / "m.tif", 20.0)
    with h5py.File(folder / "m.h5", "w") as file:
        file["mov"] = movie
        file["mov"].attrs["fr"] = 20.0
    labels = calvae.RoiMasks.from_discs([(4, 4), (11, 11)], 4, (16, 16)).to_labels().astype(np.uint16)
    write_movie(labels, folder / "r.tif", None)
    np.save(folder / "r.npy", labels)
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(4, 6), max_count=3)
    vae = SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=3), description="tiny")
    vae.save(folder / "tiny.safetensors")
    calvae.infer(calvae.read(folder / "t.npz"), folder / "tiny.safetensors", n_samples=2, out=folder / "res.zarr")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and below, by its path from there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def some(**options: tuple[str | None, ...]):
    """Lists of words: up to two of the ``options``, since of more one is nearly always wrong."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, values in options.items() for value in values]
    drawn = st.lists(st.sampled_from(pairs), max_size=2, unique_by=lambda pair: pair[0])
    return drawn.map(lambda found: [word for pair in found for word in pair if word is not None])


def usually(good: str, others: tuple[str, ...]):
    """One of ``others`` now and then, so that what else is on the line is looked at."""
    return st.one_of(st.just(good), st.just(good), st.sampled_from(others))


def told(inputs: Path, words: list[str], written: tuple[str, ...] = (), files: dict[str, str] | None = None):
    """Run words in a folder of copies; an error is one line and leaves all as it was, else only ``written`` changes.

    ``files`` are further copies, new name by old. Gives the exit code, what was said, and the new and changed files.
    """
    with tempfile.TemporaryDirectory() as work, pytest.MonkeyPatch.context() as monkeypatch:
        folder = Path(work)
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        for new, old in (files or {}).items():
            shutil.copy(inputs / old, folder / new)
        monkeypatch.chdir(folder)
        before = contents(folder)
        result = CliRunner().invoke(app, words)
        after = contents(folder)
        kept = {name: after[name] for name in after if before.get(name) != after[name]}
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    changed = set(kept) | (set(before) - set(after))
    if result.exit_code == 2:
        usage = result.stderr.startswith("Usage: ")
        assert usage or (result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1), result.stderr
        assert "pydantic" not in result.stderr
        assert changed == set()
    assert {name for name in changed if not any(name == w or name.startswith(f"{w}/") for w in written)} == set()
    return result.exit_code, result.output, kept


def files_of(output: str) -> tuple[str, ...]:
    """Names of all that a result of this name is written to."""
    try:
        return tuple(str(path) for path in outputs_of(output))
    except calvae.RecordingError:
        return ()


INFER = {"samples": ("0", "2"), "seed": SEEDS, "device": ("cpu", "auto"), "amplitude": NUMBERS}
INFER |= {"scheduler": ("", "foo", "local:0"), "block_rois": ("1", str(10**30), "0")}
INFER |= {"append": FLAG, "overwrite": FLAG} | {name[2:]: values for name, values in READING.items()}


@settings(SETTINGS, max_examples=16)
@given(usually("t.npz", SOURCES), usually("o.npz", OUTPUTS), some(**INFER))
@example("ü.x.nwb", "ü.x.nwb", ["--append"])
@example("t.npz", "o.npz", ["--amplitude", "inf"])
@example("t.npz", "o.npz", ["--amplitude", "1e300"])
@example("t.npz", "o.npz", ["--amplitude", "nan"])
@example("m.h5", "m.h5", ["--rois", "r.tif", "--overwrite"])
def test_infer(inputs, source, output, options):
    words = ["infer", source, "-o", output, "--model", "tiny.safetensors", *options]
    code, said, kept = told(inputs, words, files_of(output))
    if source == output:
        assert bool(kept) == (code == 0 and "--append" in options)
    if code == 0:
        assert f"{output}: 2 ROIs" in said
        assert kept


def test_a_result_is_added_to_the_file_its_traces_come_from(inputs):
    pytest.importorskip("pynwb")
    words = ["infer", "ü.x.nwb", "-o", "ü.x.nwb", "--append", "--model", "tiny.safetensors", "--samples", "2"]
    code, said, kept = told(inputs, words, ("ü.x.nwb",))
    assert code == 0, said
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.nwb").write_bytes(kept["ü.x.nwb"])
        again = calvae.read(Path(folder) / "a.nwb")
        with h5py.File(Path(folder) / "a.nwb") as file:
            assert "SpikeInference" in file["processing/ophys"]
    np.testing.assert_array_equal(again.values, calvae.read(inputs / "ü.x.nwb").values)


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["extract", "m.h5", "-o", "m.h5", "--rois", "r.tif"], {}),
        (["export", "res.zarr", "-o", "res.zarr"], {}),
        (["train", "t.npz", "-o", "tiny.safetensors", "--base", "tiny.safetensors", "--steps", "1"], {}),
        (["infer", "a.events.csv", "-o", "a.csv", "--model", "tiny.safetensors"], {"a.events.csv": "t t.CSV"}),
        (["infer", "m.h5", "--rois", "r.h5", "-o", "r.h5", "--model", "tiny.safetensors"], {"r.h5": "m.h5"}),
    ],
)
def test_no_input_is_written_over_even_when_told(inputs, words, files):
    code, said, _ = told(inputs, [*words, "--overwrite"], files=files)
    assert code == 2
    assert "output: expected another name than that of the input" in said


PATTERNS = ("", "/abs", "**", "**x", "[", "*", "t.*", "*.npz", "a/../*", "none*")


@settings(SETTINGS, max_examples=12)
@given(
    st.sampled_from(PATTERNS),
    st.sampled_from((".npz", ".csv", ".zarr", "spks.npy", "", ".txt", "/x.npz")),
    st.sampled_from(("out", ".", "t.npz")),
    some(overwrite=FLAG, samples=("2",), unit=("raw", "dff")),
)
@example("**", ".npz", "out", [])
def test_infer_a_folder(inputs, pattern, suffix, output, options):
    words = ["infer", ".", "-o", output, "--pattern", pattern, "--suffix", suffix, "--model", "tiny.safetensors"]
    code, _, kept = told(inputs, [*words, *options], ("out",))
    if code < 2:
        rows = list(csv.DictReader(kept["out/summary.csv"].decode().splitlines()))
        assert code == any(row["error"] for row in rows)
        for row in rows:
            there = any(name.split("/")[1] == row["output"] for name in kept)
            assert bool(row["error"]) != there


@pytest.mark.parametrize(
    ("names", "pattern"),
    [(("summary.npz",), "summary.npz"), (("k.npz", "k.events.npz"), "k.*npz")],
)
def test_no_result_in_a_folder_takes_the_name_of_another_or_of_the_summary(inputs, names, pattern):
    words = ["infer", ".", "-o", "out", "--pattern", pattern, "--suffix", ".csv", "--model", "tiny.safetensors"]
    files = dict.fromkeys(names, "t.npz")
    code, said, kept = told(inputs, [*words, "--samples", "2", "--overwrite"], ("out",), files)
    assert code == 0, said
    rows = list(csv.DictReader(kept["out/summary.csv"].decode().splitlines()))
    assert [row["recording"] for row in rows] == sorted(names)
    for row in rows:
        assert kept[f"out/{row['output']}"].startswith(b"roi,frame,")


def test_a_table_of_somebody_else_is_no_summary(inputs):
    words = ["infer", ".", "-o", "r", "--pattern", "t.npz", "--model", "tiny.safetensors", "--samples", "2"]
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(inputs, Path(work), dirs_exist_ok=True)
        (Path(work) / "r").mkdir()
        (Path(work) / "r" / "summary.csv").write_text("mine\n")
        code, said, _ = told(Path(work), words)
        assert (code, "summary.csv: exists already" in said) == (2, True)
        assert told(Path(work), [*words, "--overwrite"], ("r",))[0] == 0


SIMULATE = {"cells": ("1", "0"), "duration": NUMBERS, "frame_rate": NUMBERS, "model": ("linear_ar", "foo", "")}
SIMULATE |= {"rate": NUMBERS, "theta": ("a", "hill=", "hill=nan", "foo=1", "hill=1"), "seed": SEEDS}
SCENE = {"size": ("0", "16", "99999"), "diameter": NUMBERS, "photons": NUMBERS, "gain": NUMBERS, "motion": NUMBERS}
SCENE |= {"neuropil": NUMBERS}


@settings(SETTINGS, max_examples=20)
@given(
    usually("s.npz", ("s", "s s.NPZ", "none/s.npz", "t.npz", "t.zarr", ".")),
    some(overwrite=FLAG, **SIMULATE),
)
@example("s.npz", ["--duration", "nan"])
@example("s.npz", ["--duration", "inf"])
@example("s.npz", ["--duration", "1e300"])
@example("s.npz", ["--frame-rate", "1e300"])
@example("s.npz", ["--rate", "inf"])
@example("s.npz", ["--seed", str(2**70)])
def test_simulate(inputs, output, options):
    written = (output,) if output.lower().endswith(".npz") else ()
    code, said, kept = told(inputs, ["simulate", output, "--cells", "2", "--duration", "2", *options], written)
    if code == 0:
        assert output in said
        assert output in kept


@settings(SETTINGS)
@given(usually("s", ("s.npz", "none/s", "t.zarr")), some(overwrite=FLAG, **SCENE, rate=NUMBERS, seed=SEEDS))
@example("s", ["--photons", "inf"])
@example("s", ["--photons", "1e300"])
@example("s", ["--gain", "inf"])
@example("s", ["--diameter", "20"])
@example("s", ["--seed", str(2**70)])
def test_simulate_a_movie(inputs, output, options):
    words = ["simulate", output, "--movie", "--cells", "1", "--duration", "2", "--frame-rate", "5", "--size", "20"]
    code, _, kept = told(inputs, [*words, *options], ("s",))
    if code == 0:
        assert set(kept) == {"s/movie.tif", "s/rois.tif", "s/spikes.npz"}


RATE = {name[2:]: values for name, values in READING.items()}


@settings(SETTINGS)
@given(usually("t.npz", (*SOURCES, "res.zarr", "tiny.safetensors")), some(**RATE))
@example("m.tif", ["--rois", "r.tif"])
def test_check(inputs, source, options):
    code, said, _ = told(inputs, ["check", source, *options])
    if code == 0:
        assert f"{source}: nothing looks wrong with 2 ROIs." in said
    if code == 1:
        assert ": expected " in said


@settings(SETTINGS, max_examples=12)
@given(
    usually("res.zarr", ("t.npz", "t.zarr", "none.zarr", ".")),
    usually("t.npz", SOURCES),
    some(model=("tiny.safetensors", "none", "t.npz"), **RATE),
)
@example("res.zarr", "t.npz", ["--model", "tiny.safetensors"])
@example("res.zarr", "t.npz", ["--model", "tiny.safetensors", "--frame-rate", "19"])
def test_repeat(inputs, result, source, options):
    code, said, _ = told(inputs, ["repeat", result, source, *options])
    if code == 0:
        assert "the same to the last bit" in said
    if code == 1:
        assert "Changed since: the recording" in said


@settings(SETTINGS, max_examples=16)
@given(
    usually("m.tif", SOURCES),
    usually("o.npz", OUTPUTS),
    some(overwrite=FLAG, rois=RATE["rois"], frame_rate=NUMBERS, neuropil=RATE["neuropil"]),
)
@example("m.h5", "o ö.H5", [])
def test_extract(inputs, source, output, options):
    rois = [] if "--rois" in options else ["--rois", "r.tif"]
    words = ["extract", source, "-o", output, *rois, *options]
    code, said, kept = told(inputs, words, files_of(output))
    if code == 0:
        assert f"{output}: 2 ROIs" in said
        assert kept
        assert source != output


@settings(SETTINGS)
@given(
    usually("res.zarr", ("t.zarr", "t.npz", "none.zarr")), st.sampled_from(OUTPUTS), some(append=FLAG, overwrite=FLAG)
)
@example("res.zarr", "ü.x.nwb", ["--append"])
@example("res.zarr", "res.zarr", [])
def test_export(inputs, source, output, options):
    code, said, kept = told(inputs, ["export", source, "-o", output, *options], files_of(output))
    if code == 0:
        assert f"{output}: 2 ROIs" in said
        assert kept


TRAIN = {"objective": ("sleep", "elbo", "supervised", "foo"), "spikes": ("t.npz", "t.zarr", "none.npz")}
TRAIN |= {"learning_rate": NUMBERS, "generative": ("linear_ar", "foo", ""), "noise": ("gaussian", "foo")}
TRAIN |= {"steps": ("1", "0"), "seed": SEEDS, "base": ("none", "t.npz"), "overwrite": FLAG}


@settings(SETTINGS, max_examples=8)
@given(
    usually("t.npz", SOURCES),
    usually("n.safetensors", ("n.npz", "none/n.safetensors", "tiny.safetensors", "x")),
    some(**TRAIN),
)
@example("t.npz", "n.safetensors", ["--learning-rate", "1e300"])
@example("t.npz", "n.safetensors", ["--learning-rate", "nan"])
@example("t.npz", "n.safetensors", ["--objective", "supervised", "--spikes", "t.npz"])
def test_train(inputs, source, output, options):
    words = ["train", source, "-o", output, "--base", "tiny.safetensors", "--steps", "1", *options]
    code, said, kept = told(inputs, words, (output,))
    if code == 0:
        assert f"{output}: trained for 1 steps on 2 ROIs" in said
        assert list(kept) == [output]


def test_models_takes_no_words(inputs):
    code, said, _ = told(inputs, ["models"])
    assert code == 0
    assert all(name in said for name in calvae.models())
    assert told(inputs, ["models", "universal"])[0] == 2


#: Of each benchmark, what it must be given; none of them gets as far as work.
BENCHMARKS = {
    "accuracy": ["--data"],
    "adaptation": ["--data"],
    "kernels": ["--data"],
    "live": ["--data"],
    "ablation": ["--out", "x", "--data"],
    "movie": ["m.tif", "r.tif"],
    "speed": [],
    "paper": [],
    "extraction": ["--gigabytes"],
    "click": ["--clicks"],
}


@pytest.mark.parametrize("name", BENCHMARKS)
@settings(SETTINGS, max_examples=4)
@given(word=st.sampled_from(("none", "t.zarr", "tiny.safetensors", "inf", "-1")))
def test_benchmarks_refuse_what_they_cannot_measure(inputs, name, word):
    assert told(inputs, ["benchmark", name, *BENCHMARKS[name], word])[0] == 2
