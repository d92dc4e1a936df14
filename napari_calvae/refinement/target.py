"""What refinement is measured by: the joint density of one recording's fluorescence and spikes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.fitting.losses import MIN_RATE, mean_rate
from napari_calvae.generative import SpikePrior
from napari_calvae.inference import with_amplitude
from napari_calvae.recognition import CHUNK
from napari_calvae.recognition.factorized import GainCategorical
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.vae import SpikeVAE, shared_model

#: Standard deviation of the logarithm of an amplitude that is that of the very cell.
_KNOWN = 0.15
#: A spike is taken to show for this long (s).
MEMORY = 5.0


@dataclass(frozen=True, eq=False)
class Target:
    """What the bound is on: p(F | s, θ) p(s) of each trace, θ and prior rate fixed at what the network's spikes say."""

    dff: Traces
    vae: SpikeVAE
    observed: Float[Tensor, "roi time"]
    valid: Bool[Tensor, "roi time"]
    theta: Mapping[str, Tensor]
    prior: SpikePrior

    @torch.no_grad()
    def log_weights(
        self, posterior: GainCategorical, n: int, generator: torch.Generator
    ) -> Float[Tensor, "sample roi"]:
        """Log p(F, s) − log q(s) of ``n`` trains from q, in portions."""
        portion = max(1, 4_000_000 // self.observed.numel())
        parts = []
        for start in range(0, n, portion):
            counts = posterior.sample(min(portion, n - start), generator).to(self.observed.dtype)
            parts.append(self.log_joint(counts) - posterior.log_prob(counts))
        return torch.cat(parts)

    def local_signal(
        self, counts: Float[Tensor, "sample roi time"], log_q: Float[Tensor, "sample roi time"]
    ) -> Float[Tensor, "sample roi time"]:
        """What each frame's count has to answer for: its own log p(s) − log q(s), and the fluorescence that follows it.

        No earlier fluorescence depends on it, and none beyond `MEMORY` seconds noticeably. The learning signal of a
        whole trace would drown in what all its other frames have done. Where the noise is not independent and of one
        size, this guides less well than it might; a drift is taken off first.
        """
        rate, theta, generative = self.dff.frame_rate, self.theta, self.vae.generative
        residual, expected, measured = generative.residual(self.observed, counts, theta, rate, self.valid)
        missed = residual - generative.noise.drift(residual, expected, theta, rate, measured)
        std = generative.noise_std(theta, rate)[:, None]
        explained = torch.where(measured, -0.5 * (missed / std) ** 2, 0).double()
        total = pad(explained.cumsum(-1), (1, 0))
        at = torch.arange(counts.shape[-1])
        later = total[..., (at + math.ceil(MEMORY * rate)).clamp_max(len(at))] - total[..., at]
        prior = SpikePrior(torch.as_tensor(self.prior.rate)[:, None], self.prior.max_count)
        return later.to(log_q.dtype) + prior.log_prob(counts[..., None], rate) - log_q

    def log_joint(self, counts: Float[Tensor, "sample roi time"]) -> Float[Tensor, "sample roi"]:
        """Log p(F, s | θ)."""
        rate = self.dff.frame_rate
        log_p = self.vae.generative.log_prob(self.observed, counts, self.theta, rate, self.valid)
        return log_p + self.prior.log_prob(counts, rate)


def begin(
    traces: Traces, model: str | Path | SpikeVAE, amplitude: float | None = None
) -> tuple[Target, GainCategorical]:
    """The network's posterior, and the generative model with each cell's parameters estimated from it.

    An ``amplitude`` (ΔF/F) that is known is that of all cells.
    """
    vae = shared_model(model, coupled=False)
    dff = vae.preprocessing.apply(traces)
    observed, valid = torch.from_numpy(dff.values.copy()), torch.from_numpy(dff.valid.copy())
    vae.recognition.to("cpu").eval()
    with torch.no_grad():
        posterior = vae.recognition(observed, dff.frame_rate, valid, chunk=CHUNK)
        if not isinstance(posterior, GainCategorical):
            raise RecordingError(
                f"refinement: expected a network whose posterior is categorical with a gain (factorized), got "
                f"{vae.recognition.name!r}, whose posterior has no parameters of its own per trace. Use another model."
            )
        if amplitude is not None:
            told = (amplitude, _KNOWN)
            posterior = with_amplitude(posterior, vae, (observed, valid, dff.frame_rate), told)
            vae = replace(vae, theta={**vae.theta, "amplitude": amplitude})
        mean = posterior.mean
        theta = vae.generative.initial_theta(observed, mean, dff.frame_rate, valid)
    theta |= {name: torch.full_like(theta[name], value) for name, value in vae.theta.items()}
    rate = mean_rate(mean, valid, dff.frame_rate).clamp_min(MIN_RATE)
    prior = SpikePrior(rate=rate, max_count=vae.recognition.max_count)
    return Target(dff, vae, observed, valid, theta, prior), posterior


def at_each_gain(
    posterior: GainCategorical,
) -> tuple[Float[Tensor, "node roi count time"], Float[Tensor, " node"]]:
    """Log-probabilities of each frame's count at the gains of the posterior's quadrature, and of those gains."""
    gains, probability = posterior._nodes()
    return torch.log_softmax(torch.stack([posterior.at_gain(g) for g in gains]), 2), probability.log()
