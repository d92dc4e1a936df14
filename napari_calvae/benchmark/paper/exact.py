"""Everything that has an exact answer, against it: trains of at most 12 bins are enumerated.

To let a new part join: list it in ``MODELS`` or ``NETWORKS``, or add a function that yields `Check`s to ``CHECKS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from napari_calvae.benchmark.paper.base import Proof, Row, Setting
from napari_calvae.benchmark.paper.enumeration import Check, all_trains, finite_differences
from napari_calvae.benchmark.paper.exact_objectives import check_objectives
from napari_calvae.fitting.losses import MIN_RATE
from napari_calvae.generative import MODELS, NOISES, BurstyPrior, SpikePrior
from napari_calvae.recognition import NETWORKS, RecognitionNetwork, SpikePosterior, build_network
from napari_calvae.recording import Traces
from napari_calvae.refinement import diagnose
from napari_calvae.vae import SpikeVAE

#: Networks small enough to be evaluated on thousands of trains.
_SMALL: dict[str, dict[str, Any]] = {
    "convolutional": {"width": 6, "kernels": (5, 3)},
    "factorized": {"widths": (4, 6, 8)},
    "spines": {"shaft_widths": (4, 6, 8), "spine_widths": (4, 5, 6), "n_shared": 3},
    "autoregressive": {"width": 6, "hidden": 5},
    "causal": {"width": 6, "n_levels": 3, "lags": (0, 2), "lag": 2},
}
#: Bins per second of the traces: few enough that a bin may well hold a spike.
_RATE = 4.0
#: Estimates from samples may be off by this many standard errors: once in 1.7 million.
_ERRORS = 5.0


def check_gradients(setting: Setting) -> Iterator[Check]:
    """Derivatives of every model, and of every noise, for spikes and θ against central differences."""
    cases = [(name, "gaussian") for name in MODELS] + [("linear_ar", name) for name in NOISES if name != "gaussian"]
    generator = torch.Generator().manual_seed(setting.seed)
    for name, noise in cases:
        model = MODELS[name](NOISES[noise]())
        torch.manual_seed(setting.seed)
        with torch.no_grad():
            # A flow that was never fitted is a normal distribution.
            for p in model.noise.learned.double().parameters():
                p.add_(0.2 * torch.randn_like(p))
        shape = (1, 4) if setting.quick else (2, 8)
        counts = 0.3 + torch.rand(shape, dtype=torch.float64, generator=generator)
        centre = torch.tensor([p.centre for p in model.parameters], dtype=torch.float64)
        spread = torch.tensor([p.spread for p in model.parameters], dtype=torch.float64)
        u = centre + 0.3 * spread * torch.randn((shape[0], len(centre)), dtype=torch.float64, generator=generator)
        observed = torch.randn(shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            # Residuals of about the noise, or the curvature of the density would drown all else.
            theta = model.constrain(u)
            scale = model.noise_std(theta, 20.0)[:, None]
            observed = model.fluorescence(counts, theta, 20.0) + scale * observed

        def value(x: Tensor, model=model, observed=observed) -> Tensor:
            spikes, rest = x[: observed.numel()].reshape(observed.shape), x[observed.numel() :]
            theta = model.constrain(rest.reshape(len(observed), -1))
            return model.log_prob(observed, spikes, theta, 20.0).sum()

        x = torch.cat([counts.flatten(), u.flatten()]).requires_grad_()
        (gradient,) = torch.autograd.grad(value(x), x)
        with torch.no_grad():
            by_hand = finite_differences(value, x.detach())
        error = (gradient - by_hand).abs().max() / by_hand.abs().max()
        yield Check("gradient of log p(F | s, θ)", f"{name}, {noise} noise", 0, float(error), 1e-6, "relative")


def check_priors(setting: Setting) -> Iterator[Check]:
    """Priors sum to one over all trains."""
    n = 6 if setting.quick else 12
    for of, prior in (("Poisson prior", SpikePrior(2.0, 1)), ("bursty prior", BurstyPrior(0.5, 20.0, max_count=1))):
        yield _sums_to_one(of, prior.log_prob(all_trains(n, 1), _RATE).double(), 1e-5)  # rates are single precision


def check_evidence(setting: Setting) -> Iterator[Check]:
    """Evidence and posterior marginals: with nothing of the package but the response to single spikes, and by sampling.

    The response of `linear_ar` is linear, so that numpy and scipy can sum over all trains by themselves.
    """
    target = _Target(6 if setting.quick else 12)
    response = target.model.fluorescence(torch.eye(target.n, dtype=torch.float64), _unbatched(target.theta), _RATE)
    baseline = float(target.theta["baseline"])
    trains = target.trains.numpy()
    expected = baseline + trains @ (response.numpy() - baseline)
    std = float(target.theta["noise_density"]) * math.sqrt(_RATE)
    log_p = stats.norm.logpdf(target.observed.numpy(), expected, std).sum(-1)
    silent = math.exp(-target.rate / _RATE)
    log_p = log_p + (trains * math.log(1 - silent) + (1 - trains) * math.log(silent)).sum(-1)
    evidence = special.logsumexp(log_p)
    marginal = np.exp(log_p - evidence) @ trains
    # The prior's rate is in single precision: 6e-8 in each bin's log-probability.
    yield Check("evidence log p(F)", "linear_ar", len(trains), abs(float(target.evidence) - evidence), 1e-5)
    yield Check(
        "posterior marginals", "linear_ar", len(trains), float(np.abs(target.marginals.numpy() - marginal).max()), 1e-5
    )
    for name in NETWORKS:
        generator = torch.Generator().manual_seed(setting.seed)
        network = _network(name, 1, setting)
        with torch.no_grad():
            posterior = _posterior(network, target.observed)
            n = 2_000 if setting.quick else 20_000
            counts = posterior.sample(n, generator).double()
            log_w = (target.log_joint(counts[:, 0]) - posterior.log_prob(counts)[:, 0]) - target.evidence
        w = log_w.exp()
        error = (w.mean() - 1).abs() / (w.std() / math.sqrt(n))
        yield Check("evidence by importance sampling", name, len(trains), float(error), _ERRORS, "standard errors")
        share = (w / w.sum())[:, None]
        found = (share * counts[:, 0]).sum(0)
        doubt = ((share * (counts[:, 0] - found)) ** 2).sum(0).sqrt()  # delta method
        error = ((found - target.marginals).abs() / doubt).max()
        yield Check("marginals by importance sampling", name, len(trains), float(error), _ERRORS, "standard errors")


def check_networks(setting: Setting) -> Iterator[Check]:
    """Every posterior sums to one, its mean is that of all trains, and samples are as frequent as it says."""
    for name in NETWORKS:
        for n, max_count in ((4, 1), (3, 2)) if setting.quick else ((12, 1), (7, 2)):
            network = _network(name, max_count, setting)
            generator = torch.Generator().manual_seed(setting.seed)
            with torch.no_grad():
                posterior = _posterior(network, torch.randn(n, generator=generator, dtype=torch.float64).cumsum(-1))
                trains = all_trains(n, max_count)
                log_q = posterior.log_prob(trains[:, None])[:, 0]
                of = f"{name}, counts to {max_count}"
                yield _sums_to_one(of, log_q, 1e-9)
                exact = log_q.exp() @ trains
                error = float((posterior.mean[0] - exact).abs().max())
                # That of the autoregressive network is averaged over some samples, of which each is within max_count.
                n_mean = getattr(posterior, "n_mean", None)
                tolerance = 1e-9 if n_mean is None else 0.5 * max_count * _ERRORS / math.sqrt(n_mean)
                yield Check("mean", of, len(trains), error, tolerance)
                drawn = posterior.sample(1_000 if setting.quick else 20_000, generator)[:, 0].double()
                variance = log_q.exp() @ trains**2 - exact**2
                error = float(((drawn.mean(0) - exact).abs() / (variance / len(drawn)).sqrt()).max())
                yield Check("mean of samples", of, len(trains), error, _ERRORS, "standard errors")


def check_gaps(setting: Setting) -> Iterator[Check]:
    """The bounds and the evidence of ``calvae.diagnose`` on 12 bins."""
    target = _Target(12)
    network = _network("factorized", 1, setting).float()
    vae = SpikeVAE(network, target.model, SpikePrior(1.0, 1))
    traces = Traces(target.observed[None].numpy(), frame_rate=_RATE)
    n = 1_000 if setting.quick else 20_000
    gaps = diagnose(traces, vae, n_steps=20 if setting.quick else 150, n_evidence=n, seed=setting.seed)
    seconds = target.n / _RATE
    # What the model is conditioned on: θ and rate as the network's spikes have them.
    observed = torch.from_numpy(traces.values.copy())
    with torch.no_grad():
        posterior = network(observed, _RATE)
        theta = target.model.initial_theta(observed, posterior.mean, _RATE)
        prior = SpikePrior((posterior.mean.mean(-1) * _RATE).clamp_min(MIN_RATE), 1)
        trains = target.trains.float()[:, None]
        log_p = target.model.log_prob(observed, trains, theta, _RATE) + prior.log_prob(trains, _RATE)
        log_q = posterior.log_prob(trains)
        evidence = float(torch.logsumexp(log_p, 0))
        bound = float((log_q.exp() * (log_p - log_q)).sum())
    amortized, refined, found = (float(x[0]) * seconds for x in (gaps.amortized, gaps.refined, gaps.evidence))
    doubts = (gaps.amortized_error, gaps.refined_error, gaps.evidence_error)
    doubt, refined_doubt, evidence_doubt = (float(x[0]) * seconds for x in doubts)
    n_trains, unit = len(target.trains), "standard errors"
    yield Check("bound at the network's answer", "diagnose", n_trains, abs(amortized - bound) / doubt, _ERRORS, unit)
    # Its error is that between four runs: Student's t with three degrees of freedom is beyond 12.9 once in a thousand.
    yield Check("evidence", "diagnose", n_trains, abs(found - evidence) / evidence_doubt, 12.9, unit)
    excess = max(0.0, refined - evidence) / refined_doubt
    yield Check("refined bound above the exact evidence", "diagnose", n_trains, excess, _ERRORS, unit)
    loss = max(0.0, bound - refined) / refined_doubt
    yield Check("refined bound below the network's", "diagnose", n_trains, loss, _ERRORS, unit)


#: Everything that is checked, in order.
CHECKS: tuple[Callable[[Setting], Iterator[Check]], ...] = (
    check_gradients,
    check_priors,
    check_evidence,
    check_networks,
    check_objectives,
    check_gaps,
)


class _Target:
    """A trace of `linear_ar` with known θ, and everything about its spikes by enumeration of Bernoulli trains."""

    rate = 2.0

    def __init__(self, n: int) -> None:
        self.n = n
        self.model = MODELS["linear_ar"]()
        values = {"tau_rise": 0.03, "tau_decay": 0.5, "amplitude": 0.2, "baseline": 0.01, "noise_density": 0.05}
        self.theta = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        self.prior = SpikePrior(self.rate, 1)
        self.trains = all_trains(n, 1)
        truth = torch.zeros(n, dtype=torch.float64)
        truth[[1, n // 2]] = 1
        generator = torch.Generator().manual_seed(0)
        self.observed = self.model.simulate(truth, self.theta, _RATE, generator)
        log_p = self.log_joint(self.trains)
        self.evidence = torch.logsumexp(log_p, 0)
        self.marginals = (log_p - self.evidence).exp() @ self.trains

    def log_joint(self, trains: Tensor) -> Tensor:
        """(train,) log p(F, s)."""
        return self.model.log_prob(self.observed, trains, self.theta, _RATE) + self.prior.log_prob(trains, _RATE)


def _network(name: str, max_count: int, setting: Setting) -> RecognitionNetwork:
    """Random weights that make a posterior far from its start, in double precision."""
    torch.manual_seed(setting.seed)
    network = build_network(name, _SMALL.get(name, {}) | {"max_count": max_count}).double().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return network


def _posterior(network: RecognitionNetwork, trace: Tensor) -> SpikePosterior:
    """Posterior of one trace; from a network for a shaft and its spines, that of a spine alike to its shaft."""
    rows = 2 if network.coupled else 1
    return network(trace.expand(rows, -1), _RATE).select(slice(rows - 1, rows))


def _unbatched(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[None] for name, value in theta.items()}


def _sums_to_one(of: str, log_p: Tensor, tolerance: float) -> Check:
    return Check("sum over all trains", of, len(log_p), abs(float(log_p.exp().sum()) - 1), tolerance)


def _run(setting: Setting) -> Iterator[Row]:
    for check in CHECKS:
        for c in check(setting):
            yield {
                "check": c.what,
                "of": c.of,
                "trains": c.trains,
                "largest error": c.error,
                "tolerance": c.tolerance,
                "unit": c.unit,
                "holds": "yes" if c.error <= c.tolerance else "no",
            }


PROOF = Proof(
    name="exact",
    title="Exact answers on short trains",
    claim="On trains of at most 12 bins everything is enumerated: evidence, posterior marginals, normalisers of all "
    "networks and priors, values and gradients of the unsupervised objectives, and the bounds of refinement agree with "
    "it; the derivatives of all generative models, and of all noises around the linear one, agree with finite "
    "differences. Every row has to hold.",
    run=_run,
)
