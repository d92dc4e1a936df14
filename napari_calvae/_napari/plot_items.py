"""What the plots are made of: colours, filled bands, and rows of axis, view and legend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import QRectF
from qtpy.QtGui import QColor, QPainter, QPainterPath
from qtpy.QtWidgets import QGraphicsTextItem

AXIS_WIDTH, LEGEND_WIDTH = 50, 106
#: Opacity of what was made of other ROIs or settings than are chosen.
DIMMED = 0.45
#: Pixels between two numbers of an axis at the left, at least: the height of a line.
_LINE = 14


@dataclass(frozen=True)
class Palette:
    """Colours of the plots; told apart by colour-blind readers and by their lightness."""

    background: str
    text: str
    trace: str
    reconstruction: str
    posterior: str
    rival: str

    @classmethod
    def on(cls, background: str, text: str) -> Palette:
        """Palette that is legible on this background."""
        if QColor(background).lightnessF() < 0.5:
            return cls(background, text, "#aeb6c2", reconstruction="#ffa23a", posterior="#35c9b5", rival="#e58bd8")
        return cls(background, text, "#6b7280", reconstruction="#d55e00", posterior="#00796b", rival="#a3308f")


def shade(colour: str, alpha: float) -> QColor:
    """Translucent colour."""
    tinted = QColor(colour)
    tinted.setAlphaF(alpha)
    return tinted


def on_background(colour: str, alpha: float, background: str) -> str:
    """Opaque colour that a translucent one gives on the background."""
    pairs = zip(QColor(colour).getRgb()[:3], QColor(background).getRgb()[:3], strict=True)
    return QColor(*(round(alpha * c + (1 - alpha) * b) for c, b in pairs)).name()


def raster_colours(colour: str) -> np.ndarray:
    """(256, 4) lookup table of a posterior raster: the brighter a cell of it, the less transparent."""
    dot = QColor(colour)
    table = np.tile(np.array([dot.red(), dot.green(), dot.blue(), 0], np.uint8), (256, 1))
    table[:, 3] = np.arange(256)
    return table


class BandItem(pg.GraphicsObject):
    """A filled band between two curves of at most a few thousand points."""

    def __init__(self) -> None:
        super().__init__()
        self.low = self.high = self.x = np.empty(0)
        self._path = QPainterPath()
        self._brush = pg.mkBrush(None)

    def set_data(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Fill between ``low`` and ``high`` at the same ``x``; not where either is NaN."""
        self.prepareGeometryChange()
        self.x, self.low, self.high = x, low, high
        known = np.isfinite(low) & np.isfinite(high)
        ends = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]])))
        self._path = QPainterPath()
        for start, stop in ends.reshape(-1, 2):
            run = slice(start, stop)
            outline = np.concatenate([x[run], x[run][::-1]]), np.concatenate([high[run], low[run][::-1]])
            self._path.addPath(pg.arrayToQPath(*(np.ascontiguousarray(a, float) for a in outline), connect="all"))
        self.update()

    def set_colour(self, colour: QColor) -> None:
        """Fill with this colour."""
        self._brush = pg.mkBrush(colour)
        self.update()

    def boundingRect(self) -> QRectF:  # noqa: N802 - Qt's name
        """Extent of the band (Qt)."""
        return self._path.boundingRect()

    def paint(self, painter: QPainter, *_: object) -> None:
        """Draw the band (Qt)."""
        painter.fillPath(self._path, self._brush)


class ValueAxis(pg.AxisItem):
    """Axis at the left of a plot, however small that is: pyqtgraph asks for two numbers, whether or not they fit."""

    def __init__(self, view: pg.ViewBox):
        super().__init__("left", linkView=view, maxTickLength=-4)
        self.enableAutoSIPrefix(False)
        self.setStyle(maxTickLevel=0)

    def tickSpacing(self, minVal: float, maxVal: float, size: float) -> list[tuple[float, float]]:  # noqa: N802
        """Distance of ticks, and where they are counted from (pyqtgraph)."""
        span = abs(maxVal - minVal)
        if not span > 0 or not size > 0:
            return []
        least = span * min(_LINE / size, 1.0)
        unit = 10.0 ** math.floor(math.log10(least))
        steps = [n * unit for n in (0.5, 1, 2, 5, 10)]
        place = next(k for k, step in enumerate(steps) if step >= least * (1 - 1e-9))
        while place and math.floor(max(minVal, maxVal) / steps[place]) * steps[place] < min(minVal, maxVal):
            place -= 1  # one number at least
        return [(steps[place], 0.0)]

    def tickValues(self, minVal: float, maxVal: float, size: float) -> list[tuple[float, np.ndarray]]:  # noqa: N802
        """Distance and places of ticks (pyqtgraph); none at the top end, where the row above has its lowest one."""
        top = max(minVal, maxVal) - abs(maxVal - minVal) * min(0.6 * _LINE / max(size, 1), 1.0)
        found = []
        for step, places in super().tickValues(minVal, maxVal, size):
            below = np.asarray(places)[np.asarray(places) <= top]
            found.append((step, below if len(below) > 1 else np.asarray(places)))  # one alone is no scale
        return found


class Row:
    """One of the plots: its axis, its view and its legend at the right."""

    def __init__(self, layout: pg.GraphicsLayout, row: int, label: str):
        self.view = pg.ViewBox(enableMenu=False)
        self.view.setMouseEnabled(x=True, y=False)
        self.view.disableAutoRange()
        self.axis = ValueAxis(self.view)
        self.axis.setLabel(label)
        self.axis.setWidth(AXIS_WIDTH)
        self.missing = BandItem()
        self.missing.setZValue(-10)
        self.view.addItem(self.missing)
        self.cursor = pg.InfiniteLine(angle=90, movable=False)
        self.cursor.setZValue(10)
        self.cursor.hide()
        self.view.addItem(self.cursor)
        self.legend = pg.GraphicsWidget()
        self.legend.setFixedWidth(LEGEND_WIDTH)
        self.words = QGraphicsTextItem(self.legend)
        self.words.setTextWidth(LEGEND_WIDTH)
        layout.addItem(self.axis, row, 0)
        layout.addItem(self.view, row, 1)
        layout.addItem(self.legend, row, 2)

    def paint(self, palette: Palette) -> None:
        """Colour axis, cursor, missing frames and legend."""
        self.axis.setPen(shade(palette.text, 0.45))
        self.axis.setTextPen(shade(palette.text, 0.9))
        self.cursor.setPen(pg.mkPen(shade(palette.text, 0.8), width=1))
        self.missing.set_colour(shade(palette.text, 0.12))
        self.words.setDefaultTextColor(QColor(palette.text))
