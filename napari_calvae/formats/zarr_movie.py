"""Movies in Zarr folders: an array of three or more axes, or OME-Zarr (versions 0.1 to 0.5) at full resolution."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from napari_calvae.formats._files import TRACE_NAMES, readable
from napari_calvae.formats._lazy import SECONDS, choose, is_numeric, lazy, positive, stated_rate
from napari_calvae.formats._zarr import count_missing
from napari_calvae.recording import RecordingError

MOVIE_PATTERNS = ("*.zarr",)
_KIND = "a Zarr folder with a movie"
#: Axes of OME-Zarr before version 0.3, which does not name them.
_OLD_AXES = ("t", "c", "z", "y", "x")


def is_movie(path: Path) -> bool:
    """Tell whether a Zarr folder holds a movie and no table of traces."""
    if path.suffix.lower() != ".zarr" or not path.is_dir() or not any(path.iterdir()):
        return False
    with readable(path, "a Zarr folder"):
        node = open_node(path)
        if hasattr(node, "shape"):
            return is_numeric(node.shape, node.dtype)
        if _multiscales(node) is not None:
            return True
        arrays = dict(node.arrays())
        tables = any(name in arrays and arrays[name].ndim < 3 for name in (*TRACE_NAMES, "roi_ids"))
        return not tables and any(is_numeric(array.shape, array.dtype) for array in arrays.values())


def open_movie(path: Path) -> tuple[Any, float | None]:
    """Open the movie as a dask array.

    Of OME-Zarr, time comes first, axes of length 1 other than time, y and x are dropped, the others come as they are;
    the frame rate is that of the scale of the time axis, if that has a unit. Of others it is an attribute.
    """
    with readable(path, _KIND):
        place = find(path)
        movie = _lazy(path, place.name, place.array)
    if place.time:
        movie = movie.transpose([place.time, *(i for i in range(movie.ndim) if i != place.time)])
    if place.ome:
        movie = movie[tuple(0 if n == 1 and 0 < i < movie.ndim - 2 else slice(None) for i, n in enumerate(movie.shape))]
    return movie, place.frame_rate


class Place(NamedTuple):
    """Where the movie of a Zarr folder is.

    ``time`` is the index of its axis of time, ``frame_rate`` in Hz if it is stated, ``ome`` whether axes are named.
    """

    name: str
    array: Any
    time: int
    frame_rate: float | None
    ome: bool


def find(path: Path, growing: bool = False) -> Place:
    """Find the movie in a Zarr folder; one that is ``growing`` may have no frame yet."""

    def numeric(array: Any) -> bool:
        return is_numeric((1, *array.shape[1:]) if growing else array.shape, array.dtype)

    node = open_node(path)
    if hasattr(node, "shape"):
        if not numeric(node):
            raise RecordingError(
                f"{path.name}: expected an array of numbers (time, y, x), got {node.dtype} of shape {node.shape}."
            )
        return Place("", node, 0, stated_rate(node.attrs), False)
    found = _multiscales(node)
    if found is not None:
        return _find_ome(path, *found)
    arrays = {name: array for name, array in node.arrays() if numeric(array)}
    name = choose({name: array.shape for name, array in arrays.items()}, path)
    return Place(name, arrays[name], 0, stated_rate(arrays[name].attrs, node.attrs), False)


class StoredChunks:
    """An array of a Zarr folder, opened anew by each process that gets it."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        with readable(folder, _KIND):
            self.array = open_node(folder, name)
        self.shape, self.dtype, self.ndim = self.array.shape, np.dtype(self.array.dtype), self.array.ndim

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredChunks, (self.folder, self.name)

    def __getitem__(self, key: Any) -> np.ndarray:
        with readable(self.folder, _KIND):
            block = np.asarray(self.array[key])
            # Chunks that are not there read as zeros: after the folder is gone, all of them.
            if not any((self.folder / self.name / file).exists() for file in ("zarr.json", ".zarray")):
                raise FileNotFoundError(self.folder)
            return block


def open_node(path: Path, name: str = "") -> Any:
    """Open an array or a group of a Zarr folder."""
    import zarr

    return zarr.open(str(path), path=name or None, mode="r")


def _lazy(path: Path, name: str, array: Any) -> Any:
    chunks = StoredChunks(path, name)
    chunks[tuple(slice(0, 1) for _ in chunks.shape)]  # a folder that cannot be decoded says so now
    movie = lazy(chunks, array.shards or array.chunks)
    missing, looked = count_missing(array)
    if missing:
        warnings.warn(
            f"{path.name}: expected a file for every chunk of the movie, {missing} of {looked} are not there: they "
            f"read as {array.fill_value}. Copy the folder again, unless they held nothing but that.",
            stacklevel=4,
        )
    return movie


def _multiscales(group: Any) -> tuple[str, Any, Mapping[str, Any]] | None:
    """Find the first image of an OME-Zarr group: name of the group that it is in, that group, its metadata."""
    for name in ("", "0"):  # "0": the first series of what bioformats2raw wrote
        if name and ("bioformats2raw.layout" not in _ome(group) or name not in group):
            break
        inner = group[name] if name else group
        found = _ome(inner).get("multiscales")
        if found:
            return name, inner, found[0]
    return None


def _ome(group: Any) -> Mapping[str, Any]:
    """Metadata of OME-Zarr: from version 0.5 on they are under ``ome``."""
    attributes = dict(group.attrs)
    return attributes.get("ome", attributes)


def _find_ome(path: Path, name: str, group: Any, image: Mapping[str, Any]) -> Place:
    level = image["datasets"][0]  # the first is the largest
    array = group[level["path"]]
    stated = image.get("axes", _OLD_AXES[-array.ndim :])
    axes = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in stated]
    names = [str(axis["name"]).lower() for axis in axes]
    time = next((i for i, axis in enumerate(axes) if axis.get("type") == "time" or names[i] == "t"), None)
    if len(axes) != array.ndim or time is None or names[-2:] != ["y", "x"]:
        raise RecordingError(
            f"{path.name}: expected OME-Zarr with axes t, y, x for an array of shape {array.shape}, got the axes "
            f"{', '.join(names)}. A movie needs an axis of time."
        )
    scales = [_scale(place, time) for place in (level, image)]
    unit = SECONDS.get(str(axes[time].get("unit", "")).lower())
    interval = positive(np.prod([scale for scale in scales if scale]) * unit) if unit and any(scales) else None
    rate = 1 / interval if interval else stated_rate(array.attrs, group.attrs)
    return Place("/".join(part for part in (name, level["path"]) if part), array, time, rate, True)


def _scale(place: Mapping[str, Any], axis: int) -> float | None:
    """Scale of an axis that metadata state."""
    for step in place.get("coordinateTransformations", ()):
        if step.get("type") == "scale" and "scale" in step:
            return positive(step["scale"][axis])
    return None
