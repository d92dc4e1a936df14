"""Movies that another program is still writing: how many frames are complete by now, and these frames.

A frame counts once it is known to be complete. Of an array that was given its full length in advance, chunks that are
absent are still to come, and the newest one counts when a later one is there, unless chunks hold one frame; the very
last one when nothing has been written to it for a second.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from napari_calvae.formats import tiff as tiff_movie
from napari_calvae.formats import zarr_movie
from napari_calvae.formats._files import existing, readable
from napari_calvae.formats._lazy import stated_rate
from napari_calvae.recording import RecordingError

_ZARR, _TIFF = "a Zarr folder that is being written", "a TIFF movie that is being written"
_HINT = "If the recording has only just begun, try again."
#: What nobody has written to for so long (s) is complete.
_SETTLED = 1.0
#: Chunks without anything but zeros may never be written: one of so many later ones proves that they were passed.
_AHEAD = 8
#: Another program may be writing a file just when it is opened: tries, and seconds between them.
_TRIES, _WAIT = 4, 0.02
#: Single frames that are kept: the newest are looked at again and again.
_KEPT = 16


class GrowingMovie:
    """A movie that is still being written; made by `open_growing`.

    Its frames may be read by several threads, one of which polls.

    Parameters
    ----------
    source
        Has ``name``, ``path``, the ``image_shape`` (y, x), ``dtype``, ``frame_rate`` (Hz, None if it is not stated), a
        ``count()`` of the frames that are complete, and ``read(start, stop)``.
    """

    def __init__(self, source: _ZarrFrames | _TiffPages | _ArrayFrames):
        self._source = source
        #: Where it is written; None for one in memory.
        self.path: Path | None = source.path
        #: What it is called in sentences.
        self.name = source.name
        #: (y, x) of its frames (pixels).
        self.image_shape: tuple[int, ...] = source.image_shape
        #: Type of the pixels.
        self.dtype: np.dtype = source.dtype
        #: Frames per second (Hz) if that is stated, else None.
        self.frame_rate: float | None = source.frame_rate
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def poll(self) -> int:
        """Number of frames that are complete now.

        Raises
        ------
        RecordingError
            If the recording is gone, has fewer frames than before, or frames of another size.
        """
        return self._source.count()

    def read(self, start: int, stop: int) -> np.ndarray:
        """(time, y, x) frames from ``start`` to ``stop`` (exclusive), which were complete at the last ``poll``."""
        frames = _patiently(lambda: self._source.read(start, stop))
        if len(frames):
            self._keep(stop - 1, frames[-1].copy())
        return frames

    def frame(self, number: int) -> np.ndarray:
        """(y, x) one frame; those that were read last are in memory."""
        kept = self._kept.get(number)
        return self.read(number, number + 1)[0] if kept is None else kept

    def so_far(self, n_frames: int) -> FramesSoFar:
        """(time, y, x) array of the first frames; they stay where they are until some are asked for."""
        return FramesSoFar(self, n_frames)

    def __getstate__(self) -> dict[str, Any]:
        """All but the frames in memory, for other processes."""
        return {**vars(self), "_kept": OrderedDict()}

    def _keep(self, number: int, frame: np.ndarray) -> None:
        self._kept[number] = frame
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)


class FramesSoFar:
    """The first frames of a movie that is still being written, as a (time, y, x) array."""

    ndim = 3

    def __init__(self, movie: GrowingMovie, n_frames: int):
        self.movie = movie
        self.shape = (n_frames, *movie.image_shape)
        self.dtype = movie.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if first is Ellipsis:
            first, rest = slice(None), [Ellipsis, *rest]
        wanted = np.arange(len(self))[first]
        if wanted.ndim == 0:
            return self.movie.frame(int(wanted))[tuple(rest)]
        if not len(wanted):
            return np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *rest)]
        if np.array_equal(wanted, np.arange(wanted[0], wanted[0] + len(wanted))):
            frames = self.movie.read(int(wanted[0]), int(wanted[-1]) + 1)
        else:
            frames = np.stack([self.movie.frame(int(k)) for k in wanted])
        return frames[(slice(None), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All frames in memory (numpy)."""
        return np.asarray(self[:], dtype)


