"""How the widget behaves as a dock: where it goes, and when it has to leave."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from qtpy.QtCore import QEvent, QObject, Qt, QTimer
from qtpy.QtWidgets import QApplication, QDockWidget, QMainWindow, QWidget


class DockManners(QObject):
    """Puts a wide widget at the bottom of napari's window, and tells one when its dock or the window is closed.

    Parameters
    ----------
    widget
        The widget, before it is docked.
    height
        Height (pixels) that it asks for at the bottom; None for a widget that stays at its side of the window.
    leave, stay
        Called when the window closes, and when it is shown again after all.
    gone
        Called when the dock was closed, which takes the widget out of it.
    """

    def __init__(
        self,
        widget: QWidget,
        height: int | None,
        *,
        leave: Callable[[], None],
        stay: Callable[[], None],
        gone: Callable[[], None],
    ):
        super().__init__(widget)
        self._widget, self._height = widget, height
        self._leave, self._stay, self._gone = leave, stay, gone
        self._seen: weakref.ref[QMainWindow] | None = None  # weak: the window must not live on for our sake
        self._asked = False
        widget.installEventFilter(self)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:  # noqa: N802 - Qt's name
        """Listen to the widget and to its window (Qt)."""
        kind = event.type() if event is not None else QEvent.Type.None_
        if watched is self._widget:
            if kind == QEvent.Type.ParentChange:
                QTimer.singleShot(0, self._on_moved)
            elif kind == QEvent.Type.Close:
                self._gone()
        else:
            self._on_window(kind, event is not None and event.spontaneous())
        return False

    def _on_moved(self) -> None:
        dock, window = self._widget.parent(), self._widget.window()
        if dock is None and self._seen is not None:
            if (seen := self._seen()) is not None:
                seen.removeEventFilter(self)
            self._gone()
        elif self._seen is None and isinstance(dock, QDockWidget) and isinstance(window, QMainWindow):
            self._seen = weakref.ref(window)
            window.installEventFilter(self)
            self._settle(dock, window)

    def _settle(self, dock: QDockWidget, window: QMainWindow) -> None:
        """Plots over time want width: the bottom, beside the layer list. Our docks share a place, as tabs."""
        if self._height is not None:
            window.setCorner(Qt.Corner.BottomLeftCorner, Qt.DockWidgetArea.LeftDockWidgetArea)
            if window.dockWidgetArea(dock) == Qt.DockWidgetArea.RightDockWidgetArea:
                window.addDockWidget(Qt.DockWidgetArea.BottomDockWidgetArea, dock)
        area = window.dockWidgetArea(dock)
        for other in window.findChildren(QDockWidget):
            if other is not dock and window.dockWidgetArea(other) == area and other.findChild(DockManners):
                window.tabifyDockWidget(other, dock)
                dock.show()  # only a visible one can be raised
                dock.raise_()
                break
        if self._height is not None:
            window.resizeDocks([dock], [self._height], Qt.Orientation.Vertical)

    def _on_window(self, kind: QEvent.Type, spontaneous: bool) -> None:
        """Leave a window that closes: one that is seen when it is asked to may still be kept open, until it hides."""
        if kind == QEvent.Type.Close:
            self._asked = True
            window = self._seen() if self._seen is not None else None
            if window is None or not window.isVisible():
                self._leave()
            else:
                QTimer.singleShot(0, self._on_answered)
        elif kind == QEvent.Type.Hide and self._asked and not spontaneous:  # spontaneous: minimised
            self._leave()
        elif kind == QEvent.Type.Show and self._asked and not spontaneous:
            self._asked = False
            self._stay()

    def _on_answered(self) -> None:
        """Forget that the window was asked to close once it is known to stay: it may be hidden for another reason."""
        window = self._seen() if self._seen is not None else None
        if QApplication.activeModalWidget() is not None:
            QTimer.singleShot(100, self._on_answered)
        elif window is not None and window.isVisible():
            self._asked = False
