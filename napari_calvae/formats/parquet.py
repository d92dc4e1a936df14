"""Parquet tables: one column per ROI, read column by column as they are asked for; results as tidy tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats._files import DAMAGE, arrays_of, believed_rate, provenance_json, whole_files
from napari_calvae.formats.csv_table import (
    event_columns,
    find_columns,
    frame_columns,
    holds_results,
    judged_of,
    judgements_of,
    read_clock,
    roi_columns,
    trace_columns,
)
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit
from napari_calvae.trace_source import TraceSource

PATTERNS = ("*.parquet",)
SUFFIXES = (".parquet",)

#: Under which names the tables tell what no column says, as JSON.
_RECORDING, _PROVENANCE = b"calvae_recording", b"calvae_provenance"


def matches(path: Path) -> bool:
    """Tell whether this is a Parquet table."""
    return path.suffix.lower() == ".parquet" and path.is_file()


def open_source(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> TraceSource:
    """Open a table with a row per frame and a trace per column; null is a missing frame.

    As in text tables, a column called ``time`` or alike (s, or ms or min if it says so) gives the frame rate, one that
    counts frames is left out, and numbers in the other columns' names are ROI ids if they differ. Times may also be
    dates; the first is then 0 s.

    Raises
    ------
    RecordingError
        If the file is damaged, or columns hold something else than numbers.
    """
    arrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            schema, n_frames = file.schema_arrow, file.metadata.num_rows
            names = [name if not name.startswith("__index_level_") else "index" for name in schema.names]
            columns = find_columns(names, path)
            types = [schema.types[i] for i in columns.rois]
            for i, kind in zip(columns.rois, types, strict=True):
                if not (arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind)):
                    raise RecordingError(
                        f"{path.name}: expected numbers in every column, got {kind} in {names[i]!r}. Remove it."
                    )
            stated = json.loads((schema.metadata or {}).get(_RECORDING, b"{}"))
            t0 = float(stated.get("t0", 0.0))
            if columns.clock is not None and "t0" not in stated:
                clock = file.read([schema.names[columns.clock]], use_threads=False).column(0)
                t0, measured = read_clock(_seconds(clock, columns.seconds), path)
                stated["frame_rate"] = measured
    except RecordingError:
        raise
    except (*DAMAGE, arrow.ArrowException) as error:
        raise _unreadable(path, error) from error
    rate, contradicted = believed_rate(frame_rate, stated.get("frame_rate"))
    return TraceSource(
        partial(_fetch, str(path), tuple(schema.names[i] for i in columns.rois)),
        len(columns.rois),
        n_frames,
        rate,  # type: ignore[arg-type]
        unit or stated.get("unit", "dff"),
        columns.ids,
        t0,
        provenance={"source": path.name} | contradicted,
        accepted=judged_of(stated, columns),
    )


def outputs(path: Path) -> tuple[Path, ...]:
    """All files that ``write`` makes of a result."""
    return (path, *(path.with_suffix(end) for end in (".events.parquet", ".rois.parquet")))


def check_needed() -> None:
    """Raise a ``RecordingError`` if the package that writes is missing."""
    _pyarrow()


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write ``NAME.parquet``, ``NAME.events.parquet`` and ``NAME.rois.parquet``, with the columns of the text tables.

    ``NAME.parquet`` has a row per ROI and frame; of traces it has a row per frame with its time (s) and a column per
    ROI, as ``open_source`` reads them, and there is nothing beside it: events and ROIs of a result that was there
    before are removed. Provenance is in the schema's metadata, as JSON under ``calvae_provenance``.
    """
    metadata = {_PROVENANCE: provenance_json(value).encode()}
    if isinstance(value, Traces):
        recording = {"frame_rate": value.frame_rate, "unit": value.unit, "t0": value.t0} | judgements_of(value)
        with whole_files(path, instead_of=_parts(path)) as (file,):
            _table(file, [trace_columns(value)], metadata | {_RECORDING: json.dumps(recording).encode()})
        return
    arrays = arrays_of(value)
    with whole_files(*outputs(path)) as (frames, events, rois):
        _table(frames, frame_columns(value, arrays), metadata)
        _table(events, [event_columns(value)], metadata)
        _table(rois, [roi_columns(value, arrays)], metadata)


def _parts(path: Path) -> tuple[Path, ...]:
    """All files of the result that is there; none where there is no result."""
    arrow, parquet = _pyarrow()
    try:
        return outputs(path) if holds_results(parquet.read_schema(path).names) else ()
    except (OSError, arrow.ArrowException):
        return ()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RecordingError(
            "parquet: expected the package pyarrow, which is not installed. pip install 'napari-calvae[formats]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _unreadable(path: Path, error: BaseException) -> RecordingError:
    return RecordingError(
        f"{path.name}: expected a Parquet table, got a file that cannot be read ({error}). "
        "It may be incomplete: copy or write it again."
    )


def _seconds(clock: Any, scale: float) -> np.ndarray:
    """Times (s) in a column of numbers, dates or durations."""
    times = clock.to_numpy()
    if times.dtype.kind == "M":
        times = times - times[0]
    if times.dtype.kind == "m":
        return times / np.timedelta64(1, "s")
    return times.astype(float) * scale


def _fetch(path: str, names: tuple[str, ...], rows: np.ndarray) -> np.ndarray:
    """(row, time) values of some columns."""
    arrow, parquet = _pyarrow()
    wanted = [names[row] for row in rows]
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read(wanted, use_threads=False, use_pandas_metadata=False)
        return np.stack([_floats(table.column(name)) for name in wanted])
    except (*DAMAGE, arrow.ArrowException) as error:
        raise _unreadable(Path(path), error) from error


def _floats(column: Any) -> np.ndarray:
    """(time,) float32 of a column, NaN where it is null."""
    return np.asarray(column.to_numpy(), np.float32)


def _table(path: Path, parts: Iterable[Mapping[str, np.ndarray]], metadata: dict[bytes, bytes]) -> None:
    """Write parts of a table one below the other, a row group each."""
    arrow, parquet = _pyarrow()
    writer = None
    try:
        for columns in parts:
            table = arrow.table(dict(columns)).replace_schema_metadata(metadata)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
