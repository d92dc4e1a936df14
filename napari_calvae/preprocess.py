"""From raw fluorescence to what a recognition network sees: ΔF/F, noise level, frame rate; and spikes per frame.

Time stamps: frame k is centred on t0 + k / frame_rate and covers half a frame to either side, so that n frames span
n / frame_rate seconds. Traces are read from movies by ``napari_calvae._extraction``, ROIs compared and cells found
by ``napari_calvae._regions``; both are offered here too.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from napari_calvae._extraction import FrameReader, check_movie, extract, iter_extract
from napari_calvae._regions import correlation_peak, local_correlation, roi_marks
from napari_calvae.recording import RecordingError, Traces, check_frame_rate, check_kind

__all__ = [
    "FrameReader",
    "bin_spikes",
    "check_movie",
    "check_traces",
    "correlation_peak",
    "delta_f_over_f",
    "extract",
    "iter_extract",
    "local_correlation",
    "noise_level",
    "resample",
    "roi_marks",
    "usable",
    "with_signal",
]

#: Largest fluorescence whose squares, added up, single precision holds with room to spare.
_LARGEST = 1e15


def check_traces(traces: Traces) -> None:
    """Raise a ``RecordingError`` that names the ROI if no spikes can be inferred from it.

    That is so for recordings of less than a second, and for traces without data or without any change, or with numbers
    beyond 1e15.
    """
    check_kind(traces)
    if traces.duration < 1:
        raise RecordingError(
            f"traces: expected at least one second, got {traces.n_frames} frames at {traces.frame_rate:g} Hz "
            f"({traces.duration:.3g} s). Check that time is the last axis and that the frame rate is in Hz."
        )
    empty = ~traces.valid.any(axis=1)
    if empty.any():
        raise RecordingError(
            f"{_which(traces, empty)}: expected fluorescence, got only missing values (NaN). Leave it out."
        )
    huge = _size(traces) > _LARGEST
    if huge.any():
        raise RecordingError(
            f"{_which(traces, huge)}: expected fluorescence up to {_LARGEST:g}, got {_size(traces).max():g}. Divide it "
            "by something; missing frames are NaN."
        )
    constant = ~with_signal(traces)
    if constant.any():
        value = traces.values[np.flatnonzero(constant)[0]]
        raise RecordingError(
            f"{_which(traces, constant)}: expected fluorescence that changes over time, got the constant "
            f"{np.nanmax(value):g}. "
            "Leave it out; a saturated detector or a ROI outside the imaged field looks like this."
        )


def with_signal(traces: Traces) -> np.ndarray:
    """(roi,) whether a trace has measured frames that differ, none beyond 1e15; nothing can be inferred from others."""
    low = np.min(traces.values, axis=1, where=traces.valid, initial=np.inf)
    high = np.max(traces.values, axis=1, where=traces.valid, initial=-np.inf)
    return np.asarray((high > low) & (_size(traces) <= _LARGEST))


def usable(traces: Traces, window: float = 60.0, percentile: float = 10.0) -> np.ndarray:
    """(roi,) whether spikes can be inferred from a trace: it changes and, if raw, its baseline is above 0 throughout.

    The baseline is that of ``delta_f_over_f``, which refuses the others.
    """
    found = with_signal(traces)
    if traces.unit == "raw":
        baseline = _baseline(traces.values[found], traces.frame_rate, window, percentile)
        found[found] = ~_too_low(baseline, _size(traces)[found])
    return found


def noise_level(values: ArrayLike, frame_rate: float) -> np.ndarray:
    """Shot-noise level ν as CASCADE defines it (%/√Hz), comparable across frame rates.

    ν = 100 · median |ΔF(t+1) − ΔF(t)| / √frame_rate: slow transients hardly touch the median of differences.

    Parameters
    ----------
    values
        (…, time) ΔF/F as a fraction; pairs of frames with a missing one (NaN) are left out.
    frame_rate
        Frames per second (Hz).

    Returns
    -------
    numpy.ndarray
        (…) noise levels; NaN where no two neighbouring frames were measured.
    """
    steps = np.abs(np.diff(np.asarray(values, float), axis=-1))
    if steps.shape[-1] and np.isfinite(steps).all():
        median = np.median(steps, axis=-1)
    else:
        rows = steps.reshape(math.prod(steps.shape[:-1]), steps.shape[-1])
        kept = (row[np.isfinite(row)] for row in rows)
        median = np.array([np.median(row) if len(row) else np.nan for row in kept]).reshape(steps.shape[:-1])
    return 100 * median / np.sqrt(check_frame_rate(frame_rate))


def delta_f_over_f(traces: Traces, window: float = 60.0, percentile: float = 10.0) -> Traces:
    """ΔF/F over a running-percentile baseline: (F − F0) / F0.

    The baseline F0 is the ``percentile`` of overlapping windows of ``window`` seconds, interpolated between their
    centres. A window that is longer than the recording is the whole recording. Traces in ΔF/F are returned as they are.

    Parameters
    ----------
    traces
        Raw fluorescence; missing frames stay missing and do not touch the baseline.
    window
        Length of the windows (s).
    percentile
        Percentile of the fluorescence in a window that counts as baseline, 0 to 100.

    Raises
    ------
    RecordingError
        For a trace that is constant or empty, and for a baseline that is not positive.
    """
    if traces.unit == "dff":
        return traces
    if not window > 0 or not 0 <= percentile <= 100:
        raise RecordingError(
            f"baseline: expected a window of more than 0 s and a percentile between 0 and 100, "
            f"got {window:g} s and {percentile:g}."
        )
    check_traces(traces)
    baseline = _baseline(traces.values, traces.frame_rate, window, percentile)
    wrong = _too_low(baseline, _size(traces))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise RecordingError(
            f"{_which(traces, wrong)}: expected raw fluorescence with a baseline above 0, "
            f"got {baseline[row].min():.3g}. It looks as if it were ΔF/F already (then say unit='dff', or --unit dff), "
            "or as if too much background or neuropil had been subtracted."
        )
    steps = {"baseline": {"window_s": float(window), "percentile": float(percentile)}}
    values = traces.values / baseline
    values -= 1
    return traces.replace(
        values=values, valid=traces.valid, unit="dff", provenance={**traces.provenance, "preprocessing": steps}
    )


def resample(values: ArrayLike, frame_rate: float, new_frame_rate: float) -> tuple[np.ndarray, float]:
    """Change the frame rate without moving anything in time.

    To fewer frames: each new frame is the mean over the time it covers (partial frames count in part). To more frames:
    linear interpolation at the centres of the new frames. A new frame of which more than half is missing, be it NaN or
    beyond the end, is NaN or left out.

    Parameters
    ----------
    values
        (…, time) fluorescence; NaN is missing.
    frame_rate, new_frame_rate
        Frames per second (Hz), now and then.

    Returns
    -------
    values : numpy.ndarray
        (…, new time) of the input's precision, float32 at least.
    shift : float
        What to add to the time of the first frame's centre (s): both first frames *begin* at the same time.
    """
    old, new = check_frame_rate(frame_rate), check_frame_rate(new_frame_rate)
    array = np.asarray(values)
    dtype = np.result_type(array.dtype, np.float32)
    if old == new:
        return array.astype(dtype), 0.0
    n = array.shape[-1]
    rows = array.reshape(-1, n).astype(float)
    valid = np.isfinite(rows)
    edges = np.minimum(np.arange(max(int(n * new / old + 0.5 + 1e-9), 1) + 1) * (old / new), n)
    gaps = not valid.all()
    covered = _box_sum(valid, edges) if gaps else np.broadcast_to(np.diff(edges), (len(rows), len(edges) - 1))
    if new < old:
        out = _box_sum(np.where(valid, rows, 0), edges) if gaps else _box_sum(rows, edges)
        out /= np.where(covered > 0, covered, 1)
    else:
        for row, known in zip(rows, valid, strict=True):
            if gaps and known.any():
                row[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), row[known])
        centres = np.clip((np.arange(len(edges) - 1) + 0.5) * (old / new) - 0.5, 0, n - 1)
        left = centres.astype(np.int64)
        weight = centres - left
        out = rows[:, left] * (1 - weight) + rows[:, np.minimum(left + 1, n - 1)] * weight
    out[covered < (0.5 - 1e-9) * (old / new)] = np.nan
    return out.reshape(*array.shape[:-1], -1).astype(dtype), 0.5 / new - 0.5 / old


def bin_spikes(spike_times: ArrayLike, t0: float, frame_rate: float, n_frames: int) -> np.ndarray:
    """Spike counts per frame: frame k collects the spikes in [t_k − dt/2, t_k + dt/2).

    Parameters
    ----------
    spike_times
        Times of the spikes (s), in any order; those outside the recording are not counted.
    t0
        Centre of the first frame (s), on the same clock.
    frame_rate
        Frames per second (Hz).
    n_frames
        Number of frames.

    Returns
    -------
    numpy.ndarray
        (time,) int64 counts.

    Raises
    ------
    RecordingError
        If ``t0``, frame rate or number of frames is none.
    """
    if not np.isfinite(t0) or n_frames < 0:
        raise RecordingError(
            f"frames: expected 0 or more, the first at a finite time, got {n_frames} from {t0} s on. Give n_frames and "
            "t0 of the traces."
        )
    fs = check_frame_rate(frame_rate)
    with np.errstate(over="ignore", invalid="ignore"):  # what is that far off is outside
        frames = np.floor((np.asarray(spike_times, float).ravel() - t0) * fs + 0.5)
    inside = (frames >= 0) & (frames < n_frames)
    return np.bincount(frames[inside].astype(np.int64), minlength=n_frames)


def _size(traces: Traces) -> np.ndarray:
    """(roi,) largest fluorescence of the measured frames, without its sign; 0 where none was."""
    return np.max(np.abs(traces.values), axis=1, where=traces.valid, initial=0)


def _too_low(baseline: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(roi,) whether a baseline (roi, time) is not above 0, or so little that ΔF/F would be beyond all measure."""
    lowest = baseline.min(axis=1)
    return ~((lowest > 0) & (size.astype(np.float64) <= lowest * _LARGEST))


