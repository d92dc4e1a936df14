"""Between napari's layers and the session: clicks on the canvas, new ROIs, an outline around the picked ROI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import dask.array as da
import numpy as np
from napari.components import ViewerModel
from napari.layers import Image, Labels, Layer, Points, Shapes
from napari.utils.transforms import Affine

import napari_calvae as calvae
from napari_calvae._napari import drawing, roi_layer, session

#: Marks the layers that the plugin draws itself, in their metadata.
OWN = "napari-calvae"
OUTLINE, OUTLINE_COLOUR = "picked ROI", "#ffa23a"
#: A press that moves further than this (screen pixels) is a drag.
CLICK_PIXELS = 4


class Clicks:
    """Calls ``on_click`` with the world position of each plain left click on the canvas.

    It acts on a click, not on a drag, in two dimensions, and only while the active layer pans and zooms, so that
    painting labels or drawing shapes is left alone.
    """

    def __init__(self, viewer: ViewerModel, on_click: Callable[[np.ndarray], None]):
        self._viewer = viewer
        self._on_click = on_click
        viewer.mouse_drag_callbacks.append(self._on_press)

    def close(self) -> None:
        """Listen no more."""
        if self._on_press in self._viewer.mouse_drag_callbacks:
            self._viewer.mouse_drag_callbacks.remove(self._on_press)

    def _on_press(self, viewer: ViewerModel, event: Any) -> Iterator[None]:
        active = viewer.layers.selection.active
        mode = getattr(active, "mode", "pan_zoom")
        if event.button != 1 or event.modifiers or viewer.dims.ndisplay != 2 or mode != "pan_zoom":
            return
        start = np.array(event.pos, float)
        moved = 0.0
        yield
        while event.type == "mouse_move":
            moved = max(moved, float(np.abs(np.array(event.pos, float) - start).max()))
            yield
        if moved <= CLICK_PIXELS:
            self._on_click(np.array(event.position, float))


class Outline:
    """A thin line around the picked ROI, in a Shapes layer of its own that leaves the selection as it is."""

    def __init__(self, viewer: ViewerModel):
        self._viewer = viewer
        self._layer: Shapes | None = None

    def show(self, mask: np.ndarray, movie: Image) -> None:
        """Draw around a (y, x) mask."""
        loops = [loop for loop in drawing.outlines(mask) if len(loop) > 3]
        if self._layer is not None and self._layer in self._viewer.layers:
            if len(loops) == self._layer.nshapes:
                self._layer.data = loops, "polygon"
            else:  # a ROI in several parts: napari cannot set another number of shapes with their look
                self._layer.data = []
                look = {"edge_color": OUTLINE_COLOUR, "face_color": "transparent", "edge_width": _width(mask)}
                self._layer.add(loops, shape_type="polygon", **look)
            for name, wanted in placed(movie, (-2, -1)).items():
                # Each makes napari draw again, even where it changes nothing.
                if not np.array_equal(np.asarray(getattr(self._layer, name)), np.asarray(wanted)):
                    setattr(self._layer, name, wanted)
            return
        selection = set(self._viewer.layers.selection)
        active = self._viewer.layers.selection.active
        self._layer = Shapes(
            loops,
            shape_type="polygon",
            edge_width=_width(mask),
            edge_color=OUTLINE_COLOUR,
            face_color="transparent",
            name=OUTLINE,
            metadata={OWN: True},
            **placed(movie, (-2, -1)),
        )
        self._viewer.add_layer(self._layer)
        self._layer.editable = False
        self._viewer.layers.selection = selection
        self._viewer.layers.selection.active = active

    def clear(self) -> None:
        """Draw nothing, in a layer that stays: napari holds on to those that are gone."""
        if self._layer is not None and self._layer in self._viewer.layers:
            self._layer.data = []

    def remove(self) -> None:
        """Take the outline away."""
        if self._layer is not None and self._layer in self._viewer.layers:
            self._viewer.layers.remove(self._layer)
        self._layer = None


def to_world(layer: Layer, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) matrix and (n,) offset that lead from a layer's data to the world, along its last ``n`` axes."""
    own = Affine(scale=layer.scale, translate=layer.translate, rotate=layer.rotate, shear=layer.shear, ndim=layer.ndim)
    matrix = layer.affine.affine_matrix @ own.affine_matrix
    return matrix[-n - 1 : -1, -n - 1 : -1], matrix[-n - 1 : -1, -1]


def placed(movie: Image, axes: Sequence[int]) -> dict[str, Any]:
    """Where these axes of a movie lie, as arguments of a layer that is to lie on it."""
    axes = [axis % movie.ndim for axis in axes]
    among = np.ix_(axes, axes)
    return {
        "scale": movie.scale[axes],
        "translate": movie.translate[axes],
        "rotate": movie.rotate[among],
        "shear": Affine(shear=movie.shear, ndim=movie.ndim).linear_matrix[among],
        "affine": movie.affine.set_slice(axes),
    }


