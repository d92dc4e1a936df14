"""A shaft and its spines, decided without Qt: which ROIs they are, the work on them, the numbers of each."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers, drawing
from napari_calvae._napari.retraining import typed_rois
from napari_calvae._napari.session import explain

logger = logging.getLogger(__name__)

#: Level of the credible intervals of rates.
LEVEL = 0.9


@dataclass(frozen=True, eq=False)
class Order:
    """One dendrite: ids of its shaft and spines among the ROIs of a movie."""

    number: int
    movie: Any
    rois: calvae.RoiMasks
    shaft: int
    spines: tuple[int, ...]
    settings: answers.Settings


@dataclass(frozen=True, eq=False)
class Separated:
    """What was inferred of a dendrite."""

    number: int
    result: calvae.SpineInference


@dataclass(frozen=True)
class Compartment:
    """Numbers of the shaft or of a spine; NaN where there is none.

    Parameters
    ----------
    rate_per_s, rate_low, rate_high
        Action potentials of the shaft or inputs of the spine per second: posterior mean and 90 % credible interval.
    input_dff, bap_dff
        ΔF/F at the peak of one synaptic input, and of one back-propagating action potential (bAP).
    bap_of_shaft
        The bAP's amplitude relative to that in the shaft: 1 where it arrives in full.
    input_decay_s, bap_decay_s
        Time constants of their decay (s).
    r2
        Share of the variance of ΔF/F that the reconstruction explains.
    """

    roi: int
    compartment: str
    rate_per_s: float
    rate_low: float
    rate_high: float
    input_dff: float
    input_decay_s: float
    bap_dff: float
    bap_of_shaft: float
    bap_decay_s: float
    r2: float


@dataclass(frozen=True, eq=False)
class SpinePicture:
    """What is drawn of a spine, (time,) each in ΔF/F, beside its shaft.

    ``bap`` is what action potentials make of the spine, on its baseline; ``rest`` its fluorescence without them, and
    ``synaptic`` what the inputs make of that.
    """

    shaft: calvae.SpikeInference
    spine: calvae.SpikeInference
    baseline: float
    bap: np.ndarray
    rest: np.ndarray
    synaptic: np.ndarray


def guess_shaft(rois: calvae.RoiMasks) -> int:
    """Id of the largest ROI: a shaft is longer than any spine."""
    return rois.ids[int(np.argmax([len(pixels) for pixels in rois.pixels]))]


def chosen_spines(text: str, shaft: int, ids: Sequence[int]) -> tuple[int, ...]:
    """Spines that the user typed, such as “2-5, 8”; without any text all ROIs but the shaft."""
    if shaft not in ids:
        raise calvae.RecordingError(
            f"Shaft: expected a ROI of the layer, got {shaft}, which it has no more. Choose the shaft again."
        )
    wanted = typed_rois(text, ids) if text.strip() else tuple(ids)
    spines = tuple(roi for roi in wanted if roi != shaft)
    if not spines:
        raise calvae.RecordingError(
            f"Spines: expected at least one ROI beside the shaft, got only ROI {shaft}. Draw the spines as ROIs, too."
        )
    return spines


def iter_separate(order: Order) -> Iterator[answers.Message | Separated]:
    """Work on a dendrite step by step; errors come as a ``Failure``."""
    number, settings = order.number, order.settings
    try:
        request = answers.Request(number, order.movie, order.rois, (order.shaft, *order.spines), settings)
        traces = yield from answers.iter_traces(request)
        yield answers.Progress(number, 0.5, f"separating {len(order.spines)} spines")
        result = calvae.infer_spines(
            traces, order.shaft, n_samples=settings.n_samples, seed=settings.seed, device=settings.device
        )
        yield Separated(number, result)
    except Exception as error:
        logger.info("dendrite %d failed", number, exc_info=True)
        yield answers.Failure(number, explain(error))


def picture(result: calvae.SpineInference, row: int) -> SpinePicture:
    """What is drawn of the compartment in this row, 1 for the first spine."""
    inference, baseline = result.inference, float(result.theta["baseline"][row])
    return SpinePicture(
        answers.one_roi(inference, 0),
        answers.one_roi(inference, row),
        baseline,
        result.bap[row] + baseline,
        inference.traces.values[row] - result.bap[row] - baseline,
        result.synaptic[row],
    )


def compartments(result: calvae.SpineInference) -> tuple[Compartment, ...]:
    """Numbers of the shaft and of each spine, in the order of the rows."""
    theta, inference = result.theta, result.inference
    return tuple(_compartment(result, row, theta, roi) for row, roi in enumerate(inference.roi_ids))


def _compartment(result: calvae.SpineInference, row: int, theta: Any, roi: int) -> Compartment:
    inference, is_shaft = result.inference, row == 0
    low, high = _rate_interval(inference, row)
    bap, shaft = float(theta["amplitude"][row]), float(theta["amplitude"][0])
    return Compartment(
        roi=roi,
        compartment="shaft" if is_shaft else "spine",
        rate_per_s=float(np.nanmean(inference.rate[row])),
        rate_low=low,
        rate_high=high,
        # The model's shaft has no inputs: these parameters of it mean nothing.
        input_dff=math.nan if is_shaft else float(theta["synaptic_amplitude"][row]),
        input_decay_s=math.nan if is_shaft else float(theta["synaptic_decay"][row]),
        bap_dff=bap,
        bap_of_shaft=bap / shaft if shaft > 0 else math.nan,
        bap_decay_s=float(theta["tau_decay"][row]),
        r2=float(inference.quality["reconstruction_r2"][row]),
    )


def _rate_interval(inference: calvae.SpikeInference, row: int) -> tuple[float, float]:
    """Central credible interval of the mean rate over the recording."""
    if inference.n_samples < 2:
        return math.nan, math.nan
    events = inference.events_of(row)
    number = np.bincount(events["sample"], events["count"], inference.n_samples)
    low, high = np.quantile(number / inference.traces.duration, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def csv_text(rows: Sequence[Compartment]) -> str:
    """The numbers of all compartments as comma-separated values; what there is none of is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f.name for f in fields(Compartment)]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow([_cell(value) for value in values])
    return out.getvalue()


