"""The plugin as npe2 finds it in the environment, and the files that describe it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

npe2 = pytest.importorskip("npe2")

ROOT = Path(__file__).parents[1]


def test_npe2_discovers_the_installed_package():
    manifest = npe2.PluginManifest.from_distribution("napari-calvae")
    assert manifest.name == "napari-calvae"
    names = [w.display_name for w in manifest.contributions.widgets]
    assert names == ["spike inference", "quality table", "retrain", "spines", "stimulation", "live"]


def test_every_command_can_be_imported():
    manifest = npe2.PluginManifest.from_distribution("napari-calvae")
    for command in manifest.contributions.commands:
        assert callable(_load(command.python_name))


def test_files_that_are_read_are_offered_to_napari():
    from napari_calvae._napari.reading import MOVIE_PATTERNS
    from napari_calvae.formats import FORMATS

    manifest = npe2.PluginManifest.from_distribution("napari-calvae")
    (reader,) = manifest.contributions.readers
    traces = {pattern for module in FORMATS.values() for pattern in module.PATTERNS}
    assert set(reader.filename_patterns) == traces | set(MOVIE_PATTERNS)
    assert reader.accepts_directories


def test_files_that_are_written_are_offered_to_napari():
    from napari_calvae.formats import FORMATS

    manifest = npe2.PluginManifest.from_distribution("napari-calvae")
    able = {suffix for module in FORMATS.values() for suffix in getattr(module, "SUFFIXES", ())}
    assert [writer.layer_types for writer in manifest.contributions.writers] == [["labels"], ["shapes"], ["points"]]
    for writer in manifest.contributions.writers:
        # In napari's dialog it stands below the writer of napari itself, which saves the masks alone.
        assert writer.display_name.startswith("results")
        # suite2p's output is more than a name that ends in .npy.
        assert set(writer.filename_extensions) == able - {"spks.npy"}


def test_the_manifest_at_the_top_is_that_of_the_package():
    assert (ROOT / "napari.yaml").read_bytes() == (ROOT / "napari_calvae" / "napari.yaml").read_bytes()
    assert (ROOT / "sample_data" / "movie.tif").samefile(ROOT / "napari_calvae" / "sample_data" / "movie.tif")


@pytest.mark.parametrize("kind", ["standard", "editable"])
def test_npe2_discovers_the_wheel_and_the_editable_install(tmp_path, kind):
    pytest.importorskip("hatchling", reason="the build backend is not installed: install napari-calvae[test]")
    build = [sys.executable, "-m", "hatchling", "build", "-t", f"wheel:{kind}", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # What pip does with a wheel, ahead of the installation that runs this test; .pth files count.
    code = f"""
import site, sys
kept = list(sys.path)
sys.path[:] = []
site.addsitedir({str(site)!r})
sys.path += kept
import importlib.metadata, npe2, napari_calvae
from napari_calvae._napari.contributions import sample_folder
found = [r.manifest.name for r in npe2.PluginManifest.discover() if r.manifest]
print(importlib.metadata.distribution("napari-calvae").locate_file(""))
print(napari_calvae.__file__)
print(sample_folder())
print(found.count("napari-calvae"))
print((sample_folder() / "movie.tif").is_file())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metadata, module, sample, found, there = done.stdout.split()
    home = site if kind == "standard" else ROOT
    assert Path(metadata).is_relative_to(site)
    assert Path(module).is_relative_to(home)
    assert Path(sample).is_relative_to(home)
    assert int(found) >= 1
    assert there == "True"


def test_the_sample_opens_with_its_time_in_seconds():
    from napari_calvae._napari.contributions import open_sample

    (movie, image, kind), (labels, _, label_kind) = open_sample()
    assert (kind, label_kind) == ("image", "labels")
    assert movie.ndim == 3
    assert labels.shape == movie.shape[1:]
    assert len(np.unique(labels)) > 2
    assert image["scale"][0] == pytest.approx(1 / image["metadata"]["frame_rate"])
    assert image["units"][0] == "second"


def _load(python_name: str):
    from importlib import import_module

    module, name = python_name.split(":")
    return getattr(import_module(module), name)
