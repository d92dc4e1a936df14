"""Generative models p(F | s, θ): from spikes to fluorescence."""

from __future__ import annotations

from napari_calvae.generative.base import GenerativeModel, Parameter, Theta
from napari_calvae.generative.bursts import BurstyPrior
from napari_calvae.generative.dendritic_spine import DendriticSpine
from napari_calvae.generative.dye_binding import DyeBinding
from napari_calvae.generative.indicator_kinetics import IndicatorKinetics, JGCaMP8f, JGCaMP8m
from napari_calvae.generative.linear_ar import LinearAR
from napari_calvae.generative.noise import NOISES, CorrelatedNoise, GaussianNoise, Noise, SignalDependentNoise
from napari_calvae.generative.physiological import Physiological
from napari_calvae.generative.prior import SpikePrior

#: Every model that a saved file, a form or the command line may name. Contract tests collect this.
MODELS: dict[str, type[GenerativeModel]] = {
    cls.name: cls for cls in (LinearAR, DyeBinding, Physiological, JGCaMP8f, JGCaMP8m, DendriticSpine)
}

__all__ = [
    "MODELS",
    "NOISES",
    "BurstyPrior",
    "CorrelatedNoise",
    "DendriticSpine",
    "DyeBinding",
    "GaussianNoise",
    "GenerativeModel",
    "IndicatorKinetics",
    "JGCaMP8f",
    "JGCaMP8m",
    "LinearAR",
    "Noise",
    "Parameter",
    "Physiological",
    "SignalDependentNoise",
    "SpikePrior",
    "Theta",
]
