"""A small table of numbers under short heads, of which one row at a time is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtpy.QtCore import QSignalBlocker, Qt, Signal
from qtpy.QtWidgets import QAbstractItemView, QHeaderView, QTableWidget, QTableWidgetItem, QWidget


class NumberTable(QTableWidget):
    """``chosen`` is emitted with the row that was clicked, or come to by the arrow keys.

    Parameters
    ----------
    columns
        Head of each column, and what it means.
    tip
        What the table is for.
    """

    chosen = Signal(int)

    def __init__(self, columns: Mapping[str, str], tip: str, parent: QWidget | None = None):
        super().__init__(0, len(columns), parent)
        for index, (head, meaning) in enumerate(columns.items()):
            item = QTableWidgetItem(head)
            item.setToolTip(meaning)
            self.setHorizontalHeaderItem(index, item)
        across, down = self.horizontalHeader(), self.verticalHeader()
        if across is not None and down is not None:
            across.setStyleSheet("font-size: 8pt;")
            across.setMinimumSectionSize(20)
            across.setSectionResizeMode(QHeaderView.ResizeMode.Stretch)
            for index, head in enumerate(columns):
                if len(head) > 6:
                    across.setSectionResizeMode(index, QHeaderView.ResizeMode.ResizeToContents)
            down.hide()
            down.setDefaultSectionSize(20)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setTabKeyNavigation(False)
        self.setToolTip(tip)
        self.currentCellChanged.connect(self._on_cell)

    def fill(self, rows: Sequence[Sequence[str]], tips: Sequence[str]) -> None:
        """Show these rows, each with its tooltip; none is chosen."""
        blocker = QSignalBlocker(self)
        self.setCurrentCell(-1, -1)
        self.setRowCount(len(rows))
        for row, (cells, tip) in enumerate(zip(rows, tips, strict=True)):
            for column, text in enumerate(cells):
                item = QTableWidgetItem(text)
                item.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
                item.setToolTip(tip)
                self.setItem(row, column, item)
        blocker.unblock()

    def choose(self, row: int) -> None:
        """Choose a row."""
        self.setCurrentCell(row, 0)

    def _on_cell(self, row: int, _column: int, before: int, _column_before: int) -> None:
        if row >= 0 and row != before:
            self.chosen.emit(row)
