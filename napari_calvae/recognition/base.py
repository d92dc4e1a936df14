"""What every recognition network is: features of a trace in, a distribution over spike-count trains out."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor, nn

from napari_calvae.recognition.amortised import ThetaEntry, ThetaHead, ThetaPosterior, TraceScale

#: Frames that pass through a network at once where a trace is long.
CHUNK = 16_384
#: Channels of ``trace_features``.
N_FEATURES = 4

#: Median of |x − y| for two independent standard normal numbers: Φ⁻¹(0.75)·√2.
_MEDIAN_DIFFERENCE = 0.6744897501960817 * math.sqrt(2)


class SpikePosterior(abc.ABC):
    """A distribution over spike counts per frame, (roi, time), independent between ROIs."""

    #: q(θ | F) of all ROIs, from networks that predict it; q(s, θ | F) = q(θ | F) q(s | F).
    theta: ThetaPosterior | None = None

    @property
    @abc.abstractmethod
    def mean(self) -> Float[Tensor, "roi time"]:
        """Expected spike count of each frame."""

    @abc.abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "sample roi time"]:
        """Draw ``n`` spike trains per ROI, as uint8 counts per frame."""

    @abc.abstractmethod
    def log_prob(
        self, counts: Num[Tensor, "*sample roi time"], valid: Bool[Tensor, "roi time"] | None = None
    ) -> Float[Tensor, "*sample roi"]:
        """Log-probability of whole trains; frames where ``valid`` is False are left out of the product."""

    @abc.abstractmethod
    def select(self, rois: slice) -> SpikePosterior:
        """The same distribution over the spikes of some of the ROIs."""


class RecognitionNetwork(nn.Module, abc.ABC):
    """q(s | F) for whole traces, however long, and if it is asked for q(θ | F) beside it (``predict_theta``).

    A trace is summarised once (``summarise``); given that summary everything is local: the outputs of frame t depend on
    frames within ``halo`` of t only, so that a long trace can be cut into chunks without changing the answer.
    """

    name: ClassVar[str]
    #: Whether the rows of one call are compartments of one structure, the first of them its shaft, rather than cells
    #: that know nothing of each other.
    coupled: ClassVar[bool] = False
    #: Whether its answer for a frame needs but a few frames after it: for recordings that are still going on.
    causal: ClassVar[bool] = False
    #: Keyword arguments that build this network again.
    config: dict[str, Any]
    #: What is meant by a saved ``config`` that does not name these, since it is older than they are.
    unnamed: ClassVar[Mapping[str, Any]] = {}
    #: Highest spike count per frame that the posterior can express.
    max_count: int
    #: Context (frames) on either side that the local part needs.
    halo: int
    #: Chunks start at multiples of this (frames).
    stride: int
    #: Shortest trace (frames) met in training; shorter ones are followed by missing frames, as they were there.
    min_frames: int = 1
    #: At most this many frames, evenly spread over the trace, are summarised.
    summary_frames: ClassVar[int] = 16384

    def __init__(self) -> None:
        super().__init__()
        self.theta_head: ThetaHead | None = None

    def predict_theta(self, entries: Sequence[ThetaEntry]) -> None:
        """Add a head that predicts θ, not yet trained, in place of one that may be there; ``config`` remembers it."""
        if self.coupled:
            raise ValueError(
                f"predict_theta: expected a network for single cells, got {self.name!r}, whose rows are compartments. "
                "Its parameters are estimated compartment by compartment."
            )
        if not any(e.power == 1 and e.positive and not e.density for e in entries):
            raise ValueError(
                "predict_theta: expected a positive parameter in ΔF/F among the entries, which sets the amplitude, got "
                f"{', '.join(e.name for e in entries)}. The network sees traces without their scale: let this model's "
                "parameters be estimated cell by cell."
            )
        like = next(self.parameters()).detach()
        with torch.no_grad():
            summary = self.summarise(like.new_zeros(1, N_FEATURES, self.stride), like.new_zeros(1))
        self.theta_head = ThetaHead(summary.shape[-1], entries).to(like.device, like.dtype)
        self.config["theta"] = [dataclasses.asdict(entry) for entry in entries]

    def forget_theta(self) -> None:
        """Remove the head for θ: what it has learned holds for the weights and the model that it was trained with."""
        self.theta_head = None
        self.config.pop("theta", None)

    @abc.abstractmethod
    def summarise(
        self, features: Float[Tensor, "roi channel time"], log_rate: Float[Tensor, " roi"]
    ) -> Float[Tensor, "roi summary"]:
        """What the network wants to know of a trace as a whole: a mean over time, zero columns if nothing."""

    @abc.abstractmethod
    def local(
        self,
        features: Float[Tensor, "roi channel time"],
        log_rate: Float[Tensor, " roi"],
        summary: Float[Tensor, "roi summary"],
    ) -> Float[Tensor, "roi output time"]:
        """Outputs frame by frame, each depending on no more than ``halo`` frames around it."""

    @abc.abstractmethod
    def summary_and_local(
        self, features: Float[Tensor, "roi channel time"], log_rate: Float[Tensor, " roi"]
    ) -> tuple[Float[Tensor, "roi summary"], Float[Tensor, "roi output time"]]:
        """`summarise`, and `local` given that, of traces that pass through at once: what both need is done once."""

    @abc.abstractmethod
    def posterior(
        self,
        local: Float[Tensor, "roi output time"],
        log_rate: Float[Tensor, " roi"],
        summary: Float[Tensor, "roi summary"],
    ) -> SpikePosterior:
        """Build the distribution from the local outputs."""

    def forward(
        self,
        fluorescence: Float[Tensor, "roi time"],
        frame_rate: float | Float[Tensor, " roi"],
        valid: Bool[Tensor, "roi time"] | None = None,
        chunk: int | None = None,
        apply: Callable[..., Iterable[Tensor]] = map,
    ) -> SpikePosterior:
        """Posterior over the spikes of each trace.

        Parameters
        ----------
        fluorescence
            (roi, time) ΔF/F; NaN is missing.
        frame_rate
            Frames per second (Hz), one for all or one per ROI.
        valid
            (roi, time) False where a frame is missing.
        chunk
            Work through the trace in pieces of about this many frames; the result is the same.
        apply
            How a function is applied to the pieces: ``map``, or that of a thread pool.
        """
        inference = torch.is_inference_mode_enabled()  # which is a property of the thread
        n_frames = fluorescence.shape[-1]
        short = (0, max(0, self.min_frames - n_frames))
        fluorescence = nn.functional.pad(fluorescence, short, value=torch.nan)
        valid = None if valid is None else nn.functional.pad(valid, short, value=False)
        scale = trace_scale(fluorescence, valid)
        features = trace_features(fluorescence, valid, scale)
        rate = torch.as_tensor(frame_rate, dtype=features.dtype, device=features.device).expand(len(features))
        log_rate = torch.log(rate)
        if (chunk is None or chunk >= n_frames) and features.shape[-1] <= self.summary_frames:
            summary, local = self.summary_and_local(features, log_rate)
            local = local[..., :n_frames]
        elif chunk is None or chunk >= n_frames:
            summary = self._summary(features, log_rate)
            local = self.local(features, log_rate, summary)[..., :n_frames]
        else:
            summary = self._summary(features, log_rate)
            # Pieces of equal length, or the cores wait for the one with the longest.
            length = -(-n_frames // (-(-n_frames // chunk)))
            step = -(-length // self.stride) * self.stride
            margin = -(-self.halo // self.stride) * self.stride

            def piece(start: int) -> Tensor:
                first, last = max(0, start - margin), min(n_frames, start + step + margin)
                with torch.inference_mode(inference):
                    out = self.local(features[..., first:last], log_rate, summary)
                    return out[..., start - first : min(start + step, n_frames) - first]

            local = torch.cat(list(apply(piece, range(0, n_frames, step))), -1)
        posterior = self.posterior(local, log_rate, summary)
        if self.theta_head is not None:
            posterior.theta = self.theta_head(summary, features[:, 2], log_rate, scale)
        return posterior

    def _summary(
        self, features: Float[Tensor, "roi channel time"], log_rate: Float[Tensor, " roi"]
    ) -> Float[Tensor, "roi summary"]:
        """That of the whole trace if it is short, else the mean over pieces spread evenly over it."""
        n_frames = features.shape[-1]
        if n_frames <= self.summary_frames:
            return self.summarise(features, log_rate)
        n_pieces, length = 8, self.summary_frames // 8
        starts = torch.linspace(0, n_frames - length, n_pieces).long().tolist()
        pieces = torch.stack([features[..., start : start + length] for start in starts], 1)
        found = self.summarise(pieces.flatten(0, 1), log_rate.repeat_interleave(n_pieces))
        return found.unflatten(0, (-1, n_pieces)).mean(1)


def trace_scale(fluorescence: Float[Tensor, "roi time"], valid: Bool[Tensor, "roi time"] | None = None) -> TraceScale:
    """Median, noise (from the median absolute difference of successive frames) and range of each trace.

    Parameters
    ----------
    fluorescence
        (roi, time) ΔF/F; NaN is missing.
    valid
        (roi, time) False where a frame is missing.
    """
    measured = _measured(fluorescence, valid)
    whole = bool(measured.all())  # the same numbers, sooner
    median = Tensor.median if whole else Tensor.nanmedian
    nan = fluorescence if whole else fluorescence.masked_fill(~measured, torch.nan)
    centre = median(nan, -1, keepdim=True).values.nan_to_num()
    moved = nan - centre
    f = moved.nan_to_num()
    difference = (nan[:, 1:] - nan[:, :-1]).abs()
    noise = median(difference, -1, keepdim=True).values.nan_to_num() / _MEDIAN_DIFFERENCE
    if whole:
        peak = f.kthvalue(math.ceil(0.995 * f.shape[-1]), -1, keepdim=True).values
    else:  # missing frames come last when sorted
        n = measured.sum(-1, keepdim=True)
        peak = moved.sort(-1).values.gather(-1, (torch.ceil(0.995 * n).long() - 1).clamp_min(0)).nan_to_num()
    # Quantised or very short traces can have a median difference of zero; a hundredth of the range stands in.
    noise = torch.maximum(noise, 0.01 * f.abs().amax(-1, keepdim=True)).clamp_min(torch.finfo(f.dtype).tiny)
    return TraceScale(centre, noise, torch.maximum(peak, 2 * noise))


def trace_features(
    fluorescence: Float[Tensor, "roi time"],
    valid: Bool[Tensor, "roi time"] | None = None,
    scale: TraceScale | None = None,
) -> Float[Tensor, "roi channel time"]:
    """Describe each trace in units of itself, so that neither offset nor scale of ΔF/F matters.

    With z the distance from the median in units of the noise: asinh(z), z/10 clipped, the trace in units of its own
    range, and a mask of measured frames.

    Parameters
    ----------
    fluorescence
        (roi, time) ΔF/F; NaN is missing.
    valid
        (roi, time) False where a frame is missing.
    scale
        `trace_scale` of the same, if it is known already.
    """
    centre, noise, spread = trace_scale(fluorescence, valid) if scale is None else scale
    measured = _measured(fluorescence, valid)
    f = (fluorescence.masked_fill(~measured, torch.nan) - centre).nan_to_num()
    z = f / noise
    return torch.stack([_asinh(z), (z / 10).clamp(-2, 10), (f / spread).clamp(-2, 4), measured.to(f.dtype)], dim=1)


def _asinh(z: Tensor) -> Tensor:
    """Inverse hyperbolic sine of moderate numbers; torch's own takes six times as long on long traces."""
    return torch.copysign(torch.log(z.abs() + torch.sqrt(z * z + 1)), z)


def _measured(fluorescence: Tensor, valid: Tensor | None) -> Bool[Tensor, "roi time"]:
    finite = torch.isfinite(fluorescence)
    return finite if valid is None else finite & valid
