"""What the user has chosen, as values: movie, plane, frame rate, ROIs, settings; or the sentence that asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from napari.components import ViewerModel
from napari.layers import Image, Labels, Layer

import napari_calvae as calvae
from napari_calvae._napari import answers, picking, roi_reader, session
from napari_calvae._napari.controls import Controls
from napari_calvae._napari.file_rois import KEY, FileFrames, FileTraces, time_axis


class Choices:
    """Reads the form and the chosen layers."""

    def __init__(self, controls: Controls, viewer: ViewerModel):
        self._controls, self._viewer = controls, viewer
        self._rates = picking.FrameRates()
        self._typed: WeakKeyDictionary[Layer, float] = WeakKeyDictionary()
        self._stages: WeakKeyDictionary[Layer, Image] = WeakKeyDictionary()
        self._data: tuple[object, object] = (None, None)
        self._version = 0
        self._watched: Image | None = None
        self._reader = roi_reader.RoiReader()

    @property
    def traces(self) -> FileTraces | None:
        """Traces of the chosen ROIs, if these come from a file that has them."""
        layer = self.roi_layer
        found = layer.metadata.get(KEY) if isinstance(layer, Labels) else None
        return found if isinstance(found, FileTraces) else None

    @property
    def real_movie(self) -> Image | None:
        """The chosen movie; None if the chosen ROIs have traces of their own and it cannot be that of these traces."""
        movie, given = self._controls.movie.currentData(), self.traces
        if movie is None or given is None:
            return movie
        data = movie.data[0] if movie.multiscale else movie.data
        return movie if tuple(data.shape) == given.movie_shape else None

    @property
    def movie(self) -> Image | None:
        """The chosen movie, or what stands for it, outside the viewer, where ROIs have traces of their own."""
        movie, layer, given = self.real_movie, self.roi_layer, self.traces
        if movie is not None or layer is None or given is None:
            return movie
        stage = self._stages.get(layer)
        if stage is None:
            empty = np.broadcast_to(np.uint8(0), given.movie_shape)
            stage = self._stages[layer] = Image(empty, contrast_limits=(0, 1), **time_axis(given.rate, empty.ndim))
        # It lies where the ROIs are.
        places = {"scale": (1 / (given.rate or 1.0), *layer.scale), "translate": (0.0, *layer.translate)}
        for name, place in places.items():
            if not np.array_equal(getattr(stage, name), place):
                setattr(stage, name, place)
        return stage

    def chosen_movie(self) -> Image:
        """Return the chosen movie, or raise the sentence that asks for one."""
        if self.movie is None:
            raise calvae.RecordingError(
                "Movie: expected an Image layer (time, y, x), or (time, z, y, x), with one channel, got none. "
                "Open a movie, split one of several channels, or take one from File ▸ Open Sample."
            )
        return self.movie

    @property
    def array(self) -> Any:
        """Array of the chosen movie, with all its planes, at its full resolution."""
        movie = self.chosen_movie()
        return movie.data[0] if movie.multiscale else movie.data

    @property
    def frames(self) -> Any:
        """(time, y, x) array of the plane that the viewer shows; with the ROIs' own traces, if they have any."""
        plane = session.MoviePlane(self.array, self.plane) if self.chosen_movie().ndim == 4 else self.array
        given = self.traces
        return plane if given is None else FileFrames(given, self.plane, None if self.real_movie is None else plane)

    @property
    def n_planes(self) -> int:
        """Number of planes of the chosen movie."""
        return int(self.array.shape[1]) if self.chosen_movie().ndim == 4 else 1

    @property
    def plane(self) -> int:
        """The plane that the viewer shows; 0 where there is but one."""
        movie = self.movie
        if movie is None or movie.ndim != 4:
            return 0
        nearest = round(float((self._viewer.dims.point[-3] - movie.translate[1]) / movie.scale[1]))
        return min(max(nearest, 0), self.n_planes - 1)

    @property
    def time_axis(self) -> int:
        """Axis of the viewer along which the chosen movie's time runs."""
        return self._viewer.dims.ndim - (3 if self.movie is None else self.movie.ndim)

    @property
    def roi_layer(self) -> Layer | None:
        """The chosen Labels, Shapes or Points layer."""
        return self._controls.rois.currentData()

    @property
    def clock(self) -> session.Clock | None:
        """Time of the chosen movie, if its frame rate is known."""
        movie, rate = self.movie, self.frame_rate()
        if movie is None or rate.hz is None or movie.ndim not in (3, 4):
            return None
        return session.Clock(rate.hz, self.array.shape[0], float(movie.scale[0]), float(movie.translate[0]))

    def frame_rate(self) -> session.FrameRate:
        """Frame rate of the chosen movie, or of the ROIs' own traces, and where it comes from."""
        layer, given = self.roi_layer, self.traces
        if layer is not None and given is not None:
            typed = self._typed.get(layer)
            known = given.rate is not None
            return session.FrameRate(typed or given.rate, "typed" if typed else "file" if known else "unknown")
        return session.FrameRate(None, "unknown") if self.movie is None else self._rates.of(self.movie)

    def type_frame_rate(self, hz: float) -> None:
        """Believe the user about the chosen movie, or about the ROIs' own traces."""
        if self.roi_layer is not None and self.traces is not None:
            self._typed[self.roi_layer] = hz
        else:
            self._rates.type(self.movie, hz)

    def settings(self) -> answers.Settings:
        """Everything that decides a result besides movie and ROIs."""
        session.check_movie(self.array.shape, self.chosen_movie().rgb)
        rate = self.frame_rate()
        return self._controls.settings(session.typed_frame_rate("") if rate.hz is None else rate.hz)

    @property
    def view(self) -> roi_reader.View:
        """The plane that is looked at."""
        return roi_reader.View(self.chosen_movie(), self.plane, float(self._controls.diameter.value()))

    def labels(self) -> np.ndarray:
        """(y, x) label image of the ROIs of the plane; all 0 if there are none yet."""
        layer, view = self.roi_layer, self.view
        return np.zeros(view.size, np.int32) if layer is None else self._reader.image(layer, view)

    def rois(self) -> tuple[answers.Key, np.ndarray, calvae.RoiMasks]:
        """Key of the results that hold for the present choices, the label image and the masks, all of the plane."""
        return self._rois(self.view)

    def _rois(self, view: roi_reader.View) -> tuple[answers.Key, np.ndarray, calvae.RoiMasks]:
        settings, movie, layer, given = self.settings(), self.chosen_movie(), self.roi_layer, self.traces
        if layer is None:
            raise session.NoRois(
                "ROIs: expected a Labels, Shapes or Points layer, got none. Add one, or tick “click adds a disc”."
            )
        self._watch(movie)
        if movie.data is not self._data[0] or given is not self._data[1]:
            self._data, self._version = (movie.data, given), self._version + 1
        neuropil = settings.neuropil_coefficient > 0 and given is None
        marks, labels, masks = self._reader.read(layer, view, neuropil)
        return answers.Key(marks, view.plane, self._version, settings), labels, masks

    def _watch(self, movie: Image) -> None:
        """Listen to the movie: the same array may be assigned anew after its pixels were changed in place."""
        if movie is self._watched:
            return
        if self._watched is not None:
            self._watched.events.data.disconnect(self._on_data)
        movie.events.data.connect(self._on_data)
        self._watched = movie

    def _on_data(self, *_: object) -> None:
        self._data = (None, None)

    def planes(self) -> list[tuple[answers.Key, calvae.RoiMasks]]:
        """Key and masks of every plane that has ROIs, the shown one last."""
        view, found = self.view, []
        for plane in [*(p for p in range(self.n_planes) if p != view.plane), view.plane]:
            try:
                key, _, masks = self._rois(replace(view, plane=plane))
            except session.NoRois:
                continue
            found.append((key, masks))
        return found

    def unanswerable(self, masks: calvae.RoiMasks) -> set[int]:
        """Ids of ROIs of the shown plane that were drawn or edited where there are only traces, no movie."""
        given = self.traces
        if given is None or self.real_movie is not None:
            return set()
        return set(masks.ids) - given.unedited(masks, self.plane)
