"""A posterior whose frames know the spikes drawn before them, from convolutions and two recurrent networks.

The correlated network of DeepSpike (Speiser et al. 2017, section 2.3): convolutional features, a recurrent network that
reads them backwards in time, and one that runs forwards on them and on its own sampled spikes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork, SpikePosterior
from napari_calvae.recognition.recurrence import Run, Weights, differentiable, run

#: At most this many frames of all samples together go through `AutoregressivePosterior.log_prob` at once.
_BUDGET = 200_000
#: Samples of parts of ROIs that go through a step together keep a core busy.
_ROWS = 1024
#: Frames before each part on which its state forgets that it started from nothing.
RUN_UP = 128
#: Where a part's state differs by more than this from what the part before has left, it is run again.
TOLERANCE = 1e-3


class _Decoder(nn.Module):
    """Forward recurrent network: inputs and the count before in, log-odds of the next counts against none out."""

    log_factorial: Tensor

    def __init__(self, n_input: int, n_hidden: int, max_count: int) -> None:
        super().__init__()
        self.n_input, self.unknown = n_input, max_count + 1
        self.gru = nn.GRU(n_input + max_count + 2, n_hidden, batch_first=True)
        self.head = nn.Linear(n_hidden + n_input, max_count + 1)
        with torch.no_grad():
            # Start as a Poisson distribution of about one spike per second, whatever the frame rate.
            self.head.weight[1:].zero_()
            self.head.weight[0].mul_(0.1)
            self.head.bias.zero_()
        k = torch.arange(max_count + 1.0)
        self.register_buffer("log_factorial", torch.lgamma(k + 1), persistent=False)

    def project(
        self, x: Float[Tensor, "step lane input"], log_rate: Float[Tensor, " lane"]
    ) -> tuple[Weights, Float[Tensor, "step lane odds"]]:
        """The recurrence on given inputs, and what these add to the log-odds of the counts 1, 2, … against none.

        The odds are those of a Poisson distribution of rate e^{out_0} Hz, tilted by the other outputs of the head.
        """
        gru = dict(self.gru.named_parameters())
        w_x, w_count = gru["weight_ih_l0"].split([self.n_input, self.unknown + 1], 1)
        k = torch.arange(1, self.unknown, dtype=x.dtype, device=x.device)
        odds = torch.cat([k[:, None], torch.eye(len(k), dtype=x.dtype, device=x.device)], 1)
        v_hidden, v_x = (odds @ self.head.weight).split([self.gru.hidden_size, self.n_input], 1)
        poisson = odds @ self.head.bias - k * log_rate[:, None] - self.log_factorial[1:].to(x.dtype)
        from_x = x @ w_x.T + gru["bias_ih_l0"]
        return Weights(from_x, w_count.T, gru["weight_hh_l0"], gru["bias_hh_l0"], v_hidden), x @ v_x.T + poisson


class AutoregressivePosterior(SpikePosterior):
    """Counts of each frame given all counts before it: q(s) = Π_t q(s_t | s_{<t}, F).

    Memory has no end, but it fades. Long traces are worked through in parts side by side, each after a run-up on which
    its state forgets that it started from nothing; parts that overlap share the random numbers there, so that they draw
    the same spikes. Where a part's state at its beginning is still not what the part before has left, it is run again
    from that. Trains and probabilities are therefore those of one pass from the first frame to the last, to within what
    a difference of `TOLERANCE` in the recurrent state does.

    Parameters
    ----------
    inputs
        (roi, input, time) features of each frame.
    log_rate
        (roi,) logarithm of the frame rate (Hz).
    decoder
        Network that both methods run.
    segment
        Frames of a part, at least. Gradients of `log_prob` do not pass the borders of parts.
    """

    #: Samples, of seed 0, that ``mean`` is averaged over.
    n_mean: ClassVar[int] = 64

    def __init__(
        self, inputs: Float[Tensor, "roi input time"], log_rate: Float[Tensor, " roi"], decoder: _Decoder, segment: int
    ) -> None:
        self.inputs = inputs
        self.log_rate = log_rate
        self.decoder = decoder
        self.segment = segment
        self._mean: Tensor | None = None

    @property
    def mean(self) -> Float[Tensor, "roi time"]:
        """Expected spike count of each frame, estimated: conditional means averaged over 64 samples, without gradient.

        It has no closed form. The standard error is below an eighth of the standard deviation of the conditional mean.
        """
        if self._mean is None:
            generator = torch.Generator(self.inputs.device).manual_seed(0)
            self._mean = self._sample(self.n_mean, generator)[1]
        return self._mean

    def sample(self, n: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "sample roi time"]:
        """Draw ``n`` spike trains per ROI, as uint8 counts per frame."""
        if n == 0:
            return torch.zeros(
                (0, len(self.inputs), self.inputs.shape[-1]), dtype=torch.uint8, device=self.inputs.device
            )
        return self._sample(n, generator)[0]

    def draw(
        self, n: int, generator: torch.Generator | None = None
    ) -> tuple[Shaped[Tensor, "sample roi time"], Float[Tensor, "sample roi time"]]:
        """Spike trains as from `sample`, and the log-probability of each count given those before it.

        Up to ``segment`` frames one pass does both, gradient included: this is what VIMCO spends its time on.
        """
        if self.inputs.shape[-1] > self.segment:
            counts = self.sample(n, generator)
            return counts, self._score(counts.long(), torch.ones_like(counts[0], dtype=torch.bool))
        weights, offset = self._project()
        tokens, state = self._blank(weights, n)
        sampler = _Sampler(offset.detach(), self._uniform(n, generator))
        done = run(weights, tokens, state, sampler.draw, keep=torch.is_grad_enabled())
        counts = self._whole(done.tokens[1:])
        return counts.to(torch.uint8), self._chosen(weights, offset, done, counts)

    def log_prob(
        self, counts: Num[Tensor, "*sample roi time"], valid: Bool[Tensor, "roi time"] | None = None
    ) -> Float[Tensor, "*sample roi"]:
        """Log-probability of whole trains.

        Frames where ``valid`` is False are left out of the product, and what they hold is not looked at by later ones.
        """
        n_rois, n_frames = counts.shape[-2:]
        flat = counts.reshape(-1, n_rois, n_frames).long()
        low, high = (int(x) for x in flat.aminmax())
        if low < 0 or high >= self.decoder.unknown:
            raise ValueError(
                f"log_prob: expected counts from 0 to {self.decoder.unknown - 1}, got {low} to {high}. "
                "Clip them, or build the network with a larger max_count."
            )
        measured = torch.ones_like(flat[0], dtype=torch.bool) if valid is None else valid
        block = max(1, _BUDGET // (n_rois * n_frames))
        parts = [torch.where(measured, self._score(piece, measured), 0).sum(-1) for piece in flat.split(block)]
        return torch.cat(parts).reshape(counts.shape[:-1])

    def select(self, rois: slice) -> AutoregressivePosterior:
        """The same distribution for some of the ROIs."""
        part = AutoregressivePosterior(self.inputs[rois], self.log_rate[rois], self.decoder, self.segment)
        part._mean = None if self._mean is None else self._mean[rois]
        return part

    @torch.no_grad()
    def _sample(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Counts (sample, roi, time) as uint8, and conditional means averaged over the samples, (roi, time)."""
        parts = self._in_parts(n)
        weights, offset = parts._project()
        uniform = parts._uniform(n, generator)
        means = torch.empty_like(uniform)
        tokens, _ = parts._blank(weights, n)
        _settle(weights, tokens, parts._n_parts, _Sampler(offset, uniform, means))
        return parts._whole(tokens[1:]).to(torch.uint8), parts._whole(means.mean(1))

    def _score(
        self, counts: Int[Tensor, "sample roi time"], measured: Bool[Tensor, "roi time"]
    ) -> Float[Tensor, "sample roi time"]:
        """Log-probability of each count given those before it that were measured."""
        parts = self._in_parts(len(counts))
        weights, offset = parts._project()
        known = torch.where(measured, counts, self.decoder.unknown)
        before = parts._lanes(pad(known[..., :-1], (1, 0), value=self.decoder.unknown)).flatten(2)
        tokens = torch.cat([before, parts._lanes(known).flatten(2)[-1:]])
        _, state = parts._blank(weights, len(counts))
        if parts._n_parts > 1:
            state = _settle(weights, tokens, parts._n_parts)
        done = run(weights, tokens, state, keep=torch.is_grad_enabled())
        return parts._chosen(weights, offset, done, counts)

    def _in_parts(self, n: int) -> AutoregressivePosterior:
        """The same, in parts as long as still leaves work enough for each step: the longer, the less is run again."""
        size = -(-self.inputs.shape[-1] * n * len(self.inputs) // _ROWS)
        return AutoregressivePosterior(self.inputs, self.log_rate, self.decoder, max(self.segment, size))

    def _chosen(self, weights: Weights, offset: Tensor, done: Run, counts: Tensor) -> Float[Tensor, "sample roi time"]:
        odds = differentiable(weights, done) + offset.unsqueeze(1)
        log_p = torch.log_softmax(pad(odds, (1, 0)), -1)
        lanes = self._lanes(counts).flatten(2)
        return self._whole(log_p.gather(-1, lanes.unsqueeze(-1)).squeeze(-1))

    @property
    def _n_parts(self) -> int:
        return -(-self.inputs.shape[-1] // self.segment)

    def _lanes(self, x: Shaped[Tensor, "*batch time"]) -> Shaped[Tensor, "step *batch part"]:
        """Cut the last axis into parts, the last one padded with zeros."""
        size = min(self.segment, x.shape[-1])
        return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).movedim(-1, 0)

    def _whole(self, x: Shaped[Tensor, "step *sample lane"]) -> Shaped[Tensor, "*sample roi time"]:
        """Inverse of `_lanes`; a lane is a part of a ROI."""
        return x.unflatten(-1, (len(self.inputs), -1)).movedim(0, -1).flatten(-2)[..., : self.inputs.shape[-1]]

    def _project(self) -> tuple[Weights, Float[Tensor, "step lane odds"]]:
        x = self._lanes(self.inputs).transpose(-1, -2)  # step roi part input
        return self.decoder.project(x.flatten(1, 2), self.log_rate.repeat_interleave(self._n_parts))

    def _uniform(self, n: int, generator: torch.Generator | None) -> Float[Tensor, "step sample lane"]:
        shape, like = (n, len(self.inputs), self.inputs.shape[-1]), self.inputs
        drawn = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
        return self._lanes(drawn).flatten(2).contiguous()

    def _blank(self, weights: Weights, n: int) -> tuple[Tensor, Tensor]:
        """Tokens (edge, sample, lane) to be drawn, and a state (sample, lane, hidden) without memory."""
        n_steps, n_lanes, _ = weights.from_input.shape
        tokens = torch.full((n_steps + 1, n, n_lanes), self.decoder.unknown, device=weights.bias.device)
        return tokens, weights.bias.new_zeros(n, n_lanes, self.decoder.gru.hidden_size)


@dataclass(frozen=True)
class _Sampler:
    """Draws counts by inversion of their cumulative distribution.

    Parameters
    ----------
    offset
        (step, lane, odds) what the inputs add to the log-odds.
    uniform
        (step, sample, lane) random numbers.
    means
        Filled with the conditional mean of each count.
    """

    offset: Float[Tensor, "step lane odds"]
    uniform: Float[Tensor, "step sample lane"]
    means: Float[Tensor, "step sample lane"] | None = None

    def draw(self, step: int, odds: Float[Tensor, "sample lane odds"]) -> Int[Tensor, "sample lane"]:
        """Counts of one step, given the state's part of the log-odds."""
        weight = (odds + self.offset[step]).clamp_max(60).exp_()  # against 1 for no spike
        upper = weight.cumsum(-1) + 1
        total = upper[..., -1:]
        if self.means is not None:
            k = torch.arange(1.0, weight.shape[-1] + 1, dtype=weight.dtype, device=weight.device)
            self.means[step] = (weight @ k) / total[..., 0]
        return (self.uniform[step].unsqueeze(-1) * total > upper - weight).sum(-1)

    def some(self, first: int, samples: Tensor, lanes: Tensor) -> _Sampler:
        """From a step on, and of some rows: a single sample of as many lanes."""
        uniform = self.uniform[first:, samples, lanes].unsqueeze(1)
        means = None if self.means is None else torch.empty_like(uniform)
        return _Sampler(self.offset[first:, lanes], uniform, means)


@torch.no_grad()
def _settle(
    weights: Weights, tokens: Int[Tensor, "edge sample lane"], n_parts: int, sampler: _Sampler | None = None
) -> Float[Tensor, "sample lane hidden"]:
    """States before the first step of every lane, as if parts had been run one after the other.

    With ``sampler`` ``tokens`` are drawn on the way, and its means filled; without, they are known. At the latest after
    as many rounds as there are parts all agree.
    """
    n_steps, n_lanes, _ = weights.from_input.shape
    n = tokens.shape[1]
    start = weights.bias.new_zeros(n, n_lanes, weights.recurrent.shape[1])
    is_late = torch.arange(n_lanes, device=tokens.device) % n_parts > 0

    def rerun(samples: Tensor, lanes: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """States after and tokens of some rows, from a step on."""
        own = None if sampler is None else sampler.some(first, samples, lanes)
        known = tokens[first:, samples, lanes].unsqueeze(1)
        state = start[samples, lanes].unsqueeze(0)
        done = run(weights.some(first, lanes), known, state, None if own is None else own.draw, outputs=False)
        if own is not None and own.means is not None and sampler is not None and sampler.means is not None:
            sampler.means[first:, samples, lanes] = own.means.squeeze(1)
        return done.state.squeeze(0), done.tokens.squeeze(1)

    if n_parts > 1:
        samples, late = is_late.expand(n, -1).nonzero().unbind(1)
        state, drawn = rerun(samples, late - 1, max(0, n_steps - RUN_UP))
        start[samples, late], tokens[0, samples, late] = state, drawn[-1]
    done = run(weights, tokens, start, None if sampler is None else sampler.draw, outputs=False)
    end = done.state
    while True:
        apart = (end.roll(1, 1) - start).abs().amax(-1) > TOLERANCE
        apart = (apart | (tokens[-1].roll(1, 1) != tokens[0])) & is_late
        samples, lanes = apart.nonzero().unbind(1)
        if not len(lanes):
            return start
        start[samples, lanes], tokens[0, samples, lanes] = end[samples, lanes - 1], tokens[-1, samples, lanes - 1]
        end[samples, lanes], tokens[:, samples, lanes] = rerun(samples, lanes, 0)


class AutoregressiveNetwork(RecognitionNetwork):
    """Convolutions, a backward recurrent network over their features, and a forward one that draws the counts.

    Recurrent memory has no end, so it is cut where that can be said: backwards, frame t sees at least ``look_ahead``
    frames beyond the convolutions' reach and at most ``stride`` more, whatever the chunk, so that chunks change
    nothing but rounding.

    Parameters
    ----------
    width
        Channels of the convolutions.
    hidden
        Units of each recurrent network.
    max_count
        Highest spike count per frame; 1 for Bernoulli spikes.
    segment
        Frames that the forward network works through in one part; see `AutoregressivePosterior`.
    """

    name: ClassVar[str] = "autoregressive"
    dilations: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    #: Frames of the future that the backward network reads before its output counts.
    look_ahead: ClassVar[int] = 64
    #: Width of the summary of a trace.
    n_summary: ClassVar[int] = 16

    def __init__(self, width: int = 24, hidden: int = 32, max_count: int = 10, segment: int = 512) -> None:
        super().__init__()
        if not (max_count >= 1 and segment >= 1):
            raise ValueError(
                f"AutoregressiveNetwork: expected max_count and segment of at least 1, got {max_count} and {segment}."
            )
        self.config: dict[str, Any] = {"width": width, "hidden": hidden, "max_count": max_count, "segment": segment}
        self.max_count = max_count
        self.segment = segment
        self.stride = 128
        self.halo = self.stride + self.look_ahead + 2 + 2 * sum(self.dilations)
        self.look = nn.Conv1d(N_FEATURES, self.n_summary, 5, padding=2)
        self.pool = nn.Linear(2 * self.n_summary, self.n_summary)
        self.stem = nn.Conv1d(N_FEATURES + 2 + self.n_summary, width, 5, padding=2)
        self.blocks = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2 * d, dilation=d) for d in self.dilations)
        self.backward_gru = nn.GRU(width, hidden, batch_first=True)
        self.decoder = _Decoder(width + hidden, hidden, max_count)

    def summarise(self, features: Tensor, log_rate: Tensor) -> Tensor:
        """Mean and spread over time of a few filtered versions of the trace."""
        x = torch.relu(self.look(features))
        return torch.relu(self.pool(torch.cat([x.mean(-1), (x.var(-1, unbiased=False) + 1e-6).sqrt()], 1)))

    def local(self, features: Tensor, log_rate: Tensor, summary: Tensor) -> Tensor:
        """Convolutional features, and below them what the backward network makes of those from here on."""
        rate = (log_rate - math.log(30.0))[:, None]
        constant = torch.cat([rate, rate**2, summary], 1)[..., None].expand(-1, -1, features.shape[-1])
        x = self.stem(torch.cat([features, constant], 1))
        for block in self.blocks:
            x = x + block(torch.relu(x))
        x = torch.relu(x)
        return torch.cat([x, self._read_backwards(x)], 1)

    def summary_and_local(self, features: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
        """Summary and outputs, which share nothing."""
        summary = self.summarise(features, log_rate)
        return summary, self.local(features, log_rate, summary)

    def posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor) -> AutoregressivePosterior:
        """Hand the features of each frame to the forward network."""
        return AutoregressivePosterior(local, log_rate, self.decoder, self.segment)

    def _read_backwards(self, x: Float[Tensor, "roi channel time"]) -> Float[Tensor, "roi hidden time"]:
        """Windows of ``stride`` frames and their look-ahead, side by side, each read from its end to its beginning."""
        n_rois, _, n_frames = x.shape
        padded = pad(x, (0, -n_frames % self.stride + self.look_ahead))
        windows = padded.unfold(-1, self.stride + self.look_ahead, self.stride)  # roi channel window step
        out, _ = self.backward_gru(windows.permute(0, 2, 3, 1).flatten(0, 1).flip(1))
        kept = out.flip(1)[:, : self.stride].unflatten(0, (n_rois, -1)).flatten(1, 2)
        return kept[:, :n_frames].mT
