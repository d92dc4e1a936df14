"""Runs a session's generators off the GUI thread, one at a time, and hands their messages back to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from qtpy.QtCore import QObject, QRunnable, QThreadPool, Signal

from napari_calvae import interruption


class _Work(QRunnable):
    """One generator on its way; once ``stop`` is set it ends at the next message, or where its work looks for that."""

    def __init__(self, messages: Iterator[Any], worker: Worker):
        super().__init__()
        self.messages = messages
        self.worker = worker
        self.stop, self.go = threading.Event(), threading.Event()
        self.go.set()

    def end(self) -> None:
        """Stop at the next message, paused or not."""
        self.stop.set()
        self.go.set()

    def run(self) -> None:
        """Called by Qt in a thread of the pool."""
        try:
            while not self.stop.is_set():
                try:
                    with interruption.until(self.stop.is_set):
                        message = next(self.messages)
                except (StopIteration, interruption.Interrupted):
                    break
                if not self.stop.is_set():
                    self.worker.message.emit(message)
                self.go.wait()
        finally:
            self.messages.close()  # type: ignore[attr-defined]
            self.worker.finished.emit(self)


class Worker(QObject):
    """A thread of its own for generators; a new one replaces what runs and what waits.

    ``message`` is emitted on the GUI thread for each item of the generator, ``idle`` when nothing is left to do.
    """

    message = Signal(object)
    finished = Signal(object)
    idle = Signal()

    def __init__(self, parent: QObject | None = None):
        super().__init__(parent)
        self._pool = QThreadPool(self)
        self._pool.setMaxThreadCount(1)
        self._current: _Work | None = None
        self._next: Iterator[Any] | None = None
        self.finished.connect(self._on_finished)

    @property
    def busy(self) -> bool:
        """Whether something runs or waits."""
        return self._current is not None

    def start(self, messages: Iterator[Any]) -> None:
        """Run a generator as soon as the one before has stopped."""
        if self._current is None:
            self._run(messages)
        else:
            self._current.end()
            self._next = messages

    def stop(self) -> None:
        """Stop at the next message; nothing waits any more."""
        self._next = None
        if self._current is not None:
            self._current.end()

    def pause(self) -> None:
        """Hold the generator at its next message."""
        if self._current is not None:
            self._current.go.clear()

    def resume(self) -> None:
        """Go on after a pause."""
        if self._current is not None:
            self._current.go.set()

    def close(self) -> None:
        """Stop and wait until the thread is gone."""
        self.stop()
        self._pool.waitForDone(-1)
        self._current = None

    def _run(self, messages: Iterator[Any]) -> None:
        self._current = _Work(messages, self)
        self._current.setAutoDelete(False)
        self._pool.start(self._current)

    def _on_finished(self, work: _Work) -> None:
        if work is not self._current:
            return
        self._current, waiting = None, self._next
        self._next = None
        if waiting is not None:
            self._run(waiting)
        else:
            self.idle.emit()
