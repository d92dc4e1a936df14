"""Three plots on one time axis: fluorescence and its reconstruction, sampled spikes, spike rate with credible band."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import QEvent, QObject, QPointF, QRectF, QSize, Qt, QTimer, Signal
from qtpy.QtWidgets import QHBoxLayout, QLabel, QToolButton, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import drawing, readout
from napari_calvae._napari.pinned import PinnedCells
from napari_calvae._napari.plot_items import BandItem, Palette, Row, on_background, raster_colours, shade

SPREAD_ALPHA, BAND_ALPHA = 0.3, 0.4
#: Height (pixels) at which all that the legends say is to be read.
LEGIBLE = 236

HINT = "Click a ROI in the movie: its fluorescence and the spikes behind it appear here."

_LOG_LIKELIHOOD = (
    "log-lik.: mean log-likelihood of the frames in view under the reconstruction and its spread (nats per frame). "
    "The greater, the better they are explained; to be compared for the same frames only, not between cells"
)


class PosteriorPlots(QWidget):
    """The posterior of one ROI; the mouse wheel zooms in time, dragging moves, a click picks a moment.

    While the pointer is over the plots the line above them tells the numbers of the moment under it.

    ``picked`` is emitted with the clicked time (s), ``painted`` after every redrawing of the curves, ``offered`` when
    ``current`` may be another picture or none.
    """

    picked = Signal(float)
    painted = Signal()
    offered = Signal()

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.picture: calvae.SpikeInference | None = None
        self._outdated = False
        self.band: drawing.Band | None = None
        self.columns: drawing.Columns | None = None
        self.log_likelihood = float("nan")
        self._heading = HINT
        self._palette = Palette.on("#262930", "#f0f1f2")
        self.title = QLabel()
        self.title.setTextFormat(Qt.TextFormat.RichText)
        self.title.setMinimumWidth(120)  # or the longest sentence would widen the window
        self.graphics = pg.GraphicsLayoutWidget(self)
        self.graphics.setMinimumSize(QSize(240, 150))
        self.truth: np.ndarray | None = None
        self.rival: np.ndarray | None = None
        self.truth_button = _switch("truth", "True spikes, where the ROI layer knows them (metadata “spike_times”, s)")
        self.rival_button = _switch("OASIS", "What OASIS makes of the same trace, scaled to the same number of spikes")
        self.activity_button = _switch("light up", "Show inferred cells in the movie as they fire; press play")
        self.pin_button = _switch("pin", "Keep this cell in view, below the picked one", checkable=False)
        self.truth_button.setEnabled(False)
        line = QHBoxLayout()
        line.setSpacing(4)
        line.addWidget(self.title, 1)
        for button in (self.pin_button, self.truth_button, self.rival_button, self.activity_button):
            line.addWidget(button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addLayout(line)
        layout.addWidget(self.graphics, 1)
        self._build()
        self.pinned = PinnedCells(self.trace_row.view, self._palette, self)
        layout.addWidget(self.pinned)
        self.pin_button.clicked.connect(self._on_pin)
        # The picked cell stays legible above them: the dock grows if it must.
        self.pinned.changed.connect(lambda: self.graphics.setMinimumHeight(LEGIBLE if self.pinned.cells else 150))
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(0)
        self._later.timeout.connect(self.redraw)
        self.trace_row.view.sigXRangeChanged.connect(self._schedule)
        self.trace_row.view.sigResized.connect(self._schedule)
        self.graphics.scene().sigMouseClicked.connect(self._on_click)
        self.graphics.scene().sigMouseMoved.connect(self._on_pointer)
        self.graphics.viewport().installEventFilter(self)
        self.set_palette(self._palette)
        self.clear()

    def _build(self) -> None:
        grid = self.graphics.ci
        grid.setContentsMargins(0, 2, 2, 4)  # pyqtgraph lets the label of an axis hang out
        grid.layout.setVerticalSpacing(8)
        grid.layout.setHorizontalSpacing(0)
        self.trace_row, self.raster_row, self.rate_row = self.rows = [
            Row(grid, index, label) for index, label in enumerate(("ΔF/F", "sample", "spikes/s"))
        ]
        for index, stretch in enumerate((5, 4, 4)):
            grid.layout.setRowStretchFactor(index, stretch)
        for row in self.rows[1:]:
            row.view.setXLink(self.trace_row.view)
        self.time_axis = pg.AxisItem("bottom", linkView=self.rate_row.view, maxTickLength=-4)
        self.time_axis.setLabel("time (s)")
        self.time_axis.enableAutoSIPrefix(False)
        self.time_axis.setStyle(maxTickLevel=0)
        self.time_axis.setHeight(34)
        self.time_axis.setTickDensity(1.6)
        grid.addItem(self.time_axis, 3, 1)
        self.spread, self.rate_band = BandItem(), BandItem()
        self.trace, self.reconstruction = pg.PlotCurveItem(antialias=True), pg.PlotCurveItem(antialias=True)
        self.rate = pg.PlotCurveItem()
        self.true_spikes, self.rival_rate = pg.PlotCurveItem(), pg.PlotCurveItem()
        self.raster = pg.ImageItem(axisOrder="row-major")
        self.trace_row.words.setToolTip(_LOG_LIKELIHOOD)
        for row, items in (
            (self.trace_row, (self.spread, self.trace, self.reconstruction)),
            (self.raster_row, (self.raster, self.true_spikes)),
            (self.rate_row, (self.rate_band, self.rival_rate, self.rate)),
        ):
            for item in items:
                row.view.addItem(item)

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours."""
        self._palette = palette
        self.graphics.setBackground(palette.background)
        on = f"color: {palette.reconstruction}; border-bottom: 2px solid {palette.reconstruction};"
        for button in (self.truth_button, self.rival_button, self.activity_button):
            button.setStyleSheet(f"QToolButton:checked {{ {on} }}")
        self.time_axis.setPen(shade(palette.text, 0.45))
        self.time_axis.setTextPen(shade(palette.text, 0.9))
        for row in self.rows:
            row.paint(palette)
        self.trace.setPen(pg.mkPen(palette.trace, width=1))
        self.reconstruction.setPen(pg.mkPen(palette.reconstruction, width=1))
        self.spread.set_colour(shade(palette.reconstruction, SPREAD_ALPHA))
        self.rate.setPen(pg.mkPen(palette.posterior, width=1))
        self.rate_band.set_colour(shade(palette.posterior, BAND_ALPHA))
        self.true_spikes.setPen(pg.mkPen(palette.text, width=1))
        self.rival_rate.setPen(pg.mkPen(palette.rival, width=1))
        self.raster.setLookupTable(raster_colours(palette.posterior))
        self.pinned.set_palette(palette)
        self._write_legends()

    def set_picture(self, picture: calvae.SpikeInference, title: str = "") -> None:
        """Show a result of one ROI; the stretch of time in view stays if the recording is as long as before."""
        before, self.picture = self.picture, picture
        self.truth = self.rival = None
        self.graphics.ci.setOpacity(1)
        self._set_heading(title)
        ends = self._ends(picture)
        self.trace_row.view.setLimits(
            xMin=ends[0], xMax=ends[1], minXRange=min(10 / picture.frame_rate, ends[1] - ends[0])
        )
        if before is None or self._ends(before) != ends:
            self.trace_row.view.setXRange(*ends, padding=0)
        self.redraw()
        self._offer(outdated=False)

    @property
    def current(self) -> calvae.SpikeInference | None:
        """The picture, if it is what was asked for last: only that may be pinned or drawn for a paper."""
        return None if self._outdated else self.picture

    def set_outdated(self) -> None:
        """Something else was asked for: what is shown stays in view until it is there, and is offered for nothing."""
        self._offer(outdated=True)

    def _offer(self, outdated: bool) -> None:
        self._outdated = outdated
        self.pin_button.setEnabled(self.current is not None)
        self.offered.emit()

    def clear(self) -> None:
        """Show nothing."""
        self.picture = self.band = self.columns = self.truth = self.rival = None
        self._set_heading(HINT)
        self.graphics.ci.setOpacity(0)
        empty = np.empty(0)
        for curve in (self.trace, self.reconstruction, self.rate, self.true_spikes, self.rival_rate):
            curve.setData(empty, empty)
        for item in (self.spread, self.rate_band, *(row.missing for row in self.rows)):
            item.set_data(empty, empty, empty)
        self.raster.clear()
        for row in self.rows:
            row.cursor.hide()
        self._write_legends()
        self._offer(outdated=False)

    def set_truth(self, times: np.ndarray | None) -> None:
        """Mark true spikes (s) above the samples, or none."""
        if times is not None or self.truth is not None:
            self.truth = times
            self.redraw()

    def set_rival(self, estimate: np.ndarray | None) -> None:
        """Draw another method's (time,) estimate, scaled to as many spikes as ours, or none."""
        if estimate is not None or self.rival is not None:
            self.rival = estimate
            self.redraw()

    def set_cursor(self, seconds: float) -> None:
        """Move the vertical line of all plots to this time (s)."""
        for row in self.rows:
            row.cursor.setValue(seconds)
            row.cursor.setVisible(self.picture is not None)
        self.pinned.set_cursor(seconds)

    def redraw(self) -> None:
        """Draw the stretch of time in view."""
        self._later.stop()
        if self.picture is None:
            return
        picture, width = self.picture, max(int(self.trace_row.view.width()), 1)
        seconds = tuple(self.trace_row.view.viewRange()[0])
        columns = self.columns = drawing.columns(picture.traces, seconds, width)
        self.log_likelihood = readout.log_likelihood(picture, columns)
        self._draw_fluorescence(picture, columns)
        self._draw_raster(picture, columns)
        window = drawing.band_window(seconds[1] - seconds[0], width, picture.frame_rate)
        self._draw_rate(picture, columns, window)
        self._draw_missing(picture, columns)
        self._write_legends()
        self.painted.emit()

    def _draw_fluorescence(self, picture: calvae.SpikeInference, columns: drawing.Columns) -> None:
        values, mean, std = (a[0] for a in (picture.traces.values, picture.reconstruction, picture.reconstruction_std))
        self.trace.setData(*drawing.curve(values, columns), connect="finite")
        self.reconstruction.setData(*drawing.curve(mean, columns), connect="finite")
        low, high = drawing.extremes(mean - 2 * std, columns)[0], drawing.extremes(mean + 2 * std, columns)[1]
        self.spread.set_data(columns.centres, low, high)
        shown = drawing.extremes(values, columns)
        self.trace_row.view.setYRange(*drawing.limits([*shown, low, high]), padding=0)

    def _draw_raster(self, picture: calvae.SpikeInference, columns: drawing.Columns) -> None:
        image = drawing.raster(picture.events, picture.n_samples, columns)
        self.raster.setImage(image, levels=(0, 255), autoLevels=False)
        start = columns.boundaries[0]
        per_column = (columns.edges[1] - columns.edges[0]) / columns.frame_rate
        self.raster.setRect(QRectF(start, 0.5, per_column * image.shape[1], picture.n_samples))
        top, tick = picture.n_samples + 0.5, 0.14 * picture.n_samples
        truth = np.empty(0) if self.truth is None else self.truth
        shown = truth[(truth >= columns.boundaries[0]) & (truth <= columns.boundaries[-1])]
        ends = np.tile([top + 0.2 * tick, top + tick], len(shown))
        self.true_spikes.setData(np.repeat(shown, 2), ends, connect="pairs")
        self.raster_row.view.setYRange(0.5, top if self.truth is None else top + tick, padding=0.02)

    def _draw_rate(self, picture: calvae.SpikeInference, columns: drawing.Columns, window: float) -> None:
        self.band = drawing.band(picture, columns, window)
        if self.band is None:
            self.rate.setData(*drawing.curve(picture.rate[0], columns))
            self.rate_band.set_data(*(np.empty(0),) * 3)
            top = drawing.extremes(picture.rate[0], columns)
        else:
            x, mean = drawing.steps(self.band.boundaries, self.band.mean)
            self.rate.setData(x, mean)
            self.rate_band.set_data(x, np.repeat(self.band.low, 2), np.repeat(self.band.high, 2))
            top = self.band.high, self.band.mean
        self._draw_rival(picture, columns)
        self.rate_row.view.setYRange(0, max(drawing.limits(top)[1], 0.5), padding=0.02)

    def _draw_rival(self, picture: calvae.SpikeInference, columns: drawing.Columns) -> None:
        """Averaged in the same windows as our rate, or frame by frame as that is."""
        empty = np.empty(0)
        if self.rival is None or not self.rival.sum() > 0:
            self.rival_rate.setData(empty, empty)
            return
        rate = self.rival * (picture.rate[0].sum() / self.rival.sum())
        if self.band is None:
            self.rival_rate.setData(*drawing.curve(rate, columns))
            return
        frames = round(self.band.window * picture.frame_rate)
        first = round((self.band.boundaries[0] - picture.traces.t0) * picture.frame_rate + 0.5)
        mean = rate[first : first + frames * len(self.band.mean)].reshape(-1, frames).mean(1)
        self.rival_rate.setData(*drawing.steps(self.band.boundaries, mean))

    def _draw_missing(self, picture: calvae.SpikeInference, columns: drawing.Columns) -> None:
        missing = drawing.extremes(~picture.traces.valid[0], columns)[1].astype(bool)
        x, height = drawing.steps(columns.boundaries, np.where(missing, 1e4, np.nan))
        for row in self.rows:
            row.missing.set_data(x, -height, height)

    def _write_legends(self) -> None:
        palette = self._palette

        def words(*lines: tuple[str, str, str]) -> str:
            return "".join(
                f'<div style="font-size:8pt"><span style="color:{c}">{m}</span> {t}</div>' for c, m, t in lines
            )

        if self.picture is None:
            texts = ["", "", ""]
        else:
            truth = [(palette.text, "│", "true spikes")] if self.truth is not None else []
            rival = [(palette.rival, "━", "OASIS")] if self.rival is not None else []
            window = f"in {self.band.window:.2g} s" if self.band is not None else "in a frame"
            texts = [
                words(
                    (palette.trace, "━", "ΔF/F"),
                    (palette.reconstruction, "━", "reconstruction"),
                    (on_background(palette.reconstruction, SPREAD_ALPHA, palette.background), "■", "± 2 sd"),
                    (palette.background, "■", f"log-lik. {self.log_likelihood:.2f}"),
                ),
                words((palette.posterior, "■", "sampled spikes"), *truth),
                words(
                    (palette.posterior, "━", "mean rate"),
                    (on_background(palette.posterior, BAND_ALPHA, palette.background), "■", "90 % credible"),
                    (palette.background, "■", window),
                    *rival,
                ),
            ]
        for row, text in zip(self.rows, texts, strict=True):
            row.words.setHtml(text)

    def _on_pin(self) -> None:
        if self.current is not None:
            self.pinned.pin(self.current)

    def _set_heading(self, words: str) -> None:
        self._heading = words
        # What the pointer tells stays on one line: it must not push the plots up and down.
        self.title.setWordWrap(words == HINT)
        self.title.setText(words)

    def _on_pointer(self, place: QPointF) -> None:
        """Tell the numbers of the moment under the pointer."""
        moment = None
        if self.picture is not None and self.columns is not None and self._over_a_row(place):
            moment = readout.at(self.picture, self.columns, self.trace_row.view.mapSceneToView(place).x())
        self.title.setText(self._heading if moment is None else moment.words)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:  # noqa: N802 - Qt's name
        """Tell the heading again when the pointer has left (Qt)."""
        if event is not None and event.type() == QEvent.Type.Leave:
            self.title.setText(self._heading)
        return False

    def _over_a_row(self, place: QPointF) -> bool:
        return any(row.view.sceneBoundingRect().contains(place) for row in self.rows)

    def _schedule(self, *_: object) -> None:
        self._later.start()

    def _on_click(self, event: Any) -> None:
        if self.picture is None or event.button() != Qt.MouseButton.LeftButton:
            return
        view = self.trace_row.view
        if event.double():
            view.setXRange(*self._ends(self.picture), padding=0)
        elif self._over_a_row(event.scenePos()):
            self.picked.emit(float(view.mapSceneToView(event.scenePos()).x()))

    @staticmethod
    def _ends(picture: calvae.SpikeInference) -> tuple[float, float]:
        traces = picture.traces
        return traces.t0 - 0.5 / traces.frame_rate, traces.t0 + (traces.n_frames - 0.5) / traces.frame_rate

    def dispose(self) -> None:
        """Give up all graphics; the widget is of no use afterwards."""
        self._later.stop()
        self.pinned.dispose()
        self.graphics.close()
        self.graphics.deleteLater()


def _switch(words: str, tip: str, checkable: bool = True) -> QToolButton:
    button = QToolButton()
    button.setText(words)
    button.setToolTip(tip)
    button.setCheckable(checkable)
    return button
