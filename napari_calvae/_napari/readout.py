"""What the pointer tells: numbers of the posterior at a moment, computed without Qt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari.drawing import Columns


@dataclass(frozen=True)
class Moment:
    """The frames under the pointer, one or as many as share a column of pixels.

    ``start`` and ``stop`` (s); mean ``dff`` and ``reconstruction`` (ΔF/F), NaN where missing; ``probability`` of at
    least one spike; ``expected`` spikes, and their range in 90 % of the samples; ``agreement``, the share of samples
    that have the most frequent number.
    """

    start: float
    stop: float
    dff: float
    reconstruction: float
    probability: float
    expected: float
    low: float
    high: float
    agreement: float

    @property
    def words(self) -> str:
        """One line for the user."""
        middle, length = (self.start + self.stop) / 2, self.stop - self.start
        dff = "missing" if np.isnan(self.dff) else f"{self.dff:.2f}"
        spikes = f"{self.low:g} to {self.high:g}" if self.high > self.low else f"{self.low:g}"
        return (
            f"{middle:.2f} s ({_milliseconds(length)}) · ΔF/F {dff}, explained {self.reconstruction:.2f} · "
            f"P(spike) {self.probability:.2f} · {self.expected:.2g} expected, {spikes} in 90 % · "
            f"{self.agreement:.0%} of samples agree"
        )


def at(picture: calvae.SpikeInference, columns: Columns, seconds: float) -> Moment | None:
    """The moment of the column at ``seconds``; None outside the columns.

    Parameters
    ----------
    picture
        Result of one ROI.
    columns
        Of the plot, consecutive frames each.
    seconds
        Time (s) under the pointer.
    """
    column = int(np.searchsorted(columns.boundaries, seconds, side="right")) - 1
    if not 0 <= column < len(columns.edges) - 1:
        return None
    first, stop = int(columns.edges[column]), int(columns.edges[column + 1])
    events = picture.events[(picture.events["frame"] >= first) & (picture.events["frame"] < stop)]
    totals = np.bincount(events["sample"], events["count"], max(picture.n_samples, 1)).astype(np.int64)
    low, high = np.quantile(totals, [0.05, 0.95], method="inverted_cdf")
    dff = picture.traces.values[0, first:stop]
    return Moment(
        start=float(columns.boundaries[column]),
        stop=float(columns.boundaries[column + 1]),
        dff=float(dff[np.isfinite(dff)].mean()) if np.isfinite(dff).any() else np.nan,
        reconstruction=float(picture.reconstruction[0, first:stop].mean()),
        probability=float((totals > 0).mean()),
        expected=float(picture.rate[0, first:stop].sum() / picture.frame_rate),
        low=float(low),
        high=float(high),
        agreement=float(np.bincount(totals).max() / len(totals)),
    )


def log_likelihood(picture: calvae.SpikeInference, columns: Columns) -> float:
    """Mean log-density (nats per frame) of the measured frames in view under the reconstruction and its spread.

    A Gaussian in each frame, of the standard deviation that is expected around the reconstruction; NaN if no frame was
    measured. Between two cells only its differences to other explanations of the same frames mean something.
    """
    part = slice(columns.first, columns.last)
    dff, mean, sd = (
        np.asarray(x[0, part], float)
        for x in (picture.traces.values, picture.reconstruction, picture.reconstruction_std)
    )
    measured = np.isfinite(dff) & (sd > 0)
    if not measured.any():
        return np.nan
    z = (dff[measured] - mean[measured]) / sd[measured]
    return float(np.mean(-0.5 * z**2 - np.log(sd[measured]) - 0.5 * np.log(2 * np.pi)))


def shown(picture: calvae.SpikeInference) -> str:
    """What is said of a ROI that is shown."""
    return (
        f"ROI {picture.roi_ids[0]}: {picture.n_samples} samples of its spikes. A click in the plots moves the slider."
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
