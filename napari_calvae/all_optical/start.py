"""Where the chain begins: a recognition network's spikes, at the amplitude per spike that explains each cell best.

How much fluorescence one spike makes is what a network does not know of an unseen cell, and a chain that starts with
twice the spikes at half the amplitude stays there for long: moves of single spikes do not lead from one to the other.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from napari_calvae.all_optical.chain import Chain
from napari_calvae.all_optical.spikes import Recording
from napari_calvae.generative.all_optical import AllOptical

#: Amplitudes that are tried, relative to the network's. A start from too few spikes at too high an amplitude finds
#: down within some sweeps; the other way is barred.
SCALES = (1.0, 1.5, 2.2, 3.3)


def iter_start(
    model: AllOptical,
    recording: Recording,
    expected: Float[Tensor, "cell time"],
    unlit: Bool[Tensor, "cell time"],
    n_sweeps: int,
    generator: torch.Generator,
) -> Generator[Chain, None, tuple[Float[Tensor, "cell time"], dict[str, Tensor]]]:
    """Run short chains of uncoupled cells from several amplitudes; returns for each cell counts and θ of the best.

    Parameters
    ----------
    expected
        (cell, time) spikes per frame as a network expects them.
    unlit
        (cell, time) frames that were measured without light, in which fluorescence is that of spikes alone.
    n_sweeps
        Per amplitude. Yields the chain after each.
    """
    fs, n_cells = recording.frame_rate, len(expected)
    guess = model.calcium.initial_theta(recording.observed, expected, fs, unlit)
    for p in model.parameters:
        shape = (n_cells,) if p in model.cell_parameters else ()
        guess.setdefault(p.name, torch.full(shape, p.median))
    guess["drive"] = expected.mean(1) * fs
    guess["weights"] = torch.zeros(n_cells, n_cells)
    counts, own = _round(expected, generator), {p.name: guess[p.name] for p in model.cell_parameters}
    value, winner = torch.full((n_cells,), -torch.inf), torch.zeros(n_cells, dtype=torch.long)
    tried: list[dict[str, Tensor]] = []
    for scale in SCALES:
        start = guess | {"amplitude": scale * guess["amplitude"]}
        chain = Chain(model, recording, _round(expected / scale, generator), start, generator, coupled=False)
        chain.seek_glare()
        for _ in range(n_sweeps):
            chain.sweep(settling=True)
            yield chain
        found = chain.log_prob_cells()
        better = found > value
        value = torch.where(better, found, value)
        counts = torch.where(better[:, None], chain.counts, counts)
        own = {name: torch.where(better, chain.theta[name], values) for name, values in own.items()}
        winner[better] = len(tried)
        tried.append(dict(chain.theta))
    # What all cells share is that of the chain that is the best for most of them.
    return counts, tried[int(winner.mode().values)] | own


def _round(expected: Float[Tensor, "cell time"], generator: torch.Generator) -> Float[Tensor, "cell time"]:
    """Whole counts that keep to the running sum of the expected ones."""
    offset = torch.rand((len(expected), 1), generator=generator)
    total = torch.cat([torch.zeros_like(offset), expected.double().cumsum(1)], 1)
    return torch.diff((total + offset).floor(), dim=1).to(expected.dtype)
