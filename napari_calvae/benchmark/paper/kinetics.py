"""Whether the kinetics of an indicator explain fluorescence better than simpler models, given the true spikes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.formats import whole_files
from napari_calvae.generative import MODELS, GCaMP6s, GenerativeModel
from napari_calvae.generative.sites import GCAMP6S_GREENBERG
from napari_calvae.pretrained.fit_kinetics import (
    FITTED,
    FRAME_RATE,
    WARM_UP,
    WINDOW,
    Cell,
    left_out,
    load_cells,
    pieces,
)
from napari_calvae.pretrained.gauss_newton import fit_cells

#: Per indicator the data sets with its cells; those in `FITTED` contribute only cells to which nothing was fitted.
_DATASETS = {
    "gcamp6s": ("DS13", "DS15", "DS16", "DS40"),
    "gcamp6f": ("DS10", "DS11", "DS06", "DS07", "DS08"),
    "jgcamp8f": ("DS30",),
    "jgcamp8m": ("DS31",),
}
_RIVALS = ("linear_ar", "dye_binding", "physiological")
#: Cells per data set, seconds of the second half that are predicted, Gauss–Newton steps per cell.
_CELLS, _PREDICTED, _STEPS = 6, 60.0, 6
#: Changes slower than this (s) are drift, which is taken out of data and prediction.
_DRIFT = 20.0


def run(setting: Setting) -> Iterator[Row]:
    """One row per data set and model."""
    groups = {"gcamp6s": ("DS16",)} if setting.quick else _DATASETS
    for indicator, datasets in groups.items():
        cells = _held_out(setting, indicator, datasets)
        models = dict(_models(indicator))
        if setting.quick:
            models = {name: models[name] for name in ("linear_ar", indicator)}
        scores = {name: _explained(setting, indicator, name, model, cells) for name, model in models.items()}
        for dataset in dict.fromkeys(cell.dataset for cell in cells):
            rows = np.array([cell.dataset == dataset for cell in cells])
            for name, explained in scores.items():
                yield {
                    "indicator": indicator,
                    "data set": dataset,
                    "left out": _left_out(indicator, dataset),
                    "model": name,
                    "cells": int(rows.sum()),
                    "R² (median)": float(np.median(explained[rows])),
                    "R² (mean)": float(np.mean(explained[rows])),
                    "cells above linear_ar": float(np.mean((explained > scores["linear_ar"])[rows])),
                }


def _left_out(indicator: str, dataset: str) -> str:
    if indicator not in FITTED:
        return "nothing: published constants"
    return "these cells" if dataset.startswith(FITTED[indicator]) else "the data set"


def _models(indicator: str) -> Iterator[tuple[str, GenerativeModel]]:
    """Rivals and the indicator's own model; GCaMP6s with the published constants too."""
    for name in (*_RIVALS, indicator):
        yield name, MODELS[name]()
    if indicator == "gcamp6s":
        published = GCaMP6s()
        published.medium = published.medium._replace(scheme=GCAMP6S_GREENBERG.scheme)
        yield "gcamp6s, published rates", published


def _held_out(setting: Setting, indicator: str, datasets: Sequence[str]) -> list[Cell]:
    """Cells to which no constants were fitted, the first few of each data set."""
    found = []
    for name in datasets:
        cells = load_cells(setting.ground_truth(), (name,))
        if indicator in FITTED and name in FITTED[indicator]:
            _, cells = left_out(cells)
        found += cells[: 1 if setting.quick else _CELLS]
    return found


def _explained(
    setting: Setting, indicator: str, name: str, model: GenerativeModel, cells: Sequence[Cell]
) -> np.ndarray:
    """R² (cell,) in the second half of each recording, with θ of each cell from the busiest piece of the first."""
    checkpoint = (
        setting.cache / f"kinetics-{indicator}-{name.split(',')[-1].strip()}{'-quick' if setting.quick else ''}.json"
    )
    if checkpoint.is_file():
        return np.array(json.loads(checkpoint.read_text(encoding="utf-8")))
    seconds, predicted, steps = (6.0, 6.0, 1) if setting.quick else (WINDOW, _PREDICTED, _STEPS)
    length = round(seconds * FRAME_RATE)
    starts = [cell.busiest(0, max(length, len(cell.dff) // 2), length) for cell in cells]
    theta = fit_cells(model, pieces(cells, starts, seconds), steps)
    later = pieces(cells, [len(cell.dff) // 2 for cell in cells], predicted)
    with torch.no_grad():
        expected = model.fluorescence(later.counts, theta, FRAME_RATE)
    window = round((predicted - WARM_UP if setting.quick else _DRIFT) * FRAME_RATE)
    unexplained, total = (_spread(x, later.scored, window) for x in (later.dff - expected, later.dff))
    result = (1 - unexplained / total).double().numpy()
    setting.cache.mkdir(parents=True, exist_ok=True)
    with whole_files(checkpoint) as (temporary,):
        temporary.write_text(json.dumps(result.tolist()), encoding="utf-8")
    return result


def _spread(values: Tensor, scored: Tensor, window: int) -> Tensor:
    """Sum of squares (cell,) around the mean of each window, scored frames only."""
    total = torch.zeros(len(values))
    for start in range(0, values.shape[1], window):
        inside = scored[:, start : start + window].to(values)
        part = values[:, start : start + window] * inside
        n = inside.sum(1)
        total = total + (part**2).sum(1) - part.sum(1) ** 2 / n.clamp_min(1)
    return total


PROOF = Proof(
    name="kinetics",
    title="Kinetics of the indicator, given the true spikes",
    claim="Given the true spikes, the states of the indicator explain ΔF/F of cells to which its constants were not "
    "fitted at least as well as linear, dye-binding and physiological models whose shape is fitted to each cell. Each "
    "cell's θ is fitted to the busiest 30 s in the first half of its recording and R² is that of 60 s of the second. "
    "The GCaMP8 constants are published, and may have been fitted to these very recordings.",
    run=run,
    real=True,
)
