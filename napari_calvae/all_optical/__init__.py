"""Spikes, excitability and connectivity together, from imaging while light stimulates some of the cells.

The generative model is `AllOptical`, after Aitchison et al. (2017). Where they fit a variational posterior, this draws
from the posterior itself by Markov chain Monte Carlo, which a recognition network starts and whose proposals it makes:
uncertainty about spikes passes into that about connectivity, and the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from napari_calvae.all_optical.chain import Chain
from napari_calvae.all_optical.gathering import Gathering
from napari_calvae.all_optical.spikes import Recording
from napari_calvae.all_optical.start import SCALES, iter_start
from napari_calvae.generative.all_optical import AllOptical, Illumination
from napari_calvae.inference import InferConfig, provenance_of
from napari_calvae.recognition import CHUNK
from napari_calvae.recording import MAX_SEED, RecordingError, SpikeInference, Traces, check_kind
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.stimulation import Stimulation, check_positions
from napari_calvae.vae import SpikeVAE, shared_model

__all__ = ["AllOpticalConfig", "AllOpticalInference", "AllOpticalRecord", "infer_all_optical", "iter_all_optical"]

#: How often births are proposed where a network saw nothing, and in lit frames, where it looked away (per frame).
_ANYWHERE, _LIT = 0.01, 0.2


class AllOpticalConfig(BaseModel):
    """How to infer from all-optical recordings; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_start: int = Field(8, ge=1, title="Starting sweeps", description="Per amplitude that is tried, cells uncoupled")
    n_settle: int = Field(30, ge=0, title="Settling sweeps", description="Thrown away")
    n_samples: int = Field(40, ge=2, le=1000, title="Samples", description="Sweeps that are kept, each a sample")
    seed: int = Field(0, ge=0, le=MAX_SEED, title="Seed", description="Of every random number")


@dataclass(frozen=True, eq=False)
class AllOpticalRecord:
    """What one sweep of the chain came to.

    Parameters
    ----------
    stage
        ``"start"``, ``"settle"`` or ``"sample"``.
    step, n_steps
        Sweeps so far, and in all.
    log_joint
        Log p(F, s, θ) of the state (nats): it rises while the chain settles and then keeps its level.
    connectivity
        (cell, cell) weights in this sweep (spikes per spike), row by row what a cell receives.
    seconds
        Since the beginning.
    """

    stage: Literal["start", "settle", "sample"]
    step: int
    n_steps: int
    log_joint: float
    connectivity: np.ndarray
    seconds: float


@dataclass(frozen=True, eq=False)
class AllOpticalInference:
    """What was inferred from an all-optical recording.

    Parameters
    ----------
    spikes
        Rates, samples and quality of every cell, and a reconstruction that includes the artefact.
    stimulation, positions
        As given; positions (cell, 2).
    weights
        (sample, cell, cell) draws of the connectivity (spikes per spike): row i is what cell i receives.
    connectivity, connectivity_std
        (cell, cell) mean and standard deviation of it, with Laplace's approximation. The diagonal is what a spike does
        to its own cell.
    connection
        (cell, cell) probability that there is a connection.
    excitability, excitability_std
        (cell,) spikes/s while light of power 1 is on the cell.
    artefact, response
        (roi, time) float32 ΔF/F: what the light itself adds to the fluorescence, and what the spikes do.
    shared
        Mean of what all cells have in common: ``falloff`` and ``glare`` (unit of the positions), ``tau_coupling`` (s).
    """

    spikes: SpikeInference
    stimulation: Stimulation
    positions: np.ndarray
    weights: np.ndarray
    connectivity: np.ndarray
    connectivity_std: np.ndarray
    connection: np.ndarray
    excitability: np.ndarray
    excitability_std: np.ndarray
    artefact: np.ndarray
    response: np.ndarray
    shared: Mapping[str, float]

    @property
    def rate(self) -> np.ndarray:
        """(roi, time) float32 posterior mean (spikes/s)."""
        return self.spikes.rate

    def samples(self) -> np.ndarray:
        """(sample, roi, time) uint8 spike counts per frame."""
        return self.spikes.samples()

    def interval(self, level: float = 0.9) -> np.ndarray:
        """(2, cell, cell) central credible interval of the connectivity (spikes per spike)."""
        if not 0 < level < 1:
            raise RecordingError(f"level: expected a probability between 0 and 1, got {level}.")
        return np.quantile(self.weights, [(1 - level) / 2, (1 + level) / 2], axis=0)


