"""The form at the left of the plots: what to infer from and how, nothing of when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from napari.layers import Layer
from qtpy.QtCore import QSignalBlocker, Qt, Signal
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from napari_calvae._napari import answers, session

WIDTH = 262
_ERROR = "color: #ff6b6b;"
#: The theme of napari gives boxes more room than the form has.
_NARROW = "min-width: 34px; padding: 1px 0px 1px 4px;"
_ASK = "border: 1px solid #ff6b6b;"
_AUTO = "“auto”: as the model was trained"


class Controls(QWidget):
    """Choices of the user.

    ``changed`` is emitted when a choice changes the result, ``layers_chosen`` when another movie or other ROIs were
    chosen, ``frame_rate_typed`` when the user has typed a frame rate, ``resized`` when discs have another diameter, and
    ``left_at`` with a name and a value when a setting was changed that is worth remembering.
    """

    changed = Signal()
    layers_chosen = Signal()
    frame_rate_typed = Signal(str)
    resized = Signal()
    left_at = Signal(str, object)

    def __init__(self, parent: QWidget | None = None):
        super().__init__(parent)
        self.setFixedWidth(WIDTH)
        self.movie = layer_box(
            "Image layer (time, y, x), or (time, z, y, x), to infer from; the plane that is shown counts"
        )
        self.rois = layer_box(
            "Labels, Shapes or Points layer whose ROIs a click picks; points are discs of the diameter below"
        )
        self.place = QCheckBox("click adds a disc")
        self.place.setToolTip("A click beside all ROIs adds a disc to the ROIs and infers its spikes")
        self.snap = QCheckBox("snap")
        self.snap.setChecked(True)
        self.snap.setToolTip(
            "Put the disc on the middle of the cell next to the click: where neighbours change together"
        )
        self.diameter = QSpinBox()
        self.diameter.setRange(1, 500)
        self.diameter.setValue(10)
        self.diameter.setSuffix(" px")
        self.diameter.setToolTip("Diameter of placed discs and of the discs around points, in pixels of the movie")
        self.frame_rate = QLineEdit()
        self.frame_rate.setPlaceholderText("Hz")
        self.frame_rate.setFixedWidth(58)
        self.frame_rate.setToolTip(
            "Frames per second (Hz) of the recording; read from the file or typed, never guessed"
        )
        self.rate_source = QLabel()
        self.neuropil = QDoubleSpinBox()
        self.neuropil.setRange(0, 2)
        self.neuropil.setSingleStep(0.05)
        self.neuropil.setValue(0.7)
        self.neuropil.setToolTip("Share of the surrounding signal that is subtracted from each ROI; 0 turns it off")
        self.baseline_percentile = _number((0, 100), "auto", " %")
        self.baseline_percentile.setToolTip("Percentile of the fluorescence that is the baseline of ΔF/F (%)\n" + _AUTO)
        self.baseline_window = _number((0, 3600), "auto", " s")
        self.baseline_window.setSingleStep(10)
        self.baseline_window.setToolTip("Length of the running window of the baseline (s)\n" + _AUTO)
        self.amplitude = _number((0, 10), "unknown", " ΔF/F")
        self.amplitude.setDecimals(2)
        self.amplitude.setSingleStep(0.05)
        self.amplitude.setToolTip(
            "Peak of the response to a single spike (ΔF/F) that is typical of the preparation, where it is known:\n"
            "cells are taken to differ about it by half. Leave it unknown otherwise"
        )
        self._unsure = (self.baseline_percentile, self.baseline_window, self.amplitude)
        self.samples = QSpinBox()
        self.samples.setRange(2, 1000)
        self.samples.setValue(50)
        self.samples.setSuffix(" samples")
        self.samples.setToolTip("Number of spike trains drawn from the posterior")
        self.model = QComboBox()
        self.model.addItem("universal", "universal")
        self._files: list[str] = []
        self.model.setToolTip("Trained network that infers the spikes")
        self.device = QComboBox()
        for name in ("auto", "cpu", "cuda", "mps"):
            self.device.addItem(name, name)
        self.device.setStyleSheet(_NARROW)
        self.device.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.device.setToolTip("Where inference is computed; “auto” takes the best device there is")
        self.infer_all = QPushButton("Infer all ROIs")
        self.infer_all.setToolTip("Infer every ROI of the layer, so that later clicks answer at once")
        self.cancel = QPushButton("Cancel")
        self.progress = QProgressBar()
        self.progress.setMaximum(100)
        self.progress.setTextVisible(False)
        self.progress.setFixedHeight(6)
        self.status = QLabel()
        self.status.setWordWrap(True)
        self.status.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        self.status.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.status.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Ignored)
        self.status.setMinimumHeight(34)
        for box in (self.diameter, self.neuropil, self.samples, *self._unsure):
            # Room for the numbers: arrow keys and the mouse wheel step just as well.
            box.setButtonSymbols(QSpinBox.ButtonSymbols.NoButtons)
            box.setStyleSheet(_NARROW)
            box.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self._lay_out()
        self._connect()
        self.set_running(False)

    def _lay_out(self) -> None:
        form = QFormLayout()
        form.setContentsMargins(0, 0, 0, 0)
        form.setVerticalSpacing(3)
        form.setHorizontalSpacing(5)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        form.addRow("Movie", self.movie)
        form.addRow("ROIs", self.rois)
        form.addRow(beside((self.place, 0), (self.diameter, 1), (self.snap, 0)))
        form.addRow("Frame rate", beside((self.frame_rate, 0), (self.rate_source, 1)))
        form.addRow("Neuropil", beside((self.neuropil, 2), (self.samples, 3)))
        form.addRow("Baseline", beside((self.baseline_percentile, 1), (QLabel("of"), 0), (self.baseline_window, 1)))
        form.addRow("Amplitude", beside((self.amplitude, 3), (self.device, 4)))
        form.addRow("Model", self.model)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 6, 0)
        layout.setSpacing(4)
        layout.addLayout(form)
        layout.addWidget(beside((self.infer_all, 1), (self.cancel, 1)))
        layout.addWidget(self.progress)
        layout.addWidget(self.status, 1)

    def _connect(self) -> None:
        self.movie.currentIndexChanged.connect(self.layers_chosen)
        self.rois.currentIndexChanged.connect(self.layers_chosen)
        self.frame_rate.editingFinished.connect(self._on_frame_rate)
        for box in (self.neuropil, self.samples, *self._unsure):
            box.setKeyboardTracking(False)
            box.valueChanged.connect(self.changed)
        self.diameter.setKeyboardTracking(False)
        self.diameter.valueChanged.connect(self.resized)
        for choice in (self.model, self.device):
            choice.currentIndexChanged.connect(self.changed)
        self.samples.valueChanged.connect(lambda value: self.left_at.emit("samples", value))
        self.neuropil.valueChanged.connect(lambda value: self.left_at.emit("neuropil_coefficient", round(value, 4)))
        self.diameter.valueChanged.connect(lambda value: self.left_at.emit("diameter", value))
        self.snap.toggled.connect(lambda on: self.left_at.emit("snap", on))
        self.device.currentIndexChanged.connect(lambda _: self.left_at.emit("device", self.device.currentData()))

    def restore(self, values: Mapping[str, Any]) -> None:
        """Set what was remembered; nothing is emitted."""
        with _silent(self):
            self.samples.setValue(int(values["samples"]))
            self.neuropil.setValue(float(values["neuropil_coefficient"]))
            self.diameter.setValue(int(values["diameter"]))
            self.snap.setChecked(bool(values["snap"]))
            self.device.setCurrentIndex(max(self.device.findData(values["device"]), 0))

    def set_devices(self, there: Sequence[str], used: str) -> None:
        """Offer the devices that this machine has, and say which one “auto” has come to mean."""
        before = self.device.currentData()
        with _silent(self):  # what was remembered stays so: the device may be there again next time
            if before not in ("auto", *there):
                self.device.setCurrentIndex(0)
            for name in {self.device.itemData(k) for k in range(self.device.count())} - {"auto", *there}:
                self.device.removeItem(self.device.findData(name))
        self.show_device(used)
        if self.device.currentData() != before:
            self.changed.emit()

    def show_device(self, name: str) -> None:
        """Say which device “auto” has come to mean."""
        if name and self.device.currentData() == "auto":
            self.device.setItemText(0, f"auto: {name}")

    def _on_frame_rate(self) -> None:
        if self.frame_rate.isModified():
            self.frame_rate.setModified(False)
            self.frame_rate_typed.emit(self.frame_rate.text())

    def set_layers(self, movies: Sequence[Layer], rois: Sequence[Layer]) -> None:
        """Offer these layers; what is chosen stays chosen if it is still there."""
        changed = False
        for box, layers in ((self.movie, movies), (self.rois, rois)):
            with _silent(box):
                chosen = box.currentData()
                box.clear()
                for layer in layers:
                    box.addItem(layer.name, layer)
                index = next((i for i, layer in enumerate(layers) if layer is chosen), 0 if layers else -1)
                box.setCurrentIndex(index)
                changed |= box.currentData() is not chosen
        if changed:
            self.layers_chosen.emit()

    def choose_movie(self, layer: Layer) -> None:
        """Choose a movie that is offered."""
        choose_layer(self.movie, layer)

    def choose_rois(self, layer: Layer) -> None:
        """Choose a layer of ROIs that is offered."""
        choose_layer(self.rois, layer)

    def set_models(self, names: Sequence[str]) -> None:
        """Offer these models; the first is the default. Files that were added stay."""
        with _silent(self.model):
            chosen = self.model.currentData()
            self.model.clear()
            for name in names:
                self.model.addItem(name, name)
            for path in self._files:
                self.model.addItem(Path(path).stem, path)
            self.model.setCurrentIndex(max(self.model.findData(chosen), 0))

    def choose_file(self, path: str) -> None:
        """Offer the model in a file as well, and choose it; nothing is emitted."""
        with _silent(self.model):
            self.offer_file(path)
            self.model.setCurrentIndex(self.model.findData(path))

    def offer_file(self, path: str) -> None:
        """Offer the model in a file as well."""
        if path not in self._files:
            self._files.append(path)
            self.model.addItem(Path(path).stem, path)

    def show_need(self, movie: bool, neuropil: bool) -> None:
        """Show whether a movie is needed, and a neuropil coefficient; ROIs of files may have traces of their own."""
        self.movie.setPlaceholderText("none" if movie else "none needed")
        self.neuropil.setEnabled(neuropil)

    def show_frame_rate(self, rate: session.FrameRate) -> None:
        """Show the frame rate and its source; an unknown one is asked for."""
        self.frame_rate.setText("" if rate.hz is None else f"{rate.hz:.6g}")
        self.frame_rate.setModified(False)
        self.frame_rate.setStyleSheet(_ASK if rate.hz is None else "")
        self.rate_source.setStyleSheet(_ERROR if rate.hz is None else "")
        self.rate_source.setText("Hz, type it" if rate.hz is None else f"Hz ({rate.source})")
        self.rate_source.setToolTip(
            "The file does not state it" if rate.hz is None else f"{rate.hz:g} Hz, {rate.source}"
        )

    def settings(self, hz: float) -> answers.Settings:
        """Everything that decides a result besides movie and ROIs."""
        return answers.Settings(
            frame_rate=hz,
            neuropil_coefficient=round(self.neuropil.value(), 4),
            n_samples=self.samples.value(),
            model=self.model.currentData(),
            device=self.device.currentData(),
            baseline_percentile=_given(self.baseline_percentile),
            baseline_window=_given(self.baseline_window),
            amplitude=_given(self.amplitude),
        )

    def say(self, sentence: str, error: bool = False) -> None:
        """Write into the status line."""
        self.status.setStyleSheet(_ERROR if error else "")
        self.status.setText(sentence)
        self.status.setToolTip(sentence)

    def set_running(self, running: bool, fraction: float = 0.0) -> None:
        """Show whether all ROIs are being inferred, and how far that is."""
        self.infer_all.setEnabled(not running)
        self.cancel.setEnabled(running)
        self.progress.setValue(round(100 * fraction) if running else 0)


def _number(limits: tuple[float, float], lowest: str, suffix: str) -> QDoubleSpinBox:
    """Box for a number; its lowest value stands for none, in a word of its own."""
    box = QDoubleSpinBox()
    box.setRange(*limits)
    box.setDecimals(0)
    box.setSpecialValueText(lowest)
    box.setSuffix(suffix)
    return box


def _given(box: QDoubleSpinBox) -> float | None:
    return round(box.value(), 4) if box.value() > box.minimum() else None


def choose_layer(box: QComboBox, layer: Layer | None) -> None:
    """Choose a layer of those that a box offers."""
    for index in range(box.count()):
        if box.itemData(index) is layer:
            box.setCurrentIndex(index)


def layer_box(tip: str) -> QComboBox:
    """Box to choose a layer from."""
    box = QComboBox()
    box.setToolTip(tip)
    box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    box.setMinimumContentsLength(10)
    return box


def beside(*widgets: tuple[QWidget, int]) -> QWidget:
    """Widgets in a row, each with its share of the width that is left."""
    holder = QWidget()
    layout = QHBoxLayout(holder)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setSpacing(6)
    for widget, share in widgets:
        layout.addWidget(widget, share)
    return holder


@contextmanager
def _silent(widget: QWidget) -> Any:
    blocker = QSignalBlocker(widget)
    try:
        yield
    finally:
        blocker.unblock()
