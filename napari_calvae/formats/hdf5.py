"""HDF5 files (``.h5``, ``.hdf5``) with the same named arrays as ``.npz``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from napari_calvae.formats._files import (
    DAMAGE,
    TRACE_FACTS,
    TRACE_NAMES,
    arrays_of,
    check_memory,
    mask_arrays,
    provenance_json,
    traces_of,
    whole_files,
)
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit

PATTERNS = ("*.h5", "*.hdf5")
SUFFIXES = (".h5", ".hdf5")

#: Datasets that an error names.
_MOST_LISTED = 8


def matches(path: Path) -> bool:
    """Tell whether this is an HDF5 file with an array of traces at its top, or one that cannot be read at all."""
    if path.suffix.lower() not in SUFFIXES:
        return False
    try:
        with h5py.File(path) as file:
            return any(isinstance(file.get(name), h5py.Dataset) for name in TRACE_NAMES)
    except OSError:
        return True  # `read` says what is the matter


def read(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> Traces:
    """Read traces from the dataset ``values``, ``dff`` or ``F`` (roi, time); ``frame_rate`` may be an attribute."""
    try:
        with h5py.File(path) as file:
            wanted = (*TRACE_NAMES, *TRACE_FACTS)
            found = {name: file[name] for name in wanted if isinstance(file.get(name), h5py.Dataset)}
            if not found.keys() & TRACE_NAMES.keys():
                raise RecordingError(
                    f"{path.name}: expected a dataset (roi, time) named {' or '.join(TRACE_NAMES)}, or CaImAn's "
                    f"estimates/C, got {_listed(file)}. Rename the one with the traces, or save them under that name; "
                    "a movie needs a label image with it (--rois)."
                )
            check_memory(sum(dataset.nbytes for dataset in found.values()), path)
            arrays = {name: _content(dataset) for name, dataset in found.items()}
            arrays = {name: file.attrs[name] for name in TRACE_FACTS if name in file.attrs} | arrays
    except RecordingError:
        raise
    except DAMAGE as error:
        raise RecordingError(f"{path.name}: expected an HDF5 file, got one that cannot be read ({error}).") from error
    return traces_of(arrays, path, frame_rate, unit)


def _listed(file: h5py.File) -> str:
    """Names and shapes of the first few datasets of a file."""
    found: list[str] = []

    def look(name: str, item: object) -> bool | None:
        if isinstance(item, h5py.Dataset):
            found.append(f"{name} {item.shape}")
        return True if len(found) > _MOST_LISTED else None

    file.visititems(look)
    return ", ".join(found[:_MOST_LISTED]) + (" …" if len(found) > _MOST_LISTED else "") or "none"


def _content(dataset: h5py.Dataset) -> np.ndarray:
    return np.asarray(dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()])


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write a result or traces, a dataset per array, with ``provenance`` as a JSON attribute.

    The arrays are those of ``arrays_of`` and ``mask_arrays``.
    """
    with whole_hdf5(path) as file:
        for name, array in (arrays_of(value) | mask_arrays(value)).items():
            packing = {"compression": "gzip", "compression_opts": 4, "shuffle": True} if array.size > 1000 else {}
            file.create_dataset(name, data=str(array) if array.dtype.kind == "U" else array, **packing)
        file.attrs["provenance"] = provenance_json(value)


@contextmanager
def whole_hdf5(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file, built in memory and written when it is complete.

    Where a disk runs full under it HDF5 cannot close a file any more, and ends the process sooner or later.
    """
    with whole_files(path) as (temporary,):
        with h5py.File(temporary, "w", driver="core", backing_store=False) as file:
            yield file
            file.flush()
            image = file.id.get_file_image()
        temporary.write_bytes(image)
