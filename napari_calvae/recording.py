"""The values that travel through the house: traces, and what was inferred from them; ROIs are in ``roi_masks``.

They are frozen, carry their units and know nothing of torch, files or windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from napari_calvae import conversion
from napari_calvae.errors import RecordingError
from napari_calvae.roi_masks import RoiMasks, rows_of, whole_ids

Unit = Literal["raw", "dff"]

#: Largest seed of random numbers.
MAX_SEED = 2**40

#: Layout of one sampled spike event: which posterior sample, ROI and frame, and how many spikes.
EVENT_DTYPE = np.dtype([("sample", "u2"), ("roi", "u4"), ("frame", "u4"), ("count", "u1")])


def check_frame_rate(frame_rate: float | None) -> float:
    """Return the frame rate (Hz) as a float, or say why it is none."""
    if frame_rate is None:
        raise RecordingError(
            "frame_rate: expected the frames per second of the recording, got none. "
            "It is never guessed: pass frame_rate=… (Hz), or --frame-rate on the command line."
        )
    try:
        rate = float(frame_rate)
    except (TypeError, ValueError, OverflowError):
        rate = np.nan
    if not (np.isfinite(rate) and rate > 0):
        raise RecordingError(
            f"frame_rate: expected a positive number of frames per second, got {frame_rate!r}. "
            "Pass the imaging rate in Hz."
        )
    return rate


def check_seed(seed: int) -> int:
    """The seed of random numbers, or say that it is none; with ROIs and steps it still fits into 64 bits."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise RecordingError(f"seed: expected a whole number from 0 to 2**40, got {seed!r}.")
    return int(seed)


def check_t0(t0: float) -> float:
    """Return the time (s) of the first frame as a float, or say why it is none."""
    if not np.isfinite(float(t0)):
        raise RecordingError(
            f"traces: expected a finite time t0 of the first frame (s), got {t0}. Leave it out where it is not known."
        )
    return float(t0)


def check_kind(traces: object) -> None:
    """Say what is wanted instead of plain arrays, which know neither their frame rate nor their unit."""
    if not isinstance(traces, Traces):
        raise RecordingError(
            f"traces: expected napari_calvae.Traces, got {type(traces).__name__}. Wrap an array (roi, time): "
            "Traces(values, frame_rate=…, unit='raw' or 'dff')."
        )


def unmasked(values: ArrayLike) -> np.ndarray:
    """Values as a plain array, in which NaN is what a masked array masks."""
    if not np.ma.is_masked(values):
        return np.asarray(values)
    found = np.ma.getdata(values).astype(np.result_type(np.ma.getdata(values).dtype, np.float32))
    found[np.ma.getmaskarray(values)] = np.nan  # type: ignore[arg-type]
    return found


