"""The dock widget for judging: all ROIs in a table, linked with the inference widget and the canvas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from napari.qt import get_qapp
from napari.utils.theme import get_theme
from napari.viewer import Viewer
from qtpy.QtCore import QItemSelectionModel, QModelIndex, QTimer
from qtpy.QtGui import QCursor
from qtpy.QtWidgets import QFileDialog, QToolTip, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import answers, figure, gaps, judging, roi_layer, script, session
from napari_calvae._napari.dashboard import Dashboard
from napari_calvae._napari.docking import DockManners
from napari_calvae._napari.inference_widget import InferenceWidget
from napari_calvae._napari.keys import KEYS, Keys
from napari_calvae._napari.plot_items import Palette
from napari_calvae._napari.quality_form import QualityForm
from napari_calvae._napari.quality_model import QualityModel
from napari_calvae._napari.run_on import Runs
from napari_calvae._napari.work import Worker

#: Milliseconds within which changes are gathered: results may come ROI by ROI.
PATIENCE = 120
BARS = 24


class QualityWidget(QWidget):
    """Table of all ROIs: how well each is explained, what you think of it, where to look next."""

    def __init__(self, napari_viewer: Viewer):
        super().__init__()
        self._viewer = napari_viewer
        self._closed = self._attached = self._placing = False
        self._inference: InferenceWidget | None = None
        self._shown: judging.Column | None = None
        self._counts, self._gaps = judging.Counts(), gaps.KnownGaps()
        self._requests, self._worker = answers.Requests(), Worker(self)
        self.table, self.view = judging.Table(), judging.View()
        self.rois = roi_layer.JudgedRois(self._later_refresh)
        self.current: int | None = None
        self.form = QualityForm()
        self.runs = Runs(self.form.run_on, self.form.run_line)
        self.dashboard = Dashboard(self, Palette.on("#262930", "#f0f1f2"))
        self.model = QualityModel(self._on_sort, self._on_cell_note)
        self.form.table.setModel(self.model)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.form)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(PATIENCE)
        self._later.timeout.connect(self.refresh)
        self._manners = DockManners(self, None, leave=self.detach, stay=self.attach, gone=self.close_down)
        self._connect()
        self._on_theme()
        self.refresh()

    def _connect(self) -> None:
        form = self.form
        self._selection = form.table.selectionModel() or QItemSelectionModel(self.model)
        self._selection.currentRowChanged.connect(self._on_row)
        self._selection.selectionChanged.connect(self._on_selection)
        form.table.letter.connect(self._on_letter)
        form.listed.currentIndexChanged.connect(self._on_filter)
        form.filter.editingFinished.connect(self._on_filter)
        form.filter.textChanged.connect(lambda text: self._on_filter() if not text else None)
        form.colour.currentIndexChanged.connect(lambda _: self._paint())
        form.note.returnPressed.connect(self._on_note)
        for button, action in {
            form.accept: self.accept,
            form.reject: self.reject,
            form.clear: self.clear,
            form.undo: self.undo,
            form.redo: self.redo,
            form.worst: self.worst_cell,
            form.next: self.next_unjudged,
            form.infer_all: self.infer_all,
            form.gap: self.ask_gaps,
            form.every: self.show_dashboard,
            form.csv: lambda: self._save_as("Table of cells", "cells.csv", "Table (*.csv)", self.save_table),
            form.python: self.copy_script,
            form.keys: lambda: QToolTip.showText(QCursor.pos(), form.keys.toolTip(), form.keys),
            form.figure: self.ask_figure,
        }.items():
            button.clicked.connect(_alone(action))
        self._worker.message.connect(self._on_gap)
        get_qapp().aboutToQuit.connect(self.close_down)
        self.attach()

    @property
    def judged(self) -> judging.Judgements:
        """What was said about the ROIs of the present layer."""
        return self.rois.judged

    # What is known

    def refresh(self, *_: object) -> None:
        """Read ROIs, results and verdicts again, and show them."""
        self._later.stop()
        if self._closed or self._inference is None:
            return
        choices = self._inference.choices
        try:
            key, _image, masks = choices.rois()
        except (calvae.RecordingError, ValueError) as error:
            self.table = judging.Table()
            self.rois.take(None)
            self._arrange()
            self.form.say(session.explain(error), error=True)
            return
        self.rois.take(choices.roi_layer)
        known = self._inference.results.known(key)  # none if they belong to other ROIs or settings
        rows = {roi: self._inference.results.rows[roi] for roi in masks.ids if roi in known}
        gap = judging.Column(*gaps.COLUMN)
        self.table = judging.tabulate(masks.ids, rows, self._counts, {gap: self._gaps.of(rows)})
        self.current = self._inference.picked_roi if self._inference.picked_roi in masks.ids else None
        self._arrange()

    def _arrange(self) -> None:
        order = judging.arrange(self.table, self.judged, self.view)
        self._placing = True
        columns = self.model.names
        if self.model.show(self.table, order, self.judged) or columns != self.model.names:
            self.form.table.fit()
        self.form.offer(self.table.columns)
        self._placing = False
        self._place()
        self._paint()
        self._count()

    def _count(self) -> None:
        table, form = self.table, self.form
        verdicts = [self.judged.of(roi).verdict for roi in table.rois]
        accepted, rejected = verdicts.count(judging.ACCEPTED), verdicts.count(judging.REJECTED)
        sentence = f"{table.inferred} of {len(table.rois)} ROIs inferred, {accepted} accepted, {rejected} rejected."
        hidden = len(table.rois) - len(self.model.order)
        form.say(f"{sentence} The filter hides {hidden}." if hidden else sentence)
        form.infer_all.setEnabled(table.inferred < len(table.rois) or self._inference is None)
        form.undo.setEnabled(bool(self.judged.done))
        form.redo.setEnabled(bool(self.judged.undone))
        self._on_offered()

    # The row and the ROI

    def _place(self) -> None:
        """Choose the row of the current ROI."""
        selection, form, rows = self._selection, self.form, self._chosen()
        self._placing = True
        if self.current in self.model.order:
            row = self.model.order.index(self.current)
            index = self.model.index(row, max(form.table.currentIndex().column(), 0))
            flags = QItemSelectionModel.SelectionFlag
            if self.current not in rows:
                selection.setCurrentIndex(index, flags.ClearAndSelect | flags.Rows)
            elif form.table.currentIndex().row() != row:
                selection.setCurrentIndex(index, flags.NoUpdate)
            form.table.scrollTo(index)
        else:
            selection.clear()
        self._placing = False
        self._on_selection()

    def _chosen(self) -> list[int]:
        """Ids of the chosen ROIs."""
        return [self.model.order[index.row()] for index in self._selection.selectedRows()]

    def _on_row(self, index: QModelIndex, _before: QModelIndex) -> None:
        if not self._placing and index.isValid():
            self.go_to(self.model.order[index.row()])

    def _on_selection(self, *_: object) -> None:
        if self._placing:
            return
        rois, form = self._chosen(), self.form
        for button in (form.accept, form.reject, form.clear, form.note):
            button.setEnabled(bool(rois))
        if not form.note.hasFocus():
            form.note.setText(self.judged.of(rois[0]).note if len(rois) == 1 else "")
        self._mark()

    def _on_shown(self, roi: int) -> None:
        self.current = roi
        self._place()
        self._count()

    def go_to(self, roi: int | None) -> None:
        """Choose a ROI and show its posterior; None does nothing."""
        if roi is None or self._inference is None:
            return
        self.current = roi
        self._place()
        if roi == self._inference.picked_roi:
            return
        try:
            self._inference.ask(roi)
        except (calvae.RecordingError, ValueError) as error:
            self.form.say(session.explain(error), error=True)

    def next_cell(self) -> None:
        """Go one row down."""
        self.go_to(judging.neighbour(self.model.order, self.current, 1))

    def previous_cell(self) -> None:
        """Go one row up."""
        self.go_to(judging.neighbour(self.model.order, self.current, -1))

    def next_unjudged(self) -> None:
        """Go to the next ROI without a verdict."""
        roi = judging.next_unjudged(self.model.order, self.current, self.judged)
        if roi is None:
            self.form.say("All listed cells are judged.")
        self.go_to(roi)

    def worst_cell(self) -> None:
        """Go to the worst ROI by the sorted column."""
        column = self.table.column(self.view.sort)
        roi = judging.worst(self.table, self.model.order, self.judged, self.view.sort)
        if column is None or column is judging.ROI:
            self.form.say("Sort by a number first: click the head of a column, then ask for the worst.")
        elif roi is None:
            self.form.say(f"No listed cell has a number for {column.title}: press “Infer all”.")
        else:
            self.go_to(roi)
            self.form.say(f"ROI {roi} by {column.words}: {column.worst}, unjudged cells first.")

    # Judging

    def accept(self) -> None:
        """Accept the chosen ROIs."""
        self._judge(verdict=judging.ACCEPTED)

    def reject(self) -> None:
        """Reject the chosen ROIs."""
        self._judge(verdict=judging.REJECTED)

    def clear(self) -> None:
        """Take the verdict of the chosen ROIs back."""
        self._judge(verdict=judging.UNJUDGED)

    def undo(self) -> None:
        """Take the last verdict or note back."""
        self._keep(self.judged.undo())

    def redo(self) -> None:
        """Do again what was undone."""
        self._keep(self.judged.redo())

    def _judge(self, **changes: str) -> None:
        rois = self._chosen()
        if not rois:
            self.form.say("Choose a cell first: click it in the movie or in the table.")
            return
        self._keep(self.judged.judge(rois, **changes))

    def _on_note(self) -> None:
        text = self.form.note.text()
        self.form.table.setFocus()
        self._judge(note=text)

    def _on_cell_note(self, roi: int, text: str) -> None:
        self._keep(self.judged.judge([roi], note=text))

    def _keep(self, judged: judging.Judgements) -> None:
        if judged is not self.judged:
            self.rois.keep(judged, self.table.rois)
            self._arrange()

    # Order, filter, colours

    def _on_sort(self, name: str, descending: bool) -> None:
        self.view = judging.View(name, descending, self.view.show, self.view.conditions)
        if self._attached:
            self._arrange()

    def _on_filter(self, *_: object) -> None:
        text = self.form.filter.text()
        try:
            conditions = judging.conditions(text, self.table)
        except calvae.RecordingError as error:
            self.form.say(str(error), error=True)
            return
        self.view = judging.View(self.view.sort, self.view.descending, self.form.listed.currentData(), conditions)
        self._arrange()

    def _paint(self) -> None:
        """Colours of the layer, and the distribution of the number that they show."""
        name = self.form.colour.currentData()
        self.rois.paint(roi_layer.colours_of(self.table, self.judged, name))
        self._shown = judging.shown_column(self.table, name, self.view.sort)
        if self._shown is None:
            self.form.distribution.show_values(np.empty(0), None, "", None, "")
        else:
            values = self.table.numbers(self._shown.name)
            bars = roi_layer.scale_colours((np.arange(BARS) + 0.5) / BARS) if self._shown.name == name else None
            words = f"{self._shown.words} of all ROIs: {self._shown.help}. The line is the picked ROI."
            self.form.distribution.show_values(values, judging.colour_range(values), words, bars, self._shown.words)
        self._mark()

    def show_dashboard(self) -> None:
        """Open the window of all distributions."""
        self.dashboard.show_table(self.table, self.current)
        self.dashboard.show()

    def _mark(self) -> None:
        if self.dashboard.isVisible():
            self.dashboard.show_table(self.table, self.current)
        value = np.nan
        known = self._shown is not None and self.table.column(self._shown.name) is not None
        if self._shown is not None and known and self.current in self.table.rois:
            value = float(self.table.numbers(self._shown.name)[self.table.rois.index(self.current)])
        self.form.distribution.set_mark(value)

    # Taking it elsewhere

    def infer_all(self) -> None:
        """Infer all ROIs that have no numbers yet; opens the inference widget if it was closed."""
        self._link()
        if self._inference is not None:
            self.runs.start(self._inference)

    def ask_gaps(self) -> None:
        """Refine the chosen cells, one after the other, and add what that gains to the table."""
        if self._inference is None:
            return
        try:
            key = self._inference.choices.rois()[0]
        except (calvae.RecordingError, ValueError) as error:
            self.form.say(session.explain(error), error=True)
            return
        known = self._inference.results.known(key)
        wanted = [roi for roi in self._chosen() if roi in known]
        if not wanted:
            self.form.say("Choose rows of inferred cells first: each takes some seconds.")
            return
        rows = {roi: self._inference.results.rows[roi] for roi in wanted}
        self.form.say(f"Refining {len(wanted)} cells …" if len(wanted) > 1 else f"Refining ROI {wanted[0]} …")
        self._worker.start(gaps.iter_gaps(self._requests.new(), rows, wanted, key.settings.model))

    def _on_gap(self, message: gaps.Gap | answers.Failure) -> None:
        if not self._requests.wants(message.number):
            return
        if isinstance(message, answers.Failure):
            self.form.say(message.sentence, error=True)
            return
        self._gaps.add(message)
        self.refresh()
        more = f" {message.left} to go." if message.left else ""
        self.form.say(f"ROI {message.roi}: refining gains {message.value:.2f} nats/s.{more}")

    def save_table(self, path: str | Path) -> None:
        """Write the listed ROIs as comma-separated values."""
        script.write_whole(path, judging.csv_text(self.table, self.model.order, self.judged))
        self.form.say(f"{len(self.model.order)} of {len(self.table.rois)} ROIs written to {Path(path).name}.")

    def ask_figure(self) -> None:
        """Ask for a file, named after the ROI in the picture, and save that there."""
        if (picture := self._picture()) is not None:
            self._save_as("Figure", f"roi_{picture.roi_ids[0]}.svg", "Figure (*.svg *.png)", self.save_figure)

    def save_figure(self, path: str | Path) -> None:
        """Write the picture of the picked ROI over the time in view, PNG or SVG."""
        picture = self._picture()
        if picture is None or self._inference is None:
            raise calvae.RecordingError("Figure: expected a picked ROI, got none. Click one first.")
        seconds = tuple(self._inference.plots.trace_row.view.viewRange()[0])
        figure.save_figure(picture, seconds, path)
        self.form.say(f"ROI {picture.roi_ids[0]}, {seconds[0]:.1f} to {seconds[1]:.1f} s, drawn in {Path(path).name}.")

    def script(self) -> str:
        """Python that repeats the results."""
        if self._inference is None:
            raise calvae.RecordingError("Script: expected the inference widget, got none. Press “Infer all”.")
        choices = self._inference.choices
        key, labels, _ = choices.rois()
        source = script.source_of(choices.chosen_movie(), choices.frames, choices.roi_layer, labels)
        rejected = [roi for roi in self.table.rois if self.judged.of(roi).verdict == judging.REJECTED]
        return script.script(source, key.settings, rejected)

    def copy_script(self) -> None:
        """Put the script on the clipboard."""
        try:
            get_qapp().clipboard().setText(self.script())
        except (calvae.RecordingError, ValueError) as error:
            self.form.say(session.explain(error), error=True)
            return
        self.form.say("A Python script that infers the same again is on the clipboard.")

    def _save_as(self, title: str, name: str, kinds: str, save: Callable[[str], None]) -> None:
        path, _ = QFileDialog.getSaveFileName(self, title, name, kinds)
        if not path:
            return
        try:
            save(path)
        except (OSError, ValueError) as error:
            self.form.say(session.explain(error), error=True)

    def _picture(self) -> calvae.SpikeInference | None:
        return self._inference.plots.current if self._inference is not None else None

    def _on_offered(self) -> None:
        self.form.figure.setEnabled(self._picture() is not None)

    # Coming and going

    def _on_letter(self, key: str) -> None:
        for bound, name, _ in KEYS:
            if bound == key:
                getattr(self, name)()

    def _on_theme(self, *_: object) -> None:
        theme = get_theme(self._viewer.theme)
        palette = Palette.on(theme.background.as_hex(), theme.text.as_hex())
        self.form.distribution.set_palette(palette)
        self.dashboard.set_palette(palette)
        self.model.verdict_colours = {judging.ACCEPTED: palette.posterior, judging.REJECTED: palette.reconstruction}

    def _later_refresh(self, *_: object) -> None:
        if not self._later.isActive():  # not pushed off again and again by a stream of results
            self._later.start()

    def _inference_slots(self, inference: InferenceWidget) -> list[tuple[Any, Callable[..., None]]]:
        controls = inference.controls
        gathered = (inference.results_changed, controls.changed, controls.layers_chosen, controls.frame_rate_typed)
        return [
            *((signal, self._later_refresh) for signal in gathered),
            (inference.shown, self._on_shown),
            (inference.plots.offered, self._on_offered),
            (inference.ran, self.runs.show),
            (inference.destroyed, self._on_inference_gone),
        ]

    def _link(self) -> None:
        """Listen to the viewer's inference widget."""
        inference = InferenceWidget.of(self._viewer)
        if inference is self._inference:
            return
        self._inference = inference
        self.runs.follow(inference)
        for signal, slot in self._inference_slots(inference):
            signal.connect(slot)
        self.refresh()

    def _on_inference_gone(self, *_: object) -> None:
        self._inference = None
        self.runs.follow(None)
        if self._closed:
            return
        self.table, self.current = judging.Table(), None
        self._arrange()
        self.form.say("The inference widget was closed. “Infer all” opens it again.")

    def attach(self) -> None:
        """Listen to viewer and inference widget, bind the keys."""
        if self._attached or self._closed:
            return
        self._attached = True
        self._keys = Keys(self._viewer, {name: getattr(self, name) for _, name, _ in KEYS})
        help_lines = "\n".join(self._keys.lines())
        self.form.keys.setToolTip(f"Keys, in the movie and in the table\n\n{help_lines}")
        self._viewer.events.theme.connect(self._on_theme)
        self._link()

    def detach(self) -> None:
        """Let go of viewer and inference widget."""
        if not self._attached:
            return
        self._attached = False
        self._later.stop()
        self._worker.close()
        self._keys.close()
        self.rois.let_go()
        self._viewer.events.theme.disconnect(self._on_theme)
        if self._inference is not None:
            for signal, slot in self._inference_slots(self._inference):
                signal.disconnect(slot)
        self._inference = None
        self.runs.follow(None)

    def close_down(self) -> None:
        """Leave nothing behind; the widget is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        get_qapp().aboutToQuit.disconnect(self.close_down)
        self.detach()
        self.dashboard.dispose()
        self.form.distribution.dispose()
        self.deleteLater()


def _alone(action: Callable[[], None]) -> Callable[..., None]:
    """Slot that ignores what the signal carries."""
    return lambda *_: action()
