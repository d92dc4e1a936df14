"""The whole tour of the plugin on the sample movie, with a picture of the window after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import QEvent, QPoint, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

import napari_calvae as calvae
from napari_calvae._napari import demo

#: Seconds to wait for what a step brings about, and seconds of retraining to watch.
PATIENCE, TRAINING = 120, 1.5
#: Cells that are clicked.
N_CLICKS = 5


def iter_tour(folder: Path) -> Iterator[Path]:
    """Open the sample, click cells, edit one, infer all, sort, reject, retrain, compare, export; yields pictures.

    Parameters
    ----------
    folder
        Where the pictures go, ``01-opened.png`` and so on, and what is exported on the way. It is made if needed.

    Raises
    ------
    RecordingError
        If a step does not come to its end.
    """
    import napari

    folder.mkdir(parents=True, exist_ok=True)
    viewer = napari.Viewer(show=False)
    try:
        yield from _numbered(_Tour(viewer, folder), folder)
    finally:
        viewer.close()


def _numbered(tour: _Tour, folder: Path) -> Iterator[Path]:
    for number, name in enumerate(tour.steps(), 1):
        _settle(0.4)
        path = folder / f"{number:02d}-{name}.png"
        tour.viewer.window.screenshot(str(path), canvas_only=False, flash=False)
        yield path


class _Tour:
    """The steps, each of which yields its name when there is something to see."""

    def __init__(self, viewer: Any, folder: Path):
        self.viewer, self.folder = viewer, folder
        self.inference = demo.open_widget(viewer)
        viewer.show()
        demo.settle(viewer)

    def steps(self) -> Iterator[str]:
        """Do one step after the other."""
        _wait(lambda: not self.inference._clicked.busy)
        yield "opened"
        labels = self.viewer.layers["ROIs"]
        for roi in np.unique(labels.data[labels.data > 0])[:N_CLICKS]:
            self._click(*np.argwhere(labels.data == roi).mean(0))
            self._shown(roi)
            yield f"clicked-{roi}"
        for button in (self.inference.plots.truth_button, self.inference.plots.rival_button):
            button.click()
        _wait(lambda: self.inference.plots.rival is not None)
        yield "beside-oasis-and-truth"
        self._edit(labels, int(roi))
        yield "edited"
        yield from self._judge()
        yield from self._retrain()
        self.inference.plots.activity_button.click()
        yield "lit-up"

    def _click(self, y: float, x: float) -> None:
        """Click a pixel of the movie with the mouse."""
        canvas = self.viewer.window._qt_viewer.canvas
        corner, other = (np.array(canvas._map_canvas2world(p, canvas.view))[-2:] for p in ((0, 0), (100, 100)))
        row, column = (np.array([y, x]) - corner) / ((other - corner) / 100)
        place, button = QPoint(round(column), round(row)), Qt.MouseButton.LeftButton
        QTest.mouseClick(canvas.native, button, Qt.KeyboardModifier.NoModifier, place)  # type: ignore[call-overload]

    def _shown(self, roi: int) -> None:
        plots = self.inference.plots
        _wait(lambda: plots.picture is not None and plots.picture.roi_ids == (roi,))

    def _edit(self, labels: Any, roi: int) -> None:
        """Take a row of pixels off a ROI, as the eraser does, and look at it again."""
        before = self.inference.plots.picture
        rows, columns = np.nonzero(labels.data == roi)
        top = rows == rows.min()
        labels.data_setitem((rows[top], columns[top]), 0)
        self.inference.ask(roi)
        _wait(lambda: self.inference.plots.picture is not before)

    def _judge(self) -> Iterator[str]:
        from napari_calvae._napari.quality_widget import QualityWidget

        table = QualityWidget(self.viewer)
        self.viewer.window.add_dock_widget(table, name="quality table", area="right")
        table.infer_all()
        _wait(lambda: not self.inference._batch.busy and len(self.inference.results.rows) == len(table.model.order))
        yield "all-inferred"
        column = table.model.names.index("reconstruction_r2")
        table.form.table.sortByColumn(column, Qt.SortOrder.AscendingOrder)
        table.form.table.selectRow(0)
        self._shown(table.model.order[0])
        yield "sorted"
        table.worst_cell()
        _settle(0.5)
        table.form.reject.click()
        table.form.colour.setCurrentText("verdict")
        yield "rejected"
        table.save_table(self.folder / "cells.csv")
        table.save_figure(self.folder / "cell.svg")
        yield "exported"

    def _retrain(self) -> Iterator[str]:
        from napari_calvae._napari.training_widget import TrainingWidget

        training = TrainingWidget(self.viewer)
        self.viewer.window.add_dock_widget(training, name="retrain", area="right")
        _wait(lambda: training.form is not None)
        yield "retrain"
        training.bar.buttons["start"].click()
        _wait(lambda: "loss" in training.curves.series)  # fits are prepared for seconds before their first step
        _settle(TRAINING)
        yield "retraining"
        _wait(lambda: training.fitted is not None)
        training.tabs.setCurrentWidget(training.comparison)
        yield "before-and-after"


def _settle(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        QApplication.processEvents()
        QApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)


def _wait(done: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > until:
            raise calvae.RecordingError(f"tour: expected the next step within {PATIENCE} s. Try a less busy computer.")
        _settle(0.02)


if __name__ == "__main__":
    import sys

    for _ in iter_tour(Path(sys.argv[1])):
        pass
