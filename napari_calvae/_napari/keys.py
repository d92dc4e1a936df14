"""Keys for going through the cells: bound while the widget is open, free again afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from app_model.types import KeyBinding
from napari.viewer import Viewer

#: Key, name of the action, what it does. Neither napari 0.9 nor its layers use these keys.
KEYS = (
    ("Down", "next_cell", "next cell"),
    ("Up", "previous_cell", "previous cell"),
    ("N", "next_unjudged", "next unjudged cell"),
    ("W", "worst_cell", "worst cell by the sorted column"),
    ("K", "accept", "accept (keep)"),
    ("J", "reject", "reject (junk)"),
    ("U", "undo", "undo"),
    ("Shift+U", "redo", "redo"),
)


class Keys:
    """Binds keys of the canvas to actions; a key that is taken already is left alone.

    Parameters
    ----------
    viewer
        napari's viewer.
    actions
        What to call, by name of the action in ``KEYS``.
    """

    def __init__(self, viewer: Viewer, actions: Mapping[str, Callable[[], None]]):
        self._viewer = viewer
        self._bound: dict[str, Callable[[Any], None]] = {}
        for key, name, _ in KEYS:
            if KeyBinding.from_str(key) not in viewer.keymap:
                self._bound[key] = _calling(actions[name])
                viewer.bind_key(key, self._bound[key])

    def close(self) -> None:
        """Free the keys, except those that somebody has bound anew."""
        for key, function in self._bound.items():
            if self._viewer.keymap.get(KeyBinding.from_str(key)) is function:
                self._viewer.bind_key(key, None)
        self._bound = {}

    def lines(self) -> list[str]:
        """Keys and what they do, for the user."""
        return [f"{key.replace('Shift+', '⇧')}: {words}" for key, _, words in KEYS if key in self._bound]


def _calling(action: Callable[[], None]) -> Callable[[Any], None]:
    return lambda _viewer: action()
