"""Spikes while a recording is going on, decided without Qt: what is read, what is kept, what is said of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers
from napari_calvae._napari.session import explain

logger = logging.getLogger(__name__)

MODEL = "live"
#: Frames between a frame and its rate that the model knows.
LAGS = (0, 1, 2, 4, 8)
#: Seconds that are shown, and the number of ROIs.
SPAN, MOST = 30.0, 6
#: Seconds of a recording under way that are read first: those by which traces are measured.
_BEFORE = 60.0
#: Bytes and frames that are read at a time where many have come.
_BLOCK_BYTES, _BLOCK_FRAMES = 16 << 20, 256
#: Wait (s) before one looks again whether something has come.
_PAUSE = 0.04
#: Seconds over which the frames that arrive are counted, and blocks over which the computing is averaged.
_COUNTED, _AVERAGED = 3.0, 30


@dataclass(frozen=True, eq=False)
class Order:
    """A recording that is going on: its ROIs are followed from now on, until ``finished`` is set."""

    number: int
    movie: calvae.GrowingMovie
    rois: calvae.RoiMasks
    frame_rate: float
    lag: int = 4
    neuropil_coefficient: float = 0.7
    model: Any = MODEL
    finished: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, eq=False)
class News:
    """What has come since the last message.

    Parameters
    ----------
    first
        Number of the first of the new frames in the recording.
    values
        (roi, time) their raw fluorescence, less neuropil.
    rates
        Of those frames that can be told now, some of them earlier ones.
    n_there
        Frames of the recording that are there.
    per_second
        Frames that arrive per second; NaN while that cannot be told.
    ms_per_frame
        Time (ms) of computing; NaN before the first.
    ended
        Whether this is the last message.
    """

    number: int
    first: int
    values: np.ndarray
    rates: calvae.LiveRates
    n_there: int
    per_second: float
    ms_per_frame: float
    ended: bool = False

    @property
    def n_frames(self) -> int:
        """Frames of the recording up to the newest that was read."""
        return self.first + self.values.shape[1]


def iter_live(order: Order) -> Iterator[News | answers.Failure]:
    """Follow a recording; to stop consuming is to cancel. A message comes often, also when there is nothing new.

    Errors come as a ``Failure``.
    """
    movie, pace = order.movie, _Pace()
    try:
        reader = calvae.FrameReader(order.rois, order.neuropil_coefficient)
        stream = calvae.stream(order.model, order.frame_rate, lag=order.lag)
        done = start = max(0, movie.poll() - math.ceil(_BEFORE * order.frame_rate))
        nothing = np.empty((len(order.rois), 0), np.float32)
        step = max(1, min(_BLOCK_FRAMES, _BLOCK_BYTES // (math.prod(movie.image_shape) * movie.dtype.itemsize)))
        last: int | None = None
        while True:
            if last is None and order.finished.is_set():
                time.sleep(_PAUSE)  # some formats tell of their newest frames at the second look
                last = movie.poll()
            there = movie.poll() if last is None else last
            pace.saw(there)
            stop = min(there, done + step)
            ended = last is not None and stop == done
            values, rates = nothing, calvae.LiveRates(0, nothing, order.frame_rate)
            if stop > done:
                images = movie.read(done, stop)
                began = time.perf_counter()
                values = reader.read(images)
                rates = stream.push(values)
                pace.took(stop - done, time.perf_counter() - began)
            elif ended:
                rates = stream.finish()
            rates = replace(rates, first=rates.first + start)
            yield News(order.number, done, values, rates, there, pace.per_second, pace.ms_per_frame, ended)
            if ended:
                return
            if stop == there:
                time.sleep(_PAUSE)
            done = stop
    except Exception as error:
        logger.info("live recording %d failed", order.number, exc_info=True)
        yield answers.Failure(order.number, explain(error))


class _Pace:
    """How fast frames come, and how fast they are done with."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._took: deque[tuple[int, float]] = deque(maxlen=_AVERAGED)

    def saw(self, there: int) -> None:
        """So many frames are there now."""
        now = time.monotonic()
        self._seen.append((now, there))
        while now - self._seen[0][0] > _COUNTED:
            self._seen.popleft()

    def took(self, n_frames: int, seconds: float) -> None:
        """So long did it take to compute these frames."""
        if n_frames:
            self._took.append((n_frames, seconds))

    @property
    def per_second(self) -> float:
        """Frames that arrive per second."""
        (then, before), (now, there) = self._seen[0], self._seen[-1]
        return (there - before) / (now - then) if now - then > 0.5 else math.nan

    @property
    def ms_per_frame(self) -> float:
        """Milliseconds of computing per frame."""
        n_frames = sum(n for n, _ in self._took)
        return 1e3 * sum(seconds for _, seconds in self._took) / n_frames if n_frames else math.nan


