"""The dock widget for dendrites: back-propagating action potentials and synaptic inputs of spines, told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from napari.viewer import Viewer
from qtpy.QtCore import QSignalBlocker
from qtpy.QtWidgets import (
    QComboBox,
    QDoubleSpinBox,
    QLineEdit,
    QPushButton,
)

import napari_calvae as calvae
from napari_calvae._napari import answers, dendrite
from napari_calvae._napari.choices import Choices
from napari_calvae._napari.controls import beside
from napari_calvae._napari.dendrite_plots import DendritePlots
from napari_calvae._napari.number_table import NumberTable
from napari_calvae._napari.recording_widget import RecordingWidget
from napari_calvae._napari.run_bar import RunBar
from napari_calvae._napari.script import write_whole

WIDTH, HEIGHT = 300, 372
#: Columns of the table: head, what it means, how it is written.
_COLUMNS: dict[str, tuple[str, Callable[[dendrite.Compartment], str]]] = {
    "spine": ("Id of the spine's ROI", lambda row: str(row.roi)),
    "inputs/s": (
        "Synaptic inputs per second, mean over the recording; the tooltip of a cell has the 90 % credible interval",
        lambda row: f"{row.rate_per_s:.2f}",
    ),
    "input": ("Peak of the response to one synaptic input (ΔF/F)", lambda row: f"{row.input_dff:.2f}"),
    "bAP": ("Peak of the response to one back-propagating action potential (ΔF/F)", lambda row: f"{row.bap_dff:.2f}"),
    "÷ shaft": (
        "bAP in the spine relative to that in the shaft: 1.00 where it arrives in full",
        lambda row: f"{row.bap_of_shaft:.2f}",
    ),
    "R²": ("Share of the variance of the spine's ΔF/F that the reconstruction explains", lambda row: f"{row.r2:.2f}"),
}


class SpineWidget(RecordingWidget):
    """Separates what a shaft's action potentials and a spine's own inputs make of its fluorescence."""

    def __init__(self, napari_viewer: Viewer):
        bar = RunBar("Separate", "Read the traces of shaft and spines, and infer action potentials and inputs")
        self.plots: DendritePlots
        super().__init__(napari_viewer, bar, DendritePlots(), HEIGHT)
        self.result: calvae.SpineInference | None = None
        self.compartments: tuple[dendrite.Compartment, ...] = ()
        self._shaft_is_chosen = False
        self._build()
        self._lay_out()
        self.bar.say("Choose the shaft; all other ROIs are taken for its spines. Then press Separate.")
        self.attach()

    def _build(self) -> None:
        self.shaft = QComboBox()
        self.shaft.setToolTip("ROI of the dendrite's shaft (id), at first the largest one")
        self.shaft.activated.connect(self._on_shaft_chosen)
        self.shaft.currentIndexChanged.connect(self._check_shown)
        self.use_picked = QPushButton("Use picked ROI")
        self.use_picked.setToolTip("Take the ROI that was clicked in the movie for the shaft")
        self.use_picked.clicked.connect(self._on_use_picked)
        self.spines = QLineEdit()
        self.spines.setPlaceholderText("all others, or ids: 2-5, 8")
        self.spines.setToolTip("ROIs of the spines (ids); empty for all but the shaft")
        self.spines.editingFinished.connect(self._check_shown)
        self.neuropil = QDoubleSpinBox()
        self.neuropil.setRange(0, 2)
        self.neuropil.setSingleStep(0.05)
        self.neuropil.setToolTip(
            "Share of the surrounding signal that is subtracted. Around a spine is its own dendrite: 0 leaves it in"
        )
        self.neuropil.valueChanged.connect(self._check_shown)
        self.table = NumberTable(
            {head: tip for head, (tip, _) in _COLUMNS.items()},
            "Spines; arrow keys up and down show one after the other",
        )
        self.table.chosen.connect(self.show_spine)
        self.csv = QPushButton("Save table …")
        self.csv.setToolTip("Write the numbers of shaft and spines, with intervals and time constants, as .csv")
        self.csv.setEnabled(False)
        self.csv.clicked.connect(self._on_save)

    def _lay_out(self) -> None:
        shaft = beside((self.shaft, 1), (self.use_picked, 0))
        rows = [("Shaft", shaft), ("Spines", self.spines), ("Neuropil", self.neuropil)]
        self._lay_panel(WIDTH, rows, [(self.table, 1), (self.csv, 0)], self.plots)
        self._tab_through(
            self.shaft,
            self.use_picked,
            self.spines,
            self.neuropil,
            self.bar.start,
            self.bar.cancel,
            self.table,
            self.csv,
        )

    # Shaft and spines

    def _offer(self, rois: calvae.RoiMasks) -> None:
        """Offer these ROIs for the shaft; what was chosen stays, else it is the one that looks like it."""
        before = self.shaft.currentData()
        keep = self._shaft_is_chosen and before in rois.ids
        blocker = QSignalBlocker(self.shaft)
        self.shaft.clear()
        for roi in rois.ids:
            self.shaft.addItem(f"ROI {roi}", roi)
        self.shaft.setCurrentIndex(self.shaft.findData(before if keep else dendrite.guess_shaft(rois)))
        blocker.unblock()
        self._shaft_is_chosen = keep

    def _on_shaft_chosen(self, *_: object) -> None:
        self._shaft_is_chosen = True

    def _on_use_picked(self, *_: object) -> None:
        self._on_layers()
        index = self.shaft.findData(self.inference.picked_roi)
        if index < 0:
            self._fail("Shaft: expected a picked ROI, got none. Click the shaft in the movie first.")
            return
        self._shaft_is_chosen = True
        self.bar.say(f"ROI {self.shaft.itemData(index)} is the shaft.")
        self.shaft.setCurrentIndex(index)

    def _order(self, number: int) -> Iterator[Any]:
        choices = self.inference.choices
        key, _, masks = choices.rois()
        if self.shaft.currentData() not in masks.ids and not self._shaft_is_chosen:
            self._offer(masks)
        shaft = self.shaft.currentData()
        spines = dendrite.chosen_spines(self.spines.text(), shaft, masks.ids)
        settings = self._settings(key)
        self.bar.say(f"Shaft {shaft}, {len(spines)} spines.")
        return dendrite.iter_separate(dendrite.Order(number, choices.frames, masks, shaft, spines, settings))

    def _settings(self, key: answers.Key) -> answers.Settings:
        return replace(key.settings, neuropil_coefficient=round(self.neuropil.value(), 4))

    def _conditions(self, choices: Choices) -> tuple:
        key = choices.rois()[0]
        counting = replace(self._settings(key), model="", device="", amplitude=None)
        return *key[:3], counting, self.shaft.currentData(), self.spines.text().strip()

    # What is shown

    def _show_message(self, message: Any) -> None:
        result = message.result
        self.show_result(result)
        self._done(
            f"{len(result.spines)} spines of shaft {result.shaft} separated, {result.inference.n_samples} samples each."
        )

    def show_result(self, result: calvae.SpineInference) -> None:
        """Show numbers and pictures of a dendrite; the spine that was chosen stays so if it is still there."""
        before = self.shown_spine
        self.result, self.compartments = result, dendrite.compartments(result)
        spines = self.compartments[1:]
        self.table.fill(
            [[written(numbers) for _, written in _COLUMNS.values()] for numbers in spines],
            [dendrite.told(numbers) for numbers in spines],
        )
        self.csv.setEnabled(True)
        self.table.choose(result.spines.index(before) if before in result.spines else 0)

    @property
    def shown_spine(self) -> int | None:
        """Id of the spine that is shown."""
        row = self.table.currentRow()
        return None if self.result is None or row < 0 else self.result.spines[row]

    def show_spine(self, row: int) -> None:
        """Show the spine in this row of the table."""
        if self.result is None or not 0 <= row < len(self.result.spines):
            return
        heading = dendrite.heading(self.result, self.compartments[row + 1])
        self.plots.show_spine(dendrite.picture(self.result, row + 1), heading)
        self._on_slider()

    def _on_picked(self, roi: int) -> None:
        if self.result is not None and roi in self.result.spines:
            self.table.choose(self.result.spines.index(roi))

    def _on_save(self, *_: object) -> None:
        self.save("Table of spines", "spines.csv", "Table (*.csv)", self.save_table)

    def save_table(self, path: Path) -> str:
        """Write the numbers of shaft and spines; tells how many."""
        write_whole(path, dendrite.csv_text(self.compartments))
        return f"The shaft and {len(self.compartments) - 1} spines written to {path.name}."
