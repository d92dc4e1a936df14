"""Judging cells, without Qt: the table of all ROIs, its order and filters, verdicts with undo, where to go next."""

from __future__ import annotations

import csv
import io
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari.stored import FromStore

ACCEPTED, REJECTED, UNJUDGED = "accepted", "rejected", ""
#: What can be shown: all ROIs, or those with one verdict.
SHOW = {"all": None, "unjudged": UNJUDGED, "accepted": ACCEPTED, "rejected": REJECTED}
#: Short heads of columns; a new metric goes by its name.
_TITLES = {
    "noise_level": "ν",
    "spike_rate": "rate",
    "reconstruction_r2": "R²",
    "residual_autocorrelation": "residual",
    "band_coverage": "coverage",
    "unfamiliarity": "unfamiliar",
}
#: Where the best cells are: as far up as can be, or at a number; all others are the better the smaller.
_BEST = {"reconstruction_r2": math.inf, "residual_autocorrelation": 0.0, "band_coverage": 0.95}
_COUNTS = {
    "spikes": ("spikes", "Number of spikes in the recording (posterior mean)"),
    "spikes_uncertainty": ("± spikes", "Width of the 90 % interval of the number of spikes, over its mean"),
}
_COMPARE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<": operator.lt,
    "<=": operator.le,
    "≤": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "≥": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"^\s*([^<>=!≤≥]+?)\s*(<=|>=|==|!=|<|>|=|≤|≥)\s*([-+.\deE]+)\s*$")


@dataclass(frozen=True)
class Column:
    """A column of numbers: its name in files and filters, its head, what it says, and where the best cells are."""

    name: str
    title: str
    help: str
    best: float = -math.inf

    @property
    def words(self) -> str:
        """Name to be read."""
        return self.name.replace("_", " ")

    @property
    def worst(self) -> str:
        """Which cells are the worst, in words."""
        if math.isinf(self.best):
            return "the smallest is the worst" if self.best > 0 else "the largest is the worst"
        return f"the farthest from {self.best:g} is the worst"

    def badness(self, values: np.ndarray) -> np.ndarray:
        """(roi,) how bad these values are, in their own units; only its order counts."""
        return np.abs(values - self.best) if math.isfinite(self.best) else -math.copysign(1, self.best) * values


ROI = Column("roi", "ROI", "Id of the ROI, as in its layer")


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers of all ROIs: ``values[column name]`` is (roi,), NaN where a ROI was not inferred yet."""

    rois: tuple[int, ...] = ()
    columns: tuple[Column, ...] = ()
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    inferred: int = 0

    def column(self, name: str) -> Column | None:
        """Column of this name, the ROI's id included."""
        return next((column for column in (ROI, *self.columns) if column.name == name), None)

    def numbers(self, name: str) -> np.ndarray:
        """(roi,) float values of a column."""
        return np.array(self.rois, float) if name == ROI.name else np.asarray(self.values[name], float)


@dataclass(frozen=True)
class Judgement:
    """What the user thinks of one ROI."""

    verdict: str = UNJUDGED
    note: str = ""


#: One step of judging, for undo: ROI, before, after.
Step = tuple[tuple[int, Judgement, Judgement], ...]


@dataclass(frozen=True)
class Judgements:
    """Judgements by ROI id, with what was done and undone; every change is a new value."""

    by_roi: Mapping[int, Judgement] = field(default_factory=dict)
    done: tuple[Step, ...] = ()
    undone: tuple[Step, ...] = ()

    def of(self, roi: int) -> Judgement:
        """Judgement of a ROI; unjudged if nothing was said."""
        return self.by_roi.get(roi, Judgement())

    def judge(self, rois: Iterable[int], **changes: str) -> Judgements:
        """Change ``verdict`` or ``note`` of some ROIs; what changes nothing is no step."""
        step = tuple((roi, self.of(roi), replace(self.of(roi), **changes)) for roi in rois)
        step = tuple(change for change in step if change[1] != change[2])
        if not step:
            return self
        return Judgements(self._with((roi, after) for roi, _, after in step), (*self.done, step))

    def undo(self) -> Judgements:
        """Take the newest step back."""
        if not self.done:
            return self
        *done, step = self.done
        return Judgements(self._with((roi, before) for roi, before, _ in step), tuple(done), (*self.undone, step))

    def redo(self) -> Judgements:
        """Do again what was undone last."""
        if not self.undone:
            return self
        *undone, step = self.undone
        return Judgements(self._with((roi, after) for roi, _, after in step), (*self.done, step), tuple(undone))

    def _with(self, changes: Iterable[tuple[int, Judgement]]) -> dict[int, Judgement]:
        merged = dict(self.by_roi) | dict(changes)
        return {roi: judgement for roi, judgement in merged.items() if judgement != Judgement()}


