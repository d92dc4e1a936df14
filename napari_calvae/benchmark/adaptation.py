"""What unsupervised adaptation to a recording gains, on data sets that the starting network never saw."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from napari_calvae.benchmark.accuracy import CONDITIONS, Models, score_cells
from napari_calvae.benchmark.ground_truth import SHIFTS, Piece, calvae_method
from napari_calvae.fitting import fit
from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.recording import Traces
from napari_calvae.vae import SpikeVAE

#: Frames of silence between the sweeps of a cell, and most of a cell that is adapted to (ten minutes at 30 Hz).
_GAP, _LONGEST = 64, 18_000


def as_recording(pieces: Sequence[Piece]) -> Traces:
    """The cells of a data set as one recording: their sweeps one after the other, missing frames between and behind."""
    cells: dict[str, list[np.ndarray]] = defaultdict(list)
    for piece in pieces:
        cells[piece.cell] += [piece.dff, np.full(_GAP, np.nan)]
    rows = [np.concatenate(parts)[:_LONGEST] for parts in cells.values()]
    values = np.full((len(rows), max(map(len, rows))), np.nan, np.float32)
    for row, trace in zip(values, rows, strict=True):
        row[: len(trace)] = trace
    return Traces(values, frame_rate=pieces[0].frame_rate, unit="dff")


def adaptation_rows(models: Models, sweeps: Sequence[Sweep]) -> Iterator[dict[str, Any]]:
    """Median correlation (30 Hz, σ = 25 ms) of each data set before and after `calvae.fit`, which sees no spikes."""
    condition = CONDITIONS[0]
    groups: dict[str, list[Piece]] = defaultdict(list)
    for piece in condition.pieces(sweeps):
        groups[piece.dataset].append(piece)
    for dataset, pieces in groups.items():
        recording = as_recording(pieces)
        began = time.perf_counter()
        adapted = fit(recording, base=models[dataset])
        seconds = time.perf_counter() - began
        before, after = (_correlation(model, pieces, condition.sigmas[0]) for model in (models[dataset], adapted))
        yield {
            "data set": dataset,
            "cells": recording.n_rois,
            "minutes each": round(recording.n_frames / condition.frame_rate / 60, 1),
            "before": before,
            "after": after,
            "gain": after - before,
            "seconds": seconds,
        }


def _correlation(model: SpikeVAE, pieces: Sequence[Piece], sigma: float) -> float:
    method = calvae_method(model)
    scores = score_cells([method(p.dff, p.frame_rate) for p in pieces], pieces, sigma)
    return float(np.nanmedian([s["correlation"][SHIFTS.index(0)] for s in scores.values()]))
