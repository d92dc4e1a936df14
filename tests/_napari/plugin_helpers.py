"""A stand-in for the network that a test can hold up, and a mouse on napari's canvas."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

import napari_calvae as calvae
from napari_calvae.recording import EVENT_DTYPE

FRAME_RATE = 20.0
#: Centres (y, x) of the cells, by label.
CENTRES = {1: (10, 10), 2: (10, 29), 3: (29, 19)}


def posterior_of(traces: calvae.Traces, n_samples: int) -> calvae.SpikeInference:
    """Posterior for wiring tests: a spike with probability ½ wherever fluorescence jumps."""
    rng = np.random.default_rng(1)
    jump = np.diff(np.nan_to_num(traces.values), axis=1, prepend=0)
    probability = 0.5 * (jump > 3 * np.median(np.abs(jump), axis=1, keepdims=True))
    dense = rng.random((n_samples, *jump.shape)) < probability
    sample, roi, frame = np.nonzero(dense)
    events = np.zeros(len(sample), EVENT_DTYPE)
    events["sample"], events["roi"], events["frame"], events["count"] = sample, roi, frame, 1
    events = events[np.lexsort((frame, sample, roi))]
    return calvae.SpikeInference(
        traces=traces,
        rate=(probability * traces.frame_rate).astype(np.float32),
        events=events,
        n_samples=n_samples,
        reconstruction=np.nan_to_num(traces.values).astype(np.float32),
        reconstruction_std=np.ones(traces.values.shape, np.float32),
        theta={},
        quality=np.zeros(traces.n_rois, [("noise_level", "f4")]),
        provenance={"settings": {"device": "cpu"}},
    )


@dataclass
class Network:
    """Stand-in for inference that a test can hold up: ``gate`` per ROI, ``calls`` in order; ``broken`` ROIs fail."""

    calls: list[tuple[int, ...]] = field(default_factory=list)
    asked: list[dict] = field(default_factory=list)
    gates: dict[int, threading.Event] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)

    def hold(self, roi: int) -> threading.Event:
        """Let inference of this ROI wait until the event is set."""
        self.gates[roi] = threading.Event()
        return self.gates[roi]

    def iter_infer(self, traces, model="universal", n_samples=50, seed=0, device="auto", amplitude=None):
        self.calls.append(traces.roi_ids)
        self.asked.append({"traces": traces, "device": device, "amplitude": amplitude})
        for row, roi in enumerate(traces.roi_ids):
            if roi in self.gates:
                self.gates[roi].wait(20)
            if roi in self.broken:
                raise calvae.RecordingError(f"traces: expected a signal, got none of ROI {roi}. Pick another one.")
            yield posterior_of(traces.select([row]), n_samples)

    def infer(self, traces, **settings):
        return calvae.SpikeInference.concatenate([posterior_of(traces, settings.get("n_samples", 50))])


def hide_as_if_closed(window, *widgets):
    """Hide napari's window after these widgets heard that it is asked to close."""
    from qtpy.QtGui import QCloseEvent

    for widget in widgets:
        widget._manners.eventFilter(window, QCloseEvent())
        assert widget._attached  # it may still be decided to keep it open
    window.hide()


def is_all_seen(label):
    """Whether a label has room for its (plain) words."""
    from qtpy.QtCore import QRect, Qt

    wrap = Qt.TextFlag.TextWordWrap.value if label.wordWrap() else 0
    needed = label.fontMetrics().boundingRect(QRect(0, 0, label.width(), 10_000), wrap, label.text())
    return needed.width() <= label.width() and needed.height() <= label.height()


class Mouse:
    """Real mouse events at positions of the movie."""

    def __init__(self, viewer, qtbot):
        self.viewer, self.qtbot = viewer, qtbot

    def _point(self, y, x):
        from qtpy.QtCore import QPoint

        canvas = self.viewer.window._qt_viewer.canvas
        here, there = (np.array(canvas._map_canvas2world(p, canvas.view))[-2:] for p in ((0, 0), (100, 100)))
        slope = (there - here) / 100
        row, column = (np.array([y, x]) - here) / slope
        return QPoint(round(column), round(row))

    def click(self, y, x):
        from qtpy.QtCore import Qt
        from qtpy.QtTest import QTest

        native = self.viewer.window._qt_viewer.canvas.native
        QTest.mouseMove(native, self._point(y, x))
        QTest.mouseClick(native, Qt.MouseButton.LeftButton, pos=self._point(y, x))

    def drag(self, start, end):
        from qtpy.QtCore import QEvent, QPointF, Qt
        from qtpy.QtGui import QMouseEvent
        from qtpy.QtTest import QTest
        from qtpy.QtWidgets import QApplication

        native, button = self.viewer.window._qt_viewer.canvas.native, Qt.MouseButton.LeftButton
        QTest.mousePress(native, button, pos=self._point(*start))
        for share in (0.3, 0.6, 1.0):
            point = QPointF(self._point(*(np.array(start) * (1 - share) + np.array(end) * share)))
            moved = QMouseEvent(
                QEvent.Type.MouseMove, point, native.mapToGlobal(point), Qt.MouseButton.NoButton, button,
                Qt.KeyboardModifier.NoModifier,
            )  # fmt: skip
            QApplication.sendEvent(native, moved)
        QTest.mouseRelease(native, button, pos=self._point(*end))