@dataclass(frozen=True)
class Condition:
    """A comparison that a ROI has to stand, as in ``unfamiliarity > 1``."""

    name: str
    sign: str
    number: float


@dataclass(frozen=True)
class View:
    """How the table is looked at: sorted by a column, ROIs with one verdict only, conditions."""

    sort: str = ROI.name
    descending: bool = False
    show: str = "all"
    conditions: tuple[Condition, ...] = ()


class Counts:
    """Spikes per ROI, mean and relative 90 % interval; counted once per result."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[calvae.SpikeInference, tuple[float, float]]] = {}

    def of(self, roi: int, inference: calvae.SpikeInference | FromStore, row: int) -> tuple[float, float]:
        """Posterior mean of the number of spikes, and the width of its 90 % interval over that mean."""
        if isinstance(inference, FromStore):
            return inference.count(row)
        known = self._known.get(roi)
        if known is None or known[0] is not inference:
            events = inference.events_of(row)
            totals = np.bincount(events["sample"], events["count"], inference.n_samples)
            mean = float(totals.mean()) if len(totals) else math.nan
            low, high = np.quantile(totals, [0.05, 0.95]) if len(totals) else (math.nan, math.nan)
            self._known[roi] = known = inference, (mean, float(high - low) / mean if mean else math.nan)
        return known[1]


def tabulate(
    rois: Sequence[int],
    rows: Mapping[int, tuple[calvae.SpikeInference | FromStore, int]],
    counts: Counts | None = None,
    more: Mapping[Column, Mapping[int, float]] | None = None,
) -> Table:
    """Table of these ROIs from what was inferred, (result, row) by ROI id; its columns are those of the quality.

    ``more`` are further columns, numbers by ROI id, shown if any of their numbers is known.
    """
    counts = counts or Counts()
    known = next(iter(rows.values()), None)
    metrics = tuple(known[0].quality.dtype.names or ()) if known is not None else tuple(calvae.QC)
    columns = [_metric(name) for name in metrics] + [Column(name, *words) for name, words in _COUNTS.items()]
    values = {column.name: np.full(len(rois), np.nan) for column in columns}
    for place, roi in enumerate(rois):
        if roi in rows:
            inference, row = rows[roi]
            for name in metrics:
                values[name][place] = inference.quality[name][row]
            for name, value in zip(_COUNTS, counts.of(roi, inference, row), strict=True):
                values[name][place] = value
    for column, numbers in (more or {}).items():
        if numbers:
            columns.append(column)
            values[column.name] = np.array([numbers.get(roi, np.nan) for roi in rois])
    return Table(tuple(rois), tuple(columns), values, sum(roi in rows for roi in rois))


def _metric(name: str) -> Column:
    described = calvae.QC[name].__doc__ if name in calvae.QC else None
    words = (described or name.replace("_", " ")).strip().splitlines()[0]
    return Column(name, _TITLES.get(name, name.replace("_", " ")), words, _BEST.get(name, -math.inf))


def digits(values: np.ndarray) -> int:
    """Decimals that all numbers of a column get, so that they stand below each other."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if len(finite) else 0.0
    return 0 if largest >= 100 else 1 if largest >= 10 else 2


