"""Text tables: one column per ROI with a header and, if there is one, a column of times; results as tidy tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from napari_calvae.formats._files import arrays_of, believed_rate, provenance_json, whole_files
from napari_calvae.formats._lazy import SECONDS
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit

PATTERNS = ("*.csv",)
SUFFIXES = (".csv",)

#: What a column of times may be called; a unit follows after something between, but for s and ms.
_TIME = re.compile(
    r"((elapsed|relative)[ _])?(time[ _-]?stamps?|times?|(?P<bare>t))([ _]elapsed)?"
    r"(([\W_]+|(?=m?s))(?P<unit>[a-z\u00b5\u03bc]+))?[\W_]*|(?P<alone>(milli)?seconds|minutes)"
)
#: Units that may follow a mere t: ``t_d`` and ``t_h`` may as well be names of ROIs.
_AFTER_T = ("s", "ms", "us", "ns", "min")
#: What tells that a column is one of times, whatever else its name says.
_TELLS_TIME = re.compile(r"(?<![a-z])(?:frame)?time(?:s|[ _-]?stamps?)?(?![a-z])")
#: What a column that counts frames may be called; pandas calls one without a name "Unnamed: 0" when it reads a table.
_COUNTERS = re.compile(
    r"|#|unnamed: ?\d+(\.\d+)*|(frames?|index|idx|slices?)[\W_]*(no|nr|num|numbers?|id|idx|index|count|counter)?[\W_]*"
)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan")

#: Digits that are written of a number of so many bytes: times need more than fluorescence.
_DIGITS = {4: 6, 8: 15}

#: What a column of ROI ids may be called.
_ROIS = ("roi", "roi_id", "cell", "neuron")


def matches(path: Path) -> bool:
    """Tell whether this is a text table."""
    return path.suffix.lower() == ".csv"


def read(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> Traces:
    """Read one trace per column; empty cells are missing frames.

    A column called ``time`` or alike (s, or ms or min if it says so) gives the frame rate; one that counts frames, as
    ``frame`` or ``Unnamed: 0``, is left out. Numbers in the other columns' names are ROI ids if they differ. The unit
    and which ROIs are accepted are those in ``NAME.provenance.json`` where ``write`` left one; else the unit is ΔF/F.
    """
    names, table = read_table(path)
    columns = find_columns(names, path)
    t0, measured = 0.0, None
    if columns.clock is not None:
        t0, measured = read_clock(table[:, columns.clock] * columns.seconds, path)
    told = _told_beside(path)
    if measured is None and isinstance(told.get("frame_rate"), float):  # of a single frame
        measured = told["frame_rate"]
    rate, contradicted = believed_rate(frame_rate, measured)
    stated, n_frames = told.get("unit"), told.get("frames")
    if isinstance(n_frames, int) and len(table) < n_frames:
        raise RecordingError(
            f"{path.name}: expected {n_frames} frames, as {outputs(path)[-1].name} says, got {len(table)}: it is cut "
            "off. Copy it again; if you took frames out yourself, delete the file that contradicts."
        )
    return Traces(
        table[:, list(columns.rois)].T,
        rate,  # type: ignore[arg-type]
        unit or (stated if stated in ("raw", "dff") else "dff"),
        columns.ids,
        t0,
        provenance={"source": path.name} | contradicted,
        accepted=judged_of(told, columns) if n_frames == len(table) else None,
    )


def judgements_of(traces: Traces) -> dict[str, dict[str, bool]]:
    """What is told of traces beside their table: by ROI id whether it is a cell, if that is known."""
    if traces.accepted is None:
        return {}
    return {"accepted": dict(zip(map(str, traces.roi_ids), traces.accepted.tolist(), strict=True))}


def judged_of(told: Mapping[str, Any], columns: Columns) -> np.ndarray | None:
    """(roi,) which ROIs are cells, as ``judgements_of`` told it; None unless it is known of all."""
    judged = told.get("accepted")
    if not isinstance(judged, dict) or (not columns.ids and len(judged) != len(columns.rois)):
        return None  # without ids in their names, columns that are fewer may be any of them
    ids = columns.ids or tuple(range(1, len(columns.rois) + 1))
    if not all(str(roi) in judged for roi in ids):
        return None
    return np.array([bool(judged[str(roi)]) for roi in ids])


def _told_beside(path: Path) -> dict[str, Any]:
    """What ``write`` says of a table beside it; empty where nothing is, or a file of another program."""
    beside = outputs(path)[-1]
    try:
        found = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


class Columns(NamedTuple):
    """Which columns of a table hold traces, their ROI ids if they tell, and the column of times with its unit (s)."""

    rois: tuple[int, ...]
    ids: tuple[int, ...]
    clock: int | None
    seconds: float


def find_columns(names: Sequence[str], path: Path) -> Columns:
    """Tell from their names what the columns of a table of traces are."""
    if holds_results(names):
        raise RecordingError(
            f"{path.name}: expected traces, one column per ROI, got a table of results with one row per ROI and frame. "
            "Give the recording itself."
        )
    clock, seconds, rois = None, 1.0, []
    for i, name in enumerate(names):
        scale = _seconds_per_unit(name)
        if scale is not None and clock is not None:
            raise RecordingError(
                f"{path.name}: expected one column of times, got {names[clock]!r} and {name!r}. Remove one of them."
            )
        if scale is not None:
            clock, seconds = i, scale
        elif _TELLS_TIME.search(name.lower()):
            raise RecordingError(
                f"{path.name}: expected times in a unit as s, ms or min, got a column {name!r}. Call it time_s, "
                "time_ms or time_min, or remove it."
            )
        elif not _COUNTERS.fullmatch(name.lower()):
            rois.append(i)
    if not rois:
        raise RecordingError(f"{path.name}: expected one column per ROI, got the columns {list(names)}.")
    # The hyphen of roi-3 is none of a negative number, that of roi_-3 is.
    numbers = [re.findall(r"(?:(?<![^\W_])-)?\d+", names[i]) for i in rois]
    ids = tuple(int(n[-1]) for n in numbers if n)
    return Columns(tuple(rois), ids if len(set(ids)) == len(rois) else (), clock, seconds)


def holds_results(names: Iterable[str]) -> bool:
    """Whether a table with these columns is one of results, with a row per ROI and frame."""
    return {"roi", "frame", "rate"} <= set(names)


def _seconds_per_unit(name: str) -> float | None:
    """Seconds per unit of a column of times; None where its name is not that of one."""
    found = _TIME.fullmatch(name.lower())
    unit = (found["unit"] or found["alone"] or "s") if found else ""
    return None if found and found["bare"] and unit not in _AFTER_T else SECONDS.get(unit)


def read_spikes(path: Path) -> dict[int, np.ndarray]:
    """Read known spikes, one per row: a column of ROI ids called ``roi`` or alike, and one of times (s, ms, min)."""
    names, table = read_table(path)
    rois = [i for i, name in enumerate(names) if name.lower() in _ROIS]
    clocks = [(i, scale) for i, name in enumerate(names) if (scale := _seconds_per_unit(name)) is not None]
    if len(rois) != 1 or len(clocks) != 1 or "sample" in names:
        raise RecordingError(
            f"{path.name}: expected one column of ROI ids (roi) and one of spike times (time_s), a row per true spike, "
            f"got the columns {', '.join(names)}. Rename or remove columns."
        )
    ids, (column, scale) = table[:, rois[0]], clocks[0]
    if not np.array_equal(ids, np.round(ids)) or not np.isfinite(table[:, column]).all():
        raise RecordingError(f"{path.name}: expected whole ROI ids and a time in every row, got others. Correct them.")
    return {int(roi): np.sort(table[ids == roi, column]) * scale for roi in np.unique(ids)}


def outputs(path: Path) -> tuple[Path, ...]:
    """All files that ``write`` makes of a result."""
    return (path, *(path.with_suffix(end) for end in (".events.csv", ".rois.csv", ".provenance.json")))


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write ``NAME.csv`` (a row per ROI and frame) and ``NAME.events.csv``, ``.rois.csv``, ``.provenance.json``.

    ``count_low`` and ``count_high`` are the 90 % credible interval of the spike count in the second around the frame.
    Of traces, ``NAME.csv`` has a row per frame with its time (s) and a column per ROI, as ``read`` reads them, and
    there is only ``.provenance.json`` beside it; events and ROIs of a result that was there before are removed.
    """
    if isinstance(value, Traces):
        with whole_files(path, outputs(path)[-1], instead_of=_parts(path)) as (frames, provenance):
            _table(frames, [trace_columns(value)])
            told = json.loads(provenance_json(value)) | {"unit": value.unit, "frames": value.n_frames}
            told["frame_rate"] = value.frame_rate
            told |= judgements_of(value)
            provenance.write_text(json.dumps(told, indent=1), encoding="utf-8")
        return
    arrays = arrays_of(value)
    with whole_files(*outputs(path)) as (frames, events, rois, provenance):
        _table(frames, frame_columns(value, arrays))
        _table(events, [event_columns(value)])
        with open(rois, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            per_roi = roi_columns(value, arrays)
            table.writerow(per_roi)
            table.writerows(zip(*(a.tolist() for a in per_roi.values()), strict=True))
        provenance.write_text(provenance_json(value), encoding="utf-8")


def _parts(path: Path) -> tuple[Path, ...]:
    """All files of the result that is there; none where there is no result."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return outputs(path) if holds_results(file.readline().strip().split(",")) else ()
    except (OSError, UnicodeDecodeError):
        return ()


def trace_columns(traces: Traces) -> dict[str, np.ndarray]:
    """Give traces as columns of a table with a row per frame."""
    return {"time_s": traces.times} | {
        f"roi_{roi}": row for roi, row in zip(traces.roi_ids, traces.values, strict=True)
    }


def frame_columns(result: SpikeInference, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Give a result, with its ``arrays_of``, as columns of a table with a row per ROI and frame, a ROI at a time."""
    n_frames = result.traces.n_frames
    window = np.full(n_frames, -1)
    if "interval" in arrays:
        edges = arrays["interval_edges"]
        window[: edges[-1]] = np.searchsorted(edges, np.arange(edges[-1]), side="right") - 1
    for row, roi in enumerate(result.roi_ids):
        low, high = (
            np.where(window >= 0, arrays["interval"][end, row, window], np.nan)
            if "interval" in arrays
            else np.full(n_frames, np.nan)
            for end in (0, 1)
        )
        yield {
            "roi": np.full(n_frames, roi),
            "frame": np.arange(n_frames),
            "time_s": result.traces.times,
            **{name: arrays[name][row] for name in ("dff", "rate", "reconstruction", "reconstruction_std")},
            "count_low": low,
            "count_high": high,
        }


def event_columns(result: SpikeInference) -> dict[str, np.ndarray]:
    """Give the sampled spikes of a result as columns of a table with a row per event."""
    events, ids = result.events, np.asarray(result.roi_ids, np.int64)
    return {
        "roi": ids[events["roi"]],
        "sample": events["sample"],
        "frame": events["frame"],
        "time_s": result.traces.times[events["frame"]],
        "count": events["count"],
    }


def roi_columns(result: SpikeInference, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give what a result says of each ROI as columns of a table with a row per ROI."""
    named = {name: a for name, a in arrays.items() if name == "accepted" or name.startswith(("theta_", "quality_"))}
    return {"roi": np.asarray(result.roi_ids, np.int64)} | named


def read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """Column names and the (frame, column) numbers of a text table."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordingError(f"{path.name}: expected a text table, got binary data ({error}).") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise RecordingError(f"{path.name}: expected a header and at least one frame, got {len(lines)} lines.")
    delimiter = max(",;\t", key=lines[0].count)
    # NumPy begins a header with "# ".
    names = [name.strip() for name in next(csv.reader([lines[0].lstrip("# ")], delimiter=delimiter))]
    try:
        table = np.loadtxt(lines[1:], delimiter=delimiter, ndmin=2)
    except ValueError:
        table = np.array(
            [_numbers(row, i, path, len(names)) for i, row in enumerate(csv.reader(lines[1:], delimiter=delimiter))]
        )
    if table.shape[1] != len(names):
        raise RecordingError(f"{path.name}: expected {len(names)} columns as in the header, got {table.shape[1]}.")
    _check_header(names, table, path)
    return names, table


def _check_header(names: list[str], table: np.ndarray, path: Path) -> None:
    """Refuse numbers in the first line, which may be those of the first frame, unless they count the ROIs."""
    numbers = [name for name in names if _NUMBER.fullmatch(name.lower())]
    if not numbers:
        return
    whole = all(re.fullmatch(r"[-+]?\d+", name) for name in numbers)
    if whole and any(name and name not in numbers for name in names):
        return
    # A table that pandas wrote: the line begins with nothing, the others with the number of the frame.
    counted = not names[0] and (np.diff(table[:, 0]) == 1).all()
    if whole and (counted or (numbers == names and _count_rois(names, table))):
        return
    raise RecordingError(
        f"{path.name}: expected a header (one name per ROI), got numbers in the first line. "
        "Put a line of names on top, as roi_1; rows are frames and columns are ROIs."
    )


def _count_rois(names: list[str], table: np.ndarray) -> bool:
    """Tell whether names are 0, 1, 2 … or 1, 2, 3 …; of one ROI with whole numbers it may be its first."""
    if len(names) == 1 and (table == np.round(table)).all():
        return False
    return any(names == [str(first + i) for i in range(len(names))] for first in (0, 1))


def _numbers(cells: list[str], row: int, path: Path, n: int) -> list[float]:
    """One row of a table whose cells may be empty."""
    try:
        values = [float(cell) if cell.strip() else np.nan for cell in cells]
    except ValueError as error:
        raise RecordingError(f"{path.name}, line {row + 2}: expected numbers, got {error}.") from error
    if len(values) != n:
        raise RecordingError(f"{path.name}, line {row + 2}: expected {n} columns as in the header, got {len(values)}.")
    return values


def read_clock(times: np.ndarray, path: Path) -> tuple[float, float | None]:
    """First time (s) and frame rate (Hz) of evenly spaced time stamps; a single one tells no rate."""
    if len(times) == 1 and np.isfinite(times).all():
        return float(times[0]), None
    steps = np.diff(times)
    if not len(steps) or not np.isfinite(times).all() or not (steps > 0).all():
        raise RecordingError(f"{path.name}: expected a time column that rises from row to row, got one that does not.")
    interval = (times[-1] - times[0]) / len(steps)
    uneven = np.abs(steps - np.median(steps)) > 0.5 * np.median(steps)
    if uneven.any():
        raise RecordingError(
            f"{path.name}: expected evenly spaced frames, got a step of {steps[uneven][0]:.4g} s among steps of "
            f"{np.median(steps):.4g} s, after {times[:-1][uneven][0]:.4g} s. Put empty cells where frames are missing."
        )
    return float(times[0]), float(1 / interval)


def _table(path: Path, parts: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write parts of a table one below the other, each as columns of equal length; NaN is an empty cell."""
    with open(path, "w", encoding="utf-8") as file:
        for number, columns in enumerate(parts):
            if not number:
                file.write(",".join(columns) + "\n")
            arrays = list(columns.values())
            line = ",".join("%d" if a.dtype.kind in "iu" else f"%.{_DIGITS[a.dtype.itemsize]}g" for a in arrays) + "\n"
            for start in range(0, len(arrays[0]), 10_000):
                block = zip(*(a[start : start + 10_000].tolist() for a in arrays), strict=True)
                file.write("".join(line % row for row in block).replace("nan", ""))
