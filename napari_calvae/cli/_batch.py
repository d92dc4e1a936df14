"""From recordings to files of results: one, or all in a folder."""

from __future__ import annotations

import contextlib
import csv
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from napari_calvae.cli._support import Unit, finish, lazy_traces_of, progress

#: Columns of the summary of many recordings.
_COLUMNS = (
    "recording",
    "output",
    "rois",
    "without_signal",
    "frame_rate_hz",
    "duration_s",
    "spikes_expected",
    "doubts",
    "seconds",
    "error",
)


@dataclass(frozen=True)
class Order:
    """What is the same for all recordings.

    ``settings`` are those of ``iter_batch``; ``reading`` is what a file need not say: frame rate, unit and share of the
    neuropil.
    """

    model: str
    settings: dict[str, Any]
    reading: tuple[float | None, Unit | None, float | None]
    overwrite: bool
    append: bool


@dataclass(frozen=True)
class Outcome:
    """What came of one recording."""

    output: Path
    rois: int
    without_signal: tuple[int, ...]
    frame_rate_hz: float
    duration_s: float
    spikes_expected: float
    #: Codes of what looks wrong with the traces.
    doubts: str
    #: How many of the ROIs are cells in the eyes of whoever made the file, if that is known.
    accepted: int | None

    def __str__(self) -> str:
        silent = self.without_signal
        named = ", ".join(map(str, silent[:8])) + (" …" if len(silent) > 8 else "")
        judged = "" if self.accepted is None else f" ({self.accepted} accepted)"
        return (
            f"{self.output}: {self.rois} ROIs{judged}, {self.duration_s:.1f} s at {self.frame_rate_hz:g} Hz, "
            f"{self.spikes_expected:.0f} spikes expected"
            + (f"; {len(silent)} ROIs without signal left empty ({named})" if silent else "")
        )


def infer_one(source: Path, rois: Path | None, output: Path, order: Order) -> Outcome:
    """Infer one recording; what does not end in ``.zarr`` goes through a store that is removed again."""
    from napari_calvae.doubts import check
    from napari_calvae.formats import check_output, check_result, outputs_of, write
    from napari_calvae.formats._files import check_apart
    from napari_calvae.recording import RecordingError

    stored = output.suffix.lower() == ".zarr"
    if not order.append:  # which leaves all that is there
        check_apart(outputs_of(output), source, rois)
    if order.append or not stored:
        check_result(output, order.overwrite, order.append)
    elif not output.exists() or order.overwrite:
        check_output(output, order.overwrite, folder=True)
    with progress() as report:
        traces = lazy_traces_of(source, rois, order.reading, report)
        if order.append:  # of whose ROIs the file must know
            check_result(output, append=True, traces=traces)
        doubts = check(traces)
        notes = list(doubts)
        report("Loading the model", None)
        with contextlib.nullcontext(output) if stored else _beside(output) as folder:
            from napari_calvae.inference import iter_batch

            told: set[str] = set()

            def tell(step: Any) -> None:
                left = "" if step.seconds_left is None else f", {_duration(step.seconds_left)} left"
                report(f"Inferring{left}", step.fraction)
                while step.done and notes:  # what is an error, too, has been said by then
                    typer.echo(f"Note: {notes.pop(0)}", err=True)
                if step.dashboard and not told:
                    told.add(step.dashboard)
                    typer.echo(f"Dashboard: {step.dashboard}", err=True)

            overwrite = order.overwrite and stored
            store = finish(iter_batch(traces, folder, order.model, overwrite=overwrite, **order.settings), tell)
            if len(store.without_signal) == store.n_rois:
                raise RecordingError(
                    f"{source.name}: expected fluorescence that changes over time, got {store.n_rois} ROIs with only "
                    "missing values (NaN) or a constant. A saturated detector or ROIs outside the imaged field look "
                    "like this."
                )
            report("Writing", None)
            if not stored:
                write(store.load(), output, order.overwrite, order.append)
            duration = store.n_frames / store.frame_rate
            rates = store.quality["spike_rate"]
            return Outcome(
                output,
                store.n_rois,
                store.without_signal,
                store.frame_rate,
                duration,
                float(rates[rates == rates].sum(dtype=float) * duration),
                " ".join(doubt.code for doubt in doubts),
                None if store.accepted is None else int(store.accepted.sum()),
            )


