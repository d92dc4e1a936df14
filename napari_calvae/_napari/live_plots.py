"""The last half minute of some cells while a recording is going on: fluorescence above the rate of spikes."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from qtpy.QtWidgets import QWidget

from napari_calvae._napari import drawing, live
from napari_calvae._napari.plot_items import BandItem, Palette, Row, shade
from napari_calvae._napari.time_plots import BAND_ALPHA, TimePlots

HINT = "Press Start: fluorescence and spike rate of the picked, the pinned and the first ROIs appear here as they come."
#: Share of a row's height up to which rates are drawn, and from which fluorescence is.
_RATES, _TRACE = 0.38, 0.46
#: Rates (spikes/s) at the top of their scale, of which the least is taken that holds all.
_TOPS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 500)
#: Height (pixels) of a row, which may be any, and the gap below it.
_ANY, _GAP = 1e6, 6
#: Seconds over which the newest rate is averaged.
_NOW = 1.0


class _Cell:
    """One row: a cell's fluorescence, and below it its rate."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.trace, self.rate, self.below = pg.PlotCurveItem(antialias=True), pg.PlotCurveItem(), BandItem()
        for item in (self.below, self.rate, self.trace):
            row.view.addItem(item)
        row.view.setYRange(0, 1.02, padding=0)

    def set_visible(self, visible: bool) -> None:
        for item in (self.row.axis, self.row.view, self.row.legend):
            item.setVisible(visible)

    def set_palette(self, palette: Palette) -> None:
        self.trace.setPen(pg.mkPen(palette.trace, width=1))
        self.rate.setPen(pg.mkPen(palette.posterior, width=1.2))
        self.below.set_colour(shade(palette.posterior, BAND_ALPHA))

    def draw(self, values: np.ndarray, rates: np.ndarray, columns: drawing.Columns, many: bool) -> None:
        low, high = drawing.limits(drawing.extremes(values, columns))
        x, trace = drawing.curve(values, columns)
        self.trace.setData(x, _TRACE + (1 - _TRACE) * (trace - low) / (high - low), connect="finite")
        most = drawing.extremes(rates, columns)[1]
        greatest = float(np.nanmax(most)) if np.isfinite(most).any() else 0.0
        top = next((top for top in _TOPS if top >= greatest), greatest)
        x, rate = drawing.steps(columns.boundaries, _RATES * most / top)
        self.rate.setData(x, rate, connect="finite")
        self.below.set_data(x, np.zeros(len(rate)), rate)
        ticks = [(0.0, "0"), (_RATES, f"{top:g}/s")]
        if not many:
            margin = 0.1 * (high - low)
            for value in (low + margin, high - margin):
                ticks.append((_TRACE + (1 - _TRACE) * (value - low) / (high - low), f"{value:.3g}"))
        self.row.axis.setTicks([ticks])


class LivePlots(TimePlots):
    """A row per cell; time goes on to the right."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__((("", 1),) * live.MOST, HINT, parent)
        self.window_shown: live.Window | None = None
        self.cells = [_Cell(row) for row in self.rows]
        self.set_palette(self.palette_used)
        self.clear()

    def _colour(self, palette: Palette) -> None:
        for cell in self.cells:
            cell.set_palette(palette)

    def show_window(self, window: live.Window, heading: str) -> None:
        """Show what has come last."""
        self.window_shown, self.traces = window, window.traces
        self.set_outdated(self._outdated)
        self.title.setText(heading)
        ids = window.traces.roi_ids
        for place, cell in enumerate(self.cells):
            here = place < len(ids)
            cell.set_visible(here)
            grid = self.graphics.ci.layout
            grid.setRowMaximumHeight(place, _ANY if here else 0)
            grid.setRowSpacing(place, _GAP if here else 0)
        begin, end = window.seconds
        view = self.rows[0].view
        view.setLimits(xMin=begin, xMax=end, minXRange=10 / window.traces.frame_rate)
        view.setXRange(begin, end, padding=0)
        self.redraw()

    def clear(self) -> None:
        """Show nothing."""
        self.window_shown = None
        super().clear()

    def _draw(self, columns: drawing.Columns) -> None:
        shown = self.window_shown
        if shown is None:
            return
        n_rois = shown.traces.n_rois
        for place, cell in enumerate(self.cells[:n_rois]):
            cell.draw(shown.traces.values[place], shown.rates[place], columns, many=n_rois > 3)
            self._write(place, shown)

    def _write(self, place: int, shown: live.Window) -> None:
        p, rates = self.palette_used, shown.rates[place]
        known = rates[np.isfinite(rates)][-max(round(_NOW * shown.traces.frame_rate), 1) :]
        rate = f"{known.mean():.1f} spikes/s" if len(known) else "no rate yet"
        roi = f"<b>ROI {shown.traces.roi_ids[place]}</b>"
        self.write_legend(place, (p.trace, "━", roi), (p.posterior, "■", rate))
