"""Run proofs and keep what came out: a JSON record each, and one report in Markdown of all that are there."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.formats import whole_files


def run(proof: Proof, setting: Setting, out: Path) -> Iterator[Row]:
    """Yield a proof's rows as they come, and write ``out``/<name>.json when all are there.

    The record says seed, command, wall-clock and CPU seconds (of this process, all cores together) and versions. What
    was found in the cache is not counted.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    rows = []
    for row in proof.run(setting):
        rows.append(row)
        yield row
    record = {
        "name": proof.name,
        "rows": rows,
        "seed": setting.seed,
        "quick": setting.quick,
        "command": _command(proof, setting),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("napari-calvae", "torch", "numpy")},
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    out.mkdir(parents=True, exist_ok=True)
    with whole_files(out / f"{proof.name}.json") as (temporary,):
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Records in a folder, by name of the proof."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json")))
    return {record["name"]: record for record in found}


def to_markdown(proofs: dict[str, Proof], records: dict[str, dict[str, Any]]) -> str:
    """One report: of each proof the claim, the table and how to repeat it; those not run are named."""
    parts = ["# Proofs", "Made by `calvae benchmark paper`; do not edit by hand.", ""]
    for name, proof in proofs.items():
        parts += [f"## {proof.title}", "", proof.claim, ""]
        if name not in records:
            parts += ["*Not run.*", ""]
            continue
        record = records[name]
        note = " **A quick run: these numbers mean nothing.**" if record["quick"] else ""
        parts += [to_table(record["rows"]), ""]
        parts += [
            f"`{record['command']}`: seed {record['seed']}, {record['seconds']:.0f} s, of which "
            f"{record['cpu_seconds']:.0f} s on the CPU, not counting what was in the cache.{note}",
            "",
        ]
    return "\n".join(parts)


def _command(proof: Proof, setting: Setting) -> str:
    words = ["calvae benchmark paper", proof.name]
    words += ["--data DATA"] if proof.real else []
    words += [f"--seed {setting.seed}"] if setting.seed else []
    words += ["--quick"] if setting.quick else []
    return " ".join(words)


def to_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table of Markdown."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([_cell(row.get(head, "")) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", r"\|")
