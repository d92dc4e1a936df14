"""What of the universal model carries: the same short training with one thing changed, on data sets left out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from napari_calvae.benchmark.accuracy import CONDITIONS, Models, interval_rows, rates_of, score_cells
from napari_calvae.benchmark.ground_truth import SHIFTS
from napari_calvae.benchmark.paper.record import to_table
from napari_calvae.formats import whole_files
from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.pretrained.kernels import align_clocks
from napari_calvae.pretrained.recordings import FOLDS, RecordingSampler
from napari_calvae.pretrained.simulations import SimulationSampler
from napari_calvae.pretrained.train import MODELS_SIMULATED, UNIVERSAL, Recipe, iter_pretrain, universal_model
from napari_calvae.recognition import AutoregressiveNetwork, FactorizedNetwork, RecognitionNetwork
from napari_calvae.training import read_history

_WIDTHS: Sequence[int] = UNIVERSAL["widths"]


def _network(**changed: Any) -> FactorizedNetwork:
    return FactorizedNetwork(**UNIVERSAL | changed)


@dataclass(frozen=True)
class Variant:
    """One row of the table: a network, and what it is trained on."""

    name: str
    network: Callable[[], RecognitionNetwork] = _network
    simulation_steps: float = 0.12
    simulated: float = 0.25
    aligned: bool = True


VARIANTS = (
    Variant("as shipped: counts, gain acting frame by frame, both kinds of data"),
    Variant("simulations only", simulation_steps=1.0, simulated=1.0),
    Variant("recordings only", simulation_steps=0.0, simulated=0.0),
    Variant("clocks of recordings as they are", aligned=False),
    Variant("gain acting on all frames alike", lambda: _network(local_gain=False)),
    Variant("no gain (categorical)", lambda: _network(local_gain=False, gain_scale=0.0)),
    Variant("no gain, Bernoulli", lambda: _network(local_gain=False, gain_scale=0.0, max_count=1)),
    Variant("autoregressive", AutoregressiveNetwork),
    Variant("from the full rate on", lambda: _network(light=False, widths=(16, 24, 32, 48, 64))),
    Variant("half as wide", lambda: _network(widths=[w // 2 for w in _WIDTHS])),
    Variant("twice as wide", lambda: _network(widths=[2 * w for w in _WIDTHS])),
)


def ablation_rows(
    sweeps: Sequence[Sweep],
    out: Path,
    recipe: Recipe,
    fold: int = 1,
    variants: Sequence[Variant] = VARIANTS,
) -> Iterator[dict[str, Any]]:
    """Train every variant without one fold, score it there (30 Hz), and write ``ablation.json`` as rows come.

    Each variant has its own checkpoint in ``out`` and goes on from it; a finished one is not trained again.

    Parameters
    ----------
    sweeps
        All ground truth.
    out
        Folder for checkpoints and record.
    recipe
        Steps and seed; what a variant is trained on is its own matter.
    fold
        The one that is left out, from 1.
    """
    out.mkdir(parents=True, exist_ok=True)
    left_out = FOLDS[fold - 1]
    known = [s for s in sweeps if not s.dataset.startswith(left_out)]
    aligned, line = align_clocks(known)
    unseen = [s for s in sweeps if s.dataset.startswith(left_out)]
    simulations = SimulationSampler(MODELS_SIMULATED.split(","), line)
    rows = []
    for number, variant in enumerate(variants):
        torch.manual_seed(recipe.seed)
        network = variant.network()
        chosen = replace(recipe, simulation_steps=variant.simulation_steps, simulated=variant.simulated)
        checkpoint = out / f"variant{number}.checkpoint"
        recordings = RecordingSampler(aligned if variant.aligned else known)
        for _ in iter_pretrain(network, recordings, simulations, chosen, checkpoint):
            pass
        row = {"variant": variant.name, **_score(Models(universal_model(network, variant.name)), unseen)}
        row["parameters"] = sum(p.numel() for p in network.parameters())
        rows.append(row | {"seconds of training": round(read_history(checkpoint)[-1].seconds)})
        with whole_files(out / "ablation.json", out / "ablation.md") as (data, text):
            content = {"steps": recipe.n_steps, "seed": recipe.seed, "left out": left_out, "rows": rows}
            data.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            text.write_text(_to_markdown(content), encoding="utf-8")
        yield rows[-1]


def _to_markdown(content: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Ablation",
            "",
            f"Each variant was trained for {content['steps']} steps (seed {content['seed']}) without "
            f"{', '.join(content['left out'])}, and scored on these at 30 Hz: means over data sets. "
            "Made by `calvae benchmark ablation`; do not edit by hand.",
            "",
            to_table(content["rows"]),
            "",
        ]
    )


def _score(models: Models, sweeps: Sequence[Sweep]) -> dict[str, float]:
    """Means over data sets: correlation as it comes, error of spike numbers, and share of truths in 90 % intervals."""
    condition = CONDITIONS[0]
    pieces = condition.pieces(sweeps)
    rates = rates_of(models, pieces)
    out: dict[str, float] = {}
    for sigma in condition.sigmas:
        groups: dict[str, list[float]] = defaultdict(list)
        ratios = []
        for cell, scores in score_cells(rates, pieces, sigma).items():
            groups[cell.split("/")[0]].append(scores["correlation"][SHIFTS.index(0)])
            ratios.append(scores["count ratio"])
        out[f"σ {1000 * sigma:g} ms"] = float(np.mean([np.nanmedian(g) for g in groups.values()]))
        out["abs(log spikes)"] = float(np.nanmedian(np.abs(np.log(ratios))))
    rows = list(interval_rows(models, pieces))
    for window in sorted({r["window"] for r in rows}):
        out[f"90 % in {window:g} s"] = float(np.mean([r["90%"] for r in rows if r["window"] == window]))
    return out
