"""The proofs that the science owes: the paper's experiments and its neighbours', repeatable one by one.

A proof is a module of this package with one function of a `Setting` that yields the rows of its table. ``PROOFS`` names
them all; ``calvae benchmark paper`` runs them and keeps what they yield.
"""

from __future__ import annotations

from napari_calvae.benchmark.paper import (
    all_optical,
    calibration,
    exact,
    info_vae,
    kinetics,
    posteriors,
    real,
    refinement,
    residuals,
    scdf,
    spines,
)
from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.benchmark.paper.record import read_records, run, to_markdown

_ALL: tuple[Proof, ...] = (
    exact.PROOF,
    scdf.PROOF,
    posteriors.PROOF,
    real.UNSUPERVISED,
    real.LABELS,
    spines.PROOF,
    all_optical.PROOF,
    residuals.PROOF,
    kinetics.PROOF,
    info_vae.PROOF,
    refinement.PROOF,
    calibration.PROOF,
)

#: In the order in which the report shows them.
PROOFS: dict[str, Proof] = {proof.name: proof for proof in _ALL}

__all__ = ["PROOFS", "Proof", "Row", "Setting", "read_records", "run", "to_markdown"]