@dataclass(frozen=True, eq=False)
class Traces:
    """Fluorescence of some ROIs over time.

    Parameters
    ----------
    values
        (roi, time) fluorescence, stored as float32; a 1-D array is one ROI. NaN and infinite values are missing data.
    frame_rate
        Frames per second (Hz). Never defaulted.
    unit
        ``"raw"`` (camera counts) or ``"dff"`` (ΔF/F as a fraction: 1.0 is +100 %).
    roi_ids
        One integer per ROI, by default 1, 2, … as in a label image. Random streams are derived from them.
    t0
        Time of the centre of the first frame (s). Frame k is centred on ``t0 + k / frame_rate``.
    valid
        (roi, time) mask of the frames that were measured, by default those with finite values.
    provenance
        How these traces came about: JSON-like.
    rois
        Where the ROIs are, row by row with the same ids, if that is known.
    accepted
        (roi,) which ROIs are cells in the eyes of whoever made the file, if that is known.

    Raises
    ------
    RecordingError
        If shape, frame rate, unit, ids, ROIs or judgements contradict each other.
    """

    values: np.ndarray
    frame_rate: float
    unit: Unit = "dff"
    roi_ids: tuple[int, ...] = ()
    t0: float = 0.0
    valid: np.ndarray = None  # type: ignore[assignment]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rois: RoiMasks | None = None
    accepted: np.ndarray | None = None

    def __post_init__(self) -> None:
        raw = unmasked(self.values)
        if raw.dtype.kind not in "fiub":
            raise RecordingError(f"traces: expected real numbers, got dtype {raw.dtype}. Convert them to float.")
        with np.errstate(over="ignore"):
            values = np.atleast_2d(raw).astype(np.float32)
        if raw.dtype.itemsize > 4 and (np.isinf(values) & np.isfinite(np.atleast_2d(raw))).any():
            raise RecordingError(
                "traces: expected numbers up to 3e38, which single precision holds, got larger ones. Divide them by "
                "something."
            )
        if values.ndim != 2 or 0 in values.shape:
            raise RecordingError(
                f"traces: expected an array (roi, time) with at least one ROI and one frame, got shape {raw.shape}."
            )
        if self.unit not in ("raw", "dff"):
            raise RecordingError(f"unit: expected 'raw' or 'dff', got {self.unit!r}.")
        ids = whole_ids(self.roi_ids, len(values))
        if len(ids) != len(values) or len(set(ids)) != len(ids):
            raise RecordingError(
                f"roi_ids: expected {len(values)} different integers, one per ROI, "
                f"got {len(ids)} ({len(set(ids))} different)."
            )
        finite = np.isfinite(values)
        if self.valid is not None:
            mask = np.asarray(self.valid, bool)
            if mask.shape not in (values.shape, values.shape[1:]):
                raise RecordingError(f"valid: expected shape {values.shape}, got {mask.shape}.")
            finite &= mask
        values[~finite] = np.nan
        if self.rois is not None and self.rois.ids != ids:
            raise RecordingError(
                f"rois: expected the ROIs {ids[:8]}… of the traces, in that order, got {self.rois.ids[:8]}…."
            )
        if self.accepted is not None:
            accepted = np.asarray(self.accepted, bool).copy()
            if accepted.shape != (len(values),):
                raise RecordingError(f"accepted: expected one value per ROI, {len(values)}, got {accepted.shape}.")
            accepted.flags.writeable = False
            object.__setattr__(self, "accepted", accepted)
        values.flags.writeable = False
        finite.flags.writeable = False
        for name, value in (
            ("values", values),
            ("frame_rate", check_frame_rate(self.frame_rate)),
            ("roi_ids", ids),
            ("t0", check_t0(self.t0)),
            ("valid", finite),
            ("provenance", MappingProxyType(dict(self.provenance))),
        ):
            object.__setattr__(self, name, value)

    @property
    def n_rois(self) -> int:
        """Number of ROIs."""
        return self.values.shape[0]

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return self.values.shape[1]

    @property
    def duration(self) -> float:
        """Length of the recording (s)."""
        return self.n_frames / self.frame_rate

    @property
    def times(self) -> np.ndarray:
        """(time,) centres of the frames (s)."""
        return self.t0 + np.arange(self.n_frames) / self.frame_rate

    def index(self, roi_id: int) -> int:
        """Row of the ROI with this id."""
        try:
            return self.roi_ids.index(int(roi_id))
        except ValueError:
            raise RecordingError(f"roi_id: expected one of {self.roi_ids[:8]}…, got {roi_id}.") from None

    def select(self, rois: Sequence[int] | slice | np.ndarray) -> Traces:
        """Rows ``rois`` (indices, not ids) as traces of their own."""
        index = rows_of(self.n_rois, rois)
        return self.replace(
            values=self.values[index],
            valid=self.valid[index],
            roi_ids=tuple(self.roi_ids[i] for i in index),
            rois=self.rois and self.rois.select(index),
            accepted=None if self.accepted is None else self.accepted[index],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Traces]) -> Traces:
        """Join the rows of some ROIs of one recording, in the order given."""
        if not parts:
            raise RecordingError("concatenate: expected at least one part, got none.")
        rois = [part.rois for part in parts if part.rois is not None]
        accepted = [part.accepted for part in parts if part.accepted is not None]
        return parts[0].replace(
            values=np.concatenate([part.values for part in parts]),
            valid=np.concatenate([part.valid for part in parts]),
            roi_ids=tuple(i for part in parts for i in part.roi_ids),
            rois=RoiMasks.concatenate(rois) if len(rois) == len(parts) else None,
            accepted=np.concatenate(accepted) if len(accepted) == len(parts) else None,
        )

    def replace(self, **changes: Any) -> Traces:
        """Copy with some fields replaced, checked again."""
        if "values" in changes and "valid" not in changes:
            changes["valid"] = None
        return Traces(**(self._fields() | changes))

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled and copied by its fields; the view that keeps the provenance from change cannot be.
        return partial(Traces, **self._fields() | {"provenance": dict(self.provenance)}), ()


