"""The dock widget: click a ROI of a movie, see its spike posterior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from napari.layers import Image, Labels, Layer, Points
from napari.qt import get_qapp
from napari.utils.notifications import show_error
from napari.utils.theme import get_theme
from napari.viewer import Viewer
from qtpy.QtCore import QTimer, Signal
from qtpy.QtWidgets import QHBoxLayout, QVBoxLayout, QWidget

import napari_calvae as calvae
from napari_calvae._napari import answers, picking, readout, remembering, running, session, writing
from napari_calvae._napari.autosave import Autosave, RecoveryBar, recover
from napari_calvae._napari.batch import Batch
from napari_calvae._napari.choices import Choices
from napari_calvae._napari.controls import Controls
from napari_calvae._napari.docking import DockManners
from napari_calvae._napari.following import Follower
from napari_calvae._napari.overlays import Overlays
from napari_calvae._napari.placing import Placing
from napari_calvae._napari.plots import Palette, PosteriorPlots
from napari_calvae._napari.recovery import Leftover
from napari_calvae._napari.work import Worker

#: Height (pixels) that the plots ask for when docked at the bottom.
HEIGHT, HEIGHT_PINNED = 330, 404
#: Wait (ms) for a posterior before the picked ROI is outlined all the same.
OUTLINE_AFTER = 300
#: The newest widget of each viewer that is not closed.
_OPEN: WeakKeyDictionary[Viewer, InferenceWidget] = WeakKeyDictionary()


class InferenceWidget(QWidget):
    """Spike inference on the ROIs of a movie.

    ``shown`` is emitted with the ROI's id when its posterior is on the screen, ``failed`` with the sentence that tells
    why there is none, ``results_changed`` when posteriors were added or no longer hold, ``ran`` with a
    ``running.Running`` while all ROIs are inferred into a store, with None when nothing is any more.
    """

    shown = Signal(int)
    failed = Signal(str)
    results_changed = Signal()
    ran = Signal(object)

    @classmethod
    def of(cls, viewer: Viewer) -> InferenceWidget:
        """The widget of this viewer; it is opened if it is not."""
        if viewer not in _OPEN:
            # Its constructor enters itself.
            viewer.window.add_plugin_dock_widget("napari-calvae", "spike inference")
        return _OPEN[viewer]

    def __init__(self, napari_viewer: Viewer):
        super().__init__()
        self._viewer = napari_viewer
        self._closed = self._attached = False
        self._requests = answers.Requests()
        self.results = answers.Results()
        self._asked: answers.Key | None = None
        self._chosen: tuple[Layer | None, ...] = (None, None)
        self._plane, self._follows_movie = 0, True
        self.picked_roi: int | None = None
        self.controls, self.plots = Controls(), PosteriorPlots()
        self.controls.restore(remembering.read())
        self.recovery = RecoveryBar()
        row = QHBoxLayout()
        row.addWidget(self.controls)
        row.addWidget(self.plots, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 4, 4, 2)
        layout.addWidget(self.recovery)
        layout.addLayout(row, 1)
        self.setMinimumHeight(HEIGHT)
        # The dock grows for pinned cells, so that the picked one stays legible.
        pinned = self.plots.pinned
        pinned.changed.connect(lambda: self.setMinimumHeight(HEIGHT_PINNED if pinned.cells else HEIGHT))
        self._clicked, self._batch = Worker(self), Batch(self, self.controls)
        self._follower = Follower(self)
        self.choices = Choices(self.controls, napari_viewer)
        self._placing = Placing(self, napari_viewer, self.controls, self.choices)
        self._outline = picking.Outline(napari_viewer)
        self._outlined: tuple[np.ndarray, Image] | None = None
        self._outline_timer = QTimer(self)
        self._outline_timer.setSingleShot(True)
        self._outline_timer.timeout.connect(self._draw_outline)
        self._doubt_timer = QTimer(self)
        self._doubt_timer.setSingleShot(True)
        self._doubt_timer.timeout.connect(self._tell_doubts)
        self.overlays = Overlays(self, napari_viewer, self.plots, self.choices, self.results)
        self._manners = DockManners(self, HEIGHT, leave=self.detach, stay=self.attach, gone=self.close_down)
        self._connect()
        self._on_theme()
        self.controls.say("Click a ROI to see its spikes.")
        self._on_layers()
        self._clicked.start(answers.iter_ready())
        self.recovery.offer()
        _OPEN[napari_viewer] = self

    def _connect(self) -> None:
        controls = self.controls
        controls.layers_chosen.connect(self._on_layers_chosen)
        controls.frame_rate_typed.connect(self._on_frame_rate_typed)
        controls.changed.connect(self._again)
        controls.infer_all.clicked.connect(self.infer_all)
        controls.cancel.clicked.connect(self.cancel)
        self.plots.picked.connect(self._on_moment_picked)
        for signal in (self.results_changed, controls.changed, controls.frame_rate_typed):
            signal.connect(self.overlays.on_results_changed)
        self.overlays.failed.connect(lambda sentence: self.controls.say(sentence, error=True))
        self._clicked.message.connect(self._on_message)
        self._batch.answered.connect(self._on_many)
        self._batch.found.connect(self._on_found)
        self._batch.ran.connect(self._on_ran)
        self._batch.failed.connect(self._fail)
        self._placing.placed.connect(self._try)
        self._placing.failed.connect(self._fail)
        self._follower.edited.connect(self._on_edited)
        controls.resized.connect(self._on_resized)
        controls.left_at.connect(remembering.write)
        self.recovery.recovered.connect(self._on_recovered)
        get_qapp().aboutToQuit.connect(self.close_down)
        self.attach()

    def _viewer_slots(self) -> list[tuple]:
        layers, viewer = self._viewer.layers.events, self._viewer
        return [
            (layers.inserted, self._on_layers),
            (layers.removed, self._on_layers),
            (layers.renamed, self._on_layers),
            (viewer.dims.events.point, self._on_slider),
            (viewer.events.theme, self._on_theme),
        ]

    # Picking and inferring

    def pick(self, position: np.ndarray) -> None:
        """Do what a click at this world position asks for."""
        try:
            self.choices.settings()
            session.check_view(self._viewer.dims.displayed, self._viewer.dims.ndim)
            movie = self.choices.chosen_movie()
            place = np.asarray(movie.world_to_data(position))[-2:]
            inside = all(-0.5 <= p < n - 0.5 for p, n in zip(place, self.choices.frames.shape[-2:], strict=True))
            if not inside:
                return
            click = float(place[0]), float(place[1])
            labels = self.choices.labels()
            if (roi := session.roi_at(labels, click)) is not None:
                self.ask(roi)
            elif not self.controls.place.isChecked():
                if not labels.any():
                    self.choices.rois()  # says what is missing
                self.controls.say("No ROI here. Click one, or tick “click adds a disc”.")
            else:
                self._placing.place(click)
        except (calvae.RecordingError, ValueError) as error:
            self._fail(session.explain(error))

    def ask(self, roi: int) -> None:
        """Show the posterior of a ROI: at once if it is known, else as soon as it has been inferred."""
        key, labels, masks = self.choices.rois()
        if roi not in key.marks:
            raise session.NoRois(session.gone(roi, self.choices.n_planes, key.plane))
        self._placing.give_up()  # the newest click counts
        number = self._requests.new()
        self.picked_roi, self._asked = roi, key
        known = self.results.get(key, roi)
        if known is not None:
            self._clicked.stop()
            self._mark(roi, labels)
            self._show(known)
            return
        self.plots.set_outdated()
        self.controls.say(f"ROI {roi}: reading and inferring …")
        request = answers.Request(number, self.choices.frames, masks, (roi,), key.settings)
        self._clicked.start(answers.iter_answers(request))
        self._mark(roi, labels)

    def use_model(self, path: str) -> None:
        """Infer with the model in this file from now on; what is shown is inferred again."""
        self.controls.choose_file(path)
        self.results.forget()  # the file may hold another model than when it was used last
        self.results_changed.emit()
        self._again()

    def infer_all(self) -> None:
        """Infer all ROIs of the plane that are not known yet."""
        try:
            key, _, masks = self.choices.rois()
            known = self.results.known(key)
            left_out = self.choices.unanswerable(masks)
            wanted = tuple(roi for roi in masks.ids if roi not in known and roi not in left_out)
            if not wanted:
                drawn = f" {len(left_out)} were drawn or edited and need the movie." if left_out else ""
                self.controls.say(f"All {len(known)} ROIs are inferred already: click any of them.{drawn}")
                return
            self._batch.start(key, self.choices.frames, masks, wanted)
        except (calvae.RecordingError, ValueError) as error:
            self._fail(session.explain(error))

    def infer_into(self, out: str | Path, scheduler: str | None = None) -> bool:
        """Infer all ROIs into a store (``.zarr``), here or on a cluster; what is in it already is not done again.

        Returns whether that was begun.
        """
        try:
            key, _, masks = self.choices.rois()
            given = self.choices.traces
            planes = [(key, masks)] if given is None else self.choices.planes()
            targets = [(k, set(m.ids) if given is None else given.unedited(m, k.plane)) for k, m in planes]
            request = answers.Request(0, self.choices.frames, masks, masks.ids, key.settings)
            self._batch.run(targets, running.Order(request, Path(out).expanduser().absolute(), scheduler))
        except (calvae.RecordingError, ValueError) as error:
            self._fail(session.explain(error))
            return False
        return True

    def cancel(self) -> None:
        """Stop inferring all ROIs; what was inferred stays."""
        self._batch.stop()
        self.controls.say(f"Cancelled. {len(self.results.rows)} ROIs are inferred.")

    def _on_message(self, message: answers.Message) -> None:
        if isinstance(message, answers.Ready):
            self.controls.set_models(message.models)
            self.controls.set_devices(message.devices, message.device)
        elif isinstance(message, answers.Failure) and message.number == 0:
            self._fail(message.sentence)
        elif not self._requests.wants(message.number):
            return
        elif isinstance(message, answers.Answer) and self._asked is not None:
            self._keep(self._asked, message.inference)
            self._show(answers.one_roi(message.inference, 0))
        elif isinstance(message, answers.Found) and self._asked is not None:
            self._on_found([(self._asked, set(self._asked.marks))], message)
            if self.picked_roi is not None and (known := self.results.get(self._asked, self.picked_roi)) is not None:
                self._show(known)
        elif isinstance(message, answers.Failure):
            self._show_nothing()
            self._fail(message.sentence)

    def _on_found(self, targets: Sequence[tuple[answers.Key, set[int]]], message: answers.Found) -> None:
        """Keep what is in a store, as far as it is of the ROIs that were asked for; it is read ROI by ROI."""
        if not self._still_holds(targets[-1][0]):
            return  # it is in the store all the same
        ids = message.results.roi_ids
        for key, rois in targets:
            self.results.add(key, message.results, {ids[row]: row for row in message.rows if ids[row] in rois})
        self._on_kept()

    def _on_ran(self, state: running.Running | None) -> None:
        if state is not None:
            self.controls.say(state.words)
        self.ran.emit(state)

    def _on_many(self, key: answers.Key, inference: calvae.SpikeInference) -> None:
        """Keep a part of the answer for all ROIs; those edited meanwhile are told apart by their marks."""
        if not self._still_holds(key):
            self.cancel()
            self.controls.say("Movie or settings changed while all ROIs were being inferred: stopped.", error=True)
            return
        self._keep(key, inference)
        self.controls.say(f"{len(self.results.rows)} ROIs inferred in {self._batch.seconds:.1f} s: click any of them.")

    def _keep(self, key: answers.Key, inference: calvae.SpikeInference) -> None:
        self.results.add(key, inference)
        self._on_kept()

    def _on_kept(self) -> None:
        if self.choices.roi_layer is not None:
            self.choices.roi_layer.metadata[writing.KEY] = writing.Results(self, self.choices.roi_layer)
        self.results_changed.emit()

    def _still_holds(self, key: answers.Key) -> bool:
        try:
            now = self.choices.rois()[0]
        except session.NoRois:
            return True
        except (calvae.RecordingError, ValueError):
            return False
        return (now.movie, now.settings) == (key.movie, key.settings)

    def _again(self) -> None:
        if self.picked_roi is not None:
            self._try(self.picked_roi)

    def _try(self, roi: int) -> None:
        try:
            self.ask(roi)
        except session.NoRois as error:
            self._let_go(str(error))
        except (calvae.RecordingError, ValueError) as error:
            self._show_nothing()
            self._fail(session.explain(error))

    def _on_edited(self) -> None:
        """ROIs, movie or plane are not what they were: what was picked is inferred again if that concerns it."""
        if not self.controls.frame_rate.isModified():  # else somebody is typing one
            self.controls.show_frame_rate(self.choices.frame_rate())
        try:
            key = self.choices.rois()[0]
        except session.NoRois as error:
            if self.picked_roi is not None:
                self._let_go(str(error))
            self.results_changed.emit()
            return
        except (calvae.RecordingError, ValueError) as error:
            if self.picked_roi is not None:
                self._show_nothing()
                self.controls.say(session.explain(error), error=True)
            self.results_changed.emit()
            return
        self.results.known(key)
        self.results_changed.emit()
        roi = self.picked_roi
        if roi is not None and roi not in key.marks:
            self._let_go(session.gone(roi, self.choices.n_planes, key.plane))
        elif roi is not None and (self._asked is None or self._asked.of(roi) != key.of(roi)):
            self._again()

    def _let_go(self, sentence: str) -> None:
        """The picked ROI is no longer there: show nothing, and say why."""
        self.picked_roi = None
        self._show_nothing()
        self._outline_timer.stop()
        self._outline.remove()
        self.controls.say(sentence, error=True)

    def _show_nothing(self) -> None:
        """Neither what is shown nor what is on its way is the posterior of what is picked now."""
        self._requests.new()
        if self._asked is not None:  # or it is still warming up, for whatever will be asked first
            self._clicked.stop()
        self._asked = None
        self._doubt_timer.stop()
        self.plots.clear()
        self.overlays.on_shown()

    def _on_resized(self) -> None:
        if isinstance(self.choices.roi_layer, Points):
            self._follower.touch()

    # What is shown

    def _mark(self, roi: int, labels: np.ndarray) -> None:
        """Highlight the picked ROI, its outline when the posterior is there: a canvas without GPU takes all cores."""
        if isinstance(self.choices.roi_layer, Labels):
            self.choices.roi_layer.selected_label = roi
        self._outlined = labels == roi, self.choices.chosen_movie()
        self._outline_timer.start(OUTLINE_AFTER)

    def _draw_outline(self) -> None:
        if self._outlined is None:
            self._outline.clear()
        else:
            self._outline.show(*self._outlined)

    def _tell_doubts(self) -> None:
        """Say what looks wrong with the trace that is shown, once it has been painted and if nothing else was said."""
        picture = self.plots.picture
        if picture is None or self.controls.status.text() != readout.shown(picture):
            return
        if found := calvae.check(picture.traces):
            self.controls.say(f"ROI {picture.roi_ids[0]}: " + " ".join(f"{d.found} {d.advice}" for d in found))

    def _show(self, picture: calvae.SpikeInference) -> None:
        roi = picture.roi_ids[0]
        self.controls.show_device(answers.device_of(picture))
        self.plots.set_picture(picture, f"<b>ROI {roi}</b> &nbsp; {np.nanmean(picture.rate):.2f} spikes/s on average")
        self.overlays.on_shown()
        self._on_slider()
        self.controls.say(readout.shown(picture))
        self.shown.emit(roi)
        self._doubt_timer.start(OUTLINE_AFTER)
        if self._outline_timer.isActive():
            self._outline_timer.start(0)

    def _fail(self, sentence: str) -> None:
        self.controls.say(sentence, error=True)
        show_error(sentence)
        self.failed.emit(sentence)

    def _on_layers(self, *_: object) -> None:
        self.controls.set_layers(picking.movies(self._viewer), picking.roi_layers(self._viewer))

    def _on_layers_chosen(self) -> None:
        self._follow()
        rate, given = self.choices.frame_rate(), self.choices.traces
        before, self._chosen = self._chosen, (self.choices.movie, self.choices.roi_layer)
        if any(now is not then for now, then in zip(self._chosen, before, strict=True)):
            self._placing.give_up()
            self._show_nothing()  # the same number is another cell there
            self._outlined = None
            self._outline_timer.start(0)  # not now: napari is adding or removing layers
        self.controls.show_frame_rate(rate)
        self.controls.show_need(movie=given is None, neuropil=self.choices.real_movie is not None or given is None)
        if self.choices.movie is not None and rate.hz is None:
            self.controls.say("The file does not state the frame rate: type it in Hz to go on.", error=True)
        self._follower.touch()  # a picked ROI may be another one; many are read before the first click

    def _on_frame_rate_typed(self, text: str) -> None:
        try:
            hz = session.typed_frame_rate(text)
        except calvae.RecordingError as error:
            self.controls.show_frame_rate(self.choices.frame_rate())
            self._fail(str(error))
            return
        if self.choices.movie is not None:
            self.choices.type_frame_rate(hz)
            self.controls.show_frame_rate(self.choices.frame_rate())
            self.controls.say("Click a ROI to see its spikes.")
            self._again()

    def _on_slider(self, *_: object) -> None:
        clock, axis = self.choices.clock, self.choices.time_axis
        if clock is not None and axis >= 0:
            self.plots.set_cursor(clock.seconds(self._viewer.dims.point[axis]))
        if self.choices.plane != self._plane:
            self._plane = self.choices.plane
            self._follower.touch()

    def _on_moment_picked(self, seconds: float) -> None:
        clock = self.choices.clock
        if clock is not None and self.choices.time_axis >= 0:
            self._viewer.dims.set_point(self.choices.time_axis, clock.point(seconds))

    def _on_theme(self, *_: object) -> None:
        theme = get_theme(self._viewer.theme)
        self.plots.set_palette(Palette.on(theme.background.as_hex(), theme.text.as_hex()))

    def _on_recovered(self, leftover: Leftover) -> None:
        try:
            recover(leftover, self._viewer, self.controls, self._autosave)
        except (ValueError, OSError) as error:
            leftover.let_go()
            self._fail(session.explain(error))

    def follow_movie(self, on: bool) -> None:
        """Infer anew when the movie's data change, or do not: one that is being written changes all the time."""
        self._follows_movie = on
        if self._attached:
            self._follow()

    def _follow(self) -> None:
        self._follower.follow((self.choices.movie if self._follows_movie else None, self.choices.roi_layer))

    def attach(self) -> None:
        """Listen to the viewer."""
        if self._attached:
            return
        self._attached = True
        self._clicks = picking.Clicks(self._viewer, self.pick)
        self._autosave = Autosave(self, self._viewer, lambda: self.choices.real_movie)
        self._autosave.failed.connect(lambda sentence: self.controls.say(sentence, error=True))
        self._follow()
        for event, slot in self._viewer_slots():
            event.connect(slot)

    def detach(self) -> None:
        """Stop all work and wait for its end, let go of the viewer."""
        if not self._attached:
            return
        self._attached = False
        self._clicks.close()
        self._autosave.close()
        self._autosave.deleteLater()
        self._follower.let_go()
        for event, slot in self._viewer_slots():
            event.disconnect(slot)
        self._requests.new()
        self._placing.close()
        self._clicked.close()
        self._batch.close()

    def close_down(self) -> None:
        """Leave nothing behind; the widget is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        if _OPEN.get(self._viewer) is self:
            del _OPEN[self._viewer]
        get_qapp().aboutToQuit.disconnect(self.close_down)
        self.detach()
        self.recovery.let_go()
        self._outline_timer.stop()
        self._doubt_timer.stop()
        self.overlays.close()
        self._outline.remove()
        self.plots.dispose()
        self.deleteLater()
