"""From the traces of a shaft and its spines to action potentials and synaptic inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napari_calvae.errors import ModelError
from napari_calvae.generative import DendriticSpine
from napari_calvae.inference import InferConfig, inference_of, pick_device, provenance_of
from napari_calvae.recognition import CHUNK
from napari_calvae.recognition.factorized import GainCategorical
from napari_calvae.recording import RecordingError, SpikeInference, Traces, check_kind
from napari_calvae.vae import SpikeVAE, shared_model


@dataclass(frozen=True, eq=False)
class SpineInference:
    """What was inferred from a shaft and its spines.

    Parameters
    ----------
    inference
        Rates, samples, intervals, reconstruction and quality of all compartments. Row 0 is the shaft, whose spikes are
        the back-propagating action potentials (bAPs); the other rows are the spines, whose spikes are their inputs.
    bap, synaptic
        (roi, time) float32 ΔF/F above baseline that bAPs and synaptic inputs make in each compartment, at the posterior
        mean of the trains: with the baseline of ``theta`` they add up to what the model expects of the trace.
    """

    inference: SpikeInference
    bap: np.ndarray
    synaptic: np.ndarray

    @property
    def shaft(self) -> int:
        """Id of the shaft's ROI."""
        return self.inference.roi_ids[0]

    @property
    def spines(self) -> tuple[int, ...]:
        """Ids of the spines' ROIs, as the rows of ``synaptic_rate``."""
        return self.inference.roi_ids[1:]

    @property
    def bap_rate(self) -> np.ndarray:
        """(time,) posterior mean of the action potentials (per second)."""
        return self.inference.rate[0]

    @property
    def synaptic_rate(self) -> np.ndarray:
        """(spine, time) posterior mean of the synaptic inputs (per second)."""
        return self.inference.rate[1:]

    @property
    def theta(self) -> Mapping[str, np.ndarray]:
        """Parameters of `DendriticSpine`, each (roi,); the synaptic ones of the shaft mean nothing."""
        return self.inference.theta

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Posterior samples: bAPs (sample, time) and synaptic inputs (sample, spine, time), uint8 counts per frame."""
        both = self.inference.samples()
        return both[:, 0], both[:, 1:]

    def interval(self, level: float = 0.9, window: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Central credible intervals of the counts in windows of ``window`` s, as `SpikeInference.interval`.

        Of bAPs (2, window) and of synaptic inputs (2, spine, window).
        """
        both = self.inference.interval(level, window)
        return both[:, 0], both[:, 1:]


def infer_spines(
    traces: Traces, shaft: int, model: str | Path | SpikeVAE = "spines", *, n_rounds: int = 2, **settings: Any
) -> SpineInference:
    """Posterior over the action potentials that invade a dendrite and over the synaptic inputs to its spines.

    The network alone must guess how each spine answers to action potentials. Once it has, that can be fitted: in each
    round the generative model is fitted to the trains found so far, what it says action potentials made of each spine
    is taken out, and the network sees the spines again.

    Parameters
    ----------
    traces
        Fluorescence of one dendrite: its shaft and at least one spine; raw traces become ΔF/F as the model wants it.
    shaft
        Id of the shaft's ROI; all others are taken for its spines. Use ``traces.select`` where there are more.
    model
        Name of a shipped model for dendrites, a file, or a ``SpikeVAE``.
    n_rounds
        Rounds of explaining away; 0 is one pass of the network.
    **settings
        Fields of ``InferConfig``: ``n_samples=50``, ``seed=0``, ``device="auto"``.

    Raises
    ------
    RecordingError
        If the shaft or the spines are missing, or nothing can be inferred from a trace.
    ModelError
        If the model cannot be read, or is not one for dendrites.
    """
    config = InferConfig(**settings)
    if n_rounds < 0:
        raise RecordingError(f"n_rounds: expected 0 or more, got {n_rounds}. 0 is one pass of the network.")
    check_kind(traces)
    if shaft not in traces.roi_ids:
        known = ", ".join(map(str, traces.roi_ids[:8])) + ("…" if traces.n_rois > 8 else "")
        raise RecordingError(f"shaft: expected the id of a ROI ({known}), got {shaft}. Give that of the shaft.")
    if traces.n_rois < 2:
        raise RecordingError(
            f"spines: expected at least one ROI beside the shaft, got none beside ROI {shaft}. Add the spines' ROIs."
        )
    row = traces.index(shaft)
    ordered = traces.select([row, *(i for i in range(traces.n_rois) if i != row)])
    vae = shared_model(model, coupled=True)
    generative = vae.generative
    if not isinstance(generative, DendriticSpine):
        raise ModelError(f"model: expected the generative model dendritic_spine, got {generative.name}.")
    device = pick_device(config.device)
    vae.recognition.to(device).eval()
    dff = vae.preprocessing.apply(ordered)
    observed = torch.from_numpy(dff.values.copy()).to(device)
    valid = torch.from_numpy(dff.valid.copy()).to(device)
    with torch.inference_mode():
        posterior = vae.recognition(observed, dff.frame_rate, valid, chunk=CHUNK)
        for _ in range(n_rounds):
            left = _without_baps(generative, posterior.mean, observed, valid, dff.frame_rate)
            again = vae.recognition(left, dff.frame_rate, valid, chunk=CHUNK)
            # What is known of the shaft stays as it was.
            posterior = GainCategorical.join([posterior, again], [slice(1), slice(1, None)])
        mean = posterior.mean
    provenance = provenance_of(vae, traces, config, device) | {"shaft": int(shaft), "n_rounds": n_rounds}
    inference = inference_of(dff, vae, config, posterior, provenance)
    theta = {name: torch.from_numpy(value).to(device) for name, value in inference.theta.items()}
    with torch.inference_mode():
        bap, synaptic = generative.parts(mean, theta, dff.frame_rate)
    return SpineInference(inference, bap.cpu().numpy(), synaptic.cpu().numpy())


def _without_baps(
    generative: DendriticSpine, mean: Tensor, observed: Tensor, valid: Tensor, frame_rate: float
) -> Tensor:
    """The shaft, and each spine without what action potentials made of it, as the model fits the expected trains."""
    theta = generative.initial_theta(observed, mean, frame_rate, valid)
    bap, _ = generative.parts(mean, theta, frame_rate)
    return torch.cat([observed[:1], observed[1:] - bap[1:]])
