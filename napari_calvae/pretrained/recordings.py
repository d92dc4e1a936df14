"""Training snippets from recordings with known spikes, at other frame rates, kinetics and noise levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.preprocess import bin_spikes, noise_level, resample

#: ν (%/√Hz) of white noise with standard deviation 1 per √Hz: 100 × median |x − y| of two normal numbers.
NU_PER_DENSITY = 100 * 0.6744897501960817 * np.sqrt(2)
#: Frame rates (Hz) that the universal model accepts.
FRAME_RATES = (3.0, 120.0)
#: Standard deviation (s) of the clocks of recordings.
CLOCK_ERROR = 0.02
#: Whole data sets that are left out together in cross-validation. Related ones share a fold: DS10, 11 and 13; DS15 and
#: 16; DS24 and 26; DS30 and 31.
FOLDS = (
    ("DS10", "DS11", "DS13", "DS04", "DS20"),
    ("DS15", "DS16", "DS05", "DS08", "DS27"),
    ("DS30", "DS31", "DS01", "DS06"),
    ("DS24", "DS26", "DS03", "DS17"),
    ("DS07", "DS19", "DS21", "DS40"),
)


class Snippets:
    """Fixed-length arrays of some snippets, padded with missing frames.

    ``fluorescence`` (snippet, time) ΔF/F with NaN where missing, ``counts`` (snippet, time) true spikes per frame,
    ``scored`` (snippet, time) frames that a loss may use, ``frame_rate`` (snippet,) Hz.
    """

    def __init__(self, n: int, window: int) -> None:
        self.fluorescence = np.full((n, window), np.nan, np.float32)
        self.counts = np.zeros((n, window), np.int64)
        self.scored = np.zeros((n, window), bool)
        self.frame_rate = np.full(n, 30.0, np.float32)

    def put(self, row: int, dff: np.ndarray, counts: np.ndarray, frame_rate: float) -> None:
        """Fill one row; what is longer than the window is cut."""
        length = min(len(dff), self.fluorescence.shape[1])
        self.fluorescence[row, :length] = dff[:length]
        self.counts[row, :length] = counts[:length]
        self.scored[row, :length] = True
        self.frame_rate[row] = frame_rate


class RecordingSampler:
    """Draws snippets from sweeps: data set, then cell, then sweep, so that long recordings do not drown the rest."""

    def __init__(self, sweeps: Sequence[Sweep]) -> None:
        cells: dict[str, dict[str, list[Sweep]]] = defaultdict(lambda: defaultdict(list))
        for sweep in sweeps:
            if np.isfinite(sweep.dff).mean() > 0.5 and np.nanstd(sweep.dff) > 0:
                cells[sweep.dataset][sweep.cell].append(sweep)
        self.datasets = [list(group.values()) for group in cells.values()]
        minutes = [sum(len(s.dff) / s.frame_rate for c in d for s in c) / 60 for d in self.datasets]
        weight = np.asarray(minutes) ** 0.3
        self.weight = weight / weight.sum()

    def fill(self, out: Snippets, rows: Sequence[int], rng: np.random.Generator) -> None:
        """Fill ``rows`` of ``out``."""
        for row in rows:
            cells = self.datasets[rng.choice(len(self.datasets), p=self.weight)]
            sweeps = cells[rng.integers(len(cells))]
            length = np.array([len(s.dff) / s.frame_rate for s in sweeps])
            sweep = sweeps[rng.choice(len(sweeps), p=length / length.sum())]
            out.put(row, *_vary(sweep, out.fluorescence.shape[1], rng))


def _vary(sweep: Sweep, window: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """A piece of a sweep with stretched time, another frame rate and more noise: ΔF/F, counts, frame rate (Hz)."""
    stretch = rng.uniform(0.7, 1.4) if rng.random() < 0.7 else 1.0
    native = sweep.frame_rate / stretch
    if native > 12 and rng.random() < 0.08:
        # People bring slow recordings that were interpolated to a higher rate: make some.
        slow, target = float(rng.uniform(5, 12)), 30.0
    else:
        slow, target = native, _target_rate(native, rng)
    n_native = int(np.ceil((window + 1) * native / target)) + 1
    start = rng.integers(max(1, len(sweep.dff) - n_native + 1))
    piece = sweep.dff[start : start + n_native].astype(np.float64)
    t0 = sweep.t0 * stretch + start / native + clock_errors(1, min(slow, target), rng)[0]
    piece = piece + _extra_noise(piece, native, rng)
    dff, shift = resample(piece, native, slow)
    dff, more = resample(dff, slow, target)
    shift += more
    counts = bin_spikes(sweep.spike_times * stretch, t0 + shift, target, len(dff))
    return lose_frames(dff, rng), counts, target


def clock_errors(n: int, frame_rate: float, rng: np.random.Generator) -> np.ndarray:
    """(n,) s by which clocks are off: with a standard deviation of 20 ms, and by up to half a frame.

    So much is left between data sets when the delay is known that goes with a rise (``kernels.align_clocks``), and a
    frame's time stamp may be that of its beginning or its end. A posterior for recordings of any clock is as wide.
    """
    return CLOCK_ERROR * rng.standard_normal(n) + rng.uniform(-0.5, 0.5, n) / frame_rate


def _target_rate(native: float, rng: np.random.Generator) -> float:
    low, high = FRAME_RATES
    kind = rng.random()
    if kind < 0.2 and low <= native <= high:
        return native
    if kind < 0.6 and native > 12:
        return 30.0
    if kind < 0.45 and native <= 12:
        return 30.0
    return float(np.exp(rng.uniform(np.log(low), np.log(min(high, max(native, 2 * low))))))


def _extra_noise(piece: np.ndarray, frame_rate: float, rng: np.random.Generator) -> np.ndarray:
    """White noise that brings the noise level anywhere between what it is and 10 %/√Hz, in half of the cases."""
    nu = float(noise_level(piece, frame_rate))
    if rng.random() < 0.45 or not nu < 9:
        return np.zeros_like(piece)
    wanted = np.exp(rng.uniform(np.log(max(nu, 0.3)), np.log(10.0)))
    density = np.sqrt(max(wanted**2 - nu**2, 0.0)) / NU_PER_DENSITY
    return density * np.sqrt(frame_rate) * rng.standard_normal(len(piece))


def lose_frames(dff: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mark some frames as missing, one snippet in twelve: scattered ones or a block."""
    if rng.random() > 1 / 12:
        return dff
    dff = dff.copy()
    if rng.random() < 0.5:
        dff[rng.random(len(dff)) < rng.uniform(0, 0.2)] = np.nan
    else:
        start = rng.integers(len(dff))
        dff[start : start + rng.integers(1, 1 + max(1, len(dff) // 8))] = np.nan
    return dff
