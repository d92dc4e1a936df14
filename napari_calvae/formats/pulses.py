"""Pulses of light: a text table with a row per target of each pulse, or named arrays, to a `Stimulation`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats import csv_table
from napari_calvae.formats._files import existing, readable
from napari_calvae.recording import RecordingError
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.stimulation import Stimulation

#: What the columns of a table may be called, and what one unit of them is.
_COLUMNS = {
    "onset": {"onset": 1.0, "onset_s": 1.0, "time": 1.0, "time_s": 1.0, "onset_ms": 1e-3, "time_ms": 1e-3},
    "duration": {"duration": 1.0, "duration_s": 1.0, "duration_ms": 1e-3},
    "x": {"x": 1.0, "x_px": 1.0},
    "y": {"y": 1.0, "y_px": 1.0},
    "roi": {"roi": 1.0, "roi_id": 1.0, "cell": 1.0},
    "power": {"power": 1.0},
    "pulse": {"pulse": 1.0},
}
_TABLE = (
    "a row per pulse and target with the columns onset_s, duration_s, x and y (pixels) or roi (id), perhaps power and "
    "pulse (a number that rows of one pulse share)"
)
_ARRAYS = (
    "the arrays onset (s, per pulse), duration (s, per pulse or one number) and targets (x, y in pixels, per pulse) or "
    "roi (id, per pulse), perhaps power; where pulses have several targets also pulse (per target the number of its "
    "pulse, from 0)"
)
_NAMES = {"onset", "duration", "targets", "roi", "power", "pulse"}


def read_stimulation(source: str | Path | Mapping[str, Any], rois: RoiMasks | None = None) -> Stimulation:
    """Read pulses of light from a ``.csv`` or ``.npz`` file, or from named arrays such as a layer's metadata.

    Parameters
    ----------
    source
        A table has a row per pulse and target with the columns ``onset_s``, ``duration_s`` (or ``onset_ms``,
        ``duration_ms``), ``x`` and ``y``, perhaps ``power``. Rows of one pulse share their number in ``pulse``; without
        such a column they are those with the same onset. Arrays are ``onset`` (pulse,) and ``duration`` (s),
        ``targets`` (pulse, 2) as (x, y), perhaps ``power``; where pulses have several targets, ``targets`` is
        (target, 2) and ``pulse`` (target,) says which pulse, from 0, each belongs to.
    rois
        With them targets can be given by the ids of ROIs instead of positions: a column or an array ``roi``.

    Raises
    ------
    RecordingError
        If it is something else, or contradicts itself.
    """
    if isinstance(source, Mapping):
        return _from_arrays({str(k): np.asarray(v) for k, v in source.items()}, "stimulation", rois)
    file = existing(source)
    if csv_table.matches(file):
        return _from_table(file, rois)
    if file.suffix.lower() != ".npz":
        raise RecordingError(f"{file.name}: expected a .csv or .npz file of light pulses, got another kind of file.")
    with readable(file, f"an .npz file with {_ARRAYS}"), np.load(file, allow_pickle=False) as z:
        arrays = {name: z[name] for name in z.files}
    return _from_arrays(arrays, file.name, rois)


def _from_table(file: Path, rois: RoiMasks | None) -> Stimulation:
    try:
        names, table = csv_table.read_table(file)
    except RecordingError as error:
        raise RecordingError(f"{file.name}: expected {_TABLE}. {error}") from None
    columns: dict[str, np.ndarray] = {}
    for index, name in enumerate(names):
        for what, known in _COLUMNS.items():
            if name.lower() in known and what not in columns:
                columns[what] = table[:, index] * known[name.lower()]
    if not {"onset", "duration"} <= set(columns) or not ({"x", "y"} <= set(columns) or "roi" in columns):
        raise RecordingError(f"{file.name}: expected {_TABLE}, got the columns {', '.join(names)}. Rename them.")
    if any(not np.isfinite(values).all() for values in columns.values()):
        raise RecordingError(f"{file.name}: expected a number in every cell, got empty ones. Fill them in.")
    if {"x", "y"} <= set(columns):
        targets = np.stack([columns["x"], columns["y"]], 1)
    else:
        targets = _positions_of(columns["roi"], file.name, rois)
    _, first, pulse = np.unique(columns.get("pulse", columns["onset"]), return_index=True, return_inverse=True)
    for what in ("onset", "duration", "power"):
        values = columns.get(what)
        if values is not None and not np.array_equal(values, values[first][pulse]):
            raise RecordingError(
                f"{file.name}: expected one {what} for all targets of a pulse, got several. "
                "Give pulses that differ different numbers in the column pulse."
            )
    per_pulse: dict[str, np.ndarray] = {
        what: columns[what][first] for what in ("onset", "duration", "power") if what in columns
    }
    return _stimulation(per_pulse, targets, pulse.ravel(), file.name)


def _from_arrays(arrays: Mapping[str, np.ndarray], name: str, rois: RoiMasks | None) -> Stimulation:
    known = {"onset", "duration"} <= set(arrays) and ("targets" in arrays or "roi" in arrays)
    if not known or any(arrays[what].dtype.kind not in "fiu" for what in set(arrays) & _NAMES):
        raise RecordingError(f"{name}: expected {_ARRAYS}, all of them numbers, got {', '.join(sorted(arrays))}.")
    if "targets" in arrays:
        targets = np.asarray(arrays["targets"], float)
        if targets.ndim != 2 or targets.shape[1] != 2:
            raise RecordingError(f"{name}: expected targets as an array (n, 2) of x and y, got shape {targets.shape}.")
    else:
        targets = _positions_of(np.atleast_1d(arrays["roi"]), name, rois)
    n = np.atleast_1d(arrays["onset"]).size
    pulse = np.asarray(arrays.get("pulse", np.arange(len(targets)))).ravel()
    if len(pulse) != len(targets) or not np.isin(pulse, np.arange(n)).all() or len(np.unique(pulse)) != n:
        raise RecordingError(
            f"{name}: expected at least one target for each of {n} pulses, got {len(targets)} targets of "
            f"{len(np.unique(pulse))} pulses. Say in an array pulse (target,) which pulse each belongs to, from 0."
        )
    return _stimulation(
        {what: arrays[what] for what in ("onset", "duration", "power") if what in arrays}, targets, pulse, name
    )


def _positions_of(ids: np.ndarray, name: str, rois: RoiMasks | None) -> np.ndarray:
    """(target, 2) centroids (x, y) of the ROIs with these ids."""
    if rois is None:
        raise RecordingError(f"{name}: expected the ROIs beside their ids, got none. Give rois, or positions x and y.")
    centroids = dict(zip(rois.ids, rois.centroids, strict=True))
    strange = sorted({f"{i:g}" for i in ids.tolist() if i not in centroids})
    if strange:
        raise RecordingError(
            f"{name}: expected ids of ROIs as targets, got {', '.join(strange[:6])}, which none has. "
            "Load the ROIs that were stimulated, or give positions x and y."
        )
    return np.stack([centroids[int(i)] for i in ids])


def _stimulation(per_pulse: dict[str, np.ndarray], targets: np.ndarray, pulse: np.ndarray, name: str) -> Stimulation:
    n = np.atleast_1d(per_pulse["onset"]).size
    try:
        return Stimulation(targets=tuple(targets[pulse == k] for k in range(n)), **per_pulse)
    except RecordingError as error:
        raise RecordingError(f"{name}: {error}") from None
