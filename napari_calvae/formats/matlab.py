"""MATLAB files (``.mat``): a matrix of traces; ground truth of CASCADE and C-SPIKES; results as named arrays.

Read are files of version 7.3, which are HDF5, and older ones; written are such of version 5, which all MATLABs read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import savemat
from scipy.io.matlab import MatWriteError

from napari_calvae.formats._files import (
    TRACE_FACTS,
    TRACE_NAMES,
    arrays_of,
    believed_rate,
    existing,
    mask_arrays,
    provenance_json,
    traces_of,
    whole_files,
)
from napari_calvae.formats._mat import UNREADABLE, shapes, variables
from napari_calvae.formats.ground_truth import Sweep, mat_sweeps
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit

PATTERNS = ("*.mat",)
SUFFIXES = (".mat",)


def matches(path: Path) -> bool:
    """Tell whether this is a MATLAB file."""
    return path.suffix.lower() == ".mat" and path.is_file()


def read(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> Traces:
    """Read traces (roi, time) from the variable ``values``, ``dff`` or ``F``, or from the only matrix in the file.

    ``frame_rate``, ``roi_ids``, ``t0``, ``unit`` and ``accepted`` may stand beside it, and ROIs as ``write`` puts them.

    Ground truth, recognised by ``CAttached`` or by ``time_stamps`` and ``dff``, has one row per sweep of its one cell,
    with ids 1, 2, …; shorter sweeps end in missing frames. A single sweep keeps its clock; of several, each has a clock
    of its own that begins with its first frame, ``t0`` = 0. ``read_spikes`` tells the spikes on the same clocks.

    Raises
    ------
    RecordingError
        If there is no such matrix or more than one, if sweeps have different frame rates (more than a frame apart at
        the end of a sweep) and none is given, or if the file is damaged.
    """
    try:
        found = shapes(path)
        if "CAttached" in found or {"time_stamps", "dff", "ap_times"} <= set(found):
            return _traces_of_sweeps(_sweeps(path), path, frame_rate, unit)
        numbers = {name: shape for name, shape in found.items() if shape and name not in TRACE_FACTS}
        matrices = [name for name, shape in numbers.items() if len(shape) == 2 and min(shape) > 1]
        name = next((name for name in TRACE_NAMES if name in numbers), matrices[0] if len(matrices) == 1 else None)
        if name is None:
            raise RecordingError(
                f"{path.name}: expected a matrix (roi, time) named {' or '.join(TRACE_NAMES)}, or only one of any "
                f"name, got {', '.join(sorted(found)) or 'nothing'}."
            )
        arrays = {key: np.asarray(value) for key, value in variables(path, (name, *TRACE_FACTS)).items()}
        # Axes of length one are gone; a single frame of several ROIs is a column again.
        if len(numbers[name]) == 2 and numbers[name][1] == 1 and "roi_ids" in arrays:
            arrays[name] = arrays[name].reshape(numbers[name])
    except RecordingError:
        raise
    except UNREADABLE as error:
        raise RecordingError(
            f"{path.name}: expected a MATLAB file, got one that cannot be read ({error}). "
            "It may be incomplete: copy it again, or save it again in MATLAB."
        ) from error
    if name not in TRACE_NAMES:
        arrays["values"] = arrays.pop(name)
    return traces_of(arrays, path, frame_rate, unit)


def read_spikes(path: str | Path) -> dict[int, np.ndarray]:
    """Spike times (s) of the sweeps of a ground-truth file, by the ids and on the clocks that ``read`` gives them."""
    file = existing(path)
    sweeps = _sweeps(file)
    return {row: sweep.spike_times - (sweep.t0 if len(sweeps) > 1 else 0.0) for row, sweep in enumerate(sweeps, 1)}


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write a result or traces, a variable per array, with ``provenance`` as JSON text.

    The arrays are those of ``arrays_of`` and ``mask_arrays``.
    """
    everything = arrays_of(value) | mask_arrays(value) | {"provenance": provenance_json(value)}
    with whole_files(path) as (temporary,), open(temporary, "wb") as file:
        try:
            savemat(file, everything, do_compression=True)
        except MatWriteError as error:
            raise RecordingError(
                f"{path.name}: expected arrays of less than 4 GB, as MATLAB's format allows, got more ({error}). "
                "Write .h5, which MATLAB reads with h5read."
            ) from error


def _sweeps(path: Path) -> list[Sweep]:
    sweeps = list(mat_sweeps(path))
    if not sweeps:
        raise RecordingError(f"{path.name}: expected at least one sweep of two frames, got none.")
    return sweeps


def _traces_of_sweeps(sweeps: list[Sweep], path: Path, frame_rate: float | None, unit: Unit | None) -> Traces:
    stated = float(np.median([sweep.frame_rate for sweep in sweeps]))
    rate, contradicted = believed_rate(frame_rate, stated)
    if frame_rate is None:
        apart = [abs(sweep.frame_rate / stated - 1) * len(sweep.dff) for sweep in sweeps]
        if max(apart) > 1:
            rates = sorted(sweep.frame_rate for sweep in sweeps)
            raise RecordingError(
                f"{path.name}: expected sweeps of one frame rate, got {rates[0]:.6g} to {rates[-1]:.6g} Hz. "
                "Save each as a file of its own, or read them with read_ground_truth."
            )
    values = np.full((len(sweeps), max(len(sweep.dff) for sweep in sweeps)), np.nan, np.float32)
    for row, sweep in zip(values, sweeps, strict=True):
        row[: len(sweep.dff)] = sweep.dff
    return Traces(
        values,
        rate,  # type: ignore[arg-type]
        unit or "dff",
        t0=sweeps[0].t0 if len(sweeps) == 1 else 0.0,
        provenance={"source": path.name, "sweeps_begin_s": [sweep.t0 for sweep in sweeps]} | contradicted,
    )
