"""Accuracy on ground truth, always beside a rival on the same traces in the same run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_calvae.formats import read_labels, read_movie
from napari_calvae.formats.ground_truth import Sweep, read_ground_truth
from napari_calvae.inference import infer
from napari_calvae.metrics import randomised_pit, score_correlation, smooth_spikes
from napari_calvae.preprocess import bin_spikes, delta_f_over_f, extract, resample
from napari_calvae.pretrained.recordings import NU_PER_DENSITY
from napari_calvae.recording import RecordingError, Traces, check_frame_rate
from napari_calvae.vae import SpikeVAE, load_model

#: Frames left out at either end of a sweep, where smoothing and filters have no neighbours.
MARGIN = 32
#: Shifts (frames) among which each method may have its best one.
SHIFTS = range(-3, 4)


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
    try:
        from oasis.functions import deconvolve
    except ImportError as error:
        raise RecordingError(
            "OASIS: expected the package oasis-deconv, found none. Install napari-calvae[bench]."
        ) from error

    def run(dff: np.ndarray, frame_rate: float) -> np.ndarray:
        trace = np.where(np.isfinite(dff), dff, np.nanmedian(dff)).astype(np.float64)
        return deconvolve(trace, tau_r=0 if order == 1 else None, penalty=1)[1]

    return run


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


def accuracy(
    data: Path, model: str | SpikeVAE = "universal", *, sigma: float = 0.025, noise: float = 0.0, only: str = ""
) -> Iterator[dict[str, object]]:
    """Rows of the table: per data set the median correlation of ours as it comes, and of OASIS at its best shift.

    The shift of each rival is one constant for all data sets, the one that is best for it in the mean.
    """
    sweeps = [s for s in read_ground_truth(data) if s.dataset.startswith(tuple(only.split(",")))]
    pieces = prepare(sweeps, noise=noise)
    methods = {"calvae": calvae_method(model), "OASIS AR1": oasis_method(1), "OASIS AR2": oasis_method(2)}
    tables = {name: by_dataset(correlations(method, pieces, sigma)) for name, method in methods.items()}
    best = {name: _best_shift(table) for name, table in tables.items()}
    best["calvae"] = SHIFTS.index(0)
    for dataset in tables["calvae"]:
        yield {"data set": dataset} | {name: float(table[dataset][best[name]]) for name, table in tables.items()}


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


def coverage(
    data: Path, model: str | SpikeVAE = "universal", *, window: float = 1.0, level: float = 0.9, only: str = ""
) -> Iterator[dict[str, object]]:
    """Rows of the table: per data set the share of windows (s) whose true spike count lies in the central interval.

    By randomised PIT on 100 samples, over windows with at least half an expected spike: chosen by the prediction, never
    by the truth.
    """
    rng = np.random.default_rng(0)
    sweeps = [s for s in read_ground_truth(data) if s.dataset.startswith(tuple(only.split(",")))]
    inside: dict[str, list[np.ndarray]] = defaultdict(list)
    width: dict[str, list[np.ndarray]] = defaultdict(list)
    for piece in prepare(sweeps):
        if len(piece.dff) < 2 * window * piece.frame_rate:
            continue
        result = infer(Traces(piece.dff, frame_rate=piece.frame_rate), model, n_samples=100)
        samples = result.window_counts(window)[:, 0]
        edges = result.window_edges(window)
        truth = np.add.reduceat(np.append(piece.counts, 0), edges)[: len(edges) - 1]
        chosen = np.add.reduceat(np.append(result.rate[0], 0), edges)[: len(edges) - 1] / piece.frame_rate >= 0.5
        pit = randomised_pit(samples[:, chosen], truth[chosen], rng)
        inside[piece.dataset].append(np.abs(pit - 0.5) <= level / 2)
        width[piece.dataset].append(np.subtract(*np.quantile(samples[:, chosen], [0.95, 0.05], axis=0)))
    for dataset, parts in inside.items():
        all_parts = np.concatenate(parts)
        if len(all_parts):
            yield {
                "data set": dataset,
                "coverage": float(all_parts.mean()),
                "width": float(np.concatenate(width[dataset]).mean()),
                "windows": len(all_parts),
            }


def _best_shift(table: dict[str, np.ndarray]) -> int:
    return int(np.argmax(np.nanmean(np.stack(list(table.values())), 0)))
