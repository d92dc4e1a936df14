"""The picture of one ROI for a paper: fluorescence, sampled spikes and rate over the stretch of time in view."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Width and height (mm) of two columns of a journal.
SIZE = (180.0, 105.0)
#: Columns into which frames are gathered, as pixels on the screen: finer than print.
COLUMNS = 1800
TRACE, RECONSTRUCTION, POSTERIOR = "#6b7280", "#d55e00", "#00796b"
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "savefig.dpi": 300,
}


def save_figure(picture: calvae.SpikeInference, seconds: tuple[float, float], path: str | Path) -> None:
    """Write the figure of one ROI: PNG with 300 dots per inch, or SVG whose text can be edited.

    Parameters
    ----------
    picture
        Result of one ROI.
    seconds
        Stretch of time to show (s).
    path
        File that ends in ``.png`` or ``.svg``.
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind not in (".png", ".svg"):
        raise calvae.RecordingError(f"Figure: expected a name that ends in .png or .svg, got {file.name!r}.")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise calvae.RecordingError(
            "Figure: expected matplotlib, found none. Install it: pip install matplotlib"
        ) from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(SIZE[0] / 25.4, SIZE[1] / 25.4), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, picture, seconds)
        part = file.with_name(file.name + ".part")  # never half a file under the name that was asked for
        try:
            figure.savefig(part, format=kind[1:])
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)


def _draw(figure: Figure, picture: calvae.SpikeInference, seconds: tuple[float, float]) -> None:
    columns = drawing.columns(picture.traces, seconds, COLUMNS)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(5, 4, 4))
    values, mean, std = (a[0] for a in (picture.traces.values, picture.reconstruction, picture.reconstruction_std))
    low, high = drawing.extremes(mean - 2 * std, columns)[0], drawing.extremes(mean + 2 * std, columns)[1]
    top.fill_between(columns.centres, low, high, color=RECONSTRUCTION, alpha=0.25, linewidth=0, label="± 2 s.d.")
    top.plot(*drawing.curve(values, columns), color=TRACE, linewidth=0.5, label="ΔF/F")
    top.plot(*drawing.curve(mean, columns), color=RECONSTRUCTION, linewidth=0.8, label="reconstruction")
    top.set_ylabel("ΔF/F")

    image = drawing.raster(picture.events, picture.n_samples, columns) / 255.0
    tinted = np.ones((*image.shape, 4))
    tinted[..., :3] = [int(POSTERIOR[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    tinted[..., 3] = image
    ends = columns.boundaries
    middle.imshow(
        tinted,
        extent=(ends[0], ends[-1], picture.n_samples + 0.5, 0.5),
        aspect="auto",
        interpolation="none",
        origin="upper",
    )
    middle.set(ylim=(0.5, picture.n_samples + 0.5), ylabel="sample")

    window = drawing.band_window(seconds[1] - seconds[0], COLUMNS // 4, picture.frame_rate)
    band = drawing.band(picture, columns, window)
    if band is None:
        bottom.plot(*drawing.curve(picture.rate[0], columns), color=POSTERIOR, linewidth=0.8, label="mean rate")
    else:
        x, rate = drawing.steps(band.boundaries, band.mean)
        bounds = np.repeat(band.low, 2), np.repeat(band.high, 2)
        words = f"90 % credible, in {band.window:.2g} s"
        bottom.fill_between(x, *bounds, color=POSTERIOR, alpha=0.3, linewidth=0, label=words)
        bottom.plot(x, rate, color=POSTERIOR, linewidth=0.8, label="mean rate")
    bottom.set_ylim(bottom=0)
    bottom.set(xlim=seconds, xlabel="time (s)", ylabel="spikes/s")
    for axes in (top, bottom):
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, borderaxespad=0)
    figure.align_ylabels()
    top.set_title(f"ROI {picture.roi_ids[0]}", loc="left", fontsize=8, fontweight="bold")
