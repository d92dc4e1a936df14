"""Shared by all tests: where the real recordings are, and one thread per worker."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# Before torch is imported: threads that wait for each other on a busy machine spin for seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from jaxtyping import install_import_hook

# Shapes and types in the signatures of the science are checked while testing.
_CHECKED = ("generative", "recognition", "objectives")
install_import_hook([f"napari_calvae.{module}" for module in _CHECKED], "beartype.beartype")

#: The science is tested where there is no napari, too.
collect_ignore = [] if find_spec("napari") else ["_napari"]

SHARED = Path(os.environ.get("CALVAE_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Let numba, which napari draws labels with, take one thread per worker: it gives torch as many as it takes itself.

    In this process it may be imported already, and would refuse another number.
    """
    if config.getoption("numprocesses", None):
        os.environ.setdefault("NUMBA_NUM_THREADS", "1")


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return ["napari is not installed: the tests of the plugin are left out"] if collect_ignore else []


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real recordings; tests that need it are skipped where it is absent."""
    if not (SHARED / "ground_truth").is_dir():
        pytest.skip(f"real recordings not found at {SHARED}: set CALVAE_SHARED")
    return SHARED
