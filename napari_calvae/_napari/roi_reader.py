"""The ROIs of a layer on the plane of a movie that is shown: Labels, Shapes or Points as a label image and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from napari.layers import Image, Labels, Layer, Points, Shapes

import napari_calvae as calvae
from napari_calvae._napari import session, shapes
from napari_calvae._napari.picking import to_world

#: Pixels that labels may be away from the movie: each still lies over its own pixel.
_SAME_PLACE = 0.5


@dataclass(frozen=True)
class View:
    """What is looked at: one plane of a movie, and the diameter (pixels) of discs around points."""

    movie: Image
    plane: int = 0
    diameter: float = 10.0

    @property
    def size(self) -> tuple[int, int]:
        """(y, x) of the plane."""
        height, width = self.movie.data.shape[-2:]
        return int(height), int(width)

    @property
    def n_planes(self) -> int:
        """Number of planes of the movie."""
        return int(self.movie.data.shape[1]) if self.movie.ndim == 4 else 1

    def pixels(self, layer: Layer, points: np.ndarray) -> np.ndarray:
        """(point, …) positions in the layer's data as positions in the movie's pixels, as far as both have axes."""
        n = min(layer.ndim, self.movie.ndim, 3)
        (turn, start), (movie_turn, movie_start) = to_world(layer, n), to_world(self.movie, n)
        world = np.asarray(points, float)[:, -n:] @ turn.T + start
        return np.linalg.solve(movie_turn, (world - movie_start).T).T

    def label_plane(self, layer: Labels) -> np.ndarray:
        """(y, x) label image of the plane, or the sentence that asks to put the layer where the movie is.

        Labels and movie share their pixels; elsewhere another ROI than the one on the screen would be picked.
        """
        data = layer.data[0] if layer.multiscale else layer.data
        image = session.plane_of(data, self.size, self.n_planes, self.plane)
        corners = [(0, 0), (0, self.size[1] - 1), (self.size[0] - 1, 0)]
        # On one plane of the movie: its place along time and z does not matter.
        there = [layer.data_to_world([0] * (layer.ndim - 2) + list(corner))[-2:] for corner in corners]
        start = self.movie.data_to_world([0] * self.movie.ndim)
        found = [self.movie.world_to_data([*start[:-2], *place])[-2:] for place in there]
        if np.abs(np.subtract(found, corners)).max() > _SAME_PLACE:
            raise calvae.RecordingError(
                f"ROIs: expected the labels “{layer.name}” where the movie “{self.movie.name}” is, got another "
                "position, scale or transform in y and x. In the layer list, right-click the movie and “Copy all to "
                "clipboard”, then the labels and “Apply scale/transforms from Clipboard”."
            )
        return image

    def shown(self, pixels: np.ndarray) -> bool:
        """Whether some positions (…, y, x), taken together, are on this plane; those without z are on all planes."""
        return self.n_planes == 1 or pixels.shape[1] < 3 or round(float(pixels[:, -3].mean())) == self.plane


class RoiReader:
    """The ROIs of a layer on one plane; read again only when they changed."""

    def __init__(self) -> None:
        self._mark = ""
        self._read: tuple[np.ndarray, calvae.RoiMasks] | None = None
        self._marks: dict[bool, dict[int, int]] = {}
        self._drawn: dict[tuple, np.ndarray] = {}

    def labels(self, layer: Layer, view: View) -> np.ndarray:
        """(y, x) label image of the plane; shapes and points are numbered from 1 in their order in the layer."""
        if isinstance(layer, Labels):
            return view.label_plane(layer)
        if isinstance(layer, Points):
            every = view.pixels(layer, layer.data)
            here = {k + 1: point[-2:] for k, point in enumerate(every) if view.shown(point[None])}
            return session.discs(here, view.diameter, view.size)
        return self._shapes(layer, view)

    def image(self, layer: Layer, view: View) -> np.ndarray:
        """The same, and the last one again if nothing has changed; it may be empty."""
        mark = session.fingerprint(id(layer), view.size, view.n_planes, *self._parts(layer, view))
        if mark != self._mark or self._read is None:
            image = self.labels(layer, view)
            self._mark, self._read, self._marks = mark, None, {}
            if not image.any():
                self._mark = ""
                return image
            self._read = image, calvae.RoiMasks.from_labels(image)
        return self._read[0]

    def read(self, layer: Layer, view: View, neuropil: bool) -> tuple[dict[int, int], np.ndarray, calvae.RoiMasks]:
        """Marks of the ROIs, which change with their traces, their (y, x) label image and their masks."""
        image = self.image(layer, view)
        if self._read is None or self._read[0] is not image:
            raise session.no_rois(type(layer).__name__, view.n_planes, view.plane)
        if neuropil not in self._marks:
            self._marks[neuropil] = calvae.roi_marks(self._read[1], neuropil)
        return self._marks[neuropil], *self._read

    def _shapes(self, layer: Shapes, view: View) -> np.ndarray:
        """Shapes are drawn one by one: of a thousand, only the one that was edited has to be drawn again."""
        image = np.zeros(view.size, np.int32)
        if not layer.nshapes:
            return image
        kinds = list(layer.shape_type)
        for index, kind in enumerate(kinds):
            if kind not in shapes.AREAS:
                raise calvae.RecordingError(
                    f"ROIs: expected ellipses, polygons and rectangles, got a {kind} (shape {index + 1} of the layer). "
                    "Delete it, or draw a polygon."
                )
        outlines = [np.asarray(points) for points in layer.data]
        ends = np.cumsum([len(points) for points in outlines])
        drawn: dict[tuple, np.ndarray] = {}
        places = np.split(view.pixels(layer, np.concatenate(outlines)), ends[:-1])
        for index, (kind, place) in enumerate(zip(kinds, places, strict=True)):
            if view.shown(place):
                corners = np.ascontiguousarray(place[:, -2:])
                key = kind, view.size, corners.tobytes()
                known = self._drawn.get(key)
                drawn[key] = shapes.pixels_inside(kind, corners, view.size) if known is None else known
                image.ravel()[drawn[key]] = index + 1
        self._drawn = drawn
        return image

    @staticmethod
    def _parts(layer: Layer, view: View) -> list[Any]:
        if isinstance(layer, Labels):
            return [view.label_plane(layer)]
        placed = [*to_world(layer, layer.ndim), *to_world(view.movie, view.movie.ndim), view.plane]
        if isinstance(layer, Points):
            return [np.asarray(layer.data), view.diameter, *placed]
        points = [np.asarray(points) for points in layer.data]
        together = np.concatenate(points) if points else np.empty(0)
        return [together, [len(each) for each in points], list(layer.shape_type), *placed]
