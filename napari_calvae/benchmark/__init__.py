"""Accuracy, speed and the proofs of the science, always beside a rival on the same data in the same run."""

from __future__ import annotations

from napari_calvae.benchmark.ablation import ablation_rows
from napari_calvae.benchmark.accuracy import Models, other_rows, study, summary_rows, write_study
from napari_calvae.benchmark.adaptation import adaptation_rows
from napari_calvae.benchmark.amplitude import amplitude_rows
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
from napari_calvae.formats.ground_truth import read_ground_truth
from napari_calvae.pretrained.kernels import kernel_rows

__all__ = [
    "MARGIN",
    "SHIFTS",
    "Method",
    "Models",
    "Piece",
    "ablation_rows",
    "adaptation_rows",
    "amplitude_rows",
    "by_dataset",
    "calvae_method",
    "correlations",
    "kernel_rows",
    "movie",
    "oasis_method",
    "other_rows",
    "prepare",
    "read_ground_truth",
    "study",
    "suite2p_method",
    "summary_rows",
    "write_study",
]
