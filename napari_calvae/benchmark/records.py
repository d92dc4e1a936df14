"""Measurements by parts, each with the command that repeats it and the machine, as JSON and as a page."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from napari_calvae.formats import whole_files
from napari_calvae.recording import RecordingError

Row = dict[str, object]


def row(part: str, what: str, value: object, unit: str = "") -> Row:
    """One line of a table: of which part, what was measured, its value and unit."""
    return {"part": part, "what": what, "value": value, "unit": unit}


def iter_record(
    parts: Mapping[str, Callable[[], Iterator[Row]]],
    wanted: Sequence[str],
    page: tuple[str, str],
    made_by: Callable[[str], str],
    out: Path | None = None,
) -> Iterator[Row]:
    """Rows of the ``wanted`` ``parts``, by name, as they are measured.

    Parameters
    ----------
    parts
        What there is to measure.
    wanted
        Some of it.
    page
        Name of the record's files without suffix, and the text that its page begins with.
    made_by
        The command that measures a part.
    out
        Folder for the record, which is written after every row: a run of an hour may be cut short. What it has of
        other parts stays.
    """
    unknown = sorted(set(wanted) - set(parts))
    if unknown:
        raise RecordingError(f"parts: expected some of {', '.join(parts)}, got {', '.join(unknown)}.")
    name, text = page
    known = out / f"{name}.json" if out is not None else None
    record: dict[str, Any] = json.loads(known.read_text()) if known and known.exists() else {}
    for part in wanted:
        rows: list[Row] = []
        record[part] = {"made_by": made_by(part), "machine": machine(), "rows": rows}
        for found in parts[part]():
            rows.append(found)
            if out is not None:
                _write(record, out, name, text)
            yield found


def machine() -> dict[str, Any]:
    """What was measured on."""
    return {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()}


def _processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _write(record: Mapping[str, Any], out: Path, name: str, text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with whole_files(out / f"{name}.json", out / f"{name}.md") as (data, page):
        data.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        page.write_text(_markdown(record, text), encoding="utf-8")


def _markdown(record: Mapping[str, Any], text: str) -> str:
    lines = [text]
    for found in record.values():
        on = found["machine"]
        lines += [
            "",
            f"`{found['made_by']}`, {on['cores']} cores ({on['processor']}), Python {on['python']}",
            "",
            "| | | |",
            "|---|---|---|",
        ]
        for line in found["rows"]:
            value = line["value"]
            shown = ("yes" if value else "**no**") if isinstance(value, bool) else f"{value:.4g} {line['unit']}"
            lines.append(f"| {line['part']} | {line['what']} | {shown} |")
    return "\n".join(lines) + "\n"
