"""Fitting a model to this recording, step by step and without Qt: what is asked, what is told, what came of it."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers, recovery
from napari_calvae._napari.session import explain

logger = logging.getLogger(__name__)

#: More ROIs than this are not fitted to: a random subset says as much, sooner.
MOST_ROIS = 200
#: The posterior of the chosen cell is refreshed about this often in a fit.
N_GLIMPSES = 20
SUFFIX = recovery.MODEL
#: Entries of a training record that are no parameters of a cell: label and unit.
TERMS = {
    "loss": ("Loss", "per frame"),
    "bound": ("Bound", "nats per snippet"),
    "log_prior": ("Log-prior of the cells", "nats"),
    "rate": ("Rate, median", "spikes/s"),
    "effective_samples": ("Effective samples", "spike trains"),
    "discrepancy": ("Discrepancy from the prior", "per snippet"),
    "log_truth": ("Log-probability of the labels", "nats per snippet"),
    "held_out": ("Held-out cells, lower is better", "nats/s or correlation"),
}


@dataclass(frozen=True, eq=False)
class Order:
    """One fit: to which ROIs of a movie, from which model (``base``), by which objective; ``cell`` is shown."""

    number: int
    movie: Any
    rois: calvae.RoiMasks
    wanted: tuple[int, ...]
    cell: int
    settings: answers.Settings
    base: str
    objective: Any
    config: Any
    generative: str | None = None
    noise: str | None = None
    spikes: Path | None = None


@dataclass(frozen=True)
class Remark:
    """Something that the user should know of a fit that goes on."""

    number: int
    sentence: str


@dataclass(frozen=True)
class Step:
    """One step of training: its loss and terms, and the seconds that are left."""

    number: int
    step: int
    n_steps: int
    terms: Mapping[str, float]
    seconds_left: float


@dataclass(frozen=True, eq=False)
class Glimpse:
    """Posterior of the chosen cell by the model as it is after a step; step 0 is the model that the fit began with."""

    number: int
    step: int
    inference: calvae.SpikeInference
    parameters: tuple[Any, ...]


@dataclass(frozen=True)
class Verdict:
    """What the held-out cells say: whether the new weights were kept, and in words by what measure.

    None where nothing was held out.
    """

    kept: bool | None
    told: str = ""

    @property
    def sentence(self) -> str:
        """The same in plain words."""
        if self.kept is None:
            return "Fitted to the labelled spikes; no cell was left to judge by. Compare before and after yourself."
        if self.kept:
            return f"Better: {self.told}. Compare before and after, then keep it or not."
        return (
            f"No better, so the old weights stay: {self.told}. "
            "Fit to more cells, or try another objective, noise or learning rate."
        )


@dataclass(frozen=True, eq=False)
class Fitted:
    """The end of a fit: the model, the verdict, and the chosen cell by the old model and by the new one.

    ``path`` is where the model is until napari ends, if there is anything to keep and it could be written.
    """

    number: int
    model: calvae.SpikeVAE
    verdict: Verdict
    before: calvae.SpikeInference
    after: calvae.SpikeInference
    path: Path | None = None


@dataclass(frozen=True, eq=False)
class Offer:
    """What a fit can be asked for."""

    options: calvae.FitOptions


Message = answers.Progress | answers.Failure | Remark | Step | Glimpse | Fitted | Offer


class State(Enum):
    """Where the widget is: nothing fitted, a fit on its way or held, one at its end, or one that is in use."""

    IDLE, RUNNING, PAUSED, FITTED, KEPT = range(5)


#: Buttons that are shown in each state: what can be done next.
OFFERED = {
    State.IDLE: ("start", "load"),
    State.RUNNING: ("pause", "cancel"),
    State.PAUSED: ("pause", "cancel"),
    State.FITTED: ("keep", "discard", "save"),
    State.KEPT: ("start", "save", "load"),
}


def iter_offer() -> Iterator[Message]:
    """Load what a fit needs, which takes seconds, and tell what can be asked for."""
    try:
        yield Offer(calvae.fit_options())
    except Exception as error:
        logger.info("loading failed", exc_info=True)
        yield answers.Failure(0, explain(error))


def iter_retrain(order: Order) -> Iterator[Message]:
    """Fit as ordered; to stop consuming is to cancel, not to consume is to pause. Errors come as a ``Failure``."""
    number = order.number
    try:
        yield answers.Progress(number, 0.0, "reading the traces")
        known = order.spikes if "supervised" in order.objective else None
        times = None if known is None else calvae.read_spikes(known)
        fit_to, remark = chosen(order, times)
        if remark:
            yield Remark(number, remark)
        asked = tuple(roi for roi in order.rois.ids if roi in {*fit_to, order.cell})
        request = answers.Request(number, order.movie, order.rois, asked, order.settings)
        traces = yield from answers.iter_traces(request)
        cell = traces.select([traces.index(order.cell)])
        settings: dict[str, Any] = {"n_samples": order.settings.n_samples, "seed": order.settings.seed}
        yield answers.Progress(number, 0.5, "preparing the fit")
        before = calvae.infer(cell, order.base, **settings)
        yield Glimpse(number, 0, before, calvae.load_model(order.base).generative.parameters)
        rows = traces.select([traces.index(roi) for roi in fit_to])
        steps = calvae.iter_fit(
            rows,
            order.base,
            order.objective,
            spikes=None if times is None else counts_of(rows, times),
            generative=order.generative,
            noise=order.noise,
            config=order.config,
        )
        model = yield from _iter_steps(order, steps, cell)
        yield answers.Progress(number, 1.0, "looking at the cell again")
        after = calvae.infer(cell, model, **settings)
        verdict = verdict_of(model.description)
        yield Fitted(number, model, verdict, before, after, None if verdict.kept is False else _at_hand(model, order))
    except Exception as error:
        logger.info("fit %d failed", number, exc_info=True)
        yield answers.Failure(number, explain(error))


def _iter_steps(
    order: Order, steps: Generator[Any, None, calvae.SpikeVAE], cell: calvae.Traces
) -> Generator[Message, None, calvae.SpikeVAE]:
    spent = 0.0
    while True:
        began = time.monotonic()
        try:
            record = next(steps)
        except StopIteration as end:
            return end.value
        glimpse = None
        if record.model is not None:
            found = calvae.infer(cell, record.model, n_samples=order.settings.n_samples, seed=order.settings.seed)
            glimpse = Glimpse(order.number, record.step, found, record.model.generative.parameters)
        # The first step waits for all preparations, and a pause is not counted either.
        spent += time.monotonic() - began if record.step > 1 else 0.0
        left = spent / max(record.step - 1, 1) * (record.n_steps - record.step)
        if glimpse is not None:
            yield glimpse
        yield Step(order.number, record.step, record.n_steps, {"loss": record.loss, **record.terms}, left)


def _at_hand(model: calvae.SpikeVAE, order: Order) -> Path | None:
    """Path of the model among what outlasts a crash; None if it cannot be written."""
    try:
        return keep(model, recovery.folder(), order.objective)
    except OSError:
        logger.warning("the fitted model was not written", exc_info=True)
        return None


def chosen(order: Order, times: Mapping[int, np.ndarray] | None) -> tuple[tuple[int, ...], str]:
    """ROIs to fit to, and what to tell of it: a subset of many; for the supervised objective labelled ones alone."""
    wanted, remarks = order.wanted, []
    if "supervised" in order.objective:
        if times is None:
            raise calvae.RecordingError(
                f"Labelled spikes: expected a file for the objective {order.objective}, got none. "
                "Choose one below, or an objective that needs no labels."
            )
        labelled = tuple(roi for roi in wanted if roi in times)
        if not labelled:
            raise calvae.RecordingError(
                f"Labelled spikes: expected those of some of the chosen ROIs, got ROIs {_some(times)}. "
                "Choose another file; its names must be the ids of the label image."
            )
        if len(labelled) < len(wanted):
            remarks.append(f"{len(labelled)} of {len(wanted)} ROIs have labelled spikes.")
        wanted = labelled if order.objective == "supervised" else wanted
    if len(wanted) > MOST_ROIS:
        drawn = random.Random(order.config.seed)
        # Few labels are worth more than many cells without.
        labels = [roi for roi in wanted if times is not None and roi in times][:MOST_ROIS]
        others = [roi for roi in wanted if roi not in set(labels)]
        kept = {*labels, *drawn.sample(others, min(MOST_ROIS - len(labels), len(others)))}
        remarks.append(f"Fits to {len(kept)} of {len(wanted)} ROIs, drawn at random (seed {order.config.seed}).")
        wanted = tuple(roi for roi in wanted if roi in kept)
    return wanted, " ".join(remarks)


def counts_of(traces: calvae.Traces, times: Mapping[int, np.ndarray]) -> np.ndarray:
    """(roi, time) spike counts per frame; NaN throughout where a ROI's spikes are not known."""
    counts = np.full((traces.n_rois, traces.n_frames), np.nan)
    for row, roi in enumerate(traces.roi_ids):
        if roi in times:
            counts[row] = calvae.bin_spikes(times[roi], traces.t0, traces.frame_rate, traces.n_frames)
    return counts


