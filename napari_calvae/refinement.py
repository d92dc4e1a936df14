"""What a network's answer for one trace leaves to be gained: a few gradient steps on that trace's own posterior.

Semi-amortized inference (Kim et al. 2018) starts from the network's answer and raises the bound on the evidence of each
trace under the model's generative model and prior. How far it rises, and how far it stays below the evidence, are the
two gaps of Cremer et al. (2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import pad

from napari_calvae.fitting.losses import MIN_RATE
from napari_calvae.generative import SpikePrior
from napari_calvae.inference import InferConfig, inference_of, provenance_of
from napari_calvae.recognition import CHUNK
from napari_calvae.recognition.factorized import GainCategorical
from napari_calvae.recording import RecordingError, SpikeInference, Traces
from napari_calvae.vae import SpikeVAE, load_model

#: A spike is taken to show for this long (s).
_MEMORY = 5.0


class RefineConfig(BaseModel):
    """How to refine; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_steps: int = Field(60, ge=0, title="Steps", description="Gradient steps per trace")
    learning_rate: float = Field(0.05, gt=0, title="Learning rate", description="Of Adam, falling along a cosine")
    n_gradient: int = Field(16, ge=2, title="Gradient samples", description="Spike trains per step")
    n_samples: int = Field(50, ge=0, le=1000, title="Samples", description="Spike trains drawn per ROI")
    n_evidence: int = Field(
        1000, ge=10, title="Evidence samples", description="Trains for the bounds and the evidence of diagnose"
    )
    seed: int = Field(0, ge=0, title="Seed", description="Of every random number")


@dataclass(frozen=True, eq=False)
class Gaps:
    """What lies between the evidence of each trace and the bound that a posterior reaches (Cremer et al. 2018, eq. 4).

    Parameters
    ----------
    roi_ids
        Of the rows.
    amortized, refined, evidence
        (roi,) nats per second: the evidence lower bound at the network's answer and after refinement, and the
        importance-weighted bound with many samples from the refined posterior, which is at most the evidence.
    amortized_error, refined_error, evidence_error
        (roi,) standard errors of these; that of the evidence by the delta method.
    effective_samples
        (roi,) effective number of samples behind the evidence; where it is small the evidence is underestimated.
    """

    roi_ids: tuple[int, ...]
    amortized: np.ndarray
    refined: np.ndarray
    evidence: np.ndarray
    amortized_error: np.ndarray
    refined_error: np.ndarray
    evidence_error: np.ndarray
    effective_samples: np.ndarray

    @property
    def amortization_gap(self) -> np.ndarray:
        """(roi,) nats per second that one network for all traces costs: refined less amortized bound."""
        return self.refined - self.amortized

    @property
    def approximation_gap(self) -> np.ndarray:
        """(roi,) nats per second that the family of posteriors costs: evidence less refined bound."""
        return self.evidence - self.refined


def refine(traces: Traces, model: str | Path | SpikeVAE = "universal", **settings: Any) -> SpikeInference:
    """Spike posterior of every trace, fitted to that trace from the network's answer on.

    Slower than ``infer`` by the number of steps. It makes the posterior agree with the model's generative model: for
    good where that describes the cell, for ill where the network knows better (on minutes of three real recordings with
    the linear model the correlation with the true rate fell by 0.01 to 0.05, while the bound rose by tens of nats/s).

    Parameters
    ----------
    traces
        Fluorescence of some ROIs; raw traces become ΔF/F as the model wants it.
    model
        Name of a shipped model, a file, or a ``SpikeVAE``; its network's posterior must be a ``GainCategorical``.
    **settings
        Fields of ``RefineConfig``.

    Raises
    ------
    RecordingError
        If no spikes can be inferred from a trace, or the posterior has no parameters of its own.
    """
    config = RefineConfig(**settings)
    target, posterior = _start(traces, model)
    refined = _refine(target, posterior, config)
    wanted = InferConfig(n_samples=config.n_samples, seed=config.seed, device="cpu")
    provenance = provenance_of(target.vae, traces, wanted, torch.device("cpu"))
    return inference_of(target.dff, target.vae, wanted, refined, provenance | {"refinement": config.model_dump()})


