"""Amortization gap of some cells: what refining a cell's posterior would gain, worked out when it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers, drawing
from napari_calvae._napari.session import explain
from napari_calvae._napari.stored import FromStore

logger = logging.getLogger(__name__)

#: Name of the column, its head and what it says.
COLUMN = ("amortization_gap", "gap", "What refining this cell's posterior gains (nats/s), over its busiest minute")
#: Longest stretch (s) that is refined.
LONGEST = 60.0

Rows = Mapping[int, tuple[calvae.SpikeInference | FromStore, int]]


@dataclass(frozen=True, eq=False)
class Gap:
    """Amortization gap (nats/s) of one ROI under the result that it belongs to, and how many are still to come."""

    number: int
    roi: int
    inference: calvae.SpikeInference | FromStore
    value: float
    left: int


class KnownGaps:
    """Gaps by ROI; each holds as long as the result that it was asked for is the ROI's."""

    def __init__(self) -> None:
        self._known: dict[int, Gap] = {}

    def add(self, gap: Gap) -> None:
        """Keep a gap."""
        self._known[gap.roi] = gap

    def of(self, rows: Rows) -> dict[int, float]:
        """Gaps of the ROIs whose results are still those of ``rows``."""
        return {roi: g.value for roi, g in self._known.items() if roi in rows and rows[roi][0] is g.inference}


def busiest(one: calvae.SpikeInference) -> calvae.Traces:
    """Trace of one ROI in the stretch of at most `LONGEST` seconds in which most spikes were inferred."""
    frames = min(round(LONGEST * one.frame_rate), one.rate.shape[1])
    total = np.concatenate([[0.0], np.cumsum(one.rate[0], dtype=float)])
    first = int(np.argmax(total[frames:] - total[:-frames]))
    return drawing.stretch(one, first, first + frames).traces


def iter_gaps(number: int, rows: Rows, wanted: Sequence[int], model: str) -> Iterator[Gap | answers.Failure]:
    """Gap after gap; to stop consuming is to cancel. Errors come as a ``Failure``."""
    try:
        for done, roi in enumerate(wanted, 1):
            inference, row = rows[roi]
            one = answers.one_roi(inference, row)
            amplitude = one.provenance.get("settings", {}).get("amplitude")
            found = calvae.diagnose(busiest(one), model, amplitude=amplitude)
            yield Gap(number, roi, inference, float(found.amortization_gap[0]), len(wanted) - done)
    except Exception as error:
        logger.info("refining failed", exc_info=True)
        yield answers.Failure(number, explain(error))