def _which(traces: Traces, rows: ArrayLike) -> str:
    """Name the ROIs of the rows that are marked, the first few of them."""
    ids = [traces.roi_ids[row] for row in np.flatnonzero(rows)]
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return f"ROI{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:5]))}{more}"


def _baseline(values: np.ndarray, frame_rate: float, seconds: float, percentile: float) -> np.ndarray:
    """(roi, time) percentile of windows of so many seconds, a quarter of a window apart, interpolated."""
    n = values.shape[1]
    window = min(max(round(seconds * frame_rate), 1), n)
    starts = np.unique(np.round(np.linspace(0, n - window, 1 + int(np.ceil((n - window) / max(window // 4, 1))))))
    starts = starts.astype(np.int64)
    centres = starts + (window - 1) / 2
    frames = np.arange(n)
    baseline = np.empty(values.shape, np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(values, window, axis=1)
    for row, view in enumerate(windows):
        level = _percentile(view[starts], percentile)
        known = np.isfinite(level)
        baseline[row] = np.interp(frames, centres[known], level[known])
    return baseline


def _percentile(windows: np.ndarray, percentile: float) -> np.ndarray:
    """(window,) percentile of the finite values in each row of (window, time), linear between ranks; NaN if none."""
    if np.isfinite(windows).all():
        rank = percentile / 100 * (windows.shape[1] - 1)
        low, high = int(np.floor(rank)), int(np.ceil(rank))
        ordered = np.partition(windows, (low, high) if high > low else low, axis=1)
        return ordered[:, low] + (rank - low) * (ordered[:, high] - ordered[:, low])
    kept = (row[np.isfinite(row)] for row in windows)
    return np.array([np.percentile(row, percentile) if len(row) else np.nan for row in kept])


def _box_sum(rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(roi, new time) integrals of (roi, time) step functions between ``edges`` (frames, rising, within the rows)."""
    total = np.zeros((len(rows), rows.shape[1] + 1))
    np.cumsum(rows, axis=1, out=total[:, 1:])
    whole = np.minimum(edges.astype(np.int64), rows.shape[1] - 1)
    return np.diff(total[:, whole] + (edges - whole) * rows[:, whole], axis=1)
