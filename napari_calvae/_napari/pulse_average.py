"""What a pulse does to the cell that it is pointed at, on average: fluorescence, artefact, response, spikes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import responses

#: Seconds that are shown before and after the beginning of a pulse.
BEFORE, AFTER = 0.5, 1.5


@dataclass(frozen=True, eq=False)
class Average:
    """Means over the pulses on one cell, (lag,) each.

    Parameters
    ----------
    n_pulses
        How many pulses, all with the whole stretch of time around them in the recording.
    seconds
        Since the beginning of the pulse.
    trace, artefact, rest, response
        ΔF/F, what of it the light adds, what it is without that, and what the spikes make of that.
    rate, low, high
        Spikes/s: posterior mean and 90 % credible interval.
    duration
        Of a pulse (s).
    """

    n_pulses: int
    seconds: np.ndarray
    trace: np.ndarray
    artefact: np.ndarray
    rest: np.ndarray
    response: np.ndarray
    rate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    duration: float


def average(result: calvae.AllOpticalInference, row: int) -> Average | None:
    """Average over the pulses on the cell in this row; None if there are none."""
    traces, shown = result.spikes.traces, responses.picture(result, row)
    fs = traces.frame_rate
    on = responses.reaching_of(result, row)
    first = np.floor((result.stimulation.onset[on] - traces.t0) * fs + 0.5).astype(int)
    lags = np.arange(-round(BEFORE * fs), round(AFTER * fs) + 1)
    first = first[(first + lags[0] >= 0) & (first + lags[-1] < traces.n_frames)]
    if not len(first):
        return None
    frames = first[:, None] + lags
    known = traces.valid[row][frames]
    n_known = np.maximum(known.sum(0), 1)
    trace, artefact, rest, response = (
        np.where(known, values[frames], 0).sum(0) / n_known
        for values in (traces.values[row], shown.artefact, shown.rest, shown.response)
    )
    counts = result.spikes.samples([row])[:, 0].astype(np.float32)
    rates = counts[:, frames].mean(1) * fs
    tail = (1 - responses.LEVEL) / 2
    low, high = np.quantile(rates, [tail, 1 - tail], axis=0)
    duration = float(np.mean(result.stimulation.duration[on]))
    return Average(len(first), lags / fs, trace, artefact, rest, response, rates.mean(0), low, high, duration)
