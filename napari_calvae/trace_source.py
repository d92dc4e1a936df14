"""Traces that are too many for memory: they stay in their file until some of their rows are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from napari_calvae.recording import RecordingError, Traces, Unit, check_frame_rate, check_kind, check_t0
from napari_calvae.roi_masks import RoiMasks, whole_ids


@dataclass(frozen=True, eq=False)
class TraceSource:
    """Fluorescence of some ROIs over time that is read row by row; what it tells of itself is as in ``Traces``.

    Parameters
    ----------
    fetch
        Gives the (row, time) values of the rows whose (row,) int64 indices, which increase, it is called with. Other
        processes get it, too, so it must survive pickling: a ``functools.partial`` of a function and a path does, an
        open file does not.
    n_rois, n_frames
        Shape of the whole.
    frame_rate, unit, roi_ids, t0, provenance, rois, accepted
        As in ``Traces``.
    chunk_rows
        How many neighbouring rows the file keeps together; to read fewer at a time is to read them several times.

    Raises
    ------
    RecordingError
        If there are no ROIs or frames, ids are doubled, or a frame rate is missing.
    """

    fetch: Callable[[np.ndarray], np.ndarray]
    n_rois: int
    n_frames: int
    frame_rate: float
    unit: Unit = "dff"
    roi_ids: tuple[int, ...] = ()
    t0: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rois: RoiMasks | None = None
    accepted: np.ndarray | None = None
    chunk_rows: int = 1

    def __post_init__(self) -> None:
        ids = whole_ids(self.roi_ids, self.n_rois)
        object.__setattr__(self, "roi_ids", ids)
        object.__setattr__(self, "t0", check_t0(self.t0))
        object.__setattr__(self, "provenance", dict(self.provenance))
        object.__setattr__(self, "frame_rate", check_frame_rate(self.frame_rate))
        if min(self.n_rois, self.n_frames) < 1 or not len(ids) == len(set(ids)) == self.n_rois:
            raise RecordingError(
                f"traces: expected at least one ROI and one frame and an id for every ROI, got {self.n_rois} ROIs, "
                f"{self.n_frames} frames, {len(set(ids))} different ids."
            )
        if self.unit not in ("raw", "dff"):
            raise RecordingError(f"unit: expected 'raw' or 'dff', got {self.unit!r}.")
        if self.accepted is not None and np.shape(self.accepted) != (self.n_rois,):
            raise RecordingError(
                f"accepted: expected one value per ROI, {self.n_rois}, got shape {np.shape(self.accepted)}."
            )

    @classmethod
    def of(cls, traces: Traces) -> TraceSource:
        """Wrap traces that are in memory."""
        check_kind(traces)
        names = ("frame_rate", "unit", "roi_ids", "t0", "provenance", "rois", "accepted")
        return cls(traces.values.__getitem__, *traces.values.shape, **{name: getattr(traces, name) for name in names})

    @property
    def duration(self) -> float:
        """Length of the recording (s)."""
        return self.n_frames / self.frame_rate

    def select(self, rois: Sequence[int] | slice | np.ndarray) -> Traces:
        """Rows ``rois`` (indices, not ids, in rising order) as traces in memory."""
        index = np.arange(self.n_rois)[rois]
        return Traces(
            self.fetch(index),
            self.frame_rate,
            self.unit,
            tuple(self.roi_ids[i] for i in index),
            self.t0,
            provenance=self.provenance,
            rois=self.rois and self.rois.select(index),
            accepted=None if self.accepted is None else np.asarray(self.accepted, bool)[index],
        )

    def part(self, rows: slice) -> TraceSource:
        """Neighbouring rows as a source of their own, which is small to send elsewhere unless it is in memory."""
        first, last, step = rows.indices(self.n_rois)
        if step != 1:
            raise RecordingError(f"traces: expected neighbouring rows, got every {step}th. Take them by select.")
        if isinstance(getattr(self.fetch, "__self__", None), np.ndarray):
            return TraceSource.of(self.select(rows))
        index = range(first, last)
        return replace(
            self,
            fetch=partial(_shifted, self.fetch, first),
            n_rois=len(index),
            roi_ids=self.roi_ids[first:last],
            rois=self.rois and self.rois.select(index),
            accepted=None if self.accepted is None else np.asarray(self.accepted, bool)[first:last],
        )

    def load(self) -> Traces:
        """All of it as traces in memory."""
        return self.select(slice(None))


def _shifted(fetch: Callable[[np.ndarray], np.ndarray], first: int, rows: np.ndarray) -> np.ndarray:
    return fetch(rows + first)
