"""Stimulation decided without Qt: which pulses there are, whether they meet the movie, and the work on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers, responses
from napari_calvae._napari.retraining import told as told_time
from napari_calvae._napari.session import explain

logger = logging.getLogger(__name__)

#: Key of a layer's metadata under which pulses are looked for.
METADATA = "stimulation"
_STAGES = {"start": "looking for a start", "settle": "settling", "sample": "sampling"}

#: Where pulses come from: a file, or arrays in a layer's metadata.
Source = Path | Mapping[str, Any] | calvae.Stimulation


@dataclass(frozen=True, eq=False)
class Order:
    """One estimate: all ROIs of a movie, the pulses, and how many sweeps are thrown away and kept."""

    number: int
    movie: Any
    rois: calvae.RoiMasks
    stimulation: calvae.Stimulation
    settings: answers.Settings
    n_settle: int
    n_samples: int
    n_start: int = 8


@dataclass(frozen=True, eq=False)
class Sweep:
    """What one sweep came to: words of how far it is, and the (cell, cell) connectivity in it."""

    number: int
    fraction: float
    words: str
    connectivity: np.ndarray


@dataclass(frozen=True, eq=False)
class Estimated:
    """What was inferred of a stimulated recording, with what is told of it, in how many seconds."""

    number: int
    result: calvae.AllOpticalInference
    cells: tuple[responses.Cell, ...]
    connections: tuple[responses.Connection, ...]
    seconds: float


def in_metadata(*layers: Any) -> Source | None:
    """Pulses that the metadata of a layer hold, the first that does."""
    for layer in layers:
        found = None if layer is None else layer.metadata.get(METADATA)
        if found is not None:
            return found
    return None


def read(source: Source, rois: calvae.RoiMasks) -> calvae.Stimulation:
    """Pulses from a file or from metadata; targets may be ids of ROIs."""
    return source if isinstance(source, calvae.Stimulation) else calvae.read_stimulation(source, rois)


def check(stimulation: calvae.Stimulation, rois: calvae.RoiMasks, seconds: float) -> str:
    """What there is, in words; raises if no pulse meets the movie, in place or in time.

    Parameters
    ----------
    seconds
        Length of the recording (s).
    """
    if not len(stimulation):
        raise calvae.RecordingError("Pulses: expected at least one, got none. Load those of this recording.")
    height, width = rois.shape
    sites = stimulation.sites
    inside = ((sites > -1) & (sites < (width, height))).all(1)
    if not inside.any():
        raise calvae.RecordingError(
            f"Targets: expected x and y in pixels of the movie, {width} × {height}, got {sites[0, 0]:g}, "
            f"{sites[0, 1]:g} and others outside. Convert them to pixels."
        )
    first, last = stimulation.onset.min(), stimulation.onset.max()
    if first > seconds or last < 0:
        raise calvae.RecordingError(
            f"Pulses: expected times within the recording, 0 to {seconds:.1f} s, got {first:g} to {last:g} s. "
            "Give seconds since the first frame."
        )
    each = 1000 * stimulation.duration
    lasting = f"{each[0]:g} ms" if np.ptp(each) < 1e-9 else f"{each.min():g} to {each.max():g} ms"
    plural = "" if len(sites) == 1 else "s"
    words = f"{len(stimulation)} pulses of {lasting} on {len(sites)} target{plural}, {first:.1f} to {last:.1f} s"
    outside = int((~inside).sum())
    return f"{words}; {outside} of the targets outside the movie" if outside else words


def iter_estimate(order: Order) -> Iterator[answers.Message | Sweep | Estimated]:
    """Work on a stimulated recording sweep by sweep; errors come as a ``Failure``."""
    number, settings, seconds = order.number, order.settings, 0.0
    try:
        traces = yield from answers.iter_traces(
            answers.Request(number, order.movie, order.rois, order.rois.ids, settings)
        )
        yield answers.Progress(number, 0.0, "looking for a start")
        steps = calvae.iter_all_optical(
            traces,
            order.stimulation,
            order.rois,
            settings.model,
            n_start=order.n_start,
            n_settle=order.n_settle,
            n_samples=order.n_samples,
            seed=settings.seed,
        )
        while True:
            try:
                record = next(steps)
            except StopIteration as end:
                result = end.value
                # For hundreds of cells these take longer than a window may be held up.
                yield Estimated(number, result, responses.cells(result), responses.connections(result), seconds)
                return
            seconds = record.seconds
            left = told_time(seconds / record.step * (record.n_steps - record.step))
            words = f"{_STAGES[record.stage]}, {record.step} of {record.n_steps}, {left} left"
            yield Sweep(number, record.step / record.n_steps, words, record.connectivity)
    except Exception as error:
        logger.info("stimulation %d failed", number, exc_info=True)
        yield answers.Failure(number, explain(error))