def infer_all_optical(
    traces: Traces,
    stimulation: Stimulation,
    positions: ArrayLike | RoiMasks,
    model: str | Path | SpikeVAE = "universal",
    *,
    network: AllOptical | None = None,
    **settings: Any,
) -> AllOpticalInference:
    """Infer spikes, excitability and connectivity together; see ``iter_all_optical``, which reports every sweep."""
    steps = iter_all_optical(traces, stimulation, positions, model, network=network, **settings)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def iter_all_optical(
    traces: Traces,
    stimulation: Stimulation,
    positions: ArrayLike | RoiMasks,
    model: str | Path | SpikeVAE = "universal",
    *,
    network: AllOptical | None = None,
    **settings: Any,
) -> Generator[AllOpticalRecord, None, AllOpticalInference]:
    """Draw from the posterior of spikes, excitability and connectivity; yields a record per sweep, returns the whole.

    Parameters
    ----------
    traces
        Fluorescence of all cells, the stimulated frames included.
    stimulation
        When and where light was given.
    positions
        (cell, 2) positions (x, y) in the unit of the stimulation's, or the ROIs (pixels), in the order of the traces.
    model
        Whose recognition network starts the chain: name of a shipped model, a file, or a ``SpikeVAE``.
    network
        The generative model, with its prior of connectivity; by default `AllOptical` as it comes.
    **settings
        Fields of ``AllOpticalConfig``.

    Raises
    ------
    RecordingError
        If traces, positions and stimulation do not go together, or no spikes can be inferred.
    """
    config, vae, started = AllOpticalConfig(**settings), shared_model(model, coupled=False), time.perf_counter()
    check_kind(traces)
    where = positions.centroids if isinstance(positions, RoiMasks) else positions
    where = check_positions(where, traces.n_rois)
    dff = vae.preprocessing.apply(traces)
    _check_stimulation(stimulation, dff)
    network = AllOptical() if network is None else network
    generator = torch.Generator().manual_seed(config.seed)
    recording, expected, unlit = _prepare(dff, stimulation, where, vae)
    n_steps = config.n_start * len(SCALES) + config.n_settle + config.n_samples
    step = 0

    def record(stage: Literal["start", "settle", "sample"], chain: Chain) -> AllOpticalRecord:
        nonlocal step
        step += 1
        weights, seconds = chain.theta["weights"].numpy().copy(), time.perf_counter() - started
        return AllOpticalRecord(stage, step, n_steps, chain.log_joint(), weights, seconds)

    starting = iter_start(network, recording, expected, unlit, config.n_start, generator)
    while True:
        try:
            yield record("start", next(starting))
        except StopIteration as stop:
            counts, theta = stop.value
            break
    chain = Chain(network, recording, counts, theta, generator)
    for _ in range(config.n_settle):
        chain.sweep(settling=True)
        yield record("settle", chain)
    gathering = Gathering(network, recording)
    for _ in range(config.n_samples):
        chain.sweep()
        gathering.add(chain)
        yield record("sample", chain)
    provenance = provenance_of(
        vae, traces, InferConfig(n_samples=config.n_samples, seed=config.seed, device="cpu"), torch.device("cpu")
    )
    provenance |= {"generative_model": network.name, "all_optical": config.model_dump()}
    return AllOpticalInference(
        spikes=gathering.spikes(dff, provenance),
        stimulation=stimulation,
        positions=where,
        **gathering.network(),
    )


def _check_stimulation(stimulation: Stimulation, dff: Traces) -> None:
    lit = stimulation.lit(dff.n_frames, dff.frame_rate, dff.t0)
    if not lit.any():
        raise RecordingError(
            f"stimulation: expected pulses between {dff.times[0]:g} and {dff.times[-1]:g} s, got none among "
            f"{len(stimulation)}. Give onsets on the clock of traces.times."
        )
    if lit.all():
        raise RecordingError(
            "stimulation: expected frames without light between the pulses, got none: artefact and response cannot be "
            "told apart. Check onsets and durations (s)."
        )


@torch.no_grad()
def _prepare(
    dff: Traces, stimulation: Stimulation, positions: np.ndarray, vae: SpikeVAE
) -> tuple[Recording, Float[Tensor, "cell time"], Bool[Tensor, "cell time"]]:
    """The recording, the spikes that the network sees in unlit frames, and which those are."""
    observed, valid = torch.from_numpy(dff.values.copy()), torch.from_numpy(dff.valid.copy())
    lit = torch.from_numpy(stimulation.lit(dff.n_frames, dff.frame_rate, dff.t0))
    unlit = valid & ~lit
    vae.recognition.to("cpu").eval()
    expected = vae.recognition(observed, dff.frame_rate, unlit, chunk=CHUNK).mean.float()
    light = Illumination.of(stimulation, positions, dff.n_frames, dff.frame_rate, dff.t0)
    proposal = expected.clamp_max(1) + _ANYWHERE + _LIT * lit
    return Recording(torch.where(valid, observed, 0), valid.float(), dff.frame_rate, light, proposal), expected, unlit
