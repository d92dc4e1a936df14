"""From traces to spike posteriors: in memory, or out of core into a store, on one machine or many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from napari_calvae.inference.blocks import (
    BLOCK_FRAMES,
    InferConfig,
    inference_of,
    iter_infer,
    pick_device,
    provenance_of,
    to_events,
    with_amplitude,
)
from napari_calvae.recording import SpikeInference, Traces
from napari_calvae.trace_source import TraceSource
from napari_calvae.vae import SpikeVAE

__all__ = [
    "BLOCK_FRAMES",
    "InferConfig",
    "infer",
    "inference_of",
    "iter_infer",
    "pick_device",
    "provenance_of",
    "to_events",
    "with_amplitude",
]


def infer(traces: Traces | TraceSource, model: str | Path | SpikeVAE = "universal", **settings: Any) -> SpikeInference:
    """Spike posterior of every trace.

    Parameters
    ----------
    traces
        Fluorescence of some ROIs; raw traces become ΔF/F as the model wants it.
    model
        Name of a shipped model, a file, or a ``SpikeVAE``.
    **settings
        Fields of ``InferConfig``: ``n_samples=50``, ``seed=0``, ``device="auto"``. How many spikes there are is
        uncertain mostly since nobody knows how much fluorescence one makes; who does gives ``amplitude`` (ΔF/F), known
        to about 15 %, and gets rates that go with it and narrower intervals.

    Raises
    ------
    RecordingError
        If no spikes can be inferred from a trace, or an amplitude is given that the model has no place for.
    ModelError
        If the model cannot be read.
    """
    return SpikeInference.concatenate(list(iter_infer(traces, model, **settings)))