def _cell(value: float | int | str) -> str | int:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value


def ranges(shown: SpinePicture, columns: drawing.Columns) -> tuple[tuple[float, float], ...]:
    """Ranges (ΔF/F) of the rows of shaft, spine and rest; spine and rest have the same scale, to be compared by eye."""
    shaft = [*drawing.extremes(shown.shaft.traces.values[0], columns)]
    spine = [*drawing.extremes(shown.spine.traces.values[0], columns), *drawing.extremes(shown.bap, columns)]
    rest = [*drawing.extremes(shown.rest, columns), *drawing.extremes(shown.synaptic, columns)]
    low, high = zip(drawing.limits(spine), drawing.limits(rest), strict=True)
    span = max(high[0] - low[0], high[1] - low[1])
    return drawing.limits(shaft), (low[0], low[0] + span), (low[1], low[1] + span)


def told(row: Compartment) -> str:
    """What the table has no place for."""
    return (
        f"Spine {row.roi}: {row.rate_low:.2f} to {row.rate_high:.2f} inputs/s with 90 %, "
        f"decay of inputs {row.input_decay_s:.2f} s, of bAPs {row.bap_decay_s:.2f} s"
    )


def heading(result: calvae.SpineInference, row: Compartment) -> str:
    """What is told above the plots of a spine."""
    return (
        f"<b>Spine {row.roi}</b> on shaft {result.shaft} &nbsp; {row.rate_per_s:.2f} inputs/s &nbsp; "
        f"{float(np.nanmean(result.bap_rate)):.2f} bAPs/s, {100 * row.bap_of_shaft:.0f} % of their amplitude arrives"
    )
