"""Spike posteriors from calcium imaging: one network pass from fluorescence to what the spikes probably were.

Importing the package loads neither torch nor Qt: every name is fetched from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AllOpticalInference": "all_optical",
    "Doubt": "doubts",
    "Expectation": "expectation",
    "LiveRates": "live",
    "FitOptions": "fitting.options",
    "FrameReader": "preprocess",
    "FramesSoFar": "formats.growing",
    "GrowingMovie": "formats.growing",
    "QC": "metrics",
    "RecordingError": "recording",
    "Repetition": "inference",
    "RoiMasks": "roi_masks",
    "SpikeInference": "recording",
    "TraceSource": "trace_source",
    "Traces": "recording",
    "SpikeVAE": "vae",
    "SpineInference": "spines",
    "StoredInference": "formats",
    "Stimulation": "stimulation",
    "bin_spikes": "preprocess",
    "check": "doubts",
    "correlation_peak": "preprocess",
    "delta_f_over_f": "preprocess",
    "diagnose": "refinement",
    "expect": "expectation",
    "extract": "preprocess",
    "fit": "fitting",
    "fit_options": "fitting.options",
    "infer": "inference",
    "infer_all_optical": "all_optical",
    "infer_spines": "spines",
    "is_movie": "formats",
    "is_traces": "formats",
    "iter_all_optical": "all_optical",
    "iter_batch": "inference",
    "iter_extract": "preprocess",
    "iter_fit": "fitting",
    "iter_infer": "inference",
    "load_model": "vae",
    "models": "vae",
    "open_growing": "formats.growing",
    "open_result": "formats",
    "open_traces": "formats",
    "oasis": "benchmark.ground_truth",
    "read": "formats",
    "read_labels": "formats",
    "read_movie": "formats",
    "read_spikes": "formats",
    "read_stimulation": "formats",
    "refine": "refinement",
    "repeat": "inference",
    "roi_marks": "preprocess",
    "simulate": "simulation",
    "stream": "live",
    "write": "formats",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from napari_calvae.all_optical import AllOpticalInference, infer_all_optical, iter_all_optical
    from napari_calvae.benchmark.ground_truth import oasis
    from napari_calvae.doubts import Doubt, check
    from napari_calvae.expectation import Expectation, expect
    from napari_calvae.fitting import fit, iter_fit
    from napari_calvae.fitting.options import FitOptions, fit_options
    from napari_calvae.formats import (
        StoredInference,
        is_movie,
        is_traces,
        open_result,
        open_traces,
        read,
        read_labels,
        read_movie,
        read_spikes,
        read_stimulation,
        write,
    )
    from napari_calvae.formats.growing import FramesSoFar, GrowingMovie, open_growing
    from napari_calvae.inference import Repetition, infer, iter_batch, iter_infer, repeat
    from napari_calvae.live import LiveRates, stream
    from napari_calvae.metrics import QC
    from napari_calvae.preprocess import (
        FrameReader,
        bin_spikes,
        correlation_peak,
        delta_f_over_f,
        extract,
        iter_extract,
        roi_marks,
    )
    from napari_calvae.recording import RecordingError, SpikeInference, Traces
    from napari_calvae.refinement import diagnose, refine
    from napari_calvae.roi_masks import RoiMasks
    from napari_calvae.simulation import simulate
    from napari_calvae.spines import SpineInference, infer_spines
    from napari_calvae.stimulation import Stimulation
    from napari_calvae.trace_source import TraceSource
    from napari_calvae.vae import SpikeVAE, load_model, models


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'napari_calvae' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"napari_calvae.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
