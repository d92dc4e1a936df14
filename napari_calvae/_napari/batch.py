"""Inferring all ROIs: from the button to the last result, with its progress in napari's activity dock."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from napari.utils import progress
from qtpy.QtCore import QObject, Signal

import napari_calvae as calvae
from napari_calvae._napari import answers, running
from napari_calvae._napari.controls import Controls
from napari_calvae._napari.work import Worker

#: Steps of the bar in the activity dock.
_STEPS = 100


class Batch(QObject):
    """One request for many ROIs at a time.

    ``answered`` is emitted with each part, ``found`` with what has come into a store, ``ran`` with how far a run into
    a store is, None at its end, ``failed`` with a sentence, ``idle`` when nothing is left to do.

    Parameters
    ----------
    parent
        Lives and dies with it.
    controls
        Show that it runs.
    """

    answered = Signal(object, object)
    found = Signal(object, object)
    ran = Signal(object)
    failed = Signal(str)
    idle = Signal()

    def __init__(self, parent: QObject, controls: Controls):
        super().__init__(parent)
        self._controls = controls
        self._requests = answers.Requests()
        self._targets: list[tuple[answers.Key, set[int]]] = []
        self._began = 0.0
        self._out: Path | None = None
        self._bar: progress | None = None
        self.worker = Worker(self)
        self.worker.message.connect(self._on_message)
        self.worker.idle.connect(self._on_idle)
        self.worker.idle.connect(self.idle)

    @property
    def busy(self) -> bool:
        """Whether something is being inferred."""
        return self.worker.busy

    @property
    def seconds(self) -> float:
        """Time since it began (s)."""
        return time.monotonic() - self._began

    def start(self, key: answers.Key, movie: Any, masks: calvae.RoiMasks, wanted: tuple[int, ...]) -> None:
        """Infer the ROIs ``wanted`` of a movie; raises while others are inferred into a store, which is not ended."""
        if self._out is not None:
            raise calvae.RecordingError(
                f"ROIs are being inferred into {self._out.name}. Cancel that first, or wait for its end."
            )
        self._begin([(key, set(wanted))], f"Spikes of {len(wanted)} ROIs")
        request = answers.Request(self._requests.new(), movie, masks, wanted, key.settings)
        self.worker.start(answers.iter_answers(request))

    def run(self, targets: list[tuple[answers.Key, set[int]]], order: running.Order) -> None:
        """Infer ROIs into a store; ``targets`` are those of each plane whose results these are, the shown one last."""
        if self.busy:
            raise calvae.RecordingError("ROIs are being inferred. Cancel that first, or wait for its end.")
        self._out = order.out
        self._begin(targets, f"Spikes into {order.out.name}")
        numbered = replace(order, request=replace(order.request, number=self._requests.new()))
        self.worker.start(running.iter_run(numbered))

    def _begin(self, targets: list[tuple[answers.Key, set[int]]], words: str) -> None:
        self._end_bar()
        self._targets, self._began = targets, time.monotonic()
        # Messages are few: each of them may tell the time left.
        self._bar = progress(total=_STEPS, desc=words, mininterval=0, miniters=1)
        self._controls.set_running(True)

    def stop(self) -> None:
        """Stop; what was inferred stays."""
        self._requests.new()
        self.worker.stop()
        self._on_idle()

    def close(self) -> None:
        """Stop and wait for the end of the thread."""
        self._requests.new()
        self.worker.close()
        self._on_idle()

    def _on_message(self, message: answers.Message | running.Message) -> None:
        if isinstance(message, answers.Ready) or not self._requests.wants(message.number):
            return
        if isinstance(message, answers.Progress | running.Running):
            self._controls.set_running(True, message.fraction)
            if isinstance(message, running.Running):
                self.ran.emit(message)
            if self._bar is not None:  # last: napari handles further messages meanwhile
                self._bar.update(round(_STEPS * message.fraction) - self._bar.n)
        elif isinstance(message, answers.Found):
            self.found.emit(self._targets, message)
        elif isinstance(message, answers.Failure):
            self.failed.emit(message.sentence)
        elif isinstance(message, answers.Answer):
            self.answered.emit(self._targets[-1][0], message.inference)

    def _on_idle(self) -> None:
        self._out = None
        self.ran.emit(None)
        self._controls.set_running(False)
        self._end_bar()

    def _end_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
