"""The table of accuracy: ours and OASIS on the same traces in one run, each data set by a model that never saw it."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from napari_calvae.benchmark.ground_truth import (
    MARGIN,
    SHIFTS,
    Method,
    Piece,
    oasis_method,
    prepare,
    suite2p_method,
)
from napari_calvae.formats import whole_files
from napari_calvae.formats.ground_truth import Sweep, read_ground_truth
from napari_calvae.metrics import randomised_pit, score_bias, score_correlation, score_error, smooth_spikes
from napari_calvae.pretrained.recordings import FOLDS
from napari_calvae.recognition import CHUNK, SpikePosterior
from napari_calvae.recognition.factorized import FactorizedNetwork, GainCategorical
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.vae import SpikeVAE, load_model

OURS = "calvae"
#: Said of a model that is not one of folds: its training may have seen what it is scored on.
_SEEN = "{}; what it has learned from is not held out (shipped models have seen all of the ground truth)"
RIVALS = ("OASIS AR1", "OASIS AR2", "suite2p")
#: Factors on the deviation of the log-gain that are tried where it is calibrated.
GAIN_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
#: Lengths (s) of the windows in which spikes are counted, and probabilities of the intervals.
WINDOWS, LEVELS = (1.0, 10.0), (0.1, 0.3, 0.5, 0.7, 0.9)
#: Those among them that targets are set for, and the gain is calibrated by.
JUDGED = (0.9, 0.5)
_N_SAMPLES = 100
#: Isolated spikes have no other within this time (s), and are looked for within half of it.
_ISOLATED = 0.2


@dataclass(frozen=True)
class Condition:
    """How traces are shown: frame rate (Hz), white noise added (%/√Hz), and widths (s) that truth is smoothed by."""

    name: str
    frame_rate: float
    noise: float
    sigmas: tuple[float, ...]

    def pieces(self, sweeps: Sequence[Sweep]) -> list[Piece]:
        """Sweeps that were recorded at this rate at least; at 30 Hz all are, as people bring them."""
        fast = [s for s in sweeps if self.frame_rate == 30.0 or s.frame_rate >= 0.95 * self.frame_rate]
        return prepare(fast, self.frame_rate, self.noise)


CONDITIONS = (
    Condition("30 Hz", 30.0, 0.0, (0.025, 0.05, 0.2)),
    Condition("30 Hz, ν = 8 %/√Hz added", 30.0, 8.0, (0.025,)),
    Condition("7.5 Hz", 7.5, 0.0, (0.2,)),
    Condition("100 Hz", 100.0, 0.0, (0.015,)),
)


class Models:
    """Which model sees which data set: one for all, or of each fold the one that never saw it.

    Parameters
    ----------
    source
        A model, its name or file, or a folder of ``fold1.safetensors`` … as ``pretrained.train --fold`` makes them.
    datasets
        Those that will be asked for; of the folder the models of their folds have to be there, by default all.
    """

    def __init__(self, source: str | Path | SpikeVAE, datasets: Iterable[str] | None = None) -> None:
        folder = None if isinstance(source, SpikeVAE) else Path(source)
        self.folds = folder is not None and folder.is_dir()
        if folder is None or not self.folds:
            self.models = {0: load_model(source)}
            return
        needed = range(len(FOLDS)) if datasets is None else sorted({self.fold(name) for name in datasets})
        files = {k: folder / f"fold{k + 1}.safetensors" for k in needed}
        missing = [f.name for f in files.values() if not f.is_file()]
        if missing:
            raise RecordingError(f"folds: expected a model of every fold in {folder}, found no {', '.join(missing)}.")
        self.models = {k: load_model(file) for k, file in files.items()}

    @property
    def networks(self) -> dict[int, FactorizedNetwork]:
        """Of every model, by fold."""
        networks: dict[int, FactorizedNetwork] = {}
        for fold, network in ((k, model.recognition) for k, model in self.models.items()):
            if not isinstance(network, FactorizedNetwork):
                raise RecordingError(f"accuracy: expected a model with a factorized network, got {network.name}.")
            networks[fold] = network
        return networks

    def fold(self, dataset: str) -> int:
        """Number of the model for a data set."""
        if not self.folds:
            return 0
        found = [k for k, names in enumerate(FOLDS) if dataset.split("-")[0] in names]
        if not found:
            raise RecordingError(f"folds: expected one that leaves out {dataset}, found none. Give one model for all.")
        return found[0]

    def __getitem__(self, dataset: str) -> SpikeVAE:
        return self.models[self.fold(dataset)]


@torch.inference_mode()
def posterior_of(model: SpikeVAE, piece: Piece) -> SpikePosterior:
    """What the model's network makes of one trace."""
    dff = model.preprocessing.apply(Traces(piece.dff, frame_rate=piece.frame_rate))
    observed, valid = torch.from_numpy(dff.values.copy()), torch.from_numpy(dff.valid.copy())
    return model.recognition.eval()(observed, dff.frame_rate, valid, chunk=CHUNK)


