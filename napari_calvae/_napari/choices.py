"""What the user has chosen, as values: movie, plane, frame rate, ROIs, settings; or the sentence that asks for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from napari.components import ViewerModel
from napari.layers import Image, Layer

import napari_calvae as calvae
from napari_calvae._napari import answers, picking, roi_reader, session
from napari_calvae._napari.controls import Controls


class Choices:
    """Reads the form and the chosen layers."""

    def __init__(self, controls: Controls, viewer: ViewerModel):
        self._controls, self._viewer = controls, viewer
        self._rates = picking.FrameRates()
        self._data: object = None
        self._version = 0
        self._reader = roi_reader.RoiReader()

    @property
    def movie(self) -> Image | None:
        """The chosen movie."""
        return self._controls.movie.currentData()

    def chosen_movie(self) -> Image:
        """Return the chosen movie, or raise the sentence that asks for one."""
        if self.movie is None:
            raise calvae.RecordingError(
                "Movie: expected an Image layer (time, y, x), got none. Open a movie, or File ▸ Open Sample."
            )
        return self.movie

    @property
    def array(self) -> Any:
        """Array of the chosen movie, with all its planes, at its full resolution."""
        movie = self.chosen_movie()
        return movie.data[0] if movie.multiscale else movie.data

    @property
    def frames(self) -> Any:
        """(time, y, x) array of the plane that the viewer shows."""
        return session.MoviePlane(self.array, self.plane) if self.chosen_movie().ndim == 4 else self.array

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
        """Frame rate of the chosen movie and its source."""
        return session.FrameRate(None, "unknown") if self.movie is None else self._rates.of(self.movie)

    def type_frame_rate(self, hz: float) -> None:
        """Believe the user about the chosen movie."""
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
        settings, movie, layer = self.settings(), self.chosen_movie(), self.roi_layer
        if layer is None:
            raise session.NoRois(
                "ROIs: expected a Labels, Shapes or Points layer, got none. Add one, or tick “click adds a disc”."
            )
        if movie.data is not self._data:
            self._data, self._version = movie.data, self._version + 1
        marks, labels, masks = self._reader.read(layer, self.view, settings.neuropil_coefficient > 0)
        return answers.Key(marks, self.plane, self._version, settings), labels, masks
