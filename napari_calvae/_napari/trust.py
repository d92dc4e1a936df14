"""“How far can I trust this?” without Qt: simulate the cell, infer again, and say in plain words how well that went."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers
from napari_calvae._napari.session import explain

logger = logging.getLogger(__name__)

N_REPEATS = 8
#: Score, what it is called, how it is written, and what it means.
_LINES = (
    ("correlation_200ms", "Correlation, σ 200 ms", "{:.2f}", "Of inferred and true rate, both smoothed by 200 ms"),
    ("correlation_50ms", "Correlation, σ 50 ms", "{:.2f}", "Of inferred and true rate, both smoothed by 50 ms"),
    ("excess", "Spike count error", "{:+.0%}", "Inferred spikes beyond the true ones; 0 % is right"),
    ("found", "Lone spikes found", "{:.0%}", "Spikes with no other within 0.5 s that were inferred within 0.25 s"),
    ("timing_error", "Their timing error", "{:.0f} ms", "Median distance of the found lone spikes from the truth"),
    ("coverage", "90 % intervals hold", "{:.0%}", "Seconds with spikes whose interval holds the true number"),
)


@dataclass(frozen=True, eq=False)
class Expected:
    """What is to be expected of a cell."""

    number: int
    expectation: calvae.Expectation


@dataclass(frozen=True)
class Line:
    """One score: what it is, its mean and range over the simulated recordings, and what it means."""

    label: str
    mean: str
    span: str
    help: str


def iter_trust(number: int, result: calvae.SpikeInference, model: str) -> Iterator[answers.Message | Expected]:
    """Simulate the one cell of a result and infer it again."""
    try:
        yield answers.Progress(number, 0.0, "simulating")
        yield Expected(number, calvae.expect(result, 0, model, n_repeats=N_REPEATS))
    except Exception as error:
        logger.info("expectation %d failed", number, exc_info=True)
        yield answers.Failure(number, explain(error))


def lines(expectation: calvae.Expectation) -> list[Line]:
    """Scores for a table."""
    found = []
    for name, label, form, meaning in _LINES:
        values = expectation.scores[name] * (1000 if name == "timing_error" else 1)
        known = values[np.isfinite(values)]
        if not len(known):
            found.append(Line(label, "–", "nothing to count", meaning))
            continue
        mean, low, high = (form.format(v).replace("-", "−") for v in (known.mean(), known.min(), known.max()))
        dash = "…" if "+" in form else "–"
        found.append(Line(label, mean, f"{low.rstrip('% ms')}{dash}{high}", meaning))
    return found


def sentence(expectation: calvae.Expectation) -> str:
    """What the scores come to, in plain words."""
    scores = expectation.scores
    with np.errstate(invalid="ignore"):
        timing, number = _mean(scores["correlation_50ms"]), _mean(np.abs(scores["excess"]))
        slow = _mean(scores["correlation_200ms"])
    if slow >= 0.8 and timing >= 0.8:
        when = "When it fires can be told to about 50 ms."
    elif slow >= 0.7:
        when = "When it fires can be told to about 200 ms, not to 50 ms."
    else:
        when = "Single spikes are hard to tell here; trust averages over many events."
    if not np.isfinite(number):
        many = ""
    elif number < 0.25:
        many = " The number of spikes is about right."
    else:
        many = f" The number of spikes is off by {number:.0%} on average: compare cells and times, not counts."
    return when + many


def origin(expectation: calvae.Expectation) -> str:
    """What was done."""
    traces = expectation.result.traces
    return (
        f"ROI {expectation.roi_id}: {traces.n_rois} recordings simulated with its own parameters, noise and "
        f"{expectation.rate:.2f} spikes/s ({traces.duration:.0f} s at {traces.frame_rate:.4g} Hz), and inferred again. "
        "True if the model is; real recordings are harder."
    )


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
