"""Movies of all formats and label images, opened without being loaded.

A movie format has ``MOVIE_PATTERNS`` (names), ``is_movie(path)`` and ``open_movie(path)``, which gives a (time, y, x)
array and the frame rate. That comes from where a file states it and else is None: it is asked for, never guessed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats import bruker, hdf5_movie, nwb, tiff, video, zarr_movie
from napari_calvae.formats._files import existing, readable
from napari_calvae.formats._lazy import MOST_PIXELS, MappedMovie
from napari_calvae.formats.tiff import write_movie
from napari_calvae.recording import RecordingError

__all__ = ["is_movie", "read_labels", "read_movie", "write_movie"]

_FORMATS = (tiff, bruker, hdf5_movie, zarr_movie, video)
_PATTERNS = [*tiff.MOVIE_PATTERNS, "*.npy", *bruker.MOVIE_PATTERNS, *hdf5_movie.MOVIE_PATTERNS]
_PATTERNS += [*zarr_movie.MOVIE_PATTERNS, "*.nwb", *video.MOVIE_PATTERNS]


def is_movie(path: str | Path, with_rois: bool = False) -> bool:
    """Tell whether a file or folder is, by name and content, a movie rather than a table of traces.

    An NWB file that has both is taken for its traces, unless there are ROIs to go ``with`` it.
    """
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return file.exists() and _open_npy(file).ndim > 2
    if suffix == ".nwb":
        return with_rois or hdf5_movie.is_nwb_movie(file)
    return any(module.is_movie(file) for module in _FORMATS)


def read_movie(path: str | Path) -> tuple[Any, float | None]:
    """Open a movie.

    Parameters
    ----------
    path
        TIFF file (ImageJ, OME, ScanImage), folder or ``.xml`` of a Bruker series, HDF5, NWB or AVI file, Zarr or
        OME-Zarr folder, ``.npy``.

    Returns
    -------
    movie : array
        (time, y, x) array that is memory-mapped, or a dask array whose chunks are read when they are asked for; other
        processes can get either at no cost. Channels and planes come as further axes between time and y.
    frame_rate : float or None
        Frames, or volumes, per second (Hz) if the file states it.

    Raises
    ------
    RecordingError
        If there is no movie, more than one, or one that cannot be read.
    """
    file = existing(path)
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return _open_npy(file), None
    if suffix == ".nwb":
        with readable(file, "an NWB file with a movie (TwoPhotonSeries)"):
            return nwb.open_movie(file)
    for module in _FORMATS:
        if module.is_movie(file):
            return module.open_movie(file)
    for module in _FORMATS:  # by name: what is wrong with it is for the format to say
        if suffix in {pattern[1:] for pattern in module.MOVIE_PATTERNS}:
            return module.open_movie(file)
    raise RecordingError(
        f"{file.name}: expected a movie in one of the formats {', '.join(_PATTERNS)}, got something else. Convert it."
    )


def read_labels(path: str | Path) -> np.ndarray:
    """Read a (y, x) label image from ``.tif`` or ``.npy``: 0 is background, each ROI has one number.

    Raises
    ------
    RecordingError
        If there are several images, or more pixels than any microscope takes; neither is loaded to find that out.
    """
    movie, _ = read_movie(path)
    if len(movie.shape) < 2 or math.prod(movie.shape[:-2]) != 1 or math.prod(movie.shape) > MOST_PIXELS:
        raise RecordingError(
            f"{Path(path).name}: expected one label image (y, x) of at most {MOST_PIXELS:,} pixels, got the shape "
            f"{movie.shape}. Give the image that holds the ROIs, not the movie."
        )
    labels = np.asarray(movie).reshape(movie.shape[-2:])
    if labels.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # of what no integer is, and is told by it
            whole = labels.astype(np.int64)
        return whole if np.array_equal(whole, labels) else labels
    return labels


def _open_npy(file: Path) -> np.ndarray:
    with readable(file, "a NumPy file of plain numbers", "Save the array itself with numpy.save."):
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.memmap):  # an archive under another name
            raise RecordingError(f"{file.name}: expected one NumPy array, got an archive. Give it the ending .npz.")
        order = "C" if found.flags.c_contiguous else "F"
        return MappedMovie(file, found.dtype, "r", found.offset, found.shape, order)  # type: ignore[call-overload]
