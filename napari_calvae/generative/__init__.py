"""Generative models p(F | s, θ): from spikes to fluorescence."""

from __future__ import annotations

from napari_calvae.generative.all_optical import AllOptical, Illumination, SparseWeights
from napari_calvae.generative.base import GenerativeModel, Parameter, Theta
from napari_calvae.generative.bursts import BurstyPrior
from napari_calvae.generative.dendritic_spine import DendriticSpine
from napari_calvae.generative.drift import DriftingNoise
from napari_calvae.generative.dye_binding import DyeBinding
from napari_calvae.generative.flow import FlowNoise
from napari_calvae.generative.indicator_kinetics import GCaMP6f, GCaMP6s, IndicatorKinetics, JGCaMP8f, JGCaMP8m
from napari_calvae.generative.linear_ar import LinearAR
from napari_calvae.generative.noise import Noise
from napari_calvae.generative.normal_noise import CorrelatedNoise, GaussianNoise, SignalDependentNoise
from napari_calvae.generative.physiological import Physiological
from napari_calvae.generative.prior import SpikePrior

#: Every model that a saved file, a form or the command line may name. Contract tests collect this.
MODELS: dict[str, type[GenerativeModel]] = {
    cls.name: cls for cls in (LinearAR, DyeBinding, Physiological, JGCaMP8f, JGCaMP8m, GCaMP6s, GCaMP6f, DendriticSpine)
}

#: Every kind of noise that a saved model may name. Contract tests collect this.
NOISES: dict[str, type[Noise]] = {
    cls.name: cls for cls in (GaussianNoise, SignalDependentNoise, CorrelatedNoise, DriftingNoise, FlowNoise)
}

#: Every prior that a saved model may name.
PRIORS: dict[str, type[SpikePrior | BurstyPrior]] = {cls.name: cls for cls in (SpikePrior, BurstyPrior)}

__all__ = [
    "MODELS",
    "NOISES",
    "PRIORS",
    "AllOptical",
    "BurstyPrior",
    "CorrelatedNoise",
    "DendriticSpine",
    "DriftingNoise",
    "DyeBinding",
    "FlowNoise",
    "GCaMP6f",
    "GCaMP6s",
    "GaussianNoise",
    "GenerativeModel",
    "Illumination",
    "IndicatorKinetics",
    "JGCaMP8f",
    "JGCaMP8m",
    "LinearAR",
    "Noise",
    "Parameter",
    "Physiological",
    "SignalDependentNoise",
    "SparseWeights",
    "SpikePrior",
    "Theta",
]
