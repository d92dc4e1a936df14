"""From one ROI's posterior to what fits on the screen: a few numbers per pixel column, computed without Qt.

Whatever the length of the recording, a curve becomes at most two points per column, the raster one image column per
column, and the credible band one step per window of time that is a few columns wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

import napari_calvae as calvae

#: Windows of the credible band (s) from which the one is chosen that fits the zoom.
WINDOWS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
#: The band's windows are at least this many frames long and this many pixels wide.
LEAST_FRAMES, LEAST_PIXELS = 3, 4


@dataclass(frozen=True)
class Columns:
    """Consecutive frames gathered into the columns of a plot: column i holds the frames edges[i] to edges[i + 1]."""

    edges: np.ndarray
    frame_rate: float
    t0: float = 0.0

    @property
    def first(self) -> int:
        """First frame."""
        return int(self.edges[0])

    @property
    def last(self) -> int:
        """One past the last frame."""
        return int(self.edges[-1])

    @property
    def boundaries(self) -> np.ndarray:
        """(column + 1,) boundaries of the columns (s); frame k reaches from k − ½ to k + ½."""
        return self.t0 + (self.edges - 0.5) / self.frame_rate

    @property
    def centres(self) -> np.ndarray:
        """(column,) middles of the columns (s)."""
        return (self.boundaries[1:] + self.boundaries[:-1]) / 2


@dataclass(frozen=True)
class Band:
    """Mean and credible interval of the spike rate (spikes/s) in windows of time; NaN-free, one step per window."""

    boundaries: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    window: float


def columns(traces: calvae.Traces, seconds: tuple[float, float], width: int) -> Columns:
    """Columns for the visible stretch of ``seconds`` on ``width`` pixels: one per pixel, or one per frame."""
    rate = traces.frame_rate
    first = int(np.floor((seconds[0] - traces.t0) * rate)) - 1
    last = int(np.ceil((seconds[1] - traces.t0) * rate)) + 2
    first, last = (int(np.clip(n, 0, traces.n_frames)) for n in (first, last))
    if last <= first:
        first, last = 0, traces.n_frames
    per_column = max(int(np.ceil((last - first) / max(width, 1))), 1)
    first -= first % per_column
    edges = np.append(np.arange(first, last, per_column), last)
    return Columns(edges, rate, traces.t0)


def extremes(values: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(column,) least and greatest value in each column; NaN only where all of a column is NaN."""
    part = values[columns.first : columns.last]
    starts = columns.edges[:-1] - columns.first
    if len(starts) == len(part):
        return part, part
    return np.fmin.reduceat(part, starts), np.fmax.reduceat(part, starts)


