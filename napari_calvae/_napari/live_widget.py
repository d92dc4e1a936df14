"""The dock widget for recordings that are still going on: fluorescence and spike rates as the frames come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from napari.layers import Image
from napari.viewer import Viewer
from qtpy.QtCore import QSignalBlocker, QTimer
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFileDialog,
    QLabel,
    QLineEdit,
    QMenu,
    QPushButton,
)

import napari_calvae as calvae
from napari_calvae._napari import live, picking, reading, session
from napari_calvae._napari.choices import Choices
from napari_calvae._napari.controls import beside, choose_layer, layer_box
from napari_calvae._napari.live_plots import LivePlots
from napari_calvae._napari.recording_widget import RecordingWidget
from napari_calvae._napari.run_bar import RunBar

WIDTH, HEIGHT = 300, 372
#: Time (ms) between two pictures while frames come.
_EVERY = 80


class LiveWidget(RecordingWidget):
    """Follows a movie that is being written: its layer grows, plots and numbers go with it."""

    def __init__(self, napari_viewer: Viewer):
        bar = RunBar("Start", "Follow the movie: infer spikes of all ROIs as its frames come")
        bar.cancel.setText("Stop")
        bar.cancel.setToolTip("Stop following; movie and plots stay as they are")
        self.plots: LivePlots
        super().__init__(napari_viewer, bar, LivePlots(), HEIGHT)
        self.running: live.Order | None = None
        self.news: live.News | None = None
        self.recent: live.Recent | None = None
        self._source: calvae.GrowingMovie | None = None
        self._layer: Image | None = None
        #: ROIs that the plots show, and up to which frame of what.
        self._drawn: tuple = ()
        #: What the movie's layer held when it was looked at last, and how many frames of it.
        self._held: tuple[Any, int] = (None, 0)
        self._soon = QTimer(self)
        self._soon.setSingleShot(True)
        self._soon.setInterval(_EVERY)
        self._soon.timeout.connect(self.show_news)
        self._build()
        self._lay_out()
        self.bar.say("Choose a movie that is being recorded and its ROIs, then press Start.")
        self.attach()

    def _build(self) -> None:
        self.movie = layer_box(
            "Image layer that grows: the file that it was opened from is being written, or another plugin adds frames"
        )
        self.movie.activated.connect(lambda _: self.inference.controls.choose_movie(self.movie.currentData()))
        self.file = QPushButton("File …")
        self.file.setToolTip("Open a Zarr folder or a TIFF file that another program is writing")
        menu = QMenu(self.file)
        for text, slot in (("Zarr folder …", self._on_folder), ("TIFF file …", self._on_file)):
            action = menu.addAction(text)
            if action is not None:
                action.triggered.connect(slot)
        self.file.setMenu(menu)
        self.rois = layer_box("Labels, Shapes or Points layer of the ROIs; edits count from the next start")
        self.rois.activated.connect(lambda _: self.inference.controls.choose_rois(self.rois.currentData()))
        self.frame_rate = QLineEdit()
        self.frame_rate.setPlaceholderText("Hz")
        self.frame_rate.setFixedWidth(58)
        self.frame_rate.setToolTip(
            "Frames per second (Hz) of the recording; read from the file or typed, never guessed"
        )
        self.frame_rate.editingFinished.connect(self._on_frame_rate)
        self.rate_source = QLabel()
        self.lag = QComboBox()
        for frames in live.LAGS:
            self.lag.addItem(f"{frames} frame{'s' * (frames != 1)}", frames)
        self.lag.setCurrentIndex(live.LAGS.index(4))
        self.lag.setToolTip(
            "Frames that come between a frame and its rate: four are as good as eight, none or one miss more"
        )
        self.lag.currentIndexChanged.connect(self._check_shown)
        self.follow = QCheckBox("follow")
        self.follow.setChecked(True)
        self.follow.setToolTip("The time slider goes to the newest frame; a click in the plots goes back and ends that")
        self.plots.setToolTip("A ROI that is clicked in the movie comes first, those that were pinned follow it")
        self.numbers = QLabel()
        self.numbers.setWordWrap(True)
        self.numbers.setStyleSheet("font-size: 8pt;")
        self.numbers.setMinimumHeight(46)
        self.numbers.setToolTip(
            "Frames and seconds so far; frames that arrive per second; computing per frame of all ROIs; "
            "how long after a frame its rate is told"
        )

    def _lay_out(self) -> None:
        rows = [
            ("Movie", beside((self.movie, 1), (self.file, 0))),
            ("ROIs", self.rois),
            ("Frame rate", beside((self.frame_rate, 0), (self.rate_source, 1))),
            ("Lag", beside((self.lag, 1), (self.follow, 0))),
        ]
        self._lay_panel(WIDTH, rows, [(self.numbers, 0)], self.plots)
        self._tab_through(
            self.movie, self.file, self.rois, self.frame_rate, self.lag, self.follow, self.bar.start, self.bar.cancel
        )

    # Movie, ROIs and frame rate: those of the inference widget

    def _let_go(self) -> None:
        self._watch_movie(True)
        super()._let_go()

    def _watch_movie(self, on: bool) -> None:
        """Let the inference widget infer anew when the movie changes, or not: while it grows it always does."""
        if self._inference is not None:
            self._inference.follow_movie(on)

    def _on_layers(self, *_: object) -> None:
        if self._inference is None:
            return
        choices = self._inference.choices
        for box, layers, chosen in (
            (self.movie, picking.movies(self._viewer), choices.real_movie),
            (self.rois, picking.roi_layers(self._viewer), choices.roi_layer),
        ):
            blocker = QSignalBlocker(box)
            box.clear()
            for layer in layers:
                box.addItem(layer.name, layer)
            box.setCurrentIndex(-1)
            choose_layer(box, chosen)
            blocker.unblock()
        rate = choices.frame_rate()
        self.frame_rate.setText("" if rate.hz is None else f"{rate.hz:.6g}")
        self.frame_rate.setModified(False)
        self.rate_source.setText("Hz, type it" if rate.hz is None else f"Hz ({rate.source})")
        self._check_shown()

    def _on_frame_rate(self) -> None:
        if self.frame_rate.isModified():
            self.frame_rate.setModified(False)
            self.inference.controls.frame_rate_typed.emit(self.frame_rate.text())
            self._on_layers()

    def _on_folder(self, *_: object) -> None:
        if name := QFileDialog.getExistingDirectory(self, "Zarr folder that is being written"):
            self.open_file(Path(name))

    def _on_file(self, *_: object) -> None:
        kinds = "TIFF (*.tif *.tiff)"
        if name := QFileDialog.getOpenFileName(self, "TIFF file that is being written", "", kinds)[0]:
            self.open_file(Path(name))

    def open_file(self, path: Path) -> None:
        """Open a movie that is being written as a layer, and choose it."""
        try:
            movie = calvae.open_growing(path)
            movie.poll()
            n_frames = movie.poll()  # some formats tell of their newest frames at the second look
            if n_frames < 2:
                raise calvae.RecordingError(
                    f"{path.name}: expected a recording that has begun, got {n_frames} complete frames. "
                    "Open it again when there are two."
                )
            data, options, _ = reading.movie_layer(movie.so_far(n_frames), movie.frame_rate, path)
        except (calvae.RecordingError, OSError, ValueError) as error:
            self._fail(session.explain(error))
            return
        layer = self._viewer.add_image(data, **options)
        # Below the ROIs, which would be hidden.
        self._viewer.layers.move(self._viewer.layers.index(layer), 0)
        self.inference.controls.choose_movie(layer)
        self._on_layers()

    # Work

    def start(self) -> None:
        """Follow the movie from now on."""
        controls = self.inference.controls  # a new one, perhaps, which chose for itself
        for box, choose in ((self.movie, controls.choose_movie), (self.rois, controls.choose_rois)):
            if box.currentData() is not None:
                choose(box.currentData())
        super().start()
        if self.running is not None:
            self._shows_what_was_asked()

    def _conditions(self, choices: Choices) -> tuple:
        key = choices.rois()[0]  # but not its number of the movie, which changes as that grows
        settings = key.settings
        return key.marks, choices.real_movie, settings.frame_rate, settings.neuropil_coefficient, self.lag.currentData()

    def _told_outdated(self) -> str:
        return "Movie, ROIs or settings have changed: that counts from the next start."

    def _order(self, number: int) -> Iterator[Any]:
        choices = self.inference.choices
        key, _, masks = choices.rois()
        if choices.real_movie is None:
            raise calvae.RecordingError("Movie: expected an Image layer that grows, got traces of a file. Choose one.")
        movie, settings = live.movie_of(choices.real_movie), key.settings
        lag, neuropil = self.lag.currentData(), settings.neuropil_coefficient
        order = live.Order(number, movie, masks, settings.frame_rate, lag, neuropil, live.MODEL)
        self.recent, self.news = live.Recent(masks.ids, order.frame_rate, order.lag), None
        self.running, self._source, self._layer = order, movie, choices.real_movie
        self._held = (self._layer.data, self._layer.data.shape[0])
        self.numbers.setText("")
        self.bar.say(f"Following {self._layer.name}: {len(masks)} ROIs.")
        self._watch_movie(False)
        return live.iter_live(order)

    def cancel(self) -> None:
        """Stop following; the last rates are still told if nothing is left to read."""
        if self.running is None:
            return
        if self.news is not None and self.news.n_there == self.news.n_frames:
            self.bar.cancel.setEnabled(False)
            self.running.finished.set()
        else:
            self._stop()
            self._say_stopped()

    def _show_message(self, message: live.News) -> None:
        if self.recent is None:
            return
        self.recent.add(message)
        self.news = message
        if message.ended:
            self._stop()
            self.show_news()
            self._say_stopped()
            self.finished.emit()
        elif not self._soon.isActive():
            self._soon.start()

    def _say_stopped(self) -> None:
        self.bar.say(f"Stopped after {0 if self.news is None else self.news.n_frames:,} frames.")

    def _on_stopped(self) -> None:
        self.running = None
        self._watch_movie(True)

    # What is shown

    def show_news(self) -> None:
        """Show what has come since the last picture."""
        self._soon.stop()
        news, recent = self.news, self.recent
        if news is None or recent is None or self._closed:
            return
        self.numbers.setText(live.told(news, recent))
        behind = news.n_there - news.n_frames
        self.bar.progress.setVisible(self.running is not None and behind > recent.frame_rate)
        self.bar.show_progress(news.n_frames / max(news.n_there, 1), "catching up")
        self._grow(news.n_frames)
        self._draw_plots()

    def _draw_plots(self) -> None:
        if self.recent is None:
            return
        picked = None if self._inference is None else self._inference.picked_roi
        pinned = () if self._inference is None else tuple(self._inference.plots.pinned.cells)
        rois = live.shown_rois(self.recent.roi_ids, picked, pinned)
        drawn = (rois, self.recent, self.recent.n_frames, self.running)  # the last rates come without a frame
        window = None if drawn == self._drawn else self.recent.window(rois)
        if window is not None:
            self._drawn = drawn
            some = f"{len(rois)} of " if len(rois) < len(self.recent.roi_ids) else ""
            which = f"<b>{some}{len(self.recent.roi_ids)} ROIs</b>"
            self.plots.show_window(window, f"{which}, last {live.SPAN:g} s: fluorescence, spikes/s")
            self._on_slider()

    def _grow(self, n_frames: int) -> None:
        """Let the layer show what there is, and the slider follow."""
        layer = self._layer
        if layer is None or layer not in self._viewer.layers:
            if self.running is not None:
                self._stop()
                self.bar.say("Stopped: the movie was taken out of the viewer.")
            self._layer = None
            return
        n_shown = int(layer.data.shape[0])
        if self._source is not None and self._source.path is not None and n_frames > n_shown:
            layer.data = self._source.so_far(n_frames)
        elif layer.data is self._held[0] and n_shown != self._held[1]:
            layer.data = layer.data  # an array that was made longer where it lies, which napari does not see
        self._held = (layer.data, int(layer.data.shape[0]))
        axis = self._viewer.dims.ndim - layer.ndim
        if self.follow.isChecked() and axis >= 0:
            newest = min(n_frames, self._held[1]) - 1
            self._viewer.dims.set_point(axis, float(layer.translate[0] + newest * layer.scale[0]))

    def _on_picked(self, roi: int) -> None:
        self._draw_plots()

    def _on_moment_picked(self, seconds: float) -> None:
        self.follow.setChecked(False)
        super()._on_moment_picked(seconds)

    # Coming and going

    def attach(self) -> None:
        """Listen to the viewer and its inference widget."""
        if not self._attached and not self._closed:
            for event in self._layer_events():
                event.connect(self._on_layers)
        super().attach()

    def detach(self) -> None:
        """Stop all work and wait for its end, let go of the viewer."""
        if self._attached:
            for event in self._layer_events():
                event.disconnect(self._on_layers)
            self._soon.stop()
        super().detach()

    def _layer_events(self) -> tuple[Any, ...]:
        events = self._viewer.layers.events
        return events.inserted, events.removed, events.renamed
