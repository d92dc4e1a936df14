"""What the plugin decides, without Qt: which ROI was clicked, which frame rate holds, which answer is still wanted.

A widget asks here and draws what it is told. The science is reached through the façade alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import napari_calvae as calvae

logger = logging.getLogger(__name__)

#: Name of the label layer to which clicked discs are added.
ROI_LAYER = "ROIs"

_SECONDS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "millisecond": 1e-3, "minute": 60.0}


@dataclass(frozen=True)
class FrameRate:
    """Frames per second (Hz), if known, and where the figure comes from, in words."""

    hz: float | None
    source: str


@dataclass(frozen=True)
class Settings:
    """All that decides a result besides movie and ROIs; equal settings give equal results."""

    frame_rate: float
    neuropil_coefficient: float = 0.7
    n_samples: int = 50
    model: str = "universal"
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """One question to the network: the posteriors of ``wanted`` (ROI ids) of a movie."""

    number: int
    movie: Any
    rois: calvae.RoiMasks
    wanted: tuple[int, ...]
    settings: Settings


@dataclass(frozen=True)
class Progress:
    """How far a request is, from 0 to 1, and what is being done."""

    number: int
    fraction: float
    doing: str


@dataclass(frozen=True, eq=False)
class Answer:
    """Posteriors of some of the wanted ROIs."""

    number: int
    inference: calvae.SpikeInference


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered, and the sentence to show."""

    number: int
    sentence: str


@dataclass(frozen=True)
class Ready:
    """What can be used on this machine: names of the models, the default first, and the device."""

    models: tuple[str, ...]
    device: str


Message = Progress | Answer | Failure | Ready


class Requests:
    """Running numbers: only the answer to the newest request is wanted."""

    def __init__(self) -> None:
        self._newest = 0

    def new(self) -> int:
        """Number of a new request; all earlier ones are obsolete from now on."""
        self._newest += 1
        return self._newest

    def wants(self, number: int) -> bool:
        """Whether this request is the newest."""
        return number == self._newest


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


@dataclass
class Results:
    """What has been inferred already, so that a second click is instant.

    Results are kept for one ``key`` (movie, ROIs, settings); with another key they are dropped.
    """

    key: tuple = ()
    rows: dict[int, tuple[calvae.SpikeInference, int]] = field(default_factory=dict)

    def get(self, key: tuple, roi: int) -> calvae.SpikeInference | None:
        """Return the posterior of this ROI alone, or None."""
        if key != self.key or roi not in self.rows:
            return None
        return one_roi(*self.rows[roi])

    def add(self, key: tuple, inference: calvae.SpikeInference) -> None:
        """Keep the posteriors of all ROIs of ``inference``."""
        if key != self.key:
            self.key, self.rows = key, {}
        self.rows.update({roi: (inference, row) for row, roi in enumerate(inference.roi_ids)})

    def known(self, key: tuple) -> set[int]:
        """Ids of the ROIs whose posteriors are kept under this key."""
        return set(self.rows) if key == self.key else set()


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
        (metadata.get("frame_rate"), "from the layer's metadata"),
        (in_file, "from the file's metadata"),
    ]
    if unit in _SECONDS and scale > 0:
        candidates.append((1 / (scale * _SECONDS[unit]), "from the time axis of the layer"))
    for value, source in candidates:
        try:
            hz = float(value) if value is not None else math.nan
        except (TypeError, ValueError):
            continue
        if math.isfinite(hz) and hz > 0:
            return FrameRate(hz, source)
    return FrameRate(None, "not in the file: please type it")


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


def roi_at(labels: np.ndarray, position: Sequence[float]) -> int | None:
    """Id of the ROI under a position (y, x) in pixels; None on the background or outside."""
    y, x = (math.floor(p + 0.5) for p in position[-2:])
    if not (0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]):
        return None
    return int(labels[y, x]) or None


def disc_at(labels: np.ndarray, position: Sequence[float], diameter: float) -> tuple[int, tuple[np.ndarray, ...]]:
    """Return the next free id and the (y, x) pixels of a disc around ``position`` that leaves other ROIs untouched."""
    disc = calvae.RoiMasks.from_discs([tuple(position[-2:])], diameter, labels.shape)
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


def one_roi(inference: calvae.SpikeInference, row: int) -> calvae.SpikeInference:
    """Posterior of one ROI (row) as a result of its own."""
    if inference.rate.shape[0] == 1:
        return inference
    events = inference.events_of(row).copy()
    events["roi"] = 0
    rows = slice(row, row + 1)
    return replace(
        inference,
        traces=inference.traces.select(rows),
        rate=inference.rate[rows],
        events=events,
        reconstruction=inference.reconstruction[rows],
        reconstruction_std=inference.reconstruction_std[rows],
        theta={name: values[rows] for name, values in inference.theta.items()},
        quality=inference.quality[rows],
    )


def explain(error: BaseException) -> str:
    """Sentence for the user: what was expected, what came, what to do."""
    text = str(error).strip()
    if isinstance(error, calvae.RecordingError | ValueError | OSError) and text:
        return text
    if isinstance(error, MemoryError):
        return "The computer ran out of memory. Use fewer samples or fewer ROIs, or close other programs."
    return f"Unexpected {type(error).__name__}: {text or 'no details'}. Earlier results stay; the log has the details."


def iter_ready(number: int = 0) -> Iterator[Message]:
    """Load what the first click would have to wait for, and tell what there is."""
    try:
        names = tuple(calvae.models())
        yield Ready(names, "")
        wave = np.sin(np.linspace(0, 20, 128)) + np.linspace(0, 1, 128)
        result = calvae.infer(calvae.Traces(wave, frame_rate=30.0), model=names[0], n_samples=2)
        yield Ready(names, device_of(result))
    except Exception as error:
        logger.info("warming up failed", exc_info=True)
        yield Failure(number, explain(error))


def device_of(inference: calvae.SpikeInference) -> str:
    """Device on which a result was computed, as far as its provenance says."""
    return str(inference.provenance.get("settings", {}).get("device", ""))


def iter_answers(request: Request) -> Iterator[Message]:
    """Answer a request step by step; to stop consuming is to cancel. Errors come as a ``Failure``."""
    number, settings = request.number, request.settings
    try:
        yield Progress(number, 0.0, "reading the traces")
        traces = yield from _iter_traces(request)
        yield Progress(number, 0.5, "inferring spikes")
        parts = calvae.iter_infer(
            traces,
            model=settings.model,
            n_samples=settings.n_samples,
            seed=settings.seed,
            device=settings.device,
        )
        done = 0
        for part in parts:
            done += part.traces.n_rois
            yield Answer(number, part)
            yield Progress(number, 0.5 + 0.5 * done / len(request.wanted), "inferring spikes")
    except Exception as error:
        logger.info("request %d failed", number, exc_info=True)
        yield Failure(number, explain(error))


def _iter_traces(request: Request) -> Iterator[Progress]:
    settings = request.settings
    steps = calvae.iter_extract(
        request.movie,
        request.rois,
        frame_rate=settings.frame_rate,
        neuropil_coefficient=settings.neuropil_coefficient,
    )
    while True:
        try:
            fraction = next(steps)
        except StopIteration as end:
            traces = end.value
            break
        yield Progress(request.number, 0.5 * fraction, "reading the traces")
    return traces.select([traces.index(roi) for roi in request.wanted])
