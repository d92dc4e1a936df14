"""What all movie files share: arrays that stay in their file, the one of them that is meant, frame rates."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.recording import RecordingError

#: Bytes of a movie that are read from its file at a time.
CHUNK_BYTES = 16 << 20
#: So many of these, 16 TB, are the most of a movie. Of a forged header with more even their list takes all memory.
MOST_CHUNKS = 1_000_000
#: Pixels of one image: more than any microscope takes at a time, and few enough to be decoded at once.
MOST_PIXELS = 1 << 27
#: Names under which files keep a movie, in the order in which they are preferred.
MOVIE_NAMES = ("mov", "movie", "data", "imaging", "images")
#: Attributes that state frames per second (Hz).
_RATE_NAMES = ("frame_rate", "framerate", "fr", "fs", "fps", "imaging_rate", "sampling_rate", "rate")
#: Seconds of each unit of time that files name.
SECONDS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ns": 1e-9, "nanosecond": 1e-9, "nanoseconds": 1e-9}
SECONDS |= {"ms": 1e-3, "msec": 1e-3, "millisecond": 1e-3, "milliseconds": 1e-3}
# Of a microsecond both letters are in use: the sign of a micro and a Greek mu.
SECONDS |= {"us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "microsecond": 1e-6, "microseconds": 1e-6}
SECONDS |= {"min": 60.0, "minute": 60.0, "minutes": 60.0, "mins": 60.0}
SECONDS |= {"h": 3600.0, "hour": 3600.0, "hours": 3600.0, "hr": 3600.0, "hrs": 3600.0}
SECONDS |= {"d": 86_400.0, "day": 86_400.0, "days": 86_400.0}


def lazy(source: Any, stored: Sequence[int], n_bytes: int = CHUNK_BYTES) -> Any:
    """Dask array over a ``source`` that reads parts of a file when indexed, and that other processes can get.

    Its chunks hold whole chunks of the file, of the shape ``stored``: as many, in x, y and then time, as make
    ``n_bytes``.

    Raises
    ------
    RecordingError
        If there are more of them than any movie has.
    """
    import dask.array as da

    chunks = list(stored)
    for axis in reversed(range(len(chunks))):
        size = source.dtype.itemsize * math.prod(chunks)
        chunks[axis] = min(chunks[axis] * max(n_bytes // size, 1), source.shape[axis])
    if math.prod(-(-n // size) for n, size in zip(source.shape, chunks, strict=True)) > MOST_CHUNKS:
        shape = " × ".join(map(str, source.shape))
        raise RecordingError(
            f"movie: expected at most {MOST_CHUNKS:,} times {n_bytes >> 20} MB, got a file that says it holds {shape} "
            f"numbers of {source.dtype}. Copy it again, or cut it into several."
        )
    return da.from_array(source, chunks=tuple(chunks), asarray=False, name=False)


class MappedMovie(np.memmap):
    """Memory-mapped movie; what other processes get of it is where it lies, not its pixels."""

    def __reduce__(self) -> Any:
        """Name the file, as long as this is all of it."""
        if isinstance(self.base, mmap.mmap):
            order = "C" if self.flags.c_contiguous else "F"
            return MappedMovie, (self.filename, self.dtype, "r", self.offset, self.shape, order)
        return np.array(self).__reduce__()


def choose(shapes: Mapping[str, tuple[int, ...]], file: Path) -> str:
    """Name of the movie among the arrays of a file: one with a usual name, or the only one of three or more axes."""
    if not shapes:
        raise RecordingError(
            f"{file.name}: expected a movie, an array of numbers (time, y, x), got none with three or more axes."
        )
    for usual in MOVIE_NAMES:
        found = [name for name in shapes if name.rsplit("/", 1)[-1].lower() == usual]
        if len(found) == 1:
            return found[0]
    flat = [name for name, shape in shapes.items() if len(shape) == 3]
    for found in (list(shapes), flat):
        if len(found) == 1:
            return found[0]
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise RecordingError(
        f"{file.name}: expected one movie, or one named {', '.join(MOVIE_NAMES)}, got {len(shapes)} arrays: {listed}. "
        "Rename the one that is meant, or copy it into a file of its own."
    )


def is_numeric(shape: Sequence[int], dtype: Any) -> bool:
    """Tell whether an array has as many axes as a movie, and numbers in it."""
    return len(shape) >= 3 and min(shape) > 0 and getattr(dtype, "kind", "O") in "biuf"


def stated_rate(*attributes: Mapping[str, Any]) -> float | None:
    """Frames per second (Hz) that the first of some attributes state."""
    for found in attributes:
        names = {str(name).lower(): name for name in found}
        for name in _RATE_NAMES:
            rate = positive(found[names[name]]) if name in names else None
            if rate:
                return rate
    return None


def positive(value: Any) -> float | None:
    """Return the value as a number above 0, or None."""
    try:
        number = float(np.asarray(value).reshape(()) if np.size(value) == 1 else value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
