"""Accuracy, speed and the proofs of the science, always beside a rival on the same data in the same run."""

from __future__ import annotations

from napari_calvae.benchmark.accuracy import other_rows, study, summary_rows, write_study
from napari_calvae.benchmark.ground_truth import (
    MARGIN,
    SHIFTS,
    Method,
    Piece,
    by_dataset,
    calvae_method,
    correlations,
    movie,
    oasis_method,
    prepare,
    suite2p_method,
)
from napari_calvae.benchmark.speed import speed

__all__ = [
    "MARGIN",
    "SHIFTS",
    "Method",
    "Piece",
    "by_dataset",
    "calvae_method",
    "correlations",
    "movie",
    "oasis_method",
    "other_rows",
    "prepare",
    "speed",
    "study",
    "suite2p_method",
    "summary_rows",
    "write_study",
]