@dataclass(frozen=True, eq=False)
class SpikeInference:
    """What was inferred from some traces: the spike posterior, and how well it explains the fluorescence.

    Parameters
    ----------
    traces
        The ΔF/F that the recognition network saw.
    rate
        (roi, time) float32 posterior mean (spikes/s).
    events
        Sampled spikes, dtype ``EVENT_DTYPE``, sorted by ROI, then sample, then frame.
    n_samples
        Number of posterior samples that ``events`` holds.
    reconstruction, reconstruction_std
        (roi, time) float32 mean fluorescence of the posterior through the generative model, and the standard deviation
        of fluorescence to be expected around it (spikes and noise together), in ΔF/F.
    theta
        Parameters of the generative model, each (roi,), in physical units.
    quality
        Structured array: one row per ROI, one column per metric of ``metrics.QC``.
    provenance
        Model id and hash, seed, preprocessing, versions.
    theta_std
        (roi,) posterior standard deviation of those parameters that the network predicted itself.
    """

    traces: Traces
    rate: np.ndarray
    events: np.ndarray
    n_samples: int
    reconstruction: np.ndarray
    reconstruction_std: np.ndarray
    theta: Mapping[str, np.ndarray]
    quality: np.ndarray
    provenance: Mapping[str, Any]
    theta_std: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def roi_ids(self) -> tuple[int, ...]:
        """Ids of the ROIs, row by row."""
        return self.traces.roi_ids

    @property
    def frame_rate(self) -> float:
        """Frames per second (Hz)."""
        return self.traces.frame_rate

    @classmethod
    def concatenate(cls, parts: Sequence[SpikeInference]) -> SpikeInference:
        """Join the results of blocks of ROIs of one recording, in the order given."""
        if not parts:
            raise RecordingError("concatenate: expected at least one result, got none.")
        first = parts[0]
        events = [part.events.copy() for part in parts]
        row = 0
        for part, block in zip(parts, events, strict=True):
            block["roi"] += row
            row += part.traces.n_rois
        return cls(
            traces=Traces.concatenate([p.traces for p in parts]),
            rate=np.concatenate([p.rate for p in parts]),
            events=np.concatenate(events),
            n_samples=first.n_samples,
            reconstruction=np.concatenate([p.reconstruction for p in parts]),
            reconstruction_std=np.concatenate([p.reconstruction_std for p in parts]),
            theta={name: np.concatenate([p.theta[name] for p in parts]) for name in first.theta},
            quality=np.concatenate([p.quality for p in parts]),
            provenance=first.provenance,
            theta_std={name: np.concatenate([p.theta_std[name] for p in parts]) for name in first.theta_std},
        )

    def events_of(self, row: int) -> np.ndarray:
        """Events of one ROI (row index, not id), sorted by sample, then frame."""
        row = range(self.traces.n_rois)[row]  # negative ones count from the end
        start, stop = np.searchsorted(self.events["roi"], [row, row + 1])
        return self.events[start:stop]

    def samples(self, rois: Sequence[int] | slice | np.ndarray = slice(None)) -> np.ndarray:
        """(sample, roi, time) uint8 posterior samples of the spike counts per frame, for all or some rows.

        Rows are indices, not ids. A ROI from which nothing was inferred has a ``rate`` of NaN and no spikes here.
        """
        rows = rows_of(self.traces.n_rois, rois).tolist()
        dense = np.zeros((self.n_samples, len(rows), self.rate.shape[1]), np.uint8)
        for column, row in enumerate(rows):
            events = self.events_of(row)
            dense[events["sample"], column, events["frame"]] = events["count"]
        return dense

    def window_counts(self, window: float = 1.0) -> np.ndarray:
        """(sample, roi, window) spike counts of each sample in consecutive windows of ``window`` seconds.

        A last window that the recording does not fill is left out. A ROI from which nothing was inferred has a ``rate``
        of NaN and no spikes here.
        """
        edges = self.window_edges(window)
        n_windows = len(edges) - 1
        counts = np.zeros((self.n_samples, self.rate.shape[0], n_windows), np.int64)
        index = np.searchsorted(edges, self.events["frame"], side="right") - 1
        inside = index < n_windows
        events = self.events[inside]
        np.add.at(counts, (events["sample"], events["roi"], index[inside]), events["count"])
        return counts

    def window_edges(self, window: float) -> np.ndarray:
        """(window + 1,) first frame of each window of ``window`` seconds, and one past the last."""
        frames = window * self.frame_rate
        n_windows = int(np.floor(self.rate.shape[1] / frames + 1e-9)) if frames >= 1 - 1e-9 else 0
        if n_windows < 1:
            raise RecordingError(
                f"window: expected between one frame ({1 / self.frame_rate:.3g} s) and the whole recording "
                f"({self.traces.duration:.3g} s), got {window:g} s."
            )
        return np.round(np.arange(n_windows + 1) * frames).astype(np.int64)

    def interval(self, level: float = 0.9, window: float = 1.0) -> np.ndarray:
        """(2, roi, window) central credible interval of the spike count in windows of ``window`` seconds.

        Quantiles of the posterior samples; with n samples a level above 1 − 2/n is no better than their range. A ROI
        from which nothing was inferred has NaN.
        """
        if not 0 < level < 1:
            raise RecordingError(f"level: expected a probability between 0 and 1, got {level}.")
        if self.n_samples < 2:
            raise RecordingError(
                f"interval: expected at least 2 posterior samples, got {self.n_samples}. Infer with more."
            )
        tail = (1 - level) / 2
        found = np.quantile(self.window_counts(window), [tail, 1 - tail], axis=0)
        found[:, np.isnan(self.rate).all(axis=1)] = np.nan
        return found

    def to_xarray(self, level: float = 0.9, window: float = 1.0) -> Any:
        """``xarray.Dataset`` of rates, intervals, reconstruction, quality and θ: see ``conversion.to_xarray``."""
        return conversion.to_xarray(self, level, window)

    def to_pynapple(self) -> Any:
        """``pynapple.TsdFrame`` of the rates (spikes/s), with quality and θ: see ``conversion.to_pynapple``."""
        return conversion.to_pynapple(self)

    def to_anndata(self) -> Any:
        """``anndata.AnnData`` with a row per ROI and a column per frame: see ``conversion.to_anndata``."""
        return conversion.to_anndata(self)

    def to_pandas(self) -> Any:
        """``pandas.DataFrame`` of the rates (spikes/s), a column per ROI: see ``conversion.to_pandas``."""
        return conversion.to_pandas(self)
