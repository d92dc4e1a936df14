"""Regions of interest as weighted pixels, and how rows of them are named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from napari_calvae.errors import RecordingError

#: What ``RoiMasks`` knows of each ROI.
_PER_ROI = ("pixels", "ids", "weights", "planes")


def rows_of(n: int, wanted: Sequence[int] | slice | np.ndarray) -> np.ndarray:
    """(row,) numbers of the rows that an index of ``n`` rows means: negative ones and masks as in numpy."""
    if isinstance(wanted, slice):
        return np.arange(n)[wanted]
    index = np.asarray(wanted)
    return np.arange(n)[index if index.size else np.empty(0, np.int64)]


def whole_ids(ids: Sequence[int] | np.ndarray, n_rois: int) -> tuple[int, ...]:
    """Ids of ROIs as they were given, else 1, 2, …; files and random streams know whole numbers of 64 bits only."""
    if not len(ids):
        return tuple(range(1, n_rois + 1))
    try:
        found = tuple(int(i) for i in ids)
    except (TypeError, ValueError, OverflowError):
        found = ()
    for i, whole in zip(ids, found or [None] * len(ids), strict=True):
        if whole is None or whole != i or not -(2**63) <= whole < 2**63:
            raise RecordingError(f"roi_ids: expected whole numbers of 64 bits, got {i!r}. Number the ROIs 1, 2, ….")
    return found


@dataclass(frozen=True, eq=False)
class RoiMasks:
    """Regions of interest, as weighted pixels of an imaging plane; ROIs may overlap.

    Parameters
    ----------
    shape
        (y, x) of the plane, pixels.
    pixels
        Per ROI the flat (row-major) indices of its pixels.
    ids
        Per ROI an integer, as in a label image.
    weights
        Per ROI one weight per pixel; by default all one. Traces are weighted means.
    planes
        Per ROI the number of the imaging plane that it lies in, all of one shape; by default all 0.
    """

    shape: tuple[int, int]
    pixels: tuple[np.ndarray, ...]
    ids: tuple[int, ...] = ()
    weights: tuple[np.ndarray, ...] = ()
    planes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 2 or min(shape) < 1:
            raise RecordingError(f"ROIs: expected a plane (y, x), got shape {tuple(self.shape)}.")
        pixels = tuple(np.asarray(p, np.int64).ravel() for p in self.pixels)
        ids = whole_ids(self.ids, len(pixels))
        weights = (
            tuple(np.asarray(w, np.float32).ravel() for w in self.weights)
            if len(self.weights)
            else tuple(np.ones(len(p), np.float32) for p in pixels)
        )
        if not pixels:
            raise RecordingError(
                "ROIs: expected at least one, got none. Draw a ROI or give a label image with labels > 0."
            )
        planes = tuple(int(p) for p in self.planes) if len(self.planes) else (0,) * len(pixels)
        if not len(pixels) == len(ids) == len(set(ids)) == len(weights) == len(planes):
            raise RecordingError(
                f"ROIs: expected one id, one weight array and one plane per ROI, all ids different; "
                f"got {len(pixels)} ROIs, {len(set(ids))} ids, {len(weights)} weight arrays, {len(planes)} planes."
            )
        for roi, p, w in () if _all_inside(pixels, weights, shape) else zip(ids, pixels, weights, strict=True):
            total = w.sum(dtype=float)
            if not len(p) or total <= 0:
                raise RecordingError(
                    f"ROI {roi}: expected at least one pixel inside the image of {shape[0]} × {shape[1]} pixels, "
                    "got an empty ROI. Draw it larger, or inside the image."
                )
            if not abs(total) <= np.finfo(np.float32).max:
                raise RecordingError(f"ROI {roi}: expected weights whose sum single precision holds, got {total:g}.")
            if len(w) != len(p) or p.min() < 0 or p.max() >= shape[0] * shape[1]:
                raise RecordingError(f"ROI {roi}: expected pixels inside the image and one weight for each.")
        named = {"shape": shape, "pixels": pixels, "ids": ids, "weights": weights, "planes": planes}
        for name, value in named.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, rois: Sequence[int] | slice | np.ndarray) -> RoiMasks:
        """ROIs of these rows (indices, not ids), in the order given."""
        rows = rows_of(len(self), rois).tolist()
        pixels, ids, weights, planes = (tuple(getattr(self, name)[row] for row in rows) for name in _PER_ROI)
        return RoiMasks(self.shape, pixels, ids, weights, planes)

    @classmethod
    def concatenate(cls, parts: Sequence[RoiMasks]) -> RoiMasks:
        """Join ROIs of planes of one shape, in the order given."""
        if len({part.shape for part in parts}) != 1:
            raise RecordingError(f"ROIs: expected planes of one shape, got {sorted({p.shape for p in parts})}.")
        pixels, ids, weights, planes = (
            tuple(item for part in parts for item in getattr(part, name)) for name in _PER_ROI
        )
        return cls(parts[0].shape, pixels, ids, weights, planes)

    @classmethod
    def from_labels(cls, labels: ArrayLike) -> RoiMasks:
        """ROIs of a (y, x) label image; 0 is background."""
        image = np.asarray(labels)
        if image.dtype.kind not in "iub":
            raise RecordingError(
                f"label image: expected integers, got dtype {image.dtype}. Convert it, 0 is background."
            )
        if image.ndim != 2:
            raise RecordingError(
                f"label image: expected two dimensions (y, x), got shape {image.shape}. Give one plane of labels."
            )
        flat = image.ravel()
        inside = np.flatnonzero(flat > 0)
        if not len(inside):
            raise RecordingError("label image: expected at least one label above 0, got only background.")
        labels = flat[inside]
        if labels.max() < 65_536:
            labels = labels.astype(np.uint16)  # sorted several times faster
        order = np.argsort(labels, kind="stable")
        ids, first = np.unique(labels[order], return_index=True)
        return cls(image.shape, tuple(np.split(inside[order], first[1:])), tuple(ids.tolist()))

    @classmethod
    def from_discs(
        cls, centres: Iterable[tuple[float, float]], diameter: float, shape: tuple[int, int], ids: Sequence[int] = ()
    ) -> RoiMasks:
        """Discs of one ``diameter`` (pixels) around ``centres`` (y, x), cut at the border of the image."""
        if not diameter > 0:
            raise RecordingError(f"diameter: expected a positive number of pixels, got {diameter}.")
        places = np.array([(float(cy), float(cx)) for cy, cx in centres]).reshape(-1, 2)
        first = np.floor(places - diameter / 2).astype(np.int64)
        steps = np.arange(math.ceil(diameter) + 2)
        y, x = (first[:, [axis]] + steps for axis in (0, 1))
        inside = (y - places[:, :1])[:, :, None] ** 2 + (x - places[:, 1:])[:, None] ** 2 <= (diameter / 2) ** 2
        inside &= ((y >= 0) & (y < shape[0]))[:, :, None] & ((x >= 0) & (x < shape[1]))[:, None]
        flat = (y[:, :, None] * shape[1] + x[:, None])[inside]
        ends = np.cumsum(inside.sum(axis=(1, 2)))
        return cls(shape, tuple(np.split(flat, ends[:-1])) if len(places) else (), tuple(ids))

    @property
    def centroids(self) -> np.ndarray:
        """(roi, 2) weighted mean position (x, y) of each ROI's pixels."""
        width = self.shape[1]
        means = [
            (np.average(p % width, weights=w), np.average(p // width, weights=w))
            for p, w in zip(self.pixels, self.weights, strict=True)
        ]
        return np.array(means)

    def to_labels(self) -> np.ndarray:
        """(y, x) label image, int32 unless an id is too large for it; where ROIs overlap the later one is shown."""
        small = max(map(abs, self.ids)) < 2**31
        image = np.zeros(self.shape[0] * self.shape[1], np.int32 if small else np.int64)
        for roi, pixels in zip(self.ids, self.pixels, strict=True):
            image[pixels] = roi
        return image.reshape(self.shape)


def _all_inside(pixels: Sequence[np.ndarray], weights: Sequence[np.ndarray], shape: tuple[int, int]) -> bool:
    """Whether every ROI has pixels, all in the image, and a weight for each: asked at once, for there are thousands."""
    lengths = np.array([len(p) for p in pixels])
    if not lengths.all() or lengths.tolist() != [len(w) for w in weights]:
        return False
    every = np.concatenate(pixels)
    with np.errstate(over="ignore"):  # infinite sums are refused
        total = np.add.reduceat(np.concatenate(weights), np.cumsum(lengths) - lengths)
    weighted = (total > 0) & np.isfinite(total)
    return bool(every.min() >= 0 and every.max() < shape[0] * shape[1] and weighted.all())
