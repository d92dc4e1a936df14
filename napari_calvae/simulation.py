"""Recordings whose spikes are known: traces drawn from a generative model, and two-photon movies of such cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import ndimage, signal
from scipy.special import expit

from napari_calvae.generative import MODELS, GenerativeModel
from napari_calvae.preprocess import bin_spikes
from napari_calvae.recording import RecordingError, RoiMasks, Traces, check_frame_rate

#: Frames of a movie that are rendered at a time.
_BLOCK = 256


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


class MovieConfig(BaseModel):
    """What a simulated movie looks like; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(96, ge=16, le=1024, title="Size", description="Width and height (pixels)")
    n_cells: int = Field(12, ge=1, le=500, title="Cells", description="Number of cells; fewer if they do not fit")
    diameter: float = Field(10.0, ge=3, le=100, title="Diameter", description="Of the somata (pixels)")
    duration: float = Field(60.0, ge=1, title="Duration", description="Length of the recording (s)")
    frame_rate: float = Field(30.0, gt=0, title="Frame rate", description="Frames per second (Hz)")
    model: str = Field("dye_binding", title="Model", description="Generative model of the fluorescence")
    rate: float = Field(0.5, gt=0, le=50, title="Rate", description="Median firing rate of the cells (spikes/s)")
    theta: dict[str, float] = Field({}, title="Parameters", description="Of the generative model: the cells' medians")
    photons: float = Field(6.0, gt=0, title="Photons", description="Of a resting soma, per pixel and frame")
    gain: float = Field(20.0, gt=0, title="Gain", description="Grey values per photon")
    neuropil: float = Field(0.4, ge=0, le=2, title="Neuropil", description="Its brightness, relative to a resting soma")
    motion: float = Field(0.4, ge=0, le=5, title="Motion", description="Standard deviation of the shifts (pixels)")
    seed: int = Field(0, ge=0, title="Seed", description="Of every random number")


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
        Name of a generative model, one of ``generative.MODELS``.
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
        What it looks like; or give the fields of ``MovieConfig`` as ``settings``.
    """
    try:
        c = config or MovieConfig(**settings)
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecordingError(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}."
        ) from None
    rng = np.random.default_rng(c.seed)
    centres = _place(c, rng)
    simulated, clean = _simulate(len(centres), c.duration, c.frame_rate, (c.model, c.rate, c.theta, 0.35, c.seed))
    rois = RoiMasks.from_discs(centres, c.diameter, (c.size, c.size))
    labels = rois.to_labels().astype(np.uint16)
    clean = clean - simulated.theta["baseline"][:, None]
    still, sources, signals = _scene(c, centres, clean, rng)
    movie = _render(c, still, sources, signals, rng)
    truth = Simulation(simulated.traces.replace(values=clean), simulated.counts, simulated.spike_times, simulated.theta)
    return SimulatedMovie(movie, labels, truth)


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


def _simulate(
    n_rois: int, duration: float, frame_rate: float, cell: tuple[str, float, Mapping[str, float], float, int]
) -> tuple[Simulation, np.ndarray]:
    """Simulate traces, and give the (roi, time) noise-free ΔF/F beside them."""
    name, rate, known, variability, seed = cell
    fs = check_frame_rate(frame_rate)
    if name not in MODELS:
        raise RecordingError(f"model: expected one of {', '.join(MODELS)}, got {name!r}.")
    n_frames = round(duration * fs)
    if n_rois < 1 or n_frames < 1 or not rate > 0:
        raise RecordingError(
            f"simulate: expected at least one ROI, one frame and a rate above 0, got {n_rois} ROIs, "
            f"{n_frames} frames and {rate:g} spikes/s."
        )
    model = MODELS[name]()
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    rates = rate * np.exp(rng.normal(0, np.log(2), n_rois))
    times = tuple(simulate_spike_times(n_frames / fs, r, rng, start=-0.5 / fs) for r in rates)
    counts = np.stack([bin_spikes(t, 0.0, fs, n_frames) for t in times]).astype(np.uint8)
    theta = _draw_theta(model, n_rois, known, variability, generator)
    spikes = torch.from_numpy(counts.astype(np.float32))
    with torch.no_grad():
        clean = model.fluorescence(spikes, theta, fs).numpy()
        values = model.simulate(spikes, theta, fs, generator).numpy()
    traces = Traces(values, fs, provenance={"simulation": {"model": name, "rate_hz": rate, "seed": seed}})
    return Simulation(traces, counts, times, {key: t.numpy() for key, t in theta.items()}), clean


def _draw_theta(
    model: GenerativeModel, n: int, known: Mapping[str, float], variability: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Parameters of ``n`` cells around those ``known`` or the prior's medians, ``variability`` times its spread away."""
    names = [p.name for p in model.parameters]
    unknown = sorted(set(known) - set(names))
    if unknown or any(p.positive and not known.get(p.name, 1) > 0 for p in model.parameters):
        raise RecordingError(
            f"theta of {model.name}: expected some of {', '.join(names)}, all but the baseline above 0, got {dict(known)}."
        )
    drawn = model.unconstrain(model.sample_prior(n, generator))
    medians = {p.name: torch.tensor(float(known.get(p.name, p.median))) for p in model.parameters}
    prior = torch.tensor([p.centre for p in model.parameters])
    return model.constrain(model.unconstrain(medians) + variability * (drawn - prior))


