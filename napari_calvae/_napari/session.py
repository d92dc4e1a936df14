"""What the plugin decides, without Qt: which ROI was clicked, which frame rate holds, which answer is still wanted.

A widget asks here and draws what it is told. The science is reached through the façade alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import napari_calvae as calvae

#: Name of the label layer to which clicked discs are added.
ROI_LAYER = "ROIs"

_SECONDS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "millisecond": 1e-3, "minute": 60.0}


@dataclass(frozen=True)
class FrameRate:
    """Frames per second (Hz), if known, and where the figure comes from, in words."""

    hz: float | None
    source: str


@dataclass(frozen=True)
class Clock:
    """Time of one movie: frames, seconds of the plots and positions on napari's time slider.

    Parameters
    ----------
    frame_rate
        Frames per second (Hz).
    n_frames
        Number of frames.
    scale, translate
        World coordinates of the movie's time axis: frame k lies at ``translate + k · scale``.
    """

    frame_rate: float
    n_frames: int
    scale: float = 1.0
    translate: float = 0.0

    def seconds(self, point: float) -> float:
        """Time (s) of the frame shown at slider position ``point`` (world coordinates)."""
        return self._inside((point - self.translate) / self.scale) / self.frame_rate

    def point(self, seconds: float) -> float:
        """Slider position (world coordinates) of the frame nearest to ``seconds``."""
        return self.translate + self._inside(seconds * self.frame_rate) * self.scale

    def _inside(self, frame: float) -> int:
        return int(min(max(math.floor(frame + 0.5), 0), self.n_frames - 1))


def typed_frame_rate(text: str) -> float:
    """Frame rate (Hz) that the user typed, or the sentence that asks for it."""
    try:
        hz = float(text.strip().lower().removesuffix("hz").replace(",", "."))
    except ValueError:
        hz = math.nan
    if not (math.isfinite(hz) and hz > 0):
        said = f"got “{text.strip()}”" if text.strip() else "got none"
        raise calvae.RecordingError(
            f"Frame rate: expected the imaging rate in frames per second, {said}. Type it in Hz; it is never guessed."
        )
    return hz


def find_frame_rate(metadata: Mapping[str, Any], scale: float, unit: str, in_file: float | None) -> FrameRate:
    """Frame rate of a layer from what is written about it; never a guess.

    Parameters
    ----------
    metadata
        The layer's metadata; ``frame_rate`` (Hz) is what counts.
    scale, unit
        Of the layer's time axis; a scale counts only if its unit is one of time.
    in_file
        Frame rate (Hz) in the metadata of the file that the layer was read from.
    """
    candidates = [
        (metadata.get("frame_rate"), "metadata"),
        (in_file, "file"),
    ]
    if unit in _SECONDS and scale > 0:
        candidates.append((1 / (scale * _SECONDS[unit]), "time axis"))
    for value, source in candidates:
        try:
            hz = float(value) if value is not None else math.nan
        except (TypeError, ValueError):
            continue
        if math.isfinite(hz) and hz > 0:
            return FrameRate(hz, source)
    return FrameRate(None, "unknown")


def check_movie(shape: Sequence[int], rgb: bool = False) -> None:
    """Raise unless ``shape`` is that of a movie (time, y, x) or of a stack of planes over time (time, z, y, x)."""
    shape = tuple(int(n) for n in shape)
    if len(shape) not in (3, 4) or rgb or shape[0] < 2:
        kind = "a colour image" if rgb else f"{len(shape)} dimensions {shape}"
        raise calvae.RecordingError(
            "Movie: expected three dimensions (time, y, x), or four (time, z, y, x), with at least two frames, "
            f"got {kind}. Choose a layer with one channel over time, or split the layer."
        )


def check_view(displayed: Sequence[int], ndim: int) -> None:
    """Raise unless the viewer, of ``ndim`` axes, displays the last two, which are y and x."""
    if set(displayed) != {ndim - 2, ndim - 1}:
        raise calvae.RecordingError(
            f"View: expected y and x of the movie on the screen, got axes {tuple(displayed)} of {ndim}. "
            "Press “roll dimensions” below the layer list until the movie is seen frame by frame."
        )


class NoRois(calvae.RecordingError):
    """There are no ROIs where they were looked for."""


def no_rois(kind: str, n_planes: int = 1, plane: int = 0) -> NoRois:
    """The sentence that asks for ROIs; ``kind`` is that of their layer."""
    where = f"on plane {plane} of the {kind} layer" if n_planes > 1 else f"in the {kind} layer"
    return NoRois(f"ROIs: expected at least one, got none {where}. Draw one, or tick “click adds a disc”.")


def gone(roi: int, n_planes: int = 1, plane: int = 0) -> str:
    """What to say of a picked ROI that is no longer there."""
    place = f"is not on plane {plane}" if n_planes > 1 else "is gone"
    return f"ROI {roi} {place}. Click another one to see its spikes."


@dataclass(frozen=True, eq=False)
class MoviePlane:
    """One plane of a (time, z, y, x) array as a (time, y, x) array; nothing is read before it is asked for."""

    data: Any
    plane: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(time, y, x)."""
        n_frames, _, height, width = self.data.shape
        return int(n_frames), int(height), int(width)

    @property
    def ndim(self) -> int:
        """Three."""
        return 3

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels."""
        return np.dtype(self.data.dtype)

    @property
    def chunks(self) -> Any:
        """Chunks along time, y and x, if the array has any; in the array's own notation."""
        chunks = getattr(self.data, "chunks", None)
        return None if chunks is None else (chunks[0], *chunks[2:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        first, *rest = key if isinstance(key, tuple) else (key,)
        return self.data[(first, self.plane, *rest)]


def plane_of(labels: Any, size: tuple[int, int], n_planes: int = 1, plane: int = 0) -> np.ndarray:
    """(y, x) label image of one plane of a movie.

    Parameters
    ----------
    labels
        Label image (y, x) for all planes, or (z, y, x); leading axes of length one are dropped.
    size
        (y, x) of the movie's planes.
    n_planes, plane
        Number of the movie's planes, and the one that is wanted.
    """
    image, shape = labels, tuple(int(n) for n in labels.shape)
    if n_planes > 1 and len(shape) >= 3 and shape[-3] == n_planes:
        image = image[(..., plane, slice(None), slice(None))]
    image = np.asarray(image)
    while image.ndim > 2 and image.shape[0] == 1:
        image = image[0]
    if image.shape != tuple(size):
        each = f", or {n_planes} of them for as many planes" if n_planes > 1 else ""
        raise calvae.RecordingError(
            f"ROIs: expected one label image of the movie's {size[0]} × {size[1]} pixels{each}, got shape {shape}. "
            "Choose labels that were drawn on this movie, or resize them."
        )
    return image


def discs(centres: Mapping[int, Sequence[float]], diameter: float, size: tuple[int, int]) -> np.ndarray:
    """(y, x) label image of discs around those centres that are inside; where they overlap the last is on top.

    Parameters
    ----------
    centres
        By ROI id (y, x) in pixels.
    diameter
        Of the discs (pixels); one pixel is the smallest disc.
    size
        (y, x) of the image.
    """
    inside = {roi: c for roi, c in centres.items() if all(-0.5 <= p < n - 0.5 for p, n in zip(c, size, strict=True))}
    if not inside:
        return np.zeros(size, np.int32)
    places = [(float(y), float(x)) for y, x in inside.values()]
    # Between pixels a disc of less than √2 would cover none.
    return calvae.RoiMasks.from_discs(places, max(diameter, 1.5), size, tuple(inside)).to_labels()


def landing(labels: np.ndarray, click: Sequence[float], peak: Sequence[float]) -> Sequence[float]:
    """Where to put a disc: the peak next to the click, unless that cell has a ROI already."""
    return click if roi_at(labels, peak) is not None else peak


def roi_at(labels: np.ndarray, position: Sequence[float] | np.ndarray) -> int | None:
    """Id of the ROI under a position (y, x) in pixels; None on the background or outside."""
    y, x = (math.floor(p + 0.5) for p in position[-2:])
    if not (0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]):
        return None
    return int(labels[y, x]) or None


def disc_at(labels: np.ndarray, position: Sequence[float] | np.ndarray, diameter: float) -> tuple[np.ndarray, ...]:
    """Return the (y, x) pixels of a disc around ``position`` that leaves other ROIs untouched."""
    disc = calvae.RoiMasks.from_discs([(float(position[-2]), float(position[-1]))], max(diameter, 1.5), labels.shape)
    pixels = disc.pixels[0]
    free = pixels[labels.ravel()[pixels] == 0]
    if not len(free):
        raise calvae.RecordingError(
            "ROI: expected free pixels around the click, got only other ROIs. Click beside them."
        )
    return np.unravel_index(free, labels.shape)


def fingerprint(*parts: Any) -> str:
    """Short hash of arrays and plain values; it changes with any edit."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.shape}{part.dtype}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def explain(error: BaseException) -> str:
    """Sentence for the user: what was expected, what came, what to do."""
    text = str(error).strip()
    if isinstance(error, calvae.RecordingError | ValueError | OSError) and text:
        return text
    if isinstance(error, MemoryError):
        general = "The computer ran out of memory. Use fewer samples or fewer ROIs, or close other programs."
        return text if text.startswith("memory:") else general
    return f"Unexpected {type(error).__name__}: {text or 'no details'}. Earlier results stay; the log has the details."
