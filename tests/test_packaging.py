"""The plugin as npe2 finds it in the environment, and the files that describe it."""

from __future__ import annotations

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
    assert top.is_symlink()
    assert top.resolve() == (ROOT / "napari_calvae" / "napari.yaml").resolve()


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