def diagnose(traces: Traces, model: str | Path | SpikeVAE = "universal", **settings: Any) -> Gaps:
    """Amortization gap and approximation gap of every trace, in nats per second.

    Parameters
    ----------
    traces, model, **settings
        As for ``refine``. The evidence is tight for short traces only, of tens of frames with few spikes: where
        ``Gaps.effective_samples`` is near one, the approximation gap is a lower bound on the true one.
    """
    config = RefineConfig(**settings)
    target, posterior = _start(traces, model)
    refined = _refine(target, posterior, config)
    seconds = target.valid.sum(-1).numpy() / target.dff.frame_rate
    generator = torch.Generator().manual_seed(config.seed + 1)
    before = target.log_weights(posterior, config.n_evidence, generator)
    after = target.log_weights(refined, config.n_evidence, generator)
    n = len(after)
    share = torch.softmax(after, 0)
    effective = 1 / (share**2).sum(0)
    error = {name: (x.std(0) / math.sqrt(n)).numpy() / seconds for name, x in (("before", before), ("after", after))}
    return Gaps(
        roi_ids=target.dff.roi_ids,
        amortized=before.mean(0).numpy() / seconds,
        refined=after.mean(0).numpy() / seconds,
        evidence=(torch.logsumexp(after, 0) - math.log(n)).numpy() / seconds,
        amortized_error=error["before"],
        refined_error=error["after"],
        evidence_error=(1 / effective - 1 / n).clamp_min(0).sqrt().numpy() / seconds,
        effective_samples=effective.numpy(),
    )


@dataclass(frozen=True, eq=False)
class _Target:
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

    def select(self, row: int) -> _Target:
        """One ROI."""
        one = slice(row, row + 1)
        rate = torch.as_tensor(self.prior.rate)[one]
        return _Target(
            self.dff.select([row]),
            self.vae,
            self.observed[one],
            self.valid[one],
            {name: value[one] for name, value in self.theta.items()},
            SpikePrior(rate=rate, max_count=self.prior.max_count),
        )

    def local_signal(
        self, counts: Float[Tensor, "sample roi time"], log_q: Float[Tensor, "sample roi time"]
    ) -> Float[Tensor, "sample roi time"]:
        """What each frame's count has to answer for: its own log p(s) − log q(s), and the fluorescence that follows it.

        No earlier fluorescence depends on it, and none beyond `_MEMORY` seconds noticeably. The learning signal of a
        whole trace would drown in what all its other frames have done.
        """
        rate = self.dff.frame_rate
        generative = self.vae.generative
        noise = generative.noise_std(self.theta, rate)[:, None]
        missed = self.observed.nan_to_num() - generative.fluorescence(counts, self.theta, rate)
        explained = torch.where(self.valid, -0.5 * (missed / noise) ** 2, 0).double()
        total = pad(explained.cumsum(-1), (1, 0))
        at = torch.arange(counts.shape[-1])
        later = total[..., (at + math.ceil(_MEMORY * rate)).clamp_max(len(at))] - total[..., at]
        prior = SpikePrior(torch.as_tensor(self.prior.rate)[:, None], self.prior.max_count)
        return later.to(log_q.dtype) + prior.log_prob(counts[..., None], rate) - log_q

    def log_joint(self, counts: Float[Tensor, "sample roi time"]) -> Float[Tensor, "sample roi"]:
        """Log p(F, s | θ)."""
        rate = self.dff.frame_rate
        log_p = self.vae.generative.log_prob(self.observed, counts, self.theta, rate, self.valid)
        return log_p + self.prior.log_prob(counts, rate)


