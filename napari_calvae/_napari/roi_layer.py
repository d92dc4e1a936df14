"""What judging leaves on the ROI layer: verdicts in its features, saved with it, and colours, taken back in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from napari.layers import Labels, Layer
from napari.utils.colormaps import DirectLabelColormap, ensure_colormap

from napari_calvae._napari import judging

#: Perceptually uniform, told apart by colour-blind readers.
SCALE = "viridis"
UNKNOWN = (0.55, 0.58, 0.62, 0.6)
VERDICTS = {judging.ACCEPTED: "#35c9b5", judging.REJECTED: "#e8590c", judging.UNJUDGED: "#8b939e"}
#: Opacity of coloured ROIs, at least: colours are to be read.
OPACITY = 0.75


def scale_colours(places: np.ndarray) -> np.ndarray:
    """(…, RGBA) colours, 0 to 1, of places on the colour scale; grey where unknown."""
    flat = np.nan_to_num(np.asarray(places, float)).ravel()
    colours = np.array(ensure_colormap(SCALE).map(flat), float).reshape(*np.shape(places), 4)
    colours[~np.isfinite(places)] = UNKNOWN
    return colours


def read_judgements(layer: Labels) -> dict[int, judging.Judgement]:
    """Judgements in the layer's features."""
    features = layer.features
    ids = features.get("index", features.index)
    found = {}
    for place, roi in enumerate(ids):
        verdict, note = (_text(features, name, place) for name in ("verdict", "note"))
        judgement = judging.Judgement(verdict if verdict in judging.SHOW.values() else judging.UNJUDGED, note)
        if judgement != judging.Judgement():
            found[int(roi)] = judgement
    return found


def _text(features: pd.DataFrame, name: str, place: int) -> str:
    value = features[name].iloc[place] if name in features else ""
    return value if isinstance(value, str) else ""


def write_judgements(layer: Labels, rois: Sequence[int], judged: judging.Judgements) -> None:
    """Put the judgements of ``rois`` into the layer's features, by label; what else is there stays."""
    features = layer.features
    if "index" not in features:
        features = features.assign(index=np.arange(len(features)))  # so napari reads features without an index
    features = features.drop_duplicates("index").set_index("index")
    features = features.reindex(features.index.union(pd.Index(rois, dtype=int)))
    mine = {roi: judged.of(int(roi)) for roi in features.index}
    features = features.assign(
        verdict=[judgement.verdict for judgement in mine.values()], note=[judgement.note for judgement in mine.values()]
    )
    layer.features = features.rename_axis("index").reset_index()


class Listening:
    """Calls back when the ROIs of a layer or its features change."""

    def __init__(self, layer: Layer, on_rois: Callable[..., None], on_features: Callable[..., None]):
        events = layer.events
        self._pairs: list[tuple[Any, Callable[..., None]]] = [(events.data, on_rois)]
        if isinstance(layer, Labels):
            self._pairs += [(events.paint, on_rois), (events.labels_update, on_rois), (events.features, on_features)]
        for event, slot in self._pairs:
            event.connect(slot)

    def close(self) -> None:
        """Listen no more."""
        for event, slot in self._pairs:
            event.disconnect(slot)


class Colours:
    """Colours of the ROIs of a Labels layer; what it looked like before comes back."""

    def __init__(self) -> None:
        self._layer: Labels | None = None
        self._before: dict[str, Any] = {}
        self._mine: object = None

    def paint(self, layer: Labels, colours: Mapping[int, Any]) -> None:
        """Colour ROIs by id; all others are grey."""
        if layer is not self._layer:
            self.restore()
            self._layer = layer
            self._before = {name: getattr(layer, name) for name in ("colormap", "opacity", "contour")}
            layer.opacity = max(layer.opacity, OPACITY)
            layer.contour = 0
        by_label: dict[int | None, Any] = {None: UNKNOWN, 0: "transparent"}
        layer.colormap = DirectLabelColormap(color_dict=by_label | dict(colours))
        self._mine = layer.colormap

    def restore(self) -> None:
        """Give the layer its own look back, unless somebody has given it another colormap meanwhile."""
        layer, self._layer = self._layer, None
        if layer is None:
            return
        if layer.colormap is self._mine:
            layer.colormap = self._before["colormap"]
        layer.opacity, layer.contour = self._before["opacity"], self._before["contour"]
        self._before, self._mine = {}, None
