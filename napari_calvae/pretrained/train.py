"""Train the universal model: ``python -m napari_calvae.pretrained.train --data FOLDER --out FILE``.

With ``--live`` the one for recordings that are still going on.

Resumes from its checkpoint when called again with the same settings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Float

from napari_calvae.formats.ground_truth import read_ground_truth
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.metrics import describe
from napari_calvae.pretrained.kernels import align_clocks
from napari_calvae.pretrained.recordings import FOLDS, FRAME_RATES, RecordingSampler, Snippets
from napari_calvae.pretrained.simulations import SimulationSampler
from napari_calvae.recognition import CausalNetwork, FactorizedNetwork, RecognitionNetwork
from napari_calvae.training import TrainConfig, TrainRecord, iter_train
from napari_calvae.vae import Preprocessing, SpikeVAE

log = logging.getLogger("napari_calvae.train")

#: Frames per batch; snippets are 512 to 4,096 frames long, so that the gain is learned over short and long recordings.
BATCH_FRAMES = 12288
WINDOWS, SHARES = (512, 1024, 2048, 4096), (0.35, 0.4, 0.15, 0.1)
#: Models to simulate from unless told otherwise: those that need no loop over time.
MODELS_SIMULATED = "linear_ar,dye_binding,physiological"
#: The network that ships: half the multiplications of a U-Net that begins at the full rate, and as accurate.
UNIVERSAL: dict[str, Any] = {
    "widths": (24, 32, 48, 64, 96),
    "light": True,
    "local_gain": True,
    "min_frames": min(WINDOWS),
}
#: The one for recordings that are still going on.
LIVE: dict[str, Any] = {"width": 48, "min_frames": min(WINDOWS)}
#: Share of the batches in which a causal network is told what traces are as a whole, and the fewest frames that have to
#: tell it in the others; their number is log-uniform.
KNOWN_WHOLE, SHORTEST_KNOWN = 0.4, 96
#: Traces whose likeness a model remembers, about.
_SEEN = 800
#: Share of simulated snippets after the first steps.
SIMULATED = 0.25


def draw_batch(recordings: RecordingSampler, simulations: SimulationSampler, simulated: float, seed: int) -> Snippets:
    """Snippets of one common length, a share ``simulated`` of them from the generative models."""
    rng = np.random.default_rng(seed)
    window = int(rng.choice(WINDOWS, p=SHARES))
    n = BATCH_FRAMES // window
    out = Snippets(n, window)
    from_model = rng.random(n) < simulated
    simulations.fill(out, np.flatnonzero(from_model).tolist(), rng)
    recordings.fill(out, np.flatnonzero(~from_model).tolist(), rng)
    return out


def snippet_loss(network: RecognitionNetwork, batch: Snippets, generator: torch.Generator) -> Float[torch.Tensor, ""]:
    """Minus the log-probability of the true spikes of snippets, per frame.

    That of a causal network is the mean over two of its lags, and often what a trace is as a whole is told from its
    beginning alone: a recording that is going on is no better known.
    """
    counts = torch.from_numpy(batch.counts).clamp_max(network.max_count)
    scored = torch.from_numpy(batch.scored)
    fluorescence, frame_rate = torch.from_numpy(batch.fluorescence), torch.from_numpy(batch.frame_rate)
    if isinstance(network, CausalNetwork):
        lags = [network.lags[k] for k in torch.randperm(len(network.lags), generator=generator)[:2].tolist()]
        window = fluorescence.shape[1]
        whole, share = torch.rand(2, generator=generator).tolist()
        n_known = window if whole < KNOWN_WHOLE else round(SHORTEST_KNOWN * (window / SHORTEST_KNOWN) ** share)
        of_lags = network.every_lag(fluorescence, frame_rate, lags=lags, n_known=n_known).values()
        log_p = torch.stack([posterior.log_prob(counts, scored) for posterior in of_lags]).mean(0)
    else:
        log_p = network(fluorescence, frame_rate).log_prob(counts, scored)
    # Slow frames hold more spikes each, and would otherwise outweigh the fast ones.
    weight = torch.from_numpy(np.sqrt(batch.frame_rate / 30.0))
    return -(weight * log_p).sum() / (weight * scored.sum(-1)).sum()


def seen(recordings: RecordingSampler, simulations: SimulationSampler, seed: int) -> Float[np.ndarray, "trace 5"]:
    """What some of the traces are like that training shows."""
    rows = []
    for number in range(_SEEN // 8):
        batch = draw_batch(recordings, simulations, SIMULATED, seed + number)
        for trace, rate in list(zip(batch.fluorescence, batch.frame_rate, strict=True))[:8]:
            rows.append(describe(trace, float(rate)))
    found = np.concatenate(rows)
    return found[np.isfinite(found).all(-1)]


def universal_model(network: RecognitionNetwork, description: str) -> SpikeVAE:
    """A network for any cell with the linear model that reconstructs through it."""
    return SpikeVAE(
        recognition=network,
        generative=MODELS["linear_ar"](),
        prior=SpikePrior(rate=1.0, max_count=network.max_count),
        preprocessing=Preprocessing(min_frame_rate=FRAME_RATES[0], max_frame_rate=FRAME_RATES[1]),
        description=description,
    )


@dataclass(frozen=True)
class Recipe:
    """How long to train on what: a share of the steps on simulations alone, then a share of the snippets."""

    n_steps: int = 16000
    simulation_steps: float = 0.12
    simulated: float = SIMULATED
    seed: int = 0


def iter_pretrain(
    network: RecognitionNetwork,
    recordings: RecordingSampler,
    simulations: SimulationSampler,
    recipe: Recipe,
    checkpoint: Path | None = None,
) -> Iterator[TrainRecord]:
    """Train a network on recordings with known spikes and on simulations, in place."""
    config = TrainConfig(
        n_steps=recipe.n_steps,
        learning_rate=1.2e-3,
        warmup=0.02,
        ema=0.999,
        clip=0.3,
        seed=recipe.seed,
        checkpoint_every=250,
    )
    step = 0

    def loss(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        share = 1.0 if step < recipe.simulation_steps * recipe.n_steps else recipe.simulated
        batch_seed = int(torch.randint(2**62, (), generator=generator))
        return snippet_loss(network, draw_batch(recordings, simulations, share, batch_seed), generator), {}

    if checkpoint is not None and checkpoint.is_file():
        step = int(torch.load(checkpoint, weights_only=True)["step"])
    for record in iter_train(network, loss, config, checkpoint):
        step = record.step
        yield record


def main(
    data: Annotated[Path, typer.Option(help="Folder with the ground-truth .npz files")],
    out: Annotated[Path, typer.Option(help="Model file to write (.safetensors)")],
    steps: Annotated[int, typer.Option(help="Updates")] = 16000,
    fold: Annotated[int, typer.Option(min=0, max=len(FOLDS), help="Fold to leave out, from 1; 0 is none")] = 0,
    simulation_steps: Annotated[float, typer.Option(help="Share of the steps on simulations alone, at first")] = 0.12,
    models: Annotated[str, typer.Option(help="Models to simulate from, comma-separated")] = MODELS_SIMULATED,
    seed: Annotated[int, typer.Option(help="Seed of every random number")] = 0,
    live: Annotated[bool, typer.Option(help="Train the causal network instead")] = False,
) -> None:
    """Train the universal recognition network on recordings with known spikes and on simulations."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    left_out = FOLDS[fold - 1] if fold else ()
    sweeps = [s for s in read_ground_truth(data, min_duration=2.0) if not (left_out and s.dataset.startswith(left_out))]
    aligned, line = align_clocks(sweeps)
    recordings, simulations = RecordingSampler(aligned), SimulationSampler(models.split(","), line)
    torch.manual_seed(seed)
    network = CausalNetwork(**LIVE) if live else FactorizedNetwork(**UNIVERSAL)
    recipe = Recipe(n_steps=steps, simulation_steps=simulation_steps, seed=seed)
    recent = []
    for record in iter_pretrain(network, recordings, simulations, recipe, out.with_suffix(".checkpoint")):
        recent.append(record.loss)
        if record.step % 100 == 0:
            log.info("step %d of %d, loss %.4f, %.0f s", record.step, steps, np.mean(recent[-500:]), record.seconds)
    rest = ", ".join(left_out) or "nothing"
    name = "live" if live else "universal"
    model = universal_model(network, f"{name}; {steps} steps, seed {seed}, left out: {rest}")
    model.trained_on = seen(recordings, simulations, seed)
    model.save(out)
    log.info("saved %s", out)


if __name__ == "__main__":
    typer.run(main)
