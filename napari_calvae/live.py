"""Spikes while the recording is still going on: frames in, rates out a few frames later, with a state per ROI."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike

from napari_calvae.errors import ModelError
from napari_calvae.preprocess import FrameReader
from napari_calvae.recognition import CausalNetwork
from napari_calvae.recognition.base import TraceScale, trace_features, trace_scale
from napari_calvae.recording import RecordingError, check_frame_rate, unmasked
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.vae import SpikeVAE, shared_model

#: What came in the last minute tells baseline, noise and range of a trace: in frames, at least and at most as many as
#: training has shown.
_MEMORY, _FRAMES = 60.0, (512, 2048)
#: Nothing is said before so many seconds and frames have come.
_WARM_UP, _WARM_FRAMES = 5.0, 64
#: Every ROI's baseline, noise and range are measured again so many times while as much comes as they are measured from:
#: often at first, when they still change.
_REFRESH = 8.0
#: Frames that pass through the network at once where many come together.
_BLOCK = 4096


@dataclass(frozen=True)
class LiveRates:
    """Posterior mean rates of some frames of a recording that is going on.

    Parameters
    ----------
    first
        Number of the first of these frames, from 0.
    rate
        (roi, time) spikes/s; NaN for a ROI whose trace has not changed so far. None of the times, if nothing can be
        said yet.
    frame_rate
        Frames per second (Hz).
    """

    first: int
    rate: Float[np.ndarray, "roi time"]
    frame_rate: float

    @property
    def frames(self) -> np.ndarray:
        """(time,) numbers of the frames."""
        return np.arange(self.first, self.first + self.rate.shape[1])

    @property
    def times(self) -> np.ndarray:
        """(time,) of the frames (s), the first of the recording at 0."""
        return self.frames / self.frame_rate


class Stream:
    """A recording that is going on; made by `stream`."""

    def __init__(self, network: CausalNetwork, frame_rate: float, reader: FrameReader | None) -> None:
        self.frame_rate = frame_rate
        #: Frames so far.
        self.n_frames = 0
        self._network, self._reader = network, reader
        self._pending: list[torch.Tensor] = []
        self._cells: _Cells | None = None

    @property
    def lag(self) -> int:
        """Frames that come between a frame and its rate."""
        return self._network.lag

    def push(self, values: ArrayLike) -> LiveRates:
        """Take what has come.

        Parameters
        ----------
        values
            (roi,) fluorescence of one frame or (roi, time) of several, raw or ΔF/F, NaN where missing; of a stream
            that was told its ROIs (y, x) or (time, y, x) images.

        Returns
        -------
        LiveRates
            Of the frames that can be told now: those up to ``lag`` before the newest. None in the first seconds, then
            all of these at once.

        Raises
        ------
        RecordingError
            If the values have another shape than expected.
        """
        array = unmasked(values) if self._reader is None else self._reader.read(values)
        array = array[:, None] if array.ndim == 1 else array
        known = len(self._pending[0]) if self._pending else None if self._cells is None else self._cells.n_rois
        n_rois = known or (len(array) if array.ndim == 2 else 1)
        if array.ndim != 2 or len(array) != n_rois or not n_rois or array.dtype.kind not in "fiub":
            raise RecordingError(
                f"values: expected ({n_rois},) numbers, one for each ROI, or ({n_rois}, time) of several frames, got "
                f"shape {np.shape(values)} of dtype {np.asarray(values).dtype}. Put ROIs on the first axis; NaN is "
                "missing."
            )
        return self._take(torch.from_numpy(array.astype(np.float32)))

    def finish(self) -> LiveRates:
        """Rates of the last ``lag`` frames, after which nothing comes."""
        if self._cells is None:
            n_rois = len(self._pending[0]) if self._pending else 0
            return LiveRates(0, np.empty((n_rois, 0), np.float32), self.frame_rate)
        found = self._take(torch.full((self._cells.n_rois, self.lag), torch.nan))
        self.n_frames -= self.lag
        return found

    @torch.inference_mode()
    def _take(self, new: torch.Tensor) -> LiveRates:
        first = self.n_frames - self.lag
        if not new.shape[1]:
            return LiveRates(max(0, first), new.numpy(), self.frame_rate)
        self.n_frames += new.shape[1]
        if self._cells is None:
            self._pending.append(new)
            if self.n_frames < max(_WARM_FRAMES, _WARM_UP * self.frame_rate):
                return LiveRates(0, np.empty((len(new), 0), np.float32), self.frame_rate)
            new, first = torch.cat(self._pending, 1), -self.lag
            self._cells = _Cells(self._network, len(new), self.frame_rate)
            self._pending.clear()
        rate = torch.cat([self._cells.rates(part) for part in new.split(_BLOCK, 1)], 1)
        return LiveRates(max(0, first), rate[:, max(0, -first) :].numpy(), self.frame_rate)


class _Cells:
    """What is known of every ROI: its newest values, what they are measured in, and the network's state."""

    def __init__(self, network: CausalNetwork, n_rois: int, frame_rate: float) -> None:
        self.n_rois, self.frame_rate = n_rois, frame_rate
        self.network, self.state = network, network.start(n_rois)
        length = int(np.clip(round(_MEMORY * frame_rate), *_FRAMES))
        self.memory = torch.full((n_rois, length), torch.nan)  # a ring: frame k is in column k modulo its length
        self.n_frames = 0
        self.log_rate = torch.full((n_rois,), frame_rate).log()
        self.scale = TraceScale(*(torch.ones(n_rois, 1) for _ in TraceScale._fields))
        self.gain = torch.zeros(n_rois), torch.zeros(n_rois)
        self.low, self.high = torch.full((n_rois,), torch.inf), torch.full((n_rois,), -torch.inf)
        self.lively = torch.zeros(n_rois)  # measured frames since the first change
        self.known = torch.zeros(n_rois, dtype=torch.bool)  # what it is measured in, from then on
        self.all_known = False
        self.next, self.owed = 0, 0.0  # the ROI to be measured next, and how many should have been by now

    def rates(self, new: torch.Tensor) -> torch.Tensor:
        """(roi, time) spikes/s of as many frames as come, those ``lag`` before them."""
        at_first = self.n_frames == 0
        self._remember(new)
        known = min(self.n_frames, self.memory.shape[1])
        if not self.all_known:
            self._look_for_change(new, at_first)
        self.owed = min(self.owed + _REFRESH * new.shape[1] * self.n_rois / known, self.n_rois)
        n_due = int(self.owed)
        if n_due:
            self._measure((self.next + torch.arange(n_due)) % self.n_rois)
            self.next, self.owed = (self.next + n_due) % self.n_rois, self.owed - n_due
        # What cannot be measured yet is missing: of no use to the network, and no harm to what it remembers.
        seen = new if self.all_known else new.masked_fill(~self.known[:, None], torch.nan)
        local = self.network.advance(self.state, trace_features(seen, None, self.scale))
        rate = self.network.given_gain(local, self.log_rate, *self.gain).mean * self.frame_rate
        if not self.all_known:
            rate[~self.known] = torch.nan
        return rate

    def _remember(self, new: torch.Tensor) -> None:
        length = self.memory.shape[1]
        kept = new[:, -length:]
        columns = (self.n_frames + new.shape[1] - kept.shape[1] + torch.arange(kept.shape[1])) % length
        self.memory[:, columns] = kept
        self.n_frames += new.shape[1]

    def _look_for_change(self, new: torch.Tensor, at_first: bool) -> None:
        """Measure the ROIs that have changed by now for long enough; at first all of them are due anyway."""
        measured = torch.isfinite(new)
        self.low = torch.minimum(self.low, new.masked_fill(~measured, torch.inf).amin(1))
        self.high = torch.maximum(self.high, new.masked_fill(~measured, -torch.inf).amax(1))
        self.lively += torch.where(self.high > self.low, measured.sum(1), 0)
        begun = ~self.known & (self.high > self.low) & ((self.lively >= _WARM_FRAMES) | at_first)
        if not at_first and bool(begun.any()):
            self._measure(begun.nonzero()[:, 0])
        self.known |= begun
        self.all_known = bool(self.known.all())

    def _measure(self, rows: torch.Tensor) -> None:
        """Baseline, noise, range and summary of some ROIs, from what is remembered of them; without it as before."""
        place = self.n_frames % self.memory.shape[1]
        values = self.memory[rows].roll(-place, 1)[:, -self.n_frames :]
        missing = ~torch.isfinite(values)
        changes = values.masked_fill(missing, -torch.inf).amax(1) > values.masked_fill(missing, torch.inf).amin(1)
        if not bool(changes.all()):
            rows, values = rows[changes], values[changes]
        if not len(rows):
            return
        scale, log_rate = trace_scale(values), self.log_rate[rows]
        summary = self.network.summarise(trace_features(values, None, scale), log_rate)
        self.network.condition(self.state, rows, log_rate, summary)
        gain = self.network.gain_of(log_rate, summary)
        for kept, found in zip((*self.scale, *self.gain), (*scale, *gain), strict=True):
            kept[rows] = found


