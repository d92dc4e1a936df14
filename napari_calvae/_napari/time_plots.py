"""What plots over time have in common: rows on one axis in seconds, legends, a cursor, rasters and rates with bands."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import QRectF, QSize, Qt, QTimer, Signal
from qtpy.QtWidgets import QLabel, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import drawing
from napari_calvae._napari.plot_items import DIMMED, BandItem, Palette, Row, raster_colours, shade

BAND_ALPHA = 0.35
#: Half the height of what marks a stretch of time, whatever the scale of its row.
_TALL = 1e4


class TimePlots(QWidget):
    """Rows above one time axis; the wheel zooms, dragging moves, a click picks a moment, a double click shows all.

    ``picked`` is emitted with the clicked time (s), ``painted`` after every redrawing.

    Parameters
    ----------
    rows
        Label of each row's axis, and its share of the height.
    hint
        What is said while there is nothing to see.
    """

    picked = Signal(float)
    painted = Signal()

    def __init__(self, rows: Sequence[tuple[str, int]], hint: str, parent: QWidget | None = None):
        super().__init__(parent)
        self.traces: calvae.Traces | None = None
        self.columns: drawing.Columns | None = None
        self.palette_used = Palette.on("#262930", "#f0f1f2")
        self._hint, self._outdated = hint, False
        self.title = QLabel(hint)
        self.title.setTextFormat(Qt.TextFormat.RichText)
        self.title.setWordWrap(True)
        self.title.setMinimumWidth(120)  # or the longest sentence would widen the window
        self.graphics = pg.GraphicsLayoutWidget(self)
        self.graphics.setMinimumSize(QSize(240, 150))
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addWidget(self.title)
        layout.addWidget(self.graphics, 1)
        grid = self.graphics.ci
        grid.setContentsMargins(0, 2, 2, 4)
        grid.layout.setVerticalSpacing(6)
        grid.layout.setHorizontalSpacing(0)
        self.rows = [Row(grid, index, label) for index, (label, _) in enumerate(rows)]
        for index, (_, share) in enumerate(rows):
            grid.layout.setRowStretchFactor(index, share)
        for row in self.rows[1:]:
            row.view.setXLink(self.rows[0].view)
        self.time_axis = pg.AxisItem("bottom", linkView=self.rows[-1].view, maxTickLength=-4)
        self.time_axis.setLabel("time (s)")
        self.time_axis.enableAutoSIPrefix(False)
        self.time_axis.setStyle(maxTickLevel=0)
        self.time_axis.setHeight(36)
        self.time_axis.setTickDensity(1.6)
        grid.addItem(self.time_axis, len(rows), 1)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(0)
        self._later.timeout.connect(self.redraw)
        self.rows[0].view.sigXRangeChanged.connect(self._schedule)
        self.rows[0].view.sigResized.connect(self._schedule)
        self.graphics.scene().sigMouseClicked.connect(self._on_click)

    @abstractmethod
    def _draw(self, columns: drawing.Columns) -> None:
        """Draw what is in these columns; each kind of plots has its own."""

    @abstractmethod
    def _colour(self, palette: Palette) -> None:
        """Take these colours; each kind of plots has its own items."""

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours."""
        self.palette_used = palette
        self.graphics.setBackground(palette.background)
        self.time_axis.setPen(shade(palette.text, 0.45))
        self.time_axis.setTextPen(shade(palette.text, 0.9))
        for row in self.rows:
            row.paint(palette)
        self._colour(palette)
        self.redraw()

    def show_recording(self, traces: calvae.Traces, heading: str) -> None:
        """Show what belongs to these traces; the stretch of time in view stays if they are as long as before."""
        before, self.traces = self.traces, traces
        self.set_outdated(self._outdated)
        self.title.setText(heading)
        ends = _ends(traces)
        view = self.rows[0].view
        view.setLimits(xMin=ends[0], xMax=ends[1], minXRange=min(10 / traces.frame_rate, ends[1] - ends[0]))
        if before is None or _ends(before) != ends:
            view.setXRange(*ends, padding=0)
        self.redraw()

    def set_outdated(self, outdated: bool) -> None:
        """Dim what is shown, and what will be, if it was made of other ROIs or settings than are chosen now."""
        self._outdated = outdated
        if self.traces is not None:
            self.graphics.ci.setOpacity(DIMMED if outdated else 1)

    def clear(self) -> None:
        """Show nothing."""
        self.traces = self.columns = None
        self.title.setText(self._hint)
        self.graphics.ci.setOpacity(0)
        for row in self.rows:
            row.words.setHtml("")
            row.cursor.hide()

    def redraw(self) -> None:
        """Draw the stretch of time in view."""
        self._later.stop()
        if self.traces is None:
            return
        view = self.rows[0].view
        columns = drawing.columns(self.traces, tuple(view.viewRange()[0]), max(int(view.width()), 1))
        self.columns = columns
        self._draw(columns)
        missing = drawing.extremes(~self.traces.valid[0], columns)[1].astype(bool)
        for row in self.rows:
            mark(row.missing, missing, columns)
        self.painted.emit()

    def set_cursor(self, seconds: float) -> None:
        """Move the vertical line of all rows to this time (s)."""
        for row in self.rows:
            row.cursor.setValue(seconds)
            row.cursor.setVisible(self.traces is not None)

    def write_legend(self, row: int, *lines: tuple[str, str, str]) -> None:
        """Lines of colour, mark and words beside a row."""
        self.rows[row].words.setHtml(
            "".join(f'<div style="font-size:8pt"><span style="color:{c}">{m}</span> {t}</div>' for c, m, t in lines)
        )

    def _schedule(self, *_: object) -> None:
        self._later.start()

    def _on_click(self, event: Any) -> None:
        if self.traces is None or event.button() != Qt.MouseButton.LeftButton:
            return
        view = self.rows[0].view
        if event.double():
            view.setXRange(*_ends(self.traces), padding=0)
        elif any(row.view.sceneBoundingRect().contains(event.scenePos()) for row in self.rows):
            self.picked.emit(float(view.mapSceneToView(event.scenePos()).x()))

    def dispose(self) -> None:
        """Give up all graphics; the widget is of no use afterwards."""
        self._later.stop()
        self.graphics.close()
        self.graphics.deleteLater()


