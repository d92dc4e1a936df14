"""Results in a store as tables and colours want them: numbers of all ROIs, the rest of one ROI at a time; no Qt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari.settings import Settings

#: Results of single ROIs that are kept in memory.
_KEPT = 32
#: Rates of more values than this are not held in memory, not even to paint them.
_MOST = 1 << 26


class FromStore:
    """Results in a store that may still grow; it stands where a result stands, row by row the same ROIs.

    Of ROIs that are not among ``trusted`` (ids; by default all are) nothing is told: they were edited.
    """

    def __init__(self, store: calvae.StoredInference, trusted: Collection[int] | None = None):
        self.store = store
        #: Row by ROI id.
        self.row_of = {roi: row for row, roi in enumerate(store.roi_ids) if trusted is None or roi in trusted}
        self.quality = store.quality
        self._there = np.zeros(store.n_rois, bool)
        self._ones: OrderedDict[int, calvae.SpikeInference] = OrderedDict()

    @property
    def roi_ids(self) -> tuple[int, ...]:
        """Ids of the ROIs, row by row."""
        return self.store.roi_ids

    @property
    def n_samples(self) -> int:
        """Posterior samples per ROI."""
        return self.store.n_samples

    @property
    def frame_rate(self) -> float:
        """Frames per second (Hz)."""
        return self.store.frame_rate

    def news(self) -> list[int]:
        """Rows that have come into the store since this was asked last; those without signal are left out."""
        there = np.repeat(self.store.done, self.store.block_rois)[: self.store.n_rois]
        if (there == self._there).all():
            return []
        self.quality = self.store.quality
        vars(self).pop("rate", None)
        new = there & ~self._there & np.isfinite(self.quality["spike_rate"])
        self._there = there
        return np.flatnonzero(new).tolist()

    def one(self, row: int) -> calvae.SpikeInference:
        """Posterior of one ROI, read from the store."""
        if row not in self._ones:
            self._ones[row] = self.store.select([row])
            if len(self._ones) > _KEPT:
                self._ones.popitem(last=False)
        self._ones.move_to_end(row)
        return self._ones[row]

    def count(self, row: int) -> tuple[float, float]:
        """Posterior mean of the number of spikes, and NaN: their interval would need all samples to be read."""
        return float(self.quality["spike_rate"][row]) * self.store.n_frames / self.frame_rate, float("nan")

    @cached_property
    def rate(self) -> np.ndarray:
        """(roi, time) rates (spikes/s) of a finished store, in memory if they are not too many for that."""
        if self.store.n_rois * self.store.n_frames > _MOST:
            raise calvae.RecordingError(
                f"{self.store.path.name}: expected rates of fewer ROIs to paint, got {self.store.n_rois} ROIs of "
                f"{self.store.n_frames} frames. Look at single cells instead."
            )
        every = np.zeros((self.store.n_rois, self.store.n_frames), np.float32)
        for block in np.flatnonzero(self.store.done).tolist():
            rows = self.store.rows(block)
            every[rows] = np.nan_to_num(self.store.select(rows).rate)
        return every


def agrees(store: calvae.StoredInference, settings: Settings) -> bool:
    """Whether a store holds what would be inferred with these settings."""
    found = store.about["provenance"]["inference"]
    wanted = {"n_samples": settings.n_samples, "seed": settings.seed, "amplitude": settings.amplitude}
    return (
        not settings.own_baseline
        and store.frame_rate == settings.frame_rate
        and {name: found.get("settings", {}).get(name) for name in wanted} == wanted
        and calvae.load_model(settings.model).made(found)
    )
