"""Real GCaMP6s without, with some and with all true spikes: what is learned carries over to cells never seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from napari_calvae.benchmark.ground_truth import SHIFTS, Piece, calvae_method, correlations, oasis_method, prepare
from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.benchmark.paper.simulated import simulation_model
from napari_calvae.fitting import fit
from napari_calvae.formats.ground_truth import read_ground_truth
from napari_calvae.generative import DriftingNoise, DyeBinding
from napari_calvae.recording import Traces
from napari_calvae.training import TrainConfig
from napari_calvae.vae import SpikeVAE

_DATASETS = ("DS13", "DS16")
#: Settings of all fits: the same whatever the objective, so that it alone differs. They, the generative model and its
#: noise were chosen among a few on other GCaMP6s (DS15, DS40), nothing on the cells of this proof.
_CONFIG = TrainConfig(n_steps=100, learning_rate=3e-4, batch=8, window=256, n_samples=16)
_SIGMA = 0.05


@dataclass(frozen=True, eq=False)
class _Cells:
    """Sweeps of some cells at 30 Hz, and the same as one recording, the shorter ones followed by missing frames."""

    pieces: list[Piece]

    @property
    def traces(self) -> Traces:
        """(cell, time) ΔF/F."""
        return Traces(self._stacked([p.dff for p in self.pieces], np.nan), frame_rate=30.0, unit="dff")

    @property
    def counts(self) -> np.ndarray:
        """(cell, time) true spikes per frame; none where frames are missing."""
        return self._stacked([p.counts for p in self.pieces], 0)

    @staticmethod
    def _stacked(rows: list[np.ndarray], fill: float) -> np.ndarray:
        length = max(len(row) for row in rows)
        return np.stack([np.pad(row.astype(float), (0, length - len(row)), constant_values=fill) for row in rows])


def _split(setting: Setting) -> tuple[_Cells, _Cells]:
    """Half of the cells of each data set to train on, the other half to judge by."""
    rng = np.random.default_rng(setting.seed)
    sweeps = [s for s in read_ground_truth(setting.ground_truth()) if s.dataset.startswith(_DATASETS)]
    pieces = prepare(sweeps)
    seen, unseen = [], []
    for dataset in dict.fromkeys(p.dataset for p in pieces):
        own = [p for p in pieces if p.dataset == dataset]
        order = rng.permutation(len(own))[: 4 if setting.quick else len(own)]
        half = len(order) // 2
        seen += [own[i] for i in order[:half]]
        unseen += [own[i] for i in order[half:]]
    return _Cells(seen), _Cells(unseen)


def _start(setting: Setting) -> SpikeVAE:
    """The network that has seen simulations only, with a dye that saturates and a baseline that drifts."""
    return replace(simulation_model(setting), generative=DyeBinding(DriftingNoise(spacing=2.0)))


def _config(setting: Setting) -> TrainConfig:
    small = {"n_steps": 2, "n_samples": 2} if setting.quick else {}
    return _CONFIG.model_copy(update={"seed": setting.seed, **small})


def _scores(method: Callable[[np.ndarray, float], np.ndarray], unseen: _Cells) -> dict[str, float]:
    """Median over cells of the correlation as it comes and at the best constant shift, for each data set."""
    per_cell = correlations(method, unseen.pieces, _SIGMA)
    tables = {
        dataset[:4]: np.nanmedian([v for cell, v in per_cell.items() if cell.startswith(dataset)], 0)
        for dataset in dict.fromkeys(p.dataset for p in unseen.pieces)
    }
    best = int(np.nanargmax(np.nanmean(list(tables.values()), 0)))
    as_is = {f"{name}, as it comes": float(t[SHIFTS.index(0)]) for name, t in tables.items()}
    return as_is | {f"{name}, shifted": float(t[best]) for name, t in tables.items()}


def _count_error(model: SpikeVAE, unseen: _Cells) -> float:
    """Median over cells of |log(inferred / true spikes)|, half a spike added to both."""
    method = calvae_method(model)
    found = [np.nansum(method(p.dff, p.frame_rate)) / p.frame_rate for p in unseen.pieces]
    true = [p.counts.sum() for p in unseen.pieces]
    return float(np.median(np.abs(np.log((np.array(found) + 0.5) / (np.array(true) + 0.5)))))


def _unsupervised(setting: Setting) -> Iterator[Row]:
    seen, unseen = _split(setting)
    start = _start(setting)

    def row(name: str, kept: str, model: SpikeVAE | None, method: Callable | None = None) -> Row:
        scores = _scores(method or calvae_method(model or start), unseen)
        error: float | str = _count_error(model, unseen) if model else "–"
        return {"method": name, **scores, "count error": error, "kept": kept}

    yield row("start: simulations only", "–", start)
    for objective in ("vimco", "wake_sleep", "sleep"):
        model = fit(seen.traces, start, objective, config=_config(setting))
        yield row(objective, "no" if "not kept" in model.description else "yes", model)
    for order in (1, 2):
        yield row(f"OASIS AR{order}", "–", None, oasis_method(order))


def _labels(setting: Setting) -> Iterator[Row]:
    seen, unseen = _split(setting)
    start = _start(setting)
    config, n = _config(setting), len(seen.pieces)
    order = np.random.default_rng(setting.seed + 1).permutation(n)
    for n_labelled in (0, 1, n) if setting.quick else (0, 1, 2, 5, n):
        labelled = np.isin(np.arange(n), order[:n_labelled])
        spikes = np.where(labelled[:, None], seen.counts, np.nan)
        if n_labelled == 0:
            both, alone = fit(seen.traces, start, "wake_sleep", config=config), start
        else:
            both = fit(seen.traces, start, "semi_supervised", spikes=spikes, config=config)
            known = seen.traces.select(np.flatnonzero(labelled).tolist())
            alone = fit(known, start, "supervised", spikes=seen.counts[labelled], config=config)
        for name, model in (("labelled and others", both), ("labelled alone", alone)):
            scores = _scores(calvae_method(model), unseen)
            yield {
                "labelled cells": n_labelled,
                "trained on": name,
                **scores,
                "count error": _count_error(model, unseen),
            }


UNSUPERVISED = Proof(
    "unsupervised",
    "Unsupervised on real GCaMP6s, judged on cells never seen",
    "Half of the cells of DS13 and DS16 (GCaMP6s, 30 Hz) are fitted without true spikes, from a network that has met "
    "no recording; correlation with the true rate (σ = 50 ms, median over the other half) as it comes and at the best "
    "constant shift, against OASIS with estimated parameters. Count error: median |log(inferred/true)|. Kept: whether "
    "the held-out check of `calvae.fit` took the fitted network.",
    _unsupervised,
    real=True,
)
LABELS = Proof(
    "labels",
    "Semi-supervised: how many labelled cells it takes",
    "The same cells and start; of the seen half some have their true spikes, the others only their fluorescence "
    "(objective `semi_supervised`, weight of labels 10), against training on the labelled cells alone.",
    _labels,
    real=True,
)
