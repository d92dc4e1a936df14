"""Files: one module per format, listed in ``FORMATS``; movies and label images come from ``movies``.

A format has ``PATTERNS`` (names of files or folders), ``matches(path)`` and ``read(path, frame_rate, unit) → Traces``.
One that can leave traces in the file until they are asked for has ``open_source(path, frame_rate, unit) → TraceSource``
and no ``read`` of its own. One that can be written has ``SUFFIXES`` (ends of names) and ``write(value, path)`` for
results, traces or both, and ``FOLDER = True`` if that makes a folder; one that needs a package of its own for it has
``check_needed()``, and one whose files may be added to ``append(result, path)`` and ``check_append(path, traces)``.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from napari_calvae.formats import (
    caiman,
    csv_table,
    extractors,
    hdf5,
    matlab,
    numpy_table,
    nwb,
    parquet,
    store,
    suite2p,
)
from napari_calvae.formats._files import ZARR_MARKS, arrays_of, believed_rate, check_output, existing, whole_files
from napari_calvae.formats.movies import is_movie, read_labels, read_movie, write_movie
from napari_calvae.formats.numpy_table import write_arrays
from napari_calvae.formats.pulses import read_stimulation
from napari_calvae.formats.store import StoredInference
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit
from napari_calvae.trace_source import TraceSource

__all__ = [
    "FORMATS",
    "StoredInference",
    "arrays_of",
    "believed_rate",
    "check_output",
    "check_result",
    "is_movie",
    "is_traces",
    "open_result",
    "open_traces",
    "outputs_of",
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

#: In the order in which they are asked whether a file is theirs: the particular before the general.
FORMATS: dict[str, ModuleType] = {
    "suite2p": suite2p,
    "zarr": store,
    "nwb": nwb,
    "caiman": caiman,
    "numpy": numpy_table,
    "csv": csv_table,
    "parquet": parquet,
    "roiextractors": extractors,
    "matlab": matlab,
    "hdf5": hdf5,
}


def read(
    path: str | Path, frame_rate: float | None = None, unit: Unit | None = None, neuropil: float | None = None
) -> Traces:
    """Traces from a file or folder of any supported format.

    Parameters
    ----------
    path
        File or folder of traces; for movies see ``read_movie`` and ``extract``.
    frame_rate
        Frames per second (Hz); needed if the file does not say, and believed rather than the file if given.
    unit
        ``"raw"`` or ``"dff"`` (ΔF/F as a fraction); by default what the file says, else ``"dff"``.
    neuropil
        Share of the neuropil's signal to subtract, of a suite2p folder, which has both; by default suite2p's own.

    Raises
    ------
    RecordingError
        If the file cannot be read, or ``neuropil`` is given for one that has no signal of the neuropil.
    """
    file = existing(path)
    module = _reader_of(file)
    if hasattr(module, "open_source"):
        return open_traces(file, frame_rate, unit, neuropil).load()
    _check_neuropil(module, file, neuropil)
    return module.read(file, frame_rate, unit)


def open_traces(
    path: str | Path, frame_rate: float | None = None, unit: Unit | None = None, neuropil: float | None = None
) -> TraceSource:
    """Like ``read``, but the traces stay in the file until some are asked for, where the format allows it."""
    file = existing(path).absolute()  # workers elsewhere have another working directory
    module = _reader_of(file)
    if module is suite2p:
        return suite2p.open_source(file, frame_rate, unit, neuropil)
    _check_neuropil(module, file, neuropil)
    if hasattr(module, "open_source"):
        return module.open_source(file, frame_rate, unit)
    return TraceSource.of(module.read(file, frame_rate, unit))


def _check_neuropil(module: ModuleType, file: Path, neuropil: float | None) -> None:
    if module is not suite2p and neuropil is not None:
        raise RecordingError(
            f"neuropil: expected a movie or a suite2p folder to subtract it from, got {file.name}, whose traces are "
            "taken as they are. Leave it out (--neuropil)."
        )


def is_traces(path: str | Path) -> bool:
    """Tell whether a file or folder is one of traces, or of results, as far as that can be told without reading it."""
    file = Path(path).expanduser()
    return file.exists() and any(module.matches(file) for module in FORMATS.values())


def _reader_of(file: Path) -> ModuleType:
    for module in FORMATS.values():
        if module.matches(file):
            return module
    if file.suffix.lower() in hdf5.SUFFIXES and file.is_file():
        return hdf5  # which says what is in it instead
    patterns = ", ".join(dict.fromkeys(p for module in FORMATS.values() for p in module.PATTERNS))
    raise RecordingError(
        f"{file.name}: expected traces in one of the formats {patterns}, got something else. "
        "Movies need a label image with them, --rois on the command line."
    )


def open_result(path: str | Path) -> StoredInference:
    """Results in a Zarr store, read ROI by ROI: ``select`` some, or ``load`` all."""
    file = existing(path).absolute()
    if file.suffix.lower() != ".zarr" and not any((file / name).exists() for name in ZARR_MARKS):
        raise RecordingError(
            f"{file.name}: expected a Zarr store of results, as infer(…, out='NAME.zarr') and calvae infer … "
            f"-o NAME.zarr write it, got {_described(file)}. Infer into a store: from there "
            "results go into every format. (repeat takes an .npz, too.)"
        )
    return StoredInference(file)


def _described(file: Path) -> str:
    """What a file or folder that is not as expected is instead, in words."""
    kind = "a folder" if file.is_dir() else f"a file {file.suffix or 'without an end to its name'}"
    try:
        name = next((name for name, module in FORMATS.items() if module.matches(file)), None)
    except RecordingError:  # damaged
        name = None
    return f"{kind} of the format {name}" if name else kind


def read_spikes(path: str | Path) -> dict[int, np.ndarray]:
    """Known spikes, per ROI id its spike times (s): ``.npz`` as ``calvae simulate`` writes it, ``.csv``, or ``.mat``.

    A table has a row per spike, with columns ``roi`` and ``time_s`` or alike; ``.mat`` is ground truth in the layout of
    CASCADE or of C-SPIKES.
    """
    file = existing(path)
    module = next((m for m in (csv_table, matlab) if m.matches(file)), numpy_table)
    return module.read_spikes(file)


def write(value: SpikeInference | Traces, path: str | Path, overwrite: bool = False, append: bool = False) -> None:
    """Write what was inferred, or traces: all of it, or nothing at all.

    Parameters
    ----------
    value
        What ``infer`` returned, or traces as ``extract`` or ``read`` return them.
    path
        Its name says the format: ``.zarr``, ``.nwb``, ``.npz``, ``.csv``, ``.parquet``, ``.mat``, ``.h5``, or
        ``spks.npy`` for suite2p. ``.csv`` and ``.parquet`` put events, one row per ROI and the provenance into files
        beside it.
    overwrite
        Replace what is there; without it an existing file is an error.
    append
        Add to what is there and leave the rest as it is (NWB).
    """
    file = Path(path).expanduser()
    if append:
        _adder_to(file).append(value, file)
    else:
        check_result(file, overwrite).write(value, file)


def check_result(
    path: str | Path, overwrite: bool = False, append: bool = False, traces: Traces | TraceSource | None = None
) -> ModuleType:
    """Return the format that can write a result there, else raise what is in the way; to be asked before long work.

    With ``traces`` it is also asked whether a result of theirs can be added to what is there.
    """
    module = _adder_to(path) if append else writer_of(path)
    if hasattr(module, "check_needed"):
        module.check_needed()
    if append:
        module.check_append(Path(path).expanduser(), traces)
        return module
    for file in outputs_of(path):
        check_output(file, overwrite, getattr(module, "FOLDER", False))
    return module


def _adder_to(path: str | Path) -> ModuleType:
    """Return the format that can add to the file that is there."""
    module = writer_of(path)
    if not hasattr(module, "append"):
        raise RecordingError(f"append: expected the name of an NWB file (.nwb), got {Path(path).name!r}.")
    existing(path)
    return module


def outputs_of(path: str | Path) -> tuple[Path, ...]:
    """All files, or the folder, that writing a result under this name makes."""
    module = writer_of(path)
    return module.outputs(Path(path)) if hasattr(module, "outputs") else (Path(path),)


def writer_of(path: str | Path) -> ModuleType:
    """Return the format that writes under this name."""
    name = Path(path).name.lower()
    able = {suffix: module for module in FORMATS.values() for suffix in getattr(module, "SUFFIXES", ())}
    for suffix, module in able.items():
        if name.endswith(suffix):
            return module
    raise RecordingError(f"output: expected a name that ends in {', '.join(able)}, got {Path(path).name!r}.")
