"""Ground truth: fluorescence with simultaneously recorded spikes, one file per data set, one entry per sweep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats._files import readable
from napari_calvae.formats._mat import UNREADABLE, variables
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


def read_ground_truth(path: str | Path, min_duration: float = 0.0, only: str = "") -> list[Sweep]:
    """Read the sweeps of one ``.npz`` data set or ``.mat`` cell, or of every one in a folder.

    Parameters
    ----------
    path
        File or folder. Data sets (``.npz``) hold cell, sweep, indicator, frame_rate (Hz) and t0 (s), one per sweep; dff
        with trace_offsets, spike_times (s) with spike_offsets. Cells (``.mat``) are in CASCADE's layout or
        that of C-SPIKES; their folder is the data set. It may lie in the folder that is given, and is read where no
        ``.npz`` is there.
    min_duration
        Leave out sweeps shorter than this (s); empty ones always are.
    only
        Data sets to take, by the beginnings of their names, comma-separated; by default all.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.npz")) or sorted([*path.glob("*.mat"), *path.glob("*/*.mat")])
    if not files or not all(f.is_file() for f in files):
        raise RecordingError(
            f"ground truth: expected .npz or .mat files in {path}, found none. Give the folder that holds them."
        )
    sweeps = (sweep for file in files for sweep in (mat_sweeps if file.suffix == ".mat" else _read_npz)(file))
    found = [sweep for sweep in sweeps if len(sweep.dff) > min_duration * sweep.frame_rate]
    chosen = [sweep for sweep in found if sweep.dataset.startswith(tuple(only.split(",")))]
    if only and not chosen:
        names = ", ".join(sorted({sweep.dataset for sweep in found})) or "none that is long enough"
        raise RecordingError(f"ground truth: expected data sets whose names begin with {only}, got {names}.")
    return chosen


def mat_sweeps(path: Path) -> Iterator[Sweep]:
    """Sweeps of one cell in a ``.mat`` file; where time stamps jump, a new one begins.

    Layouts are CASCADE's (Rupprecht et al. 2021), ``CAttached`` with fluo_time (s), fluo_mean (ΔF/F) and events_AP
    (0.1 ms), and that of C-SPIKES, time_stamps (s) and dff (trial, sample) padded with NaN, and ap_times (s).
    """
    try:
        found = variables(path, ("CAttached", "time_stamps", "dff", "ap_times"))
        if "CAttached" in found:
            parts = found["CAttached"] if isinstance(found["CAttached"], list) else [found["CAttached"]]
            recordings = [tuple(_vector(part[n]) for n in ("fluo_time", "fluo_mean", "events_AP")) for part in parts]
            recordings = [(times, dff, events * 1e-4) for times, dff, events in recordings]
        else:
            trials = (np.atleast_2d(found[name]) for name in ("time_stamps", "dff"))
            spikes = _vector(found["ap_times"])
            recordings = [(_vector(times), _vector(dff), spikes) for times, dff in zip(*trials, strict=True)]
    except UNREADABLE as error:
        raise RecordingError(
            f"{path.name}: expected CASCADE's layout, CAttached with fluo_time, fluo_mean and events_AP, "
            f"or that of C-SPIKES, time_stamps with dff and ap_times, got {error}."
        ) from error
    for times, dff, spikes in recordings:
        known = np.isfinite(times[: len(dff)])
        times, dff = times[: len(dff)][known], dff[: len(known)][known]
        if len(times) < 2:
            continue
        step = float(np.median(np.diff(times)))
        if not step > 0:
            raise RecordingError(f"{path.name}: expected times of frames that increase, got steps of {step:g} s.")
        spikes = spikes[np.isfinite(spikes)]
        edges = [0, *(np.flatnonzero(np.diff(times) > 1.5 * step) + 1), len(times)]
        for first, last in itertools.pairwise(edges):
            if last - first < 2:
                continue
            rate = (last - first - 1) / (times[last - 1] - times[first])
            span = (spikes >= times[first] - 0.5 / rate) & (spikes < times[last - 1] + 0.5 / rate)
            yield Sweep(
                dataset=path.parent.name,
                cell=path.stem,
                indicator="",
                frame_rate=float(rate),
                t0=float(times[first]),
                dff=dff[first:last].astype(np.float32),
                spike_times=spikes[span],
            )


def _vector(value: Any) -> np.ndarray:
    return np.atleast_1d(np.asarray(value, float)).ravel()


def _read_npz(path: Path) -> list[Sweep]:
    with readable(path, "an .npz file of ground truth"), np.load(path, allow_pickle=False) as z:
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
