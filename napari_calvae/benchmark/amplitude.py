"""What it is worth to know how much fluorescence a spike makes, as one may from other cells of the preparation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from napari_calvae.benchmark.accuracy import CONDITIONS, WINDOWS, Models, interval_rows, posterior_of, score_cells
from napari_calvae.benchmark.ground_truth import Piece
from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.inference import InferConfig, with_amplitude
from napari_calvae.recognition import SpikePosterior
from napari_calvae.vae import SpikeVAE


@torch.inference_mode()
def amplitude_rows(models: Models, sweeps: Sequence[Sweep], spread: float | None = None) -> list[dict[str, Any]]:
    """Numbers of spikes over all cells, and intervals in the mean over data sets (30 Hz), by what is known.

    Known of each cell is nothing, or the median over the other cells of its data set of the amplitude at which our
    spikes are as many as the true ones. ``spread`` is how much cells are taken to differ about it, by default as in
    `InferConfig`.
    """
    pieces = CONDITIONS[0].pieces(sweeps)
    fitted = _amplitudes(models, pieces)
    spread = InferConfig().amplitude_spread if spread is None else spread

    def told(model: SpikeVAE, piece: Piece) -> SpikePosterior:
        others = [a for cell, a in fitted[piece.dataset].items() if cell != piece.cell]
        posterior = posterior_of(model, piece)
        if not others:
            return posterior
        return with_amplitude(posterior, model, _seen(piece), (math.exp(np.median(others)), spread))

    differ = float(np.median([np.std(list(cells.values())) for cells in fitted.values()]))
    rows = []
    for known, see in (("nothing", posterior_of), (f"amplitude, spread {spread:g}", told)):
        rates = [see(models[p.dataset], p).mean[0].numpy() * p.frame_rate for p in pieces]
        scores = score_cells(rates, pieces, CONDITIONS[0].sigmas[0]).values()
        ratio = np.array([s["count ratio"] for s in scores])
        off = np.log(ratio[np.isfinite(ratio)].clip(1e-3))
        row = {"known": known, "cells": len(off), "abs(log counts)": float(np.median(np.abs(off)))}
        row |= {"log counts": float(np.median(off)), "cells differ by": differ}
        intervals = list(interval_rows(models, pieces, see=see))
        for window in WINDOWS:
            found = [r for r in intervals if r["window"] == window]
            for level in ("90%", "50%"):
                row[f"{level}, {window:g} s"] = float(np.mean([r[level] for r in found]))
            widths = [r["width"] / max(r["width of the oracle"], 1e-9) for r in found]
            row[f"width, {window:g} s"] = float(np.mean(widths))
        rows.append(row)
    return rows


def _amplitudes(models: Models, pieces: Sequence[Piece]) -> dict[str, dict[str, float]]:
    """By data set and cell the logarithm of the amplitude (ΔF/F) at which we would find as many spikes as there are."""
    found: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for piece in pieces:
        model = models[piece.dataset]
        mean = posterior_of(model, piece).mean
        observed, valid, frame_rate = _seen(piece)
        amplitude = float(model.generative.initial_theta(observed, mean, frame_rate, valid)["amplitude"])
        found[piece.dataset, piece.cell] += float(mean.sum()) * amplitude, piece.counts.sum()
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for (dataset, cell), (total, true) in found.items():
        if true:
            out[dataset][cell] = math.log(max(total, 1e-9) / true)
    return out


def _seen(piece: Piece) -> tuple[torch.Tensor, torch.Tensor, float]:
    """ΔF/F (1, time), which frames are measured, and the frame rate (Hz)."""
    observed = torch.from_numpy(np.array(piece.dff, np.float32))[None]
    return observed, torch.isfinite(observed), piece.frame_rate
