"""TIFF movies, compressed or not: of ImageJ, OME (in several files, too), ScanImage; opened without being loaded.

A frame rate is taken from where a file states it (ImageJ's frame interval, OME's time increment, ScanImage's frame
rate) and else is None: it is asked for, never guessed. ImageJ's ``fps`` is the speed of playback and says nothing about
time.
"""

from __future__ import annotations

import math
import re
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from napari_calvae.formats._files import DAMAGE, check_output, readable, whole_files
from napari_calvae.formats._lazy import CHUNK_BYTES, MOST_PIXELS, SECONDS, MappedMovie, lazy, positive
from napari_calvae.recording import RecordingError

MOVIE_PATTERNS = ("*.tif", "*.tiff")

_KIND, _HINT = "a TIFF movie", "Save it again, for example with Fiji."


def is_movie(path: Path) -> bool:
    """Tell whether the name is that of a TIFF file."""
    return path.suffix.lower() in (".tif", ".tiff")


def open_movie(path: Path) -> tuple[Any, float | None]:
    """Open the movie: memory-mapped where its pixels lie in one row in the file, else as a dask array.

    Files with more or fewer than three dimensions come as they are; ScanImage's as (time, plane, channel, y, x), with
    planes or channels only where there are several.
    """
    with readable(path, _KIND, _HINT):
        pages = _Pages(path)
        if pages.mapped:
            return MappedMovie(path, pages.dtype, "r", pages.offset, pages.full_shape), pages.frame_rate
        pages[0:1]  # a file that cannot be decoded says so now
        stack = lazy(pages, (math.prod(pages.full_shape[1:-2]), *pages.shape[1:]), CHUNK_BYTES)
        return stack.reshape(pages.full_shape), pages.frame_rate


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


