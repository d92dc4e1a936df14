"""The house keeps its own rules: what importing loads, who may know whom, how large things are."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import napari_calvae

ROOT = Path(__file__).parents[1]
PACKAGE = Path(napari_calvae.__file__).parent


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_neither_torch_nor_qt_nor_napari():
    loaded = run_python("import sys, napari_calvae; dir(napari_calvae); print(sorted(sys.modules))")
    for heavy in ("torch", "qtpy", "PyQt6", "napari", "pyqtgraph", "scipy", "numpy"):
        assert f"'{heavy}'" not in loaded, heavy


def test_the_science_works_where_qt_and_napari_cannot_be_imported():
    code = """
import sys
for name in ("napari", "qtpy", "PyQt6", "PySide6", "pyqtgraph", "magicgui", "superqt"):
    sys.modules[name] = None
import numpy as np, napari_calvae as calvae
from napari_calvae import benchmark, cli, fitting, simulation
traces = calvae.Traces(np.random.default_rng(0).normal(size=(1, 200)), frame_rate=30.0)
print(calvae.infer(traces, n_samples=2).rate.shape)
"""
    assert "(1, 200)" in run_python(code)


def test_every_public_name_is_there():
    for name in napari_calvae.__all__:
        assert getattr(napari_calvae, name) is not None
    with pytest.raises(AttributeError, match="it offers"):
        napari_calvae.nonesuch  # noqa: B018


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports", "--no-logo"], ["mypy"]],
    ids=lambda c: " ".join(c[:2]),
)
def test_linters_and_contracts(command):
    beside = Path(sys.executable).parent / command[0]
    tool = str(beside) if beside.exists() else shutil.which(command[0])
    if tool is None:
        pytest.skip(f"{command[0]} is not installed: install napari-calvae[test]")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout: there is nothing to lint")
    if command == ["mypy"] and np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("numpy before 2, and matplotlib with it, say less of their types")
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_stay_small_and_the_package_light():
    lines = {p: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert max(lines.values()) <= 500
    # As a wheel weighs it: its files are compressed one by one.
    kept = (p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    size = sum(len(zlib.compress(p.read_bytes())) for p in kept if p.suffix != ".safetensors")
    weights = sum(p.stat().st_size for p in PACKAGE.rglob("*.safetensors"))
    assert size < 2_000_000  # 0.8 MB of it sample data
    assert weights < 5_000_000
