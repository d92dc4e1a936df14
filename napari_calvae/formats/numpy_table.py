"""NumPy files: ``.npy`` with a (roi, time) matrix; ``.npz`` with named arrays, also for results. Never unpickles."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from napari_calvae.formats._files import arrays_of, provenance_json, traces_of, whole_files
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit

PATTERNS = ("*.npy", "*.npz")
SUFFIXES = (".npz",)


def matches(path: Path) -> bool:
    """Tell whether this is a NumPy file."""
    return path.suffix.lower() in (".npy", ".npz")


def read(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> Traces:
    """Read traces (roi, time): all of an ``.npy``, or the array ``values``, ``dff`` or ``F`` of an ``.npz``."""
    try:
        with np.load(path, allow_pickle=False) if path.suffix.lower() == ".npz" else open(path, "rb") as file:
            if isinstance(file, np.lib.npyio.NpzFile):
                wanted = ("values", "dff", "F", "frame_rate", "unit", "roi_ids", "t0")
                arrays = {name: file[name] for name in wanted if name in file.files}
                if not any(name in arrays for name in wanted[:3]):
                    arrays |= dict.fromkeys(file.files, np.empty(0))  # for the message, which lists what is there
            else:
                arrays = {"values": np.load(file, allow_pickle=False)}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RecordingError(
            f"{path.name}: expected a NumPy file of plain numbers, got one that cannot be read ({error}). "
            "Save the matrix (roi, time) itself with numpy.save; pickled objects are never loaded."
        ) from error
    return traces_of(arrays, path, frame_rate, unit)


def write(result: SpikeInference, path: Path) -> None:
    """Write a result as named arrays (see ``arrays_of``), with ``provenance`` as JSON text."""
    with whole_files(path) as (temporary,), open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays_of(result), provenance=np.asarray(provenance_json(result)))
