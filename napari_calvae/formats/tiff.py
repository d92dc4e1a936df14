"""Movies and label images: TIFF files, compressed or not, and ``.npy``; opened without being loaded.

A frame rate is taken from where a file states it (ImageJ's frame interval, OME's time increment, ScanImage's frame
rate) and else is None: it is asked for, never guessed. ImageJ's ``fps`` is the speed of playback and says nothing about
time.
"""

from __future__ import annotations

import re
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from napari_calvae.formats._files import check_output, existing, whole_files
from napari_calvae.recording import RecordingError

PATTERNS = ("*.tif", "*.tiff")

#: Bytes of a compressed movie that are decoded at a time.
CHUNK_BYTES = 16 << 20
#: What tifffile and the codecs raise for files that are cut short, damaged or of another kind.
_DAMAGE = (tifffile.TiffFileError, ValueError, IndexError, KeyError, struct.error, zlib.error)
_SECONDS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "us": 1e-6, "µs": 1e-6}
_SECONDS |= {"min": 60.0, "minutes": 60.0, "h": 3600.0, "hours": 3600.0}


def is_movie(path: str | Path) -> bool:
    """Tell whether a file's name and content are those of a movie rather than of a table of traces."""
    file = Path(path)
    if file.suffix.lower() == ".npy" and file.exists():
        return _open_npy(file).ndim > 2
    return file.suffix.lower() in (".tif", ".tiff")


