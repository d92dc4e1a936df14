"""All ROIs into a store: here, on a cluster, stopped, resumed, refused; with an engine that a test can hold up."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from plugin_helpers import CENTRES, FRAME_RATE, posterior_of
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QFileDialog, QInputDialog

import napari_calvae as calvae
from napari_calvae._napari import answers, file_rois, reading, running
from napari_calvae.formats.store import Layout, create_store


@dataclass
class Engine:
    """Stand-in for `calvae.iter_batch` with blocks of one ROI; the block ``held`` waits for ``gate``."""

    calls: list[dict] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    held: int | None = None
    error: Exception | None = None
    inferred: list[int] = field(default_factory=list)

    def iter_batch(self, traces, out, model="universal", *, scheduler=None, block_rois=None, **settings):
        self.calls.append({"traces": traces, "scheduler": scheduler, "block_rois": block_rois, **settings})
        source = calvae.TraceSource.of(traces) if isinstance(traces, calvae.Traces) else traces
        if self.error is not None:
            raise self.error
        if not Path(out).exists():
            layout = Layout(settings["n_samples"], ("spike_rate", "noise_level"), ())
            create_store(Path(out), source, layout, {"settings": {"device": "auto"}}, 1)
        store = calvae.open_result(out)
        link = "http://here/status" if scheduler else ""
        yield SimpleNamespace(done=int(store.done.sum()), total=store.n_rois, seconds_left=None, dashboard="")
        for block in np.flatnonzero(~store.done).tolist():
            if block == self.held:
                self.gate.wait(20)
            result = posterior_of(source.select([block]), settings["n_samples"])
            quality = np.zeros(1, [("spike_rate", "f4"), ("noise_level", "f4")])
            quality["spike_rate"], quality["noise_level"] = result.rate.mean(), block
            store.write_block(block, replace(result, quality=quality))
            self.inferred.append(block)
            done = int(store.done.sum())
            yield SimpleNamespace(done=done, total=store.n_rois, seconds_left=90.0 * (3 - done), dashboard=link)
        return store


@pytest.fixture
def engine(monkeypatch) -> Engine:
    stand_in = Engine()
    monkeypatch.setitem(vars(calvae), "iter_batch", stand_in.iter_batch)
    yield stand_in
    stand_in.gate.set()
    if running._Engine.newest is not None:
        running._Engine.newest.join(20)


@pytest.fixture
def file(tmp_path, labels, movie):
    """A file of three traces that knows where its ROIs are."""
    calvae.write(calvae.extract(movie, labels, frame_rate=FRAME_RATE), tmp_path / "cells.zarr")
    return tmp_path / "cells.zarr"


def order_of(file, out, scheduler=None, number=1):
    given = file_rois.open_file(file)
    masks = calvae.RoiMasks.from_labels(given.labels)
    frames = file_rois.FileFrames(given)
    settings = answers.Settings(frame_rate=FRAME_RATE, n_samples=4, model="universal")
    return running.Order(answers.Request(number, frames, masks, masks.ids, settings), out, scheduler)


# The run, step by step


def test_a_run_tells_how_far_it_is_and_what_has_come(file, tmp_path, engine):
    messages = list(running.iter_run(order_of(file, tmp_path / "out.zarr", "tcp://there:1")))
    states = [m for m in messages if isinstance(m, running.Running)]
    assert states[0].words == "On tcp://there:1: starting"
    assert states[-1].ended
    assert states[-1].words == "All 3 ROIs are in out.zarr."
    far = [m.words for m in states if m.done == 1]
    assert far[0].startswith("On tcp://there:1: 1 of 3 ROIs in out.zarr, 3 min left · <a href=")
    assert 'href="http://here/status"' in far[0]
    found = [m for m in messages if isinstance(m, answers.Found)]
    assert sorted(row for m in found for row in m.rows) == [0, 1, 2]
    assert engine.calls[0]["scheduler"] == "tcp://there:1"
    assert engine.calls[0]["n_samples"] == 4
    assert isinstance(engine.calls[0]["traces"], calvae.TraceSource)


def test_a_movie_is_read_first(movie, labels, tmp_path, engine):
    masks = calvae.RoiMasks.from_labels(labels)
    settings = answers.Settings(frame_rate=FRAME_RATE, n_samples=4)
    request = answers.Request(1, movie, masks, masks.ids, settings)
    messages = list(running.iter_run(running.Order(request, tmp_path / "out.zarr")))
    assert any(isinstance(m, answers.Progress) for m in messages)
    wanted = calvae.extract(movie, labels, frame_rate=FRAME_RATE)
    np.testing.assert_array_equal(engine.calls[0]["traces"].values, wanted.values)
    assert calvae.open_result(tmp_path / "out.zarr").done.all()


def test_who_waits_for_a_block_is_heard_and_can_be_stopped(file, tmp_path, engine):
    engine.held = 1
    steps = running.iter_run(order_of(file, tmp_path / "out.zarr"))
    while not any(isinstance(m, answers.Found) for m in [next(steps)]):
        pass
    begun = time.monotonic()
    next(steps)
    steps.close()
    assert time.monotonic() - begun < 2
    engine.gate.set()
    running._Engine.newest.join(20)
    assert engine.inferred == [0, 1]  # the block in hand is finished, no other is begun
    list(running.iter_run(order_of(file, tmp_path / "out.zarr")))
    assert engine.inferred == [0, 1, 2]


def test_the_next_run_into_a_store_waits_for_the_one_before(file, tmp_path, engine, monkeypatch):
    engine.held = 0
    steps = running.iter_run(order_of(file, tmp_path / "out.zarr"))
    while next(steps).total == 0:
        pass
    steps.close()
    monkeypatch.setattr(running, "_PATIENCE", 0.5)
    *_, failure = running.iter_run(order_of(file, tmp_path / "out.zarr", number=2))
    assert "still waits for its workers" in failure.sentence
    assert len(engine.calls) == 1
    engine.held = None
    assert list(running.iter_run(order_of(file, tmp_path / "other.zarr", number=3)))[-1].ended


@pytest.mark.parametrize("error", [OSError("No space left on device"), calvae.RecordingError("it does not answer")])
def test_what_the_engine_says_is_told(file, tmp_path, engine, error):
    engine.error = error
    *_, failure = running.iter_run(order_of(file, tmp_path / "out.zarr"))
    assert failure == answers.Failure(1, str(error))


@pytest.mark.parametrize(("seconds", "words"), [(12, "12 s left"), (600, "10 min left"), (9000, "2.5 h left")])
def test_time_left(seconds, words):
    assert running.time_left(seconds) == words


# In napari


@pytest.fixture
def open_both(viewer, network, engine, open_widget, file):
    """Open the file, the inference widget and the quality table."""
    from napari_calvae._napari.quality_widget import QualityWidget

    for data, options, kind in reading.get_reader(str(file))(str(file)):
        if kind == "labels":
            viewer.add_labels(data, **options)
    inference = open_widget()
    table = QualityWidget(viewer)
    viewer.window.add_dock_widget(table, name="quality table", area="right")
    QApplication.processEvents()
    yield inference, table
    if table._attached:
        table.close_down()


def choose(monkeypatch, path):
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_, **__: (str(path), ""))


def test_infer_all_runs_where_the_menu_says(open_both, qtbot, monkeypatch, tmp_path, engine, network, canvas):
    inference, table = open_both
    monkeypatch.setattr(QInputDialog, "getInt", lambda *_, **__: (3, True))
    table.form.run_on.places["local"].trigger()
    assert table.form.run_on.scheduler == "local:3"
    assert "local:3" in table.form.run_on.toolTip()
    choose(monkeypatch, tmp_path / "out")
    qtbot.mouseClick(table.form.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: table.table.inferred == 3, timeout=20_000)
    assert engine.calls[0]["scheduler"] == "local:3"
    assert (tmp_path / "out.zarr").is_dir()
    assert network.calls == []
    with qtbot.waitSignal(inference.shown, timeout=20_000):
        canvas.click(*CENTRES[2])
    known = calvae.open_result(tmp_path / "out.zarr").select([1])
    np.testing.assert_array_equal(inference.plots.picture.rate, known.rate)
    assert network.calls == []  # it was read from the store
    qtbot.waitUntil(lambda: not table.form.run_line.isVisible(), timeout=20_000)
    assert table.table.numbers("noise_level").tolist() == [0, 1, 2]
    assert np.isnan(table.table.numbers("spikes_uncertainty")).all()


def test_a_run_is_stopped_and_goes_on(open_both, qtbot, monkeypatch, tmp_path, engine):
    inference, table = open_both
    engine.held = 1
    table.form.run_on.choose("slurm:2")
    choose(monkeypatch, tmp_path / "out.zarr")
    table.infer_all()
    qtbot.waitUntil(lambda: "1 of 3 ROIs" in table.form.run_line.words.text(), timeout=20_000)
    assert table.form.run_line.isVisible()
    assert "dashboard" in table.form.run_line.words.text()
    table.infer_all()
    assert "Cancel that first" in inference.controls.status.text()
    qtbot.mouseClick(table.form.run_line.stop, Qt.MouseButton.LeftButton)
    assert not table.form.run_line.isVisible()
    qtbot.waitUntil(lambda: not inference._batch.busy, timeout=20_000)
    qtbot.waitUntil(lambda: table.table.inferred == 1, timeout=20_000)
    engine.gate.set()
    choose(monkeypatch, "")  # it is not asked for again
    table.infer_all()
    qtbot.waitUntil(lambda: table.table.inferred == 3, timeout=20_000)
    assert engine.inferred == [0, 1, 2]


def test_infer_all_in_memory_does_not_end_a_run_into_a_store(open_both, qtbot, monkeypatch, tmp_path, engine, network):
    inference, table = open_both
    engine.held = 1
    table.form.run_on.choose("local:2")
    choose(monkeypatch, tmp_path / "out.zarr")
    table.infer_all()
    qtbot.waitUntil(lambda: "1 of 3 ROIs" in table.form.run_line.words.text(), timeout=20_000)
    table.form.run_on.choose(None)
    qtbot.mouseClick(table.form.infer_all, Qt.MouseButton.LeftButton)
    assert "inferred into out.zarr. Cancel that first" in inference.controls.status.text()
    assert table.form.run_line.isVisible()
    engine.gate.set()
    qtbot.waitUntil(lambda: table.table.inferred == 3, timeout=20_000)
    assert engine.inferred == [0, 1, 2]
    assert network.calls == []
    qtbot.waitUntil(lambda: not inference._batch.busy, timeout=20_000)
    inference.results.forget()
    inference.results_changed.emit()
    table.infer_all()
    qtbot.waitUntil(lambda: len(network.calls) == 1, timeout=20_000)  # now there is nothing in its way


def test_a_store_of_another_day_goes_on(open_both, qtbot, monkeypatch, tmp_path, engine, file):
    _, table = open_both
    steps = engine.iter_batch(calvae.open_traces(file), tmp_path / "old.zarr", n_samples=4)
    next(steps), next(steps)
    steps.close()
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_, **__: str(tmp_path / "old.zarr"))
    table.form.run_on.go_on.trigger()
    qtbot.waitUntil(lambda: table.table.inferred == 3, timeout=20_000)
    assert engine.inferred == [0, 1, 2]
    assert engine.calls[-1]["scheduler"] is None


def test_a_run_that_fails_says_why_and_asks_again(open_both, qtbot, monkeypatch, tmp_path, engine):
    inference, table = open_both
    engine.error = FileExistsError("out.zarr: expected results of the same traces, got others.")
    table.form.run_on.choose("tcp://nowhere:1")
    choose(monkeypatch, tmp_path / "out.zarr")
    with qtbot.waitSignal(inference.failed, timeout=20_000) as failed:
        table.infer_all()
    assert failed.args == ["out.zarr: expected results of the same traces, got others."]
    qtbot.waitUntil(lambda: not table.form.run_line.isVisible(), timeout=20_000)
    engine.error = None
    choose(monkeypatch, tmp_path / "other.zarr")
    qtbot.waitUntil(lambda: not inference._batch.busy, timeout=20_000)
    table.infer_all()
    qtbot.waitUntil(lambda: table.table.inferred == 3, timeout=20_000)
    assert (tmp_path / "other.zarr").is_dir()


def test_nothing_chosen_changes_nothing(open_both, monkeypatch, engine):
    _, table = open_both
    button = table.form.run_on
    monkeypatch.setattr(QInputDialog, "getText", lambda *_, **__: ("", False))
    button.places["queue"].trigger()
    assert button.scheduler is None
    assert button.memory.isChecked()
    button.choose("slurm:4")
    assert button.places["queue"].isChecked()
    choose(monkeypatch, "")
    table.infer_all()
    assert engine.calls == []
    monkeypatch.setattr(QInputDialog, "getText", lambda *_, **__: ("tcp://there:8786", True))
    button.places["scheduler"].trigger()
    assert button.scheduler == "tcp://there:8786"


def test_edited_rois_keep_no_result_of_the_file(open_both, qtbot, monkeypatch, tmp_path):
    inference, _ = open_both
    layer = inference.choices.roi_layer
    layer.data_setitem((np.array([0]), np.array([0])), 1)
    inference.infer_into(tmp_path / "out.zarr", "local")
    qtbot.waitUntil(lambda: not inference._batch.busy, timeout=20_000)
    assert set(inference.results.rows) == {2, 3}
    assert calvae.open_result(tmp_path / "out.zarr").roi_ids == (1, 2, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning:distributed"
)
def test_on_two_processes_of_this_computer(viewer, open_widget, file, qtbot, tmp_path):
    """The real engine: the same numbers as in memory."""
    pytest.importorskip("distributed")
    data, options, _ = reading.get_reader(str(file))(str(file))[-1]
    viewer.add_labels(data, **options)
    inference = open_widget()
    states = []
    inference.ran.connect(states.append)
    inference.infer_into(tmp_path / "out.zarr", "local:2")
    qtbot.waitUntil(lambda: not inference._batch.busy, timeout=180_000)
    assert states[-2].ended
    assert any(state is not None and state.dashboard for state in states)
    assert set(inference.results.rows) == {1, 2, 3}
    stored = calvae.open_result(tmp_path / "out.zarr").load()
    np.testing.assert_array_equal(stored.rate, calvae.infer(calvae.read(file)).rate)
