"""Notices when the chosen movie or its ROIs are edited, and says so once the user has come to rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from napari.layers import Image, Layer
from qtpy.QtCore import QObject, QTimer, Signal

#: Time (ms) without an edit after which it counts as finished.
PAUSE = 300
#: Events of a layer after which it is not what it was; ``set_data`` comes also from undo, which tells nothing else.
_PLACED = ("data", "scale", "translate", "rotate", "shear", "affine", "units")
_DRAWN = (*_PLACED, "paint", "labels_update", "set_data")


class Follower(QObject):
    """Emits ``edited`` once after any number of edits in a row."""

    edited = Signal()

    def __init__(self, parent: QObject):
        super().__init__(parent)
        self._pairs: list[Any] = []
        self._layers: tuple[Layer, ...] = ()
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(PAUSE)
        self._timer.timeout.connect(self.edited)

    def follow(self, layers: Iterable[Layer | None]) -> None:
        """Listen to these layers, and to no others."""
        wanted = tuple(layer for layer in layers if layer is not None)
        if [id(layer) for layer in wanted] == [id(layer) for layer in self._layers]:
            return
        self.let_go()
        self._layers = wanted
        for layer in wanted:
            for name in _PLACED if isinstance(layer, Image) and type(layer) is Image else _DRAWN:
                if name in layer.events:
                    self._pairs.append(layer.events[name])
        for event in self._pairs:
            event.connect(self.touch)

    def touch(self, *_: object) -> None:
        """Something was edited."""
        self._timer.start()

    def let_go(self) -> None:
        """Listen to nothing, and forget edits that were not told yet."""
        self._timer.stop()
        for event in self._pairs:
            event.disconnect(self.touch)
        self._pairs, self._layers = [], ()
