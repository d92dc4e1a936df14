"""A small movie with three cells, a viewer that shows it, real mouse events, and a stand-in for the slow network."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
from plugin_helpers import CENTRES, FRAME_RATE, Mouse, Network

import napari_calvae as calvae


@pytest.fixture(scope="session", autouse=True)
def manifests_read_once():
    """Every viewer looks for the plugins that are installed, twice: here they are the same ones for all."""
    from npe2 import PluginManifest

    found = list(PluginManifest.discover())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PluginManifest, "discover", lambda paths=(): iter(found))
        yield


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    """What is remembered is remembered for the test alone, never in the files of whoever runs it."""
    from napari import settings

    if not hasattr(settings, "get_plugin_settings"):  # napari before 0.9, where there are none
        yield tmp_path / "napari-calvae.yaml"
        return
    monkeypatch.setattr(settings, "_CFG_PATH", str(tmp_path / "settings.yaml"))
    settings._clear_plugin_settings_cache()
    yield tmp_path / "napari-calvae.yaml"
    settings._clear_plugin_settings_cache()


@pytest.fixture(autouse=True)
def own_sessions(tmp_path_factory, monkeypatch):
    """What is saved on the way is in a place of its own."""
    from napari_calvae._napari import recovery

    place = tmp_path_factory.mktemp("sessions")
    monkeypatch.setattr(recovery, "home", lambda: place)
    recovery.folder.cache_clear()
    yield place
    recovery.folder.cache_clear()


@pytest.fixture
def network(monkeypatch) -> Network:
    stand_in = Network()
    for name, value in {
        "iter_infer": stand_in.iter_infer,
        "infer": stand_in.infer,
        "models": lambda: {"universal": None},
    }.items():
        monkeypatch.setitem(vars(calvae), name, value)  # not setattr: that would fetch the real one, and torch
    return stand_in


@pytest.fixture(scope="session")
def labels() -> np.ndarray:
    y, x = np.mgrid[:40, :40]
    image = np.zeros((40, 40), np.int32)
    for roi, (cy, cx) in CENTRES.items():
        image[(y - cy) ** 2 + (x - cx) ** 2 <= 16] = roi
    return image


@pytest.fixture(scope="session")
def movie(labels) -> np.ndarray:
    rng = np.random.default_rng(0)
    frames = rng.normal(100, 3, (400, 40, 40))
    for roi in CENTRES:
        spikes = rng.random(400) < 0.03
        signal = np.convolve(spikes, np.exp(-np.arange(60) / 12))[:400]
        frames[:, labels == roi] += 60 * signal[:, None]
    return frames.clip(0).astype(np.uint16)


@pytest.fixture
def viewer(make_napari_viewer):
    gc.freeze()  # the collection after each test need not look at all that was imported
    viewer = make_napari_viewer(show=True, strict_qt="raise")
    viewer.window.resize(1100, 800)
    return viewer


@pytest.fixture
def show_movie(viewer, movie, labels) -> Callable:
    """Add the movie and its label image; options go to the image layer."""

    def show(data=None, rois=labels, **options):
        options = {"scale": (1 / FRAME_RATE, 1, 1), "metadata": {"frame_rate": FRAME_RATE}} | options
        image = viewer.add_image(movie if data is None else data, name="movie", **options)
        if rois is not None:
            viewer.add_labels(rois.copy(), name="ROIs")
        return image

    return show


@pytest.fixture
def open_widget(viewer, qtbot) -> Callable:
    """Open the dock widget and wait until it is ready."""
    from napari_calvae._napari.inference_widget import InferenceWidget

    opened = []

    def open_one():
        widget = InferenceWidget(viewer)
        viewer.window.add_dock_widget(widget, name="spike inference", area="bottom")
        viewer.reset_view()
        qtbot.waitUntil(lambda: not widget._clicked.busy, timeout=60_000)
        opened.append(widget)
        return widget

    yield open_one
    for widget in opened:
        if widget._attached:
            widget.close_down()


@pytest.fixture
def open_beside(viewer, qtbot, open_widget) -> Callable:
    """Open the inference widget and one of the kinds that work on its movie and ROIs."""
    opened = []

    def open_both(kind, name):
        inference = open_widget()
        widget = kind(viewer)
        viewer.window.add_dock_widget(widget, name=name, area="right")
        opened.append(widget)
        qtbot.waitUntil(lambda: widget.isVisible())
        return inference, widget

    yield open_both
    for widget in opened:
        if widget._attached:
            widget.close_down()


@pytest.fixture
def canvas(viewer, qtbot):
    """Mouse on the canvas, in (y, x) pixels of the movie."""
    return Mouse(viewer, qtbot)
