"""Accuracy, speed and the proofs of the science, always beside a rival on the same data in the same run."""

from __future__ import annotations

from napari_calvae.benchmark.ground_truth import (
    MARGIN,
    SHIFTS,
    Method,
    Piece,
    accuracy,
    by_dataset,
    calvae_method,
    correlations,
    coverage,
    movie,
    oasis_method,
    prepare,
)
from napari_calvae.benchmark.speed import speed

__all__ = [
    "MARGIN",
    "SHIFTS",
    "Method",
    "Piece",
    "accuracy",
    "by_dataset",
    "calvae_method",
    "correlations",
    "coverage",
    "movie",
    "oasis_method",
    "prepare",
    "speed",
]
