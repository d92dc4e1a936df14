"""Cells that light up as they fire: the inferred rates painted into the ROIs, each frame when it is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask.array as da
import numpy as np
from scipy.ndimage import gaussian_filter1d

import napari_calvae as calvae

#: Rates are smoothed by this much (s): a flash of a single frame would be missed by the eye.
SIGMA = 0.1
#: Frames per chunk, and standard deviations that the smoothing reaches.
_CHUNK, _REACH = 8, 4


def paint(rows: Mapping[int, tuple[calvae.SpikeInference, int]], labels: np.ndarray) -> da.Array:
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
    # Pixels look up their ROI's rate; all others the first entry, which stays 0.
    ids = np.array(sorted(rows))
    place = np.searchsorted(ids, labels).clip(max=len(ids) - 1)
    entry = np.where(ids[place] == labels, place + 1, 0)

    def frames(block_info: Any = None) -> np.ndarray:
        start, stop = block_info[None]["array-location"][0]
        first = max(start - reach, 0)
        rates = np.zeros((1 + len(ids), min(stop + reach, n_frames) - first), np.float32)
        for k, roi in enumerate(ids.tolist()):
            result, row = rows[roi]
            rates[1 + k] = result.rate[row, first : first + rates.shape[1]]
        smooth = gaussian_filter1d(rates, sigma, axis=1, mode="nearest", truncate=_REACH)
        return smooth[:, start - first : stop - first].T[:, entry]

    whole, rest = divmod(n_frames, _CHUNK)
    chunks = ((_CHUNK,) * whole + ((rest,) if rest else ()), (labels.shape[0],), (labels.shape[1],))
    return da.map_blocks(frames, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32))


def brightest(rows: Mapping[int, tuple[calvae.SpikeInference, int]]) -> float:
    """Rate (spikes/s) to show as the brightest: most cells reach it when they fire most, and few exceed it."""
    peaks = []
    for result, row in rows.values():
        smooth = gaussian_filter1d(result.rate[row], SIGMA * result.frame_rate, truncate=_REACH)
        peaks.append(float(smooth.max()))
    return max(float(np.median(peaks)), 0.5)
