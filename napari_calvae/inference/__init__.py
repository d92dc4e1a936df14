"""From traces to spike posteriors: in memory, or out of core into a store, on one machine or many."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from napari_calvae.formats import read
from napari_calvae.formats.store import StoredInference
from napari_calvae.inference.batch import Progress, iter_batch
from napari_calvae.inference.blocks import (
    BLOCK_FRAMES,
    InferConfig,
    devices,
    inference_of,
    iter_infer,
    pick_device,
    provenance_of,
    to_events,
    with_amplitude,
)
from napari_calvae.inference.repetition import Repetition, repeat
from napari_calvae.recording import SpikeInference, Traces
from napari_calvae.trace_source import TraceSource
from napari_calvae.vae import SpikeVAE

__all__ = [
    "BLOCK_FRAMES",
    "InferConfig",
    "Progress",
    "Repetition",
    "devices",
    "infer",
    "inference_of",
    "iter_batch",
    "iter_infer",
    "pick_device",
    "provenance_of",
    "repeat",
    "to_events",
    "with_amplitude",
]


@overload
def infer(
    traces: Traces | TraceSource | str | Path,
    model: str | Path | SpikeVAE = "universal",
    *,
    out: None = None,
    **settings: Any,
) -> SpikeInference: ...


@overload
def infer(
    traces: Traces | TraceSource | str | Path,
    model: str | Path | SpikeVAE = "universal",
    *,
    out: str | Path,
    **settings: Any,
) -> StoredInference: ...


def infer(
    traces: Traces | TraceSource | str | Path,
    model: str | Path | SpikeVAE = "universal",
    *,
    out: str | Path | None = None,
    **settings: Any,
) -> SpikeInference | StoredInference:
    """Spike posterior of every trace.

    Parameters
    ----------
    traces
        Fluorescence of some ROIs, or a file or folder with it; raw traces become ΔF/F as the model wants it.
    model
        Name of a shipped model, a file, or a ``SpikeVAE``.
    out
        Zarr store (``.zarr``) to write, for more ROIs than memory holds: what is returned is read from it ROI by ROI.
        Work that was stopped goes on when it is asked for again. See ``iter_batch``, whose arguments ``scheduler`` (to
        use a cluster; ``"local:N"`` in a script only below ``if __name__ == "__main__":``), ``block_rois`` and
        ``overwrite`` may be given, too.
    **settings
        Fields of ``InferConfig``: ``n_samples=50``, ``seed=0``, ``device="auto"``. How many spikes there are is
        uncertain mostly since nobody knows how much fluorescence one makes; who knows what is typical of the
        preparation gives that as ``amplitude`` (ΔF/F), and gets rates that go with it. Cells are taken to differ about
        it by ``amplitude_spread=0.5`` (standard deviation of the logarithm), as they do in the median data set with
        known spikes; 0.1 says that it is that of these very cells, and makes intervals that much narrower.

    Raises
    ------
    RecordingError
        If no spikes can be inferred from a trace, or an amplitude is given that the model has no place for.
    ModelError
        If the model cannot be read.
    """
    if out is None:
        known = read(traces) if isinstance(traces, str | Path) else traces
        return SpikeInference.concatenate(list(iter_infer(known, model, **settings)))
    steps = iter_batch(traces, out, model, **settings)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
