"""When fluorescence follows a spike, data set by data set: the confound that no deconvolution can see.

And what training does about it: recordings are shown as if the clock of each were right, simulations are as late.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import uniform_filter1d
from scipy.stats import theilslopes

from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.generative import GenerativeModel, Theta

#: Lags (s) at which the response is estimated before and shortly after a spike; further ones grow by 15 % each.
_FIRST, _EVEN, _LAST = -0.2, 0.6, 6.0
#: Changes slower than this (s) are drift.
_DRIFT = 5.0
#: Weight of the curvature of the response, relative to the mean square of a regressor.
_SMOOTH = 0.02
#: Shares of the largest early response whose lags are reported.
_SHARES = (0.1, 0.5, 0.9)
#: Fewer data sets than these make no line.
_FEWEST = 5
#: Lags (s) between which responses are estimated at best; simulated ones are seen as bluntly.
_STEP = 0.025
#: Rate (Hz) at which a simulated response is looked at, and for how long before a spike (s).
_RESPONSE_RATE, _BEFORE = 200.0, 0.1


class DelayLine(NamedTuple):
    """Lag (s) at which a response to a spike is half risen, over the time (s) from 10 to 90 % of its rise."""

    slope: float
    intercept: float

    def half(self, rise: np.ndarray) -> np.ndarray:
        """Lag (s) at half of a rise that takes so long (s)."""
        return self.intercept + self.slope * rise


#: The line of the 22 data sets of Rupprecht et al. 2021 and 2025 (``calvae benchmark kernels``, Theil–Sen).
DELAY_LINE = DelayLine(0.626, -0.029)


def kernel_rows(sweeps: Sequence[Sweep]) -> Iterator[dict[str, Any]]:
    """Of each data set the lags (ms) at which the response to a spike reaches 10, 50 and 90 % of its largest.

    The response is estimated per cell by ridge regression of ΔF/F on its spikes through linear interpolation between
    lags 25 ms apart (50 ms where recorded below 40 Hz), scaled to its largest value, and the median taken over cells.
    Zero is the spike; a negative lag at 10 % is what interpolation and the length of a frame smear, or a clock that is
    off.
    """
    groups: dict[str, dict[str, list[Sweep]]] = defaultdict(lambda: defaultdict(list))
    for sweep in sweeps:
        groups[sweep.dataset][sweep.cell].append(sweep)
    for dataset, cells in groups.items():
        rate = float(np.median([s.frame_rate for own in cells.values() for s in own]))
        lags = _lags(_STEP if rate > 40 else 2 * _STEP)
        early = lags <= _EVEN + 1e-9
        found = [response(own, lags) for own in cells.values()]
        scaled = [r / r[early].max() for r in found if r[early].max() > 0]
        if not scaled:
            continue
        middle = np.median(scaled, 0)[early]
        middle = middle - np.median(middle[lags[early] < -0.1])
        row = {"data set": dataset, "cells": len(scaled), "recorded at (Hz)": rate}
        for share in _SHARES:
            row[f"{share:.0%} (ms)"] = 1000 * _crossing(lags[early], middle / middle.max(), share)
        yield row


def align_clocks(sweeps: Sequence[Sweep]) -> tuple[list[Sweep], DelayLine]:
    """Move the frames of each data set so that fluorescence follows spikes as late as in others that rise as fast.

    What rises slowly is also seen late: over the time from 10 to 90 % of the rise, the lags at half of it make a line
    (Theil–Sen, which a few odd ones do not bend). Where a data set lies beside it (16 ms in the median, up to 75),
    that is taken for its clock: a network that learned such lags could only guess them, by what a new recording
    resembles. The line is returned as well; fewer than five data sets are put on that of all 22 (``DELAY_LINE``).
    """
    rows = list(kernel_rows(sweeps))
    half = np.array([row["50% (ms)"] for row in rows]) / 1000
    rise = np.array([row["90% (ms)"] - row["10% (ms)"] for row in rows]) / 1000
    line = DELAY_LINE
    if len(rows) >= _FEWEST:
        found = theilslopes(half, rise)
        line = DelayLine(float(found.slope), float(found.intercept))
    late = dict(zip((row["data set"] for row in rows), half - line.half(rise), strict=True))
    return [replace(s, t0=s.t0 - late.get(s.dataset, 0.0)) for s in sweeps], line


def simulated_delays(model: GenerativeModel, theta: Theta, line: DelayLine = DELAY_LINE) -> np.ndarray:
    """(cell,) s by which fluorescence from a generative model has to come later to lie on the line of recordings.

    Without a delay, what rises fast would be later than recordings that rise as fast (15 ms), what rises slowly
    earlier (20 ms). The response to one spike is looked at, blurred by 25 ms as those of recordings are, whose lags lie
    so far apart. A cell without one is not moved.
    """
    before, n = round(_BEFORE * _RESPONSE_RATE), round((_BEFORE + _EVEN) * _RESPONSE_RATE)
    some = next(iter(theta.values()))
    counts = torch.zeros(len(some), n, dtype=some.dtype)
    counts[:, before] = 1
    with torch.no_grad():
        clean = model.fluorescence(counts, theta, _RESPONSE_RATE)
    blur = np.bartlett(2 * round(_STEP * _RESPONSE_RATE) + 1)
    rising = np.apply_along_axis(np.convolve, 1, (clean - clean[:, :1]).double().numpy(), blur, "valid")
    lags = (np.arange(rising.shape[1]) + len(blur) // 2 - before) / _RESPONSE_RATE
    peak = rising.max(1)
    scaled = rising / np.where(peak > 0, peak, 1)[:, None]
    first, half, last = np.array([[_crossing(lags, curve, share) for curve in scaled] for share in _SHARES])
    return np.where(peak > 0, line.half(last - first) - half, 0.0)


def response(sweeps: Sequence[Sweep], lags: np.ndarray) -> np.ndarray:
    """(lag,) ΔF/F that one spike makes, by ridge regression over all sweeps of a cell."""
    n = len(lags)
    gram, moment = np.zeros((n, n)), np.zeros(n)
    for sweep in sweeps:
        time = sweep.t0 + np.arange(len(sweep.dff)) / sweep.frame_rate
        measured = np.isfinite(sweep.dff)
        dff = np.where(measured, sweep.dff, np.nanmedian(sweep.dff)).astype(float)
        window = max(3, round(_DRIFT * sweep.frame_rate))
        design = _design(time, sweep.spike_times, lags)
        design -= uniform_filter1d(design, window, axis=0)
        dff -= uniform_filter1d(dff, window)
        gram += design[measured].T @ design[measured]
        moment += design[measured].T @ dff[measured]
    curvature = np.diff(np.eye(n), 2, axis=0)
    ridge = _SMOOTH * np.trace(gram) / n
    return np.linalg.solve(gram + ridge * (curvature.T @ curvature) + (1e-6 * ridge + 1e-12) * np.eye(n), moment)


def _lags(step: float) -> np.ndarray:
    even = np.arange(_FIRST, _EVEN + step / 2, step)
    growing = _EVEN + step * np.cumsum(1.15 ** np.arange(1, 60))
    return np.concatenate([even, growing[growing < _LAST]])


def _design(time: np.ndarray, spikes: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """(time, lag) weights of the response's values in each frame: linear between lags, summed over spikes."""
    out = np.zeros((len(time), len(lags)))
    for spike in spikes:
        frames = slice(*np.searchsorted(time, [spike + lags[0], spike + lags[-1]]))
        lag = time[frames] - spike
        right = np.clip(np.searchsorted(lags, lag), 1, len(lags) - 1)
        share = (lag - lags[right - 1]) / (lags[right] - lags[right - 1])
        rows = np.arange(frames.start, frames.stop)
        out[rows, right - 1] += 1 - share
        out[rows, right] += share
    return out


def _crossing(lags: np.ndarray, rising: np.ndarray, share: float) -> float:
    """Lag at which a curve first reaches ``share``, between two of its points."""
    k = int(np.argmax(rising >= share))
    if k == 0:
        return float(lags[0])
    return float(np.interp(share, rising[k - 1 : k + 1], lags[k - 1 : k + 1]))