def typed_rois(text: str, ids: Sequence[int]) -> tuple[int, ...]:
    """ROIs that the user typed, such as “1-5, 8”."""
    found: list[int] = []
    for part in re.split(r"[,;\s]+", re.sub(r"\s*[-–]\s*", "-", text.strip())):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if ends is None:
            raise calvae.RecordingError(
                f"ROIs: expected ids such as “1-5, 8”, got “{text.strip()}”. Type them, or choose all."
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        found += [roi for roi in ids if first <= roi <= last and roi not in found]
    if not found:
        raise calvae.RecordingError(f"ROIs: expected ids among {_some(ids)}, got “{text.strip()}”. Type others.")
    return tuple(found)


def verdict_of(description: str) -> Verdict:
    """Read the judgement that `calvae.iter_fit` writes at the end of a model's description."""
    outcome, _, told = description.rsplit(";", 1)[-1].partition(": ")
    return Verdict("not kept" not in outcome, told) if told else Verdict(None)


def save(model: calvae.SpikeVAE, path: Path, overwrite: bool = False) -> Path:
    """Write a model under this name, whole or not at all; never over a file without being told."""
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    if path.exists() and not overwrite:
        raise calvae.RecordingError(f"{path.name}: exists already in {path.parent}. Save under another name.")
    return model.save(path)


def keep(model: calvae.SpikeVAE, folder: Path, objective: str) -> Path:
    """Write a model under the next free name in a folder."""
    return model.save(recovery.free_name(folder, objective, SUFFIX))


def told(seconds: float) -> str:
    """Time in words: “40 s”, “3 min”."""
    if not math.isfinite(seconds):
        return ""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else "hours"


def _some(ids: Sequence[int] | Mapping[int, Any]) -> str:
    known = sorted(ids)
    return ", ".join(map(str, known[:6])) + (" …" if len(known) > 6 else "")
