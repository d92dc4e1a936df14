"""“How far can I trust this?”: a table of what to expect of the picked cell, and a stretch of a simulated recording."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QGridLayout, QLabel, QPushButton, QScrollArea, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import drawing, trust
from napari_calvae._napari.plot_items import Palette, shade
from napari_calvae._napari.training_plots import Pictures

#: Seconds of the simulated recording that are shown.
_SHOWN = 20.0
_HINT = "Simulates the picked cell as its model was fitted, infers it again, and compares with the truth."


class TrustPanel(QScrollArea):
    """What to expect of the picked cell."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.ask = QPushButton("How far can I trust this?")
        self.ask.setToolTip(_HINT)
        self.verdict, self.origin = _words(), _words("font-size: 8pt;")
        self.verdict.setText(_HINT)
        self.table = QGridLayout()
        self.table.setHorizontalSpacing(4)
        self.table.setVerticalSpacing(1)
        self.table.setColumnStretch(0, 1)
        self._cells: list[QLabel] = []
        self.pictures = Pictures(("spikes/s",), "time (s) of a simulated recording")
        self.pictures.graphics.setMinimumHeight(110)
        self.pictures.hide()
        self.rate, self.truth = pg.PlotCurveItem(antialias=True), pg.PlotCurveItem()
        for item in (self.rate, self.truth):
            self.pictures.lanes[0].view.addItem(item)
        holder = QWidget()
        column = QVBoxLayout(holder)
        column.setContentsMargins(2, 6, 3, 2)
        column.setSpacing(5)
        for widget in (self.ask, self.verdict):
            column.addWidget(widget)
        column.addLayout(self.table)
        column.addWidget(self.pictures, 1)
        column.addWidget(self.origin)
        column.addStretch()
        self.setWidget(holder)
        self.setWidgetResizable(True)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setFrameShape(QScrollArea.Shape.NoFrame)

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours."""
        self.pictures.colour(palette)
        self.rate.setPen(pg.mkPen(palette.posterior, width=1.5))
        self.truth.setPen(pg.mkPen(shade(palette.reconstruction, 0.9), width=1.5))
        self._legend = (palette.posterior, palette.reconstruction)

    def show_expectation(self, expectation: calvae.Expectation) -> None:
        """Show what is to be expected."""
        for label in self._cells:
            self.table.removeWidget(label)
            label.deleteLater()
        self._cells = []
        for row, line in enumerate(trust.lines(expectation)):
            for column, text in enumerate((line.label, f"<b>{line.mean}</b>", line.span)):
                label = QLabel(text)
                label.setToolTip(line.help)
                label.setAlignment(Qt.AlignmentFlag.AlignLeft if column == 0 else Qt.AlignmentFlag.AlignRight)
                label.setStyleSheet("" if column == 1 else "font-size: 8pt;")
                self.table.addWidget(label, row, column)
                self._cells.append(label)
        self.verdict.setText(trust.sentence(expectation))
        rate, truth = self._legend
        self.origin.setText(
            f'<span style="color:{rate}">━</span> inferred rate &nbsp; <span style="color:{truth}">┃</span> true spikes'
            f"<br>{trust.origin(expectation)}"
        )
        self._draw(expectation)
        self.pictures.show()

    def _draw(self, expectation: calvae.Expectation) -> None:
        result, times = expectation.result, expectation.spike_times[0]
        start = result.traces.t0 - 0.5 / result.frame_rate
        length = min(_SHOWN, result.traces.duration)
        # The stretch with the most spikes says most.
        inside = np.searchsorted(times, times + length) - np.arange(len(times))
        latest = start + result.traces.duration - length
        begin = min(max(float(times[inside.argmax()]) - 1, start), latest) if len(times) else start
        view = self.pictures.lanes[0].view
        view.setXRange(begin, begin + length, padding=0)
        columns = drawing.columns(result.traces, (begin, begin + length), 400)
        self.rate.setData(*drawing.curve(result.rate[0], columns), connect="finite")
        top = max(float(np.nanmax(drawing.extremes(result.rate[0], columns)[1])), 1.0)
        self.truth.setData(np.repeat(times, 2), np.tile([-0.22 * top, -0.05 * top], len(times)), connect="pairs")
        view.setYRange(-0.25 * top, top, padding=0.04)

    def dispose(self) -> None:
        """Give up all graphics."""
        self.pictures.dispose()


def _words(style: str = "") -> QLabel:
    label = QLabel()
    label.setWordWrap(True)
    label.setStyleSheet(style)
    return label
