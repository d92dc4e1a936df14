"""Zarr arrays of which every chunk is written: one that is not there was lost.

By Zarr's convention it would stand for the fill value, and what was lost would be read as nothing, in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats._files import check_memory


def open_node(path: Path) -> Any:
    """An array or group, to be written to as well where it is of a version that we write."""
    import zarr

    return zarr.open(str(path), mode="r+" if (path / "zarr.json").exists() else "r")


def create_group(folder: Path, about: Mapping[str, Any]) -> Any:
    """Create a new group, whose attributes say what it is."""
    import zarr

    return zarr.create_group(str(folder), attributes={"calvae": dict(about)})


def create_array(
    group: Any, name: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, overwrite: bool = False
) -> Any:
    """Create an array; its chunks are small and fast to read and write, and fail loudly where bytes have changed."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    size = np.dtype(dtype).itemsize
    return group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(min(c, n), 1) for c, n in zip(chunk, shape, strict=True)),
        dtype=dtype,
        fill_value=np.nan if dtype.startswith("f") else 0,
        compressors=(BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=size), Crc32cCodec()),
        overwrite=overwrite,
        config={"write_empty_chunks": True},
    )


def every_chunk(group: Any, name: str) -> Any:
    """An array whose chunks are written also where there is nothing in them; that is not kept with it.

    Nor can it be set for a while: zarr's configuration is that of all threads.
    """
    import zarr

    found = group[name]
    return zarr.Array(zarr.AsyncArray(found.metadata, found.store_path, {"write_empty_chunks": True}))


def read_rows(array: Any, index: np.ndarray | None = None, axis: int = 0, *, whole: bool = False) -> np.ndarray:
    """Rows of a Zarr array, or all; neighbours as one slice, which is faster. Of a ``whole`` one no chunk may miss."""
    shape = list(array.shape)
    if index is not None:
        shape[axis] = len(index)
    check_memory(array.dtype.itemsize * math.prod(shape), Path(array.store.root))
    if whole:
        check_chunks(array, None if index is None else np.unique(index // array.chunks[axis]).tolist(), axis)
    if index is None:
        return array[...]
    ahead = (slice(None),) * axis
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return array[(*ahead, slice(int(index[0]), int(index[-1]) + 1))]
    return array.oindex[(*ahead, index)]


def check_chunks(array: Any, places: Sequence[int] | None = None, axis: int = 0) -> None:
    """Raise ValueError if a chunk of an array is not there; of all, or of those in some places along an axis."""
    grid: list[Sequence[int]] = [range(n) for n in _n_chunks(array)]
    if places is not None:
        grid[axis] = places
    for at in np.ndindex(*map(len, grid)):  # unlike `itertools.product` without a list of them all
        file = _chunk_file(array, tuple(place[k] for place, k in zip(grid, at, strict=True)))
        if not file.is_file():
            raise ValueError(f"{file.relative_to(array.store.root)} is not there")


def count_missing(array: Any, most: int = 10_000) -> tuple[int, int]:
    """How many chunks of an array are not there, and at how many was looked: at all, or ``most`` evenly spread."""
    shape = _n_chunks(array)
    n = math.prod(shape)
    looked = np.unique(np.linspace(0, max(n - 1, 0), min(n, most)).round().astype(int))
    chunks = zip(*np.unravel_index(looked, shape), strict=True)
    return sum(not _chunk_file(array, tuple(map(int, chunk))).is_file() for chunk in chunks), len(looked)


def _n_chunks(array: Any) -> list[int]:
    """Number of files along each axis; those of a sharded array are its shards."""
    return [-(-n // size) for n, size in zip(array.shape, array.shards or array.chunks, strict=True)]


def _chunk_file(array: Any, chunk: tuple[int, ...]) -> Path:
    return Path(array.store.root) / array.path / array.metadata.encode_chunk_key(chunk)