def read_movie(path: str | Path) -> tuple[Any, float | None]:
    """Open a movie.

    Returns
    -------
    movie : array
        (time, y, x) memory-mapped array, or a dask array where frames are compressed; nothing is loaded yet. Files
        with more or fewer dimensions come as they are.
    frame_rate : float or None
        Frames per second (Hz) if the file states it.
    """
    file = existing(path)
    if file.suffix.lower() == ".npy":
        return _open_npy(file), None
    if file.suffix.lower() not in (".tif", ".tiff"):
        raise RecordingError(f"{file.name}: expected a movie in one of the formats *.tif, *.tiff, *.npy. Convert it.")
    try:
        pages = _Pages(file)
        if pages.mapped:
            return tifffile.memmap(file, series=0, mode="r"), pages.frame_rate
        import dask.array as da

        pages[0:1]  # a file that cannot be decoded says so now
        step = max(CHUNK_BYTES // (pages.dtype.itemsize * pages.shape[1] * pages.shape[2]), 1)
        stack = da.from_array(pages, chunks=(step, -1, -1), asarray=False, name=False)
        movie = stack if pages.full_shape == pages.shape else stack.reshape(pages.full_shape)
    except RecordingError:
        raise
    except _DAMAGE as error:
        raise RecordingError(
            f"{file.name}: expected a TIFF movie, got one that cannot be read ({error}). "
            "Save it again, for example with Fiji."
        ) from error
    return movie, pages.frame_rate


def read_labels(path: str | Path) -> np.ndarray:
    """Read a (y, x) label image from ``.tif`` or ``.npy``: 0 is background, each ROI has one number."""
    movie, _ = read_movie(path)
    labels = np.asarray(movie)
    if labels.ndim > 2 and labels.size == labels.shape[-1] * labels.shape[-2]:
        labels = labels.reshape(labels.shape[-2:])
    if labels.dtype.kind == "f" and np.array_equal(labels, np.round(labels)):
        labels = labels.astype(np.int64)
    return labels


def write_movie(movie: np.ndarray, path: str | Path, frame_rate: float | None, overwrite: bool = False) -> Path:
    """Write a (time, y, x) movie or a (y, x) image as a compressed TIFF that ImageJ can read."""
    target = check_output(path, overwrite)
    clock = {"finterval": 1 / frame_rate, "tunit": "s"} if frame_rate else {}
    with whole_files(target) as (temporary,):
        tifffile.imwrite(
            temporary,
            movie,
            imagej=True,
            compression="zlib",
            compressionargs={"level": 9},
            metadata={"axes": "TYX"[-movie.ndim :], **clock},
        )
    return target


def _open_npy(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RecordingError(
            f"{file.name}: expected a NumPy file of plain numbers, got one that cannot be read ({error})."
        ) from error


class _Pages:
    """The pages of a TIFF file as a (page, y, x) array that decodes what is asked for."""

    ndim = 3

    def __init__(self, file: Path):
        self.file = file
        self.lock = threading.Lock()  # one file handle has one position, whoever asks
        # Where its pages are is known from here on; the file itself is only open while it is read.
        with tifffile.TiffFile(file) as self.tiff:
            series = self.tiff.series[0]
            self.frame_rate = _frame_rate(self.tiff)
            self.full_shape, self.dtype = series.shape, np.dtype(series.dtype)
            self.mapped = series.dataoffset is not None
            page = series.keyframe.shape
            self.shape = (len(series.pages), *page[:2])
        if not self.mapped and (len(page) != 2 or np.prod(self.shape) != np.prod(self.full_shape)):
            raise RecordingError(
                f"{file.name}: expected one grey image per frame, got pages of shape {page} in a series of shape "
                f"{self.full_shape}. Convert it to a grey-scale stack."
            )

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return _Pages, (self.file,)

    def __getitem__(self, key: Any) -> np.ndarray:
        frames, *rest = key if isinstance(key, tuple) else (key,)
        pages = np.arange(self.shape[0])[frames]
        wanted = np.atleast_1d(pages).tolist()
        with self.lock, self.tiff.filehandle as handle:
            handle.open()
            try:
                stack = self.tiff.asarray(key=wanted, series=0) if wanted else np.empty(0, self.dtype)
            except _DAMAGE as error:
                hint = "Install imagecodecs" if "imagecodecs" in str(error) else "Copy or save it again"
                raise RecordingError(
                    f"{self.file.name}: expected a TIFF movie of {self.shape[0]} frames, got one of which frames "
                    f"{wanted[0]} to {wanted[-1]} cannot be decoded ({error}). {hint}."
                ) from error
        stack = stack.reshape(len(wanted), *self.shape[1:])
        return stack[(slice(None) if pages.ndim else 0, *rest)]


def _frame_rate(tiff: tifffile.TiffFile) -> float | None:
    """Frames per second (Hz) where the file states it."""
    interval = _imagej_interval(tiff) or _ome_interval(tiff)
    if interval:
        return 1 / interval
    page = tiff.pages.first
    text = f"{page.software}\n{page.description}"
    found = re.search(
        r"(?:hRoiManager\.scanFrameRate|SI\d*\.scanFrameRate|state\.acq\.frameRate)\s*=\s*([\d.eE+-]+)", text
    )
    if found:
        averaged = re.search(r"hScan2D\.logAverageFactor\s*=\s*(\d+)", text)
        return _positive(float(found[1]) / max(int(averaged[1]) if averaged else 1, 1))
    shaped = (tiff.shaped_metadata or [{}])[0]
    return _positive(shaped.get("frame_rate") or shaped.get("fps"))


def _imagej_interval(tiff: tifffile.TiffFile) -> float | None:
    """Seconds per frame that ImageJ noted."""
    found = tiff.imagej_metadata or {}
    interval = _positive(found.get("finterval"))
    return interval and interval * _SECONDS.get(str(found.get("tunit", "s")).strip().lower(), 1.0)


def _ome_interval(tiff: tifffile.TiffFile) -> float | None:
    """Seconds per frame that OME metadata state."""
    if not tiff.is_ome or not tiff.ome_metadata:
        return None
    image = tifffile.xml2dict(tiff.ome_metadata).get("OME", {}).get("Image", {})
    pixels = (image[0] if isinstance(image, list) else image).get("Pixels", {})
    interval = _positive(pixels.get("TimeIncrement"))
    return interval and interval * _SECONDS.get(str(pixels.get("TimeIncrementUnit", "s")), 1.0)


def _positive(value: Any) -> float | None:
    """Return the value as a number above 0, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
