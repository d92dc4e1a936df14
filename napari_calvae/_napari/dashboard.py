"""All numbers of the quality table at one look: how each is distributed over the ROIs, and where the picked one is."""

from __future__ import annotations

import numpy as np
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QDialog, QGridLayout, QLabel, QWidget

from napari_calvae._napari import judging
from napari_calvae._napari.distribution import Distribution
from napari_calvae._napari.plot_items import Palette

#: Distributions beside each other, and their width (pixels).
_ACROSS, _WIDTH = 3, 240


class Dashboard(QDialog):
    """A window of its own, beside napari's: a distribution per column of the table."""

    def __init__(self, parent: QWidget, palette: Palette):
        super().__init__(parent, Qt.WindowType.Tool)
        self.setWindowTitle("Distributions over all ROIs")
        self._palette = palette
        self._grid = QGridLayout(self)
        self.distributions: dict[str, Distribution] = {}
        self._labels: dict[str, QLabel] = {}

    def set_palette(self, palette: Palette) -> None:
        """Draw in these colours."""
        self._palette = palette
        for distribution in self.distributions.values():
            distribution.set_palette(palette)

    def show_table(self, table: judging.Table, current: int | None) -> None:
        """Show every column of numbers, and mark the current ROI in each."""
        names = [column.name for column in table.columns]
        for gone in set(self.distributions) - set(names):
            self.distributions.pop(gone).dispose()
            self._labels.pop(gone).deleteLater()
        for place, column in enumerate(table.columns):
            if column.name not in self.distributions:
                self._add(column, place)
            values = table.numbers(column.name)
            distribution = self.distributions[column.name]
            words = f"{column.help}. The line is the picked ROI."
            distribution.show_values(values, judging.colour_range(values), words, None, column.words)
            known = current in table.rois
            distribution.set_mark(float(values[table.rois.index(current)]) if known and current is not None else np.nan)

    def _add(self, column: judging.Column, place: int) -> None:
        label, distribution = QLabel(column.words), Distribution()
        distribution.set_palette(self._palette)
        distribution.setMinimumWidth(_WIDTH)
        row, across = divmod(place, _ACROSS)
        self._grid.addWidget(label, 2 * row, across)
        self._grid.addWidget(distribution, 2 * row + 1, across)
        self.distributions[column.name], self._labels[column.name] = distribution, label

    def dispose(self) -> None:
        """Give up all graphics; the window is of no use afterwards."""
        for distribution in self.distributions.values():
            distribution.dispose()
        self.close()
        self.deleteLater()