def stream(
    model: str | Path | SpikeVAE = "live",
    frame_rate: float | None = None,
    *,
    lag: int = 4,
    rois: RoiMasks | ArrayLike | None = None,
    neuropil_coefficient: float = 0.7,
) -> Stream:
    """Infer spikes while a recording is going on.

    Parameters
    ----------
    model
        The name of a shipped model, a file or a model, whose network is causal.
    frame_rate
        Frames per second (Hz), to be given: it is never guessed.
    lag
        Frames that come between a frame and its rate: 0, 1, 2, 4 or 8; what each costs is in ``docs/speed/live.md``.
    rois
        ROIs or a (y, x) label image, if whole images will be pushed; by default values of ROIs are.
    neuropil_coefficient
        Share of the signal around a ROI that is subtracted, if images are pushed.

    Returns
    -------
    Stream
        Push to it what comes.

    Raises
    ------
    ModelError
        If the model needs the whole trace.
    RecordingError
        If the frame rate is not one that the model was trained for, or the lag is not.

    Examples
    --------
    >>> live = stream("live", 30.0, lag=4)  # doctest: +SKIP
    >>> for values in microscope:  # doctest: +SKIP
    ...     rates = live.push(values)
    """
    vae = shared_model(model, coupled=False)
    if not isinstance(vae.recognition, CausalNetwork):
        raise ModelError(
            f"model: expected one that needs no more than a few frames after a spike, got {vae.recognition.name!r}, "
            "which sees whole traces. Use model='live', or one trained with napari_calvae.pretrained.train --live."
        )
    network = copy.deepcopy(vae.recognition).cpu()  # its lag is this stream's own
    try:
        network.set_lag(lag)
    except ValueError as error:
        raise RecordingError(f"{error} Choose one of them.") from None
    reader = None if rois is None else FrameReader(rois, neuropil_coefficient)
    return Stream(network, vae.preprocessing.check_rate(check_frame_rate(frame_rate)), reader)