class Recent:
    """Fluorescence and rates of all ROIs in the last half minute."""

    def __init__(self, roi_ids: Sequence[int], frame_rate: float, lag: int, span: float = SPAN):
        self.roi_ids, self.frame_rate, self.lag, self.span = tuple(roi_ids), frame_rate, lag, span
        self.n_frames, self.has_rates = 0, False
        self._length = max(math.ceil(span * frame_rate), 2)
        # Rings: frame k is in column k modulo their length.
        self._values, self._rates = (np.full((len(roi_ids), self._length), np.nan, np.float32) for _ in range(2))
        self._begin = 0

    def add(self, news: News) -> None:
        """Keep what has come."""
        if not self.n_frames:
            self._begin = news.first
        self.n_frames = news.n_frames
        new = news.values[:, -self._length :]
        columns = np.arange(self.n_frames - new.shape[1], self.n_frames) % self._length
        self._values[:, columns], self._rates[:, columns] = new, np.nan
        frames = news.rates.frames
        shown = frames >= self.n_frames - self._length
        if shown.any():
            self.has_rates = True
            self._rates[:, frames[shown] % self._length] = news.rates.rate[:, shown]

    def window(self, rois: Sequence[int]) -> Window | None:
        """What is kept of these ROIs; None before there is anything."""
        first = max(self._begin, self.n_frames - self._length)
        if first >= self.n_frames or not rois:
            return None
        columns = np.arange(first, self.n_frames) % self._length
        rows = [self.roi_ids.index(roi) for roi in rois]
        traces = calvae.Traces(
            self._values[rows][:, columns], self.frame_rate, "raw", tuple(rois), first / self.frame_rate
        )
        return Window(traces, self._rates[rows][:, columns], self.span)


@dataclass(frozen=True, eq=False)
class Window:
    """What is drawn: raw fluorescence of some ROIs, and their rates (roi, time) in spikes/s, NaN where unknown yet."""

    traces: calvae.Traces
    rates: np.ndarray
    span: float

    @property
    def seconds(self) -> tuple[float, float]:
        """Beginning and end of the stretch of time that is shown (s)."""
        begin, end = self.traces.t0, self.traces.t0 + self.traces.duration
        return (begin, begin + self.span) if end < begin + self.span else (end - self.span, end)


def shown_rois(ids: Sequence[int], picked: int | None, pinned: Iterable[int], most: int = MOST) -> tuple[int, ...]:
    """ROIs that are drawn: the picked one, the pinned ones, then the first of the others."""
    wanted = dict.fromkeys([picked, *pinned, *ids])
    return tuple(roi for roi in wanted if roi in set(ids))[:most]  # type: ignore[misc]


def told(news: News, recent: Recent) -> str:
    """Line of numbers about a recording that is going on."""
    rate, behind = recent.frame_rate, news.n_there - news.n_frames
    parts = [f"{news.n_frames:,} frames", f"{news.n_frames / rate:,.1f} s"]
    if math.isfinite(news.per_second):
        parts.append(f"{news.per_second:.1f} frames/s arriving")
    if math.isfinite(news.ms_per_frame):
        parts.append(f"{news.ms_per_frame:.2g} ms per frame")
    parts.append(f"lag {1e3 * recent.lag / rate:.0f} ms")
    if behind > rate:
        parts.append(f"{behind:,} frames behind")
    if not recent.has_rates:
        parts.append("rates begin after 5 s")
    return " · ".join(parts)


class _LayerFrames:
    """Whatever data a layer has at the moment: its owner may replace them by longer ones."""

    def __init__(self, layer: Any):
        self._layer = layer

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._layer.data.shape)

    @property
    def dtype(self) -> Any:
        return self._layer.data.dtype

    def __getitem__(self, key: Any) -> Any:
        return self._layer.data[key]


def movie_of(layer: Any) -> calvae.GrowingMovie:
    """What a movie layer shows, as it grows: the file that it came from, or else the layer's own data."""
    if layer.multiscale:
        raise calvae.RecordingError(
            f"{layer.name}: expected a movie that grows, got one in several resolutions. Use a copy in full resolution."
        )
    data = layer.data
    if isinstance(data, calvae.FramesSoFar):
        return data.movie
    path = layer.source.path
    if path is not None and Path(path).suffix.lower() in (".zarr", ".tif", ".tiff"):
        try:
            movie = calvae.open_growing(path)
        except (calvae.RecordingError, OSError):  # napari has read it, so it is the layer's data that may grow
            logger.info("%s cannot be followed", path, exc_info=True)
        else:
            if movie.image_shape == tuple(data.shape[1:]):
                return movie
    try:
        return calvae.open_growing(data if hasattr(data, "store") else _LayerFrames(layer))
    except calvae.RecordingError as error:
        raise calvae.RecordingError(str(error).replace("movie:", f"{layer.name}:", 1)) from None
