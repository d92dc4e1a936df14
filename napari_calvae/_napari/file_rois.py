"""ROIs whose traces are in a file: where each is drawn, which of them are still as they were, and their traces.

Neither Qt nor napari is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import activity
from napari_calvae.preprocess import usable

#: Under this name the metadata of a layer of ROIs holds the ``FileTraces`` that belong to them.
KEY = "calvae_traces"
#: Pixels of a ROI that weigh less than this share of its heaviest one are not drawn.
_FAINT = 0.2
#: Side and gap (pixels) of the squares that stand for ROIs of which no place is known.
_SIDE, _GAP = 12, 3
#: Traces of more values than this are not painted into the ROIs: they would fill the memory.
_MOST_PAINTED = 1 << 24
#: Frames that are looked at to find how bright a ROI becomes.
_SEEN = 1000
#: Names of the axes of movies of so many axes.
_AXES = {3: ("time", "y", "x"), 4: ("time", "plane", "y", "x"), 5: ("time", "plane", "channel", "y", "x")}


@dataclass(frozen=True, eq=False)
class FileTraces:
    """Traces in a file, and the ROIs as they were drawn when it was opened.

    Parameters
    ----------
    path
        The file or folder.
    source
        Its traces, of which the ids are those of ``labels``.
    rate
        Frames per second (Hz) if the file states it; the source then has it, too.
    labels
        (y, x) label image, or (z, y, x) where the ROIs lie in several planes.
    marks
        By ROI id the plane that it lies in and the mark of its pixels (`calvae.roi_marks`).
    placed
        Whether the file knows where its ROIs are; if not they are squares in a row.
    renumbered
        Whether the ids are not those in the file, which had none above 0.
    stored
        Results, if the file holds them.
    """

    path: Path
    source: calvae.TraceSource
    rate: float | None
    labels: np.ndarray
    marks: dict[int, tuple[int, int]]
    placed: bool = True
    renumbered: bool = False
    stored: calvae.StoredInference | None = None

    def __deepcopy__(self, _memo: Any) -> FileTraces:
        return self  # it does not change: copies of a layer share it

    @property
    def movie_shape(self) -> tuple[int, ...]:
        """Shape of the movie that these traces would be of: (time, y, x) or (time, z, y, x)."""
        return (self.source.n_frames, *self.labels.shape)

    def unedited(self, masks: calvae.RoiMasks, plane: int) -> set[int]:
        """Ids of those ROIs of a plane whose traces are in the file, since they are as they were."""
        now = calvae.roi_marks(masks, neuropil=False)
        return {roi for roi, mark in now.items() if self.marks.get(roi) == (plane, mark)}

    def with_rate(self, hz: float) -> calvae.TraceSource:
        """Traces at this frame rate (Hz)."""
        return self.source if hz == self.source.frame_rate else replace(self.source, frame_rate=hz)


@dataclass(frozen=True, eq=False)
class FileFrames:
    """What ROIs of a file have in place of a movie: their traces; and the movie (time, y, x) itself, if it is open.

    ``plane`` is the one that is looked at.
    """

    traces: FileTraces
    plane: int = 0
    movie: Any = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(time, y, x)."""
        n_frames, *_, height, width = self.traces.movie_shape
        return n_frames, height, width

    @property
    def ndim(self) -> int:
        """Three."""
        return 3

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if self.movie is None:
            raise calvae.RecordingError(
                f"ROIs of {self.traces.path.name}: expected the movie itself for this, got traces only. Open the movie "
                "as well, and choose it."
            )
        return self.movie[key]

    def missing(self, rois: Sequence[int]) -> calvae.RecordingError:
        """The sentence for ROIs that have no trace: they were drawn or edited, and there is no movie."""
        some = ", ".join(map(str, list(rois)[:5])) + (" …" if len(rois) > 5 else "")
        n_frames, *size = self.traces.movie_shape
        return calvae.RecordingError(
            f"ROI {some}: drawn or edited, so that {self.traces.path.name} has no trace of it, and there is no movie "
            f"to read it from. Undo the edit, or open the movie of {n_frames} frames, {' × '.join(map(str, size))}."
        )

    def split(self, masks: calvae.RoiMasks, wanted: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """Which of the wanted ROIs have their traces in the file, and which need the movie, that they must have."""
        known = self.traces.unedited(masks, self.plane)
        others = tuple(roi for roi in wanted if roi not in known)
        if others and self.movie is None:
            raise self.missing(others)
        return [roi for roi in wanted if roi in known], others

    def read(self, rois: Sequence[int], hz: float) -> calvae.Traces:
        """Traces of ROIs (ids) from the file."""
        source = self.traces.with_rate(hz)
        place = {roi: row for row, roi in enumerate(source.roi_ids)}
        return source.select(sorted(place[roi] for roi in rois))


def open_file(path: str | Path) -> FileTraces:
    """Open a file or folder of traces; where it does not state the frame rate, that is left to be asked for."""
    file = Path(path).absolute()
    try:
        source = calvae.open_traces(file)
        rate: float | None = source.frame_rate
    except calvae.RecordingError as error:
        try:
            source, rate = calvae.open_traces(file, frame_rate=1.0), None
        except calvae.RecordingError:
            raise error from None  # it is not for want of a frame rate
    renumbered = min(source.roi_ids) < 1
    if renumbered:
        ids = tuple(range(1, source.n_rois + 1))
        source = replace(source, roi_ids=ids, rois=source.rois and replace(source.rois, ids=ids))
    placed, stored = source.rois is not None, None if renumbered else _stored(file)
    labels = grid(source.roi_ids) if source.rois is None else draw(source.rois)
    return FileTraces(file, source, rate, labels, _marks(labels), placed, renumbered, stored)


def _stored(file: Path) -> calvae.StoredInference | None:
    if file.suffix.lower() != ".zarr":
        return None
    try:
        return calvae.open_result(file)
    except calvae.RecordingError:  # traces
        return None


def _marks(labels: np.ndarray) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for plane, image in enumerate(labels if labels.ndim == 3 else labels[None]):
        if image.any():
            marks = calvae.roi_marks(calvae.RoiMasks.from_labels(image), neuropil=False)
            found |= {roi: (plane, mark) for roi, mark in marks.items()}
    return found


def draw(rois: calvae.RoiMasks) -> np.ndarray:
    """(y, x) int32 label image, (z, y, x) for several planes; every ROI has at least a pixel.

    Faint pixels are left out; where ROIs overlap the smaller one is on top.
    """
    planes = np.asarray(rois.planes)
    image = np.zeros((planes.max() + 1, rois.shape[0] * rois.shape[1]), np.int32)
    for row in np.argsort([-len(pixels) for pixels in rois.pixels], kind="stable"):
        weights = rois.weights[row]
        image[planes[row], rois.pixels[row][weights > _FAINT * weights.max()]] = rois.ids[row]
    hidden = np.setdiff1d(rois.ids, image)
    for roi in hidden.tolist():  # under others: their heaviest pixel can be clicked all the same
        row = rois.ids.index(roi)
        image[planes[row], rois.pixels[row][rois.weights[row].argmax()]] = roi
    shape = rois.shape if len(image) == 1 else (len(image), *rois.shape)
    return image.reshape(shape)


def grid(ids: Sequence[int]) -> np.ndarray:
    """(y, x) int32 label image with a square for each id, row by row: these ROIs have no place that is known."""
    columns = math.ceil(math.sqrt(len(ids)))
    step = _SIDE + _GAP
    rows = -(-len(ids) // columns)
    image = np.zeros((rows * step + _GAP, columns * step + _GAP), np.int32)
    for place, roi in enumerate(ids):
        y, x = (_GAP + step * k for k in divmod(place, columns))
        image[y : y + _SIDE, x : x + _SIDE] = roi
    return image


def painted(given: FileTraces) -> da.Array | None:
    """Fluorescence painted into the ROIs, (time, y, x) or (time, z, y, x) float32; None where that is too much.

    0 is the median of a ROI's trace, 1 its brightest frames.
    """
    source = given.source
    if source.n_rois * source.n_frames > _MOST_PAINTED:
        return None
    values = np.asarray(source.fetch(np.arange(source.n_rois)), np.float32)
    some = np.nan_to_num(values[:, :: max(source.n_frames // _SEEN, 1)])
    low, high = np.percentile(some, (50, 99.8), axis=1, keepdims=True).astype(np.float32)
    shown = np.zeros((source.n_rois + 1, source.n_frames), np.float32)  # the first row is for pixels of no ROI
    np.subtract(values, low, out=shown[1:])
    shown[1:] /= np.maximum(high - low, 1e-6)
    shown[~(shown > 0)] = 0
    ids = np.array(source.roi_ids)
    order = np.argsort(ids)
    entry = activity.entries(ids[order], given.labels, order)
    return activity.film(source.n_frames, entry, partial(_frames, shown))


def _frames(shown: np.ndarray, start: int, stop: int) -> np.ndarray:
    return shown[:, start:stop]


def time_axis(rate: float | None, ndim: int) -> dict[str, Any]:
    """Scale, units and names of the axes of a movie's layer; time is in seconds where the frame rate (Hz) is known."""
    axes: dict[str, Any] = {"axis_labels": _AXES[ndim]} if ndim in _AXES else {}
    if rate is None:
        return axes
    return axes | {"scale": (1 / rate, *(1,) * (ndim - 1)), "units": ("second", *("pixel",) * (ndim - 1))}


def over_baseline(source: calvae.TraceSource, window: float, percentile: float) -> calvae.TraceSource:
    """ΔF/F of a source over a baseline of one's own, row by row when asked for."""
    if source.unit == "dff":
        return source
    return replace(source, fetch=partial(_fetch_dff, source, window, percentile), unit="dff")


def _fetch_dff(source: calvae.TraceSource, window: float, percentile: float, rows: np.ndarray) -> np.ndarray:
    dff = np.full((len(rows), source.n_frames), np.nan, np.float32)
    for place, row in enumerate(np.asarray(rows).tolist()):
        one = source.select([row])
        if usable(one, window, percentile).all():  # one of thousands must not stop all
            dff[place] = calvae.delta_f_over_f(one, window, percentile).values
    return dff
