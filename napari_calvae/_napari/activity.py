"""Cells that light up as they fire: the inferred rates painted into the ROIs, each frame when it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import dask.array as da
import numpy as np
from scipy.ndimage import gaussian_filter1d

import napari_calvae as calvae
from napari_calvae._napari.stored import FromStore

#: Rates are smoothed by this much (s): a flash of a single frame would be missed by the eye.
SIGMA = 0.1
#: Frames per chunk, and standard deviations that the smoothing reaches.
_CHUNK, _REACH = 8, 4


def paint(rows: Mapping[int, tuple[calvae.SpikeInference | FromStore, int]], labels: np.ndarray) -> da.Array:
    """(time, y, x) float32 rate (spikes/s) in every ROI that was inferred, 0 elsewhere; computed per frame on demand.

    Parameters
    ----------
    rows
        By ROI id a result and the row of the ROI in it, as `answers.Results` keeps them; all of one recording.
    labels
        (y, x) label image of the ROI ids.
    """
    any_row = next(iter(rows.values()))[0]
    n_frames, sigma = any_row.rate.shape[1], SIGMA * any_row.frame_rate
    reach = int(np.ceil(_REACH * sigma))
    ids = np.array(sorted(rows))

    def frames(start: int, stop: int) -> np.ndarray:
        first = max(start - reach, 0)
        rates = np.zeros((1 + len(ids), min(stop + reach, n_frames) - first), np.float32)
        for k, roi in enumerate(ids.tolist()):
            result, row = rows[roi]
            rates[1 + k] = result.rate[row, first : first + rates.shape[1]]
        smooth = gaussian_filter1d(rates, sigma, axis=1, mode="nearest", truncate=_REACH)
        return smooth[:, start - first : stop - first]

    return film(n_frames, entries(ids, labels), frames)


def entries(ids: np.ndarray, labels: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Which value each pixel shows: 1 + the row of its ROI, of ``ids`` in rising order; 0 where there is none."""
    place = np.searchsorted(ids, labels).clip(max=len(ids) - 1)
    row = place if rows is None else rows[place]
    return np.where(ids[place] == labels, row + 1, 0)


def film(n_frames: int, entry: np.ndarray, frames: Callable[[int, int], np.ndarray]) -> da.Array:
    """(time, …) float32 array of the pixels of ``entry``, whose values ``frames(start, stop)`` gives: (entry, time)."""

    def shown(block_info: Any = None) -> np.ndarray:
        start, stop = block_info[None]["array-location"][0]
        return np.take(np.ascontiguousarray(frames(start, stop).T), entry, axis=1)

    whole, rest = divmod(n_frames, _CHUNK)
    chunks = ((_CHUNK,) * whole + ((rest,) if rest else ()), *((n,) for n in entry.shape))
    return da.map_blocks(shown, chunks=chunks, dtype=np.float32, meta=np.empty((0,) * len(chunks), np.float32))


def brightest(rows: Mapping[int, tuple[calvae.SpikeInference | FromStore, int]]) -> float:
    """Rate (spikes/s) to show as the brightest: most cells reach it when they fire most, and few exceed it."""
    peaks = []
    for result, row in rows.values():
        smooth = gaussian_filter1d(result.rate[row], SIGMA * result.frame_rate, truncate=_REACH)
        peaks.append(float(smooth.max()))
    return max(float(np.median(peaks)), 0.5)
