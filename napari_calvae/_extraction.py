"""Traces of ROIs from a movie that may be larger than memory, with neuropil from a ring around each ROI."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage, sparse

from napari_calvae._reading import Piece, iter_blocks, pieces
from napari_calvae.recording import RecordingError, Traces, check_frame_rate, unmasked
from napari_calvae.roi_masks import RoiMasks

#: Neuropil ring: pixels left free around the ROI, the least number of pixels that it grows to, and the number below
#: which a ring is not used at all.
RING_GAP, RING_PIXELS, RING_LEAST = 2.0, 350, 20
#: Bytes of a movie that are read at a time, less than a chunk usually has (several would have to be copied into one),
#: and of the part of it that should stay in a core's cache.
READ_BYTES, CACHE_BYTES = 8 << 20, 1 << 20
#: Up to this many ROIs are read one by one from their bounding boxes; more of them share one sparse product.
FEW_ROIS = 8
#: Images of at least so many pixels are multiplied one by one, and by so many threads.
FRAME_PIXELS, N_WORKERS = 1 << 16, min(os.cpu_count() or 1, 4)


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
    _checked_coefficient(neuropil_coefficient)
    every = check_movie(movie, rois, rate)
    masks = every if wanted is None else _select(every, wanted)
    rings = _rings(masks, every) if neuropil_coefficient else tuple(np.empty(0, np.int64) for _ in masks.ids)
    means = _Means(masks, rings, movie.shape[0])
    parts = pieces(movie, means.box, READ_BYTES)
    with ThreadPoolExecutor(N_WORKERS) if len(masks) > FEW_ROIS else nullcontext() as workers:
        for done, (piece, block) in enumerate(iter_blocks(movie, parts), 1):
            means.add(piece, block, workers)
            yield done / len(parts)
    found = means.finish()
    inside, around = found[:, ::2].T, found[:, 1::2].T
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


class FrameReader:
    """Traces of frames as they come, for a recording that is still going on.

    The neuropil signal itself is subtracted, F − r · N, since its median is not known yet: up to a constant for each
    ROI this is what ``iter_extract`` reads.

    Parameters
    ----------
    rois
        ROIs, or a (y, x) label image with 0 as background.
    neuropil_coefficient
        The share r; 0 turns the correction off.
    """

    def __init__(self, rois: RoiMasks | ArrayLike, neuropil_coefficient: float = 0.7):
        self.masks = rois if isinstance(rois, RoiMasks) else RoiMasks.from_labels(rois)
        self._coefficient = _checked_coefficient(neuropil_coefficient)
        none = tuple(np.empty(0, np.int64) for _ in self.masks.ids)
        self._means = _Means(self.masks, _rings(self.masks, self.masks) if neuropil_coefficient else none, 0)

    def read(self, frames: ArrayLike) -> np.ndarray:
        """(roi, time) raw fluorescence of one (y, x) frame or several (time, y, x).

        Raises
        ------
        RecordingError
            If they are not images of the size of the ROIs.
        """
        images = unmasked(frames)
        images = images[None] if images.ndim == 2 else images
        if images.shape[1:] != self.masks.shape or images.dtype.kind not in "fiub":
            raise RecordingError(
                f"frames: expected images of real numbers, {self.masks.shape[0]} × {self.masks.shape[1]} pixels like "
                f"the ROIs, got shape {np.shape(frames)} of dtype {images.dtype}. Crop or scale them as the ROIs were."
            )
        found = self._means.read(images)
        inside, around = found[:, ::2].T, found[:, 1::2].T
        # Where a ring has no pixel that was measured the frame is missing, as in `iter_extract`.
        with_ring = (self._means.lengths[1::2] > 0)[:, None]
        return np.where(with_ring, inside - self._coefficient * around, inside)


def _checked_coefficient(neuropil_coefficient: float) -> float:
    if not 0 <= neuropil_coefficient <= 2:
        raise RecordingError(
            f"neuropil_coefficient: expected a number from 0 (off) to 2, usually 0.7, got {neuropil_coefficient!r}."
        )
    return float(neuropil_coefficient)


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


class _Means:
    """Weighted means of ROIs and rings over time, summed up from one piece of the movie after the other."""

    def __init__(self, masks: RoiMasks, rings: tuple[np.ndarray, ...], n_frames: int):
        self.width = masks.shape[1]
        # Twice as many columns as ROIs: a ROI, its ring, the next ROI …
        parts = list(itertools.chain.from_iterable(zip(masks.pixels, rings, strict=True)))
        self.lengths = np.array([len(pixels) for pixels in parts])
        self.y, self.x = np.divmod(np.concatenate(parts), self.width)
        self.column = np.repeat(np.arange(len(parts)), self.lengths)
        shares = (
            (weights / weights.sum(), np.full(len(ring), 1 / max(len(ring), 1), np.float32))
            for weights, ring in zip(masks.weights, rings, strict=True)
        )
        self.share = np.concatenate(list(itertools.chain.from_iterable(shares)))
        rows, columns = (slice(int(side.min()), int(side.max()) + 1) for side in (self.y, self.x))
        self.box = (rows, columns)
        if math.prod(side.stop - side.start for side in self.box) > 0.75 * math.prod(masks.shape):
            self.box = (slice(0, masks.shape[0]), slice(0, masks.shape[1]))  # whole images are read faster than rows
        self.few = len(masks) <= FEW_ROIS
        self.values = np.zeros((n_frames, len(parts)), np.float32)
        self.lost: np.ndarray | None = None  # (time, column) missing pixels, once there are some
        self.tiles: dict[tuple[int, ...], _Tile] = {}

    def read(self, frames: np.ndarray) -> np.ndarray:
        """`finish` of these (time, y, x) frames alone."""
        self.values, self.lost = np.zeros((len(frames), len(self.lengths)), np.float32), None
        piece = Piece(slice(0, len(frames)), *self.box)
        self.add(piece, frames[piece], None)
        return self.finish()

    def add(self, piece: Piece, block: np.ndarray, workers: Executor | None) -> None:
        """Add what a (time, y, x) block, the pixels of ``piece``, contributes."""
        corner = (piece.y.start, piece.y.stop, piece.x.start, piece.x.stop)
        if corner not in self.tiles:
            self.tiles[corner] = self._tile(piece)
        tile = self.tiles[corner]
        values = self.values[piece.frames]
        sums = values if piece[1:] == self.box else np.zeros_like(values)  # the whole, or one of several parts
        tile.read(block, sums, workers)
        if block.dtype.kind == "f":
            self._mend(tile, piece.frames, block, sums)
        if sums is not values:
            values += sums

    def _tile(self, piece: Piece) -> _Tile:
        y, x = self.y - piece.y.start, self.x - piece.x.start
        height, width = piece.y.stop - piece.y.start, piece.x.stop - piece.x.start
        here = (self.share != 0) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(self.column[here], minlength=len(self.lengths)))])
        return _Tile((height, width), y[here] * width + x[here], self.share[here], offsets, self.few)

    def _mend(self, tile: _Tile, frames: slice, block: np.ndarray, sums: np.ndarray) -> None:
        """Redo the sums with missing pixels: a ROI needs all of its pixels, a ring those that are there."""
        for column in np.flatnonzero(~np.isfinite(sums).all(axis=0)).tolist():
            rows = np.flatnonzero(~np.isfinite(sums[:, column]))
            pixels, shares = tile.of(column)
            y, x = np.divmod(pixels, tile.shape[1])
            values = block[rows[:, None], y, x].astype(np.float32)
            known = np.isfinite(values)
            total = (np.where(known, values, 0) * shares).sum(axis=1)
            if column % 2:
                if self.lost is None:
                    self.lost = np.zeros(self.values.shape, np.int32)
                self.lost[frames][rows, column] += (~known).sum(axis=1)
            else:
                total[~known.all(axis=1)] = np.nan
            sums[rows, column] = total

    def finish(self) -> np.ndarray:
        """Means (time, 2 · roi), ROI and ring in turn; NaN where pixels are missing."""
        if self.lost is not None:
            known = self.lengths - self.lost
            self.values *= np.where(known, self.lengths / np.maximum(known, 1), np.nan).astype(np.float32)
        self.values[:, self.lengths == 0] = np.nan
        return self.values


class _Tile:
    """The pixels of ROIs and rings in a part of the image, and how their weighted sums are taken.

    ``pixels`` are flat positions in the part, ``shares`` their weights; those of column i begin at ``offsets[i]``.
    """

    def __init__(self, shape: tuple[int, int], pixels: np.ndarray, shares: np.ndarray, offsets: np.ndarray, few: bool):
        self.shape, self.pixels, self.shares, self.offsets = shape, pixels, shares, offsets
        n_columns = len(offsets) - 1
        self.boxes = [box for i in range(0, n_columns, 2) if (box := self._box(i)) is not None] if few else []
        self.used: np.ndarray | None = None
        if not few and shape[0] * shape[1] < FRAME_PIXELS:
            self.used, pixels = np.unique(pixels, return_inverse=True)
        size = shape[0] * shape[1] if self.used is None else len(self.used)
        self.few = few
        self.matrix: Any = None if few else sparse.csr_array((shares, pixels, offsets), (n_columns, size))

    def of(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Flat pixels of a ROI or a ring and their weights."""
        part = slice(self.offsets[column], self.offsets[column + 1])
        return self.pixels[part], self.shares[part]

    def read(self, block: np.ndarray, out: np.ndarray, workers: Executor | None) -> None:
        """Write the sums of a (time, y, x) block into ``out`` (time, 2 · roi), which is 0 where there are no pixels."""
        if self.few:
            for box in self.boxes:
                box.read(block[(slice(None), *box.slices)], out[:, box.columns])
        elif self.used is not None:
            self._gather(self.used, block, out)
        elif workers is None or self.shape[0] * self.shape[1] < 2 * FRAME_PIXELS:  # threads would only wait in turn
            self._frames(block, out)
        else:
            edges = np.linspace(0, len(block), N_WORKERS + 1).round().astype(int).tolist()
            parts = [slice(*ends) for ends in itertools.pairwise(edges)]
            list(workers.map(lambda part: self._frames(block[part], out[part]), parts))

    def _gather(self, used: np.ndarray, block: np.ndarray, out: np.ndarray) -> None:
        """Sums of small images: many frames of the used pixels at a time."""
        flat = block.reshape(len(block), -1)
        step = max(CACHE_BYTES // (4 * max(len(used), 1)), 16)
        for start in range(0, len(block), step):
            part = np.ascontiguousarray(flat[start : start + step, used].T, np.float32)
            out[start : start + step] = (self.matrix @ part).T

    def _frames(self, block: np.ndarray, out: np.ndarray) -> None:
        """Sums of large images: one frame at a time, which stays in the cache."""
        image = np.empty(self.shape, np.float32)
        for frame, row in zip(block, out, strict=True):
            np.copyto(image, frame, casting="unsafe")
            row[:] = self.matrix @ image.ravel()

    def _box(self, column: int) -> _Box | None:
        """Bounding box of a ROI and its ring, with one weight per pixel of the box for either."""
        parts = self.of(column), self.of(column + 1)
        y, x = np.divmod(np.concatenate([pixels for pixels, _ in parts]), self.shape[1])
        if not len(y):
            return None
        top, bottom, left, right = int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1
        width = right - left
        weights = np.zeros(((bottom - top) * width, 2), np.float32)
        for i, (pixels, share) in enumerate(parts):
            places = (pixels // self.shape[1] - top) * width + pixels % self.shape[1] - left
            # A pixel that is named twice counts twice, as in the sparse product of many ROIs.
            weights[:, i] = np.bincount(places, share, len(weights))
        return _Box((slice(top, bottom), slice(left, right)), slice(column, column + 2), weights)


@dataclass(frozen=True)
class _Box:
    """The pixels of one ROI and of its ring, in the coordinates of the part of the image that is read."""

    slices: tuple[slice, slice]
    columns: slice
    weights: np.ndarray  # (pixel of the box, 2) float32: ROI and ring

    def read(self, block: np.ndarray, out: np.ndarray) -> None:
        """Weighted sums over the (time, y, x) pixels of the box, in pieces that stay in the cache."""
        step = max(CACHE_BYTES // (4 * len(self.weights)), 1)
        piece = np.empty((min(step, len(block)), *block.shape[1:]), np.float32)
        with np.errstate(invalid="ignore"):  # infinity times 0: put right later
            for start in range(0, len(block), step):
                part = block[start : start + step]
                floats = piece[: len(part)]
                np.copyto(floats, part, casting="unsafe")
                out[start : start + step] = floats.reshape(len(part), -1) @ self.weights
