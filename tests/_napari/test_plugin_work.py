"""Work off the GUI thread."""

from __future__ import annotations

import itertools
import threading

from napari_calvae import interruption
from napari_calvae._napari.work import Worker


def test_work_that_tells_nothing_ends_when_it_is_stopped(qtbot):
    began, messages = threading.Event(), []

    def endless():
        try:
            for _ in itertools.count():
                began.set()
                interruption.go_on()
        except Exception:  # noqa: BLE001 - as our work tells errors: that it is not wanted any more is none
            yield "an error"

    worker = Worker()
    worker.message.connect(messages.append)
    worker.start(endless())
    assert began.wait(10)
    with qtbot.waitSignal(worker.idle, timeout=10_000):
        worker.stop()
    assert not worker.busy
    worker.start(word for word in ["next"])
    qtbot.waitUntil(lambda: messages == ["next"], timeout=10_000)
    worker.close()
