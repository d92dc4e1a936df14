"""A stimulated cell on one time axis: its fluorescence, the artefact of the light, what is left, the spikes."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from qtpy.QtWidgets import QWidget

from napari_calvae._napari import drawing, responses
from napari_calvae._napari.plot_items import BandItem, Palette, on_background, shade
from napari_calvae._napari.time_plots import BAND_ALPHA, Raster, Rate, TimePlots, mark, told_window, window_of

HINT = "Load the pulses, then press Estimate: artefact and response of the picked cell appear here, apart."
#: Opacity of the stretches of light on this cell, and of the ticks of light elsewhere.
_LIT, _ELSEWHERE = 0.22, 0.5


class PulsePlots(TimePlots):
    """Rows: ΔF/F with the pulses, the artefact, ΔF/F without it and the response, sampled spikes, their rate.

    The artefact has the colour of rivals, the response and the spikes that of posteriors.
    """

    def __init__(self, parent: QWidget | None = None):
        rows = (("ΔF/F", 5), ("light", 3), ("rest", 5), ("sample", 3), ("spikes/s", 4))
        super().__init__(rows, HINT, parent)
        self.picture: responses.CellPicture | None = None
        self.trace, self.fit, self.artefact, self.rest, self.response = (
            pg.PlotCurveItem(antialias=True) for _ in range(5)
        )
        self.elsewhere = pg.PlotCurveItem()
        self.lit = [BandItem() for _ in self.rows]
        for row, item in zip(self.rows, self.lit, strict=True):
            item.setZValue(-5)
            row.view.addItem(item)
        first, light, rest, samples, rates = self.rows
        for row, items in (
            (first, (self.trace, self.fit, self.elsewhere)),
            (light, (self.artefact,)),
            (rest, (self.rest, self.response)),
        ):
            for item in items:
                row.view.addItem(item)
        samples.axis.setStyle(showValues=False)
        self.raster, self.rate = Raster(samples), Rate(rates)
        self.set_palette(self.palette_used)
        self.clear()

    def _colour(self, palette: Palette) -> None:
        for trace in (self.trace, self.rest):
            trace.setPen(pg.mkPen(palette.trace, width=1))
        self.fit.setPen(pg.mkPen(palette.reconstruction, width=1.2))
        self.artefact.setPen(pg.mkPen(palette.rival, width=1.2))
        self.response.setPen(pg.mkPen(palette.posterior, width=1.5))
        self.elsewhere.setPen(pg.mkPen(shade(palette.text, _ELSEWHERE), width=1))
        for item in self.lit:
            item.set_colour(shade(palette.rival, _LIT))
        self.raster.set_colour(palette.posterior)
        self.rate.set_colour(palette.posterior)

    def show_cell(self, picture: responses.CellPicture, heading: str) -> None:
        """Show a cell."""
        self.picture = picture
        self.show_recording(picture.spikes.traces, heading)

    def _draw(self, columns: drawing.Columns) -> None:
        shown = self.picture
        if shown is None:
            return
        values, fit = shown.spikes.traces.values[0], shown.spikes.reconstruction[0]
        for row, pairs in (
            (0, ((self.trace, values), (self.fit, fit))),
            (1, ((self.artefact, shown.artefact),)),
            (2, ((self.rest, shown.rest), (self.response, shown.response))),
        ):
            ends = [drawing.extremes(one, columns) for _, one in pairs]
            for item, one in pairs:
                item.setData(*drawing.curve(one, columns), connect="finite")
            self.rows[row].view.setYRange(*drawing.limits([e for pair in ends for e in pair]), padding=0)
        here = drawing.extremes(shown.lit, columns)[1].astype(bool)
        for item in self.lit:
            mark(item, here, columns)
        self._draw_elsewhere(shown, columns)
        n = shown.spikes.n_samples
        self.raster.draw(shown.spikes, columns)
        self.rows[3].view.setYRange(0.5, n + 0.5, padding=0.02)
        top = self.rate.draw(shown.spikes, columns, window_of(columns, shown.spikes.frame_rate))
        self.rows[4].view.setYRange(0, max(top, 0.5), padding=0.02)
        self._write()

    def _draw_elsewhere(self, shown: responses.CellPicture, columns: drawing.Columns) -> None:
        """Ticks above the trace where light was on other cells alone."""
        low, high = self.rows[0].view.viewRange()[1]
        tick = 0.12 * (high - low)
        begins = shown.lit_elsewhere & ~np.concatenate([[False], shown.lit_elsewhere[:-1]])
        at = columns.centres[drawing.extremes(begins, columns)[1].astype(bool)]
        self.elsewhere.setData(np.repeat(at, 2), np.tile([high + 0.2 * tick, high + tick], len(at)), connect="pairs")
        self.rows[0].view.setYRange(low, high + 1.2 * tick, padding=0)

    def _write(self) -> None:
        p = self.palette_used
        here = on_background(p.rival, _LIT, p.background)
        trace = (p.trace, "━", "ΔF/F")
        self.write_legend(
            0, trace, (p.reconstruction, "━", "reconstruction"), (here, "■", "light on it"), (p.text, "│", "elsewhere")
        )
        self.write_legend(1, (p.rival, "━", "artefact"))
        self.write_legend(2, (p.trace, "━", "without artefact"), (p.posterior, "━", "response"))
        self.write_legend(3, (p.posterior, "■", "sampled spikes"))
        band = on_background(p.posterior, BAND_ALPHA, p.background)
        self.write_legend(4, (p.posterior, "━", "mean rate"), (band, "■", f"90 %, {told_window(self.rate.window)}"))
