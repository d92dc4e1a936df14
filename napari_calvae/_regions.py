"""Where ROIs are and what their traces depend on: marks that tell an edited ROI, and the cell nearest to a click."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from napari_calvae._extraction import ring_reach
from napari_calvae.recording import RecordingError
from napari_calvae.roi_masks import RoiMasks

#: Of a window around a click: half its size in diameters, and the frames that are looked at.
_WINDOW, _FRAMES = 1.5, 300
#: Width of the smoothing that makes a correlated cell one hill, in diameters.
_SMOOTH = 0.25


def roi_marks(rois: RoiMasks, neuropil: bool = True) -> dict[int, int]:
    """One number per ROI, by id, that stays the same as long as its trace does, whatever happens to other ROIs.

    It depends on the pixels of the ROI and their weights; with ``neuropil`` also on which pixels are free around it, as
    far as its neuropil ring may reach. Two ROIs of 64-bit marks are mistaken for each other once in 10¹⁹ edits.
    """
    height, width = rois.shape
    draws = _draws(height * width)
    every, weights = np.concatenate(rois.pixels), np.concatenate(rois.weights)
    lengths = np.array([len(pixels) for pixels in rois.pixels])
    starts = np.cumsum(lengths) - lengths
    marks = np.add.reduceat(draws[every] * weights.view(np.uint32).astype(np.uint64), starts)
    if neuropil:
        y, x = np.divmod(every, width)
        margin = ring_reach(lengths).astype(np.int64) + 1
        top = np.maximum(np.minimum.reduceat(y, starts) - margin, 0)
        bottom = np.minimum(np.maximum.reduceat(y, starts) + margin + 1, height)
        left = np.maximum(np.minimum.reduceat(x, starts) - margin, 0)
        right = np.minimum(np.maximum.reduceat(x, starts) + margin + 1, width)
        # Sums over any box from four corners of a table; they wrap around, which is no loss to a mark.
        taken = np.zeros(height * width, np.uint64)
        taken[every] = draws[every]
        table = np.zeros((height + 1, width + 1), np.uint64)
        np.cumsum(np.cumsum(taken.reshape(height, width), axis=0), axis=1, out=table[1:, 1:])
        around = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
        marks ^= around * np.uint64(0xD6E8FEB86659FD93)
    return dict(zip(rois.ids, marks.tolist(), strict=True))


def local_correlation(frames: np.ndarray) -> np.ndarray:
    """(y, x) mean correlation over time of each pixel with its neighbours, up to eight, in (time, y, x) ``frames``.

    Pixels that do not change are correlated with nothing; missing values (NaN) count as the pixel's mean.
    """
    values = np.asarray(frames, np.float32)
    known = np.isfinite(values)
    count = known.sum(axis=0)
    mean = np.sum(values, axis=0, where=known) / np.maximum(count, 1)
    values = np.where(known, values - mean, 0)
    std = np.sqrt((values**2).mean(axis=0))
    values = np.divide(values, std, out=np.zeros_like(values), where=std > 1e-6 * np.maximum(np.abs(mean), 1e-6))
    kernel = np.ones((1, 3, 3), np.float32)
    kernel[0, 1, 1] = 0
    total = ndimage.convolve(values, kernel, mode="constant")
    neighbours = ndimage.convolve(np.ones(values.shape[1:], np.float32), kernel[0], mode="constant")
    return (values * total).mean(axis=0) / np.maximum(neighbours, 1)


def correlation_peak(movie: Any, position: Sequence[float] | np.ndarray, diameter: float) -> tuple[float, float]:
    """Centre (y, x) of the cell at or next to ``position``: the peak uphill from there in the local correlation image.

    Parameters
    ----------
    movie
        (time, y, x) array; at most a few hundred evenly spaced frames of a window around the position are read.
    position
        (y, x) in pixels.
    diameter
        Of the cells that are looked for (pixels); the peak is no further away than that.

    Returns
    -------
    tuple of float
        The peak, or ``position`` itself where that is the peak.
    """
    if not diameter > 0:
        raise RecordingError(f"diameter: expected a positive number of pixels, got {diameter}.")
    shape = tuple(getattr(movie, "shape", ()))
    if len(shape) != 3 or 0 in shape:
        raise RecordingError(
            f"movie: expected an array of three dimensions (time, y, x), got shape {shape}. "
            "Choose one plane and one channel, as in movie[:, 0]."
        )
    start = np.asarray(position, float)[-2:]
    if start.shape != (2,) or not np.isfinite(start).all():
        raise RecordingError(f"positions: expected finite y and x of a click (pixels), got {position}.")
    size = np.array(shape[1:])
    diameter = min(diameter, 2.0 * max(shape[1:]))  # of which the window is all of the image
    reach = max(_WINDOW * diameter, 3.0)
    low = np.clip(np.floor(start - reach), 0, size - 1).astype(int)
    high = np.clip(np.ceil(start + reach) + 1, low + 1, size).astype(int)
    step = -(-movie.shape[0] // _FRAMES)
    window = np.asarray(movie[::step, low[0] : high[0], low[1] : high[1]])
    image = ndimage.gaussian_filter(local_correlation(window), _SMOOTH * diameter, mode="nearest")
    here = np.clip(np.round(start), low, high - 1).astype(int) - low
    first = here
    while True:
        corner = np.maximum(here - 1, 0)
        near = image[corner[0] : here[0] + 2, corner[1] : here[1] + 2]
        best = corner + np.unravel_index(int(near.argmax()), near.shape)
        if image[tuple(best)] <= image[tuple(here)] or np.hypot(*(best + low - start)) > diameter:
            break
        here = best
    place = start if np.array_equal(here, first) else (here + low).astype(float)
    return float(place[0]), float(place[1])


@functools.lru_cache(maxsize=4)
def _draws(n: int) -> np.ndarray:
    """(n,) uint64 that look random and are always the same: the counter through the finaliser of splitmix64."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    z.flags.writeable = False
    return z
