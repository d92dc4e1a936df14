"""The evidence of a trace by a particle filter that proposes from a posterior and looks ahead."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from napari_calvae.recognition.factorized import GainCategorical
from napari_calvae.refinement.target import MEMORY, Target, at_each_gain

#: A step takes successive frames until this many spikes are expected in them, and at most so many seconds.
_SPIKES, _STEP = 0.3, 0.5
#: A spike is judged by the fluorescence up to this long (s) after its step: beyond, other spikes hide it.
_AHEAD = 0.15
#: Share of the proposal that is the prior: what the posterior takes for impossible is still tried.
_DEFENSIVE = 0.05


@torch.no_grad()
def log_evidence(target: Target, posterior: GainCategorical, n: int, generator: torch.Generator) -> tuple[float, float]:
    """Log of an unbiased estimate of p(F) of one trace, and the smallest effective number of particles at any step.

    Sequential Monte Carlo (Del Moral, Doucet & Jasra 2006): ``n`` spike trains grow a few frames at a time, are
    weighted by how well they explain the fluorescence, and are drawn anew where half of them would count for nothing.
    Counts are drawn from the posterior given those before, its gain being one of the nodes of its quadrature. A spike
    shows after it happened; therefore a train is judged by the fluorescence up to 150 ms beyond its end, as if
    the posterior mean followed. That, and that fluorescence of more than some seconds ago is taken to be over, is
    undone in the last weight: it costs variance, no bias.
    """
    rate, n_frames = target.dff.frame_rate, target.observed.shape[-1]
    table, log_node = _proposal(target, posterior)
    trains = posterior.mean.expand(n, 1, n_frames).clone()
    nodes = log_node.expand(n, -1)
    log_weight, judged = torch.zeros(2, n, dtype=torch.float64).unbind()
    total, least, first, last = 0.0, float(n), 0, 0
    known = torch.zeros(n, dtype=torch.float64)
    memory = math.ceil(MEMORY * rate)
    for begin, end in _steps(posterior, rate):
        if begin - first > 2 * memory:
            first = begin - memory
            known = _explained(target, trains, first, last)
        counts, log_q, nodes = _propose(table[..., begin:end], nodes, generator)
        trains[:, 0, begin:end] = counts.to(trains.dtype)
        last = min(n_frames, end + math.ceil(_AHEAD * rate))
        explained = _explained(target, trains, first, last)
        gained = explained - known + target.prior.log_prob(trains[..., begin:end], rate)[:, 0]
        known, judged = explained, judged + gained
        log_weight = log_weight + gained - log_q
        if end == n_frames:
            log_weight = log_weight + target.log_joint(trains)[:, 0] - judged
        share = torch.softmax(log_weight, 0)
        effective = 1 / float((share**2).sum())
        least = min(least, effective)
        if effective < n / 2 or end == n_frames:
            total += float(torch.logsumexp(log_weight, 0)) - math.log(n)
            kept = _resample(share, generator)
            trains, nodes, known, judged = trains[kept], nodes[kept], known[kept], judged[kept]
            log_weight = torch.zeros_like(log_weight)
    return total, least


def _steps(posterior: GainCategorical, rate: float) -> list[tuple[int, int]]:
    """Begin and end of each step (frames)."""
    longest, n_frames = max(1, int(_STEP * rate)), posterior.logits.shape[-1]
    steps, begin, expected = [], 0, 0.0
    for frame, spikes in enumerate(posterior.mean[0].tolist()):
        expected += spikes
        if expected > _SPIKES or frame + 1 - begin >= longest or frame + 1 == n_frames:
            steps.append((begin, frame + 1))
            begin, expected = frame + 1, 0.0
    return steps


def _proposal(
    target: Target, posterior: GainCategorical
) -> tuple[Float[Tensor, "node count time"], Float[Tensor, " node"]]:
    """Log-probabilities of the counts of each frame at each gain, and of the gains."""
    table, log_node = at_each_gain(posterior)
    prior = target.prior.log_table(target.dff.frame_rate, torch.device("cpu")).double()[0, :, None]
    mixed = torch.logaddexp(table[:, 0].double() + math.log1p(-_DEFENSIVE), prior + math.log(_DEFENSIVE))
    return mixed, log_node.double()


def _propose(
    table: Float[Tensor, "node count time"], nodes: Float[Tensor, "particle node"], generator: torch.Generator
) -> tuple[Int[Tensor, "particle time"], Float[Tensor, " particle"], Float[Tensor, "particle node"]]:
    """Counts of the next frames, their log-probability given all before, and log-probabilities of the gains then."""
    chosen = torch.multinomial(nodes.exp(), 1, generator=generator)[:, 0]
    below = table.exp().cumsum(1)[:, :-1]  # node count time
    uniform = torch.rand((len(nodes), table.shape[-1]), generator=generator, dtype=table.dtype)
    counts = (uniform[:, None] > below[chosen]).sum(1)
    frames = torch.arange(table.shape[-1])
    log_p = table[:, counts, frames].sum(-1).T + nodes
    log_q = torch.logsumexp(log_p, -1)
    return counts, log_q, log_p - log_q[:, None]


def _explained(
    target: Target, trains: Float[Tensor, "particle 1 time"], first: int, last: int
) -> Float[Tensor, " particle"]:
    """Log-density of some frames' fluorescence, were there no spike before the first of them."""
    window = slice(first, last)
    log_p = target.vae.generative.log_prob(
        target.observed[:, window], trains[..., window], target.theta, target.dff.frame_rate, target.valid[:, window]
    )
    return log_p[:, 0].double()


def _resample(share: Float[Tensor, " particle"], generator: torch.Generator) -> Int[Tensor, " particle"]:
    """Indices of the particles that go on, by systematic sampling."""
    n = len(share)
    points = (torch.arange(n) + torch.rand((), generator=generator, dtype=torch.float64)) / n
    return torch.searchsorted(share.cumsum(0), points).clamp_max(n - 1)
