"""Plots of what a pulse does to a cell on average."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QLabel, QWidget

from napari_calvae._napari import drawing
from napari_calvae._napari.plot_items import DIMMED, BandItem, Palette, shade
from napari_calvae._napari.pulse_average import AFTER, BEFORE, Average
from napari_calvae._napari.time_plots import BAND_ALPHA
from napari_calvae._napari.training_plots import Pictures

_HINT = "The average over the pulses on a cell is shown here, once it was estimated."
_LIT = 0.22


class AveragePlots(Pictures):
    """Lanes: ΔF/F, the artefact, ΔF/F without it and the response, the rate."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(("ΔF/F", "light", "rest", "spikes/s"), "time since the beginning of a pulse (s)", parent)
        self.average: Average | None = None
        self._opacity = 1.0
        self.title = QLabel(_HINT)
        self.title.setWordWrap(True)
        self.title.setTextFormat(Qt.TextFormat.RichText)
        self.title.setMinimumWidth(120)
        self.stack.insertWidget(0, self.title)
        self._roi = 0
        self.trace, self.artefact, self.rest, self.response, self.rate = (
            pg.PlotCurveItem(antialias=True) for _ in range(5)
        )
        self.band = BandItem()
        self.lit = [BandItem() for _ in self.lanes]
        for lane, item in zip(self.lanes, self.lit, strict=True):
            item.setZValue(-5)
            lane.view.addItem(item)
        for index, items in enumerate(
            ((self.trace,), (self.artefact,), (self.rest, self.response), (self.band, self.rate))
        ):
            for item in items:
                self.lanes[index].view.addItem(item)
        self.lanes[0].view.setXRange(-BEFORE, AFTER, padding=0)
        self.graphics.ci.setOpacity(0)

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours, the same as along the recording."""
        self.colour(palette)
        self._palette = palette
        for trace in (self.trace, self.rest):
            trace.setPen(pg.mkPen(palette.trace, width=1.2))
        self.artefact.setPen(pg.mkPen(palette.rival, width=1.5))
        self.response.setPen(pg.mkPen(palette.posterior, width=1.5))
        self.rate.setPen(pg.mkPen(palette.posterior, width=1.5))
        self.band.set_colour(shade(palette.posterior, BAND_ALPHA))
        for item in self.lit:
            item.set_colour(shade(palette.rival, _LIT))
        self._write()

    def show_cell(self, roi: int, average: Average | None) -> None:
        """Show the average of a cell, or that there is none."""
        self._roi, self.average = roi, average
        self._write()
        self.redraw()

    def set_outdated(self, outdated: bool) -> None:
        """Dim what is shown, and what will be, if it was made of other ROIs or settings than are chosen now."""
        self._opacity = DIMMED if outdated else 1.0
        self.redraw()

    def redraw(self, *_: object) -> None:
        """Draw the average."""
        shown = self.average
        self.graphics.ci.setOpacity(0 if shown is None else self._opacity)
        if shown is None:
            return
        x = shown.seconds
        for item, values in (
            (self.trace, shown.trace),
            (self.artefact, shown.artefact),
            (self.rest, shown.rest),
            (self.response, shown.response),
            (self.rate, shown.rate),
        ):
            item.setData(x, values)
        self.band.set_data(x, shown.low, shown.high)
        for item in self.lit:
            item.set_data(np.array([0, shown.duration]), np.full(2, -1e4), np.full(2, 1e4))
        # One scale for the three lanes of ΔF/F would hide a small artefact: each has its own.
        for lane, drawn in zip(
            self.lanes,
            ([shown.trace], [shown.artefact, np.zeros(1)], [shown.rest, shown.response], [shown.high, np.zeros(1)]),
            strict=True,
        ):
            lane.view.setYRange(*drawing.limits(drawn), padding=0.02)

    def _write(self) -> None:
        if not self._roi:
            return
        if self.average is None:
            self.title.setText(f"<b>ROI {self._roi}</b> &nbsp; no pulse on it")
            return
        p = self._palette
        told = ((p.trace, "ΔF/F"), (p.rival, "artefact"), (p.posterior, "response, rate with 90 %"))
        self.title.setText(
            f"<b>ROI {self._roi}</b> &nbsp; mean over {self.average.n_pulses} pulses on it &nbsp; "
            + " &nbsp; ".join(f'<span style="color:{colour}">━</span> {words}' for colour, words in told)
        )
