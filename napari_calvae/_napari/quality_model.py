"""The table of all ROIs for Qt: it shows what ``judging`` has arranged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qtpy.QtCore import QAbstractTableModel, QModelIndex, Qt
from qtpy.QtGui import QColor

from napari_calvae._napari import judging

VERDICT, NOTE = "verdict", "note"
_SIGNS = {judging.ACCEPTED: "✓", judging.REJECTED: "✗", judging.UNJUDGED: ""}
_HELP = {
    VERDICT: "✓ accepted, ✗ rejected, empty: not judged yet",
    NOTE: "What you noted about the cell; double-click to write",
}
_RIGHT = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
_MIDDLE = Qt.AlignmentFlag.AlignCenter
_LEFT = Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter


class QualityModel(QAbstractTableModel):
    """Rows are ROIs in the order shown; columns are id, verdict, the numbers, note.

    Parameters
    ----------
    on_sort
        Called with column name and whether descending when the user asks for another order.
    on_note
        Called with ROI and text when a note was written into its cell.
    """

    def __init__(self, on_sort: Callable[[str, bool], None], on_note: Callable[[int, str], None]):
        super().__init__()
        self._on_sort, self._on_note = on_sort, on_note
        self._table, self._judged = judging.Table(), judging.Judgements()
        self._places: dict[int, int] = {}
        self._digits: dict[str, int] = {}
        self.order: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ("roi", VERDICT, NOTE)
        self.verdict_colours: dict[str, str] = {}

    def show(self, table: judging.Table, order: tuple[int, ...], judged: judging.Judgements) -> bool:
        """Show these ROIs; returns whether rows or columns moved, which takes the selection away."""
        names = ("roi", VERDICT, *(column.name for column in table.columns), NOTE)
        moved = (order, names) != (self.order, self.names)
        if moved:
            self.beginResetModel()
        self._table, self._judged, self.order, self.names = table, judged, order, names
        self._places = {roi: place for place, roi in enumerate(table.rois)}
        self._digits = {column.name: judging.digits(table.numbers(column.name)) for column in table.columns}
        if moved:
            self.endResetModel()
        elif order:
            self.dataChanged.emit(self.index(0, 0), self.index(len(order) - 1, len(names) - 1))
        return moved

    def rowCount(self, parent: QModelIndex = QModelIndex()) -> int:  # noqa: B008, N802 - Qt's way
        """Number of ROIs shown (Qt)."""
        return 0 if parent.isValid() else len(self.order)

    def columnCount(self, parent: QModelIndex = QModelIndex()) -> int:  # noqa: B008, N802 - Qt's way
        """Number of columns (Qt)."""
        return 0 if parent.isValid() else len(self.names)

    def data(self, index: QModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        """What a cell shows (Qt)."""
        roi, name = self.order[index.row()], self.names[index.column()]
        judgement = self._judged.of(roi)
        if role in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.EditRole):
            if name == NOTE:
                return judgement.note
            if name == VERDICT:
                return _SIGNS[judgement.verdict]
            if name == "roi":
                return str(roi)
            value = float(self._table.values[name][self._places[roi]])
            return f"{value:.{self._digits[name]}f}" if math.isfinite(value) else ""
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _LEFT if name == NOTE else _MIDDLE if name == VERDICT else _RIGHT
        if role == Qt.ItemDataRole.ForegroundRole and name == VERDICT and judgement.verdict in self.verdict_colours:
            return QColor(self.verdict_colours[judgement.verdict])
        if role == Qt.ItemDataRole.ToolTipRole:
            return judgement.note or None if name == NOTE else judgement.verdict or None if name == VERDICT else None
        return None

    def headerData(  # noqa: N802 - Qt's name
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> Any:
        """Head of a column and what it says (Qt)."""
        if orientation != Qt.Orientation.Horizontal or section >= len(self.names):
            return None
        name = self.names[section]
        column = self._table.column(name)
        if role == Qt.ItemDataRole.DisplayRole:
            return column.title if column is not None else {VERDICT: "✓", NOTE: NOTE}.get(name, "ROI")
        if role == Qt.ItemDataRole.ToolTipRole:
            if column is None or name == "roi":
                return _HELP.get(name, judging.ROI.help)
            return f"{name.replace('_', ' ')}: {column.help} ({column.worst})"
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _LEFT if name == NOTE else _MIDDLE  # at the right is the arrow that tells the order
        return None

    def flags(self, index: QModelIndex) -> Qt.ItemFlag:
        """Cells can be chosen, notes written (Qt)."""
        flags = Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable
        return flags | Qt.ItemFlag.ItemIsEditable if self.names[index.column()] == NOTE else flags

    def setData(  # noqa: N802 - Qt's name
        self, index: QModelIndex, value: Any, role: int = Qt.ItemDataRole.EditRole
    ) -> bool:
        """Write a note (Qt)."""
        if role != Qt.ItemDataRole.EditRole or self.names[index.column()] != NOTE:
            return False
        self._on_note(self.order[index.row()], str(value))
        return True

    def sort(self, column: int, order: Qt.SortOrder = Qt.SortOrder.AscendingOrder) -> None:
        """Ask for another order (Qt)."""
        if 0 <= column < len(self.names):
            self._on_sort(self.names[column], order == Qt.SortOrder.DescendingOrder)
