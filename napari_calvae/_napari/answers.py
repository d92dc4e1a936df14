"""Questions to the network and its answers, step by step and without Qt; the newest question counts."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari.session import explain

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """All that decides a result besides movie and ROIs; equal settings give equal results.

    Baseline percentile and window (s) are those that the model was trained with where they are None; the amplitude
    (ΔF/F per spike) is unknown where it is None.
    """

    frame_rate: float
    neuropil_coefficient: float = 0.7
    n_samples: int = 50
    model: str = "universal"
    device: str = "auto"
    seed: int = 0
    baseline_percentile: float | None = None
    baseline_window: float | None = None
    amplitude: float | None = None

    @property
    def own_baseline(self) -> bool:
        """Whether the user wants another baseline than the model's."""
        return self.baseline_percentile is not None or self.baseline_window is not None


class Key(NamedTuple):
    """What results depend on: a mark per ROI of the plane, the plane, the movie's number, and the settings."""

    marks: Mapping[int, int]
    plane: int
    movie: int
    settings: Settings

    def of(self, roi: int) -> tuple:
        """What the result of one ROI depends on."""
        return self.marks.get(roi), self.plane, self.movie, self.settings, roi


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


@dataclass(frozen=True, eq=False)
class Rival:
    """What OASIS makes of one trace, (time,) in no unit of its own."""

    number: int
    estimate: np.ndarray


@dataclass(frozen=True)
class Peak:
    """Middle (y, x) of the cell next to a click, in pixels."""

    number: int
    place: tuple[float, float]


Message = Progress | Answer | Failure | Ready | Rival | Peak


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


@dataclass
class Results:
    """What has been inferred already, so that a second click is instant.

    ``rows`` holds what is known under ``key``, the one that was asked for last. Results are kept by plane and ROI; one
    that was inferred from other pixels is none. Another movie or other settings drop them all.
    """

    key: Key | None = None
    rows: dict[int, tuple[calvae.SpikeInference, int]] = field(default_factory=dict)
    _kept: dict[tuple[int, int], tuple[int, calvae.SpikeInference, int]] = field(default_factory=dict)
    _base: tuple[int, Settings] | None = None

    def get(self, key: Key, roi: int) -> calvae.SpikeInference | None:
        """Return the posterior of this ROI alone, or None."""
        self._turn(key)
        return one_roi(*self.rows[roi]) if roi in self.rows else None

    def add(self, key: Key, inference: calvae.SpikeInference) -> None:
        """Keep the posteriors of all ROIs of ``inference``, which were asked for under ``key``."""
        if self._base != key[2:]:
            self._kept, self._base = {}, key[2:]
        for row, roi in enumerate(inference.roi_ids):
            self._kept[key.plane, roi] = key.marks[roi], inference, row
        self._look(self.key if self.key is not None and self.key[2:] == key[2:] else key)

    def known(self, key: Key) -> set[int]:
        """Ids of the ROIs whose posteriors are kept under this key."""
        self._turn(key)
        return set(self.rows)

    def forget(self) -> None:
        """Keep nothing."""
        self._kept, self._base, self.key, self.rows = {}, None, None, {}

    def _turn(self, key: Key) -> None:
        if key != self.key:
            self._look(key)

    def _look(self, key: Key) -> None:
        self.key, self.rows = key, {}
        if self._base == key[2:]:
            for roi, mark in key.marks.items():
                kept = self._kept.get((key.plane, roi))
                if kept is not None and kept[0] == mark:
                    self.rows[roi] = kept[1:]


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
        theta_std={name: values[rows] for name, values in inference.theta_std.items()},
    )


def iter_ready(number: int = 0) -> Iterator[Message]:
    """Load what the first click would have to wait for, and tell what there is."""
    try:
        # Those for dendrites want to know which ROI is the shaft.
        names = tuple(name for name in calvae.models() if not calvae.load_model(name).recognition.coupled)
        if not names:
            raise calvae.RecordingError("Model: expected a trained model in the package, got none. Install it again.")
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
        traces = yield from iter_traces(request)
        yield Progress(number, 0.5, "inferring spikes")
        given = {} if settings.amplitude is None else {"amplitude": settings.amplitude}
        parts = calvae.iter_infer(
            traces,
            model=settings.model,
            n_samples=settings.n_samples,
            seed=settings.seed,
            device=settings.device,
            **given,
        )
        done = 0
        for part in parts:
            done += part.traces.n_rois
            yield Answer(number, part)
            yield Progress(number, 0.5 + 0.5 * done / len(request.wanted), "inferring spikes")
    except Exception as error:
        logger.info("request %d failed", number, exc_info=True)
        yield Failure(number, explain(error))


def with_baseline(traces: calvae.Traces, settings: Settings) -> calvae.Traces:
    """ΔF/F over the baseline that the user wants; what was left open is as the model was trained."""
    assumed = calvae.load_model(settings.model).preprocessing
    window, percentile = settings.baseline_window, settings.baseline_percentile
    return calvae.delta_f_over_f(
        traces,
        assumed.baseline_window if window is None else window,
        assumed.baseline_percentile if percentile is None else percentile,
    )


def iter_peak(number: int, movie: Any, click: tuple[float, float], diameter: float) -> Iterator[Message]:
    """Find the middle of the cell next to a click (y, x). Errors come as a ``Failure``."""
    try:
        yield Peak(number, calvae.correlation_peak(movie, click, diameter))
    except Exception as error:
        logger.info("looking for a cell failed", exc_info=True)
        yield Failure(number, explain(error))


def iter_rival(number: int, traces: calvae.Traces) -> Iterator[Message]:
    """OASIS on the first of some traces. Errors, also of its absence, come as a ``Failure``."""
    try:
        yield Rival(number, calvae.oasis(traces)[0])
    except Exception as error:
        logger.info("OASIS failed", exc_info=True)
        yield Failure(number, explain(error))


def iter_traces(request: Request) -> Generator[Progress, None, calvae.Traces]:
    """Read the traces of the wanted ROIs, raw or over the baseline that the user wants; yields how far, to one half."""
    settings = request.settings
    steps = calvae.iter_extract(
        request.movie,
        request.rois,
        frame_rate=settings.frame_rate,
        neuropil_coefficient=settings.neuropil_coefficient,
        wanted=request.wanted,
    )
    while True:
        try:
            fraction = next(steps)
        except StopIteration as end:
            return with_baseline(end.value, settings) if settings.own_baseline else end.value
        yield Progress(request.number, 0.5 * fraction, "reading the traces")
