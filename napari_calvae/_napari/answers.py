"""Questions to the network and its answers, step by step and without Qt; the newest question counts."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari.session import explain

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class Rival:
    """What OASIS makes of one trace, (time,) in no unit of its own."""

    number: int
    estimate: np.ndarray


Message = Progress | Answer | Failure | Ready | Rival


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


def iter_rival(number: int, traces: calvae.Traces) -> Iterator[Message]:
    """OASIS on the first of some traces. Errors, also of its absence, come as a ``Failure``."""
    try:
        yield Rival(number, calvae.oasis(traces)[0])
    except Exception as error:
        logger.info("OASIS failed", exc_info=True)
        yield Failure(number, explain(error))


def iter_traces(request: Request) -> Generator[Progress, None, calvae.Traces]:
    """Read the raw traces of the wanted ROIs; yields how far that is, to one half."""
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
