"""The form of the training widget: what to fit, to what, and how. Its words and ranges are those of the science."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtpy.QtCore import QSignalBlocker, Qt, Signal
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFileDialog,
    QFormLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QScrollArea,
    QSpinBox,
    QWidget,
)

import napari_calvae as calvae
from napari_calvae._napari import retraining

#: Settings of `TrainConfig` that the form shows, in this order.
SHOWN = ("n_steps", "learning_rate", "seed", "shared_kinetics", "early_stopping")
_AS_BASE = "as in the base"
_LARGEST = 2_000_000_000


class TrainingForm(QScrollArea):
    """Choices of a fit; ``failed`` tells a sentence why a file was not taken."""

    failed = Signal(str)

    def __init__(self, options: calvae.FitOptions, parent: QWidget | None = None):
        super().__init__(parent)
        self._options = options
        self.spikes_path: Path | None = None
        self.base = _box("Model that the fit starts from; it is left as it is")
        self.objective = _box("What the fit aims at")
        for name, option in self._options.objectives.items():
            self.objective.addItem(option.label, name)
        self.explanation = _words()
        self.generative = _box("How spikes make fluorescence")
        self.noise = _box("How measured frames differ from the noise-free fluorescence")
        for box, known in ((self.generative, self._options.generative), (self.noise, self._options.noise)):
            box.addItem(_AS_BASE, None)
            for name, label in known.items():
                box.addItem(label, name)
        self.rois = _box("Cells whose fluorescence the model is fitted to; a fifth of them is held out to judge by")
        for label, scope in (("all", "all"), ("the picked one", "picked"), ("these:", "typed")):
            self.rois.addItem(label, scope)
        self.typed = QLineEdit()
        self.typed.setPlaceholderText("1-5, 8")
        self.typed.setToolTip("Ids of the ROIs, as in the label image")
        self.spikes = QPushButton("Choose a file …")
        self.spikes.setToolTip(
            "True spikes: an .npz with the times (s) of each ROI under spike_times_<id>, "
            "or a .csv table with a row per spike and the columns roi and time_s"
        )
        self.fields = {name: self._field(name) for name in SHOWN}
        self._lay_out()
        self.objective.currentIndexChanged.connect(self._on_objective)
        self.rois.currentIndexChanged.connect(self._on_scope)
        self.spikes.clicked.connect(self._on_spikes)
        self._on_objective()
        self._on_scope()

    def _lay_out(self) -> None:
        holder = QWidget()
        self._rows = form = QFormLayout(holder)
        form.setContentsMargins(2, 4, 6, 4)
        form.setVerticalSpacing(4)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        form.addRow("Base model", self.base)
        form.addRow("Objective", self.objective)
        form.addRow(self.explanation)
        form.addRow("Labelled spikes", self.spikes)
        form.addRow("Fit to ROIs", self.rois)
        form.addRow("", self.typed)
        form.addRow("Spikes → ΔF/F", self.generative)
        form.addRow("Noise", self.noise)
        for name, field in self.fields.items():
            form.addRow(self._info(name).title, field)
        self.setWidget(holder)
        self.setWidgetResizable(True)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setFrameShape(QScrollArea.Shape.NoFrame)

    def _info(self, name: str) -> Any:
        return type(self._options.objectives["sleep"].config).model_fields[name]

    def _field(self, name: str) -> QCheckBox | QSpinBox | QDoubleSpinBox:
        """A field with the label, help and range that the setting itself carries."""
        info = self._info(name)
        if info.annotation is bool:
            field: Any = QCheckBox()
        else:
            whole = info.annotation is int
            field = QSpinBox() if whole else QDoubleSpinBox()
            bounds = [getattr(m, "ge", getattr(m, "gt", None)) for m in info.metadata]
            low = next((bound for bound in bounds if bound is not None), 0)
            if not whole:
                field.setDecimals(6)
                field.setStepType(QDoubleSpinBox.StepType.AdaptiveDecimalStepType)
                low = max(low, 1e-6)
            field.setRange(low, _LARGEST if whole else 1.0)
        field.setToolTip(info.description)
        return field

    def _on_objective(self) -> None:
        option = self._options.objectives[self.objective.currentData()]
        self.explanation.setText(option.explanation)
        self._rows.setRowVisible(self.spikes, option.needs_spikes)
        for name in ("shared_kinetics", "early_stopping"):
            self._rows.setRowVisible(self.fields[name], self.objective.currentData() != "supervised")
        for name, field in self.fields.items():
            value = getattr(option.config, name)
            field.setChecked(value) if isinstance(field, QCheckBox) else field.setValue(value)

    def _on_scope(self) -> None:
        self._rows.setRowVisible(self.typed, self.rois.currentData() == "typed")

    def _on_spikes(self) -> None:
        name, _ = QFileDialog.getOpenFileName(self, "Labelled spikes", "", "Spike times (*.npz *.csv)")
        if not name:
            return
        try:
            known = calvae.read_spikes(name)
        except (OSError, ValueError) as error:
            self.failed.emit(str(error))
            return
        self.spikes_path = Path(name)
        self.spikes.setText(f"{self.spikes_path.name}: {len(known)} ROIs")

    def set_models(self, names: Sequence[tuple[str, str]], chosen: str) -> None:
        """Offer these models (label, name or file) to start from; ``chosen`` where the choice so far is gone."""
        if [(self.base.itemText(i), self.base.itemData(i)) for i in range(self.base.count())] == list(names):
            return
        blocker = QSignalBlocker(self.base)
        before = self.base.currentData()
        self.base.clear()
        for label, name in names:
            self.base.addItem(label, name)
        index = self.base.findData(before)
        self.base.setCurrentIndex(index if index >= 0 else self.base.findData(chosen))
        blocker.unblock()

    def wanted(self, ids: Sequence[int], picked: int | None) -> tuple[int, ...]:
        """Ids of the ROIs to fit to, or the sentence that asks for them."""
        scope = self.rois.currentData()
        if scope == "all":
            return tuple(ids)
        if scope == "typed":
            return retraining.typed_rois(self.typed.text(), ids)
        if picked is None or picked not in ids:
            raise calvae.RecordingError("ROI: expected a picked one, got none. Click a ROI in the movie first.")
        return (picked,)

    def config(self) -> Any:
        """How to train, as typed."""
        now = self._options.objectives[self.objective.currentData()].config
        typed = {
            name: field.isChecked() if isinstance(field, QCheckBox) else field.value()
            for name, field in self.fields.items()
        }
        every = max(1, round(typed["n_steps"] / retraining.N_GLIMPSES))
        return type(now)(**(now.model_dump() | typed | {"snapshot_every": every}))


def _box(tip: str) -> QComboBox:
    box = QComboBox()
    box.setToolTip(tip)
    box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    box.setMinimumContentsLength(10)
    return box


def _words() -> QLabel:
    label = QLabel()
    label.setWordWrap(True)
    label.setStyleSheet("font-size: 8pt;")
    return label