def _place(c: MovieConfig, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres (y, x) of cells that do not touch."""
    margin = c.diameter / 2 + 1
    centres: list[tuple[float, float]] = []
    for y, x in rng.uniform(margin, c.size - 1 - margin, (200 * c.n_cells, 2)):
        if all(np.hypot(y - v, x - u) > c.diameter + 1.5 for v, u in centres):
            centres.append((float(y), float(x)))
        if len(centres) == c.n_cells:
            break
    return centres


def _scene(
    c: MovieConfig, centres: list[tuple[float, float]], clean: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resting image (y, x), changing sources (source, y, x) and their signals (source, time), in resting somata."""
    n_frames = clean.shape[1]
    y, x = np.mgrid[: c.size, : c.size].astype(np.float32)
    middle = (c.size - 1) / 2
    shading = 1 - 0.35 * ((y - middle) ** 2 + (x - middle) ** 2) / (2 * middle**2)

    def blob(cy: float, cx: float, radius: float, edge: float) -> np.ndarray:
        return expit((radius - np.hypot(y - cy, x - cx)) / edge)

    def texture(scale: float) -> np.ndarray:
        image = ndimage.gaussian_filter(rng.standard_normal((c.size, c.size)), scale, mode="wrap")
        return (image / image.std()).astype(np.float32)

    radius = c.diameter / 2
    brightness = rng.uniform(0.45, 1.3, len(centres))
    somata = np.stack(
        [
            b * (blob(cy, cx, radius - 0.4, 0.45) - 0.45 * blob(cy, cx, 0.45 * radius, 0.6))
            for b, (cy, cx) in zip(brightness, centres, strict=True)
        ]
    )
    # Neurites and the processes of cells elsewhere: fine texture, dark vessels, and a few cells out of focus.
    felt = np.clip(1 + 0.25 * texture(0.9) + 0.15 * texture(3.0), 0.2, None)
    felt *= 1 - 0.6 * expit((0.12 - np.abs(texture(c.size / 8))) / 0.04)
    blurred = [blob(*rng.uniform(0, c.size, 2), 0.8 * radius, 0.35 * radius) for _ in range(max(len(centres) // 3, 1))]
    neuropil = c.neuropil * np.clip(felt + 0.7 * np.sum(blurred, axis=0), 0, None)
    neuropil *= 1 - np.clip(somata.sum(0), 0, 1) * 0.8
    wave = ndimage.gaussian_filter1d(rng.standard_normal(n_frames), 0.4 * c.frame_rate, mode="reflect")
    follows = clean.mean(0) - clean.mean()
    wave = 0.12 * wave / max(wave.std(), 1e-9) + 0.5 * follows
    # Light from the felt above and below a soma is seen through it as well.
    haze = neuropil + 0.35 * c.neuropil * np.clip(somata.sum(0), 0, 1)
    sources = np.concatenate([somata, haze[None]]) * shading
    signals = np.concatenate([np.maximum(clean, -0.9), wave[None]])
    return sources.sum(0), sources, signals


def _render(
    c: MovieConfig, still: np.ndarray, sources: np.ndarray, signals: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(time, y, x) uint16 movie: the scene, moved a little and counted photon by photon."""
    n_frames = signals.shape[1]
    walk = ndimage.gaussian_filter1d(rng.standard_normal((2, n_frames)), 0.7 * c.frame_rate, axis=1, mode="reflect")
    shifts = c.motion * walk / np.maximum(walk.std(axis=1, keepdims=True), 1e-9)
    movie = np.empty((n_frames, c.size, c.size), np.uint16)
    for start in range(0, n_frames, _BLOCK):
        stop = min(start + _BLOCK, n_frames)
        clean = still + np.tensordot(signals[:, start:stop].T, sources, axes=1)
        for frame, shift in zip(clean, shifts[:, start:stop].T, strict=True):
            frame[:] = ndimage.shift(frame, shift, order=1, mode="nearest")
        photons = rng.poisson(c.photons * np.clip(clean, 0, None))
        movie[start:stop] = np.minimum(np.round(c.gain * photons), np.iinfo(np.uint16).max)
    return movie