def conditions(text: str, table: Table) -> tuple[Condition, ...]:
    """Read a filter such as ``unfamiliarity > 1 and noise level < 5``; empty text filters nothing."""
    names = {column.name: column.name for column in (ROI, *table.columns)}
    names |= {column.title.lower(): column.name for column in table.columns}
    found = []
    for part in re.split(r"\band\b|,|&", text) if text.strip() else ():
        match = _CONDITION.match(part)
        name = match and (names.get(match[1].lower()) or names.get("_".join(match[1].lower().split())))
        try:
            number = float(match[3]) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or not name or math.isnan(number):
            raise calvae.RecordingError(
                f"Filter: expected a column, a sign and a number as in “unfamiliarity > 1”, got “{part.strip()}”. "
                f"Columns: {', '.join(column.name for column in (ROI, *table.columns))}."
            )
        found.append(Condition(name, match[2], number))
    return tuple(found)


def arrange(table: Table, judged: Judgements, view: View) -> tuple[int, ...]:
    """Ids of the ROIs to show, in their order; ROIs without a value come last either way."""
    wanted = SHOW[view.show]
    keep = np.array([wanted is None or judged.of(roi).verdict == wanted for roi in table.rois], bool)
    for condition in view.conditions:
        if table.column(condition.name) is None:
            continue  # the numbers of another model, which this one does not have
        keep &= _COMPARE[condition.sign](table.numbers(condition.name), condition.number)
    if view.sort in ("verdict", "note"):
        words = [getattr(judged.of(roi), view.sort) for roi in table.rois]
        order = sorted(range(len(words)), key=lambda i: words[i], reverse=view.descending)
        order = [i for i in order if words[i]] + [i for i in order if not words[i]]
    else:
        values = table.numbers(view.sort if table.column(view.sort) else ROI.name)
        order = np.argsort(-values if view.descending else values, kind="stable").tolist()  # NaN goes last
    return tuple(table.rois[i] for i in order if keep[i])


def neighbour(order: Sequence[int], current: int | None, step: int) -> int | None:
    """ROI ``step`` rows further, stopping at the ends; the first one if none is chosen."""
    if not order:
        return None
    if current not in order:
        return order[0 if step > 0 else -1]
    return order[min(max(order.index(current) + step, 0), len(order) - 1)]


def next_unjudged(order: Sequence[int], current: int | None, judged: Judgements) -> int | None:
    """Next ROI below without a verdict, from the top again after the last; None if all are judged."""
    start = order.index(current) + 1 if current in order else 0
    around = [*order[start:], *order[:start]]
    return next((roi for roi in around if judged.of(roi).verdict == UNJUDGED), None)


def worst(table: Table, order: Sequence[int], judged: Judgements, name: str) -> int | None:
    """Worst ROI shown by a column, among those without a verdict if there are any; None if nothing is known."""
    column = table.column(name)
    if column is None:
        return None
    badness = dict(zip(table.rois, column.badness(table.numbers(name)).tolist(), strict=True))
    known = [roi for roi in order if math.isfinite(badness[roi])]
    unjudged = [roi for roi in known if judged.of(roi).verdict == UNJUDGED]
    return max(unjudged or known, key=badness.__getitem__, default=None)


def shown_column(table: Table, *names: str) -> Column | None:
    """First of these columns that holds numbers, else the first of the table."""
    found = (table.column(name) for name in (*names, *(column.name for column in table.columns)))
    return next((column for column in found if column is not None and column is not ROI), None)


def colour_range(values: np.ndarray) -> tuple[float, float] | None:
    """Ends of the colour scale: all values, or of many the middle 96 %; None without values."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [0.02, 0.98]) if len(finite) > 50 else (finite.min(), finite.max())
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(high) + 0.5)


def shades(values: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    """(…) place of values on a colour scale, 0 to 1; NaN stays."""
    return np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1)


def csv_text(table: Table, order: Sequence[int], judged: Judgements) -> str:
    """ROIs of ``order`` as comma-separated values; unknown numbers are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["roi", "verdict", *(column.name for column in table.columns), "note"])
    places = {roi: place for place, roi in enumerate(table.rois)}
    for roi in order:
        values = [float(table.values[column.name][places[roi]]) for column in table.columns]
        numbers = [f"{value:.6g}" if math.isfinite(value) else "" for value in values]
        writer.writerow([roi, judged.of(roi).verdict, *numbers, judged.of(roi).note])
    return out.getvalue()
