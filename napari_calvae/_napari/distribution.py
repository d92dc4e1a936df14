"""How one number is distributed over the ROIs, with the colours of the layer and a mark at the picked ROI."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import QSize
from qtpy.QtWidgets import QVBoxLayout, QWidget

from napari_calvae._napari.plot_items import Palette, shade

#: Height (pixels) of a histogram, and of the name below its axis.
HEIGHT, NAME_HEIGHT = 68, 14


class Distribution(QWidget):
    """A small histogram.

    Parameters
    ----------
    named
        Whether its axis says what the number is; else something beside it does.
    """

    def __init__(self, parent: QWidget | None = None, *, named: bool = False):
        super().__init__(parent)
        self._named = named
        room = NAME_HEIGHT if named else 0
        self.graphics = pg.GraphicsLayoutWidget(self)
        self.graphics.setMinimumSize(QSize(120, HEIGHT))
        self.view = pg.ViewBox(enableMenu=False, enableMouse=False)
        self.axis = pg.AxisItem("bottom", linkView=self.view, maxTickLength=-3)
        self.axis.enableAutoSIPrefix(False)
        self.axis.setStyle(maxTickLevel=0)
        self.axis.setHeight(20 + room)
        grid = self.graphics.ci
        grid.setContentsMargins(4, 2, 8, 0)
        grid.layout.setVerticalSpacing(0)
        grid.addItem(self.view, 0, 0)
        grid.addItem(self.axis, 1, 0)
        self.bars = pg.BarGraphItem(x0=np.empty(0), x1=np.empty(0), height=np.empty(0))
        self.mark = pg.InfiniteLine(angle=90, movable=False)
        self.mark.setZValue(10)
        self.view.addItem(self.bars)
        self.view.addItem(self.mark)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.graphics)
        self.setFixedHeight(HEIGHT + room)
        self.counts = np.empty(0, int)
        self.edges = np.empty(0)
        self.show_values(np.empty(0), None, "", None, "")

    def set_palette(self, palette: Palette) -> None:
        """Draw on this background."""
        self.graphics.setBackground(palette.background)
        self.axis.setPen(shade(palette.text, 0.45))
        self.axis.setTextPen(shade(palette.text, 0.9))
        self.mark.setPen(pg.mkPen(palette.reconstruction, width=2))

    def show_values(
        self, values: np.ndarray, ends: tuple[float, float] | None, words: str, colours: np.ndarray | None, name: str
    ) -> None:
        """Histogram of finite ``values`` between ``ends``; what lies beyond goes into the outermost bars.

        Parameters
        ----------
        values, ends
            What to show, and the range of the axis; None, 0 to 1, where there is nothing.
        words
            What the number is, with its unit: the tooltip.
        colours
            (bar, RGBA) colours of the bars, 0 to 1, as many bars as there are; None is grey.
        name
            What the number is, in few words, for the axis.
        """
        ends = ends or (0.0, 1.0)
        finite = np.clip(values[np.isfinite(values)], *ends)
        n_bars = 24 if colours is None else len(colours)
        self.counts, self.edges = np.histogram(finite, n_bars, ends)
        brushes = [pg.mkBrush("#8b939e")] * n_bars
        if colours is not None:
            brushes = [pg.mkBrush(*(round(255 * c) for c in colour[:3])) for colour in colours]
        self.bars.setOpts(x0=self.edges[:-1], x1=self.edges[1:], height=self.counts, brushes=brushes, pen=None)
        self.setToolTip(words)
        if self._named:
            self.axis.setLabel(name)
        self.view.setRange(xRange=ends, yRange=(0, max(int(self.counts.max()), 1)), padding=0.02)
        self.bars.setVisible(bool(len(finite)))

    def set_mark(self, value: float) -> None:
        """Mark one value; none if it is NaN."""
        self.mark.setVisible(bool(np.isfinite(value)))
        if np.isfinite(value):
            self.mark.setValue(float(np.clip(value, self.edges[0], self.edges[-1])))

    def dispose(self) -> None:
        """Give up all graphics; the widget is of no use afterwards."""
        self.graphics.close()
        self.graphics.deleteLater()
        self.deleteLater()
