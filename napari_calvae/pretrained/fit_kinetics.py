"""Fit a GCaMP6's constants: ``python -m napari_calvae.pretrained.fit_kinetics gcamp6s --data FOLDER --out FILE``.

The rates of the indicator are shared by all cells of all data sets of that indicator; concentrations, calcium per
spike, extrusion, dynamic range and store are each cell's own, with priors. Every third cell is left out, for
validation. Resumes from its checkpoint, which is the file it writes.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from napari_calvae.formats import whole_files
from napari_calvae.formats.ground_truth import Sweep, read_ground_truth
from napari_calvae.generative import MODELS, IndicatorKinetics, LinearAR
from napari_calvae.generative.sites import GCAMP6S_GREENBERG, sequential_scheme
from napari_calvae.preprocess import bin_spikes, resample
from napari_calvae.pretrained.gauss_newton import CellFit, Scored, improve_shared

log = logging.getLogger("napari_calvae.fit_kinetics")

#: Data sets to which an indicator's constants are fitted; those left out whole are in `benchmark.paper.kinetics`.
FITTED = {"gcamp6s": ("DS13", "DS15", "DS16"), "gcamp6f": ("DS10", "DS11")}
#: Frames per second of all fits.
FRAME_RATE = 30.0
#: Seconds of each fitted piece, of which the first are there for the indicator's memory and not scored.
WINDOW, WARM_UP = 30.0, 5.0
#: Delays between spike and fluorescence (frames) among which each cell has its own.
_DELAYS = range(-2, 4)
#: Prior spread of the logarithm of each shared rate, around the values of Greenberg et al. (2018) for GCaMP6s.
_SPREAD = 1.0


@dataclass(frozen=True, eq=False)
class Cell:
    """The longest sweep of a cell at `FRAME_RATE`: ΔF/F and spikes per frame, both (time,), at the cell's delay."""

    dataset: str
    name: str
    dff: np.ndarray
    counts: np.ndarray

    def piece(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """ΔF/F and counts of some frames."""
        return self.dff[start : start + length], self.counts[start : start + length]

    def busiest(self, first: int, last: int, length: int) -> int:
        """Where, from ``first`` to ``last``, the ``length`` frames with the most spikes begin."""
        before = np.concatenate([[0], np.cumsum(self.counts[first:last])])
        length = min(length, last - first)
        return first + int(np.argmax(before[length:] - before[: len(before) - length]))


def load_cells(data: Path, datasets: Sequence[str], min_duration: float = 60.0) -> list[Cell]:
    """The cells of some data sets, given by prefixes of their names, with spikes aligned to fluorescence.

    Time stamps differ between recordings by up to some frames, which no model of the indicator should explain: each
    cell gets the whole-frame delay with which `LinearAR` fits best.
    """
    sweeps: dict[tuple[str, str], Sweep] = {}
    files = [file for name in datasets for file in sorted(data.glob(f"{name}*.npz"))]
    for sweep in (sweep for file in files for sweep in read_ground_truth(file, min_duration=min_duration)):
        key = (sweep.dataset, sweep.cell)
        longest = key not in sweeps or len(sweep.dff) > len(sweeps[key].dff)
        if np.isfinite(sweep.dff).all() and longest:
            sweeps[key] = sweep
    cells = []
    for (dataset, name), sweep in sweeps.items():
        dff, shift = resample(np.asarray(sweep.dff, float), sweep.frame_rate, FRAME_RATE)
        counts = bin_spikes(sweep.spike_times, sweep.t0 + shift, FRAME_RATE, len(dff)).astype(float)
        if counts.sum() > 10:
            cells.append(_aligned(Cell(dataset, name, dff, counts)))
    return cells


def _aligned(cell: Cell) -> Cell:
    start = cell.busiest(0, len(cell.dff), 3000)
    dff, counts = (torch.as_tensor(x) for x in cell.piece(start, 3000))
    moved = torch.stack([counts.roll(d) for d in _DELAYS])
    model, observed = LinearAR(), dff.expand(len(moved), -1)
    theta = model.initial_theta(observed, moved, FRAME_RATE)
    error = ((observed - model.fluorescence(moved, theta, FRAME_RATE)) ** 2).sum(-1)
    return Cell(cell.dataset, cell.name, cell.dff, np.roll(cell.counts, _DELAYS[int(error.argmin())]))


def left_out(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Cells to fit, and every third of each data set, to validate."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.dataset].append(cell)
    fitted = [c for group in groups.values() for i, c in enumerate(group) if i % 3]
    return fitted, [c for group in groups.values() for c in group[::3]]


def pieces(cells: Sequence[Cell], starts: Sequence[int], seconds: float) -> Scored:
    """One piece per cell, its first seconds not scored; shorter ones are padded with unscored frames."""
    length, warm_up = round(seconds * FRAME_RATE), round(WARM_UP * FRAME_RATE)
    dff, counts = (torch.zeros(len(cells), length) for _ in range(2))
    scored = torch.zeros(len(cells), length, dtype=torch.bool)
    for row, (cell, start) in enumerate(zip(cells, starts, strict=True)):
        values, spikes = (torch.as_tensor(x, dtype=torch.float32) for x in cell.piece(start, length))
        dff[row, : len(values)], counts[row, : len(values)] = values, spikes
        scored[row, warm_up : len(values)] = True
    return Scored(dff, counts, scored, FRAME_RATE)


def fitting_pieces(cells: Sequence[Cell]) -> Scored:
    """The busiest `WINDOW` in the first half of each cell's recording."""
    length = round(WINDOW * FRAME_RATE)
    return pieces(cells, [c.busiest(0, max(length, len(c.dff) // 2), length) for c in cells], WINDOW)


def build(name: str, constants: Tensor) -> IndicatorKinetics:
    """A model with other rates: logarithms of the four of binding, then of the four of unbinding."""
    on, off = constants.exp().reshape(2, 4)
    model = MODELS[name]()
    if not isinstance(model, IndicatorKinetics):
        raise typer.BadParameter(f"expected a model of an indicator's kinetics, got {name}. Choose {list(FITTED)}.")
    model.medium = model.medium._replace(scheme=sequential_scheme(on, off))
    return model


def main(
    name: Annotated[str, typer.Argument(help="gcamp6s or gcamp6f")],
    data: Annotated[Path, typer.Option(help="Folder with the ground-truth .npz files")],
    out: Annotated[Path, typer.Option(help="JSON file to write, and to resume from")],
    steps: Annotated[int, typer.Option(help="Steps of Gauss and Newton")] = 12,
) -> None:
    """Fit the constants of an indicator to recordings with known spikes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    cells, _ = left_out(load_cells(data, FITTED[name]))
    centre = torch.tensor([*GCAMP6S_GREENBERG.on, *GCAMP6S_GREENBERG.off], dtype=torch.float64).log()
    prior = (centre, torch.full_like(centre, _SPREAD))
    shared, start, losses = centre, None, []
    if out.is_file():
        saved = json.loads(out.read_text(encoding="utf-8"))
        shared = torch.tensor([*saved["on"], *saved["off"]], dtype=torch.float64).log()
        start, losses = torch.tensor(saved["cells"], dtype=torch.float64), saved["losses"]
    fit = CellFit(build(name, shared), fitting_pieces(cells), start)
    log.info("%d cells", len(cells))
    while len(losses) < steps:
        for _ in range(1 if losses else 5):
            fit.improve(build(name, shared))
        shared, loss = improve_shared(lambda c: build(name, c), shared, prior, fit)
        losses.append(loss)
        log.info("step %d, loss %.2f, on %s, off %s", len(losses), loss, *shared.exp().reshape(2, 4).numpy().round(4))
        values = shared.exp().reshape(2, 4).tolist()
        result = {
            "on": values[0],
            "off": values[1],
            "losses": losses,
            "names": [p.name for p in MODELS[name]().parameters],
            "cells": fit.u.tolist(),
            "median": {k: float(v) for k, v in MODELS[name]().constrain(fit.u.median(0).values).items()},
            "spread": [round(float(x), 3) for x in fit.u.std(0)],
        }
        with whole_files(out) as (temporary,):
            temporary.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