def _refine(target: _Target, posterior: GainCategorical, config: RefineConfig) -> GainCategorical:
    """Each ROI by itself, from a random stream that depends on seed and ROI id alone."""
    parts = []
    for row, roi in enumerate(target.dff.roi_ids):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + roi)
        parts.append(_refine_one(target.select(row), posterior.select(slice(row, row + 1)), config, generator))
    return GainCategorical(
        torch.cat([q.logits for q in parts]),
        torch.cat([q.gain_mean for q in parts]),
        torch.cat([q.gain_std for q in parts]),
    )


def _refine_one(
    target: _Target, posterior: GainCategorical, config: RefineConfig, generator: torch.Generator
) -> GainCategorical:
    """Maximise the bound over logits, gain mean and gain deviation by Adam with a score-function gradient.

    The better of start and end is kept, by the bound on samples that no step has seen: a noisy gradient may lead down.
    """
    start = (posterior.logits, posterior.gain_mean, posterior.gain_std.clamp_min(1e-4).log())
    logits, mean, log_std = (x.detach().clone().requires_grad_() for x in start)
    optimiser = torch.optim.Adam([logits, mean, log_std], lr=config.learning_rate)
    for step in range(config.n_steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / config.n_steps))
        optimiser.param_groups[0]["lr"] = config.learning_rate * fall
        loss = _surrogate(target, logits, (mean, log_std), config.n_gradient, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    end = GainCategorical(logits.detach(), mean.detach(), log_std.detach().exp())
    seed = int(torch.randint(2**62, (), generator=generator))
    before, after = (
        target.log_weights(q, 16 * config.n_gradient, torch.Generator().manual_seed(seed)) for q in (posterior, end)
    )
    doubt = ((before.var(0) + after.var(0)) / len(after)).sqrt()
    return end if bool((after.mean(0) - before.mean(0) > 2 * doubt).all()) else posterior


def _surrogate(
    target: _Target, logits: Tensor, gain: tuple[Tensor, Tensor], n: int, generator: torch.Generator
) -> Float[Tensor, ""]:
    """Loss whose gradient is that of minus the bound, estimated: of counts given a drawn gain, and of the gain.

    The baseline of each sample is the mean signal of the others.
    """
    mean, log_std = gain
    k = torch.arange(logits.shape[1], dtype=logits.dtype)
    with torch.no_grad():
        normal = torch.randn((n, len(mean)), generator=generator)
        g = mean + log_std.exp() * normal
    table = torch.log_softmax(logits + (g[..., None] * k)[..., None], 2)  # sample roi count time
    with torch.no_grad():
        below = table.exp().cumsum(2)[:, :, :-1]
        drawn = torch.rand((n, len(mean), 1, logits.shape[-1]), generator=generator)
        counts = (drawn > below).sum(2)
    log_q = table.gather(2, counts[:, :, None]).squeeze(2)
    with torch.no_grad():
        trains = counts.to(logits.dtype)
        signal = target.local_signal(trains, log_q)
        whole = target.log_joint(trains) - GainCategorical(logits, mean, log_std.exp()).log_prob(counts)
    log_gain = -0.5 * ((g - mean) / log_std.exp()) ** 2 - log_std
    centred, whole = signal - signal.mean(0), whole - whole.mean(0)
    return -((centred * log_q).sum() + (whole * log_gain).sum()) / (n - 1)


def _start(traces: Traces, model: str | Path | SpikeVAE) -> tuple[_Target, GainCategorical]:
    """The network's posterior, and the generative model as inference would use it."""
    vae = load_model(model, coupled=False)
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
        mean = posterior.mean
        theta = vae.generative.initial_theta(observed, mean, dff.frame_rate, valid)
    theta |= {name: torch.full_like(theta[name], value) for name, value in vae.theta.items()}
    rate = (mean.mean(-1) * dff.frame_rate).clamp_min(MIN_RATE)
    prior = SpikePrior(rate=rate, max_count=vae.recognition.max_count)
    return _Target(dff, vae, observed, valid, theta, prior), posterior
