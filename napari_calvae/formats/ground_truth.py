"""Ground truth: fluorescence with simultaneously recorded spikes, one file per data set, one entry per sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_calvae.recording import RecordingError

_KEYS = ("cell", "sweep", "indicator", "frame_rate", "t0", "dff", "trace_offsets", "spike_times", "spike_offsets")


@dataclass(frozen=True, eq=False)
class Sweep:
    """One uninterrupted recording of one cell.

    Frame k of ``dff`` (ΔF/F as a fraction) is centred on ``t0 + k / frame_rate``; ``spike_times`` (s) share that clock.
    """

    dataset: str
    cell: str
    indicator: str
    frame_rate: float
    t0: float
    dff: np.ndarray
    spike_times: np.ndarray


def read_ground_truth(path: str | Path, min_duration: float = 0.0) -> list[Sweep]:
    """Read the sweeps of one ``.npz`` data set, or of every one in a folder.

    Parameters
    ----------
    path
        File or folder. Keys: cell, sweep, indicator, frame_rate (Hz) and t0 (s), one per sweep; dff with trace_offsets,
        spike_times (s) with spike_offsets.
    min_duration
        Leave out sweeps shorter than this (s); empty ones always are.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise RecordingError(
            f"ground truth: expected .npz files in {path}, found none. Give the folder that holds them."
        )
    return [sweep for file in files for sweep in _read_file(file) if len(sweep.dff) > min_duration * sweep.frame_rate]


def _read_file(path: Path) -> list[Sweep]:
    with np.load(path, allow_pickle=False) as z:
        missing = [key for key in _KEYS if key not in z]
        if missing:
            raise RecordingError(
                f"{path.name}: expected the keys {', '.join(_KEYS)}, got none named {', '.join(missing)}."
            )
        data = {key: z[key] for key in _KEYS}
    traces, spikes = data["trace_offsets"], data["spike_offsets"]
    return [
        Sweep(
            dataset=path.stem,
            cell=str(data["cell"][i]),
            indicator=str(data["indicator"][i]),
            frame_rate=float(data["frame_rate"][i]),
            t0=float(data["t0"][i]),
            dff=data["dff"][traces[i] : traces[i + 1]],
            spike_times=data["spike_times"][spikes[i] : spikes[i + 1]],
        )
        for i in range(len(data["cell"]))
    ]