def infer_many(
    folder: Path, pattern: str, rois: Path | None, output: Path, suffix: str, order: Order
) -> list[dict[str, Any]]:
    """Infer every recording in a folder that matches; one that fails is reported, and the rest goes on.

    ``rois`` is then a name beside each movie. Returns the rows of ``summary.csv``, which is kept up to date.
    """
    from napari_calvae.formats import whole_files, writer_of
    from napari_calvae.recording import RecordingError
    from napari_calvae.vae import load_model

    if not folder.is_dir():
        raise RecordingError(f"INPUT: expected a folder with --pattern, got {folder}.")
    own, whole = output.resolve(), folder.resolve()
    try:
        places = [(path, path.resolve()) for path in folder.glob(pattern)]
    except (ValueError, NotImplementedError) as error:  # of which pathlib makes what no pattern may be
        raise RecordingError(f"pattern: expected one as in '*/suite2p', got {pattern!r} ({error}).") from error
    found = sorted(path for path, place in places if place != whole and own not in (place, *place.parents))
    if not found:
        raise RecordingError(f"pattern: expected recordings in {folder} that match {pattern!r}, found none.")
    writer_of(f"x{suffix}")
    targets = _names(found, folder, output, suffix)
    _check_summary(output / "summary.csv", order.overwrite)
    load_model(order.model)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for source, target in zip(found, targets, strict=True):
        row: dict[str, Any] = dict.fromkeys(_COLUMNS, "") | {
            "recording": source.relative_to(folder).as_posix(),
            "output": target.name,
        }
        begun = time.monotonic()
        try:
            outcome = infer_one(source, rois and source.parent / rois, target, order)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other recordings must not wait for it
            row["error"] = " ".join(str(error).split()) or type(error).__name__
        else:
            row |= {name: getattr(outcome, name) for name in _COLUMNS[2:8]}
            row["without_signal"] = len(outcome.without_signal)
        row["seconds"] = round(time.monotonic() - begun, 2)
        rows.append(row)
        typer.echo(f"{len(rows)}/{len(found)} {row['recording']}: {row['error'] or 'inferred'}", err=True)
        with (
            whole_files(output / "summary.csv") as (temporary,),
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    return rows


def _check_summary(path: Path, overwrite: bool) -> None:
    """Refuse to replace a table that is none of ours, unless told to; ours is kept up to date."""
    from napari_calvae.formats import check_output

    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        ours = file.readline().rstrip("\n") == ",".join(_COLUMNS)
    check_output(path, overwrite or ours)


def _names(found: list[Path], folder: Path, output: Path, suffix: str) -> list[Path]:
    """Where the result of each recording goes: one name for each, from its path in the folder.

    No file of one is a file of another, or the summary.
    """
    from napari_calvae.formats import outputs_of
    from napari_calvae.recording import RecordingError

    relative = [path.relative_to(folder) for path in found]
    # Longer and longer until no two are the same; in the last what joins the parts can be in none of them.
    for joined in (
        ["_".join(path.with_suffix("").parts) for path in relative],
        ["_".join(path.parts) for path in relative],
        [path.as_posix().replace("%", "%25").replace("/", "%2F") for path in relative],
    ):
        targets = [output / f"{name}{suffix}" for name in joined]
        files = [output / "summary.csv", *(file for target in targets for file in outputs_of(target))]
        if len({str(file).casefold() for file in files}) == len(files):
            return targets
    raise RecordingError(
        f"pattern: expected recordings whose results have names of their own, got two that would share one among "
        f"{', '.join(path.as_posix() for path in relative[:8])}. Choose another --suffix, or rename them."
    )


@contextlib.contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """Name of a store for the time being, on the same disk as the output, whose own folder may be still to make."""
    there = next(parent for parent in output.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=there) as folder:
        yield Path(folder) / "result.zarr"


def _duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
