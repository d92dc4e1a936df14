"""What the quality widget is made of: filter line, table, buttons of judgement, colours with distribution, exports."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import QAbstractItemModel, QSignalBlocker, Qt, Signal
from qtpy.QtGui import QKeyEvent
from qtpy.QtWidgets import (
    QAbstractItemView,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QTableView,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from napari_calvae._napari import judging
from napari_calvae._napari.distribution import Distribution
from napari_calvae._napari.run_on import RunLine, RunOn

WIDTH = 300
_ERROR = "color: #ff6b6b;"
_ROW = 20
#: Width (pixels) of a head's margins and of the arrow that tells the order.
_ARROW = 26


class CellTable(QTableView):
    """Table of cells; letters are shortcuts, not a search.

    ``letter`` is emitted with the key of each letter typed, such as ``N`` or ``Shift+U``.
    """

    letter = Signal(str)

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.setEditTriggers(QAbstractItemView.EditTrigger.DoubleClicked)
        self.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setAlternatingRowColors(False)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTabKeyNavigation(False)
        self.setMinimumHeight(90)
        rows, heads = self.verticalHeader(), self.horizontalHeader()
        if rows is not None:
            rows.hide()
            rows.setDefaultSectionSize(_ROW)
            rows.setMinimumSectionSize(_ROW)
        if heads is not None:
            heads.setHighlightSections(False)
            heads.setResizeContentsPrecision(0)  # look at the rows in view alone: there may be thousands
            heads.setMinimumSectionSize(28)
            heads.setStretchLastSection(True)

    def setModel(self, model: QAbstractItemModel | None) -> None:  # noqa: N802 - Qt's name
        """Show a model, sorted by its first column (Qt)."""
        super().setModel(model)
        self.sortByColumn(0, Qt.SortOrder.AscendingOrder)
        self.setSortingEnabled(True)

    def fit(self) -> None:
        """As narrow as heads and numbers allow."""
        heads, model = self.horizontalHeader(), self.model()
        if heads is not None and model is not None:
            for section in range(heads.count() - 1):
                cells, head = self.sizeHintForColumn(section), heads.fontMetrics()
                words = str(model.headerData(section, Qt.Orientation.Horizontal))
                heads.resizeSection(section, max(cells + 4, head.horizontalAdvance(words) + _ARROW))

    def keyPressEvent(self, event: QKeyEvent | None) -> None:  # noqa: N802 - Qt's name
        """Letters are shortcuts (Qt)."""
        if event is None:
            return
        plain = event.modifiers() & ~Qt.KeyboardModifier.ShiftModifier == Qt.KeyboardModifier.NoModifier
        if plain and Qt.Key.Key_A <= event.key() <= Qt.Key.Key_Z:
            shift = event.modifiers() == Qt.KeyboardModifier.ShiftModifier
            self.letter.emit(("Shift+" if shift else "") + chr(event.key()))
            return
        super().keyPressEvent(event)


class QualityForm(QWidget):
    """All controls, without what they do."""

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.setMinimumWidth(WIDTH)
        self.listed = _box(list(judging.SHOW), "Which cells are listed, by your verdict")
        self.filter = QLineEdit()
        self.filter.setPlaceholderText("unfamiliarity > 1")
        self.filter.setToolTip(
            "List only cells with such numbers: “unfamiliarity > 1 and spike rate < 5”; Enter applies"
        )
        self.filter.setClearButtonEnabled(True)
        self.keys = _button("?", "", tool=True)
        self.table = CellTable()
        self.accept = _button("✓ Accept", "Accept the chosen cells (K)")
        self.reject = _button("✗ Reject", "Reject the chosen cells (J)")
        self.clear = _button("Clear", "Take the verdict of the chosen cells back; notes stay")
        self.undo = _button("↶", "Undo the last verdict or note (U)", tool=True)
        self.redo = _button("↷", "Do again what was undone (Shift+U)", tool=True)
        self.note = QLineEdit()
        self.note.setPlaceholderText("note")
        self.note.setToolTip("Note on the chosen cells; Enter keeps it")
        self.worst = _button("Worst", "Go to the worst cell by the sorted column, unjudged ones first (W)")
        self.next = _button("Next unjudged", "Go to the next cell without a verdict (N)")
        self.colour = _box(["none"], "Colour the ROIs of the Labels layer by verdict or by a number")
        self.distribution = Distribution(named=True)
        self.every = _button("▥", "Distributions of all numbers, in a window of their own", tool=True)
        self.infer_all = _button("Infer all", "Infer every ROI that has no numbers yet")
        self.run_on, self.run_line = RunOn(), RunLine()
        self.gap = _button(
            "Gap", "Refine the chosen cells to see how much the network's answer misses (nats/s): seconds each"
        )
        self.csv = _button("CSV…", "Save the listed cells, in this order, as a table of comma-separated values")
        self.python = _button("Copy as Python", "Copy a script that infers the same again, with all settings")
        self.figure = _button("Figure…", "Save the picture of the picked ROI, over the time in view, as PNG or SVG")
        self.status = QLabel()
        self.status.setWordWrap(True)
        self.status.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        self.status.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.status.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.status.setFixedHeight(36)
        self._lay_out()

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 4, 6, 2)
        layout.setSpacing(4)
        layout.addLayout(_line(self.listed, self.filter, self.keys, stretch=self.filter))
        layout.addWidget(self.table, 1)
        layout.addLayout(_line(self.accept, self.reject, self.clear, self.undo, self.redo, stretch=None))
        layout.addLayout(_line(self.note, self.worst, self.next, stretch=self.note))
        layout.addLayout(
            _line(
                QLabel("Colour by"), self.colour, self.every, self.gap, self.infer_all, self.run_on, stretch=self.colour
            )
        )
        layout.addWidget(self.run_line)
        layout.addWidget(self.distribution)
        layout.addLayout(_line(self.csv, self.python, self.figure, stretch=None))
        layout.addWidget(self.status)
        order = [self.listed, self.filter, self.keys, self.table, self.accept, self.reject, self.clear, self.undo]
        order += [
            self.redo,
            self.note,
            self.worst,
            self.next,
            self.colour,
            self.gap,
            self.infer_all,
            self.run_on,
            self.csv,
            self.python,
        ]
        for before, after in zip(order, [*order[1:], self.figure], strict=False):
            QWidget.setTabOrder(before, after)

    def say(self, sentence: str, error: bool = False) -> None:
        """Write into the status line."""
        self.status.setStyleSheet(_ERROR if error else "")
        self.status.setText(sentence)
        self.status.setToolTip(sentence)

    def offer(self, columns: Sequence[judging.Column]) -> None:
        """Offer these numbers as colours; what is chosen stays chosen if it is still there."""
        wanted = ["none", "verdict", *(column.name for column in columns)]
        if [self.colour.itemData(i) for i in range(self.colour.count())] == wanted:
            return
        blocker = QSignalBlocker(self.colour)
        chosen = self.colour.currentData()
        self.colour.clear()
        for name in wanted:
            self.colour.addItem(name.replace("_", " "), name)
        self.colour.setCurrentIndex(max(self.colour.findData(chosen), 0))
        blocker.unblock()


def _box(words: Sequence[str], tip: str) -> QComboBox:
    box = QComboBox()
    for word in words:
        box.addItem(word, word)
    box.setToolTip(tip)
    box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToContents)
    return box


def _button(words: str, tip: str, tool: bool = False) -> QPushButton | QToolButton:
    button = QToolButton() if tool else QPushButton()
    button.setText(words)
    button.setToolTip(tip)
    return button


def _line(*widgets: QWidget, stretch: QWidget | None) -> QHBoxLayout:
    line = QHBoxLayout()
    line.setSpacing(4)
    for widget in widgets:
        line.addWidget(widget, int(widget is stretch))
    return line
