"""What the user has chosen, as values: movie, frame rate, ROIs, settings; or the sentence that says what is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
from napari.layers import Image, Layer

import napari_calvae as calvae
from napari_calvae._napari import answers, picking, session
from napari_calvae._napari.controls import Controls

#: What a result depends on: fingerprint of the ROIs, of the movie, and the settings.
Key = tuple[str, int, answers.Settings]


class Choices:
    """Reads the form and the chosen layers."""

    def __init__(self, controls: Controls):
        self._controls = controls
        self._rates = picking.FrameRates()
        self._data: object = None
        self._version = 0
        self.reader = picking.RoiReader()

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
    def frames(self) -> Any:
        """(time, y, x) array of the chosen movie, at its full resolution."""
        movie = self.chosen_movie()
        return movie.data[0] if movie.multiscale else movie.data

    @property
    def roi_layer(self) -> Layer | None:
        """The chosen Labels or Shapes layer."""
        return self._controls.rois.currentData()

    @property
    def clock(self) -> session.Clock | None:
        """Time of the chosen movie, if its frame rate is known."""
        movie, rate = self.movie, self.frame_rate()
        if movie is None or rate.hz is None or movie.ndim != 3:
            return None
        return session.Clock(rate.hz, self.frames.shape[0], float(movie.scale[0]), float(movie.translate[0]))

    def frame_rate(self) -> session.FrameRate:
        """Frame rate of the chosen movie and its source."""
        return session.FrameRate(None, "unknown") if self.movie is None else self._rates.of(self.movie)

    def type_frame_rate(self, hz: float) -> None:
        """Believe the user about the chosen movie."""
        self._rates.type(self.movie, hz)

    def settings(self) -> answers.Settings:
        """Everything that decides a result besides movie and ROIs."""
        session.check_movie(self.frames.shape, self.chosen_movie().rgb)
        rate = self.frame_rate()
        return self._controls.settings(session.typed_frame_rate("") if rate.hz is None else rate.hz)

    def rois(self) -> tuple[Key, np.ndarray, calvae.RoiMasks]:
        """Key of the results that hold for the present choices, the label image and the masks."""
        settings, movie, layer = self.settings(), self.chosen_movie(), self.roi_layer
        if layer is None:
            raise calvae.RecordingError(
                "ROIs: expected a Labels or Shapes layer, got none. Add one, or tick “click adds a disc”."
            )
        if movie.data is not self._data:
            self._data, self._version = movie.data, self._version + 1
        mark, labels, masks = self.reader.read(layer, movie)
        return (mark, self._version, settings), labels, masks
