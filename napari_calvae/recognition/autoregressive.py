"""A posterior whose frames know the spikes drawn before them, from convolutions and two recurrent networks.

The correlated network of DeepSpike (Speiser et al. 2017, section 2.3): convolutional features, a recurrent network that
reads them backwards in time, and one that runs forwards on them and on its own sampled spikes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork, SpikePosterior

#: At most this many frames of all samples together go through `AutoregressivePosterior.log_prob` at once.
_BUDGET = 400_000


class _Decoder(nn.Module):
    """Forward recurrent network: inputs and the count before in, log-probabilities of the next count out."""

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

    def log_softmax(self, out: Float[Tensor, "*batch count"], log_rate: Float[Tensor, "*#batch"]) -> Tensor:
        """Log-probabilities: those of a Poisson distribution of rate e^{out_0} Hz, tilted by the other outputs."""
        k = torch.arange(out.shape[-1], dtype=out.dtype, device=out.device)
        poisson = k * (out[..., :1] - log_rate.unsqueeze(-1)) - self.log_factorial
        return torch.log_softmax(torch.cat([poisson[..., :1], poisson[..., 1:] + out[..., 1:]], -1), -1)


class AutoregressivePosterior(SpikePosterior):
    """Counts of each frame given all counts before it: q(s) = Π_t q(s_t | s_{<t}, F).

    What the network remembers of its own spikes is cleared at every multiple of ``segment`` frames; segments are
    independent given the fluorescence, in ``sample`` as in ``log_prob``, and therefore computed side by side.

    Parameters
    ----------
    inputs
        (roi, input, time) features of each frame.
    log_rate
        (roi,) logarithm of the frame rate (Hz).
    decoder
        Network that both methods run.
    segment
        Frames after which memory is cleared.
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
            self._mean = self._run(self.n_mean, generator)[1]
        return self._mean

    def sample(self, n: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "sample roi time"]:
        """Draw ``n`` spike trains per ROI, as uint8 counts per frame."""
        return self._run(n, generator)[0]

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
        block = max(1, _BUDGET // (n_rois * n_frames))
        parts = [self._log_prob(piece, valid) for piece in flat.split(block)]
        return torch.cat(parts).reshape(counts.shape[:-1])

    def select(self, rois: slice) -> AutoregressivePosterior:
        """The same distribution for some of the ROIs."""
        return AutoregressivePosterior(self.inputs[rois], self.log_rate[rois], self.decoder, self.segment)

    def _segments(self, x: Shaped[Tensor, "*batch time"]) -> Shaped[Tensor, "*batch part step"]:
        """Cut the last axis into segments, the last one padded with zeros."""
        size = min(self.segment, x.shape[-1])
        return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))

    def _log_prob(
        self, counts: Int[Tensor, "sample roi time"], valid: Bool[Tensor, "roi time"] | None
    ) -> Float[Tensor, "sample roi"]:
        decoder = self.decoder
        n_samples, _, n_frames = counts.shape
        measured = torch.ones_like(counts[0], dtype=torch.bool) if valid is None else valid
        known = torch.where(measured, counts, decoder.unknown)
        parts, known = self._segments(counts), self._segments(known)
        before = pad(known[..., :-1], (1, 0), value=decoder.unknown)
        x = self._segments(self.inputs).permute(0, 2, 3, 1).expand(n_samples, -1, -1, -1, -1)
        recalled = one_hot(before, decoder.unknown + 1).to(x.dtype)
        hidden, _ = decoder.gru(torch.cat([x, recalled], -1).flatten(0, 2))
        out = decoder.head(torch.cat([hidden.unflatten(0, x.shape[:3]), x], -1))
        log_p = decoder.log_softmax(out, self.log_rate[:, None, None])
        chosen = log_p.gather(-1, parts.unsqueeze(-1)).squeeze(-1).flatten(-2)[..., :n_frames]
        return torch.where(measured, chosen, 0).sum(-1)

    @torch.no_grad()
    def _run(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Counts (sample, roi, time) as uint8, and conditional means averaged over the samples, (roi, time)."""
        decoder = self.decoder
        gru = dict(decoder.gru.named_parameters())
        n_rois, _, n_frames = self.inputs.shape
        uniform = torch.rand(
            (n, n_rois, n_frames), generator=generator, dtype=self.inputs.dtype, device=self.inputs.device
        )
        uniform = self._segments(uniform).permute(3, 0, 1, 2).flatten(1).contiguous()  # step, sample·roi·part
        x = self._segments(self.inputs).permute(3, 0, 2, 1)  # step roi part input
        size, n_parts = x.shape[0], x.shape[2]
        w_x, w_count = gru["weight_ih_l0"].split([decoder.n_input, decoder.unknown + 1], 1)
        v_hidden, v_x = decoder.head.weight.split([decoder.gru.hidden_size, decoder.n_input], 1)
        from_x = (x @ w_x.T + gru["bias_ih_l0"]).flatten(1, 2)  # what does not depend on the sample
        head_x = (x @ v_x.T + decoder.head.bias).flatten(1, 2)
        table, weight_hh = w_count.T.contiguous(), gru["weight_hh_l0"].T.contiguous()
        log_rate = self.log_rate.repeat_interleave(n_parts)
        h = from_x.new_zeros(n * n_rois * n_parts, decoder.gru.hidden_size)
        last = torch.full((len(h),), decoder.unknown, device=h.device)
        k = torch.arange(decoder.unknown, dtype=h.dtype, device=h.device)
        counts = torch.empty((size, len(h)), dtype=torch.uint8, device=h.device)
        means = []
        for t in range(size):
            given = (table[last].unflatten(0, (n, -1)) + from_x[t]).flatten(0, 1)
            h = _gru_step(given, torch.addmm(gru["bias_hh_l0"], h, weight_hh), h)
            out = (h @ v_hidden.T).unflatten(0, (n, -1)) + head_x[t]
            p = decoder.log_softmax(out, log_rate).exp()
            means.append((p @ k).mean(0))
            # The last count takes what rounding leaves of the unit interval.
            last = (uniform[t, :, None] > p.flatten(0, 1)[:, :-1].cumsum(-1)).sum(-1)
            counts[t] = last
        whole = counts.unflatten(1, (n, n_rois, n_parts)).permute(1, 2, 3, 0).flatten(-2)[..., :n_frames]
        mean = torch.stack(means, -1).unflatten(0, (n_rois, n_parts)).flatten(-2)[..., :n_frames]
        return whole.contiguous(), mean


def _gru_step(given: Tensor, recalled: Tensor, h: Tensor) -> Tensor:
    """One step of ``nn.GRU`` from its two projections, of the input and of the state."""
    size = h.shape[-1]
    gates = torch.sigmoid(given[:, : 2 * size] + recalled[:, : 2 * size])
    reset, keep = gates.split(size, -1)
    new = torch.tanh(torch.addcmul(given[:, 2 * size :], reset, recalled[:, 2 * size :]))
    return torch.lerp(new, h, keep)


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
        Frames after which the posterior forgets its own spikes.
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
