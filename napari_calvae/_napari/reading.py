"""Readers for napari: traces with their ROIs, results, and movies that napari does not read as well itself."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from napari.utils.colormaps import DirectLabelColormap

import napari_calvae as calvae
from napari_calvae._napari import file_rois, judging, picking, roi_layer
from napari_calvae._napari.contributions import LayerData
from napari_calvae.formats import suite2p

#: Names of movie files that are read here; napari shows others, such as TIFF, well.
MOVIE_PATTERNS = ("*.xml", "*.h5", "*.hdf5", "*.zarr", "*.nwb", "*.avi", "*.npy")
#: Colours of ROIs that a file says are cells or says nothing of, and of those that it says are none.
_CELL, _NO_CELL = "#8fb8de", roi_layer.VERDICTS[judging.REJECTED]
#: Frames that are looked at to find the contrast.
_LOOKED_AT = 5


def get_reader(path: Any) -> Callable[[Any], list[LayerData]] | None:
    """Return what reads this file or folder; None if it is none of ours."""
    if not isinstance(path, str) or not Path(path).exists():
        return None
    file = Path(path)
    ours = file.is_dir() or any(fnmatch(file.name.lower(), pattern) for pattern in MOVIE_PATTERNS)
    if ours and _says_yes(calvae.is_movie, file):
        return lambda _path: read_movie(file)
    return (lambda _path: read_traces(file)) if _says_yes(calvae.is_traces, file, damaged=True) else None


def _says_yes(question: Callable[[Path], bool], file: Path, damaged: bool = False) -> bool:
    """Ask whether a file is of some kind; ``damaged`` is the answer where that cannot be told any more."""
    try:
        return question(file)
    except calvae.RecordingError:
        return damaged
    except OSError:
        return False


def read_traces(file: Path) -> list[LayerData]:
    """Layers of the ROIs of a file of traces, and of their fluorescence over time if it is not too much.

    Below them is the mean image of a folder of suite2p, if it is there.
    """
    given = file_rois.open_file(file)
    source, name = given.source, _name(file)
    planes = ("plane",) * (given.labels.ndim - 2)
    colours: dict[int | None, Any] = {None: _CELL, 0: "transparent"}
    labels: dict[str, Any] = {
        "name": f"{name} ROIs" if given.placed else f"{name} ROIs, places unknown",
        "metadata": {file_rois.KEY: given},
        "opacity": 0.5,
        "axis_labels": (*planes, "y", "x"),
    }
    if source.accepted is not None:
        labels["features"] = roi_layer.judged_features(source.roi_ids, source.accepted.tolist())
        refused = np.flatnonzero(~source.accepted.astype(bool)).tolist()
        colours |= {source.roi_ids[row]: _NO_CELL for row in refused}
    labels["colormap"] = DirectLabelColormap(color_dict=colours)
    layers: list[LayerData] = [(given.labels, labels, "labels")]
    frames = file_rois.painted(given)
    if frames is not None:
        image = {
            "name": f"{name} fluorescence",
            "metadata": {picking.OWN: True},
            "colormap": "gray",
            "contrast_limits": (0.0, 1.0),
            **file_rois.time_axis(given.rate, frames.ndim),
        }
        layers.insert(0, (frames, image, "image"))
    mean = suite2p.read_mean_image(file) if given.placed and suite2p.matches(file) else None
    if mean is not None:
        if frames is not None:
            image["blending"] = "additive"  # so that the cells light up where they are in the mean image
        layers.insert(0, (mean, _mean_layer(mean, name), "image"))
    return layers


def _mean_layer(mean: np.ndarray, name: str) -> dict[str, Any]:
    """How a mean image (y, x) or (z, y, x) is shown; it is marked as our own, for it is no movie."""
    low, high = (float(value) for value in np.percentile(mean, (1, 99.7)))
    return {
        "name": f"{name} mean image",
        "metadata": {picking.OWN: True},
        "colormap": "gray",
        "contrast_limits": (low, high if high > low else low + 1),
        "axis_labels": (*("plane",) * (mean.ndim - 2), "y", "x"),
    }


def read_movie(file: Path) -> list[LayerData]:
    """Layer of a movie, which stays in its file until it is looked at."""
    return [movie_layer(*calvae.read_movie(file), file)]


def movie_layer(movie: Any, rate: float | None, file: Path) -> LayerData:
    """Layer of a movie that was opened from a file, and its frame rate (Hz)."""
    places = np.unique(np.linspace(0, len(movie) - 1, _LOOKED_AT).astype(int))
    seen = np.stack([np.asarray(movie[place]) for place in places])
    low, high = (float(value) for value in np.nanpercentile(seen, (1, 99.9)))
    image = {
        "name": _name(file),
        "metadata": {} if rate is None else {"frame_rate": rate},
        "contrast_limits": (low, high if high > low else low + 1),
        **file_rois.time_axis(rate, movie.ndim),
    }
    return movie, image, "image"


def _name(file: Path) -> str:
    """What a file is called among layers: ``plane0`` and ``suite2p`` say nothing."""
    part = file.parent if file.name == "F.npy" else file
    known = part.name if part.is_dir() and part.suffix != ".zarr" else part.stem
    return f"{part.parent.name} {known}" if known.startswith("plane") and known[5:].isdigit() else known
