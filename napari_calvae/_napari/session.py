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
    """Raise unless ``shape`` is that of a movie (time, y, x)."""
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or rgb or shape[0] < 2:
        kind = "a colour image" if rgb else f"{len(shape)} dimensions {shape}"
        raise calvae.RecordingError(
            f"Movie: expected three dimensions (time, y, x) with at least two frames, got {kind}. "
            "Choose a layer with one plane and one channel over time, or split the layer."
        )


def plane_of(labels: np.ndarray, plane: tuple[int, int]) -> np.ndarray:
    """(y, x) label image of the same size as the movie's ``plane``, leading axes of length one dropped."""
    image = np.asarray(labels)
    while image.ndim > 2 and image.shape[0] == 1:
        image = image[0]
    if image.shape != tuple(plane):
        raise calvae.RecordingError(
            f"ROIs: expected one label image of the movie's {plane[0]} × {plane[1]} pixels, got shape {image.shape}. "
            "Choose labels that were drawn on this movie, or resize them."
        )
    return image


def roi_at(labels: np.ndarray, position: Sequence[float] | np.ndarray) -> int | None:
    """Id of the ROI under a position (y, x) in pixels; None on the background or outside."""
    y, x = (math.floor(p + 0.5) for p in position[-2:])
    if not (0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]):
        return None
    return int(labels[y, x]) or None


def disc_at(
    labels: np.ndarray, position: Sequence[float] | np.ndarray, diameter: float
) -> tuple[int, tuple[np.ndarray, ...]]:
    """Return the next free id and the (y, x) pixels of a disc around ``position`` that leaves other ROIs untouched."""
    disc = calvae.RoiMasks.from_discs([(float(position[-2]), float(position[-1]))], diameter, labels.shape)
    pixels = disc.pixels[0]
    free = pixels[labels.ravel()[pixels] == 0]
    if not len(free):
        raise calvae.RecordingError(
            "ROI: expected free pixels around the click, got only other ROIs. Click beside them."
        )
    return int(labels.max()) + 1, np.unravel_index(free, labels.shape)


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
        return "The computer ran out of memory. Use fewer samples or fewer ROIs, or close other programs."
    return f"Unexpected {type(error).__name__}: {text or 'no details'}. Earlier results stay; the log has the details."