def open_growing(source: Any) -> GrowingMovie:
    """Open a movie that another program is still writing.

    Parameters
    ----------
    source
        Zarr or OME-Zarr folder (versions 2 and 3) whose array is resized or was made at its full length, TIFF file
        that grows page by page, or an object in memory whose first axis grows, with ``shape``, ``dtype`` and slices.

    Returns
    -------
    GrowingMovie
        Ask it with ``poll`` how many frames there are, and ``read`` them.

    Raises
    ------
    RecordingError
        If it is not a movie of one plane and one channel, (time, y, x), in one of these formats.

    Examples
    --------
    >>> movie = open_growing("recording.zarr")  # doctest: +SKIP
    >>> movie.read(0, movie.poll())  # doctest: +SKIP
    """
    if not isinstance(source, str | Path):
        folder = getattr(getattr(source, "store", None), "root", None)
        if folder is not None and hasattr(source, "shards"):  # a zarr array that lies in a folder
            return GrowingMovie(_ZarrFrames(Path(folder), source.path))
        return GrowingMovie(_ArrayFrames(source))
    file = existing(source).absolute()
    if file.is_dir() and any((file / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
        return GrowingMovie(_ZarrFrames(file))
    if tiff_movie.is_movie(file) and file.is_file():
        return GrowingMovie(_TiffPages(file))
    raise RecordingError(
        f"{file.name}: expected a Zarr folder or a TIFF file that is being written, got something else. "
        "Let the acquisition write one of these; frames of other programs can be pushed to calvae.stream."
    )


class _ZarrFrames:
    """Frames of an array in a Zarr folder, opened anew at every poll."""

    def __init__(self, folder: Path, name: str = ""):
        self.path, self.name, self._array_name = folder, folder.name, name
        with readable(folder, _ZARR, _HINT):
            if name:
                self.frame_rate, at = stated_rate(zarr_movie.open_node(folder, name).attrs), 0
            else:
                place = zarr_movie.find(folder, growing=True)
                self._array_name, self.frame_rate, at = place.name, place.frame_rate, place.time
            self._array = zarr_movie.open_node(folder, self._array_name)  # a group may know an older length of it
        shape = self._array.shape
        _check(self.name, shape, self._array.dtype, at == 0 and math.prod(shape[1:-2]) == 1)
        self.image_shape, self.dtype = shape[-2:], np.dtype(self._array.dtype)
        self._opened_with = self._length = shape[0]
        self._passed = self._complete = 0

    def count(self) -> int:
        array = _patiently(self._again)
        n_frames, before = array.shape[0], self._length
        if n_frames < self._complete:
            raise _shrunk(self.name, self._complete, n_frames)
        self._array, self._length = array, n_frames
        block = (array.shards or array.chunks)[0]
        while self._passed * block < n_frames and self._is_passed(array, self._passed):
            self._passed += 1
        if self._passed * block < n_frames:
            found = (self._passed - (block > 1)) * block
        elif block == 1:
            found = n_frames
        elif n_frames > self._opened_with:
            found = min(n_frames, before)  # it was made longer first, then written to
        else:
            written = [file.stat().st_mtime for file in self._files(array, self._passed - 1) if file.exists()]
            settled = not written or time.time() - max(written) > _SETTLED
            found = n_frames if settled else (self._passed - 1) * block
        self._complete = max(self._complete, found)
        return self._complete

    def _again(self) -> Any:
        if not self.path.is_dir():
            raise _gone(self.name)
        with readable(self.path, _ZARR, _HINT):
            array = zarr_movie.open_node(self.path, self._array_name)
        if array.shape[1:] != self._array.shape[1:] or array.dtype != self._array.dtype:
            raise _changed(self.name, self.image_shape, self.dtype, array.shape[-2:], array.dtype)
        return array

    def _files(self, array: Any, block: int) -> Iterator[Path]:
        """Files of the chunks, or shards, that hold a block of frames."""
        sizes = array.shards or array.chunks
        grid = (range(-(-n // size)) for n, size in zip(array.shape[1:], sizes[1:], strict=True))
        home = self.path / self._array_name
        return (home / array.metadata.encode_chunk_key((block, *rest)) for rest in itertools.product(*grid))

    def _is_passed(self, array: Any, block: int) -> bool:
        if all(file.exists() for file in self._files(array, block)):
            return True
        n_blocks = -(-array.shape[0] // (array.shards or array.chunks)[0])
        later = range(block + 1, min(block + 1 + _AHEAD, n_blocks))
        return any(file.exists() for ahead in later for file in self._files(array, ahead))

    def read(self, start: int, stop: int) -> np.ndarray:
        if not self.path.is_dir():  # zarr would make up frames of zeros
            raise _gone(self.name)
        with readable(self.path, _ZARR):
            return np.asarray(self._array[start:stop]).reshape(-1, *self.image_shape)


class _TiffPages:
    """Pages of a TIFF file, found by following the links from each to the next one."""

    def __init__(self, file: Path):
        self.path, self.name = file, file.name
        with readable(file, _TIFF, _HINT), tifffile.TiffFile(file) as tiff:
            page = tiff.pages.first
            _check(self.name, (1, *page.shape), page.dtype, page.ndim == 2 and _one_channel(tiff))
            self.image_shape, self.dtype = page.shape, np.dtype(page.dtype).newbyteorder(tiff.byteorder)
            self.frame_rate = _rate_of(tiff)
            #: Whether the pixels of a page are as they are in memory, in one row, and may follow those of the page
            #: before without a link (ImageJ, and programs that write a movie as one block).
            self._plain = page.is_contiguous and page.compression == 1
            self._row = self._plain and page.dataoffsets[0] > page.offset
            self._order, self._big = tiff.byteorder, tiff.is_bigtiff
        self._n_bytes = math.prod(self.image_shape) * self.dtype.itemsize
        self._link = 8 if self._big else 4  # where the place of the next page is written
        self._pages: list[tuple[int, int]] = []  # of each page its description and its pixels
        self._known: set[int] = set()
        self._end = self._size = self._complete = 0

    def count(self) -> int:
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as handle:
                linked = self._follow(handle, size)
        except FileNotFoundError:
            raise _gone(self.name) from None
        except OSError as error:
            raise RecordingError(f"{self.name}: expected {_TIFF}, got one that cannot be read ({error}).") from error
        if size < self._end:
            raise _shrunk(self.name, self._complete, sum(at + self._n_bytes <= size for _, at in self._pages))
        found = len(self._pages)
        if self._row and found == 1 and not linked:
            there = (size - self._pages[0][1]) // self._n_bytes
            if there < self._complete:
                raise _shrunk(self.name, self._complete, there)
            # Up to where the file reached when it was last looked at: what ends it are links, not pixels.
            found = max((self._size - self._pages[0][1]) // self._n_bytes, 1)
        self._size = size
        self._complete = max(self._complete, found)
        return self._complete

    def _follow(self, handle: BinaryIO, size: int) -> bool:
        """Find the pages that are complete; tells whether there is a link to a further one."""
        while True:
            handle.seek(self._link)
            (place,) = self._unpack(handle.read(8 if self._big else 4), "Q" if self._big else "I") or (0,)
            if not place or place in self._known:
                return False
            page = self._page(handle, place)
            if page is None or page[1] > size:
                return True
            pixels, self._end, self._link = page
            self._pages.append((place, pixels))
            self._known.add(place)

    def _page(self, handle: BinaryIO, place: int) -> tuple[int, int, int] | None:
        """Where the pixels of a page begin and end, and where the link to the next page is; None if it is not whole."""
        head, entry = (8, 20) if self._big else (2, 12)
        (n_tags,) = self._unpack(_bytes(handle, place, head), "Q" if self._big else "H") or (0,)
        data = _bytes(handle, place + head, min(n_tags, 4096) * entry)
        if not n_tags or len(data) < n_tags * entry:
            return None
        tags = {}
        for k in range(n_tags):
            tag = data[k * entry : (k + 1) * entry]
            code, kind = struct.unpack(f"{self._order}HH", tag[:4])
            tags[code] = kind, tag[4:]
        size, at, lengths = (
            [self._values(handle, tags, code) for code in codes] for codes in ((257, 256), (273, 324), (279, 325))
        )
        starts, counts = next((v for v in at if v), ()), next((v for v in lengths if v), ())
        if not all(size) or not starts or len(starts) != len(counts) or not all(counts):
            return None
        shape = size[0][0], size[1][0]
        if shape != self.image_shape:
            raise _changed(self.name, self.image_shape, self.dtype, shape, self.dtype)
        end = max(start + count for start, count in zip(starts, counts, strict=True))
        return starts[0], end, place + head + n_tags * entry

    def _values(self, handle: BinaryIO, tags: dict[int, tuple[int, bytes]], code: int) -> tuple[int, ...]:
        """Whole numbers of a tag; none if it is absent, or not written yet."""
        kind, tag = tags.get(code, (0, b""))
        letter = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if letter is None:
            return ()
        (count,) = struct.unpack(self._order + ("Q" if self._big else "I"), tag[: 8 if self._big else 4])
        inline = tag[8 if self._big else 4 :]
        n_bytes = count * struct.calcsize(letter)
        if n_bytes > len(inline):
            (place,) = struct.unpack(self._order + ("Q" if self._big else "I"), inline)
            inline = _bytes(handle, place, n_bytes)
        return self._unpack(inline[:n_bytes], letter, count) or ()

    def _unpack(self, data: bytes, letter: str, count: int = 1) -> tuple[int, ...] | None:
        if len(data) < count * struct.calcsize(letter):
            return None
        return struct.unpack(f"{self._order}{count}{letter}", data)

    def read(self, start: int, stop: int) -> np.ndarray:
        with readable(self.path, _TIFF):
            frames = np.empty((stop - start, *self.image_shape), self.dtype)
            if not self._plain:
                with tifffile.TiffFile(self.path) as tiff:
                    for frame, (place, _) in zip(frames, self._pages[start:stop], strict=True):
                        tiff.filehandle.seek(place)
                        frame[...] = tifffile.TiffPage(tiff, 0).asarray()
                return frames
            with self.path.open("rb") as handle:
                for number, frame in enumerate(frames, start):
                    linked = number < len(self._pages)
                    handle.seek(self._pages[number][1] if linked else self._pages[0][1] + number * self._n_bytes)
                    data = handle.read(self._n_bytes)
                    frame[...] = np.frombuffer(data, self.dtype).reshape(self.image_shape)
        return frames


class _ArrayFrames:
    """Frames of an object in memory whose first axis grows."""

    name, path, frame_rate = "movie", None, None

    def __init__(self, array: Any):
        self._array, self._complete = array, 0
        shape = tuple(getattr(array, "shape", ()))
        dtype = np.dtype(getattr(array, "dtype", object))
        _check(self.name, shape, dtype, len(shape) == 3)
        self.image_shape, self.dtype = shape[-2:], dtype

    def count(self) -> int:
        shape, dtype = tuple(self._array.shape), np.dtype(self._array.dtype)
        if shape[1:] != self.image_shape or dtype != self.dtype:
            raise _changed(self.name, self.image_shape, self.dtype, shape[1:], dtype)
        if shape[0] < self._complete:
            raise _shrunk(self.name, self._complete, shape[0])
        self._complete = int(shape[0])
        return self._complete

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._array[start:stop])


def _patiently(look: Callable[[], Any]) -> Any:
    """Look again after a moment where something cannot be read: it may just be being written."""
    for _ in range(_TRIES - 1):
        try:
            return look()
        except RecordingError:
            time.sleep(_WAIT)
    return look()


def _rate_of(tiff: tifffile.TiffFile) -> float | None:
    """Frames per second (Hz) where the beginning of the file states it."""
    try:
        return tiff_movie.stated_rate(tiff)
    except (ValueError, LookupError, OSError, struct.error):  # of pages that are not written yet
        return None


def _one_channel(tiff: tifffile.TiffFile) -> bool:
    """Tell whether each page is a frame: ScanImage and OME may have planes and channels among them."""
    if tiff.is_scanimage:
        return len(tiff_movie.scanimage_axes(tiff, 1 << 20)[1]) == 1
    pixels = tiff_movie.ome_pixels(tiff)
    return int(pixels.get("SizeC", 1)) * int(pixels.get("SizeZ", 1)) == 1


def _bytes(handle: BinaryIO, place: int, n: int) -> bytes:
    """So many bytes from a place on; none if the file does not reach so far, as one that is damaged may claim."""
    if place + n > os.fstat(handle.fileno()).st_size:
        return b""
    handle.seek(place)
    return handle.read(n)


def _check(name: str, shape: tuple[int, ...], dtype: Any, is_movie: bool) -> None:
    whole = all(isinstance(n, int | np.integer) for n in shape)
    if not is_movie or not whole or len(shape) < 3 or np.dtype(dtype).kind not in "biuf" or 0 in shape[-2:]:
        raise RecordingError(
            f"{name}: expected frames (time, y, x) of real numbers, one plane and one channel, with time first, got "
            f"shape {shape} of dtype {dtype}. Write one plane or channel into a movie of its own."
        )


def _gone(name: str) -> RecordingError:
    return RecordingError(f"{name}: expected the movie that is being written, found nothing there any more.")


def _shrunk(name: str, before: int, now: int) -> RecordingError:
    return RecordingError(
        f"{name}: expected at least the {before} frames that were there, got {now}. If a new recording has begun under "
        "this name, open it again."
    )


def _changed(name: str, shape: tuple[int, ...], dtype: Any, now: tuple[int, ...], now_dtype: Any) -> RecordingError:
    return RecordingError(
        f"{name}: expected frames of {shape[0]} × {shape[1]} pixels ({dtype}) as before, got "
        f"{' × '.join(map(str, now))} ({now_dtype}). If a new recording has begun under this name, open it again."
    )
