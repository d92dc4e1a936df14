"""Saves drawn ROIs and verdicts while one works, and offers what is left of a session that ended unexpectedly."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from napari.layers import Labels, Layer, Points, Shapes
from napari.utils.notifications import show_warning
from napari.viewer import Viewer
from qtpy.QtCore import QObject, QTimer, Signal
from qtpy.QtWidgets import QFrame, QHBoxLayout, QLabel, QPushButton, QWidget

from napari_calvae._napari import judging, picking, recovery, remembering, roi_layer, script, session
from napari_calvae._napari.controls import Controls
from napari_calvae._napari.file_rois import KEY, FileTraces

logger = logging.getLogger(__name__)

#: Time (ms) after an edit until it is saved, with all others until then.
PAUSE = 2000
#: Where each layer is saved.
_FILES: WeakKeyDictionary[Layer, Path] = WeakKeyDictionary()
#: What says where a layer lies in the world.
_PLACE = ("scale", "translate", "rotate", "shear", "affine")
_EVENTS = ("data", "paint", "labels_update", "set_data", "features", "name", *_PLACE)


class Autosave(QObject):
    """Saves the ROI layers of a viewer a moment after they were edited, without keeping it waiting.

    ``failed`` is emitted with a sentence the first time that this does not work.

    Parameters
    ----------
    parent
        Lives and dies with it.
    viewer
        Its Labels, Points and Shapes are saved as soon as they are edited, or are in no file.
    movie
        The movie's layer, if one is chosen.
    """

    failed = Signal(str)

    def __init__(self, parent: QObject, viewer: Viewer, movie: Callable[[], Layer | None]):
        super().__init__(parent)
        self._viewer, self._movie = viewer, movie
        self._slots: dict[Layer, Callable[..., None]] = {}
        self._dirty: set[Layer] = set()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="calvae autosave")
        self._said = False
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(PAUSE)
        self._timer.timeout.connect(self.save)
        viewer.layers.events.inserted.connect(self._on_layers)
        viewer.layers.events.removed.connect(self._on_layers)
        self._on_layers()

    def _on_layers(self, *_: object) -> None:
        now = picking.roi_layers(self._viewer)
        for layer in [layer for layer in self._slots if layer not in now]:
            self._let_go(layer)
            self._forget(layer)  # the user took it away
        for layer in now:
            if layer not in self._slots:
                self._listen(layer)

    def _listen(self, layer: Layer) -> None:
        def touch(*_: object) -> None:
            self.touch(layer)

        self._slots[layer] = touch
        for name in _EVENTS:
            if name in layer.events:
                layer.events[name].connect(touch)
        if script.path_of(layer) is None and KEY not in layer.metadata:
            touch()

    def _let_go(self, layer: Layer) -> None:
        touch = self._slots.pop(layer)
        self._dirty.discard(layer)
        for name in _EVENTS:
            if name in layer.events:
                layer.events[name].disconnect(touch)

    def touch(self, layer: Layer) -> None:
        """It was edited."""
        self._dirty.add(layer)
        if not self._timer.isActive():
            self._timer.start()

    def save(self) -> None:
        """Save what was edited; the disk is waited for by another thread."""
        self._timer.stop()
        dirty, self._dirty = self._dirty, set()
        for layer in dirty:
            drawn = drawn_rois(layer, self._movie())
            if drawn is None:
                self._forget(layer)  # its last ROI was erased
                continue
            try:
                name = f"{secrets.token_hex(4)}{recovery.ROIS}"
                _FILES.setdefault(layer, recovery.folder() / name)
            except OSError as error:
                self._fail(error)
                return
            self._pool.submit(drawn.save, _FILES[layer]).add_done_callback(self._on_saved)

    def _forget(self, layer: Layer) -> None:
        if (file := _FILES.pop(layer, None)) is not None:
            self._pool.submit(file.unlink, missing_ok=True)

    def _on_saved(self, done: Future) -> None:
        if (error := done.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        logger.info("ROIs were not saved", exc_info=error)
        if not self._said:
            self._said = True
            self.failed.emit(f"ROIs and verdicts are not being saved on the way: {session.explain(error)}")

    def wait(self) -> bool:
        """Wait until all that was handed over is on the disk; returns whether it is."""
        self._pool.submit(int).result()
        return not self._said

    def close(self) -> None:
        """Save what is left, and listen to nothing more."""
        self.save()
        self._viewer.layers.events.inserted.disconnect(self._on_layers)
        self._viewer.layers.events.removed.disconnect(self._on_layers)
        for layer in [*self._slots]:
            self._let_go(layer)
        self._pool.shutdown(wait=True)


def drawn_rois(layer: Layer, movie: Layer | None) -> recovery.DrawnRois | None:
    """ROIs of a layer as values of their own; None if there are none, or if they live on the disk."""
    data = layer.data
    if isinstance(layer, Labels):
        if not isinstance(data, np.ndarray) or not data.any():
            return None
        arrays: tuple[np.ndarray, ...] = (data.copy(),)
    else:
        arrays = (np.array(data),) if isinstance(layer, Points) else tuple(np.array(corners) for corners in data)
        if not len(data):
            return None
    given = layer.metadata.get(KEY)
    path = None if movie is None else script.path_of(movie)
    found = roi_layer.read_judgements(layer)
    return recovery.DrawnRois(
        kind=type(layer).__name__.lower(),
        name=layer.name,
        arrays=arrays,
        place={name: np.asarray(getattr(layer, name)).tolist() for name in _PLACE},
        shape_types=tuple(layer.shape_type) if isinstance(layer, Shapes) else (),
        judgements={roi: (judgement.verdict, judgement.note) for roi, judgement in found.items()},
        traces=str(given.path) if isinstance(given, FileTraces) else None,
        movie=None if path is None else str(path),
        reader=None if movie is None else movie.source.reader_plugin,
    )


def restore(viewer: Viewer, drawn: recovery.DrawnRois) -> Layer:
    """Put ROIs into the viewer again, with their movie or traces if these are where they were."""
    layer = None
    if drawn.traces is not None:
        layer = next((each for each in _opened(viewer, drawn.traces, remembering.PLUGIN) if KEY in each.metadata), None)
    elif drawn.movie is not None and not any(script.path_of(each) == Path(drawn.movie) for each in viewer.layers):
        _opened(viewer, drawn.movie, drawn.reader or "napari")
    if isinstance(layer, Labels) and layer.data.shape == drawn.arrays[0].shape:
        layer.data = drawn.arrays[0]
    else:
        layer = _new(drawn)
        viewer.add_layer(layer)
    if drawn.judgements:
        judged = {roi: judging.Judgement(*words) for roi, words in drawn.judgements.items()}
        roi_layer.write_judgements(layer, [*judged], judging.Judgements(judged))
    return layer


def _new(drawn: recovery.DrawnRois) -> Layer:
    placed: dict[str, Any] = {"name": drawn.name} | {name: np.array(value) for name, value in drawn.place.items()}
    if drawn.kind == "labels":
        return Labels(drawn.arrays[0], **placed)
    if drawn.kind == "points":
        return Points(drawn.arrays[0], **placed)
    return Shapes(list(drawn.arrays), shape_type=list(drawn.shape_types), **placed)


def _opened(viewer: Viewer, path: str, plugin: str) -> list[Layer]:
    """Layers of a file, or none and a word about it."""
    try:
        return viewer.open(path, plugin=plugin)
    except Exception as error:
        logger.info("%s was not opened again", path, exc_info=True)
        show_warning(f"{path}: not opened again. {session.explain(error)}")
        return []


def recover(leftover: recovery.Leftover, viewer: Viewer, controls: Controls, saved_by: Autosave) -> None:
    """Put all that was left behind where it was; it is removed as soon as this session has saved it as well."""
    for drawn in leftover.rois:
        layer = restore(viewer, drawn)
        controls.choose_rois(layer)
        saved_by.touch(layer)
    for model in leftover.models:
        stem = model.stem.rpartition(" ")[0] or model.stem
        controls.offer_file(str(shutil.copy(model, recovery.free_name(recovery.folder(), stem, model.suffix))))
    saved_by.save()
    if saved_by.wait():
        leftover.discard()
    else:
        leftover.let_go()


class RecoveryBar(QFrame):
    """Offers what was left behind, one after the other, as long as there is something.

    ``recovered`` is emitted with each ``recovery.Leftover`` that is wanted back.
    """

    recovered = Signal(object)

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self._left: list[recovery.Leftover] = []
        self.words = QLabel()
        self.words.setWordWrap(True)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(6, 2, 6, 2)
        layout.addWidget(self.words, 1)
        self.buttons = {}
        for name, tip in (
            ("Recover", "Open these ROIs, verdicts and models again"),
            ("Discard", "Delete them for good"),
            ("Later", "Ask again when napari is started the next time"),
        ):
            self.buttons[name] = button = QPushButton(name)
            button.setToolTip(tip)
            layout.addWidget(button)
        self.buttons["Recover"].clicked.connect(self._on_recover)
        self.buttons["Discard"].clicked.connect(self._on_discard)
        self.buttons["Later"].clicked.connect(self.let_go)
        self.hide()

    def offer(self) -> None:
        """Look for what was left behind, and show it if there is any."""
        try:
            self._left = recovery.left_behind()
        except OSError:
            logger.info("nothing is recovered", exc_info=True)
        self._show()

    def _show(self) -> None:
        if self._left:
            self.words.setText(self._left[0].words)
        self.setVisible(bool(self._left))

    def _on_recover(self) -> None:
        self.recovered.emit(self._left.pop(0))
        self._show()

    def _on_discard(self) -> None:
        self._left.pop(0).discard()
        self._show()

    def let_go(self) -> None:
        """Offer it at another time."""
        for leftover in self._left:
            leftover.let_go()
        self._left = []
        self._show()
