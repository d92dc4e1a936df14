"""How long a person waits, in a real window: from a mouse event to the painted frame, and how long the window is stuck.

The movie is the sample, repeated and said to run at 30 Hz, with a grid of small discs as ROIs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from qtpy.QtCore import QEventLoop, QPoint, Qt, QTimer
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

import napari_calvae as calvae
from napari_calvae._napari.contributions import sample_folder

#: Seconds to wait for one thing.
PATIENCE = 60
#: Discs along each side of the grid of ROIs, and their diameter (pixels).
_GRID, _DIAMETER = 6, 7
#: Cursor moves and zooms that are measured, and seconds of a training during which stalls are.
_N_MOVES, _TRAINING = 30, 8.0
#: Period (ms) of the timer that notices when the window is stuck.
_TICK = 5


def iter_latency(n_frames: int = 54_000, n_clicks: int = 30) -> Iterator[dict[str, Any]]:
    """Open the widget, click ROI after ROI, move the cursor, zoom, infer all, train; yields a row for each of these.

    Milliseconds: the median, the ninth of ten, the longest. Needs a display.
    """
    import napari

    from napari_calvae._napari.inference_widget import InferenceWidget

    movie, labels = _scene(n_frames)
    viewer = napari.Viewer(show=False)
    try:
        viewer.window.resize(1280, 800)
        viewer.add_image(movie, metadata={"frame_rate": 30.0}, contrast_limits=(0, 30))
        viewer.add_labels(labels)
        viewer.show()
        _settle(1.0)
        start = time.perf_counter()
        widget = InferenceWidget(viewer)
        viewer.window.add_dock_widget(widget, area="bottom")
        QApplication.processEvents()
        widget.repaint()
        yield _row("opening the widget", [time.perf_counter() - start])
        _wait(widget._clicked.idle, lambda: not widget._clicked.busy)  # the model is loaded
        viewer.reset_view()
        _settle(1.0)
        rois = list(range(1, int(labels.max()) + 1))[:n_clicks]
        yield _row("click to picture", [_click(viewer, widget, labels, roi) for roi in rois])
        yield _row("click on a known ROI", [_click(viewer, widget, labels, roi) for roi in rois])
        yield _row("cursor", list(_cursor(viewer, widget)))
        yield _row("zoom", list(_zoom(widget)))
        widget.results.rows.clear()
        yield _row(f"stuck while all {labels.max()} ROIs are inferred", [_stuck(lambda: _infer_all(widget))])
        training = _open_training(viewer)
        yield _row("stuck while a model trains", [_stuck(lambda: _train(training))])
    finally:
        viewer.close()


def _scene(n_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(time, y, x) movie in memory and (y, x) labels of the discs."""
    short = np.asarray(calvae.read_movie(sample_folder() / "movie.tif")[0])
    movie = np.concatenate([short] * -(-n_frames // len(short)))[:n_frames]
    height, width = short.shape[1:]
    ys, xs = ((np.arange(_GRID) + 0.5) * n / _GRID for n in (height, width))
    discs = calvae.RoiMasks.from_discs(list(itertools.product(ys, xs)), _DIAMETER, (height, width))
    return movie, discs.to_labels()


def _row(what: str, seconds: list[float]) -> dict[str, Any]:
    ms = 1000 * np.asarray(seconds)
    median, high = np.quantile(ms, [0.5, 0.9])
    return {
        "what": what,
        "times": len(ms),
        "median (ms)": float(median),
        "90 % (ms)": float(high),
        "longest (ms)": float(ms.max()),
    }


def _stuck(during: Callable[[], None]) -> float:
    """Longest time (s) that the GUI thread did not come to a timer's events, beyond its period, during a call."""
    ticks: list[float] = []
    timer = QTimer()
    timer.setTimerType(Qt.TimerType.PreciseTimer)
    timer.timeout.connect(lambda: ticks.append(time.perf_counter()))
    timer.start(_TICK)
    during()
    timer.stop()
    return max(0.0, float(np.diff(ticks).max(initial=0.0)) - _TICK / 1000)


def _settle(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        QApplication.processEvents()


def _wait(signal: Any, done: Callable[[], bool]) -> None:
    """Run the event loop until ``done``, which is asked whenever the signal comes."""
    loop = QEventLoop()
    timer = QTimer()
    timer.setSingleShot(True)
    timer.timeout.connect(loop.quit)
    timer.start(PATIENCE * 1000)

    def ask(*_: object) -> None:
        if done():
            loop.quit()

    signal.connect(ask)
    if not done():
        loop.exec()
    signal.disconnect(ask)
    if not done():
        raise calvae.RecordingError(f"click benchmark: expected an answer within {PATIENCE} s, got none.")


def _click(viewer: Any, widget: Any, labels: np.ndarray, roi: int) -> float:
    """Seconds from a mouse click on a ROI to its painted picture."""
    _settle(0.15)  # what the last click left to do is done
    canvas = viewer.window._qt_viewer.canvas
    corner, other = (np.array(canvas._map_canvas2world(p, canvas.view))[-2:] for p in ((0, 0), (100, 100)))
    y, x = (np.argwhere(labels == roi).mean(0) - corner) / ((other - corner) / 100)
    place = QPoint(round(x), round(y))
    start = time.perf_counter()
    QTest.mouseClick(canvas.native, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier, place)  # type: ignore[call-overload]
    _wait(widget.shown, lambda: widget.plots.picture is not None and widget.plots.picture.roi_ids == (roi,))
    widget.plots.graphics.viewport().repaint()
    return time.perf_counter() - start


def _cursor(viewer: Any, widget: Any) -> Iterator[float]:
    """Seconds from a move of the slider to the painted cursor."""
    rng = np.random.default_rng(0)
    for frame in rng.integers(0, viewer.dims.nsteps[0], _N_MOVES):
        start = time.perf_counter()
        viewer.dims.set_current_step(0, int(frame))
        widget.plots.graphics.viewport().repaint()
        yield time.perf_counter() - start
        _settle(0.05)


def _zoom(widget: Any) -> Iterator[float]:
    """Seconds from another stretch of time in view to the painted curves."""
    rng = np.random.default_rng(0)
    view, port = widget.plots.trace_row.view, widget.plots.graphics.viewport()
    (first, last), _ = view.viewRange()
    for _ in range(_N_MOVES):
        width = (last - first) * np.exp(rng.uniform(np.log(0.01), 0))
        left = rng.uniform(first, last - width)
        start = time.perf_counter()
        view.setXRange(left, left + width, padding=0)
        widget.plots.redraw()
        port.repaint()
        yield time.perf_counter() - start
        _settle(0.02)


def _infer_all(widget: Any) -> None:
    widget.infer_all()
    _wait(widget._batch.idle, lambda: not widget._batch.busy)


def _open_training(viewer: Any) -> Any:
    from napari_calvae._napari.training_widget import TrainingWidget

    training = TrainingWidget(viewer)
    viewer.window.add_dock_widget(training, area="right")
    _wait(training.ready, lambda: training.form is not None)
    _settle(0.5)
    return training


def _train(training: Any) -> None:
    """Start a fit, watch it for some seconds, and cancel it."""
    training.bar.buttons["start"].click()
    _settle(_TRAINING)
    training.bar.buttons["cancel"].click()
    _settle(0.5)
