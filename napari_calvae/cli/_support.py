"""What the commands share: errors in one line, traces from any input, progress and tables."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from napari_calvae.recording import Traces
    from napari_calvae.trace_source import TraceSource

Result = TypeVar("Result")

#: Characters that a line of a table which is piped has at most.
_WIDEST = 10_000


class Unit(StrEnum):
    """What the numbers in a file are."""

    raw = "raw"
    dff = "dff"


class Commands(TyperGroup):
    """Commands whose expected errors are one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, MemoryError) as error:
            fail(
                str(error) or "memory: the computer ran out of it. Close other programs, or infer fewer ROIs at a time."
            )
        except ValueError as error:  # all errors of this package, and pydantic's
            if type(error).__name__ == "ValidationError":
                from napari_calvae.errors import setting_error

                error = setting_error(error)
            elif type(error).__name__ not in ("RecordingError", "ModelError"):
                raise
            fail(str(error))


def fail(message: str) -> NoReturn:
    """Show an error as one line and leave."""
    typer.secho(f"Error: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)


def traces_of(
    source: Path, rois: Path | None, settings: tuple[float | None, Unit | None, float | None], report: Any
) -> Traces:
    """Traces of a movie with its label image, or those in a table."""
    from napari_calvae.formats import believed_rate, is_movie, read, read_labels, read_movie
    from napari_calvae.preprocess import iter_extract
    from napari_calvae.recording import RecordingError

    frame_rate, unit, neuropil = settings
    if not is_movie(source, with_rois=rois is not None):
        if rois is not None:
            raise RecordingError(f"rois: expected a movie to go with them, got {source.name}. Leave out --rois.")
        return read(source, frame_rate, unit.value if unit else None, neuropil)
    movie, stated = read_movie(source)
    if rois is None:
        raise RecordingError(
            f"{source.name}: expected ROIs for a movie, got none. Give a label image with --rois FILE."
        )
    labels = read_labels(rois)
    rate, contradicted = believed_rate(frame_rate, stated)
    share = {} if neuropil is None else {"neuropil_coefficient": neuropil}
    steps = iter_extract(movie, labels, rate, **share)  # type: ignore[arg-type]
    traces = finish(steps, lambda fraction: report("Reading the movie", fraction))
    provenance = {**traces.provenance, "source": source.name, "rois": rois.name, **contradicted}
    return traces.replace(unit=unit.value if unit else "raw", provenance=provenance)


def lazy_traces_of(
    source: Path, rois: Path | None, settings: tuple[float | None, Unit | None, float | None], report: Any
) -> Traces | TraceSource:
    """`traces_of`, but those of a file stay in it until they are asked for."""
    from napari_calvae.formats import is_movie, open_traces

    if rois is not None or is_movie(source):
        return traces_of(source, rois, settings, report)
    frame_rate, unit, neuropil = settings
    return open_traces(source, frame_rate, unit.value if unit else None, neuropil)


def finish(steps: Generator[Any, None, Result], report: Any) -> Result:
    """Consume a generator, report what it yields and return what it returns."""
    while True:
        try:
            report(next(steps))
        except StopIteration as end:
            return end.value


def parameters(assignments: list[str]) -> dict[str, float]:
    """Read ``NAME=VALUE`` options."""
    found: dict[str, float] = {}
    for text in assignments:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise typer.BadParameter(f"expected NAME=VALUE with a number, got {text!r}.") from None
    return found


@contextmanager
def progress() -> Iterator[Any]:
    """Show a bar on stderr where that is a terminal; gives a function of a text and a fraction (None: unknown)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:  # where a bar that is switched off may still leave an empty line
        yield lambda text, fraction: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(text: str, fraction: float | None) -> None:
            bar.update(task, description=text, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        yield report


def show(rows: Iterable[Mapping[str, Any]], summary: Literal["mean", "median"] | None = None) -> None:
    """Print a table, and below it, if wanted, a mean or median of each column of numbers."""
    import statistics

    from rich.console import Console
    from rich.table import Table

    found = list(rows)
    table = Table(*(found[0] if found else ["nothing"]))
    if summary and len(found) > 1:
        first, *others = found[0]
        average: Any = statistics.fmean if summary == "mean" else statistics.median
        found.append({first: summary, **{key: float(average([row[key] for row in found])) for key in others}})
    for row in found:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console()
    if not console.is_terminal:  # of a pipe nobody knows the width: each row is one line, however long
        console.width = _WIDEST
    console.print(table)
