"""What napari offers in its menus besides widgets: the sample movie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import session

LayerData = tuple[Any, dict[str, Any], str]

_PACKAGE = Path(calvae.__file__).parent
_MOVIE, _ROIS, _SPIKES = "movie.tif", "rois.tif", "spikes.npz"


def sample_folder() -> Path:
    """Folder of the sample data: inside an installed package, beside the package in a checkout."""
    for folder in (_PACKAGE / "sample_data", _PACKAGE.parent / "sample_data"):
        if (folder / _MOVIE).is_file():
            return folder
    raise calvae.RecordingError(
        f"sample data: expected {_MOVIE} in {_PACKAGE / 'sample_data'}, got no such file. Install napari-calvae again."
    )


def open_sample() -> list[LayerData]:
    """Simulated movie with its ROIs as layers (File ▸ Open Sample)."""
    folder = sample_folder()
    movie, frame_rate = calvae.read_movie(folder / _MOVIE)
    layers = movie_layers(
        np.asarray(movie), calvae.read_labels(folder / _ROIS), session.typed_frame_rate(str(frame_rate))
    )
    for (_, options, _), name in zip(layers, (_MOVIE, _ROIS), strict=True):
        options.setdefault("metadata", {})["path"] = str(folder / name)  # for the script that repeats a result
    layers[1][1]["metadata"]["spike_times"] = dict(calvae.read_spikes(folder / _SPIKES))
    return layers


def movie_layers(movie: np.ndarray, labels: np.ndarray, frame_rate: float) -> list[LayerData]:
    """Layers of a movie, its time axis in seconds, and of its ROIs.

    Parameters
    ----------
    movie
        (time, y, x) array.
    labels
        (y, x) label image.
    frame_rate
        Frames per second (Hz).
    """
    every = max(len(movie) // 200, 1)
    low, high = np.percentile(movie[::every], (40, 99.95))
    image = {
        "name": "two-photon movie",
        "scale": (1 / frame_rate, 1, 1),
        "units": ("second", "pixel", "pixel"),
        "axis_labels": ("time", "y", "x"),
        "metadata": {"frame_rate": frame_rate},
        "contrast_limits": (float(low), float(high)),
        "interpolation2d": "linear",
    }
    from napari.utils.colormaps import DirectLabelColormap

    rois = {
        "name": session.ROI_LAYER,
        "opacity": 0.4,
        "axis_labels": ("y", "x"),
        "colormap": DirectLabelColormap(color_dict={None: "#8fb8de", 0: "transparent"}),
    }
    return [(movie, image, "image"), (labels.astype(np.int32), rois, "labels")]
