"""Numbers of the posterior under the pointer, against what the samples themselves say."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
import pytest
from plugin_helpers import CENTRES, is_all_seen, posterior_of
from qtpy.QtCore import QEvent, QPointF, Qt
from qtpy.QtGui import QMouseEvent
from qtpy.QtWidgets import QApplication
from scipy.ndimage import gaussian_filter1d
from scipy.stats import norm

import napari_calvae as calvae
from napari_calvae._napari import drawing, readout
from napari_calvae._napari.plot_items import ValueAxis


@pytest.fixture(scope="module")
def picture() -> calvae.SpikeInference:
    rng = np.random.default_rng(0)
    values = rng.normal(size=3000)
    values[1000:1100] = np.nan
    return posterior_of(calvae.Traces(values, 30.0, t0=2.0), 40)


def test_the_moment_says_what_the_samples_say(picture):
    columns = drawing.columns(picture.traces, (2.0, 102.0), 200)
    dense = picture.samples()[:, 0].astype(int)
    checked = 0
    for seconds in np.linspace(3, 101, 40):
        moment = readout.at(picture, columns, seconds)
        assert moment.start <= seconds < moment.stop
        first, stop = (round((t - 2.0) * 30 + 0.5) for t in (moment.start, moment.stop))
        totals = dense[:, first:stop].sum(1)
        assert moment.probability == np.mean(totals > 0)
        assert moment.expected == pytest.approx(picture.rate[0, first:stop].sum() / 30, rel=1e-5)
        assert np.mean(totals < moment.low) <= 0.05
        assert np.mean(totals > moment.high) <= 0.05
        assert moment.agreement == max(np.mean(totals == k) for k in totals)
        checked += totals.any()
    assert checked > 5
    assert readout.at(picture, columns, 1.0) is None
    assert readout.at(picture, columns, 1e4) is None


def test_missing_frames_say_so(picture):
    columns = drawing.columns(picture.traces, (2.0, 102.0), 200)
    assert "ΔF/F missing" in readout.at(picture, columns, 2.0 + 1050 / 30).words
    assert "ΔF/F missing" not in readout.at(picture, columns, 2.0 + 500 / 30).words


def test_the_log_likelihood_is_that_of_the_frames_in_view(picture):
    columns = drawing.columns(picture.traces, (30.0, 50.0), 100)
    part = slice(columns.first, columns.last)
    values = picture.traces.values[0, part]
    kept = np.isfinite(values)
    assert kept.any()
    assert not kept.all()
    expected = norm.logpdf(
        values[kept], picture.reconstruction[0, part][kept], picture.reconstruction_std[0, part][kept]
    )
    assert readout.log_likelihood(picture, columns) == pytest.approx(expected.mean(), rel=1e-6)


@pytest.mark.usefixtures("network")
def test_the_hint_is_read_in_a_small_window_and_the_log_likelihood_is_explained(
    qtbot, show_movie, open_widget, viewer, canvas
):
    show_movie()
    widget = open_widget()
    viewer.window.resize(1000, 800)
    qtbot.waitUntil(lambda: is_all_seen(widget.plots.title))
    assert "nats per frame" in widget.plots.trace_row.words.toolTip()
    with qtbot.waitSignal(widget.shown, timeout=20_000):
        canvas.click(*CENTRES[1])
    assert not widget.plots.title.wordWrap()  # or the plots would move with what the pointer tells


@pytest.mark.parametrize("size", [20, 28, 60, 200])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.85, 0.97), (0.31, 0.39), (-3.0, 250.0), (1e-5, 3e-5)])
def test_numbers_of_a_small_axis_do_not_touch(qtbot, size, low, high):
    axis = ValueAxis(pg.ViewBox())
    ((_, places),) = axis.tickValues(low, high, size)
    assert len(places) == 1 or np.diff(places).min() * size / (high - low) >= 13.99
    assert len(places) >= (3 if size == 200 else 1)
    assert axis.tickSpacing(low, low, size) == []


def test_the_highest_number_of_an_axis_leaves_room_for_the_row_above(qtbot):
    axis = ValueAxis(pg.ViewBox())
    ((_, places),) = axis.tickValues(0.0, 1.01, 60)
    assert np.allclose(places, [0, 0.5])
    ((_, places),) = axis.tickValues(0.0, 1.01, 28)  # but a scale has two numbers
    assert np.allclose(places, [0, 1])


def test_the_pointer_tells_the_moment_under_it_and_the_heading_comes_back(qtbot, show_movie, open_widget, canvas):
    show_movie()
    widget = open_widget()
    canvas.click(*CENTRES[2])
    qtbot.waitUntil(lambda: widget.plots.picture is not None, timeout=20_000)
    view, port = widget.plots.raster_row.view, widget.plots.graphics.viewport()
    place = widget.plots.graphics.mapFromScene(view.mapViewToScene(QPointF(10.0, 20.0)))

    def move(to: QPointF) -> None:
        none = Qt.MouseButton.NoButton
        spot = port.mapToGlobal(to.toPoint())
        event = QMouseEvent(QEvent.Type.MouseMove, to, QPointF(spot), none, none, Qt.KeyboardModifier.NoModifier)
        QApplication.sendEvent(port, event)

    move(QPointF(place))
    told = readout.at(
        widget.plots.picture,
        widget.plots.columns,
        view.mapSceneToView(QPointF(widget.plots.graphics.mapToScene(place))).x(),
    )
    qtbot.waitUntil(lambda: widget.plots.title.text() == told.words, timeout=2000)
    assert "P(spike)" in told.words
    QApplication.sendEvent(port, QEvent(QEvent.Type.Leave))
    assert "ROI 2" in widget.plots.title.text()
    move(QPointF(2.0, 2.0))
    assert "ROI 2" in widget.plots.title.text()


@pytest.mark.usefixtures("network")
def test_what_looks_wrong_with_a_trace_is_said_below_it(qtbot, show_movie, open_widget, canvas, movie):
    show_movie(gaussian_filter1d(movie.astype(np.float32), 3, axis=0))
    widget = open_widget()
    canvas.click(*CENTRES[2])
    qtbot.waitUntil(lambda: "hardly have any" in widget.controls.status.text(), timeout=20_000)
    assert widget.controls.status.text().startswith("ROI 2: expected fluorescence with its noise")
    assert "Use the traces from before that step" in widget.controls.status.text()
    widget.plots.clear()
    widget._tell_doubts()  # nothing is shown any more
