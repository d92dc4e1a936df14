"""What noise real recordings have: held-out likelihood of their residuals under every kind of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.formats.ground_truth import Sweep, read_ground_truth
from napari_calvae.generative import (
    CorrelatedNoise,
    DriftingNoise,
    FlowNoise,
    GaussianNoise,
    LinearAR,
    Noise,
    SignalDependentNoise,
)
from napari_calvae.preprocess import bin_spikes

#: Kinds that θ describes; each is fitted cell by cell.
_KINDS: dict[str, Noise] = {
    "gaussian": GaussianNoise(),
    "signal-dependent": SignalDependentNoise(),
    "correlated": CorrelatedNoise(),
    "drift": DriftingNoise(),
    "drift + signal-dependent": DriftingNoise("signal_dependent"),
    "drift + correlated": DriftingNoise("correlated"),
}
#: Faster recordings are averaged over successive frames to at most this rate (Hz).
_MAX_RATE = 60.0
#: θ is fitted to this share of a cell's time, from its beginning; the rest is judged.
_FITTED = 0.6
#: Delays of the fluorescence (frames) among which each cell has its most likely one, under Gaussian noise.
_DELAYS = range(-2, 4)


@dataclass(frozen=True)
class _Size:
    n_datasets: int = 99
    n_cells: int = 4
    seconds: float = 120.0
    n_theta: int = 80
    n_flow: int = 500
    n_folds: int = 4
    window: int = 1024


@dataclass(frozen=True, eq=False)
class _Cell:
    """ΔF/F and true counts of one cell, (1, time)."""

    dataset: str
    frame_rate: float
    dff: Tensor
    counts: Tensor

    def part(self, fitted: bool) -> Tensor:
        """(1, time) the frames that θ is fitted to, or those that it is judged on."""
        early = torch.arange(self.dff.shape[-1]) < _FITTED * self.dff.shape[-1]
        return (early if fitted else ~early)[None] & torch.isfinite(self.dff)


def _run(setting: Setting) -> Iterator[Row]:
    size = _Size(3, 1, 25.0, 4, 4, 3, 256) if setting.quick else _Size()
    cells = _cells(setting.ground_truth(), size)
    theta, scores = [], []
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        own = [cell for cell in cells if cell.dataset == dataset]
        kept = _cached(own, setting.cache / f"residuals-{dataset}-{size.seconds:g}s.json", size)
        theta += [{name: torch.tensor([value]) for name, value in one["theta"].items()} for one in kept]
        scores += [one["scores"] for one in kept]
    for fold in range(size.n_folds):
        datasets = sorted({cell.dataset for cell in cells})[fold :: size.n_folds]
        left = [i for i, cell in enumerate(cells) if cell.dataset not in datasets]
        flow = _fit_flow([cells[i] for i in left], [theta[i] for i in left], size, setting.seed)
        for i, cell in enumerate(cells):
            if cell.dataset in datasets:
                scores[i]["flow"] = _score(cell, flow, size.n_theta)[1]
    yield from _table(cells, scores)


def _table(cells: Sequence[_Cell], scores: Sequence[dict[str, float]]) -> Iterator[Row]:
    """Gains per data set (mean over its cells), their mean and median, and how many cells gain."""
    names = list(scores[0])
    groups: dict[str, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        groups[cell.dataset].append(i)
    gains = {name: np.array([s[name] - s["gaussian"] for s in scores]) for name in names[1:]}

    def row(label: str, n: int, base: float, values: dict[str, float]) -> Row:
        found: Row = {"data set": label, "cells": n, "gaussian (nats/frame)": base}
        return found | {f"{name} − gaussian": values[name] for name in names[1:]}

    base = {key: float(np.mean([scores[i]["gaussian"] for i in own])) for key, own in groups.items()}
    by_set = {key: {name: float(g[own].mean()) for name, g in gains.items()} for key, own in groups.items()}
    for key, own in groups.items():
        yield row(key, len(own), base[key], by_set[key])
    n, middle = len(cells), float(np.mean(list(base.values())))
    for label, average in (("mean of data sets", np.mean), ("median of data sets", np.median)):
        values = {name: float(average([v[name] for v in by_set.values()])) for name in names[1:]}
        yield row(label, n, middle, values)
    yield row("share of cells that gain", n, middle, {name: float((g > 0).mean()) for name, g in gains.items()})


def _cells(data: Path, size: _Size) -> list[_Cell]:
    """The longest sweep of some cells of every data set, those with the most spikes in it first."""
    sweeps: dict[str, dict[str, Sweep]] = defaultdict(dict)
    for sweep in read_ground_truth(data, min_duration=20.0):
        known = sweeps[sweep.dataset].get(sweep.cell)
        if known is None or len(sweep.dff) > len(known.dff):
            sweeps[sweep.dataset][sweep.cell] = sweep
    found = []
    for own in list(sweeps.values())[: size.n_datasets]:
        busiest = sorted(own.values(), key=lambda s: (-len(s.spike_times), s.cell))
        # Not the busiest alone: evenly from the first to the median cell, all of which have spikes to fit.
        chosen = np.unique(np.linspace(0, len(busiest) // 2, size.n_cells).astype(int))
        found += [_cell(busiest[i], size.seconds) for i in chosen]
    return found


def _cell(sweep: Sweep, seconds: float) -> _Cell:
    """Averaged over so many frames that the rate is at most ``_MAX_RATE``, which leaves the noise what it is."""
    factor = int(np.ceil(sweep.frame_rate / _MAX_RATE))
    rate = sweep.frame_rate / factor
    n = min(len(sweep.dff) // factor, round(seconds * rate))
    dff = sweep.dff[: n * factor].reshape(n, factor).mean(1)
    counts = bin_spikes(sweep.spike_times, sweep.t0 + (factor - 1) / 2 / sweep.frame_rate, rate, n)
    model = LinearAR()
    observed, spikes = torch.from_numpy(dff.astype(np.float32))[None], torch.from_numpy(counts.astype(np.float32))[None]
    cell = _Cell(sweep.dataset, rate, observed, spikes)

    def likelihood(delay: int) -> float:
        shifted = torch.roll(spikes, delay, -1)
        theta = model.initial_theta(observed, shifted, rate, cell.part(fitted=True))
        return float(model.log_prob(observed, shifted, theta, rate, cell.part(fitted=True)))

    best = max(_DELAYS, key=likelihood)
    return _Cell(sweep.dataset, rate, observed, torch.roll(spikes, best, -1))


def _score(cell: _Cell, noise: Noise, n_steps: int) -> tuple[dict[str, Tensor], float]:
    """θ fitted to the first part, and the log-likelihood of the rest (nats per frame)."""
    model = LinearAR(noise)
    theta = model.fit_theta(cell.dff, cell.counts, cell.frame_rate, cell.part(fitted=True), n_steps=n_steps)
    judged = cell.part(fitted=False)
    with torch.no_grad():
        log_p = float(model.log_prob(cell.dff, cell.counts, theta, cell.frame_rate, judged))
    return theta, log_p / int(judged.sum())


def _cached(cells: Sequence[_Cell], path: Path, size: _Size) -> list[dict[str, dict[str, float]]]:
    """Per cell θ under Gaussian noise and scores of all kinds but the flow; kept for a run that goes on."""
    if path.is_file():
        return json.loads(path.read_text())
    found = []
    for cell in cells:
        fits = {name: _score(cell, noise, size.n_theta) for name, noise in _KINDS.items()}
        theta = {name: float(value) for name, value in fits["gaussian"][0].items()}
        found.append({"theta": theta, "scores": {name: score for name, (_, score) in fits.items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def _fit_flow(cells: Sequence[_Cell], thetas: Sequence[dict[str, Tensor]], size: _Size, seed: int) -> FlowNoise:
    """A flow that has learned from the fitted parts of these cells, cut into windows."""
    torch.manual_seed(seed)
    flow, model = FlowNoise(), LinearAR()
    windows: dict[str, list[Tensor]] = defaultdict(list)
    own: dict[str, list[Tensor]] = defaultdict(list)
    for cell, theta in zip(cells, thetas, strict=True):
        parts = model.residual(cell.dff, cell.counts, theta, cell.frame_rate, cell.part(fitted=True))
        n = -(-int(_FITTED * cell.dff.shape[-1]) // size.window)
        for name, x in zip(("residual", "expected", "measured"), parts, strict=True):
            padded = torch.nn.functional.pad(x[0], (0, max(0, n * size.window - x.shape[-1])))
            windows[name].append(padded[: n * size.window].unflatten(0, (n, size.window)))
        for name, value in (theta | {"rate": torch.tensor([cell.frame_rate])}).items():
            own[name].append(value.expand(n))
    residual, expected, measured = (torch.cat(windows[name]) for name in ("residual", "expected", "measured"))
    values = {name: torch.cat(x) for name, x in own.items()}
    rate = values.pop("rate")
    flow.fit(residual, expected, values, rate, measured, size.n_flow, seed)
    flow.learned.requires_grad_(requires_grad=False)
    return flow


PROOF = Proof(
    "residuals",
    "Noise of real recordings",
    "Held-out log-likelihood of real fluorescence given its true spikes, beyond that under independent normal noise. "
    "Linear response and noise parameters of each cell are fitted to the first 60 % of its time and judged on the "
    "rest; what the flow has learned comes from other data sets alone. Correlated noise and the flow are to be clearly "
    "ahead of independent noise.",
    _run,
    real=True,
)
