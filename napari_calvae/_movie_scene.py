"""What a two-photon movie looks like: somata with dark nuclei, neuropil, vessels, shading, motion and photon noise."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage
from scipy.special import expit

from napari_calvae.recording import MAX_SEED, RecordingError

#: Frames of a movie that are rendered at a time.
_BLOCK = 256


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
    photons: float = Field(6.0, gt=0, le=1e6, title="Photons", description="Of a resting soma, per pixel and frame")
    gain: float = Field(20.0, gt=0, le=1e6, title="Gain", description="Grey values per photon")
    neuropil: float = Field(0.4, ge=0, le=2, title="Neuropil", description="Its brightness, relative to a resting soma")
    motion: float = Field(0.4, ge=0, le=5, title="Motion", description="Standard deviation of the shifts (pixels)")
    seed: int = Field(0, ge=0, le=MAX_SEED, title="Seed", description="Of every random number")


def place_cells(c: MovieConfig, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres (y, x) of cells that do not touch."""
    margin = c.diameter / 2 + 1
    if 2 * margin > c.size - 1:
        raise RecordingError(
            f"diameter: expected somata of at most {c.size - 3} pixels in an image of {c.size}, got {c.diameter:g}. "
            "Choose a smaller one, or a larger size."
        )
    centres: list[tuple[float, float]] = []
    for y, x in rng.uniform(margin, c.size - 1 - margin, (200 * c.n_cells, 2)):
        if all(np.hypot(y - v, x - u) > c.diameter + 1.5 for v, u in centres):
            centres.append((float(y), float(x)))
        if len(centres) == c.n_cells:
            break
    return centres


def compose_scene(
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
    blurred = [
        blob(rng.uniform(0, c.size), rng.uniform(0, c.size), 0.8 * radius, 0.35 * radius)
        for _ in range(max(len(centres) // 3, 1))
    ]
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


def render(
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
