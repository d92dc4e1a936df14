"""Recognition networks q(s, θ | F): one pass from fluorescence to a distribution over spike trains."""

from __future__ import annotations

from typing import Any

from napari_calvae.recognition.amortised import ThetaEntry, ThetaPosterior
from napari_calvae.recognition.autoregressive import AutoregressiveNetwork
from napari_calvae.recognition.base import CHUNK, RecognitionNetwork, SpikePosterior
from napari_calvae.recognition.causal import CausalNetwork, CausalState
from napari_calvae.recognition.convolutional import ConvolutionalNetwork
from napari_calvae.recognition.factorized import FactorizedNetwork
from napari_calvae.recognition.spines import SpineNetwork

#: Every network that a saved model may name. Contract tests collect this.
NETWORKS: dict[str, type[RecognitionNetwork]] = {
    cls.name: cls
    for cls in (ConvolutionalNetwork, FactorizedNetwork, AutoregressiveNetwork, SpineNetwork, CausalNetwork)
}


def build_network(kind: str, config: dict[str, Any]) -> RecognitionNetwork:
    """An untrained network of ``NETWORKS`` from its ``config``, with a head for θ where that names one."""
    own = {key: value for key, value in config.items() if key != "theta"}
    network = NETWORKS[kind](**own)
    if "theta" in config:
        network.predict_theta([ThetaEntry(**entry) for entry in config["theta"]])
    return network


__all__ = [
    "CHUNK",
    "NETWORKS",
    "AutoregressiveNetwork",
    "CausalNetwork",
    "CausalState",
    "ConvolutionalNetwork",
    "FactorizedNetwork",
    "RecognitionNetwork",
    "SpikePosterior",
    "SpineNetwork",
    "ThetaEntry",
    "ThetaPosterior",
    "build_network",
]
