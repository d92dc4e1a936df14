"""A movie in pieces that fit into memory, each chunk of it in one piece only, read ahead while others are reduced."""

from __future__ import annotations

import itertools
import math
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from napari_calvae.recording import unmasked

#: Pieces that are read at the same time: one copies or decodes what it has got while the other waits for the disk.
N_READERS = 2
#: Bytes of a memory-mapped file that may count as this process's memory before they are given back.
MAPPED_BYTES = 256 << 20


class Piece(NamedTuple):
    """Part of a (time, y, x) movie; it is also the index that takes it out."""

    frames: slice
    y: slice
    x: slice


def pieces(movie: Any, box: tuple[slice, slice], n_bytes: int) -> list[Piece]:
    """Cut the (y, x) ``box`` of a movie where its chunks end, frame ranges first, into pieces of about ``n_bytes``.

    Chunks that hold more frames than that are cut in y and x, too, as far as other chunks begin there. Thus each chunk
    is in one piece, and pieces with the same frames follow each other.
    """
    itemsize = np.dtype(movie.dtype).itemsize
    height, width = (side.stop - side.start for side in box)
    found = []
    for frames in _spans(movie, 0, slice(0, movie.shape[0]), n_bytes / (height * width * itemsize)):
        image = (frames.stop - frames.start) * itemsize  # bytes of a pixel
        rows, columns = [box[0]], [box[1]]
        if image * height * width > 2 * n_bytes:
            rows = _spans(movie, 1, box[0], n_bytes / (image * width))
            tallest = max(part.stop - part.start for part in rows)
            if image * tallest * width > 2 * n_bytes:
                columns = _spans(movie, 2, box[1], n_bytes / (image * tallest))
        found += [Piece(frames, y, x) for y, x in itertools.product(rows, columns)]
    return found


def _spans(movie: Any, axis: int, whole: slice, wanted: float) -> list[slice]:
    """Parts of ``whole`` along an axis, of at least ``wanted`` elements, that end where chunks end."""
    size = movie.shape[axis]
    chunks = getattr(movie, "shards", None) or getattr(movie, "chunks", None)
    if chunks is None:
        if axis:
            return [whole]
        step = max(int(wanted), 1)
        ends: Sequence[int] = range(step, size + step, step)
    elif isinstance(chunks[axis], tuple):
        ends = np.cumsum(chunks[axis]).tolist()
    else:
        ends = range(chunks[axis], size + chunks[axis], chunks[axis])
    found, start = [], whole.start
    for end in ends:
        stop = min(end, whole.stop)
        if stop > start and (stop - start >= wanted or stop == whole.stop):
            found.append(slice(start, stop))
            start = stop
    return found


def iter_blocks(movie: Any, parts: Sequence[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yield each piece with its pixels; while one is in use, threads read the next ones.

    What is in memory or mapped into it comes as a view: whoever uses it reads it.
    """
    if isinstance(movie, np.ndarray):
        plain = _FileFrames.of(movie) if len(parts) > 1 and all(part[1:] == _image(movie) for part in parts) else None
        if plain is None:
            yield from _iter_views(movie, parts)
            return
        movie = plain
    if len(parts) == 1:
        yield parts[0], unmasked(movie[tuple(parts[0])])
        return
    readers = ThreadPoolExecutor(N_READERS, thread_name_prefix="movie")
    try:
        coming = deque(readers.submit(_read, movie, piece) for piece in parts[:N_READERS])
        for piece, following in itertools.zip_longest(parts, parts[N_READERS:]):
            block = coming.popleft().result()
            if following is not None:
                coming.append(readers.submit(_read, movie, following))
            yield piece, block
            del block
    finally:
        readers.shutdown(cancel_futures=True)


def _image(movie: Any) -> tuple[slice, slice]:
    return slice(0, movie.shape[1]), slice(0, movie.shape[2])


class _FileFrames:
    """Whole frames of a memory-mapped movie, read from its file: faster than page by page, and in known memory."""

    def __init__(self, movie: np.memmap, filename: str):
        self.movie, self.filename = movie, filename

    @classmethod
    def of(cls, movie: np.ndarray) -> _FileFrames | None:
        """Frames of a movie that is all of a map, and cannot be written to; else None."""
        if not isinstance(movie, np.memmap) or not isinstance(movie.base, mmap.mmap) or not movie.flags.c_contiguous:
            return None
        return cls(movie, movie.filename) if movie.mode == "r" and movie.filename is not None else None

    def __getitem__(self, key: tuple[slice, slice, slice]) -> np.ndarray:
        movie, frames = self.movie, key[0]
        shape = (frames.stop - frames.start, *movie.shape[1:])
        start = movie.offset + frames.start * math.prod(movie.shape[1:]) * movie.itemsize
        try:
            return np.fromfile(self.filename, movie.dtype, math.prod(shape), offset=start).reshape(shape)
        except (OSError, ValueError):  # moved since it was opened
            return movie[key]


def _read(movie: Any, piece: Piece) -> np.ndarray:
    part = movie[tuple(piece)]
    if hasattr(part, "to_delayed") and part.npartitions == 1 and piece[1:] == _image(movie):
        # One chunk of a dask array: as it is, without the copy that dask makes of results.
        part = part.to_delayed(optimize_graph=False).item().compute()
    return unmasked(part)


def _iter_views(movie: np.ndarray, parts: Sequence[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Views of the pieces; pages of a mapped file that were read are given back after a while."""
    mapped = getattr(movie, "_mmap", None)
    # A private copy ("c") would lose what was written to it.
    if mapped is None or getattr(movie, "mode", "c") == "c" or not hasattr(mmap, "MADV_DONTNEED"):
        mapped = None
    touched = 0
    for piece in parts:
        yield piece, unmasked(movie[tuple(piece)])
        rows = piece.y.stop - piece.y.start
        touched += (piece.frames.stop - piece.frames.start) * rows * math.prod(movie.shape[2:]) * movie.itemsize
        if mapped is not None and touched > MAPPED_BYTES:
            mapped.madvise(mmap.MADV_DONTNEED)
            touched = 0
