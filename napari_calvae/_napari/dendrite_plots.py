"""A shaft and one of its spines on one time axis: what action potentials make of the spine, and what its inputs do."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from qtpy.QtWidgets import QWidget

from napari_calvae._napari import dendrite, drawing
from napari_calvae._napari.plot_items import BandItem, Palette, on_background, shade
from napari_calvae._napari.time_plots import BAND_ALPHA, Raster, Rate, TimePlots, told_window, window_of

HINT = "Choose shaft and spines, then press Separate: action potentials and synaptic inputs appear here, apart."
PART_ALPHA = 0.45


class DendritePlots(TimePlots):
    """Rows: the shaft, the spine with the part of action potentials, the rest with the part of inputs, trains, rates.

    Back-propagating action potentials (bAPs) have the colour of rivals, synaptic inputs that of posteriors.
    """

    def __init__(self, parent: QWidget | None = None):
        rows = (("shaft", 4), ("spine", 5), ("− bAPs", 5), ("samples", 5), ("per s", 4))
        super().__init__(rows, HINT, parent)
        self.picture: dendrite.SpinePicture | None = None
        self.shaft_trace, self.shaft_fit, self.spine_trace, self.spine_fit, self.rest, self.synaptic = (
            pg.PlotCurveItem(antialias=True) for _ in range(6)
        )
        self.bap_part = BandItem()
        shaft, spine, rest, trains, rates = self.rows
        for row, items in (
            (shaft, (self.shaft_trace, self.shaft_fit)),
            (spine, (self.bap_part, self.spine_trace, self.spine_fit)),
            (rest, (self.rest, self.synaptic)),
        ):
            for item in items:
                row.view.addItem(item)
        trains.axis.setStyle(showValues=False)
        self.bap_raster, self.input_raster = Raster(trains), Raster(trains)
        self.bap_rate, self.input_rate = Rate(rates), Rate(rates)
        self.set_palette(self.palette_used)
        self.clear()

    def _colour(self, palette: Palette) -> None:
        for trace in (self.shaft_trace, self.spine_trace, self.rest):
            trace.setPen(pg.mkPen(palette.trace, width=1))
        for fit in (self.shaft_fit, self.spine_fit):
            fit.setPen(pg.mkPen(palette.reconstruction, width=1.2))
        self.synaptic.setPen(pg.mkPen(palette.posterior, width=1.5))
        self.bap_part.set_colour(shade(palette.rival, PART_ALPHA))
        for raster, colour in ((self.bap_raster, palette.rival), (self.input_raster, palette.posterior)):
            raster.set_colour(colour)
        for rate, colour in ((self.bap_rate, palette.rival), (self.input_rate, palette.posterior)):
            rate.set_colour(colour)

    def show_spine(self, picture: dendrite.SpinePicture, heading: str) -> None:
        """Show a spine beside its shaft."""
        self.picture = picture
        self.show_recording(picture.spine.traces, heading)

    def _draw(self, columns: drawing.Columns) -> None:
        shown = self.picture
        if shown is None:
            return
        for item, values in (
            (self.shaft_trace, shown.shaft.traces.values[0]),
            (self.shaft_fit, shown.shaft.reconstruction[0]),
            (self.spine_trace, shown.spine.traces.values[0]),
            (self.spine_fit, shown.spine.reconstruction[0]),
            (self.rest, shown.rest),
            (self.synaptic, shown.synaptic),
        ):
            item.setData(*drawing.curve(values, columns), connect="finite")
        top = drawing.extremes(shown.bap, columns)[1]
        self.bap_part.set_data(columns.centres, np.full(len(top), shown.baseline), top)
        for row, ends in zip(self.rows, dendrite.ranges(shown, columns), strict=False):
            row.view.setYRange(*ends, padding=0)
        n = shown.spine.n_samples
        gap = max(0.08 * n, 1)
        self.input_raster.draw(shown.spine, columns)
        self.bap_raster.draw(shown.shaft, columns, bottom=0.5 + n + gap)
        self.rows[3].view.setYRange(0.5, 0.5 + 2 * n + gap, padding=0.02)
        window = window_of(columns, shown.spine.frame_rate)
        tops = [r.draw(p, columns, window) for r, p in ((self.bap_rate, shown.shaft), (self.input_rate, shown.spine))]
        self.rows[4].view.setYRange(0, max(*tops, 0.5), padding=0.02)
        self._write()

    def _write(self) -> None:
        p = self.palette_used
        trace, fit = (p.trace, "━", "ΔF/F"), (p.reconstruction, "━", "reconstruction")
        self.write_legend(0, trace, fit)
        self.write_legend(1, trace, fit, (on_background(p.rival, PART_ALPHA, p.background), "■", "part of bAPs"))
        self.write_legend(2, (p.trace, "━", "without bAPs"), (p.posterior, "━", "part of inputs"))
        self.write_legend(3, (p.rival, "■", "bAPs"), (p.posterior, "■", "synaptic inputs"))
        band = on_background(p.posterior, BAND_ALPHA, p.background)
        self.write_legend(
            4,
            (p.rival, "━", "bAPs"),
            (p.posterior, "━", "synaptic inputs"),
            (band, "■", f"90 %, {told_window(self.input_rate.window)}"),
        )
