"""Photostimulation as a value: when the laser was on, how strong, and where it was pointed. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from napari_calvae.recording import RecordingError

#: Share of a frame that is no light but rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Stimulation:
    """Pulses of light, each on one target or on several at once.

    Parameters
    ----------
    onset
        (pulse,) when each pulse begins (s), on the clock of ``Traces.times``.
    duration
        (pulse,) how long each lasts (s); one number if all are alike.
    targets
        Per pulse the positions (x, y) of its targets: an array (target, 2), or one position. The unit is yours (µm or
        pixels), the same as that of the cells' positions.
    power
        (pulse,) power on each target relative to whatever counts as 1; one number if all are alike.

    Raises
    ------
    RecordingError
        If these contradict each other.
    """

    onset: np.ndarray
    duration: np.ndarray
    targets: tuple[np.ndarray, ...]
    power: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        onset = np.atleast_1d(np.asarray(self.onset, float))
        if onset.ndim != 1 or not np.isfinite(onset).all():
            raise RecordingError(
                f"onset: expected one finite time (s) per pulse, got {_told(onset)}. Give an array (pulse,)."
            )
        n = len(onset)
        if len(self.targets) != n:
            raise RecordingError(
                f"targets: expected one set of positions for each of {n} pulses, got {len(self.targets)}. "
                "Give a sequence with an array (target, 2) per pulse."
            )
        targets = tuple(_positions(t, f"targets of pulse {k}") for k, t in enumerate(self.targets))
        power = 1.0 if self.power is None else self.power
        for name, value in (("duration", self.duration), ("power", power)):
            values = np.asarray(value, float)
            if values.shape not in ((), (n,)) or not (np.isfinite(values) & (values > 0)).all():
                raise RecordingError(
                    f"{name}: expected one number above 0 for each of {n} pulses, got {_told(values)}. "
                    "Leave out pulses that were not given."
                )
            object.__setattr__(self, name, np.broadcast_to(values, (n,)))
        object.__setattr__(self, "onset", onset)
        object.__setattr__(self, "targets", targets)

    def __len__(self) -> int:
        return len(self.onset)

    @property
    def sites(self) -> np.ndarray:
        """(site, 2) all different positions that were targeted, (x, y)."""
        return np.unique(np.concatenate([np.zeros((0, 2)), *self.targets]), axis=0)

    def light(self, n_frames: int, frame_rate: float, t0: float = 0.0) -> np.ndarray:
        """(site, time) power on each of ``sites``, averaged over each frame.

        That is the power times the share of the frame in which the laser was on; frame k lasts from t0 + (k − ½) /
        frame_rate to t0 + (k + ½) / frame_rate.

        Parameters
        ----------
        n_frames, frame_rate, t0
            Of the recording: frames, frames per second (Hz) and centre of the first frame (s).
        """
        sites = self.sites
        light = np.zeros((len(sites), n_frames))
        if not len(self):
            return light
        pulse = np.repeat(np.arange(len(self)), [len(t) for t in self.targets])
        _, site = np.unique(np.concatenate(self.targets), axis=0, return_inverse=True)
        begin = (self.onset - t0) * frame_rate + 0.5
        end = np.clip(begin + self.duration * frame_rate, 0, n_frames)  # what is beyond the recording takes no memory
        begin = np.clip(begin, 0, n_frames)
        first = np.floor(begin).astype(np.int64)
        frames = first[:, None] + np.arange(int(np.ceil(end - first).max()))
        on = np.minimum(end[:, None], frames + 1) - np.maximum(begin[:, None], frames)
        on = np.where((frames >= 0) & (frames < n_frames), on.clip(0), 0) * self.power[:, None]
        np.add.at(light, (site.reshape(-1, 1), frames[pulse].clip(0, n_frames - 1)), on[pulse])
        return light

    def lit(self, n_frames: int, frame_rate: float, t0: float = 0.0) -> np.ndarray:
        """(time,) frames during which the laser was on at all, wherever it was pointed."""
        return np.asarray((self.light(n_frames, frame_rate, t0) > _ROUNDING).any(0))


def check_positions(positions: ArrayLike, n_cells: int) -> np.ndarray:
    """(cell, 2) positions (x, y) of the cells, or an error that says what is wrong with them."""
    found = _positions(positions, "positions")
    if len(found) != n_cells:
        raise RecordingError(
            f"positions: expected (x, y) of each of {n_cells} cells, got {len(found)}. "
            "Give one per trace, in their order, for example RoiMasks.centroids."
        )
    return found


def _positions(value: ArrayLike | Sequence[ArrayLike], name: str) -> np.ndarray:
    found = np.atleast_2d(np.asarray(value, float))
    if found.ndim != 2 or found.shape[1] != 2 or not len(found) or not np.isfinite(found).all():
        raise RecordingError(
            f"{name}: expected finite positions (x, y) in an array (n, 2), got {_told(found)}. "
            "Give x and y in the unit of the cells' positions."
        )
    return found


def _told(values: np.ndarray) -> str:
    return f"shape {values.shape}" if values.size > 4 else str(values.tolist())
