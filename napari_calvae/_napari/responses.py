"""What was inferred of a stimulated recording, as it is shown: cells and connections, told without Qt."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers

#: Level of the credible intervals.
LEVEL = 0.9


@dataclass(frozen=True)
class Connection:
    """One directed connection: mean strength, standard deviation and 90 % credible interval (spikes per spike)."""

    sender: int
    receiver: int
    strength: float
    std: float
    low: float
    high: float
    probability: float


@dataclass(frozen=True, eq=False)
class CellPicture:
    """What is drawn of a cell, (time,) each: ΔF/F of the artefact, without it, and of the response on its baseline.

    ``lit`` are the frames during which light reached this cell, ``lit_elsewhere`` those when it reached others alone.
    """

    spikes: calvae.SpikeInference
    artefact: np.ndarray
    rest: np.ndarray
    response: np.ndarray
    lit: np.ndarray
    lit_elsewhere: np.ndarray


@dataclass(frozen=True)
class Cell:
    """Numbers of one cell.

    Parameters
    ----------
    rate_per_s
        Mean over the recording (spikes/s).
    n_pulses, evoked, evoked_low, evoked_high
        Pulses on it, and the spikes that one of them evokes: mean and 90 % credible interval.
    artefact_dff
        What light of power 1 on the cell adds to its ΔF/F.
    excitability_per_s, excitability_std
        Spikes/s that it adds to what drives the cell, and the standard deviation of that.
    r2
        Share of the variance of ΔF/F that the reconstruction explains, artefact included.
    """

    roi: int
    rate_per_s: float
    n_pulses: int
    evoked: float
    evoked_low: float
    evoked_high: float
    artefact_dff: float
    excitability_per_s: float
    excitability_std: float
    r2: float


def picture(result: calvae.AllOpticalInference, row: int) -> CellPicture:
    """What is drawn of the cell in this row."""
    traces = result.spikes.traces
    here, all_lit = _lit(result, reaching_of(result, row)), _lit(result, np.ones(len(result.stimulation), bool))
    return CellPicture(
        answers.one_roi(result.spikes, row),
        result.artefact[row],
        traces.values[row] - result.artefact[row],
        result.response[row] + float(result.spikes.theta["baseline"][row]),
        here,
        all_lit & ~here,
    )


def cells(result: calvae.AllOpticalInference) -> tuple[Cell, ...]:
    """Numbers of every cell, in the order of the rows."""
    return tuple(_cell(result, row) for row in range(len(result.spikes.roi_ids)))


def _cell(result: calvae.AllOpticalInference, row: int) -> Cell:
    spikes, reaching = result.spikes, reaching_of(result, row)
    mean, low, high = _evoked(result, row, reaching)
    return Cell(
        roi=spikes.roi_ids[row],
        rate_per_s=float(np.nanmean(spikes.rate[row])),
        n_pulses=int(reaching.sum()),
        evoked=mean,
        evoked_low=low,
        evoked_high=high,
        artefact_dff=float(spikes.theta["artefact"][row]),
        excitability_per_s=float(result.excitability[row]),
        excitability_std=float(result.excitability_std[row]),
        r2=float(spikes.quality["reconstruction_r2"][row]),
    )


def _evoked(result: calvae.AllOpticalInference, row: int, reaching: np.ndarray) -> tuple[float, float, float]:
    """Spikes above the cell's rate in the dark, in the frames of a pulse on it and in the frame after, per pulse."""
    if not reaching.any():
        return math.nan, math.nan, math.nan
    spikes, lit = result.spikes, _lit(result, reaching)
    near = lit | np.concatenate([[False], lit[:-1]])
    dark = ~(near | _lit(result, np.ones(len(reaching), bool)))
    events = spikes.events_of(row)
    inside, outside = (
        np.bincount(events["sample"], events["count"] * where[events["frame"]], spikes.n_samples)
        for where in (near, dark)
    )
    number = (inside - outside * near.sum() / max(int(dark.sum()), 1)) / reaching.sum()
    low, high = np.quantile(number, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(number.mean()), float(low), float(high)


def heading(cell: Cell) -> str:
    """What is told above the plots of a cell."""
    parts = [f"<b>ROI {cell.roi}</b> &nbsp; {cell.rate_per_s:.2f} spikes/s"]
    if cell.n_pulses:
        evoked = f"{cell.evoked:.2f} ({cell.evoked_low:.2f} to {cell.evoked_high:.2f}) spikes each"
        parts.append(f"{cell.n_pulses} pulses on it evoke {evoked}")
    else:
        parts.append("no pulse on it")
    return " &nbsp; ".join(parts).replace("-", "−")


def told_cell(cell: Cell) -> str:
    """What the table has no place for."""
    words = f"ROI {cell.roi}: {cell.n_pulses} pulses on it"
    if cell.n_pulses:
        words += f", each evokes {cell.evoked_low:.2f} to {cell.evoked_high:.2f} spikes with 90 %"
    excitability = f"excitability {cell.excitability_per_s:.1f} ± {cell.excitability_std:.1f} spikes/s"
    return f"{words}; {excitability}; R² {cell.r2:.2f}".replace("-", "−")


def signed(value: float) -> str:
    """Strength of a connection in words: “+0.12”, “−0.30”, “0.00”."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def connections(result: calvae.AllOpticalInference) -> tuple[Connection, ...]:
    """All connections between different cells: the most certain first, the stronger first among equals."""
    low, high = result.interval(LEVEL)
    ids = result.spikes.roi_ids
    found = [
        Connection(
            sender=ids[j],
            receiver=ids[i],
            strength=float(result.connectivity[i, j]),
            std=float(result.connectivity_std[i, j]),
            low=float(low[i, j]),
            high=float(high[i, j]),
            probability=float(result.connection[i, j]),
        )
        for i in range(len(ids))
        for j in range(len(ids))
        if i != j
    ]
    return tuple(sorted(found, key=lambda c: (-round(c.probability, 2), -abs(c.strength))))


def csv_text(rows: Sequence[Cell] | Sequence[Connection]) -> str:
    """Cells or connections as comma-separated values; what there is none of is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f.name for f in fields(rows[0])]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow([("" if math.isnan(v) else f"{v:.6g}") if isinstance(v, float) else v for v in values])
    return out.getvalue()


def reaching_of(result: calvae.AllOpticalInference, row: int) -> np.ndarray:
    """(pulse,) pulses of whose power at least half reaches the cell, by the reach that was inferred."""
    targets = result.stimulation.targets
    if not len(targets):
        return np.zeros(0, bool)
    distance = np.hypot(*(np.concatenate(targets) - result.positions[row]).T)
    first = np.cumsum([0, *(len(t) for t in targets[:-1])])
    nearest = np.minimum.reduceat(distance, first)
    return np.asarray(nearest <= result.shared["falloff"] * np.sqrt(2 * np.log(2)))


def _lit(result: calvae.AllOpticalInference, which: np.ndarray) -> np.ndarray:
    """(time,) frames that some of the pulses fall into."""
    light, traces = result.stimulation, result.spikes.traces
    begin = (light.onset[which] - traces.t0) * traces.frame_rate + 0.5
    end = begin + light.duration[which] * traces.frame_rate
    change = np.zeros(traces.n_frames + 1, int)
    for edges, step in ((np.floor(begin), 1), (np.ceil(end), -1)):
        np.add.at(change, edges.clip(0, traces.n_frames).astype(int), step)
    return np.cumsum(change)[:-1] > 0
