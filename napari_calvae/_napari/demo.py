"""The plugin at work on the sample movie: in a window, or as a picture of it where there is no display."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import napari_calvae as calvae

logger = logging.getLogger(__name__)

#: Size of the window (pixels), and of the display that is made where there is none.
WINDOW, DISPLAY = (1280, 800), (1400, 900)
PICTURE = Path("calvae-demo.png")
#: Seconds to wait for a picture before giving up.
PATIENCE = 300
_NO_XVFB = (
    "demo: expected a display, or Xvfb to make one, got neither. "
    "Install it: sudo apt-get install -y xvfb libgl1-mesa-dri libegl1 libgl1 libxkbcommon-x11-0 libxcb-cursor0 "
    "libxcb-icccm4 libxcb-keysyms1 libxcb-image0 libxcb-render-util0 libxcb-shape0 libxcb-xinerama0 libdbus-1-3"
)


def run(screenshot: Path | None = None, roi: int | None = None) -> Path | None:
    """Open napari on the sample movie, click a cell and show its posterior.

    Parameters
    ----------
    screenshot
        Save a picture of the window to this file and end. By default the window stays open until it is closed;
        without a display the picture goes to ``calvae-demo.png``.
    roi
        Id of the cell to click, by default one that shows the most.

    Returns
    -------
    Path or None
        The picture, if one was saved.
    """
    if has_display():
        return _run(screenshot, roi)
    path = Path(screenshot or PICTURE).absolute()
    _elsewhere(__name__, [str(path), *([str(roi)] if roi else [])])
    if not path.is_file():
        raise calvae.RecordingError(f"demo: expected a picture at {path.name}, got none. Try again.")
    return path


def run_tour(folder: Path) -> list[Path]:
    """Take the whole tour, with a picture of every step in ``folder``; without a display in one in memory."""
    folder = folder.absolute()
    if has_display():
        from napari_calvae._napari.tour import iter_tour

        return list(iter_tour(folder))
    _elsewhere("napari_calvae._napari.tour", [str(folder)])
    return sorted(folder.glob("[0-9][0-9]-*.png"))


def _elsewhere(module: str, arguments: list[str]) -> None:
    """Run a module on a display in memory, in a process of its own: Qt must be gone before its display is."""
    with virtual_display():
        child = subprocess.run(
            [sys.executable, "-m", module, *arguments], stderr=subprocess.PIPE, text=True, check=False
        )
    if child.returncode:
        logger.info("%s failed: %s", module, child.stderr)
        lines = child.stderr.strip().splitlines() or [f"it ended with code {child.returncode}"]
        raise calvae.RecordingError(lines[-1].removeprefix("napari_calvae.recording.RecordingError: "))


def has_display() -> bool:
    """Whether windows can be shown."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def virtual_display() -> Iterator[None]:
    """Display in memory, by Xvfb."""
    if shutil.which("Xvfb") is None:
        raise calvae.RecordingError(_NO_XVFB)
    from pyvirtualdisplay import Display

    with Display(visible=False, size=DISPLAY, color_depth=24, extra_args=["+extension", "GLX"]):
        yield


def _run(screenshot: Path | None, roi: int | None) -> Path | None:
    try:
        import napari
    except ImportError as error:
        raise calvae.RecordingError(
            'demo: expected napari, got none. Install it with: pip install "napari-calvae[all]"'
        ) from error

    viewer = napari.Viewer(show=False)
    try:
        widget = open_widget(viewer)
        viewer.show()
        sentence = _click(viewer, widget, roi)
        if screenshot is None:
            napari.run()
            return None
        if sentence:
            raise calvae.RecordingError(sentence)
        return _save(viewer, widget, Path(screenshot))
    finally:
        if screenshot is not None:
            viewer.close()


def open_widget(viewer: Any) -> Any:
    """Put the sample into a viewer that is not shown yet, and the inference widget below it."""
    from napari_calvae._napari.contributions import open_sample
    from napari_calvae._napari.inference_widget import InferenceWidget

    viewer.theme = "dark"
    viewer.window.resize(*WINDOW)
    for data, options, kind in open_sample():
        getattr(viewer, f"add_{kind}")(data, **options)
    widget = InferenceWidget(viewer)
    viewer.window.add_dock_widget(widget, name="spike inference (napari-calvae)", area="bottom")
    return widget


def _click(viewer: Any, widget: Any, roi: int | None) -> str:
    """Click a cell, wait for its posterior; return the sentence of what went wrong, if anything did."""
    import numpy as np
    from qtpy.QtCore import QEventLoop, QTimer

    settle(viewer)
    movie, labels = viewer.layers[0], viewer.layers["ROIs"]
    roi = roi or _liveliest(movie.data, labels.data)
    y, x = np.argwhere(labels.data == roi).mean(axis=0)
    loop = QEventLoop()
    failed: list[str] = []
    widget.failed.connect(failed.append)
    for outcome in (widget.shown, widget.failed):
        outcome.connect(loop.quit)
    QTimer.singleShot(PATIENCE * 1000, loop.quit)
    QTimer.singleShot(0, lambda: widget.pick(np.array(movie.data_to_world((0, y, x)))))
    loop.exec()
    if not failed and widget.plots.picture is None:
        return f"demo: expected a posterior within {PATIENCE} s, got none. Try again on a less busy computer."
    return failed[0] if failed else ""


def settle(viewer: Any) -> None:
    """Arrange the window: the movie fills the canvas, ROIs are outlined."""
    from qtpy.QtWidgets import QApplication

    labels = viewer.layers["ROIs"]
    labels.contour = 1
    for _ in range(5):
        viewer.window.resize(*WINDOW)
        QApplication.processEvents()
    viewer.reset_view(margin=0.02)


def _liveliest(movie: Any, labels: Any) -> int:
    """Id of the ROI whose brightness changes most."""
    traces = calvae.extract(movie, labels, frame_rate=1.0)
    return int(traces.roi_ids[int((traces.values.std(axis=1) / traces.values.mean(axis=1)).argmax())])


def _save(viewer: Any, widget: Any, path: Path) -> Path:
    """Picture of the whole window with the slider on the first large transient."""
    import numpy as np
    from qtpy.QtWidgets import QApplication

    picture = widget.plots.picture
    busiest = int(np.argmax(picture.reconstruction[0]))
    widget.plots.picked.emit(picture.traces.t0 + busiest / picture.frame_rate)
    for _ in range(10):
        QApplication.processEvents()
    viewer.window.screenshot(str(path), canvas_only=False, flash=False)
    return path


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
