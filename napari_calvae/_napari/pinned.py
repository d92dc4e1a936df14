"""Cells that stay in view: each one's fluorescence, reconstruction and sampled spikes, below the picked one's."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import QRectF, Qt, QTimer, Signal
from qtpy.QtWidgets import QFrame, QHBoxLayout, QLabel, QScrollArea, QToolButton, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import drawing
from napari_calvae._napari.plot_items import DIMMED, LEGEND_WIDTH, Palette, Row, raster_colours

#: Height (pixels) of a pinned cell, and of as many as are seen without scrolling.
HEIGHT, MOST = 112, 236


class PinnedCell(QWidget):
    """One pinned cell, its time axis that of ``leader``; ``unpinned`` is emitted with its id when it is to go."""

    unpinned = Signal(int)

    def __init__(self, picture: calvae.SpikeInference, leader: pg.ViewBox, palette: Palette):
        super().__init__()
        self.setFixedHeight(HEIGHT)
        self.roi = picture.roi_ids[0]
        self.title, close = QLabel(), QToolButton()
        close.setText("✕")
        close.setToolTip("Unpin this cell")
        close.setAutoRaise(True)
        close.clicked.connect(lambda: self.unpinned.emit(self.roi))
        self.close_button = close
        self.graphics = pg.GraphicsLayoutWidget(self)
        line = QHBoxLayout()
        line.addWidget(self.title, 1)
        line.addWidget(close)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(line)
        layout.addWidget(self.graphics, 1)
        self._build(leader)
        self.set_palette(palette)
        self.set_picture(picture)

    def _build(self, leader: pg.ViewBox) -> None:
        grid = self.graphics.ci
        grid.setContentsMargins(0, 0, 2, 2)
        grid.layout.setVerticalSpacing(3)
        grid.layout.setHorizontalSpacing(0)
        self.rows = [Row(grid, index, label) for index, label in enumerate(("ΔF/F", ""))]
        for index, stretch in enumerate((3, 2)):
            grid.layout.setRowStretchFactor(index, stretch)
        self.rows[1].axis.setStyle(showValues=False, tickLength=0)
        self.trace, self.reconstruction = pg.PlotCurveItem(antialias=True), pg.PlotCurveItem(antialias=True)
        self.raster = pg.ImageItem(axisOrder="row-major")
        for item in (self.trace, self.reconstruction):
            self.rows[0].view.addItem(item)
        self.rows[1].view.addItem(self.raster)
        for row in self.rows:
            row.view.setXLink(leader)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.timeout.connect(self.redraw)
        view = self.rows[0].view
        for signal in (view.sigXRangeChanged, view.sigResized):
            signal.connect(lambda *_: self._later.start(0))

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours."""
        self.graphics.setBackground(palette.background)
        for row in self.rows:
            row.paint(palette)
        self.trace.setPen(pg.mkPen(palette.trace, width=1))
        self.reconstruction.setPen(pg.mkPen(palette.reconstruction, width=1))
        self.raster.setLookupTable(raster_colours(palette.posterior))

    def set_picture(self, picture: calvae.SpikeInference) -> None:
        """Show a result of this ROI."""
        self.picture = picture
        self.title.setText(f"<b>ROI {self.roi}</b> &nbsp; {np.nanmean(picture.rate):.2f} spikes/s on average")
        self.graphics.ci.setOpacity(1)
        self.redraw()

    def set_outdated(self) -> None:
        """Say that ROIs or settings are no longer those of this picture."""
        self.title.setText(f"<b>ROI {self.roi}</b> &nbsp; before the last change; click it, or infer all, to renew it")
        self.graphics.ci.setOpacity(DIMMED)

    def redraw(self) -> None:
        """Draw the stretch of time in view."""
        view = self.rows[0].view
        seconds = tuple(view.viewRange()[0])
        columns = drawing.columns(self.picture.traces, seconds, max(int(view.width()), 1))
        values, mean = self.picture.traces.values[0], self.picture.reconstruction[0]
        self.trace.setData(*drawing.curve(values, columns), connect="finite")
        self.reconstruction.setData(*drawing.curve(mean, columns), connect="finite")
        view.setYRange(
            *drawing.limits([*drawing.extremes(values, columns), *drawing.extremes(mean, columns)]), padding=0
        )
        image = drawing.raster(self.picture.events, self.picture.n_samples, columns)
        self.raster.setImage(image, levels=(0, 255), autoLevels=False)
        per_column = (columns.edges[1] - columns.edges[0]) / columns.frame_rate
        width = per_column * image.shape[1]
        self.raster.setRect(QRectF(columns.boundaries[0], 0.5, width, self.picture.n_samples))
        self.rows[1].view.setYRange(0.5, self.picture.n_samples + 0.5, padding=0)

    def dispose(self) -> None:
        """Give up all graphics."""
        self._later.stop()
        for row in self.rows:
            row.view.setXLink(None)
        self.graphics.close()
        self.graphics.deleteLater()
        self.deleteLater()


class PinnedCells(QScrollArea):
    """The pinned cells below each other, in the order in which they were pinned; hidden while there are none.

    ``changed`` is emitted when there is one more or one less.
    """

    changed = Signal()

    def __init__(self, leader: pg.ViewBox, palette: Palette, parent: QWidget | None = None):
        super().__init__(parent)
        self._leader, self._palette = leader, palette
        self.cells: dict[int, PinnedCell] = {}
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        inside = QWidget()
        self._layout = QVBoxLayout(inside)
        self._layout.setContentsMargins(0, 0, 0, 0)
        self._layout.setSpacing(2)
        self.setWidget(inside)
        self._bar = self.verticalScrollBar()
        if self._bar is not None:
            self._bar.rangeChanged.connect(self._align)
        self._fit()

    def pin(self, picture: calvae.SpikeInference) -> None:
        """Keep a result of one ROI in view; one that is pinned already is renewed."""
        roi = picture.roi_ids[0]
        if roi in self.cells:
            self.cells[roi].set_picture(picture)
            return
        cell = self.cells[roi] = PinnedCell(picture, self._leader, self._palette)
        cell.unpinned.connect(self.unpin)
        self._layout.addWidget(cell)
        self._fit()

    def unpin(self, roi: int) -> None:
        """Let a cell go."""
        cell = self.cells.pop(roi)
        self._layout.removeWidget(cell)
        cell.dispose()
        self._fit()

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours."""
        self._palette = palette
        for cell in self.cells.values():
            cell.set_palette(palette)

    def set_cursor(self, seconds: float) -> None:
        """Move the vertical line of all cells to this time (s)."""
        for row in (row for cell in self.cells.values() for row in cell.rows):
            row.cursor.setValue(seconds)
            row.cursor.show()

    def dispose(self) -> None:
        """Let all cells go."""
        for roi in list(self.cells):
            self.unpin(roi)

    def _align(self, *_: object) -> None:
        """Give the scroll bar the room of the legends: the time axes stay below each other."""
        taken = self._bar.sizeHint().width() if self._bar is not None and self._bar.maximum() > 0 else 0
        for row in (row for cell in self.cells.values() for row in cell.rows):
            row.legend.setFixedWidth(LEGEND_WIDTH - taken)

    def _fit(self) -> None:
        self._align()
        self.setVisible(bool(self.cells))
        self.setMinimumHeight(HEIGHT if self.cells else 0)
        self.setMaximumHeight(min(len(self.cells) * (HEIGHT + 2), MOST))
        self.changed.emit()
