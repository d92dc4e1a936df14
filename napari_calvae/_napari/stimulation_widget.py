"""The dock widget for stimulated recordings: artefact and response told apart, and who is connected with whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from napari.viewer import Viewer
from qtpy.QtWidgets import (
    QFileDialog,
    QLabel,
    QPushButton,
    QSpinBox,
    QTabWidget,
    QWidget,
)

import napari_calvae as calvae
from napari_calvae._napari import pulses, responses, session
from napari_calvae._napari.average_plots import AveragePlots
from napari_calvae._napari.choices import Choices
from napari_calvae._napari.connections import ConnectionPanel
from napari_calvae._napari.number_table import NumberTable
from napari_calvae._napari.plot_items import Palette
from napari_calvae._napari.pulse_average import average
from napari_calvae._napari.pulse_plots import PulsePlots
from napari_calvae._napari.recording_widget import RecordingWidget
from napari_calvae._napari.retraining import told
from napari_calvae._napari.run_bar import RunBar
from napari_calvae._napari.script import write_whole

WIDTH, HEIGHT = 300, 372
#: Columns of the table: head, what it means, how it is written.
_COLUMNS: dict[str, tuple[str, Callable[[responses.Cell], str]]] = {
    "cell": ("Id of the cell's ROI", lambda cell: str(cell.roi)),
    "spikes/s": ("Mean over the recording", lambda cell: f"{cell.rate_per_s:.2f}"),
    "pulses": ("Pulses of which at least half the power reaches the cell", lambda cell: str(cell.n_pulses)),
    "evoked": (
        "Spikes that one pulse on the cell evokes, beyond its rate in the dark; the tooltip of a row has the interval",
        lambda cell: responses.signed(cell.evoked) if cell.n_pulses else "",
    ),
    "artefact": (
        "Fluorescence (ΔF/F) that light of power 1 on the cell adds while it is on",
        lambda cell: f"{cell.artefact_dff:.2f}".replace("-", "−"),
    ),
}
_NONE = "No pulses yet."


class StimulationWidget(RecordingWidget):
    """Loads pulses and estimates what they did: to the fluorescence, to the cells, and through them to others."""

    def __init__(self, napari_viewer: Viewer):
        bar = RunBar("Estimate", "Infer spikes, artefacts and connections of all ROIs together; takes a minute or more")
        self.plots: PulsePlots
        super().__init__(napari_viewer, bar, PulsePlots(), HEIGHT)
        self.source: pulses.Source | None = None
        self.result: calvae.AllOpticalInference | None = None
        self.cells: tuple[responses.Cell, ...] = ()
        self._ids: tuple[int, ...] = ()
        #: Changes with the pulses.
        self._mark = ""
        self._build()
        self._lay_out()
        self.bar.say("Load the pulses: when each began, how long it lasted, and where it was pointed.")
        self.attach()

    def _build(self) -> None:
        self.load = QPushButton("Load pulses …")
        self.load.setToolTip(
            "A .csv table with a row per pulse and target: onset_s, duration_s (or _ms), x and y (pixels of the movie) "
            "or roi (id), perhaps power and pulse (number); or an .npz with the arrays onset, duration (s), targets "
            "(x, y) or roi. Pulses in a layer's metadata “stimulation” are found by themselves"
        )
        self.load.clicked.connect(self._on_load)
        self.told = QLabel(_NONE)
        self.told.setWordWrap(True)
        self.told.setStyleSheet("font-size: 8pt;")
        self.told.setMinimumHeight(30)
        self.told.setToolTip("Pulses that are loaded")
        self.settle = _spin(0, 10_000, 30, " sweeps", "Sweeps of the sampler that are thrown away while it settles")
        self.samples = _spin(2, 1000, 40, " sweeps", "Sweeps that are kept: samples of spikes and connections")
        for box in (self.settle, self.samples):
            box.valueChanged.connect(self._check_shown)
        self.table = NumberTable(
            {head: tip for head, (tip, _) in _COLUMNS.items()},
            "Cells; arrow keys up and down show one after the other, and so does a click in the movie",
        )
        self.table.chosen.connect(self.show_cell)
        self.csv = QPushButton("Save table …")
        self.csv.setToolTip("Write the numbers of all cells, with intervals, as .csv")
        self.csv.setEnabled(False)
        self.csv.clicked.connect(self._on_save_cells)
        self.average = AveragePlots()
        self.connections = ConnectionPanel()
        self.connections.csv.clicked.connect(self._on_save_connections)
        self.connections.chosen.connect(self._on_picked)
        self.pages = QTabWidget()
        self.pages.setDocumentMode(True)
        self._add_page(self.plots, "Cell", "Artefact and response of one cell along the recording")
        self._add_page(self.average, "Average", "Artefact and response around the pulses on one cell, on average")
        self._add_page(self.connections, "Connections", "Who excites or inhibits whom")

    def _add_page(self, page: QWidget, title: str, tip: str) -> None:
        self.pages.setTabToolTip(self.pages.addTab(page, title), tip)

    def _lay_out(self) -> None:
        rows = [("", self.load), ("", self.told), ("Settle", self.settle), ("Samples", self.samples)]
        self._lay_panel(WIDTH, rows, [(self.table, 1), (self.csv, 0)], self.pages)
        self._tab_through(
            self.load, self.settle, self.samples, self.bar.start, self.bar.cancel, self.table, self.csv, self.pages
        )

    # Pulses

    def _offer(self, rois: calvae.RoiMasks) -> None:
        """Take the pulses that the layers hold, unless a file was loaded."""
        if isinstance(self.source, Path):
            return
        choices = self.inference.choices
        self.source, self._mark = pulses.in_metadata(choices.roi_layer, choices.movie), ""
        self.told.setText(_NONE)
        if self.source is not None:
            try:
                self.told.setText(f"{self._checked(self.source)[1]} (found in the layer).")
            except (calvae.RecordingError, ValueError) as error:
                self.told.setText(session.explain(error))

    def _on_load(self, *_: object) -> None:
        name = QFileDialog.getOpenFileName(self, "Pulses of light", "", "Pulses (*.csv *.npz)")[0]
        if name:
            self.load_file(Path(name))

    def load_file(self, path: Path) -> None:
        """Believe the pulses in a file if they go with movie and ROIs."""
        try:
            words = self._checked(path)[1]
        except (calvae.RecordingError, OSError, ValueError) as error:
            self._fail(session.explain(error))
            return
        self.source = path
        self.told.setText(f"{words} ({path.name}).")
        self.bar.say("Press Estimate to tell artefact and response apart.")
        self._check_shown()

    def _checked(self, source: pulses.Source) -> tuple[calvae.Stimulation, str]:
        """The pulses, which are those to be taken from now on, and what there is of them in words."""
        choices = self.inference.choices
        key, _, masks = choices.rois()
        stimulation = pulses.read(source, masks)
        words = pulses.check(stimulation, masks, choices.frames.shape[0] / key.settings.frame_rate)
        self._mark = session.fingerprint(
            stimulation.onset, stimulation.duration, stimulation.power, *stimulation.targets
        )
        return stimulation, words

    def _order(self, number: int) -> Iterator[Any]:
        choices = self.inference.choices
        key, _, masks = choices.rois()
        self._offer(masks)
        if self.source is None:
            raise calvae.RecordingError("Pulses: expected when and where light was given, got none. Load a file first.")
        stimulation, _ = self._checked(self.source)
        self._ids = masks.ids
        self.bar.say(f"{len(stimulation)} pulses, {len(masks)} cells: each sweep visits all of them.")
        return pulses.iter_estimate(
            pulses.Order(
                number,
                choices.frames,
                masks,
                stimulation,
                key.settings,
                self.settle.value(),
                self.samples.value(),
            )
        )

    def _conditions(self, choices: Choices) -> tuple:
        key = choices.rois()[0]
        counting = replace(key.settings, n_samples=self.samples.value(), device="", amplitude=None)
        return *key[:3], counting, self.settle.value(), self._mark

    # What is shown

    def _set_outdated(self, outdated: bool) -> None:
        super()._set_outdated(outdated)
        for page in (self.average, self.connections):
            page.set_outdated(outdated)

    def _show_message(self, message: pulses.Sweep | pulses.Estimated) -> None:
        if isinstance(message, pulses.Sweep):
            self.bar.show_progress(message.fraction, message.words)
            self.connections.show_matrix(message.connectivity, self._ids, "this sweep")
            return
        self.show_result(message)
        n_samples = message.result.spikes.n_samples
        self._done(f"{n_samples} samples in {told(message.seconds)}. Click a cell; Connections has the network.")

    def _on_stopped(self) -> None:
        if self.result is not None:
            self.connections.show_result(self.result, self.connections.found)
        else:
            self.connections.clear()

    def show_result(self, estimated: pulses.Estimated) -> None:
        """Show a result; the cell that was picked, or else the first."""
        before, result = self.shown_cell, estimated.result
        ids = result.spikes.roi_ids
        self.result, self.cells = result, estimated.cells
        self.table.fill(
            [[written(cell) for _, written in _COLUMNS.values()] for cell in self.cells],
            [responses.told_cell(cell) for cell in self.cells],
        )
        self.csv.setEnabled(True)
        self.connections.show_result(result, estimated.connections)
        self.table.choose(next((ids.index(roi) for roi in (self.inference.picked_roi, before) if roi in ids), 0))

    @property
    def shown_cell(self) -> int | None:
        """Id of the cell that is shown."""
        row = self.table.currentRow()
        return None if row < 0 else self.cells[row].roi

    def show_cell(self, row: int) -> None:
        """Show the cell in this row of the table."""
        if self.result is not None:
            self.plots.show_cell(responses.picture(self.result, row), responses.heading(self.cells[row]))
            self.average.show_cell(self.cells[row].roi, average(self.result, row))
            self._on_slider()

    def _on_picked(self, roi: int) -> None:
        ids = [cell.roi for cell in self.cells]
        if roi in ids:
            self.table.choose(ids.index(roi))

    def _paint(self, palette: Palette) -> None:
        for page in (self.average, self.connections):
            page.set_palette(palette)

    def _on_save_cells(self, *_: object) -> None:
        self.save("Table of cells", "stimulated_cells.csv", "Table (*.csv)", self.save_cells)

    def _on_save_connections(self, *_: object) -> None:
        self.save("Table of connections", "connections.csv", "Table (*.csv)", self.save_connections)

    def save_cells(self, path: Path) -> str:
        """Write the numbers of all cells; tells how many."""
        write_whole(path, responses.csv_text(self.cells))
        return f"{len(self.cells)} cells written to {path.name}."

    def save_connections(self, path: Path) -> str:
        """Write all connections; tells how many."""
        write_whole(path, responses.csv_text(self.connections.found))
        return f"{len(self.connections.found)} connections written to {path.name}."

    def _dispose(self) -> None:
        super()._dispose()
        for page in (self.average, self.connections):
            page.dispose()


def _spin(least: int, most: int, value: int, unit: str, tip: str) -> QSpinBox:
    box = QSpinBox()
    box.setRange(least, most)
    box.setValue(value)
    box.setSuffix(unit)
    box.setToolTip(tip)
    return box
