"""What looks wrong with traces although spikes can be inferred from them: warnings that a user can act on.

Each check looks at traces alone, costs about a millisecond per ROI and tells which ROIs it doubts. ``docs/doubts.md``
explains every code. Of the 877 sweeps that Rupprecht et al. (2021, 2025) published one is doubted: a straight line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from napari_calvae.recording import Traces, check_kind
from napari_calvae.trace_source import TraceSource

#: Of more ROIs than this, as many are looked at, spread evenly.
_MOST = 200
#: ROIs whose traces have to agree before something common to all can be told from what cells do.
_COMMON = 8
#: Noise per frame and height of transients (ΔF/F) that the typical ROI of no recording with an indicator has.
_MOST_NOISE, _MOST_RISE = 1.0, 25.0


@dataclass(frozen=True)
class Doubt:
    """One thing that looks wrong.

    Parameters
    ----------
    code
        What it is, one of `CHECKS`.
    roi_ids
        ROIs that it concerns; none if it concerns the recording.
    found
        What was expected and what came.
    advice
        What to do.
    """

    code: str
    roi_ids: tuple[int, ...]
    found: str
    advice: str

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.roi_ids[:8])) + (" …" if len(self.roi_ids) > 8 else "")
        which = f"ROI{'s' * (len(self.roi_ids) > 1)} {shown}: " if self.roi_ids else ""
        return f"{self.code}: {which}{self.found} {self.advice}"


def check(traces: Traces | TraceSource) -> tuple[Doubt, ...]:
    """Everything about some traces that looks wrong although spikes can be inferred from them.

    Parameters
    ----------
    traces
        Raw or ΔF/F, in memory or in a file. Of more than 200 ROIs, 200 are looked at, spread evenly.

    Examples
    --------
    >>> for doubt in check(traces):  # doctest: +SKIP
    ...     print(doubt)
    """
    if not isinstance(traces, TraceSource):
        check_kind(traces)
    rows = np.unique(np.linspace(0, traces.n_rois - 1, min(traces.n_rois, _MOST)).round().astype(int))
    seen = _Seen(traces.select(rows.tolist()), traces.n_rois)
    return tuple(doubt for look in CHECKS.values() if (doubt := look(seen)) is not None)


@dataclass(frozen=True)
class _Seen:
    """Traces and what several checks want to know of them."""

    traces: Traces
    n_rois: int

    @cached_property
    def values(self) -> np.ndarray:
        """(roi, time), NaN where missing."""
        return np.where(self.traces.valid, self.traces.values, np.nan)

    @cached_property
    def steps(self) -> np.ndarray:
        """(roi, time − 1) changes from frame to frame."""
        return np.diff(self.values, axis=1)

    @cached_property
    def noise(self) -> np.ndarray:
        """(roi,) standard deviation of white noise, from the median change; at least tiny."""
        found = np.array([np.median(np.abs(s[np.isfinite(s)])) if np.isfinite(s).any() else 0.0 for s in self.steps])
        return np.maximum(found / 0.954, np.finfo(np.float32).tiny)

    @cached_property
    def levels(self) -> np.ndarray:
        """(2, roi) quantiles of the values, 0.05 and 0.5; 0 where none was measured."""
        return np.nanquantile(_some(self.values), [0.05, 0.5], axis=1)

    @cached_property
    def rises(self) -> np.ndarray:
        """(roi,) height of the largest transients above the median, a frame in 200 being higher."""
        return np.nanquantile(_some(self.values), 0.995, axis=1) - self.levels[1]

    @cached_property
    def percent(self) -> bool:
        """Whether ΔF/F is far larger than any in most ROIs, and yet not as far from zero as raw fluorescence."""
        low, middle = self.levels
        large = np.median(self.noise) > _MOST_NOISE or np.median(self.rises) > _MOST_RISE
        far = np.mean((low > 2.0) & (low > 0.5 * middle)) > 0.5
        return bool(self.traces.unit == "dff" and large and not far)

    def doubt(self, code: str, wrong: np.ndarray, found: str, advice: str) -> Doubt | None:
        """A doubt about the ROIs that are ``wrong``, if there are any."""
        rois = tuple(int(roi) for roi, bad in zip(self.traces.roi_ids, wrong, strict=True) if bad)
        return Doubt(code, rois, found, advice) if rois else None


def _time_axis(seen: _Seen) -> Doubt | None:
    if seen.n_rois <= seen.traces.n_frames:
        return None
    return Doubt(
        "time-axis",
        (),
        f"expected more frames than ROIs, got {seen.n_rois} ROIs of {seen.traces.n_frames} frames.",
        "If rows and columns are swapped, transpose the values: (roi, time).",
    )


def _frame_rate(seen: _Seen) -> Doubt | None:
    stated = seen.traces.provenance.get("frame_rate_of_file")
    rate = seen.traces.frame_rate
    if stated is None or abs(rate / stated - 1) <= 0.01:
        return None
    return Doubt(
        "frame-rate",
        (),
        f"expected the frame rate that the file tells, {stated:.5g} Hz, got {rate:.5g} Hz.",
        "If the file is right, leave the frame rate out.",
    )


def _raw_as_dff(seen: _Seen) -> Doubt | None:
    low, middle = seen.levels
    wrong = (seen.traces.unit == "dff") & (low > 2.0) & (middle > 0) & (not seen.percent)
    return seen.doubt(
        "raw-as-dff",
        wrong,
        "expected ΔF/F, which rests near 0, got values that never come below 2.",
        "If this is raw fluorescence, say unit='raw' (--unit raw).",
    )


def _percent(seen: _Seen) -> Doubt | None:
    if not seen.percent:
        return None
    return Doubt(
        "percent",
        (),
        f"expected ΔF/F as a fraction (1 is +100 %), got noise of {np.median(seen.noise):.3g} and transients of "
        f"{np.median(seen.rises):.3g} in the typical ROI.",
        "If this is ΔF/F in percent, divide it by 100; if it is raw fluorescence, say unit='raw' (--unit raw).",
    )


def _dff_as_raw(seen: _Seen) -> Doubt | None:
    low, middle = seen.levels
    wrong = (seen.traces.unit == "raw") & ((low <= 0) | ((np.abs(middle) < 0.5) & (np.abs(low) < 0.5)))
    return seen.doubt(
        "dff-as-raw",
        wrong,
        "expected raw fluorescence, well above 0, got values at or around 0.",
        "If this is ΔF/F, say unit='dff' (--unit dff); else too much background was subtracted.",
    )


def _smoothed(seen: _Seen) -> Doubt | None:
    """Denoised, filtered or deconvolved traces: silence is exact, or changes of the smallest size follow each other."""
    flat = np.array([np.mean(s[np.isfinite(s)] == 0) if np.isfinite(s).any() else 0.0 for s in seen.steps])
    whole = np.array([bool(np.all(v[np.isfinite(v)] == np.round(v[np.isfinite(v)]))) for v in seen.values])
    wrong = ((flat > 0.3) & ~whole) | (_persistence(seen) > 0.55)
    return seen.doubt(
        "smoothed",
        wrong,
        "expected fluorescence with its noise, got traces that hardly have any, as after denoising or deconvolution.",
        "Use the traces from before that step: the noise tells how sure spikes are.",
    )


def _persistence(seen: _Seen) -> np.ndarray:
    """(roi,) how often successive small changes have the same sign, −1 to 1; white noise has about −0.3."""
    found = np.zeros(len(seen.steps))
    for row, steps in enumerate(seen.steps):
        before, after = steps[:-1], steps[1:]
        small = np.nanmedian(np.abs(steps)) if np.isfinite(steps).any() else 0.0
        kept = np.isfinite(before) & np.isfinite(after) & (np.abs(before) <= 3 * small) & (np.abs(after) <= 3 * small)
        kept &= (before != 0) & (after != 0)
        if kept.sum() >= 50:
            found[row] = np.mean(np.sign(before[kept]) * np.sign(after[kept]))
    return found


def _clipped(seen: _Seen) -> Doubt | None:
    wrong = np.zeros(len(seen.values), bool)
    for row, values in enumerate(seen.values):
        kept = values[np.isfinite(values)]
        if not len(kept) or kept.max() == kept.min():
            continue
        at_top = np.count_nonzero(kept == kept.max())
        # Whole numbers repeat by themselves, but the highest less often than the one below it.
        below = np.count_nonzero(kept == kept[kept < kept.max()].max())
        wrong[row] = at_top >= max(8, 0.002 * len(kept)) and at_top > 2 * below
    return seen.doubt(
        "clipped",
        wrong,
        "expected a highest value that is rare, got one that many frames share, as of a saturated detector.",
        "Spikes in these frames are undercounted; record with less gain.",
    )


def _bleached(seen: _Seen) -> Doubt | None:
    n = seen.traces.n_frames // 10
    wrong = np.zeros(len(seen.values), bool)
    if seen.traces.unit == "raw" and n >= 20:
        ends = (seen.values[:, :n], seen.values[:, -n:])
        first, last = (np.nanpercentile(_some(part), 10, axis=1) for part in ends)
        wrong = (first > 0) & (last > 0) & (last < 0.6 * first)
    return seen.doubt(
        "bleached",
        wrong,
        "expected a steady baseline, got one that falls by more than 40 %.",
        "ΔF/F follows the baseline, but noise grows as light is lost: trust the end of the recording less.",
    )


def _common_frames(seen: _Seen) -> Doubt | None:
    if len(seen.values) < _COMMON or seen.steps.shape[1] < 2:
        return None
    jumps = np.abs(seen.steps) > 6 * seen.noise[:, None]
    frames = np.flatnonzero(jumps.mean(0) > 0.5) + 1
    if not len(frames):
        return None
    shown = ", ".join(map(str, frames[:6].tolist())) + (" …" if len(frames) > 6 else "")
    return Doubt(
        "common-frames",
        (),
        f"expected cells to change one by one, got {len(frames)} frames in which most ROIs jump at once ({shown}).",
        "Motion or light does that: set these frames to NaN, which is missing data.",
    )


def _first_frames(seen: _Seen) -> Doubt | None:
    n = max(3, round(0.2 * seen.traces.frame_rate))
    if seen.traces.n_frames < 20 * n or len(seen.values) < 3:
        return None
    low, middle = seen.levels
    start = np.nanmedian(_some(seen.values[:, :n]), axis=1)
    off = np.abs(start - middle) > 8 * seen.noise + (middle - low)
    if off.mean() < 0.8:
        return None
    return Doubt(
        "first-frames",
        (),
        f"expected the first {n} frames to be like the rest, got most ROIs far off there.",
        "A shutter or a settling laser does that: leave these frames out.",
    )


def _repeated(seen: _Seen) -> Doubt | None:
    known: dict[bytes, int] = {}
    wrong = np.zeros(len(seen.values), bool)
    changing = (seen.steps != 0).any(axis=1) & np.isfinite(seen.values).any(axis=1)
    for row in np.flatnonzero(changing).tolist():
        first = known.setdefault(seen.traces.values[row].tobytes(), row)
        if first != row:
            wrong[[first, row]] = True
    return seen.doubt(
        "repeated",
        wrong,
        "expected every ROI to have a trace of its own, got the same values more than once.",
        "Look whether ROIs were written twice.",
    )


def _missing(seen: _Seen) -> Doubt | None:
    share = 1 - seen.traces.valid.mean(axis=1)
    return seen.doubt(
        "missing",
        (share > 0.3) & (share < 1),
        "expected most frames to be measured, got more than 30 % that are missing (NaN).",
        "Rates there are those of the cell in general, not of its fluorescence.",
    )


#: Every check by its code; ``docs/doubts.md`` has a section for each.
CHECKS: dict[str, Callable[[_Seen], Doubt | None]] = {
    "time-axis": _time_axis,
    "frame-rate": _frame_rate,
    "raw-as-dff": _raw_as_dff,
    "percent": _percent,
    "dff-as-raw": _dff_as_raw,
    "smoothed": _smoothed,
    "clipped": _clipped,
    "bleached": _bleached,
    "common-frames": _common_frames,
    "first-frames": _first_frames,
    "repeated": _repeated,
    "missing": _missing,
}


def _some(values: np.ndarray) -> np.ndarray:
    """The same with 0 in rows that have no number at all, of which there is no quantile."""
    return np.where(np.isfinite(values).any(axis=1, keepdims=True), values, 0.0)
