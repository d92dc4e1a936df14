"""A posterior whose frames are independent, from a plain stack of convolutions at the full rate.

The factorised network of DeepSpike as it was (Speiser et al. 2017, section 2.3). It has neither a view of the trace as
a whole nor a gain that frames share: the yardstick for what `FactorizedNetwork` and `AutoregressiveNetwork` add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork
from napari_calvae.recognition.factorized import GainCategorical, count_logits


class ConvolutionalNetwork(RecognitionNetwork):
    """One-dimensional convolutions, each followed by a leaky rectifier, that end in the counts of every frame.

    Parameters
    ----------
    width
        Channels of every layer.
    kernels
        Length (frames) of each layer's filters, odd.
    max_count
        Highest spike count per frame; 1 for Bernoulli spikes, as in the paper.
    """

    name: ClassVar[str] = "convolutional"

    def __init__(self, width: int = 24, kernels: Sequence[int] = (31, 21, 11, 11), max_count: int = 10) -> None:
        super().__init__()
        kernels = tuple(kernels)
        if not (max_count >= 1 and kernels and all(k % 2 for k in kernels)):
            raise ValueError(
                f"ConvolutionalNetwork: expected max_count of at least 1 and one or more odd kernels, got {max_count} "
                f"and {kernels}. Use max_count 1 for Bernoulli spikes, and kernels such as (31, 21, 11)."
            )
        self.config: dict[str, Any] = {"width": width, "kernels": list(kernels), "max_count": max_count}
        self.max_count = max_count
        self.stride = 1
        self.halo = sum(k // 2 for k in kernels)
        # The logarithm of the frame rate and its square are channels, too.
        widths = [N_FEATURES + 2, *[width] * len(kernels)]
        self.layers = nn.ModuleList(
            nn.Conv1d(a, b, k, padding=k // 2) for (a, b), k in zip(itertools.pairwise(widths), kernels, strict=True)
        )
        self.head = nn.Conv1d(width, 1 + max_count, 1)
        with torch.no_grad():
            # Start as a Poisson distribution of about one spike per second, whatever the frame rate.
            self.head.weight[1:] = 0
            cast(Tensor, self.head.bias)[:] = 0

    def summarise(self, features: Tensor, log_rate: Tensor) -> Tensor:
        """Nothing."""
        return features.new_zeros(len(features), 0)

    def local(self, features: Tensor, log_rate: Tensor, summary: Tensor) -> Tensor:
        """Log-rate (spikes/s) and residual log-weights of the counts 1, 2, …, frame by frame."""
        rate = (log_rate - math.log(30.0))[:, None, None].expand(-1, -1, features.shape[-1])
        x = torch.cat([features, rate, rate**2], 1)
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.1)
        return self.head(x)

    def summary_and_local(self, features: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
        """Summary and outputs, which share nothing."""
        summary = self.summarise(features, log_rate)
        return summary, self.local(features, log_rate, summary)

    def posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor) -> GainCategorical:
        """Independent counts: a gain that is known to be one."""
        known = torch.zeros_like(log_rate)
        return GainCategorical(count_logits(local, log_rate), known, known, n_nodes=1)
