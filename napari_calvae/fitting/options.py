"""What a fit can be asked for, with the words for it: read by forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from napari_calvae.fitting import DEFAULTS, Objective
from napari_calvae.generative import MODELS, NOISES, Parameter
from napari_calvae.training import TrainConfig, load_optimizer

_PLAIN = {
    "sleep": "Learns from simulated copies of this recording, whose spikes are known. No labels needed.",
    "vimco": "Explains the measured fluorescence by several weighted spike trains; slow to settle. No labels needed.",
    "wake_sleep": "Explains the fluorescence as VIMCO does, by imitating its best spike trains. No labels needed.",
    "elbo": "Explains the fluorescence by one spike train at a time: simple and fast. No labels needed.",
    "info_vae": "ELBO, with the spikes of all cells together kept like what is believed of them. No labels needed.",
    "supervised": "Learns from cells whose spikes were measured beside the fluorescence. Needs labelled spikes.",
    "semi_supervised": "Labelled spikes for some cells, and the fluorescence for all others.",
}

_LABELS = {
    "sleep": "Sleep adaptation",
    "vimco": "VIMCO",
    "wake_sleep": "Wake-sleep",
    "elbo": "ELBO",
    "info_vae": "InfoVAE",
    "supervised": "Supervised",
    "semi_supervised": "Semi-supervised",
}


@dataclass(frozen=True)
class ObjectiveOption:
    """One objective of a fit: its name for people, what it does in one line, and how it trains by default."""

    label: str
    explanation: str
    config: TrainConfig
    needs_spikes: bool


@dataclass(frozen=True)
class FitOptions:
    """What a fit can be asked for, by the names that ``fit`` takes.

    Parameters
    ----------
    objectives
        The default first.
    generative, noise
        Labels of the generative models for single cells, and of the kinds of noise.
    parameters
        Of each of those generative models and kinds of noise, the physical parameters that it brings.
    """

    objectives: Mapping[str, ObjectiveOption]
    generative: Mapping[str, str]
    noise: Mapping[str, str]
    parameters: Mapping[str, tuple[Parameter, ...]]


def fit_options() -> FitOptions:
    """Everything that ``fit`` can be asked for; afterwards the first step of a fit does not wait for imports."""
    load_optimizer()
    single = {name: cls for name, cls in MODELS.items() if not cls.coupled}
    return FitOptions(
        objectives={
            name: ObjectiveOption(_LABELS[name], _PLAIN[name], DEFAULTS[name], "supervised" in name)
            for name in get_args(Objective)
        },
        generative={name: cls.label for name, cls in single.items()},
        noise={name: cls.label for name, cls in NOISES.items()},
        parameters={name: cls.parameters for name, cls in single.items()}
        | {name: cls.parameters for name, cls in NOISES.items()},
    )
