"""The plugin as npe2 finds it in the environment, and the files that describe it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import napari_calvae

npe2 = pytest.importorskip("npe2")

ROOT = Path(napari_calvae.__file__).parents[1]


def test_npe2_discovers_the_installed_package():
    manifest = npe2.PluginManifest.from_distribution("napari-calvae")
    assert manifest.name == "napari-calvae"
    assert [w.display_name for w in manifest.contributions.widgets] == ["spike inference"]


def test_every_command_can_be_imported():
    manifest = npe2.PluginManifest.from_distribution("napari-calvae")
    for command in manifest.contributions.commands:
        assert callable(_load(command.python_name))


def test_the_manifest_at_the_top_is_that_of_the_package():
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("installed without the repository around it")
    top = ROOT / "napari.yaml"
    assert top.read_bytes() == (ROOT / "napari_calvae" / "napari.yaml").read_bytes()


def test_npe2_discovers_the_wheel(tmp_path):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("installed without the repository around it")
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import npe2, napari_calvae; from napari_calvae._napari.contributions import sample_folder;"
        "found = [r.manifest.name for r in npe2.PluginManifest.discover() if r.manifest];"
        "print(napari_calvae.__file__, sample_folder(), found.count('napari-calvae'), sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    module, sample, found = done.stdout.split()
    assert Path(module).is_relative_to(tmp_path / "site")
    assert Path(sample).is_relative_to(tmp_path / "site")
    assert int(found) >= 1


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
