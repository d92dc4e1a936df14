"""Accuracy on ground truth, always beside a rival on the same traces in the same run."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d, maximum_filter1d, minimum_filter1d

from napari_calvae.formats import read_labels, read_movie
from napari_calvae.formats.ground_truth import Sweep
from napari_calvae.inference import infer
from napari_calvae.metrics import score_correlation, smooth_spikes
from napari_calvae.preprocess import bin_spikes, check_traces, delta_f_over_f, extract, resample
from napari_calvae.pretrained.recordings import NU_PER_DENSITY
from napari_calvae.recording import RecordingError, Traces, check_frame_rate
from napari_calvae.vae import SpikeVAE, load_model

#: Frames left out at either end of a sweep, where smoothing and filters have no neighbours.
MARGIN = 32
#: Shifts (frames) among which each method may have its best one.
SHIFTS = range(-3, 4)
#: Held while numpy's own random stream is another's.
_SEEDING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Piece:
    """One sweep on a common clock: ΔF/F and true spike counts, both (time,)."""

    dataset: str
    cell: str
    frame_rate: float
    dff: np.ndarray
    counts: np.ndarray


#: A method maps ΔF/F (time,) and a frame rate (Hz) to a rate per frame in any unit.
Method = Callable[[np.ndarray, float], np.ndarray]


def prepare(sweeps: Sequence[Sweep], frame_rate: float = 30.0, noise: float = 0.0, seed: int = 0) -> list[Piece]:
    """Resample sweeps to one frame rate; ``noise`` (%/√Hz) of white noise is added first, at the rate of recording."""
    pieces = []
    for number, sweep in enumerate(sweeps):
        dff = np.asarray(sweep.dff, float)
        if noise:
            sd = noise / NU_PER_DENSITY * np.sqrt(sweep.frame_rate)
            dff = dff + sd * np.random.default_rng([seed, number]).standard_normal(len(dff))
        values, shift = resample(dff, sweep.frame_rate, frame_rate)
        counts = bin_spikes(sweep.spike_times, sweep.t0 + shift, frame_rate, len(values))
        if len(values) > 4 * MARGIN:
            pieces.append(Piece(sweep.dataset, f"{sweep.dataset}/{sweep.cell}", frame_rate, values, counts))
    return pieces


def calvae_method(model: str | SpikeVAE = "universal") -> Method:
    """Our posterior mean."""
    vae = load_model(model)

    def run(dff: np.ndarray, frame_rate: float) -> np.ndarray:
        return infer(Traces(dff, frame_rate=frame_rate), vae, n_samples=0).rate[0]

    return run


def oasis_method(order: int) -> Method:
    """OASIS (Friedrich et al. 2017) with an autoregressive model of this order, all parameters estimated."""
    deconvolve = _oasis("functions").deconvolve

    def run(dff: np.ndarray, frame_rate: float) -> np.ndarray:
        return deconvolve(_bridged(dff), tau_r=0 if order == 1 else None, penalty=1)[1]

    return run


def oasis(traces: Traces) -> np.ndarray:
    """(roi, time) estimate of OASIS AR1 with estimated parameters, in no unit of its own, to compare ours with.

    Raises
    ------
    RecordingError
        If a trace does not change, OASIS makes nothing of it, or is not installed.
    """
    check_traces(traces)
    method = oasis_method(1)
    # Where it finds no decay it draws one from numpy's own stream; and it warns of traces shorter than its spectra.
    with _SEEDING, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", "nperseg", UserWarning)
        before = np.random.get_state()  # noqa: NPY002 - that stream is the one it draws from
        try:
            rate = np.stack([_rate_of(method, dff, traces.frame_rate) for dff in traces.values])
        finally:
            np.random.set_state(before)  # noqa: NPY002
    failed = [roi for roi, row in zip(traces.roi_ids, rate, strict=True) if not np.isfinite(row).all()]
    if failed:
        raise RecordingError(
            f"OASIS: expected a trace whose decay and noise it can estimate, got that of ROI {failed[0]}. Leave it "
            "out, or take a longer recording."
        )
    return rate


def _rate_of(method: Method, dff: np.ndarray, frame_rate: float) -> np.ndarray:
    """(time,) rate of one trace, whatever its level and scale, from a random stream of its own."""
    np.random.seed(0)  # noqa: NPY002
    trace = dff.astype(np.float64)
    spread = np.nanstd(trace)
    return method((trace - np.nanmedian(trace)) / spread, frame_rate) * spread


def suite2p_method(tau: float = 1.0) -> Method:
    """OASIS as suite2p runs it by default: fixed decay ``tau`` (s), no penalty, maximin baseline over 60 s."""
    deconvolve = _oasis("oasis_methods").oasisAR1

    def run(dff: np.ndarray, frame_rate: float) -> np.ndarray:
        trace, window = _bridged(dff), max(1, round(60.0 * frame_rate))
        baseline = maximum_filter1d(minimum_filter1d(gaussian_filter1d(trace, 10.0), window), window)
        return deconvolve(trace - baseline, np.exp(-1 / (tau * frame_rate)))[1]

    return run


def _oasis(module: str) -> Any:
    """A module of the package oasis-deconv."""
    try:
        return importlib.import_module(f"oasis.{module}")
    except ImportError as error:
        raise RecordingError(
            "OASIS: expected the package oasis-deconv, found none. Install napari-calvae[bench]."
        ) from error


def _bridged(dff: np.ndarray) -> np.ndarray:
    """Missing frames at the median, which OASIS cannot do without."""
    return np.where(np.isfinite(dff), dff, np.nanmedian(dff)).astype(np.float64)


def correlations(method: Method, pieces: Sequence[Piece], sigma: float) -> dict[str, np.ndarray]:
    """Per cell (shift,) correlations with the true rate smoothed by ``sigma`` (s), one for each of ``SHIFTS``."""
    cells: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for piece in pieces:
        rate = np.asarray(method(piece.dff, piece.frame_rate), float)
        truth = smooth_spikes(piece.counts, piece.frame_rate, sigma)
        window = slice(MARGIN, len(truth) - MARGIN)
        shifted = np.stack([np.roll(rate, shift)[window] for shift in SHIFTS])
        cells[piece.cell].append((shifted, truth[window]))
    return {
        cell: score_correlation(np.concatenate([r for r, _ in parts], -1), np.concatenate([t for _, t in parts]))
        for cell, parts in cells.items()
    }


def by_dataset(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Median over the cells of each data set."""
    groups: dict[str, list[np.ndarray]] = defaultdict(list)
    for cell, value in values.items():
        groups[cell.split("/")[0]].append(value)
    return {name: np.nanmedian(np.stack(group), 0) for name, group in groups.items()}


