"""What refinement gains on single traces, and the gaps before and after it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from napari_calvae.benchmark.ground_truth import MARGIN, prepare
from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.formats.ground_truth import read_ground_truth
from napari_calvae.inference import infer
from napari_calvae.metrics import score_correlation, smooth_spikes
from napari_calvae.recording import Traces
from napari_calvae.refinement import Gaps, diagnose, refine
from napari_calvae.simulation import simulate

#: Frames per second of all traces.
_RATE = 30.0
#: Widths (s) of the smoothing of the true spikes.
_SIGMAS = (0.025, 0.2)
#: What a data set's name holds, and its group; the first that fits.
_GROUPS = {
    "OGB1": "OGB-1",
    "Cal520": "Cal-520",
    "GCaMP5k": "GCaMP5k",
    "GCaMP6f": "GCaMP6f",
    "GCaMP6s": "GCaMP6s",
    "GCaMP8": "jGCaMP8f, 8m",
    "CaMP": "red indicators",
    "GECO": "red indicators",
}


@dataclass(frozen=True)
class _Size:
    n_simulated: int = 6
    n_datasets: int = 99
    seconds: float = 20.0
    n_steps: int = 60
    n_evidence: int = 400


@dataclass(frozen=True, eq=False)
class _Case:
    group: str
    dff: np.ndarray
    counts: np.ndarray


def _run(setting: Setting) -> Iterator[Row]:
    size = _Size(2, 2, 6.0, 3, 16) if setting.quick else _Size()
    path = setting.cache / f"refinement-{setting.seed}-{size.seconds:g}s.json"
    found: list[dict[str, float]] = json.loads(path.read_text()) if path.is_file() else []
    cases = [*_simulated(size, setting.seed), *_recorded(setting, size)]
    for case in cases[len(found) :]:
        found.append(_measure(case, size, setting.seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    groups = [*dict.fromkeys(case.group for case in cases), "all real recordings"]
    for group in groups:
        real = group == groups[-1]
        own = [
            values
            for case, values in zip(cases, found, strict=True)
            if case.group == group or (real and case.group != "simulated")
        ]
        head: Row = {"cells": group, "n": len(own)}
        yield head | {name: float(np.median([values[name] for values in own])) for name in own[0]}


def _simulated(size: _Size, seed: int) -> Iterator[_Case]:
    """Cells of the generative model that refinement believes in."""
    cells = simulate(size.n_simulated, size.seconds, _RATE, rate=0.7, theta={"noise_density": 0.02}, seed=seed + 1)
    for dff, counts in zip(cells.traces.values, cells.counts, strict=True):
        yield _Case("simulated", dff, counts)


def _recorded(setting: Setting, size: _Size) -> Iterator[_Case]:
    """From each data set the piece of a cell with the median number of spikes among pieces with five or more."""
    pieces = prepare(read_ground_truth(setting.ground_truth(), min_duration=size.seconds), _RATE)
    n = round(size.seconds * _RATE)
    for dataset in list(dict.fromkeys(p.dataset for p in pieces))[: size.n_datasets]:
        own = [p for p in pieces if p.dataset == dataset and len(p.dff) >= n and p.counts[:n].sum() >= 5]
        if own:
            own.sort(key=lambda p: int(p.counts[:n].sum()))
            chosen = own[len(own) // 2]
            group = next((group for word, group in _GROUPS.items() if word in dataset), "other")
            yield _Case(group, chosen.dff[:n], chosen.counts[:n])


def _measure(case: _Case, size: _Size, seed: int) -> dict[str, float]:
    traces = Traces(case.dff, frame_rate=_RATE)
    gaps: Gaps = diagnose(traces, n_steps=size.n_steps, n_evidence=size.n_evidence, seed=seed)
    before = infer(traces, n_samples=0).rate[0]
    after = refine(traces, n_steps=size.n_steps, n_samples=0, seed=seed).rate[0]
    values = {
        "bound before (nats/s)": float(gaps.amortized[0]),
        "bound after (nats/s)": float(gaps.refined[0]),
        "evidence (nats/s)": float(gaps.evidence[0]),
        "its error (nats/s)": float(gaps.evidence_error[0]),
        "effective particles": float(gaps.effective_samples[0]),
        "amortization gap (nats/s)": float(gaps.amortization_gap[0]),
        "approximation gap (nats/s)": float(gaps.approximation_gap[0]),
    }
    inner = slice(MARGIN, -MARGIN)
    for sigma in _SIGMAS:
        truth = smooth_spikes(case.counts, _RATE, sigma)[inner]
        for word, rate in (("before", before), ("after", after)):
            score = score_correlation(rate[None, inner], truth[None])
            values[f"correlation {word} ({1000 * sigma:g} ms)"] = float(np.nan_to_num(score).ravel()[0])
    return values


PROOF = Proof(
    "refinement",
    "Refinement of single traces, and the gaps of inference",
    "The universal model's posterior before and after gradient steps on each trace's own posterior, under its linear "
    "generative model: medians over cells, 20 s each. The bound is to rise on all; the evidence, of a particle filter "
    "whose error is given, is to lie above both bounds. Correlation is to rise where the generative model is true "
    "(simulated) and may fall where it is not. The real recordings are ones that the model was trained on with their "
    "true spikes, so that the correlation before refinement is better than on others.",
    _run,
    real=True,
)
