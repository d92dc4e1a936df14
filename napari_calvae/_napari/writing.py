"""Results of the ROIs of a layer as files (File ▸ Save Selected Layers)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers, judging, roi_layer
from napari_calvae._napari.stored import FromStore

if TYPE_CHECKING:
    from napari.layers import Layer

    from napari_calvae._napari.inference_widget import InferenceWidget

#: Under this name the metadata of a layer of ROIs lead to their results.
KEY = "calvae_results"
_NONE = "Save: expected a layer of ROIs whose spikes are inferred, got none. Press “Infer all” first."


class Results:
    """Leads from a layer to its results, which live in the inference widget as long as that does."""

    def __init__(self, widget: InferenceWidget, layer: Layer):
        self._widget, self._layer = ref(widget), ref(layer)

    def __deepcopy__(self, _memo: Any) -> Results:
        return self

    def __reduce__(self) -> Any:
        return _gone, ()  # a process of its own has no such widget

    def collect(self) -> calvae.SpikeInference:
        """All that holds of these ROIs now, those of all planes, and which of them are accepted."""
        widget, layer = self._widget(), self._layer()
        if widget is None or layer is None or widget.choices.roi_layer is not layer:
            name = "this layer" if layer is None else f"“{layer.name}”"
            raise calvae.RecordingError(
                f"Save: expected {name} as the ROIs of the spike inference widget, got others. Choose it there."
            )
        rows: dict[int, tuple[calvae.SpikeInference | FromStore, int]] = {}
        plane_of: dict[int, int] = {}
        for key, _masks in widget.choices.planes():
            for roi in sorted(widget.results.known(key)):
                if roi in plane_of:
                    raise calvae.RecordingError(
                        f"Save: expected each ROI on one plane, got results of ROI {roi} on planes "
                        f"{min(plane_of[roi], key.plane)} and {max(plane_of[roi], key.plane)}. Draw the cells of every "
                        "plane with labels of their own, in a layer (z, y, x), and infer these."
                    )
                plane_of[roi], rows[roi] = key.plane, widget.results.rows[roi]
        if not rows:
            raise calvae.RecordingError(_NONE)
        return judged(joined(rows), roi_layer.read_judgements(layer))


def _gone() -> None:
    return None


def joined(rows: Mapping[int, tuple[calvae.SpikeInference | FromStore, int]]) -> calvae.SpikeInference:
    """Results by ROI id as one, in the order of the ids."""
    ids = sorted(rows)
    by_store: dict[FromStore, list[int]] = {}
    for roi in ids:
        if isinstance(inference := rows[roi][0], FromStore):
            by_store.setdefault(inference, []).append(roi)
    places = dict(rows)
    for store, members in by_store.items():  # together: its files hold many ROIs each
        found = store.store.select(np.array([rows[roi][1] for roi in members]))
        places |= {roi: (found, row) for row, roi in enumerate(members)}
        if members == ids:
            return found
    return calvae.SpikeInference.concatenate([answers.one_roi(*places[roi]) for roi in ids])


def judged(result: calvae.SpikeInference, judgements: Mapping[int, judging.Judgement]) -> calvae.SpikeInference:
    """The same result; which cells are accepted is as the judgements by ROI id have it, where they have a verdict."""
    verdicts = {roi: judgement.verdict for roi, judgement in judgements.items() if judgement.verdict}
    if not verdicts:
        return result
    before = result.traces.accepted
    accepted = np.ones(len(result.roi_ids), bool) if before is None else np.array(before, bool)
    for row, roi in enumerate(result.roi_ids):
        if roi in verdicts:
            accepted[row] = verdicts[roi] == judging.ACCEPTED
    return replace(result, traces=result.traces.replace(accepted=accepted))


class WritingError(RuntimeError):
    """There is nothing to write; napari would take a ``ValueError`` for the want of a writer and hide what it says."""


def write(path: str, _data: Any, meta: Mapping[str, Any]) -> list[str]:
    """Write the results of a layer's ROIs, all of them or nothing; what is there already is never replaced."""
    handle = meta.get("metadata", {}).get(KEY)
    try:
        if not isinstance(handle, Results):
            raise calvae.RecordingError(_NONE)
        calvae.write(handle.collect(), path)
    except calvae.RecordingError as error:
        raise WritingError(str(error)) from error
    return [str(Path(path))]
