"""Pictures of a fit: its curves, and a cell's posterior by the old model and by the new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import QRectF, QSize, Qt, QTimer
from qtpy.QtGui import QShowEvent
from qtpy.QtWidgets import QComboBox, QLabel, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import drawing, retraining
from napari_calvae._napari.plot_items import Palette, ValueAxis, raster_colours, shade

_AXIS = 46
LABEL = {"font-size": "8pt"}


@dataclass
class Series:
    """One quantity over the steps of a fit."""

    label: str
    unit: str
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class Lane:
    """An axis with its view, in one row of a layout."""

    def __init__(self, layout: pg.GraphicsLayout, row: int, label: str):
        self.view = pg.ViewBox(enableMenu=False)
        self.view.setMouseEnabled(x=True, y=False)
        self.view.disableAutoRange()
        self.axis = ValueAxis(self.view)
        self.axis.setLabel(label, **LABEL)
        self.axis.setWidth(_AXIS)
        layout.addItem(self.axis, row, 0)
        layout.addItem(self.view, row, 1)


class Pictures(QWidget):
    """Lanes above one common axis at the bottom."""

    def __init__(self, lanes: tuple[str, ...], bottom: str, parent: QWidget | None = None):
        super().__init__(parent)
        self.graphics = pg.GraphicsLayoutWidget(self)
        self.graphics.setMinimumSize(QSize(200, 120))
        grid = self.graphics.ci
        grid.setContentsMargins(0, 2, 8, 5)  # pyqtgraph lets the label of an axis hang out
        grid.layout.setVerticalSpacing(6)
        grid.layout.setHorizontalSpacing(0)
        self.lanes = [Lane(grid, row, label) for row, label in enumerate(lanes)]
        for lane in self.lanes[1:]:
            lane.view.setXLink(self.lanes[0].view)
        self.bottom = pg.AxisItem("bottom", linkView=self.lanes[-1].view, maxTickLength=-4)
        self.bottom.setLabel(bottom, **LABEL)
        self.bottom.enableAutoSIPrefix(False)
        self.bottom.setStyle(maxTickLevel=0)
        self.bottom.setHeight(34)
        grid.addItem(self.bottom, len(lanes), 1)
        self.stack = QVBoxLayout(self)
        self.stack.setContentsMargins(0, 4, 0, 0)
        self.stack.setSpacing(3)
        self.stack.addWidget(self.graphics, 1)
        # Steps may come faster than they can be drawn, and to a page that is not in view.
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(30)
        self._later.timeout.connect(self.redraw)

    def redraw(self, *_: object) -> None:
        """Draw what is known."""

    def schedule(self, *_: object) -> None:
        """Draw soon, and once for all changes until then."""
        if self.isVisible() and not self._later.isActive():
            self._later.start()

    def showEvent(self, event: QShowEvent | None) -> None:  # noqa: N802 - Qt's name
        """Draw what came while another page was in view (Qt)."""
        super().showEvent(event)
        self.redraw()

    def colour(self, palette: Palette) -> None:
        """Axes and background in these colours."""
        self.graphics.setBackground(palette.background)
        for axis in (self.bottom, *(lane.axis for lane in self.lanes)):
            axis.setPen(shade(palette.text, 0.45))
            axis.setTextPen(shade(palette.text, 0.9))

    def dispose(self) -> None:
        """Give up all graphics; the widget is of no use afterwards."""
        self._later.stop()
        self.graphics.close()
        self.graphics.deleteLater()


class CurvePlots(Pictures):
    """The loss, and below it one more quantity that the user chooses, over the steps of a fit."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(("loss", ""), "step", parent)
        self.series: dict[str, Series] = {}
        self.which = QComboBox()
        self.which.setToolTip("Quantity in the lower plot: terms of the objective, and parameters of the chosen cell")
        self.which.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.which.currentIndexChanged.connect(self.redraw)
        self.stack.insertWidget(0, self.which)
        self.now = QLabel()
        self.now.setWordWrap(True)
        self.now.setStyleSheet("font-size: 8pt;")
        self.now.setTextFormat(Qt.TextFormat.RichText)
        self.stack.addWidget(self.now)
        self.loss, self.trend, self.chosen = (pg.PlotCurveItem(antialias=True) for _ in range(3))
        self.dots = pg.ScatterPlotItem(size=4, pen=None)
        for item, lane in ((self.loss, 0), (self.trend, 0), (self.chosen, 1), (self.dots, 1)):
            self.lanes[lane].view.addItem(item)

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours."""
        self.colour(palette)
        self.loss.setPen(pg.mkPen(shade(palette.trace, 0.6), width=1))
        self.trend.setPen(pg.mkPen(palette.posterior, width=2))
        self.chosen.setPen(pg.mkPen(palette.reconstruction, width=1.5))
        self.dots.setBrush(pg.mkBrush(palette.reconstruction))

    def clear(self) -> None:
        """Forget the last fit."""
        self.series = {}
        self.which.clear()
        self.now.setText("")
        self.redraw()

    def add_terms(self, step: int, terms: Mapping[str, float], parameters: tuple[Any, ...]) -> None:
        """Add what a step of training reports."""
        words = {p.name: (f"{p.label}, median of cells", p.unit) for p in parameters}
        for name, value in terms.items():
            label, unit = retraining.TERMS.get(name, words.get(name, (name, "")))
            self._add(name, Series(label, unit), step, value)
        self.schedule()

    def add_theta(self, step: int, inference: calvae.SpikeInference, parameters: tuple[Any, ...]) -> None:
        """Add the parameters and the rate of the chosen cell."""
        roi = inference.roi_ids[0]
        now = [f"{float(np.nanmean(inference.rate)):.2f}\u00a0spikes/s"]
        self._add("cell rate", Series(f"Rate of ROI {roi}", "spikes/s"), step, float(np.nanmean(inference.rate)))
        for p in parameters:
            if p.name in inference.theta:
                value = float(inference.theta[p.name][0])
                self._add(f"cell {p.name}", Series(f"{p.label} of ROI {roi}", p.unit), step, value)
                now.append(f"{p.label.lower()}\u00a0{value:.3g}\u00a0{p.unit}".strip().replace("-", "−"))
        self.now.setText(f"<b>ROI {roi}</b>: " + ", ".join(now))
        self.schedule()

    def _add(self, name: str, blank: Series, step: int, value: float) -> None:
        if name not in self.series:
            self.series[name] = blank
            if name != "loss":
                self.which.addItem(f"{blank.label} ({blank.unit})" if blank.unit else blank.label, name)
        self.series[name].steps.append(step)
        self.series[name].values.append(value)

    def redraw(self, *_: object) -> None:
        """Draw what is known."""
        loss = self.series.get("loss", Series("", ""))
        other = self.series.get(self.which.currentData() or "", Series("", ""))
        steps, values = np.array(loss.steps, float), np.array(loss.values, float)
        self.loss.setData(steps, values, connect="finite")
        self.trend.setData(steps, trend(values), connect="finite")
        self.chosen.setData(np.array(other.steps, float), np.array(other.values, float), connect="finite")
        self.dots.setData(np.array(other.steps, float), np.array(other.values, float))
        self.lanes[1].axis.setLabel(other.unit)
        last = max([2, *loss.steps[-1:], *other.steps[-1:]])
        self.lanes[0].view.setXRange(0, last, padding=0.02)
        for lane, shown in zip(self.lanes, (values, np.array(other.values, float)), strict=True):
            lane.view.setYRange(*drawing.limits([shown, shown]), padding=0.02)


class ComparisonPlots(Pictures):
    """One cell by two models: fluorescence with both reconstructions, both rasters, both rates."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(("ΔF/F", "", "", "spikes/s"), "time (s)", parent)
        self.before: calvae.SpikeInference | None = None
        self.after: calvae.SpikeInference | None = None
        self.title = QLabel()
        self.title.setWordWrap(True)
        self.title.setTextFormat(Qt.TextFormat.RichText)
        self.stack.insertWidget(0, self.title)
        for row, stretch in enumerate((5, 3, 3, 5)):
            self.graphics.ci.layout.setRowStretchFactor(row, stretch)
        self.trace, *self.reconstructions = (pg.PlotCurveItem(antialias=True) for _ in range(3))
        self.rates = [pg.PlotCurveItem(antialias=True) for _ in range(2)]
        self.rasters = [pg.ImageItem(axisOrder="row-major") for _ in range(2)]
        for item in (self.trace, *self.reconstructions):
            self.lanes[0].view.addItem(item)
        for lane, raster in zip(self.lanes[1:3], self.rasters, strict=True):
            lane.view.addItem(raster)
            lane.axis.setStyle(showValues=False)
        for item in self.rates:
            self.lanes[3].view.addItem(item)
        self._words = ("", "")
        self._colours = ("#ffa23a", "#35c9b5")
        self.lanes[0].view.sigXRangeChanged.connect(self.schedule)
        self.clear()

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours: the old model in that of reconstructions, the new one in that of posteriors."""
        self.colour(palette)
        self._colours = (palette.reconstruction, palette.posterior)
        self.trace.setPen(pg.mkPen(shade(palette.trace, 0.7), width=1))
        for index, colour in enumerate(self._colours):
            self.reconstructions[index].setPen(pg.mkPen(colour, width=1.5))
            self.rates[index].setPen(pg.mkPen(colour, width=1.2))
            self.rasters[index].setLookupTable(raster_colours(colour))
        self._write()

    def clear(self) -> None:
        """Show nothing."""
        self.before = self.after = None
        self.graphics.ci.setOpacity(0)
        self.title.setText("A chosen cell is shown here before and during the fit: press Start.")

    def set_before(self, picture: calvae.SpikeInference, words: str) -> None:
        """Show a cell by the old model alone."""
        self.before, self.after = picture, None
        self._words = (words, "")
        traces = picture.traces
        self.graphics.ci.setOpacity(1)
        self.lanes[0].view.setXRange(traces.t0, traces.t0 + traces.duration, padding=0)
        self._write()
        self.schedule()

    def set_after(self, picture: calvae.SpikeInference, words: str) -> None:
        """Show the same cell by the new model beside it."""
        self.after = picture
        self._words = (self._words[0], words)
        self._write()
        self.schedule()

    def redraw(self, *_: object) -> None:
        """Draw the stretch of time in view."""
        if self.before is None:
            return
        view = self.lanes[0].view
        seconds = tuple(view.viewRange()[0])
        columns = drawing.columns(self.before.traces, seconds, max(int(view.width()), 1))
        values = self.before.traces.values[0]
        self.trace.setData(*drawing.curve(values, columns), connect="finite")
        shown, rates = [*drawing.extremes(values, columns)], [np.zeros(1)]
        for index, picture in enumerate((self.before, self.after)):
            if picture is None:
                self.reconstructions[index].setData([], [])
                self.rates[index].setData([], [])
                self.rasters[index].clear()
                continue
            self.reconstructions[index].setData(*drawing.curve(picture.reconstruction[0], columns), connect="finite")
            self.rates[index].setData(*drawing.curve(picture.rate[0], columns), connect="finite")
            shown += drawing.extremes(picture.reconstruction[0], columns)
            rates.append(drawing.extremes(picture.rate[0], columns)[1])
            self._draw_raster(index, picture, columns)
        self.lanes[0].view.setYRange(*drawing.limits(shown), padding=0)
        self.lanes[3].view.setYRange(0, max(max(float(np.nanmax(r)) for r in rates), 0.5), padding=0.05)

    def _draw_raster(self, index: int, picture: calvae.SpikeInference, columns: drawing.Columns) -> None:
        image = drawing.raster(picture.events, picture.n_samples, columns)
        self.rasters[index].setImage(image, levels=(0, 255), autoLevels=False)
        per_column = (columns.edges[1] - columns.edges[0]) / columns.frame_rate
        self.rasters[index].setRect(QRectF(columns.boundaries[0], 0.5, per_column * image.shape[1], picture.n_samples))
        self.lanes[1 + index].view.setYRange(0.5, picture.n_samples + 0.5, padding=0.02)

    def _write(self) -> None:
        if self.before is None:
            return
        told = [
            f'<span style="color:{colour}">━</span> {words}'
            for colour, words in zip(self._colours, self._words, strict=True)
            if words
        ]
        self.title.setText(f"<b>ROI {self.before.roi_ids[0]}</b> &nbsp; " + " &nbsp; ".join(told))


def trend(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the steps so far, around each."""
    half = max(len(values) // 20, 1)
    if len(values) <= 2 * half:
        return values
    padded = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)
