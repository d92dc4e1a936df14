"""Train the spine model: ``python -m napari_calvae.pretrained.train_spines --out FILE``.

Resumes from its checkpoint when called again with the same settings.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from napari_calvae.generative import DendriticSpine, SpikePrior
from napari_calvae.pretrained.dendrites import FRAME_RATES, Dendrites, simulate_dendrites
from napari_calvae.recognition import SpineNetwork
from napari_calvae.training import TrainConfig, iter_train
from napari_calvae.vae import Preprocessing, SpikeVAE

log = logging.getLogger("napari_calvae.train_spines")

#: Trace-frames per batch, and the lengths of its recordings (frames) with their shares.
BATCH_FRAMES = 12288
WINDOWS, SHARES = (512, 1024, 2048, 4096), (0.35, 0.35, 0.2, 0.1)
#: Numbers of spines per dendrite, as far as they fit.
SPINES = (1, 2, 3, 5, 8)


def draw_batch(seed: int) -> Dendrites:
    """Dendrites of one length, number of spines and frame rate."""
    rng = np.random.default_rng(seed)
    window = int(rng.choice(WINDOWS, p=SHARES))
    n_spines = int(rng.choice([n for n in SPINES if (1 + n) * window <= BATCH_FRAMES]))
    n_dendrites = BATCH_FRAMES // ((1 + n_spines) * window)
    return simulate_dendrites(n_dendrites, n_spines, window, int(rng.integers(2**62)))


def main(
    out: Annotated[Path, typer.Option(help="Model file to write (.safetensors)")],
    steps: Annotated[int, typer.Option(help="Updates")] = 8000,
    gain_scale: Annotated[float, typer.Option(help="Widening of the gains, calibrated on other simulations")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of every random number")] = 0,
) -> None:
    """Train the recognition network of a shaft and its spines on simulated dendrites."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(seed)
    network = SpineNetwork(min_frames=min(WINDOWS))
    config = TrainConfig(
        n_steps=steps, learning_rate=2e-3, warmup=0.02, ema=0.998, clip=0.3, seed=seed, checkpoint_every=250
    )

    def loss(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        batch = draw_batch(int(torch.randint(2**62, (), generator=generator)))
        measured = batch.fluorescence.isfinite().flatten(0, 1)
        posterior = network.together(batch.fluorescence, torch.full((len(batch.counts),), batch.frame_rate))
        log_p = posterior.log_prob(batch.counts.flatten(0, 1).clamp_max(network.max_count), measured)
        # The shaft's loss counts as much as that of all its spines: what they see of it hangs on it. Slow frames hold
        # more spikes each, and would otherwise outweigh the fast ones.
        per_frame = (log_p / measured.sum(-1).clamp_min(1)).unflatten(0, batch.counts.shape[:2])
        weight = math.sqrt(batch.frame_rate / 30.0)
        shaft, spines = -weight * per_frame[:, 0].mean(), -weight * per_frame[:, 1:].mean()
        return shaft + spines, {"shaft": float(shaft.detach()), "spines": float(spines.detach())}

    recent = []
    for record in iter_train(network, loss, config, out.with_suffix(".checkpoint")):
        recent.append((record.terms["shaft"], record.terms["spines"]))
        if record.step % 100 == 0:
            shaft, spines = np.mean(recent[-500:], 0)
            log.info(
                "step %d of %d, shaft %.4f, spines %.4f, %.0f s", record.step, steps, shaft, spines, record.seconds
            )
    network.set_gain_scale(gain_scale)
    model = SpikeVAE(
        recognition=network,
        generative=DendriticSpine(),
        prior=SpikePrior(rate=0.5, max_count=network.max_count),
        preprocessing=Preprocessing(min_frame_rate=FRAME_RATES[0], max_frame_rate=FRAME_RATES[1]),
        description=f"shaft and spines; {steps} steps on simulated dendrites, seed {seed}",
    )
    model.save(out)
    log.info("saved %s", out)


if __name__ == "__main__":
    typer.run(main)