class Raster:
    """Sampled spikes of one train, a line per sample."""

    def __init__(self, row: Row) -> None:
        self.item = pg.ImageItem(axisOrder="row-major")
        row.view.addItem(self.item)

    def set_colour(self, colour: str) -> None:
        """Draw spikes in this colour."""
        self.item.setLookupTable(raster_colours(colour))

    def draw(self, picture: calvae.SpikeInference, columns: drawing.Columns, bottom: float = 0.5) -> None:
        """Draw the samples of the first ROI from this height up, each one unit high."""
        image = drawing.raster(picture.events, picture.n_samples, columns)
        self.item.setImage(image, levels=(0, 255), autoLevels=False)
        per_column = (columns.edges[1] - columns.edges[0]) / columns.frame_rate
        self.item.setRect(QRectF(columns.boundaries[0], bottom, per_column * image.shape[1], picture.n_samples))


class Rate:
    """Mean rate of one train with its 90 % credible band."""

    def __init__(self, row: Row) -> None:
        self.band, self.mean = BandItem(), pg.PlotCurveItem()
        for item in (self.band, self.mean):
            row.view.addItem(item)
        #: Length (s) of the windows that the band counts in; none where it cannot be drawn.
        self.window: float | None = None

    def set_colour(self, colour: str) -> None:
        """Draw in this colour."""
        self.mean.setPen(pg.mkPen(colour, width=1))
        self.band.set_colour(shade(colour, BAND_ALPHA))

    def draw(self, picture: calvae.SpikeInference, columns: drawing.Columns, window: float) -> float:
        """Draw rate and band of the first ROI; returns the greatest value drawn."""
        band = drawing.band(picture, columns, window)
        if band is None:
            self.window = None
            self.mean.setData(*drawing.curve(picture.rate[0], columns), connect="finite")
            self.band.set_data(*(np.empty(0),) * 3)
            return float(np.nanmax(drawing.extremes(picture.rate[0], columns)[1]))
        self.window = band.window
        x, mean = drawing.steps(band.boundaries, band.mean)
        self.mean.setData(x, mean)
        self.band.set_data(x, np.repeat(band.low, 2), np.repeat(band.high, 2))
        return float(max(band.high.max(), band.mean.max()))


def mark(item: BandItem, wanted: np.ndarray, columns: drawing.Columns) -> None:
    """Fill the (column,) ``wanted`` columns over the whole height."""
    x, height = drawing.steps(columns.boundaries, np.where(wanted, _TALL, np.nan))
    item.set_data(x, -height, height)


def window_of(columns: drawing.Columns, frame_rate: float) -> float:
    """Length (s) of the windows in which spikes are counted at this zoom."""
    seconds = float(columns.boundaries[-1] - columns.boundaries[0])
    return drawing.band_window(seconds, len(columns.centres), frame_rate)


def told_window(window: float | None) -> str:
    """Legend of what a rate is averaged over."""
    return "in a frame" if window is None else f"in {window:.2g} s"


def _ends(traces: calvae.Traces) -> tuple[float, float]:
    return traces.t0 - 0.5 / traces.frame_rate, traces.t0 + (traces.n_frames - 0.5) / traces.frame_rate
