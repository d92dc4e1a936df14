"""Files: one module per format, listed in ``FORMATS``; movies and label images come from ``tiff``.

A format has ``PATTERNS`` (file names), ``matches(path)`` and ``read(path, frame_rate, unit) → Traces``. One that can
also hold results has ``SUFFIXES`` and ``write(result, path)``.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from napari_calvae.formats import csv_table, hdf5, numpy_table
from napari_calvae.formats._files import check_output, existing, whole_files
from napari_calvae.formats.numpy_table import write_arrays
from napari_calvae.formats.pulses import read_stimulation
from napari_calvae.formats.tiff import is_movie, read_labels, read_movie, write_movie
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit

__all__ = [
    "FORMATS",
    "check_output",
    "check_result",
    "is_movie",
    "read",
    "read_labels",
    "read_movie",
    "read_spikes",
    "read_stimulation",
    "whole_files",
    "write",
    "write_arrays",
    "write_movie",
    "writer_of",
]

FORMATS: dict[str, ModuleType] = {"numpy": numpy_table, "csv": csv_table, "hdf5": hdf5}


def read(path: str | Path, frame_rate: float | None = None, unit: Unit | None = None) -> Traces:
    """Traces from a file of any supported format.

    Parameters
    ----------
    path
        File of traces; for movies see ``read_movie`` and ``extract``.
    frame_rate
        Frames per second (Hz); needed if the file does not say, and believed rather than the file if given.
    unit
        ``"raw"`` or ``"dff"`` (ΔF/F as a fraction); by default what the file says, else ``"dff"``.
    """
    file = existing(path)
    for module in FORMATS.values():
        if module.matches(file):
            return module.read(file, frame_rate, unit)
    patterns = ", ".join(p for module in FORMATS.values() for p in module.PATTERNS)
    raise RecordingError(
        f"{file.name}: expected traces in one of the formats {patterns}, got something else. "
        "Movies (.tif) need a label image with them, --rois on the command line."
    )


def read_spikes(path: str | Path) -> dict[int, np.ndarray]:
    """Known spikes, per ROI id its spike times (s): an ``.npz`` as ``calvae simulate`` writes it, or a ``.csv``.

    The table has a row per spike, with columns ``roi`` and ``time_s`` or alike.
    """
    file = existing(path)
    return (csv_table if csv_table.matches(file) else numpy_table).read_spikes(file)


def write(result: SpikeInference, path: str | Path, overwrite: bool = False) -> None:
    """Write what was inferred: all of it, or nothing at all.

    Parameters
    ----------
    result
        What ``infer`` returned.
    path
        ``.npz``, ``.h5``, or ``.csv`` (which puts events, one row per ROI and the provenance into files beside it).
    overwrite
        Replace what is there; without it an existing file is an error.
    """
    check_result(path, overwrite).write(result, Path(path).expanduser())


def check_result(path: str | Path, overwrite: bool = False) -> ModuleType:
    """Return the format that can write a result there, else raise what is in the way; to be asked before long work."""
    module = writer_of(path)
    for file in module.outputs(Path(path)) if hasattr(module, "outputs") else (path,):
        check_output(file, overwrite)
    return module


def writer_of(path: str | Path) -> ModuleType:
    """Return the format that writes results under this name."""
    suffix = Path(path).suffix.lower()
    able = {s: module for module in FORMATS.values() for s in getattr(module, "SUFFIXES", ())}
    if suffix not in able:
        raise RecordingError(f"output: expected a name that ends in {', '.join(able)}, got {Path(path).name!r}.")
    return able[suffix]
