"""Traces of ROIs from a movie that may be larger than memory, with neuropil from a ring around each ROI."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage, sparse

from napari_calvae.recording import RecordingError, RoiMasks, Traces, check_frame_rate

#: Neuropil ring: pixels left free around the ROI, the least number of pixels that it grows to, and the number below
#: which a ring is not used at all.
RING_GAP, RING_PIXELS, RING_LEAST = 2.0, 350, 20
#: Bytes of a movie that are read at a time, and of the part of it that should stay in a core's cache.
READ_BYTES, CACHE_BYTES = 32 << 20, 1 << 20
#: Up to this many ROIs are read one by one from their bounding boxes; more of them share one sparse product.
FEW_ROIS = 8


def extract(
    movie: Any,
    rois: RoiMasks | ArrayLike,
    frame_rate: float,
    *,
    neuropil_coefficient: float = 0.7,
    t0: float = 0.0,
    wanted: Sequence[int] | None = None,
) -> Traces:
    """Raw traces of ``rois``; the whole of ``iter_extract`` at once, with the same arguments.

    Examples
    --------
    >>> traces = extract(movie, labels, frame_rate=30.0)  # doctest: +SKIP
    """
    steps = iter_extract(movie, rois, frame_rate, neuropil_coefficient=neuropil_coefficient, t0=t0, wanted=wanted)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def iter_extract(
    movie: Any,
    rois: RoiMasks | ArrayLike,
    frame_rate: float,
    *,
    neuropil_coefficient: float = 0.7,
    t0: float = 0.0,
    wanted: Sequence[int] | None = None,
) -> Generator[float, None, Traces]:
    """Read the traces of ``rois`` from a movie, block of frames by block of frames.

    The neuropil signal N is the mean of a ring around the ROI that avoids all other ROIs. Its *changes* are subtracted,
    F − r · (N − median N), so that the baseline of F stays what it was: positive, and the right one to divide by,
    whereas F − r · N would make ΔF/F larger by an unknown factor.

    Parameters
    ----------
    movie
        (time, y, x) numpy, memory-mapped, dask, zarr or h5py array of real numbers; never loaded as a whole. A frame
        with NaN inside a ROI is missing for that ROI.
    rois
        ROIs, or a (y, x) label image with 0 as background.
    frame_rate
        Frames per second (Hz).
    neuropil_coefficient
        The share r of the ring's signal that is taken to be in the ROI; 0 turns the correction off.
    t0
        Time of the centre of the first frame (s).
    wanted
        Ids of the ROIs to read, by default all; the neuropil rings avoid the others all the same.

    Yields
    ------
    float
        Fraction of the movie that has been read; to stop asking is to cancel.

    Returns
    -------
    Traces
        Raw fluorescence, one row per ROI.
    """
    rate = check_frame_rate(frame_rate)
    if not 0 <= neuropil_coefficient <= 2:
        raise RecordingError(
            f"neuropil_coefficient: expected a number from 0 (off) to 2, usually 0.7, got {neuropil_coefficient!r}."
        )
    every = check_movie(movie, rois, rate)
    masks = every if wanted is None else _select(every, wanted)
    rings = _rings(masks, every) if neuropil_coefficient else tuple(np.empty(0, np.int64) for _ in masks.ids)
    reader = _Reader(masks, rings)
    n_frames = movie.shape[0]
    means = np.empty((n_frames, 2 * len(masks)), np.float32)
    for start, stop in _blocks(movie, reader.box):
        reader.read(np.asarray(movie[(slice(start, stop), *reader.box)]), means[start:stop])
        yield stop / n_frames
    inside, around = means[:, ::2].T, means[:, 1::2].T
    without = [roi for roi, ring in zip(masks.ids, rings, strict=True) if not len(ring)]
    values = np.ascontiguousarray(inside)
    for row, ring in enumerate(rings):
        measured = np.isfinite(around[row])
        if len(ring) and measured.any():
            values[row] -= neuropil_coefficient * (around[row] - np.median(around[row][measured]))
    steps = {
        "neuropil_coefficient": float(neuropil_coefficient),
        "ring_gap_px": RING_GAP,
        "rois_without_ring": without if neuropil_coefficient else [],
    }
    return Traces(values, rate, "raw", masks.ids, t0, provenance={"extraction": steps})


def check_movie(movie: Any, rois: RoiMasks | ArrayLike, frame_rate: float) -> RoiMasks:
    """Return the ROIs as masks if they and the movie fit each other, else raise a ``RecordingError``."""
    shape = tuple(getattr(movie, "shape", ()))
    if len(shape) != 3:
        raise RecordingError(
            f"movie: expected an array of three dimensions (time, y, x), got shape {shape}. "
            "Choose one plane and one channel, as in movie[:, 0]."
        )
    if np.dtype(movie.dtype).kind not in "fiub":
        raise RecordingError(f"movie: expected real numbers, got dtype {movie.dtype}. Convert it first.")
    if shape[0] < check_frame_rate(frame_rate):
        raise RecordingError(
            f"movie: expected at least one second, got {shape[0]} frames at {frame_rate:g} Hz. "
            f"Check that time is the first axis of the shape {shape} and that the frame rate is in Hz."
        )
    masks = rois if isinstance(rois, RoiMasks) else RoiMasks.from_labels(rois)
    if masks.shape != shape[1:]:
        raise RecordingError(
            f"ROIs: expected ROIs of {shape[1]} × {shape[2]} pixels like the movie, "
            f"got {masks.shape[0]} × {masks.shape[1]}. Crop or scale them in the same way as the movie."
        )
    return masks


def _select(masks: RoiMasks, wanted: Sequence[int]) -> RoiMasks:
    """Return the ROIs of these ids, in this order."""
    unknown = [roi for roi in wanted if roi not in masks.ids]
    if unknown or not len(wanted):
        raise RecordingError(f"wanted: expected ids among {masks.ids[:8]}…, got {tuple(unknown)}.")
    return masks.select([masks.ids.index(roi) for roi in wanted])


def ring_reach(n_pixels: ArrayLike) -> np.ndarray:
    """Distance (pixels) from a ROI of ``n_pixels`` that its ring may reach, and no further: four diameters or 20."""
    return np.maximum(4 * np.sqrt(4 / np.pi * np.asarray(n_pixels)), 20)


def _rings(masks: RoiMasks, every: RoiMasks) -> tuple[np.ndarray, ...]:
    """Per ROI the flat pixels of its neuropil ring: the nearest ones beyond a gap that none of all ROIs covers.

    A ring has three times the pixels of its ROI, at least ``RING_PIXELS``, unless it would have to reach further than
    four diameters of the ROI; it is empty if fewer than ``RING_LEAST`` are free.
    """
    height, width = masks.shape
    taken = np.zeros(masks.shape, bool)
    for pixels in every.pixels:
        taken.ravel()[pixels] = True
    rings = []
    for pixels in masks.pixels:
        y, x = np.divmod(pixels, width)
        reach = float(ring_reach(len(pixels)))
        margin = int(reach) + 1
        top, left = max(y.min() - margin, 0), max(x.min() - margin, 0)
        bottom, right = min(y.max() + margin + 1, height), min(x.max() + margin + 1, width)
        outside = np.ones((bottom - top, right - left), bool)
        outside[y - top, x - left] = False
        distance = ndimage.distance_transform_edt(outside)
        free = (distance > RING_GAP) & (distance <= reach) & ~taken[top:bottom, left:right]
        ys, xs = np.nonzero(free)
        wanted = max(RING_PIXELS, 3 * len(pixels))
        if len(ys) > wanted:
            limit = np.partition(distance[ys, xs], wanted - 1)[wanted - 1]
            near = distance[ys, xs] <= limit
            ys, xs = ys[near], xs[near]
        flat = (ys + top) * width + xs + left
        rings.append(flat if len(flat) >= RING_LEAST else flat[:0])
    return tuple(rings)


def _blocks(movie: Any, box: tuple[slice, slice]) -> Iterator[tuple[int, int]]:
    """Frame ranges of about ``READ_BYTES`` that end where the movie's chunks end."""
    n_frames = movie.shape[0]
    pixels = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
    wanted = max(READ_BYTES // (pixels * np.dtype(movie.dtype).itemsize), 1)
    chunks = getattr(movie, "chunks", None)
    if chunks is None:
        ends = np.arange(wanted, n_frames + wanted, wanted)
    elif isinstance(chunks[0], tuple):
        ends = np.cumsum(chunks[0])
    else:
        ends = np.arange(chunks[0], n_frames + chunks[0], chunks[0])
    start = 0
    for stop in np.minimum(ends, n_frames).tolist():
        if stop - start >= wanted or stop == n_frames:
            if stop > start:
                yield start, stop
            start = stop


@dataclass(frozen=True)
class _Box:
    """The pixels of one ROI and of its ring, in the coordinates of the movie's part that is read."""

    slices: tuple[slice, slice]
    weights: np.ndarray  # (pixel of the box, 2) float32: ROI and ring, columns sum to one


class _Reader:
    """Weighted means of ROIs and rings, ready to be taken from one block of frames after the other."""

    def __init__(self, masks: RoiMasks, rings: tuple[np.ndarray, ...]):
        width = masks.shape[1]
        every = np.concatenate([*masks.pixels, *rings])
        y, x = np.divmod(every, width)
        self.box = (slice(int(y.min()), int(y.max()) + 1), slice(int(x.min()), int(x.max()) + 1))
        top, left = self.box[0].start, self.box[1].start
        self.width = self.box[1].stop - left

        def local(pixels: np.ndarray) -> np.ndarray:
            return (pixels // width - top) * self.width + pixels % width - left

        self.columns = []
        for pixels, weights, ring in zip(masks.pixels, masks.weights, rings, strict=True):
            used = weights != 0
            self.columns.append((local(pixels[used]), weights[used] / weights.sum()))
            self.columns.append((local(ring), np.full(len(ring), 1 / max(len(ring), 1), np.float32)))
        if len(masks) <= FEW_ROIS:
            self.boxes = [self._box(*self.columns[i : i + 2]) for i in range(0, len(self.columns), 2)]
        else:
            self.boxes = []
            index = np.concatenate([pixels for pixels, _ in self.columns])
            self.used, column = np.unique(index, return_inverse=True)
            offsets = np.cumsum([0, *(len(pixels) for pixels, _ in self.columns)])
            data = np.concatenate([weights for _, weights in self.columns])
            self.matrix = sparse.csr_array((data, column, offsets), (len(self.columns), len(self.used)))

    def read(self, block: np.ndarray, out: np.ndarray) -> None:
        """Write the means of a (time, y, x) block into ``out`` (time, 2 · roi); NaN where pixels are missing."""
        if self.boxes:
            for i, box in enumerate(self.boxes):
                self._read_box(block[(slice(None), *box.slices)], box.weights, out[:, 2 * i : 2 * i + 2])
        else:
            flat = block.reshape(len(block), -1)
            step = max(CACHE_BYTES // (4 * len(self.used)), 16)
            for start in range(0, len(block), step):
                part = np.ascontiguousarray(flat[start : start + step, self.used].T, np.float32)
                out[start : start + step] = (self.matrix @ part).T
        if block.dtype.kind == "f":
            self._read_missing(block, out)
        for i, (pixels, _) in enumerate(self.columns):
            if not len(pixels):
                out[:, i] = np.nan

    def _box(self, roi: tuple[np.ndarray, np.ndarray], ring: tuple[np.ndarray, np.ndarray]) -> _Box:
        """Bounding box of a ROI and its ring, with one weight per pixel of the box for either."""
        y, x = np.divmod(np.concatenate([roi[0], ring[0]]), self.width)
        top, bottom, left, right = int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1
        weights = np.zeros((bottom - top, right - left, 2), np.float32)
        for i, (pixels, share) in enumerate((roi, ring)):
            weights[pixels // self.width - top, pixels % self.width - left, i] = share
        return _Box((slice(top, bottom), slice(left, right)), weights.reshape(-1, 2))

    @staticmethod
    def _read_box(block: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
        """Weighted sums over the (time, y, x) pixels of a box, in pieces that stay in the cache."""
        step = max(CACHE_BYTES // (4 * len(weights)), 1)
        piece = np.empty((min(step, len(block)), *block.shape[1:]), np.float32)
        for start in range(0, len(block), step):
            part = block[start : start + step]
            floats = piece[: len(part)]
            np.copyto(floats, part, casting="same_kind" if part.dtype.kind == "f" else "unsafe")
            out[start : start + step] = floats.reshape(len(part), -1) @ weights

    def _read_missing(self, block: np.ndarray, out: np.ndarray) -> None:
        """Redo the frames with missing pixels: a ROI needs all of its pixels, a ring those that are there."""
        for i, (pixels, weights) in enumerate(self.columns):
            rows = np.flatnonzero(~np.isfinite(out[:, i]))
            if not len(rows) or not len(pixels):
                continue
            values = block.reshape(len(block), -1)[np.ix_(rows, pixels)].astype(np.float32)
            known = np.isfinite(values)
            shares = np.where(known, weights, 0)
            total = shares.sum(axis=1)
            enough = total > 0 if i % 2 else known.all(axis=1)
            sums = np.where(known, values, 0) * shares
            out[rows, i] = np.where(enough, sums.sum(axis=1) / np.where(enough, total, 1), np.nan)
