"""A user who clicks at random for hours, with batch inference beside: memory, threads and files must stay as they are.

``xvfb-run -a python tests/soak.py MINUTES [SEED [ACTION…]]`` opens napari with a movie and the widgets, does something
every fraction of a second, of all things or of those named, and prints what grew, how often each thing was done and
every error as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import napari_calvae as calvae

#: Seconds between two actions, and between two looks at the memory.
PAUSE, LOOK = 0.15, 20.0
#: Frames of the movie, and the most ROIs that the user draws before deleting some.
N_FRAMES, MOST_ROIS = 5400, 40

_BATCH = """
import sys, napari_calvae as calvae
seen = calvae.simulate(100, 120.0, 30.0, rate=1.0, seed=0).traces
while True:
    calvae.infer(seen, out=sys.argv[1], overwrite=True, block_rois=20)
    print("done", flush=True)
"""


class User:
    """Does one of the things that users do, drawn at random."""

    def __init__(self, viewer: Any, rng: np.random.Generator, only: list[str]) -> None:
        from napari_calvae._napari.inference_widget import InferenceWidget

        self.viewer, self.rng, self.only = viewer, rng, only
        self.did: Counter[str] = Counter()
        self.inference = InferenceWidget.of(viewer)
        self.others: dict[str, Any] = {}

    @property
    def labels(self) -> Any:
        return self.viewer.layers["ROIs"]

    def act(self) -> None:
        actions: list[Callable[[], None]] = [
            *[self.click] * 8, self.click_beside, self.erase, *[self.slide] * 4, self.zoom, self.pin, self.samples,
            self.infer_all, self.cancel, self.oasis, self.light_up, self.table, *[self.judge] * 3, self.theme,
            self.fit, self.frame_rate, self.into_a_store,
        ]  # fmt: skip
        actions = [action for action in actions if not self.only or action.__name__ in self.only]
        action = actions[self.rng.integers(len(actions))]
        action()
        self.did[action.__name__] += 1

    def place(self, roi: int) -> np.ndarray:
        at = np.argwhere(self.labels.data == roi)
        return np.array([0.0, *(at[len(at) // 2] if len(at) else (0, 0))])

    def ids(self) -> np.ndarray:
        return np.setdiff1d(self.labels.data, 0)

    def click(self) -> None:
        if len(ids := self.ids()):
            self.inference.pick(self.place(int(self.rng.choice(ids))))

    def click_beside(self) -> None:
        if len(self.ids()) < MOST_ROIS:
            self.inference.controls.place.setChecked(True)
            self.inference.pick(np.array([0.0, *self.rng.uniform(0, self.labels.data.shape)]))

    def erase(self) -> None:
        if len(ids := self.ids()) > 3:
            gone = np.nonzero(self.labels.data == self.rng.choice(ids))
            self.labels.data_setitem(gone, 0)

    def slide(self) -> None:
        self.viewer.dims.set_current_step(0, int(self.rng.integers(N_FRAMES)))

    def zoom(self) -> None:
        start, width = self.rng.uniform(0, 150), self.rng.uniform(1, 30)
        self.inference.plots.trace_row.view.setXRange(start, start + width, padding=0)

    def pin(self) -> None:
        pinned = self.inference.plots.pinned
        if len(pinned.cells) > 2:
            pinned.unpin(next(iter(pinned.cells)))
        elif self.inference.plots.picture is not None:
            pinned.pin(self.inference.plots.picture)

    def samples(self) -> None:
        self.inference.controls.samples.setValue(int(self.rng.integers(5, 60)))

    def infer_all(self) -> None:
        self.inference.infer_all()

    def cancel(self) -> None:
        self.inference.cancel()

    def oasis(self) -> None:
        self.inference.plots.rival_button.click()

    def light_up(self) -> None:
        self.inference.plots.activity_button.click()

    def theme(self) -> None:
        self.viewer.theme = "light" if self.viewer.theme == "dark" else "dark"

    def frame_rate(self) -> None:
        self.inference.controls.frame_rate_typed.emit(f"{self.rng.uniform(20, 40):.3g}")

    def into_a_store(self) -> None:
        if not self.inference._batch.busy:
            folder = tempfile.mkdtemp(dir=FOLDER)
            self.inference.infer_into(f"{folder}/a.zarr")

    def table(self) -> None:
        from napari_calvae._napari.quality_widget import QualityWidget

        self.toggle("table", QualityWidget)

    def judge(self) -> None:
        if (table := self.others.get("table")) is not None:
            getattr(table, self.rng.choice(["accept", "reject", "clear", "undo", "redo", "next_cell", "worst_cell"]))()

    def fit(self) -> None:
        from napari_calvae._napari.training_widget import TrainingWidget

        widget = self.others.get("training")
        if widget is None or widget.form is None:
            self.toggle("training", TrainingWidget)
        elif widget.bar.buttons["start"].isVisible() and widget.bar.buttons["start"].isEnabled():
            widget.bar.buttons["start"].click()
        elif widget.bar.buttons["cancel"].isVisible():
            widget.bar.buttons["cancel"].click()
            self.toggle("training", TrainingWidget)

    def toggle(self, name: str, kind: type) -> None:
        if name in self.others:
            self.viewer.window.remove_dock_widget(self.others.pop(name))
        else:
            self.others[name] = kind(self.viewer)
            self.viewer.window.add_dock_widget(self.others[name], name=name, area="right")


def memory() -> float:
    """Resident megabytes of this process, less what the C library keeps for later without need."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def scene(viewer: Any) -> None:
    from napari_calvae._napari.contributions import movie_layers, sample_folder

    short = np.asarray(calvae.read_movie(sample_folder() / "movie.tif")[0])
    movie = np.concatenate([short] * -(-N_FRAMES // len(short)))[:N_FRAMES]
    labels = calvae.read_labels(sample_folder() / "rois.tif")
    for data, options, kind in movie_layers(movie, labels, 30.0):
        getattr(viewer, f"add_{kind}")(data, **options)


def soak(minutes: float, seed: int, only: list[str]) -> dict[str, Any]:
    import napari
    from napari.utils.notifications import notification_manager
    from qtpy.QtWidgets import QApplication

    errors: Counter[str] = Counter()

    def note(kind: type[BaseException], error: BaseException, *_: object) -> None:
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
        errors[f"{kind.__name__}: {error} ({' › '.join(places)})"] += 1

    napari.utils.resize_dask_cache(5e7)  # napari keeps chunks in a tenth of the memory: that would look like a leak
    viewer = napari.Viewer(show=True)
    sys.excepthook = note
    threading.excepthook = lambda given: note(given.exc_type, given.exc_value or given.exc_type())
    notification_manager.notification_ready.connect(lambda n: errors.update([f"told: {n.message}"]))
    scene(viewer)
    user = User(viewer, np.random.default_rng(seed), only)
    user.inference.failed.connect(lambda sentence: errors.update([f"told: {sentence}"]))
    words = [sys.executable, "-c", _BATCH, str(FOLDER / "beside.zarr")]
    looks: list[tuple[float, float, int, int]] = []
    begun, next_look = time.monotonic(), 0.0
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as beside:
        while (now := time.monotonic() - begun) < 60 * minutes:
            try:
                user.act()
            except Exception as error:  # noqa: BLE001 - every error counts
                note(type(error), error)
            until = time.monotonic() + PAUSE * user.rng.exponential()
            while True:
                QApplication.processEvents()
                if time.monotonic() > until:
                    break
                time.sleep(0.005)
            if now > next_look:
                next_look = now + LOOK
                looks.append((now / 3600, memory(), threading.active_count(), len(os.listdir("/proc/self/fd"))))
        beside.kill()
        batches = len(beside.stdout.read().split())
    viewer.close()
    for _ in range(200):
        QApplication.processEvents()
    hours, megabytes, threads, files = np.array(looks).T
    late = hours >= hours[-1] / 3  # the first third fills caches
    return {
        "minutes": minutes,
        "seed": seed,
        "actions": dict(user.did),
        "batches of 100 ROIs beside": batches,
        "memory (MB) after a third and at the end": [round(megabytes[late][0]), round(megabytes[-1])],
        "slope (MB per hour)": round(float(np.polyfit(hours[late], megabytes[late], 1)[0]), 1),
        "slope (MB per 1000 actions)": round(
            float(np.polyfit(hours[late], megabytes[late], 1)[0]) * hours[-1] / user.did.total() * 1000, 2
        ),
        "threads, most": int(threads.max()),
        "threads after the window was closed": sorted(thread.name for thread in threading.enumerate()),
        "files open at the first look and at the last": [int(files[0]), int(files[-1])],
        "errors": dict(errors),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="calvae-soak-") as place:
        FOLDER = Path(place)
        # Neither what is remembered nor what is saved on the way is the user's own.
        os.environ |= {"XDG_DATA_HOME": place, "NAPARI_CONFIG": f"{place}/settings.yaml"}
        print(json.dumps(soak(float(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]), sys.argv[3:]), indent=1))  # noqa: T201
