"""How long a person waits: seconds from a mouse click on a ROI to its painted posterior, in a real window."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari.contributions import sample_folder

#: Seconds to wait for one picture.
PATIENCE = 60


def iter_latency(n_frames: int = 54_000, n_clicks: int = 9) -> Iterator[dict[str, Any]]:
    """Click ROI after ROI of a long movie in memory, each for the first time; yields a row per click.

    The movie is the sample, repeated to ``n_frames`` frames and said to run at 30 Hz. Needs a display.
    """
    import napari
    from qtpy.QtCore import QEventLoop, QPoint, Qt, QTimer
    from qtpy.QtTest import QTest
    from qtpy.QtWidgets import QApplication

    from napari_calvae._napari.inference_widget import InferenceWidget

    folder: Path = sample_folder()
    short = np.asarray(calvae.read_movie(folder / "movie.tif")[0])
    labels = np.asarray(calvae.read_labels(folder / "rois.tif"))
    movie = np.concatenate([short] * -(-n_frames // len(short)))[:n_frames]
    viewer = napari.Viewer(show=False)
    try:
        viewer.window.resize(1280, 800)
        viewer.add_image(movie, metadata={"frame_rate": 30.0}, contrast_limits=(0, 30))
        viewer.add_labels(labels)
        widget = InferenceWidget(viewer)
        viewer.window.add_dock_widget(widget, area="bottom")
        viewer.show()
        until = time.monotonic() + 2  # the model is loaded, and the window drawn
        while time.monotonic() < until:
            QApplication.processEvents()
        viewer.reset_view()
        canvas = viewer.window._qt_viewer.canvas
        for roi in list(range(1, labels.max() + 1))[:n_clicks]:
            QApplication.processEvents()
            corner, other = (np.array(canvas._map_canvas2world(p, canvas.view))[-2:] for p in ((0, 0), (100, 100)))
            y, x = (np.argwhere(labels == roi).mean(0) - corner) / ((other - corner) / 100)
            loop = QEventLoop()
            widget.shown.connect(loop.quit)
            widget.failed.connect(loop.quit)
            QTimer.singleShot(PATIENCE * 1000, loop.quit)
            start = time.perf_counter()
            place = QPoint(round(x), round(y))
            QTest.mouseClick(canvas.native, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier, place)  # type: ignore[call-overload]
            loop.exec()
            widget.plots.graphics.viewport().repaint()
            seconds = time.perf_counter() - start
            if widget.plots.picture is None or widget.plots.picture.roi_ids != (roi,):
                raise calvae.RecordingError(
                    f"click benchmark: expected a picture of ROI {roi} within {PATIENCE} s, got none."
                )
            yield {"ROI": str(roi), "milliseconds": 1000 * seconds}
    finally:
        viewer.close()
