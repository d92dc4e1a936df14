"""Questions to the network and its answers, step by step and without Qt; the newest question counts."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import stored
from napari_calvae._napari.file_rois import FileFrames, over_baseline
from napari_calvae._napari.session import explain
from napari_calvae._napari.settings import Settings
from napari_calvae._napari.stored import FromStore

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class Found:
    """Posteriors that are in a store already, or are coming into it; ``rows`` have come since the last such message."""

    number: int
    results: FromStore
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered, and the sentence to show."""

    number: int
    sentence: str


@dataclass(frozen=True)
class Ready:
    """What can be used on this machine: names of the models, the default first, all devices, and the one in use."""

    models: tuple[str, ...]
    devices: tuple[str, ...]
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


Message = Progress | Answer | Found | Failure | Ready | Rival | Peak


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
    rows: dict[int, tuple[calvae.SpikeInference | FromStore, int]] = field(default_factory=dict)
    _kept: dict[tuple[int, int], tuple[int, calvae.SpikeInference | FromStore, int]] = field(default_factory=dict)
    _base: tuple[int, Settings] | None = None

    def get(self, key: Key, roi: int) -> calvae.SpikeInference | None:
        """Return the posterior of this ROI alone, or None."""
        self._turn(key)
        return one_roi(*self.rows[roi]) if roi in self.rows else None

    def add(
        self, key: Key, inference: calvae.SpikeInference | FromStore, rows: Mapping[int, int] | None = None
    ) -> None:
        """Keep the posteriors of all ROIs of ``inference``, asked for under ``key``; or of ``rows``, by ROI id."""
        if self._base != key[2:]:
            self._kept, self._base = {}, key[2:]
        # What was erased is forgotten now, not at once: that may be undone.
        newest = self.key.marks if self.key is not None and self.key.plane == key.plane else {}
        gone = [at for at in self._kept if at[0] == key.plane and at[1] not in key.marks and at[1] not in newest]
        for at in gone:
            del self._kept[at]
        taken = {roi: row for row, roi in enumerate(inference.roi_ids)} if rows is None else rows
        for roi, row in taken.items():
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


def one_roi(inference: calvae.SpikeInference | FromStore, row: int) -> calvae.SpikeInference:
    """Posterior of one ROI (row) as a result of its own."""
    if isinstance(inference, FromStore):
        return inference.one(row)
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
        # Those for dendrites want to know which ROI is the shaft, those for live recordings see less than there is.
        networks = {name: calvae.load_model(name).recognition for name in calvae.models()}
        names = tuple(name for name, network in networks.items() if not (network.coupled or network.causal))
        if not names:
            raise calvae.RecordingError("Model: expected a trained model in the package, got none. Install it again.")
        from napari_calvae.inference import devices  # takes torch along, which is slow to load

        yield Ready(names, devices(), "")
        wave = np.sin(np.linspace(0, 20, 128)) + np.linspace(0, 1, 128)
        result = calvae.infer(calvae.Traces(wave, frame_rate=30.0), model=names[0], n_samples=2)
        yield Ready(names, devices(), device_of(result))
    except Exception as error:
        logger.info("warming up failed", exc_info=True)
        yield Failure(number, explain(error))


def device_of(inference: calvae.SpikeInference) -> str:
    """Device on which a result was computed, as far as its provenance says."""
    device = str(inference.provenance.get("settings", {}).get("device", ""))
    return "" if device == "auto" else device  # a store does not tell where its blocks were computed


def iter_answers(request: Request) -> Iterator[Message]:
    """Answer a request step by step; to stop consuming is to cancel. Errors come as a ``Failure``."""
    number, settings = request.number, request.settings
    try:
        yield Progress(number, 0.0, "reading the traces")
        known = _in_store(request)
        if known is not None:
            yield Found(number, known, tuple(known.row_of[roi] for roi in request.wanted if roi in known.row_of))
            request = replace(request, wanted=tuple(roi for roi in request.wanted if roi not in known.row_of))
        if not request.wanted:
            return
        traces = yield from iter_traces(request)
        if isinstance(request.movie, FileFrames):
            # Files hold ROIs without signal, and one of many must not stop the others.
            rows = np.flatnonzero(calvae.load_model(settings.model).preprocessing.usable(traces))
            traces = traces.select(rows) if 0 < len(rows) < traces.n_rois else traces
        yield Progress(number, 0.5, "inferring spikes")
        done = 0
        for part in calvae.iter_infer(traces, **settings.for_inference):
            done += part.traces.n_rois
            yield Answer(number, part)
            yield Progress(number, 0.5 + 0.5 * done / len(request.wanted), "inferring spikes")
    except Exception as error:
        logger.info("request %d failed", number, exc_info=True)
        yield Failure(number, explain(error))


def _in_store(request: Request) -> FromStore | None:
    """Results of unedited ROIs in the file that they came from, if it holds what is asked for."""
    frames = request.movie
    if not isinstance(frames, FileFrames) or frames.traces.stored is None:
        return None
    if not stored.agrees(frames.traces.stored, request.settings):
        return None
    return FromStore(frames.traces.stored, frames.traces.unedited(request.rois, frames.plane))


def baseline_of(settings: Settings) -> tuple[float, float]:
    """Window (s) and percentile of the baseline that the user wants; what was left open is as the model was trained."""
    assumed = calvae.load_model(settings.model).preprocessing
    window, percentile = settings.baseline_window, settings.baseline_percentile
    return (
        assumed.baseline_window if window is None else window,
        assumed.baseline_percentile if percentile is None else percentile,
    )


def with_baseline(traces: calvae.Traces, settings: Settings) -> calvae.Traces:
    """ΔF/F over the baseline that the user wants; what was left open is as the model was trained."""
    return calvae.delta_f_over_f(traces, *baseline_of(settings))


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
    settings, frames = request.settings, request.movie
    if not isinstance(frames, FileFrames):
        traces = yield from _iter_extracted(request)
        return with_baseline(traces, settings) if settings.own_baseline else traces
    known, others = frames.split(request.rois, request.wanted)
    parts = [frames.read(known, settings.frame_rate)] if known else []
    if others:
        parts.append((yield from _iter_extracted(replace(request, movie=frames.movie, wanted=others))))
    if settings.own_baseline or len({part.unit for part in parts}) > 1:
        parts = [with_baseline(part, settings) for part in parts]
    traces = calvae.Traces.concatenate(parts)
    return traces.select([traces.index(roi) for roi in request.wanted])


def source_of(request: Request) -> calvae.TraceSource | None:
    """All traces of the file that the ROIs came from, over the baseline that the user wants; None for a movie."""
    frames, settings = request.movie, request.settings
    if not isinstance(frames, FileFrames):
        return None
    source = frames.traces.with_rate(settings.frame_rate)
    return over_baseline(source, *baseline_of(settings)) if settings.own_baseline else source


def _iter_extracted(request: Request) -> Generator[Progress, None, calvae.Traces]:
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
            return end.value
        yield Progress(request.number, 0.5 * fraction, "reading the traces")
