"""Movies in HDF5 files: a dataset (time, y, x) or (time, plane, y, x) with a usual name, or the only one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from napari_calvae.formats._files import TRACE_NAMES, readable
from napari_calvae.formats._lazy import MappedMovie, choose, is_numeric, lazy, stated_rate

MOVIE_PATTERNS = ("*.h5", "*.hdf5")
_KIND = "an HDF5 file with a movie"


def is_movie(path: Path) -> bool:
    """Tell whether an HDF5 file holds a movie, and neither traces nor what CaImAn estimated."""
    if path.suffix.lower() not in (".h5", ".hdf5") or not path.is_file():
        return False
    with readable(path, "an HDF5 file"), h5py.File(path) as file:
        tables = any(_axes(file.get(name)) in (1, 2) for name in TRACE_NAMES)
        return not tables and "estimates" not in file and bool(_movies(file))


def is_nwb_movie(path: Path) -> bool:
    """Tell whether an NWB file holds a movie (TwoPhotonSeries or OnePhotonSeries) and no traces."""
    if path.suffix.lower() != ".nwb" or not path.is_file():
        return False
    kinds = set()

    def note(_: str, item: Any) -> None:
        kind = item.attrs.get("neurodata_type", "")
        kinds.add(kind.decode() if isinstance(kind, bytes) else str(kind))

    with readable(path, "an NWB file"), h5py.File(path) as file:
        file.visititems(note)
    return bool(kinds & {"TwoPhotonSeries", "OnePhotonSeries"}) and "RoiResponseSeries" not in kinds


def open_movie(path: Path) -> tuple[Any, float | None]:
    """Open the movie, memory-mapped or as a dask array.

    The frame rate is an attribute of it or of the groups that it is in, or a single number beside them.
    """
    with readable(path, _KIND), h5py.File(path) as file:
        name = choose(_movies(file), path)
        dataset = file[name]
        at = [dataset]
        while at[-1].name != "/":
            at.append(at[-1].parent)
        numbers = {key: item[()] for key, item in file.items() if _axes(item) == 0}
        rate = stated_rate(*(place.attrs for place in at), numbers)
        offset = dataset.id.get_offset() if not (dataset.chunks or dataset.external or dataset.is_virtual) else None
        if offset is not None:  # in one row, as it is in memory
            return MappedMovie(path, dataset.dtype, "r", offset, dataset.shape), rate
        stored = dataset.chunks or (1, *dataset.shape[1:])
        pages = StoredPages(path, name, dataset.shape, dataset.dtype)
        movie = lazy(pages, stored)
        pages[:1]  # a file that cannot be decoded says so now
    return movie, rate


class StoredPages:
    """A dataset of an HDF5 file; the file is only open while some of it is read."""

    def __init__(self, file: Path, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.file, self.name, self.shape, self.dtype = file, name, shape, dtype
        self.ndim = len(shape)

    def __getitem__(self, key: Any) -> np.ndarray:
        with readable(self.file, _KIND), h5py.File(self.file) as file:
            dataset = file[self.name]
            parts = key if isinstance(key, tuple) else (key,)
            if not all(isinstance(part, slice) for part in parts):
                return dataset[key]
            # The same as dataset[key], without first filling all of it with zeros.
            lengths = [len(range(*part.indices(n))) for part, n in zip(parts, self.shape, strict=False)]
            block = np.empty((*lengths, *self.shape[len(parts) :]), self.dtype)
            if block.size:
                dataset.read_direct(block, key)
            return block


def _movies(file: h5py.File) -> dict[str, tuple[int, ...]]:
    """Shapes of the datasets that may be a movie, by name."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and len(item.shape or ()) <= 4 and is_numeric(item.shape or (), item.dtype):
            found[name] = item.shape

    file.visititems(note)
    return found


def _axes(item: Any) -> int | None:
    """Number of axes of a dataset of plain numbers."""
    plain = isinstance(item, h5py.Dataset) and item.shape is not None and item.dtype.kind in "biuf"
    return len(item.shape) if plain else None