def _width(mask: np.ndarray) -> float:
    """Width (pixels) of the line around the picked ROI."""
    return max(0.45, 0.005 * min(mask.shape))


def movies(viewer: ViewerModel) -> list[Image]:
    """Image layers that may be movies, the one of most frames first, of equals the one on top.

    Projections, label images, colours and channels are none; what has a single frame may still grow.
    """
    found = [
        layer
        for layer in reversed(viewer.layers)
        if isinstance(layer, Image) and OWN not in layer.metadata and layer.ndim in (3, 4) and not layer.rgb
    ]
    return sorted(found, key=lambda layer: -layer.data.shape[0])


def roi_layers(viewer: ViewerModel) -> list[Layer]:
    """Layers that may hold ROIs, the one on top first."""
    return [
        layer
        for layer in reversed(viewer.layers)
        if isinstance(layer, Labels | Points | Shapes) and OWN not in layer.metadata
    ]


def add_disc(
    viewer: ViewerModel, layer: Labels | None, movie: Image, place: Sequence[float], diameter: float, plane: int = 0
) -> Labels:
    """Add a disc ROI around a (y, x) position (pixels) to ``layer``, or to a new one; it becomes the selected label.

    Its id is new to all planes: one more than the largest, or a free one where the layer's integers end before that.
    """
    n_planes = movie.data.shape[1] if movie.ndim == 4 else 1
    new = layer is None
    if layer is None:
        shape = movie.data.shape[-2:] if n_planes == 1 else movie.data.shape[-3:]
        axes = range(movie.ndim - len(shape), movie.ndim)
        layer = Labels(
            np.zeros(shape, np.int32),
            name=session.ROI_LAYER,
            **placed(movie, axes),
        )
    elif not hasattr(layer.data, "__setitem__") or isinstance(layer.data, da.Array):
        raise calvae.RecordingError(
            "ROIs: expected a Labels layer in memory to add a disc to, got one that cannot be edited. "
            "Choose or add another one."
        )
    image = session.plane_of(layer.data, movie.data.shape[-2:], n_planes, plane)
    pixels = session.disc_at(image, place, diameter)
    lead = [0] * (layer.data.ndim - 2)
    if lead and layer.data.shape[-3] == n_planes:
        lead[-1] = plane
    roi = _new_id(layer.data)
    if new:
        viewer.add_layer(layer)
    roi_layer.forget_judgement(layer, roi)  # that of a cell that was erased
    layer.data_setitem((*(np.full(len(pixels[0]), k) for k in lead), *pixels), roi)
    layer.selected_label = roi
    return layer


def _new_id(data: Any) -> int:
    """Id that no pixel of a label image has."""
    most, largest = int(np.iinfo(data.dtype).max), int(np.max(data))
    if largest < most:
        return largest + 1
    used = np.unique(data)
    used = used[used > 0]
    gaps = np.flatnonzero(used != np.arange(1, len(used) + 1, dtype=used.dtype))
    if not len(gaps):
        raise calvae.RecordingError(
            f"ROIs: expected labels with a free id, got all {most} that {data.dtype} can hold in use. "
            "Right-click the layer, “Convert data type”, “Convert to int32”, or add another one."
        )
    return int(gaps[0]) + 1


def add_point(viewer: ViewerModel, layer: Points, movie: Image, place: Sequence[float]) -> int:
    """Add a point at a (y, x) position (pixels) of the shown plane; returns its id as a ROI."""
    world = np.array(viewer.dims.point, float)
    here = movie.world_to_data(world[-movie.ndim :])
    world[-2:] = movie.data_to_world([*here[:-2], *place])[-2:]
    layer.add(layer.world_to_data(world[-layer.ndim :]))
    return len(layer.data)


class FrameRates:
    """Frame rates of movies: as typed by the user, else as found in metadata, file or time axis."""

    def __init__(self) -> None:
        self._typed: WeakKeyDictionary[Image, float] = WeakKeyDictionary()
        self._in_file: WeakKeyDictionary[Image, float | None] = WeakKeyDictionary()

    def type(self, movie: Image, hz: float) -> None:
        """Believe the user from now on."""
        self._typed[movie] = hz

    def of(self, movie: Image) -> session.FrameRate:
        """Frame rate of a layer as it is now; its file is read once."""
        if movie in self._typed:
            return session.FrameRate(self._typed[movie], "typed")
        if movie not in self._in_file and "frame_rate" not in movie.metadata:
            self._in_file[movie] = _frame_rate_in_file(movie)
        unit = str(movie.units[0]) if movie.units else ""
        return session.find_frame_rate(movie.metadata, float(movie.scale[0]), unit, self._in_file.get(movie))


def _frame_rate_in_file(movie: Image) -> float | None:
    path = movie.source.path
    if path is None:
        return None
    try:
        return calvae.read_movie(path)[1]
    except (OSError, ValueError):  # not a file that we read: napari did
        return None
