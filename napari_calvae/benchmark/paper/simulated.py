"""A network that has seen simulations only: where unsupervised and semi-supervised proofs start."""

from __future__ import annotations

import numpy as np
import torch

from napari_calvae.benchmark.paper.base import Setting
from napari_calvae.pretrained.recordings import Snippets
from napari_calvae.pretrained.simulations import SimulationSampler
from napari_calvae.pretrained.train import snippet_loss, universal_model
from napari_calvae.recognition import FactorizedNetwork
from napari_calvae.training import TrainConfig, iter_train
from napari_calvae.vae import SpikeVAE

#: Frames of a batch, and lengths of its snippets (frames).
_BATCH, _WINDOWS = 8192, (512, 1024, 2048)


def simulation_model(setting: Setting) -> SpikeVAE:
    """The universal model's recipe without any recording, at half its width; it is kept in the cache.

    Spikes and fluorescence are those of `SimulationSampler`: no kinetics, rate or noise of a recording enter.
    """
    path = setting.cache / f"simulated-{setting.seed}{'-quick' if setting.quick else ''}.safetensors"
    if path.is_file():
        return SpikeVAE.load(path)
    torch.manual_seed(setting.seed)
    widths, n_steps = ((4, 6), 3) if setting.quick else ((8, 16, 24, 32), 5000)
    network = FactorizedNetwork(widths=widths, min_frames=min(_WINDOWS))
    config = TrainConfig(
        n_steps=n_steps, learning_rate=1.5e-3, warmup=0.02, ema=0.998, clip=0.3, seed=setting.seed, checkpoint_every=250
    )
    simulations = SimulationSampler()

    def loss(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        window = int(rng.choice(_WINDOWS))
        n = _BATCH // window
        batch = Snippets(n, window)
        simulations.fill(batch, range(n), rng)
        return snippet_loss(network, batch, generator), {}

    for _ in iter_train(network, loss, config, path.with_suffix(".checkpoint")):
        pass
    model = universal_model(network, f"simulations only; {n_steps} steps, seed {setting.seed}")
    model.save(path)
    return model
