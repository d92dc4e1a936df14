"""Recognition networks q(s | F): one pass from fluorescence to a distribution over spike trains."""

from __future__ import annotations

from napari_calvae.recognition.autoregressive import AutoregressiveNetwork
from napari_calvae.recognition.base import CHUNK, RecognitionNetwork, SpikePosterior
from napari_calvae.recognition.factorized import FactorizedNetwork
from napari_calvae.recognition.spines import SpineNetwork

#: Every network that a saved model may name. Contract tests collect this.
NETWORKS: dict[str, type[RecognitionNetwork]] = {
    cls.name: cls for cls in (FactorizedNetwork, AutoregressiveNetwork, SpineNetwork)
}

__all__ = [
    "CHUNK",
    "NETWORKS",
    "AutoregressiveNetwork",
    "FactorizedNetwork",
    "RecognitionNetwork",
    "SpikePosterior",
    "SpineNetwork",
]
