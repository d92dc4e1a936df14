"""What judging leaves on the ROI layer: verdicts in its features, saved with it, and colours, taken back in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from napari.layers import Labels, Layer
from napari.layers.base import ActionType
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


def colours_of(table: judging.Table, judged: judging.Judgements, name: str) -> dict[int, Any] | None:
    """Colour of each ROI by verdict or by a number; None if it is to be left as it is."""
    if name == "verdict":
        return {roi: VERDICTS[judged.of(roi).verdict] for roi in table.rois}
    if table.column(name) is None:
        return None
    values = table.numbers(name)
    colours = scale_colours(judging.shades(values, judging.colour_range(values) or (0.0, 1.0)))
    return dict(zip(table.rois, colours.round(4).tolist(), strict=True))


def judged_features(rois: Sequence[int], accepted: Sequence[bool]) -> pd.DataFrame:
    """Features of a layer whose ROIs a file tells to be accepted or not."""
    told = [judging.ACCEPTED if yes else judging.REJECTED for yes in accepted]
    return pd.DataFrame({"index": list(rois), "verdict": told, "note": ""})


def read_judgements(layer: Layer) -> dict[int, judging.Judgement]:
    """Judgements in the features of a Labels, Points or Shapes layer, by ROI id."""
    features = layer.features
    # Points and shapes are numbered from 1 in their order in the layer; napari moves their rows with them.
    ids = features.get("index", features.index) if isinstance(layer, Labels) else range(1, 1 + len(features))
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


def write_judgements(layer: Layer, rois: Sequence[int], judged: judging.Judgements) -> None:
    """Put judgements into the layer's features, of ``rois`` by label, or of all points or shapes; what else stays."""
    if not isinstance(layer, Labels):
        mine = [judged.of(1 + place) for place in range(len(layer.features))]
        layer.features = layer.features.assign(
            verdict=[judgement.verdict for judgement in mine], note=[judgement.note for judgement in mine]
        )
        layer.feature_defaults = layer.feature_defaults.assign(verdict=judging.UNJUDGED, note="")
        layer.events.data.connect(_on_elements)
        return
    features = layer.features
    if "index" not in features:
        features = features.assign(index=np.arange(len(features)))  # so napari reads features without an index
    features = features.drop_duplicates("index").set_index("index")
    features = features.reindex(features.index.union(pd.Index(rois, dtype=int)))
    of = {roi: judged.of(int(roi)) for roi in features.index}
    features = features.assign(
        verdict=[judgement.verdict for judgement in of.values()], note=[judgement.note for judgement in of.values()]
    )
    layer.features = features.rename_axis("index").reset_index()


def forget_judgement(layer: Labels, roi: int) -> None:
    """Take back what was said of an id: another cell gets it."""
    judged = read_judgements(layer)
    if judged.pop(roi, None) is not None:
        write_judgements(layer, [roi], judging.Judgements(judged))


def _on_elements(event: Any) -> None:
    """Points and shapes that are added begin unjudged; napari gives them what the selected ones have."""
    layer = event.source
    if event.action != ActionType.ADDED or "verdict" not in layer.features:
        return
    features = layer.features.copy()
    for name, value in (("verdict", judging.UNJUDGED), ("note", "")):
        features.iloc[list(event.data_indices), features.columns.get_loc(name)] = value
    layer.features = features


class Listening:
    """Calls back when the ROIs of a layer or its features change."""

    def __init__(self, layer: Layer, on_rois: Callable[..., None], on_features: Callable[..., None]):
        events = layer.events
        self._pairs: list[tuple[Any, Callable[..., None]]] = [(events.data, on_rois), (events.features, on_features)]
        if isinstance(layer, Labels):
            self._pairs += [(events.paint, on_rois), (events.labels_update, on_rois)]
        for event, slot in self._pairs:
            event.connect(slot)

    def close(self) -> None:
        """Listen no more."""
        for event, slot in self._pairs:
            event.disconnect(slot)


class JudgedRois:
    """Judgements of the ROIs of one layer at a time, and the colours that they get.

    They live in the layer's features; of a Labels layer what was done and undone is remembered as long as it exists.

    Parameters
    ----------
    on_change
        Called when ROIs were edited, or when somebody else wrote verdicts into the layer.
    """

    def __init__(self, on_change: Callable[..., None]):
        self.judged = judging.Judgements()
        self._on_change = on_change
        self._layer: Layer | None = None
        self._listening: Listening | None = None
        self._writing = False
        self._rows = 0
        self._remembered: WeakKeyDictionary[Layer, judging.Judgements] = WeakKeyDictionary()
        self._colours = Colours()

    def take(self, layer: Layer | None) -> None:
        """Listen to this layer, and take over the verdicts that it holds."""
        if layer is self._layer and self._listening is not None:
            return
        self.let_go()
        if isinstance(self._layer, Labels):
            self._remembered[self._layer] = self.judged
        self._layer, self.judged = layer, judging.Judgements()
        if layer is not None:
            self._rows = len(layer.features)
            self.judged = self._remembered.get(layer, self.judged)
            self._listening = Listening(layer, self._on_change, self._on_features)
            self._on_features()

    def let_go(self) -> None:
        """Give the layer its own look back and listen to it no more."""
        if self._listening is not None:
            self._listening.close()
        self._listening = None
        self._colours.restore()

    def keep(self, judged: judging.Judgements, rois: Sequence[int]) -> None:
        """These judgements hold from now on."""
        self.judged = judged
        if self._layer is not None:
            self._writing = True
            write_judgements(self._layer, rois, judged)
            self._writing = False

    def paint(self, colours: Mapping[int, Any] | None) -> None:
        """Colour ROIs by id; None gives the layer its own look back."""
        if isinstance(self._layer, Labels) and colours is not None:
            self._colours.paint(self._layer, colours)
        else:
            self._colours.restore()

    def _on_features(self, *_: object) -> None:
        if self._writing or self._layer is None:
            return
        found = read_judgements(self._layer)
        before, self._rows = self._rows, len(self._layer.features)
        # Where points or shapes are added or deleted, others have their numbers, of which undo would speak.
        renumbered = self._rows != before and not isinstance(self._layer, Labels)
        if renumbered or found != self.judged.by_roi:
            self.judged = judging.Judgements(found)
            self._on_change()


class Colours:
    """Colours of the ROIs of a Labels layer; what it looked like before comes back."""

    def __init__(self) -> None:
        self._layer: Labels | None = None
        self._before: dict[str, Any] = {}
        self._mine: object = None
        self._colours: Mapping[int, Any] = {}

    def paint(self, layer: Labels, colours: Mapping[int, Any]) -> None:
        """Colour ROIs by id; all others are grey."""
        painted = layer is self._layer
        if painted and colours == self._colours and layer.colormap is self._mine:
            return  # drawing thousands of ROIs anew takes its time
        if not painted:
            self.restore()
            self._layer = layer
            self._before = {name: getattr(layer, name) for name in ("colormap", "opacity", "contour")}
            layer.opacity = max(layer.opacity, OPACITY)
            layer.contour = 0
        self._colours = colours
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
