"""Figures of the accuracy benchmark, for the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_calvae.recording import RecordingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that colour-blind people can tell apart (Okabe & Ito), by method.
COLOURS = {"calvae": "#0072B2", "OASIS AR1": "#E69F00", "OASIS AR2": "#CC79A7", "suite2p": "#999999"}


def correlation_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Correlation of every method on every data set under the first condition, as a dot plot (PNG).

    Parameters
    ----------
    rows
        As `benchmark.accuracy.accuracy_rows` makes them.
    """
    first = rows[0]
    chosen = [r for r in rows if r["condition"] == first["condition"] and r["sigma"] == first["sigma"]]
    ours = {r["data set"]: r["correlation"] for r in chosen if r["method"] == "calvae"}
    order = sorted(ours, key=lambda name: ours[name])
    figure = _figure(7.5, 1.4 + 0.28 * len(order))
    axes = figure.add_subplot()
    for name, colour in COLOURS.items():
        values = {r["data set"]: r["correlation"] for r in chosen if r["method"] == name}
        best = {r["data set"]: r["at best shift"] for r in chosen if r["method"] == name}
        mean = float(np.mean(list(values.values())))
        size = 60 if name == "calvae" else 30
        label = f"{name} ({mean:.2f})"
        axes.scatter([values[d] for d in order], range(len(order)), s=size, color=colour, label=label, zorder=3)
        if name != "calvae":
            axes.scatter([best[d] for d in order], range(len(order)), s=size, color="none", edgecolor=colour, zorder=2)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"correlation with true spikes (σ = {1000 * first['sigma']:g} ms), median over cells")
    axes.grid(axis="x", alpha=0.3)
    _open(axes)
    title = "mean in brackets; open circles: at each data set's best shift"
    figure.legend(frameon=False, loc="outside lower center", ncols=len(COLOURS), title=title)
    figure.savefig(path, dpi=150, format="png")


def reliability_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Share of true counts within intervals against what the intervals say, by length of window (PNG).

    Parameters
    ----------
    rows
        As `benchmark.accuracy.interval_rows` makes them: one line per data set, their mean as a thick one.
    """
    windows = sorted({r["window"] for r in rows})
    levels = sorted(key for key in rows[0] if key.endswith("%"))
    nominal = [float(key[:-1]) / 100 for key in levels]
    figure = _figure(3.2 * len(windows) + 0.6, 3.9)
    for axes, window in zip(np.atleast_1d(figure.subplots(1, len(windows), sharey=True)), windows, strict=True):
        lines = np.array([[r[key] for key in levels] for r in rows if r["window"] == window])
        axes.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, linestyle="--")
        axes.plot(nominal, lines.T, color=COLOURS["calvae"], alpha=0.25, linewidth=1)
        axes.plot(nominal, lines.mean(0), color=COLOURS["calvae"], linewidth=3, marker="o")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=f"windows of {window:g} s", xlabel="interval")
        axes.title.set_size("medium")
        _open(axes)
    figure.axes[0].set_ylabel("share of true counts inside")
    figure.savefig(path, dpi=150, format="png")


def example_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Stretches of ΔF/F with samples of the posterior and true spikes below them (PNG).

    Parameters
    ----------
    rows
        As `benchmark.accuracy.example_rows` makes them.
    """
    figure = _figure(8.0, 1.0 * len(rows) + 0.5)
    for axes, row in zip(np.atleast_1d(figure.subplots(len(rows), 1)), rows, strict=True):
        rate, dff = row["frame rate"], np.array(row["dff"])
        low, high = dff.min(), max(dff.max(), dff.min() + 1e-3)
        axes.plot(np.arange(len(dff)) / rate, 1 + (dff - low) / (high - low), color="#555555", linewidth=0.8)
        lines = [np.array(frames) / rate for frames in (*row["samples"], row["spikes"])]
        n = len(row["samples"])
        heights = [*(0.95 - 0.6 * np.arange(n) / n), 0.15]
        axes.eventplot(
            lines,
            lineoffsets=heights,
            linelengths=[0.6 / n] * n + [0.25],
            colors=[COLOURS["calvae"]] * n + ["black"],
            linewidths=1.0,
        )
        axes.set(xlim=(0, len(dff) / rate), ylim=(0, 2.05), yticks=[])
        axes.set_ylabel(row["data set"].split("-")[0], rotation=0, ha="right", va="center")
        axes.spines["left"].set_visible(False)
        _open(axes)
        axes.tick_params(labelbottom=row is rows[-1])
    figure.axes[-1].set_xlabel("time (s); grey ΔF/F, blue 20 samples of the posterior, black true spikes")
    figure.savefig(path, dpi=150, format="png")


def _figure(width: float, height: float) -> Figure:
    """A figure (inches) that no window knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecordingError("figures: expected matplotlib, found none. Install napari-calvae[bench].") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _open(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
