"""Who excites whom: the matrix of connections, and the list of them with intervals, the most certain first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import QRectF, QSize, Qt, Signal
from qtpy.QtGui import QColor
from qtpy.QtWidgets import QHBoxLayout, QLabel, QPushButton, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import responses
from napari_calvae._napari.number_table import NumberTable
from napari_calvae._napari.plot_items import DIMMED, Palette, shade

#: Connections that the list shows; the file has all.
_LISTED = 500
#: Ticks that an axis of the matrix has room for.
_TICKS = 16
_HINT = "Connections appear here while they are estimated."
#: Columns of the list: head, what it means, how it is written.
_COLUMNS: dict[str, tuple[str, Callable[[responses.Connection], str]]] = {
    "from": ("Cell whose spikes act (id of its ROI)", lambda c: str(c.sender)),
    "to": ("Cell that they act on (id of its ROI)", lambda c: str(c.receiver)),
    "spikes": (
        "Strength: spikes that one spike of the first cell makes in the second; below zero it prevents them",
        lambda c: responses.signed(c.strength),
    ),
    "90 % credible": (
        "Central credible interval of the strength (spikes per spike)",
        lambda c: f"{responses.signed(c.low)} to {responses.signed(c.high)}",
    ),
    "P": ("Probability that there is a connection at all", lambda c: f"{c.probability:.2f}"),
}


class ConnectionPanel(QWidget):
    """``chosen`` is emitted with the cell (id) that the chosen connection acts on."""

    chosen = Signal(int)

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.found: tuple[responses.Connection, ...] = ()
        self._ids: tuple[int, ...] = ()
        self._opacity = 1.0
        self.title = QLabel(_HINT)
        self.title.setTextFormat(Qt.TextFormat.RichText)
        self.title.setMinimumWidth(120)
        self.title.setToolTip("Colours of the matrix, in spikes per spike; what a cell does to itself is left out")
        self.graphics = pg.GraphicsLayoutWidget(self)
        self.graphics.setMinimumSize(QSize(200, 150))
        grid = self.graphics.ci
        grid.setContentsMargins(0, 2, 4, 4)
        grid.layout.setSpacing(0)
        self.view = pg.ViewBox(enableMenu=False, lockAspect=True, invertY=True)
        self.view.setMouseEnabled(x=False, y=False)
        self.axes = [pg.AxisItem(side, linkView=self.view, maxTickLength=-4) for side in ("left", "bottom")]
        for axis, words in zip(self.axes, ("to cell", "from cell"), strict=True):
            axis.setLabel(words)
        self.axes[0].setWidth(46)
        self.axes[1].setHeight(36)
        grid.addItem(self.axes[0], 0, 0)
        grid.addItem(self.view, 0, 1)
        grid.addItem(self.axes[1], 1, 1)
        self.matrix = pg.ImageItem(axisOrder="row-major")
        self.frame = pg.PlotCurveItem()
        for item in (self.matrix, self.frame):
            self.view.addItem(item)
        self.table = NumberTable(
            {head: tip for head, (tip, _) in _COLUMNS.items()},
            "Connections, the most certain first; a chosen one is framed in the matrix",
        )
        self.table.chosen.connect(self._on_chosen)
        self.csv = QPushButton("Save table …")
        self.csv.setToolTip("Write all connections with standard deviations and intervals (spikes per spike) as .csv")
        self.csv.setEnabled(False)
        left, right = QVBoxLayout(), QVBoxLayout()
        for column in (left, right):
            column.setSpacing(2)
        left.addWidget(self.title)
        left.addWidget(self.graphics, 1)
        right.addWidget(self.table, 1)
        right.addWidget(self.csv)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 2, 0, 0)
        layout.addLayout(left, 1)
        layout.addLayout(right, 1)
        self.clear()

    def clear(self) -> None:
        """Show nothing."""
        self._ids = ()
        self.title.setText(_HINT)
        self.graphics.ci.setOpacity(0)

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours: excitation in that of reconstructions, inhibition in that of posteriors."""
        self._palette = palette
        self.graphics.setBackground(palette.background)
        for axis in self.axes:
            axis.setPen(shade(palette.text, 0.45))
            axis.setTextPen(shade(palette.text, 0.9))
        self.frame.setPen(pg.mkPen(palette.text, width=2))
        table = np.zeros((256, 4), np.uint8)
        for half, colour in ((slice(0, 128), palette.posterior), (slice(128, 256), palette.reconstruction)):
            dot = QColor(colour)
            table[half, :3] = dot.red(), dot.green(), dot.blue()
        table[:, 3] = np.round(np.abs(np.linspace(-255, 255, 256)))
        self.matrix.setLookupTable(table)

    def set_outdated(self, outdated: bool) -> None:
        """Dim what is shown, and what will be, if it was made of other ROIs or settings than are chosen now."""
        self._opacity = DIMMED if outdated else 1.0
        if self._ids:
            self.graphics.ci.setOpacity(self._opacity)

    def show_matrix(self, connectivity: np.ndarray, ids: Sequence[int], words: str) -> None:
        """Show (cell, cell) strengths, row by row what a cell receives; what a cell does to itself is left out."""
        self._ids = tuple(ids)
        n = len(self._ids)
        others = np.where(np.eye(n, dtype=bool), 0, connectivity)
        most = max(float(np.abs(others).max()), 1e-3)
        self.matrix.setImage(others, levels=(-most, most), autoLevels=False)
        self.matrix.setRect(QRectF(-0.5, -0.5, n, n))
        self.view.setRange(QRectF(-0.5, -0.5, n, n), padding=0.02)
        step = -(-n // _TICKS)
        for axis in self.axes:
            axis.setTicks([[(place, str(roi)) for place, roi in list(enumerate(self._ids))[::step]]])
        up, down = self._palette.reconstruction, self._palette.posterior
        self.title.setText(
            f'{words} &nbsp; <span style="color:{up}">■</span> +{most:.2f} &nbsp; '
            f'<span style="color:{down}">■</span> −{most:.2f}'
        )
        self.graphics.ci.setOpacity(self._opacity)

    def show_result(self, result: calvae.AllOpticalInference, found: tuple[responses.Connection, ...]) -> None:
        """Show what was found in the end."""
        self.found = found
        self.frame.setData([], [])
        likely = sum(c.probability > 0.5 for c in self.found)
        self.show_matrix(result.connectivity, result.spikes.roi_ids, f"<b>{likely} of {len(self.found)}</b> are likely")
        listed = self.found[:_LISTED]
        self.table.fill(
            [[written(c) for _, written in _COLUMNS.values()] for c in listed],
            [f"{c.strength:+.3f} ± {c.std:.3f} spikes per spike" for c in listed],
        )
        self.csv.setEnabled(bool(self.found))

    def _on_chosen(self, row: int) -> None:
        one = self.found[row]
        x, y = self._ids.index(one.sender), self._ids.index(one.receiver)
        self.frame.setData(x + np.array([-0.5, 0.5, 0.5, -0.5, -0.5]), y + np.array([-0.5, -0.5, 0.5, 0.5, -0.5]))
        self.chosen.emit(one.receiver)

    def dispose(self) -> None:
        """Give up all graphics; the widget is of no use afterwards."""
        self.graphics.close()
        self.graphics.deleteLater()
