"""Recordings that are going on: what is decided without Qt, and the widget while a file grows."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import zarr
from plugin_helpers import FRAME_RATE
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QFileDialog

import napari_calvae as calvae
from napari_calvae._napari import answers, live
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recognition import CausalNetwork
from napari_calvae.vae import SpikeVAE


@pytest.fixture(scope="module")
def model() -> SpikeVAE:
    torch.manual_seed(0)
    network = CausalNetwork(width=6, n_levels=4, max_count=3, lags=live.LAGS, lag=0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return SpikeVAE(network.eval(), MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=3))


class Recorder:
    """A Zarr folder to which frames of the movie are appended, one per chunk."""

    def __init__(self, path, movie, n_frames):
        self.path, self.movie, self.n_frames = path, movie, 0
        about = {"frame_rate": FRAME_RATE}
        self.array = zarr.create_array(
            str(path), shape=(0, *movie.shape[1:]), chunks=(1, *movie.shape[1:]), dtype=movie.dtype, attributes=about
        )
        self.record(n_frames)

    def record(self, n_frames):
        self.array.append(self.movie[self.n_frames : self.n_frames + n_frames])
        self.n_frames += n_frames


@pytest.fixture
def recorder(tmp_path, movie) -> Recorder:
    return Recorder(tmp_path / "recording.zarr", movie, 60)


# Without Qt ----------------------------------------------------------------------------------------------------------


def order_of(source, labels, model, **options) -> live.Order:
    return live.Order(3, calvae.open_growing(source), calvae.RoiMasks.from_labels(labels), FRAME_RATE, 4, 0.7, model,
                      **options)  # fmt: skip


def test_what_is_followed_is_what_a_stream_makes_of_the_traces(recorder, movie, labels, model):
    order = order_of(recorder.path, labels, model)
    found = []
    for message in live.iter_live(order):
        found.append(message)
        if recorder.n_frames < 160:
            recorder.record(10)
        elif message.n_frames == 160:
            order.finished.set()
    assert found[-1].ended
    assert not any(message.ended for message in found[:-1])
    values = np.concatenate([message.values for message in found], 1)
    rate = np.concatenate([message.rates.rate for message in found if message.rates.rate.size], 1)
    frames = np.concatenate([message.rates.frames for message in found])
    np.testing.assert_array_equal(frames, np.arange(160))
    reader = calvae.FrameReader(calvae.RoiMasks.from_labels(labels))
    np.testing.assert_allclose(values, reader.read(movie[:160]), rtol=1e-5)
    stream = calvae.stream(model, FRAME_RATE)
    again = [stream.push(message.values) for message in found if message.values.size] + [stream.finish()]
    np.testing.assert_allclose(rate, np.concatenate([part.rate for part in again if part.rate.size], 1), rtol=1e-4)
    assert found[-1].n_there == 160
    assert 0 < found[-1].ms_per_frame < 1000


def test_of_a_long_recording_the_last_minute_is_read_in_blocks(labels, model, movie):
    class Long:
        dtype, shape = movie.dtype, (100_000, *movie.shape[1:])

        def __getitem__(self, key):
            assert key.stop - key.start <= 256
            return movie[np.arange(key.start, key.stop) % len(movie)]

    messages = live.iter_live(order_of(Long(), labels, model))
    first, second = next(messages), next(messages)
    assert (first.first, first.values.shape[1]) == (100_000 - 60 * FRAME_RATE, 256)
    assert (first.rates.first, first.n_there) == (first.first, 100_000)
    assert second.first == first.n_frames == second.rates.first + 4
    messages.close()


def test_what_goes_wrong_is_a_sentence(recorder, labels, model):
    def last(order):
        return list(live.iter_live(order))[-1]

    (failure,) = live.iter_live(order_of(recorder.path, labels, "no such model"))
    assert isinstance(failure, answers.Failure)
    assert (failure.number, "no such model" in failure.sentence) == (3, True)
    assert "30 × 30 pixels like the ROIs" in last(order_of(recorder.path, labels[:30, :30], model)).sentence
    messages = live.iter_live(order_of(recorder.path, labels, model))
    next(messages)
    recorder.array.resize((20, *recorder.array.shape[1:]))
    assert "expected at least the 60 frames" in list(messages)[-1].sentence


def news(first, values, rates_from, rates, n_there=None) -> live.News:
    told = calvae.LiveRates(rates_from, rates, FRAME_RATE)
    return live.News(1, first, values, told, n_there or first + values.shape[1], 19.96, 0.81)


def test_the_last_half_minute_is_kept_with_its_rates_in_their_places():
    rng = np.random.default_rng(0)
    values, rates = rng.normal(size=(2, 3, 1500)).astype(np.float32)
    recent = live.Recent((4, 7, 9), FRAME_RATE, 4)
    assert recent.window((4,)) is None
    recent.add(news(0, values[:, :50], 0, rates[:, :0]))
    window = recent.window((9, 4))
    assert (window.traces.roi_ids, window.traces.n_frames, window.seconds) == ((9, 4), 50, (0.0, 30.0))
    assert np.isnan(window.rates).all()
    assert not recent.has_rates
    done = 50
    for k in (60, 3, 700, 1, 400, 2):  # more at once than is kept, too
        recent.add(news(done, values[:, done : done + k], max(done - 4, 0) if done > 50 else 0,
                        rates[:, max(done - 4, 0) if done > 50 else 0 : done + k - 4]))  # fmt: skip
        done += k
        window = recent.window((9, 4))
        first = max(0, done - 600)
        assert window.traces.t0 == pytest.approx(first / FRAME_RATE)
        np.testing.assert_array_equal(window.traces.values, values[[2, 0], first:done])
        np.testing.assert_array_equal(window.rates[:, :-4], rates[[2, 0], first : done - 4])
        assert np.isnan(window.rates[:, -4:]).all()
    assert window.seconds == pytest.approx((done / FRAME_RATE - 30, done / FRAME_RATE))
    recent.add(news(done, values[:, :0], done - 4, rates[:, done - 4 : done]))
    assert np.isfinite(recent.window((4,)).rates).all()


def test_picked_and_pinned_rois_come_first():
    assert live.shown_rois((1, 2, 3, 4), None, ()) == (1, 2, 3, 4)
    assert live.shown_rois(range(1, 20), 12, (9, 12, 3, 77)) == (12, 9, 3, 1, 2, 4)
    assert live.shown_rois((5,), 8, (9,)) == (5,)


def test_numbers_are_told_in_one_line():
    recent, none = live.Recent((1,), FRAME_RATE, 4), np.empty((1, 0), np.float32)
    one = np.zeros((1, 1), np.float32)
    recent.add(news(1233, one, 0, none))
    assert live.told(news(1233, one, 0, none), recent) == (
        "1,234 frames · 61.7 s · 20.0 frames/s arriving · 0.81 ms per frame · lag 200 ms · rates begin after 5 s"
    )
    recent.add(news(1234, one, 1230, one))
    assert live.told(news(1234, one, 1230, one, 3000), recent).endswith("lag 200 ms · 1,765 frames behind")


def test_a_layer_grows_in_its_file_or_as_its_owner_makes_it_grow(recorder, movie, tmp_path):
    def layer(data, path=None):
        return SimpleNamespace(data=data, source=SimpleNamespace(path=path), multiscale=False, name="film")

    owned = layer(movie[:20])
    growing = live.movie_of(owned)
    assert (growing.path, growing.poll()) == (None, 20)
    owned.data = movie[:33]
    assert growing.poll() == 33
    by_file = live.movie_of(layer(movie[:20], str(recorder.path)))
    assert (by_file.path, by_file.poll()) == (recorder.path, 60)
    assert live.movie_of(layer(by_file.so_far(20))) is by_file
    assert live.movie_of(layer(movie[:20, :30], str(recorder.path))).path is None  # a part of what is in the file
    (tmp_path / "b.tif").write_bytes(b"nothing")
    assert live.movie_of(layer(movie[:20], str(tmp_path / "b.tif"))).path is None
    assert live.movie_of(layer(zarr.open_array(str(recorder.path), mode="r"))).poll() == 60
    with pytest.raises(calvae.RecordingError, match=r"film: expected frames \(time, y, x\)"):
        live.movie_of(layer(movie[:, None]))
    with pytest.raises(calvae.RecordingError, match="several resolutions"):
        live.movie_of(SimpleNamespace(multiscale=True, name="film"))


# The widget ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_live(open_beside, network, model, monkeypatch):
    """Open the widget beside that of the inference."""
    from napari_calvae._napari.live_widget import LiveWidget

    monkeypatch.setattr(live, "MODEL", model)
    return lambda: open_beside(LiveWidget, "live")


@pytest.fixture
def running(viewer, qtbot, open_live, recorder, labels):
    """A recording that was opened and is followed."""
    viewer.add_labels(labels.copy(), name="ROIs")
    inference, widget = open_live()
    widget.open_file(recorder.path)
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: shown(widget) == 60, timeout=30_000)
    return inference, widget


def press(qtbot, button):
    assert button.isVisible()
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def shown(widget) -> int:
    """Frames that plots and movie show."""
    window = widget.plots.window_shown
    return 0 if window is None else round((window.traces.t0 + window.traces.duration) * FRAME_RATE)


def test_a_recording_is_followed(qtbot, running, viewer, recorder, movie):
    _, widget = running
    layer, plots = viewer.layers["recording"], widget.plots
    layer.contrast_limits = (90, 170)
    viewer.camera.zoom, viewer.camera.center = 7.5, (0, 18, 21)
    assert "rates begin after 5 s" in widget.numbers.text()
    assert "no rate yet" in plots.rows[0].words.toPlainText()
    assert not widget.bar.progress.isVisible()
    for n_frames in (90, 130, 160):
        recorder.record(n_frames - recorder.n_frames)
        qtbot.waitUntil(lambda: shown(widget) == recorder.n_frames, timeout=10_000)
        assert layer.data.shape == (n_frames, 40, 40)
        assert viewer.dims.nsteps[0] == n_frames
        assert viewer.dims.current_step[0] == n_frames - 1
        np.testing.assert_array_equal(layer._slice.image.view, movie[n_frames - 1])
    assert layer.contrast_limits == [90, 170]
    assert (viewer.camera.zoom, viewer.camera.center) == (7.5, (0, 18, 21))
    assert widget.numbers.text().startswith("160 frames · 8.0 s · ")
    assert "lag 200 ms" in widget.numbers.text()
    window = plots.window_shown
    assert window.traces.roi_ids == (1, 2, 3)
    assert np.isfinite(window.rates[:, :-4]).all()
    assert np.isnan(window.rates[:, -4:]).all()
    assert plots.rows[0].view.viewRange()[0] == pytest.approx([0, 30], abs=0.01)
    assert [cell.row.view.isVisible() for cell in plots.cells] == [True] * 3 + [False] * 3
    assert plots.cells[2].trace.getData()[1].max() <= 1
    assert "spikes/s" in plots.rows[2].words.toPlainText()
    with qtbot.waitSignal(widget.finished, timeout=10_000):
        press(qtbot, widget.bar.cancel)
    assert np.isfinite(plots.window_shown.rates).all()  # the last ones, too
    assert "Stopped after 160 frames" in widget.bar.status.text()
    assert widget.bar.start.isEnabled()
    recorder.record(5)
    press(qtbot, widget.bar.start)  # and on it goes
    qtbot.waitUntil(lambda: shown(widget) == 165, timeout=10_000)


def test_picked_and_pinned_rois_are_shown_and_a_moment_goes_back(qtbot, running, viewer, recorder):
    inference, widget = running
    inference.ask(3)
    recorder.record(50)
    qtbot.waitUntil(lambda: widget.plots.window_shown.traces.roi_ids == (3, 1, 2), timeout=10_000)
    qtbot.waitUntil(lambda: inference.plots.picture is not None, timeout=10_000)
    asked = len(inference.results.rows)
    recorder.record(20)
    qtbot.waitUntil(lambda: shown(widget) == 130, timeout=10_000)
    qtbot.wait(400)
    assert len(inference.results.rows) == asked  # a movie that grows is not inferred again and again
    widget.plots.picked.emit(2.0)
    assert not widget.follow.isChecked()
    assert viewer.dims.point[0] == pytest.approx(2.0, abs=1 / FRAME_RATE)
    recorder.record(20)
    qtbot.waitUntil(lambda: shown(widget) == 150, timeout=10_000)
    assert viewer.dims.point[0] == pytest.approx(2.0, abs=1 / FRAME_RATE)


def test_edited_rois_count_from_the_next_start(qtbot, running, viewer, recorder):
    _, widget = running
    layer = viewer.layers["ROIs"]
    layer.data_setitem((np.array([20, 20, 21]), np.array([3, 4, 4])), 8)
    qtbot.waitUntil(lambda: "counts from the next start" in widget.bar.status.text(), timeout=10_000)
    recorder.record(10)
    qtbot.waitUntil(lambda: shown(widget) == 70, timeout=10_000)
    assert widget.plots.window_shown.traces.roi_ids == (1, 2, 3)
    press(qtbot, widget.bar.cancel)
    qtbot.waitUntil(lambda: widget.running is None, timeout=10_000)
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: widget.plots.window_shown.traces.roi_ids == (1, 2, 3, 8), timeout=10_000)


def test_another_frame_rate_is_told_while_it_is_followed_and_afterwards(qtbot, running, recorder):
    inference, widget = running
    inference.controls.frame_rate_typed.emit(f"{2 * FRAME_RATE}")
    assert "counts from the next start" in widget.bar.status.text()
    recorder.record(10)
    qtbot.waitUntil(lambda: shown(widget) == 70, timeout=10_000)
    assert widget.plots.graphics.ci.opacity() < 1
    press(qtbot, widget.bar.cancel)
    qtbot.waitUntil(lambda: widget.running is None, timeout=10_000)
    assert widget.plots.graphics.ci.opacity() < 1
    inference.controls.frame_rate_typed.emit(f"{FRAME_RATE}")
    assert widget.plots.graphics.ci.opacity() == 1


def test_the_window_is_small_and_follows_the_theme_and_stays_alive_while_reading_waits(
    qtbot, running, viewer, recorder, monkeypatch
):
    _, widget = running
    assert widget.minimumSizeHint().width() <= 600
    for control in (widget.movie, widget.file, widget.rois, widget.frame_rate, widget.lag, widget.follow):
        assert control.toolTip()
    assert [widget.lag.itemData(i) for i in range(5)] == [0, 1, 2, 4, 8]
    assert "as good as eight" in widget.lag.toolTip()
    viewer.theme = "light"
    assert widget.plots.cells[0].rate.opts["pen"].color().name() == "#00796b"
    viewer.theme = "dark"
    assert widget.plots.cells[0].rate.opts["pen"].color().name() == "#35c9b5"
    gate, read = threading.Event(), calvae.GrowingMovie.read
    waiting = threading.Event()

    def slowly(self, start, stop):
        if threading.current_thread() is not threading.main_thread():
            waiting.set()
            gate.wait(20)
        return read(self, start, stop)

    monkeypatch.setattr(calvae.GrowingMovie, "read", slowly)
    recorder.record(10)
    qtbot.waitUntil(waiting.is_set, timeout=10_000)
    began = time.perf_counter()
    for _ in range(5):
        QApplication.processEvents()
    assert time.perf_counter() - began < 5
    assert shown(widget) == 60
    gate.set()
    qtbot.waitUntil(lambda: shown(widget) == 70, timeout=10_000)


def test_a_layer_that_another_plugin_makes_longer(qtbot, open_live, viewer, show_movie, movie):
    class InPlace:
        """An array that is made longer where it lies."""

        dtype, ndim, shape = movie.dtype, 3, (60, *movie.shape[1:])

        def __getitem__(self, key):
            return movie[: self.shape[0]][key]

    layer = show_movie(movie[:50])
    _, widget = open_live()
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: shown(widget) == 50, timeout=30_000)
    layer.data = movie[:55]
    qtbot.waitUntil(lambda: shown(widget) == 55, timeout=10_000)
    assert isinstance(layer.data, np.ndarray)
    array = layer.data = InPlace()
    qtbot.waitUntil(lambda: shown(widget) == 60, timeout=10_000)
    array.shape = (80, *movie.shape[1:])
    qtbot.waitUntil(lambda: shown(widget) == 80, timeout=10_000)
    assert viewer.dims.nsteps[0] == 80
    assert layer.data is array
    viewer.layers.clear()
    qtbot.waitUntil(lambda: "taken out" in widget.bar.status.text(), timeout=10_000)
    assert widget.running is None


def test_what_is_missing_or_goes_wrong_is_said(
    qtbot, open_live, viewer, recorder, labels, movie, tmp_path, monkeypatch
):
    _, widget = open_live()
    press(qtbot, widget.bar.start)
    assert "Movie: expected an Image layer" in widget.bar.status.text()
    (tmp_path / "a.tif").write_text("no movie")
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *a, **k: (str(tmp_path / "a.tif"), ""))
    widget._on_file()
    assert "a.tif: expected a TIFF movie that is being written" in widget.bar.status.text()
    tifffile.imwrite(tmp_path / "b.tif", movie[0], metadata=None)
    widget.open_file(tmp_path / "b.tif")
    assert "expected a recording that has begun, got 1 complete frames" in widget.bar.status.text()
    for image in movie[1:60]:
        tifffile.imwrite(tmp_path / "b.tif", image, append=True, metadata=None)
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *a, **k: (str(tmp_path / "b.tif"), ""))
    widget._on_file()
    assert widget.movie.currentText() == "b"
    press(qtbot, widget.bar.start)
    assert "Frame rate: expected" in widget.bar.status.text()  # the file does not say
    widget.frame_rate.setFocus()
    qtbot.keyClicks(widget.frame_rate, "20")
    qtbot.keyClick(widget.frame_rate, Qt.Key.Key_Return)
    assert widget.rate_source.text() == "Hz (typed)"
    press(qtbot, widget.bar.start)
    assert "ROIs: expected a Labels" in widget.bar.status.text()
    viewer.add_labels(labels.copy(), name="ROIs")
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *a, **k: str(recorder.path))
    widget._on_folder()
    assert [widget.movie.itemText(i) for i in range(widget.movie.count())] == ["b", "recording"]
    assert (widget.movie.currentText(), widget.frame_rate.text()) == ("recording", "20")
    press(qtbot, widget.bar.start)
    qtbot.waitUntil(lambda: shown(widget) == 60, timeout=30_000)
    with qtbot.waitSignal(widget.failed, timeout=10_000):
        recorder.array.resize((20, *recorder.array.shape[1:]))
    assert "expected at least the 60 frames" in widget.bar.status.text()
    assert widget.bar.start.isEnabled()
    assert widget.running is None


@pytest.mark.parametrize("how", ["dock", "window"])
def test_closing_in_the_middle_leaves_nothing(qtbot, running, viewer, how, monkeypatch):
    inference, widget = running
    listeners = len(viewer.events.theme.callbacks), len(viewer.layers.events.inserted.callbacks)
    polls, poll = [], calvae.GrowingMovie.poll
    monkeypatch.setattr(calvae.GrowingMovie, "poll", lambda self: polls.append(1) or poll(self))
    qtbot.waitUntil(lambda: bool(polls), timeout=10_000)
    if how == "window":
        viewer.close()
    else:
        viewer.window._wrapped_dock_widgets["live"].destroyOnClose()
    qtbot.waitUntil(lambda: not widget._attached, timeout=10_000)
    assert not widget._worker.busy
    polls.clear()
    qtbot.wait(200)
    assert not polls
    assert inference._follows_movie
    assert len(viewer.events.theme.callbacks) < listeners[0]
    assert len(viewer.layers.events.inserted.callbacks) < listeners[1]


def test_it_opens_from_the_menu_and_outlives_the_spike_inference(qtbot, viewer, network, model, recorder, monkeypatch,
                                                                 labels):  # fmt: skip
    from napari_calvae._napari.inference_widget import InferenceWidget

    monkeypatch.setattr(live, "MODEL", model)
    viewer.add_labels(labels.copy(), name="ROIs")
    _, widget = viewer.window.add_plugin_dock_widget("napari-calvae", "live")
    widget.open_file(recorder.path)
    widget.start()
    qtbot.waitUntil(lambda: shown(widget) == 60, timeout=30_000)
    inference = InferenceWidget.of(viewer)
    viewer.window._wrapped_dock_widgets["spike inference (napari-calvae)"].destroyOnClose()
    qtbot.waitUntil(lambda: inference._closed)
    recorder.record(10)
    qtbot.waitUntil(lambda: shown(widget) == 70, timeout=10_000)
    widget.cancel()
    qtbot.waitUntil(lambda: widget.running is None, timeout=10_000)
    widget.start()
    qtbot.waitUntil(lambda: widget.recent.n_frames == 70, timeout=10_000)
    again = InferenceWidget.of(viewer)
    assert again is not inference
    widget.close_down()
    qtbot.waitUntil(lambda: not again._clicked.busy, timeout=60_000)
    again.close_down()