def movie(
    movie_file: Path, labels_file: Path, spikes_file: Path, *, sigma: float = 0.05
) -> Iterator[dict[str, object]]:
    """Rows of the table for a movie whose cells have known spikes: correlation of ours and of OASIS, cell by cell.

    All methods see the same ΔF/F, extracted from the movie. Ours is scored as it comes, OASIS at its best constant
    shift.
    """
    frames, frame_rate = read_movie(movie_file)
    raw = extract(frames, read_labels(labels_file), check_frame_rate(frame_rate))
    traces = delta_f_over_f(raw)
    with np.load(spikes_file, allow_pickle=False) as z:
        times = {roi: z[f"spike_times_{roi}"] for roi in traces.roi_ids}
    pieces = [
        Piece("movie", f"movie/{roi}", traces.frame_rate, dff, bin_spikes(times[roi], 0.0, traces.frame_rate, len(dff)))
        for roi, dff in zip(traces.roi_ids, traces.values, strict=True)
    ]
    methods = {"calvae": calvae_method(), "OASIS AR1": oasis_method(1), "OASIS AR2": oasis_method(2)}
    tables = {name: correlations(method, pieces, sigma) for name, method in methods.items()}
    best = {name: _best_shift(table) for name, table in tables.items()}
    best["calvae"] = SHIFTS.index(0)
    for piece in pieces:
        yield {"cell": piece.cell} | {name: float(table[piece.cell][best[name]]) for name, table in tables.items()}


def _best_shift(table: dict[str, np.ndarray]) -> int:
    return int(np.argmax(np.nanmean(np.stack(list(table.values())), 0)))
