"""NumPy files: ``.npy`` with a (roi, time) matrix; ``.npz`` with named arrays, also for results. Never unpickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from napari_calvae.formats._files import (
    TRACE_FACTS,
    TRACE_NAMES,
    arrays_of,
    check_memory,
    check_output,
    existing,
    mask_arrays,
    provenance_json,
    readable,
    traces_of,
    whole_files,
)
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit

PATTERNS = ("*.npy", "*.npz")
SUFFIXES = (".npz",)


def matches(path: Path) -> bool:
    """Tell whether this is a NumPy file."""
    return path.suffix.lower() in (".npy", ".npz")


def read(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> Traces:
    """Read traces (roi, time): all of an ``.npy``, or the array ``values``, ``dff`` or ``F`` of an ``.npz``."""
    hint = "Save the matrix (roi, time) itself with numpy.save; pickled objects are never loaded."
    with readable(path, "a NumPy file of plain numbers", hint), open(path, "rb") as opened:
        if path.suffix.lower() == ".npz":
            with np.load(opened, allow_pickle=False) as file:
                found = [name for name in (*TRACE_NAMES, *TRACE_FACTS) if name in file.files]
                sizes = {each.filename.removesuffix(".npy"): each.file_size for each in file.zip.infolist()}
                check_memory(sum(sizes[name] for name in found), path)
                arrays = {name: file[name] for name in found}
                if not any(name in arrays for name in TRACE_NAMES):
                    arrays |= dict.fromkeys(file.files, np.empty(0))  # for the message, which lists what is there
        else:
            arrays = {"values": np.load(opened, allow_pickle=False)}
    return traces_of(arrays, path, frame_rate, unit)


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write a result or traces as named arrays, with ``provenance`` as JSON text.

    The arrays are those of ``arrays_of`` and ``mask_arrays``.
    """
    with whole_files(path) as (temporary,), open(temporary, "wb") as file:
        arrays = arrays_of(value) | mask_arrays(value) | {"provenance": np.asarray(provenance_json(value))}
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_arrays(arrays: Mapping[str, np.ndarray], path: str | Path, overwrite: bool = False) -> Path:
    """Write named arrays of plain numbers as ``.npz``, whole or not at all."""
    target = check_output(path, overwrite)
    with whole_files(target) as (temporary,), open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return target


def read_spikes(path: str | Path) -> dict[int, np.ndarray]:
    """Read known spikes, as ``calvae simulate`` writes them: per ROI id its spike times (s)."""
    file = existing(path)
    with readable(file, "an .npz file of spike times"), np.load(file, allow_pickle=False) as z:
        names = [name for name in z.files if name.startswith("spike_times_") and name[12:].isdigit()]
        times = {int(name[12:]): np.asarray(z[name], float).ravel() for name in names}
    for roi, found in times.items():
        if not np.isfinite(found).all():
            raise RecordingError(f"{file.name}: expected finite spike times (s), got others of ROI {roi}. Remove them.")
    if not times:
        raise RecordingError(
            f"{file.name}: expected arrays spike_times_<ROI id> (s), got none. "
            "Save the spike times of each ROI under that name with numpy.savez."
        )
    return times
