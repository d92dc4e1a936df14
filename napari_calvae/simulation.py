"""Recordings whose spikes are known: traces drawn from a generative model, and two-photon movies of such cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from scipy import signal

from napari_calvae._movie_scene import MovieConfig, compose_scene, place_cells, render
from napari_calvae.errors import setting_error
from napari_calvae.formats import check_output, write_arrays, write_movie
from napari_calvae.generative import MODELS, GenerativeModel
from napari_calvae.preprocess import bin_spikes
from napari_calvae.recording import RecordingError, Traces, check_frame_rate, check_seed
from napari_calvae.roi_masks import RoiMasks

#: Most spikes in one frame: they are counted in a byte; and most frames, a month at 400 Hz.
_MOST, _MOST_FRAMES = 255, 1e9


@dataclass(frozen=True, eq=False)
class Simulation:
    """Traces with their true spikes.

    Parameters
    ----------
    traces
        (roi, time) ΔF/F.
    counts
        (roi, time) uint8 spikes per frame.
    spike_times
        Per ROI the times of its spikes (s), on the clock of ``traces.times``.
    theta
        Parameters of the generative model, each (roi,), in physical units.
    """

    traces: Traces
    counts: np.ndarray
    spike_times: tuple[np.ndarray, ...]
    theta: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class SimulatedMovie:
    """A movie, its true ROIs and what the cells in them did.

    Parameters
    ----------
    movie
        (time, y, x) uint16 photon counts times gain.
    labels
        (y, x) uint16 label image; ids as in ``truth.traces.roi_ids``.
    truth
        The cells' noise-free ΔF/F and spikes.
    """

    movie: np.ndarray
    labels: np.ndarray
    truth: Simulation


def simulate(
    n_rois: int = 10,
    duration: float = 60.0,
    frame_rate: float = 30.0,
    *,
    model: str = "linear_ar",
    rate: float = 0.5,
    theta: Mapping[str, float] | None = None,
    variability: float = 1.0,
    seed: int = 0,
) -> Simulation:
    """Draw spikes, then fluorescence from a generative model.

    Parameters
    ----------
    n_rois
        Number of cells.
    duration
        Length of the recording (s).
    frame_rate
        Frames per second (Hz).
    model
        Name of a generative model, one of ``generative.MODELS``. With ``"dendritic_spine"`` the ROIs are one dendrite:
        the first its shaft, whose spikes are action potentials, the others spines, whose spikes are synaptic inputs.
    rate
        Median firing rate (spikes/s); the cells' rates vary by a factor of two around it.
    theta
        Physical values around which the cells' parameters are drawn; for those not named it is the prior's median.
    variability
        Spread of the cells' parameters, relative to the prior's; 0 makes all cells alike.
    seed
        Of every random number.
    """
    return _simulate(n_rois, duration, frame_rate, (model, rate, theta or {}, variability, seed))[0]


def simulate_movie(config: MovieConfig | None = None, **settings: Any) -> SimulatedMovie:
    """Render a two-photon movie: somata with dark nuclei, neuropil, shading, motion and photon noise.

    Parameters
    ----------
    config
        What it looks like; fields of ``MovieConfig`` that are given as ``settings`` take its place.
    """
    try:
        c = MovieConfig(**settings) if config is None else MovieConfig(**{**config.model_dump(), **settings})
    except ValidationError as error:
        raise setting_error(error) from None
    rng = np.random.default_rng(c.seed)
    centres = place_cells(c, rng)
    simulated, clean = _simulate(len(centres), c.duration, c.frame_rate, (c.model, c.rate, c.theta, 0.35, c.seed))
    rois = RoiMasks.from_discs(centres, c.diameter, (c.size, c.size))
    labels = rois.to_labels().astype(np.uint16)
    clean = clean - simulated.theta["baseline"][:, None]
    still, sources, signals = compose_scene(c, centres, clean, rng)
    movie = render(c, still, sources, signals, rng)
    truth = Simulation(simulated.traces.replace(values=clean), simulated.counts, simulated.spike_times, simulated.theta)
    return SimulatedMovie(movie, labels, truth)


def write_simulation(simulated: Simulation | SimulatedMovie, path: str | Path, overwrite: bool = False) -> list[Path]:
    """Write simulated traces as an ``.npz``, or a movie as a folder of ``movie.tif``, ``rois.tif`` and ``spikes.npz``.

    An ``.npz`` holds ``dff`` (roi, time), ``frame_rate`` (Hz), ``t0`` (s), ``roi_ids``, ``counts`` (roi, time),
    ``spike_times_<id>`` (s) and ``theta_<name>`` (roi,). Returns the files written.
    """
    path = Path(path)
    if isinstance(simulated, Simulation):
        if path.suffix.lower() != ".npz":
            raise RecordingError(f"output: expected a name that ends in .npz for traces, got {path.name!r}.")
        return [write_arrays(_arrays(simulated), path, overwrite)]
    if path.suffix:
        raise RecordingError(
            f"output: expected the name of a folder for a movie with its ROIs and spikes, got {path.name!r}."
        )
    check_output(path.with_suffix(".folder"), overwrite=True)  # its parent must be there
    path.mkdir(exist_ok=True)
    movie, rois, spikes = (check_output(path / name, overwrite) for name in ("movie.tif", "rois.tif", "spikes.npz"))
    # Photon counts often fit a byte.
    small = simulated.movie.astype(np.min_scalar_type(simulated.movie.max()))
    return [
        write_movie(small, movie, simulated.truth.traces.frame_rate, overwrite),
        write_movie(simulated.labels, rois, None, overwrite),
        write_arrays(_arrays(simulated.truth), spikes, overwrite),
    ]


def simulate_spike_times(
    duration: float, rate: float, rng: np.random.Generator, start: float = 0.0, burstiness: float = 0.25
) -> np.ndarray:
    """(spike,) times (s) of a cell whose rate drifts over seconds and that fires in bursts.

    The log-rate is an Ornstein–Uhlenbeck process of 3 s; after each spike of it comes, with probability ``burstiness``
    and again after each of those, another one 4 to 20 ms later. No two spikes are closer than 2 ms.

    Parameters
    ----------
    duration, start
        Length and beginning of the recording (s).
    rate
        Mean spikes per second.
    rng
        Where the random numbers come from.
    burstiness
        0 (none) to below 1.
    """
    step, memory, spread = 0.1, 3.0, 1.0
    decay = np.exp(-step / memory)
    n = int(np.ceil(duration / step)) + 1
    drive = np.sqrt(1 - decay**2) * rng.standard_normal(n)
    drive[0] = rng.standard_normal()
    log_rate = spread * signal.lfilter([1], [1, -decay], drive) - spread**2 / 2
    expected = np.concatenate([[0], np.cumsum(rate * (1 - burstiness) * np.exp(log_rate) * step)])
    first = np.interp(
        np.sort(rng.uniform(0, expected[-1], rng.poisson(expected[-1]))), expected, np.arange(n + 1) * step
    )
    followers = rng.geometric(1 - burstiness, len(first)) - 1
    parent = np.repeat(np.arange(len(first)), followers)
    intervals = rng.uniform(0.004, 0.02, len(parent))
    elapsed = np.cumsum(intervals)
    before = np.concatenate([[0], elapsed])[np.searchsorted(parent, np.arange(len(first)))]
    times = np.sort(np.concatenate([first, first[parent] + elapsed - before[parent]]))
    times = times[times < duration]
    return start + times[np.diff(times, prepend=-np.inf) >= 0.002]


def _arrays(simulated: Simulation) -> dict[str, np.ndarray]:
    """Name what is to be written."""
    traces = simulated.traces
    return {
        "dff": traces.values,
        "frame_rate": np.asarray(traces.frame_rate),
        "t0": np.asarray(traces.t0),
        "roi_ids": np.asarray(traces.roi_ids),
        "counts": simulated.counts,
        **{f"spike_times_{roi}": t for roi, t in zip(traces.roi_ids, simulated.spike_times, strict=True)},
        **{f"theta_{name}": values for name, values in simulated.theta.items()},
    }


def _simulate(
    n_rois: int, duration: float, frame_rate: float, cell: tuple[str, float, Mapping[str, float], float, int]
) -> tuple[Simulation, np.ndarray]:
    """Simulate traces, and give the (roi, time) noise-free ΔF/F beside them."""
    name, rate, known, variability, seed = cell
    fs = check_frame_rate(frame_rate)
    if name not in MODELS:
        raise RecordingError(f"model: expected one of {', '.join(MODELS)}, got {name!r}.")
    seed = check_seed(seed)
    frames = duration * fs
    if int(n_rois) != n_rois or n_rois < 1 or not 0.5 < frames <= _MOST_FRAMES or not rate > 0:
        raise RecordingError(
            f"simulate: expected at least one ROI, one frame and a rate above 0, got {n_rois} ROIs, "
            f"{frames:.0f} frames and {rate:g} spikes/s. "
            f"At most {_MOST_FRAMES:g} frames are possible."
        )
    if not rate / fs <= _MOST:
        raise RecordingError(_too_many(rate / fs))
    if not 0 <= variability < np.inf:
        raise RecordingError(f"simulate: expected a variability of 0 or more, got {variability:g}. 1 is the prior's.")
    model, n_rois, n_frames = MODELS[name](), int(n_rois), round(frames)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    rates = rate * np.exp(rng.normal(0, np.log(2), n_rois))
    times = tuple(simulate_spike_times(n_frames / fs, r, rng, start=-0.5 / fs) for r in rates)
    counts = np.stack([bin_spikes(t, 0.0, fs, n_frames) for t in times])
    if counts.max() > _MOST:
        raise RecordingError(_too_many(counts.max()))
    counts = counts.astype(np.uint8)
    theta = _draw_theta(model, n_rois, known, variability, generator)
    spikes = torch.from_numpy(counts.astype(np.float32))
    with torch.no_grad():
        clean = model.fluorescence(spikes, theta, fs).numpy()
        values = model.simulate(spikes, theta, fs, generator).numpy()
    if not np.isfinite(values).all():
        raise RecordingError(
            "simulate: expected parameters that make finite fluorescence, got some too large or too small for it. "
            "Choose less variability, or a theta nearer to the prior's."
        )
    traces = Traces(values, fs, provenance={"simulation": {"model": name, "rate_hz": rate, "seed": seed}})
    return Simulation(traces, counts, times, {key: t.numpy() for key, t in theta.items()}), clean


def _too_many(n: float) -> str:
    return f"simulate: expected at most {_MOST} spikes per frame, got {n:g}. Choose a lower rate or faster frames."


def _draw_theta(
    model: GenerativeModel, n: int, known: Mapping[str, float], variability: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Parameters of ``n`` cells, around those ``known`` and else around the prior's medians."""
    names = [p.name for p in model.parameters]
    unknown = sorted(set(known) - set(names))
    wrong = any(p.positive and not known.get(p.name, 1) > 0 for p in model.parameters)
    if unknown or wrong or not np.isfinite(list(known.values())).all():
        raise RecordingError(
            f"theta of {model.name}: expected some of {', '.join(names)}, above 0 but for the baseline, "
            f"and finite, got {dict(known)}."
        )
    drawn = model.unconstrain(model.sample_prior(n, generator))
    medians = {p.name: torch.tensor(float(known.get(p.name, p.median))) for p in model.parameters}
    prior = torch.tensor([p.centre for p in model.parameters])
    return model.constrain(model.unconstrain(medians) + variability * (drawn - prior))
