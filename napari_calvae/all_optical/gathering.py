"""Collects states of the chain into posterior means, spreads and samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from napari_calvae.all_optical.chain import Chain
from napari_calvae.all_optical.spikes import Recording
from napari_calvae.generative.all_optical import AllOptical
from napari_calvae.inference import to_events
from napari_calvae.metrics import Explained, quality_table
from napari_calvae.recording import SpikeInference, Traces


class Gathering:
    """Running sums over the states of a chain, and its spike trains.

    Means of coefficients are those of the modes of their conditional distributions, and variances add the curvature
    there (Rao–Blackwell with Laplace's approximation): far less noisy than those of the draws, and a little off where
    a cell has few spikes.
    """

    def __init__(self, model: AllOptical, recording: Recording) -> None:
        self.model, self.recording = model, recording
        self.n = 0
        self._sums: dict[str, Tensor] = {}
        self._trains: list[Tensor] = []
        self._weights: list[np.ndarray] = []

    def add(self, chain: Chain) -> None:
        """Add the present state."""
        self.n += 1
        theta, fs = chain.theta, self.recording.frame_rate
        response = self.model.calcium.fluorescence(chain.counts, theta, fs) - theta["baseline"][:, None]
        artefact = self.model.artefacts(theta, self.recording.light)
        trace = response + artefact + theta["baseline"][:, None]
        noise = self.model.calcium.noise_std(theta, fs)
        state = {
            "counts": chain.counts,
            "response": response,
            "artefact": artefact,
            "trace": trace,
            "trace_squared": trace.double() ** 2 + noise[:, None] ** 2,
            "mode": chain.coefficients.mode,
            "mode_squared": chain.coefficients.mode.double() ** 2 + chain.coefficients.variance,
            "connection": chain.connection,
        }
        state |= {f"theta_{name}": value for name, value in theta.items() if name != "weights"}
        for name, value in state.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value, dtype=torch.double)) + value
        self._trains.append(chain.counts.clamp_max(255).to(torch.uint8))
        self._weights.append(theta["weights"].numpy().copy())

    def spikes(self, dff: Traces, provenance: dict[str, Any]) -> SpikeInference:
        """Rates, samples and reconstruction of all cells."""
        trains = torch.stack(self._trains)
        rate = (self._mean("counts") * dff.frame_rate).astype(np.float32)
        trace = self._mean("trace")
        spread = np.sqrt(np.maximum(self._mean("trace_squared") - trace**2, 0)).astype(np.float32)
        trace = trace.astype(np.float32)
        return SpikeInference(
            traces=dff,
            rate=rate,
            events=np.concatenate([to_events(trains[:, row], row) for row in range(dff.n_rois)]),
            n_samples=self.n,
            reconstruction=trace,
            reconstruction_std=spread,
            theta={p.name: self._mean(f"theta_{p.name}") for p in self.model.cell_parameters},
            quality=quality_table(Explained(dff.values, rate, trace, spread, dff.frame_rate)),
            provenance=provenance,
        )

    def network(self) -> dict[str, Any]:
        """Connectivity, excitability and light: fields of ``AllOpticalInference``."""
        mode = self._mean("mode")
        std = np.sqrt(np.maximum(self._mean("mode_squared") - mode**2, 0))
        return {
            "weights": np.stack(self._weights),
            "connectivity": mode[:, 2:],
            "connectivity_std": std[:, 2:],
            "connection": self._mean("connection"),
            "excitability": mode[:, 1],
            "excitability_std": std[:, 1],
            "artefact": self._mean("artefact").astype(np.float32),
            "response": self._mean("response").astype(np.float32),
            "shared": {p.name: float(self._mean(f"theta_{p.name}")) for p in self.model.shared_parameters},
        }

    def _mean(self, name: str) -> np.ndarray:
        return (self._sums[name] / self.n).numpy()