def curve(values: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Points (s, value) of a curve that looks like that of all frames: each column's extremes, in their order."""
    low, high = extremes(values, columns)
    if low is high:
        return columns.centres, low
    falling = np.zeros(len(low), bool)
    falling[1:] = low[:-1] < low[1:]
    falling = ~falling
    y = np.stack([np.where(falling, high, low), np.where(falling, low, high)], axis=1)
    return np.repeat(columns.centres, 2), y.ravel()


def raster(events: np.ndarray, n_samples: int, columns: Columns) -> np.ndarray:
    """(sample, column) uint8 brightness of the posterior raster: 0 no spike, from 80 one spike to 255 the busiest."""
    start, stop = columns.first, columns.last
    shown = events[(events["frame"] >= start) & (events["frame"] < stop)]
    n_columns = len(columns.edges) - 1
    per_column = int(columns.edges[1] - columns.edges[0])
    column = (shown["frame"].astype(np.int64) - start) // per_column
    index = shown["sample"].astype(np.int64) * n_columns + column
    counts = np.bincount(index, shown["count"], n_samples * n_columns).reshape(n_samples, n_columns)
    busiest = max(float(np.percentile(counts[counts > 0], 98)) if len(shown) else 1.0, 1.0)
    level = np.sqrt(np.clip((counts - 1) / max(busiest - 1, 1.0), 0, 1))
    return np.where(counts > 0, 95 + 160 * level, 0).astype(np.uint8)


def band_window(seconds: float, width: int, frame_rate: float) -> float:
    """Length (s) of the band's windows: a few pixels on the screen, a few frames, a whole number of frames."""
    least = max(LEAST_FRAMES / frame_rate, LEAST_PIXELS * seconds / max(width, 1))
    window = next((w for w in WINDOWS if w >= least * (1 - 1e-9)), least)
    return max(round(window * frame_rate), 1) / frame_rate


def band(picture: calvae.SpikeInference, columns: Columns, window: float, level: float = 0.9) -> Band | None:
    """Rate and its central credible interval where the columns are; None if the recording is shorter than a window."""
    frames = round(window * picture.frame_rate)
    first = columns.first - columns.first % frames
    last = min(-(-columns.last // frames) * frames, picture.traces.n_frames)
    last -= (last - first) % frames
    if last - first < frames or picture.n_samples < 2:
        return None
    part = stretch(picture, first, last)
    low, high = part.interval(level, window)[:, 0] / window
    mean = part.rate[0].reshape(-1, frames).mean(axis=1)
    boundaries = picture.traces.t0 + (np.arange(first, last + 1, frames) - 0.5) / picture.frame_rate
    return Band(boundaries, mean, low, high, window)


def stretch(picture: calvae.SpikeInference, first: int, last: int) -> calvae.SpikeInference:
    """Frames ``first`` to ``last`` (exclusive) of a result as a result of its own."""
    inside = (picture.events["frame"] >= first) & (picture.events["frame"] < last)
    events = picture.events[inside]
    events["frame"] -= first
    traces = picture.traces
    return replace(
        picture,
        traces=traces.replace(
            values=traces.values[:, first:last],
            valid=traces.valid[:, first:last],
            t0=traces.t0 + first / traces.frame_rate,
        ),
        rate=picture.rate[:, first:last],
        events=events,
        reconstruction=picture.reconstruction[:, first:last],
        reconstruction_std=picture.reconstruction_std[:, first:last],
    )


def steps(boundaries: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of a step curve that keeps ``values[i]`` from boundary i to i + 1."""
    return np.repeat(boundaries, 2)[1:-1], np.repeat(values, 2)


def limits(values: Sequence[np.ndarray], pad: float = 0.06) -> tuple[float, float]:
    """Least and greatest of all finite values, with a margin."""
    finite = [v[np.isfinite(v)] for v in values]
    finite = [v for v in finite if len(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(float(v.min()) for v in finite), max(float(v.max()) for v in finite)
    margin = pad * (high - low) or 0.5
    return low - margin, high + margin


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines (point, yx) of a (y, x) mask through the middles of its pixels' outer sides."""
    padded = np.pad(mask.astype(bool), 1)
    follow: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Corner (y, x) is the upper left one of pixel (y, x); sides run clockwise around the pixels inside.
    for (dy, dx), (y0, x0), (y1, x1) in (
        ((-1, 0), (0, 0), (0, 1)),
        ((0, 1), (0, 1), (1, 1)),
        ((1, 0), (1, 1), (1, 0)),
        ((0, -1), (1, 0), (0, 0)),
    ):
        border = padded & ~np.roll(padded, (-dy, -dx), axis=(0, 1))
        for y, x in np.argwhere(border).tolist():
            follow.setdefault((y + y0, x + x0), []).append((y + y1, x + x1))
    loops = []
    while follow:
        corner = next(iter(follow))
        loop = [corner]
        while corner in follow:
            targets = follow[corner]
            following = targets.pop()
            if not targets:
                del follow[corner]
            corner = following
            loop.append(corner)
        points = np.array(loop, float) - 1.5
        loops.append((points[1:] + points[:-1]) / 2)
    return loops
