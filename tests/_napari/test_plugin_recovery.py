"""What is drawn, judged and fitted outlasts a crash, is offered again, and is gone after a normal end."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys

import filelock
import numpy as np
import pytest

import napari_calvae as calvae
from napari_calvae._napari import autosave, judging, recovery, roi_layer

pytestmark = pytest.mark.usefixtures("network")

_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from napari_calvae._napari import recovery
recovery.home = lambda: Path(sys.argv[1])
rois = recovery.DrawnRois("labels", "mine", (np.eye(3, dtype=np.int32) * [1, 2, 3],), (1.0, 1.0), (0.0, 0.0))
rois.save(recovery.folder() / f"a{recovery.ROIS}")
print("saved", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def process(own_sessions):
    """Start a process that saves ROIs, and wait until it has."""
    started = []

    def start():
        words = [sys.executable, "-c", _PROCESS, str(own_sessions)]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "saved\n"
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


@pytest.fixture
def crash(own_sessions, monkeypatch):
    """Leave behind what this process has saved so far, as if it had been another one that was killed."""

    def now():
        mine = recovery.folder()
        shutil.copytree(mine, own_sessions / "crashed")
        recovery.folder.cache_clear()
        return own_sessions / "crashed"

    return now


def labels_of(widget):
    return next(layer for layer in reversed(widget._viewer.layers) if type(layer).__name__ == "Labels")


def saved(widget) -> list[recovery.DrawnRois]:
    widget._autosave.save()
    assert widget._autosave.wait()
    return [recovery.DrawnRois.load(path) for path in recovery.folder().glob(f"*{recovery.ROIS}")]


def test_a_process_that_is_killed_leaves_its_rois_and_one_that_ends_does_not(process, own_sessions):
    running, ended, killed = process(), process(), process()
    ended.communicate("end\n")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (left,) = recovery.left_behind()
    assert [each.n_rois for each in left.rois] == [3]
    assert left.words.startswith("napari did not end as it should on ")
    assert left.words.endswith("Still there: 3 ROIs in “mine”.")
    assert recovery.left_behind() == []  # another napari is not offered the same
    left.let_go()
    (left,) = recovery.left_behind()
    left.discard()
    assert recovery.left_behind() == []
    running.communicate("end\n")
    assert not [*own_sessions.iterdir()]


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_the_folder_is_private():
    assert recovery.folder().stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", ["labels", "points", "shapes"])
def test_rois_come_back_as_they_were(viewer, tmp_path, labels, kind):
    shifted = np.array([[1.0, 0.2, 7.0], [0.0, 1.0, 8.0], [0.0, 0.0, 1.0]])
    options = {"name": "of mine", "scale": (2.0, 3.0), "translate": (4.0, 5.0), "rotate": 20, "affine": shifted}
    if kind == "labels":
        layer = viewer.add_labels(labels.copy(), **options)
    elif kind == "points":
        layer = viewer.add_points([[1.0, 2.5], [3.0, 4.0]], **options)
    else:
        layer = viewer.add_shapes([[[1, 1], [1, 9], [9, 9]]], shape_type="polygon", **options)
        layer.add_ellipses([[[1, 1], [1, 9], [9, 9], [9, 1]]])
    there = layer.data_to_world((3.0, 4.0))
    judged = {2: judging.Judgement("rejected", "blurred, 𝛼")}
    roi_layer.write_judgements(layer, (1, 2), judging.Judgements(judged))
    autosave.drawn_rois(layer, None).save(tmp_path / "a.npz")
    viewer.layers.clear()
    again = autosave.restore(viewer, recovery.DrawnRois.load(tmp_path / "a.npz"))
    assert type(again) is type(layer)
    assert again.name == "of mine"
    np.testing.assert_allclose([again.scale, again.translate], [(2, 3), (4, 5)])
    np.testing.assert_allclose(again.data_to_world((3.0, 4.0)), there)
    assert len(again.data) == len(layer.data)
    for now, before in zip(again.data, layer.data, strict=True):
        np.testing.assert_array_equal(now, before)
    assert roi_layer.read_judgements(again) == judged
    if kind == "shapes":
        assert list(again.shape_type) == ["polygon", "ellipse"]


def test_other_files_are_no_rois(tmp_path):
    rois = recovery.DrawnRois("points", "a", (np.ones((2, 2)),), {"scale": [1.0, 1.0]})
    np.savez(tmp_path / "text.npz", head=np.array("[]"))
    np.savez(tmp_path / "objects.npz", head=np.array({}, object))
    (tmp_path / "empty.npz").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "VERSION", recovery.VERSION + 1)
        rois.save(tmp_path / "newer.npz")
    for path in tmp_path.glob("*.npz"):
        with pytest.raises(ValueError, match=f"{path.name}: expected ROIs as they were saved"):
            recovery.DrawnRois.load(path)


def test_rois_of_another_version_stay_where_they_are(own_sessions):
    folder = own_sessions / "newer"
    folder.mkdir(parents=True)
    (folder / "in-use.lock").touch()
    (folder / f"a{recovery.ROIS}").write_text("of the future")
    assert recovery.left_behind() == []
    assert (folder / f"a{recovery.ROIS}").exists()


def test_what_is_drawn_and_judged_is_saved_on_the_way(viewer, qtbot, open_widget, show_movie, monkeypatch):
    monkeypatch.setattr(autosave, "PAUSE", 50)
    show_movie()
    widget = open_widget()
    layer = labels_of(widget)
    layer.data_setitem((np.array([0, 0]), np.array([0, 1])), 9)

    def n_saved():
        found = [recovery.DrawnRois.load(path) for path in recovery.folder().glob(f"*{recovery.ROIS}")]
        return [each.n_rois for each in found]

    qtbot.waitUntil(lambda: n_saved() == [4])
    roi_layer.write_judgements(layer, (1, 9), judging.Judgements({9: judging.Judgement("accepted")}))
    (drawn,) = saved(widget)
    assert drawn.judgements == {9: ("accepted", "")}
    before = layer.data.copy()
    layer.data = np.zeros_like(before)  # all ROIs were erased
    assert saved(widget) == []
    layer.data = before
    assert len(saved(widget)) == 1
    viewer.layers.remove(layer)  # by the user's own hand
    assert saved(widget) == []


def test_what_is_in_a_file_is_saved_only_when_it_was_changed(viewer, open_widget, show_movie, labels, tmp_path):
    path = tmp_path / "rois.tif"
    path.touch()
    show_movie(rois=None)
    layer = viewer.add_labels(labels.copy(), metadata={"path": str(path)})
    widget = open_widget()
    assert saved(widget) == []
    layer.data_setitem((np.array([0]), np.array([0])), 5)
    assert [drawn.n_rois for drawn in saved(widget)] == [4]


def test_a_widget_that_is_closed_and_opened_saves_a_layer_once(open_widget, show_movie):
    show_movie()
    open_widget().close_down()
    assert len(saved(open_widget())) == 1


def test_after_a_crash_all_is_offered_and_comes_back(viewer, qtbot, open_widget, show_movie, crash, labels, tmp_path):
    movie = show_movie()
    path = tmp_path / "movie.npy"
    np.save(path, movie.data)
    movie.metadata["path"] = str(path)
    widget = open_widget()
    assert widget.recovery.isHidden()
    verdicts = {1: judging.Judgement("accepted"), 3: judging.Judgement("rejected", "moves")}
    roi_layer.write_judgements(labels_of(widget), (1, 2, 3), judging.Judgements(verdicts))
    assert len(saved(widget)) == 1
    (recovery.folder() / f"sleep 1{recovery.MODEL}").write_bytes(b"weights")
    left = crash()
    widget.close_down()
    viewer.layers.clear()

    widget = open_widget()
    bar = widget.recovery
    assert bar.isVisible()
    assert bar.words.text().endswith("Still there: 3 ROIs in “ROIs” with 2 verdicts, 1 fitted model.")
    bar.buttons["Recover"].click()
    assert bar.isHidden()
    assert not left.exists()
    layer = labels_of(widget)
    np.testing.assert_array_equal(layer.data, labels)
    assert roi_layer.read_judgements(layer) == verdicts
    assert widget.choices.roi_layer is layer
    np.testing.assert_array_equal(widget.choices.chosen_movie().data, movie.data)
    box = widget.controls.model
    assert box.itemText(box.count() - 1) == "sleep 1"
    assert box.currentIndex() == 0
    assert [drawn.judgements for drawn in saved(widget)] == [{1: ("accepted", ""), 3: ("rejected", "moves")}]
    assert (recovery.folder() / f"sleep 1{recovery.MODEL}").read_bytes() == b"weights"


@pytest.mark.parametrize(("button", "stays"), [("Later", True), ("Discard", False)])
def test_what_is_offered_can_be_declined(open_widget, show_movie, crash, button, stays):
    show_movie()
    saved(widget := open_widget())
    left = crash()
    widget.close_down()
    bar = open_widget().recovery
    assert bar.isVisible()
    bar.buttons[button].click()
    assert bar.isHidden()
    assert left.exists() is stays
    if stays:
        filelock.FileLock(left / "in-use.lock").acquire(blocking=False)


def test_rois_of_a_file_get_its_traces_again(viewer, open_widget, crash, tmp_path, labels):
    traces = calvae.simulate(3, 20.0, 20.0, rate=1.0, seed=0).traces
    calvae.write(traces.replace(rois=calvae.RoiMasks.from_labels(labels)), tmp_path / "a.h5")
    viewer.open(str(tmp_path / "a.h5"), plugin="napari-calvae")
    widget = open_widget()
    layer = labels_of(widget)
    layer.data_setitem((np.array([0, 0]), np.array([0, 1])), 9)
    assert [drawn.traces for drawn in saved(widget)] == [str(tmp_path / "a.h5")]
    crash()
    widget.close_down()
    viewer.layers.clear()
    widget = open_widget()
    widget.recovery.buttons["Recover"].click()
    assert set(np.unique(labels_of(widget).data)) == {0, 1, 2, 3, 9}
    assert widget.choices.traces is not None
    assert widget.choices.traces.path == tmp_path / "a.h5"


def test_a_disk_that_is_full_is_told_once(open_widget, show_movie, monkeypatch, qtbot):
    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(recovery.DrawnRois, "save", full)
    show_movie()
    widget = open_widget()
    told = []
    widget._autosave.failed.connect(told.append)
    for _ in range(2):
        widget._autosave.touch(labels_of(widget))
        widget._autosave.save()
        assert not widget._autosave.wait()
    qtbot.waitUntil(lambda: bool(told))
    assert len(told) == 1
    assert told[0].startswith("ROIs and verdicts are not being saved on the way: [Errno 28]")