def _next_page(tiff: tifffile.TiffFile) -> int:
    """Where the page begins that the last one found names as the next: 0, but in files that are cut off.

    tifffile stops at a page that is not there or not whole, and says so in its log alone.
    """
    form, handle, last = tiff.tiff, tiff.filehandle, tiff.pages[-1].offset
    handle.seek(last)
    (n_tags,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    handle.seek(last + form.tagnosize + n_tags * form.tagsize)
    return int(struct.unpack(form.offsetformat, handle.read(form.offsetsize))[0])


class _Pages:
    """The pages of a TIFF file as a (page, y, x) array that decodes what is asked for."""

    ndim = 3

    def __init__(self, file: Path):
        self.file = file
        self.lock = threading.Lock()  # one file handle has one position, whoever asks
        # Where its pages are is known from here on; the file itself is only open while it is read.
        with tifffile.TiffFile(file) as self.tiff:
            following, size = _next_page(self.tiff), file.stat().st_size
            # Some programs name a next page for good, where they would have written it.
            if following and not (following == size and len(self.tiff.pages) > 1):
                raise RecordingError(
                    f"{file.name}: expected a whole TIFF movie, got a file that is cut off: after its first "
                    f"{len(self.tiff.pages)} images another one should follow. Copy it again; while it is still being "
                    "written, follow it live."
                )
            series = self.tiff.series[0]
            self.frame_rate = stated_rate(self.tiff)
            self.full_shape, self.dtype = series.shape, np.dtype(series.dtype)
            # Which pages there are, in which order.
            self.pages = np.arange(len(series.pages))
            page = series.keyframe.shape
            there, stated = len(series.keyframe.dataoffsets), math.prod(series.keyframe.chunked)
            if there < stated:
                raise RecordingError(
                    f"{file.name}: expected a TIFF movie, got one whose images should have {stated} pieces and have "
                    f"{there}. Copy it again."
                )
            if self.tiff.is_scanimage:
                self.pages, axes = scanimage_axes(self.tiff, len(self.pages))
                self.full_shape = (*axes, *page)
            elif "FileName" in (self.tiff.ome_metadata or "") and any(found is None for found in series.pages):
                raise RecordingError(
                    f"{file.name}: expected the other files of this OME-TIFF beside it, got some only. Copy them all."
                )
            whole = math.prod(self.full_shape) == math.prod(series.shape)
            self.offset, self.mapped = series.dataoffset or 0, series.dataoffset is not None and whole
            self.shape = (len(self.pages), *page[:2])
            if self.mapped:
                self.dtype = self.dtype.newbyteorder(self.tiff.byteorder)
                missing = self.offset + math.prod(self.full_shape) * self.dtype.itemsize - file.stat().st_size
                if missing > 0:
                    raise RecordingError(
                        f"{file.name}: expected a TIFF movie of the shape {self.full_shape}, got a file that is "
                        f"{missing} bytes too short. Copy it again."
                    )
        if not self.mapped and math.prod(page) > MOST_PIXELS:
            raise RecordingError(
                f"{file.name}: expected a TIFF movie with images of at most {MOST_PIXELS:,} pixels, got the shape "
                f"{page}. Copy it again; if that is what it holds, cut it into smaller images."
            )
        if not self.mapped and len(page) == 2 and math.prod(self.shape) < math.prod(self.full_shape):
            raise RecordingError(
                f"{file.name}: expected a TIFF movie of the shape {self.full_shape}, got a file that ends after "
                f"{self.shape[0]} images. Copy it again."
            )
        if len(page) != 2 or (not self.mapped and math.prod(self.shape) != math.prod(self.full_shape)):
            raise RecordingError(
                f"{file.name}: expected one grey image per frame, got pages of shape {page} in a series of shape "
                f"{self.full_shape}. Convert it to a grey-scale stack."
            )

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return _Pages, (self.file,)

    def __getitem__(self, key: Any) -> np.ndarray:
        frames, *rest = key if isinstance(key, tuple) else (key,)
        pages = np.arange(self.shape[0])[frames]
        wanted = self.pages[np.atleast_1d(pages)].tolist()
        with self.lock, readable(self.file, _KIND, _HINT), self.tiff.filehandle as handle:
            handle.open()
            other = handle
            try:
                # A single page that is in another file of the series is read from there, multiple ones open it.
                if len(wanted) == 1:
                    other = self.tiff.series[0].pages[wanted[0]].parent.filehandle
                if other is not handle:
                    other.open()
                stack = self.tiff.asarray(key=wanted, series=0) if wanted else np.empty(0, self.dtype)
            except DAMAGE as error:
                hint = "Install imagecodecs" if "imagecodecs" in str(error) else "Copy or save it again"
                raise RecordingError(
                    f"{self.file.name}: expected a TIFF movie of {self.shape[0]} frames, got one of which frames "
                    f"{wanted[0]} to {wanted[-1]} cannot be decoded ({error}). {hint}."
                ) from error
            finally:
                if other is not handle:
                    other.close()
        stack = stack.reshape(len(wanted), *self.shape[1:])
        return stack[(slice(None) if pages.ndim else 0, *rest)]


def stated_rate(tiff: tifffile.TiffFile) -> float | None:
    """Frames per second (Hz) where the file states it."""
    interval = _imagej_interval(tiff) or _ome_interval(tiff)
    if interval:
        return 1 / interval
    scan = _scanimage(tiff)
    rate = positive(scan.get("hRoiManager.scanFrameRate") or scan.get("scanFrameRate") or scan.get("acq.frameRate"))
    if rate:
        volumes = positive(scan.get("hRoiManager.scanVolumeRate"))
        if _n_planes(scan) > 1 and volumes:
            return volumes
        return rate / (positive(scan.get("hScan2D.logAverageFactor")) or 1)
    shaped = (tiff.shaped_metadata or [{}])[0]
    return positive(shaped.get("frame_rate") or shaped.get("fps"))


def _scanimage(tiff: tifffile.TiffFile) -> dict[str, str]:
    """What ScanImage noted, by name without the name of the program ("SI", "SI4", "state")."""
    page = tiff.pages.first
    text = f"{page.software}\n{page.description}"
    return dict(re.findall(r"^(?:scanimage\.)?(?:SI\d*|state)\.(\S+?)\s*=\s*(.*?)\s*$", text.replace("\r", "\n"), re.M))


def _number(scan: Mapping[str, str], *names: str) -> int:
    """First of some numbers that are noted, or 0."""
    return next((int(value) for name in names if (value := positive(scan.get(name)))), 0)


def _n_planes(scan: Mapping[str, str]) -> int:
    """Planes of a volume that is scanned again and again; a stack with several frames per plane is none."""
    enabled = any(scan.get(f"{part}.enable") in ("true", "1") for part in ("hStackManager", "hFastZ"))
    if not enabled or _number(scan, "hStackManager.framesPerSlice") > 1:
        return 1
    return max(
        _number(scan, "hStackManager.actualNumSlices", "hStackManager.numSlices", "hFastZ.numFramesPerVolume"), 1
    )


def scanimage_axes(tiff: tifffile.TiffFile, n_pages: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Pages of ScanImage in the order (time, plane, channel), and the lengths of these axes unless they are 1.

    Images that were taken while the focus returned, and an incomplete last volume, are left out.
    """
    scan = _scanimage(tiff)
    n_channels = max(len(re.findall(r"\d+", scan.get("hChannels.channelSave", "1"))), 1)
    n_planes = _n_planes(scan)
    flyback = scan.get("hFastZ.discardFlybackFrames") in ("true", "1")
    n_images = _number(scan, "hStackManager.numFramesPerVolumeWithFlyback") if n_planes > 1 else 1
    n_images = n_images or n_planes + (_number(scan, "hFastZ.numDiscardFlybackFrames") if flyback else 0)
    n_times = n_pages // (n_images * n_channels)
    pages = np.arange(n_times * n_images * n_channels).reshape(n_times, n_images, n_channels)[:, :n_planes]
    if not pages.size:
        raise RecordingError(
            f"{tiff.filename}: expected at least one volume of {n_images} images and {n_channels} channels, got "
            f"{n_pages} pages. The file is incomplete."
        )
    return pages.ravel(), (n_times, *(n for n in (n_planes, n_channels) if n > 1))


def _imagej_interval(tiff: tifffile.TiffFile) -> float | None:
    """Seconds per frame that ImageJ noted."""
    found = tiff.imagej_metadata or {}
    interval = positive(found.get("finterval"))
    return _seconds(interval, found.get("tunit", "s"))


def ome_pixels(tiff: tifffile.TiffFile) -> Mapping[str, Any]:
    """What OME metadata state about the first image; nothing if there are none."""
    if not tiff.is_ome or not tiff.ome_metadata:
        return {}
    image = tifffile.xml2dict(tiff.ome_metadata).get("OME", {}).get("Image", {})
    return (image[0] if isinstance(image, list) else image).get("Pixels", {})


def _ome_interval(tiff: tifffile.TiffFile) -> float | None:
    """Seconds per frame that OME metadata state."""
    pixels = ome_pixels(tiff)
    interval = positive(pixels.get("TimeIncrement"))
    return _seconds(interval, pixels.get("TimeIncrementUnit", "s"))


def _seconds(interval: float | None, unit: object) -> float | None:
    """An interval in seconds; None where its unit is not known."""
    factor = SECONDS.get(str(unit).strip().lower())
    return interval * factor if interval and factor else None
