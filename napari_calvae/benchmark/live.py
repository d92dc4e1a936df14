"""What it costs in accuracy to tell spikes while a recording is still going on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from napari_calvae.benchmark.accuracy import Models
from napari_calvae.benchmark.ground_truth import SHIFTS, Method, Piece, by_dataset, calvae_method, correlations, prepare
from napari_calvae.benchmark.paper.record import to_table
from napari_calvae.benchmark.records import machine
from napari_calvae.formats import whole_files
from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.live import stream
from napari_calvae.recognition import CausalNetwork
from napari_calvae.vae import SpikeVAE, load_model

#: Seconds of each sweep, and cells of each data set, that are streamed.
_SECONDS, _CELLS = 120.0, 8
#: Width of the smoothing of true spikes (s), and frame rate (Hz).
_SIGMA, _FRAME_RATE = 0.025, 30.0

Row = dict[str, object]


def live_method(model: str | SpikeVAE, lag: int) -> Method:
    """The rates of `stream`, to which a trace comes second by second."""
    vae = load_model(model)

    def run(dff: np.ndarray, frame_rate: float) -> np.ndarray:
        live, second = stream(vae, frame_rate, lag=lag), max(1, round(frame_rate))
        parts = [live.push(dff[None, k : k + second]).rate for k in range(0, len(dff), second)]
        found = np.concatenate([*parts, live.finish().rate.reshape(1, -1)], 1)[0]
        return found if len(found) else np.full(len(dff), np.nan)

    return run


def iter_live(sweeps: Sequence[Sweep], model: str = "live", whole: str = "universal") -> Iterator[Row]:
    """Rows of the table: per data set the median correlation of whole traces and of each lag, on the same cells.

    Frames of 33 ms, true spikes smoothed by 25 ms, no shift; two minutes of each sweep, eight cells of each data set.
    ``model`` (causal) and ``whole`` are models or folders of those that leave out a fold each, see `Models`.
    """
    datasets = {sweep.dataset for sweep in sweeps}
    streamed, complete = Models(model, datasets), Models(whole, datasets)
    pieces: dict[str, list[Piece]] = {}
    for piece in prepare([_begin(sweep) for sweep in sweeps], _FRAME_RATE):
        pieces.setdefault(piece.dataset, []).append(piece)
    here = SHIFTS.index(0)
    for dataset, found in sorted(pieces.items()):
        vae = streamed[dataset]
        lags = vae.recognition.lags if isinstance(vae.recognition, CausalNetwork) else ()
        methods = {"whole trace": calvae_method(complete[dataset])}
        methods |= {f"lag {lag}": live_method(vae, lag) for lag in lags}
        cells = sorted({piece.cell for piece in found})[:_CELLS]
        chosen = [piece for piece in found if piece.cell in cells]
        scores = {
            name: float(by_dataset(correlations(method, chosen, _SIGMA))[dataset][here])
            for name, method in methods.items()
        }
        yield {"data set": dataset, "cells": len(cells)} | scores


def write_live(rows: Sequence[Row], out: Path, made_by: str) -> None:
    """Write ``live.json`` and ``live.md`` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in rows[0] if name not in ("data set", "cells")]
    mean = {name: float(np.mean([float(str(row[name])) for row in rows])) for name in names}
    summary = [
        {"answer": name, "mean correlation": value, "lost against the whole trace": mean["whole trace"] - value}
        for name, value in mean.items()
    ]
    page = f"""# Spikes while a recording is going on

Made by `{made_by}`; do not edit by hand.

Traces come to `calvae.stream` second by second; the rate of a frame is told when as many frames more as the lag have
come. Median over cells of the correlation with true spikes, smoothed by 25 ms, at 30 Hz and without a shift; eight
cells of each data set, two minutes of each sweep. Shipped models have seen these data sets in training; of folders with
a model for each fold, made by `pretrained.train --fold`, none has seen the data set that it is scored on.

{to_table(summary)}

{to_table(rows)}
"""
    with whole_files(out / "live.json", out / "live.md") as (data, text):
        data.write_text(json.dumps({"made_by": made_by, "machine": machine(), "rows": rows}, indent=1) + "\n", "utf-8")
        text.write_text(page, encoding="utf-8")


def _begin(sweep: Sweep) -> Sweep:
    """The first two minutes of a sweep."""
    n = round(_SECONDS * sweep.frame_rate)
    return replace(sweep, dff=sweep.dff[:n])