def rates_of(models: Models, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """(time,) posterior means (spikes/s)."""
    return [posterior_of(models[p.dataset], p).mean[0].numpy() * p.frame_rate for p in pieces]


def rivals() -> dict[str, Method]:
    """OASIS with estimated parameters, and as suite2p runs it."""
    return dict(zip(RIVALS, (oasis_method(1), oasis_method(2), suite2p_method()), strict=True))


def score_cells(rates: Sequence[np.ndarray], pieces: Sequence[Piece], sigma: float) -> dict[str, dict[str, Any]]:
    """Per cell, over all its sweeps: (shift,) correlations, and error, bias and spikes found over true ones."""
    cells: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = defaultdict(list)
    for rate, piece in zip(rates, pieces, strict=True):
        window = slice(MARGIN, len(piece.counts) - MARGIN)
        truth = smooth_spikes(piece.counts, piece.frame_rate, sigma)[window]
        shifted = np.stack([np.roll(rate, shift)[window] for shift in SHIFTS])
        cells[piece.cell].append((shifted, truth, piece.counts[window] * piece.frame_rate))
    scores = {}
    for cell, parts in cells.items():
        rate, truth, counts = (np.concatenate(x, -1) for x in zip(*parts, strict=True))
        own = rate[SHIFTS.index(0)]
        scores[cell] = {
            "correlation": score_correlation(rate, truth),
            "error": float(score_error(own, truth)),
            "bias": float(score_bias(own, truth)),
            "count ratio": float(own.sum() / counts.sum()) if counts.sum() else np.nan,
        }
    return scores


def accuracy_rows(condition: Condition, models: Models, sweeps: Sequence[Sweep]) -> Iterator[dict[str, Any]]:
    """Of each data set, method and width the median over cells.

    ``correlation`` is as it comes for ours, and at one shift of whole frames for each rival: the one that is best for
    it in the mean over data sets; ``at best shift`` is at the shift that is best for the data set, for all.
    """
    pieces = condition.pieces(sweeps)
    rates = {OURS: rates_of(models, pieces)}
    rates |= {name: [method(p.dff, p.frame_rate) for p in pieces] for name, method in rivals().items()}
    for sigma, (name, found) in itertools.product(condition.sigmas, rates.items()):
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for cell, scores in score_cells(found, pieces, sigma).items():
            groups[cell.split("/")[0]].append(scores)
        table = {d: np.nanmedian([s["correlation"] for s in group], 0) for d, group in groups.items()}
        constant = int(np.argmax(np.nanmean(list(table.values()), 0)))
        shift = SHIFTS.index(0) if name == OURS else constant
        for dataset, group in groups.items():
            row = {"condition": condition.name, "data set": dataset, "cells": len(group), "method": name}
            row |= {"sigma": sigma, "shift": SHIFTS[shift], "correlation": float(table[dataset][shift])}
            row["at best shift"] = float(np.nanmax(table[dataset]))
            if name == OURS:
                ratio = np.array([s["count ratio"] for s in group])
                row["error"], row["bias"] = (float(np.nanmedian([s[k] for s in group])) for k in ("error", "bias"))
                row["log count ratios"] = [round(float(x), 3) for x in np.log(ratio[np.isfinite(ratio)].clip(1e-3))]
            yield row


@torch.inference_mode()
def interval_rows(
    models: Models,
    pieces: Sequence[Piece],
    seed: int = 0,
    see: Callable[[SpikeVAE, Piece], SpikePosterior] = posterior_of,
) -> Iterator[dict[str, Any]]:
    """Of each data set and length of window: share of true counts within central intervals, and widths.

    By randomised PIT over windows with at least half an expected spike: chosen by the prediction, never by the truth.
    The oracle's intervals are those of the same posterior with its gain, where it has one, set so that the expected
    number of spikes in the sweep is the true one. ``see`` is what is made of a trace.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found: dict[tuple[str, float], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = defaultdict(list)
    for piece in pieces:
        wide = see(models[piece.dataset], piece)
        known = _oracle(wide, float(piece.counts.sum()))
        samples, best = (x.sample(_N_SAMPLES, generator)[:, 0].numpy() for x in (wide, known))
        expected = wide.mean[0].numpy()
        for window in WINDOWS:
            step = round(window * piece.frame_rate)
            n = len(piece.counts) // step
            if n < 2:
                continue
            drawn, sure, truth, mean = (
                x[..., : n * step].reshape(*x.shape[:-1], n, step).sum(-1, dtype=float)
                for x in (samples, best, piece.counts, expected)
            )
            chosen = mean >= 0.5
            if chosen.any():
                pit = randomised_pit(drawn[:, chosen], truth[chosen], rng)
                widths = (np.subtract(*np.quantile(x[:, chosen], [0.95, 0.05], axis=0)) for x in (drawn, sure))
                found[piece.dataset, window].append((pit, *widths))
    for (dataset, window), parts in found.items():
        pit, width, least = (np.concatenate(x) for x in zip(*parts, strict=True))
        scale = float(models[dataset].recognition.config.get("gain_scale", 1.0))
        row: dict[str, Any] = {"data set": dataset, "window": window, "windows": len(pit), "gain scale": scale}
        row |= {f"{level:.0%}": float((np.abs(pit - 0.5) <= level / 2).mean()) for level in LEVELS}
        yield row | {"width": float(width.mean()), "width of the oracle": float(least.mean())}


def _oracle(posterior: SpikePosterior, total: float) -> SpikePosterior:
    """The posterior at the gain at which the expected number of spikes is ``total``; unchanged if it has none."""
    if not isinstance(posterior, GainCategorical):
        return posterior
    return posterior.given(posterior.gain_for(torch.tensor([total])), torch.zeros(1))


def calibrate(rows: Sequence[Mapping[str, Any]]) -> float:
    """The gain scale whose intervals, of all lengths and levels, come closest to right in the mean over data sets."""
    error: dict[float, list[float]] = defaultdict(list)
    for scale in sorted({row["gain scale"] for row in rows}):
        for window, level in itertools.product(WINDOWS, JUDGED):
            inside = [r[f"{level:.0%}"] for r in rows if r["window"] == window and r["gain scale"] == scale]
            error[scale].append(abs(float(np.mean(inside)) - level) if inside else 0.0)
    return min(error, key=lambda scale: sum(error[scale]))


def timing_rows(models: Models, sweeps: Sequence[Sweep], frame_rate: float = 120.0) -> Iterator[dict[str, Any]]:
    """Of each data set that is fast enough: distance (ms) between isolated spikes and the peak of the rate near them.

    A spike is matched if half a spike or more is expected within 0.1 s of it.
    """
    pieces = prepare([s for s in sweeps if s.frame_rate >= 0.95 * frame_rate], frame_rate)
    found: dict[str, list[float]] = defaultdict(list)
    total: dict[str, int] = defaultdict(int)
    reach, alone = round(_ISOLATED / 2 * frame_rate), round(_ISOLATED * frame_rate)
    for piece, rate in zip(pieces, rates_of(models, pieces), strict=True):
        frames = np.flatnonzero(piece.counts)
        gaps = np.diff(frames, prepend=-alone - 1, append=len(rate) + alone + 1)
        single = (piece.counts[frames] == 1) & (gaps[:-1] > alone) & (gaps[1:] > alone)
        for frame in frames[single & (frames >= MARGIN) & (frames < len(rate) - MARGIN)]:
            near = rate[frame - reach : frame + reach + 1]
            total[piece.dataset] += 1
            if near.sum() / frame_rate >= 0.5:
                found[piece.dataset].append(abs(int(near.argmax()) - reach) / frame_rate)
    for dataset, n_isolated in total.items():
        distances = found[dataset]
        yield {
            "data set": dataset,
            "isolated spikes": n_isolated,
            "matched": len(distances),
            "median distance (ms)": 1000 * float(np.median(distances)) if distances else None,
        }


@torch.inference_mode()
def example_rows(
    models: Models, pieces: Sequence[Piece], n: int = 10, seconds: float = 20.0
) -> Iterator[dict[str, Any]]:
    """A stretch of the middle cell of some data sets: ΔF/F, spikes, and 20 samples of the posterior (frames).

    Neither the cell nor the stretch is chosen by what ours makes of it: the cell is the middle one by its number of
    spikes, the stretch the middle one of those with spikes by theirs.
    """
    groups: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        if len(piece.dff) >= seconds * piece.frame_rate:
            groups[piece.dataset].append(piece)
    names = sorted(groups)
    for name in (names[k] for k in np.unique(np.linspace(0, len(names) - 1, n).round().astype(int))):
        piece = sorted(groups[name], key=lambda p: p.counts.mean())[len(groups[name]) // 2]
        step = round(seconds * piece.frame_rate)
        counts = piece.counts[: len(piece.counts) // step * step].reshape(-1, step)
        busy = np.flatnonzero(counts.sum(1)) if counts.any() else np.arange(len(counts))
        window = busy[np.argsort(counts[busy].sum(1), kind="stable")[len(busy) // 2]]
        frames = slice(window * step, (window + 1) * step)
        samples = posterior_of(models[name], piece).sample(20, torch.Generator().manual_seed(0))[:, 0, frames]
        yield {
            "data set": name,
            "cell": piece.cell,
            "frame rate": piece.frame_rate,
            "dff": [round(float(x), 4) for x in np.nan_to_num(piece.dff[frames])],
            "spikes": np.repeat(np.arange(step), piece.counts[frames]).tolist(),
            "samples": [row.nonzero()[:, 0].tolist() for row in samples],
        }


def study(
    data: Path, source: str | Path = "universal", only: str = "", conditions: Sequence[Condition] = CONDITIONS
) -> dict[str, Any]:
    """Measure everything; a record that JSON can hold.

    With a folder of models each data set is seen by the one that never saw it, and its gain scale is the one that is
    best on the data sets of the other folds, found with their models; with one model it is the model's own.
    """
    began = time.perf_counter()
    models = Models(source)
    sweeps = read_ground_truth(data, only=only)
    pieces = CONDITIONS[0].pieces(sweeps)
    scales: dict[str, float] = {}
    if models.folds:
        tried: list[dict[str, Any]] = []
        for scale in GAIN_SCALES:
            for network in models.networks.values():
                network.set_gain_scale(scale)
            tried += interval_rows(models, pieces)
        for fold, network in models.networks.items():
            network.set_gain_scale(calibrate([row for row in tried if models.fold(row["data set"]) != fold]))
            scales[f"fold {fold + 1}"] = network.gain_scale
        scales["all"] = calibrate(tried)
        intervals = [r for r in tried if r["gain scale"] == scales[f"fold {models.fold(r['data set']) + 1}"]]
    else:
        intervals = list(interval_rows(models, pieces))
    return {
        "model": "cross-validated: each data set by a model of other folds" if models.folds else _SEEN.format(source),
        "gain scales": scales,
        "accuracy": [row for condition in conditions for row in accuracy_rows(condition, models, sweeps)],
        "intervals": intervals,
        "timing": list(timing_rows(models, sweeps)),
        "examples": list(example_rows(models, pieces)),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("napari-calvae", "torch", "numpy")},
    }


def summary_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The few numbers that matter."""
    rows: list[dict[str, Any]] = []
    table: dict[tuple[str, float], dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for r in record["accuracy"]:
        table[r["condition"], r["sigma"]][r["data set"]][r["method"]] = r
    for (condition, sigma), sets in table.items():
        ours = np.array([s[OURS]["correlation"] for s in sets.values()])
        best = np.array([max(s[m]["at best shift"] for m in ("OASIS AR1", "OASIS AR2")) for s in sets.values()])
        row = {"condition": condition, "σ (ms)": 1000 * sigma, "data sets": len(ours), OURS: float(ours.mean())}
        row |= {m: float(np.mean([s[m]["correlation"] for s in sets.values()])) for m in RIVALS}
        every = np.array([max(s[m]["at best shift"] for m in RIVALS) for s in sets.values()])
        row["better OASIS at its best shift"] = float(best.mean())
        row |= {"lead": float((ours - best).mean()), "lead, suite2p counted too": float((ours - every).mean())}
        rows.append(row | {"ahead in": int((ours > best).sum()), "ahead of all in": int((ours > every).sum())})
    return rows


def other_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts, intervals and timing, each in one number."""
    first = next(r for r in record["accuracy"] if r["method"] == OURS)
    ours = [r for r in record["accuracy"] if r["method"] == OURS and r["condition"] == first["condition"]]
    ratios = [x for r in ours if r["sigma"] == first["sigma"] for x in r["log count ratios"]]
    rows = [
        {"measure": "median over cells of |log(predicted/true spikes)|", "value": float(np.median(np.abs(ratios)))},
        {"measure": "median over cells of log(predicted/true spikes)", "value": float(np.median(ratios))},
    ]
    for window in WINDOWS:
        chosen = [r for r in record["intervals"] if r["window"] == window]
        for level in JUDGED:
            value = float(np.mean([r[f"{level:.0%}"] for r in chosen]))
            rows.append({"measure": f"{level:.0%} intervals in {window:g} s, mean over data sets", "value": value})
        ratio = float(np.mean([r["width"] / max(r["width of the oracle"], 1e-9) for r in chosen]))
        rows.append({"measure": f"width of 90% intervals in {window:g} s over that of the oracle", "value": ratio})
    rows += [
        {
            "measure": f"{r['data set']}: median distance (ms) of the {r['matched']} of {r['isolated spikes']} "
            "isolated spikes near which half a spike is expected",
            "value": r["median distance (ms)"],
        }
        for r in record["timing"]
        if r["matched"]
    ]
    return rows


def write_study(record: Mapping[str, Any], out: Path) -> None:
    """Write ``accuracy.json``, ``accuracy.md`` and its figures, of correlation and of intervals, into a folder."""
    from napari_calvae.benchmark.figures import correlation_figure, example_figure, reliability_figure
    from napari_calvae.benchmark.paper.record import to_table

    out.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Accuracy",
        "",
        f"Model: {record['model']}. Made by `calvae benchmark accuracy`; do not edit by hand.",
        "",
    ]
    parts += [to_table(summary_rows(record)), "", to_table(other_rows(record)), ""]
    for condition in dict.fromkeys(r["condition"] for r in record["accuracy"]):
        chosen = [r for r in record["accuracy"] if r["condition"] == condition]
        sigma = chosen[0]["sigma"]
        sets: dict[str, dict[str, Any]] = defaultdict(dict)
        for r in (r for r in chosen if r["sigma"] == sigma):
            sets[r["data set"]]["data set"] = r["data set"]
            sets[r["data set"]]["cells"] = r["cells"]
            sets[r["data set"]][r["method"]] = r["correlation"]
            sets[r["data set"]][f"{r['method']}, best shift"] = r["at best shift"]
        parts += [f"## {condition}, σ = {1000 * sigma:g} ms", "", to_table(list(sets.values())), ""]
    parts += ["## Intervals of counts", "", to_table(record["intervals"]), ""]
    parts += ["![correlation](accuracy.png)", "", "![intervals](reliability.png)", "", "![examples](examples.png)", ""]
    files = [out / name for name in ("accuracy.json", "accuracy.md", "accuracy.png", "reliability.png", "examples.png")]
    with whole_files(*files) as (data, text, picture, reliability, examples):
        data.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        text.write_text("\n".join(parts), encoding="utf-8")
        correlation_figure(record["accuracy"], picture)
        reliability_figure(record["intervals"], reliability)
        example_figure(record["examples"], examples)
