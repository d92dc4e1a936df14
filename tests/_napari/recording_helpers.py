"""Movies of a dendrite and of cells under light, whose traces a generative model made."""

from __future__ import annotations

from typing import Any

import numpy as np

import napari_calvae as calvae

FRAME_RATE = 30.0


def render(dff: np.ndarray, labels: np.ndarray, resting: float = 400.0, seed: int = 0) -> np.ndarray:
    """(time, y, x) uint16 movie in which ROI k of ``labels`` has the ΔF/F in row k − 1, on a dim background."""
    rng = np.random.default_rng(seed)
    mean = np.full((dff.shape[1], *labels.shape), 0.15 * resting, np.float32)
    for row, roi in enumerate(np.unique(labels[labels > 0])):
        mean[:, labels == roi] = resting * np.clip(1 + dff[row], 0.05, None)[:, None]
    return rng.normal(mean, 0.02 * resting).clip(0).astype(np.uint16)


def dendrite_labels(n_spines: int = 4, size: int = 64) -> np.ndarray:
    """A shaft across the image, ROI 1, and spines above and below it."""
    y, x = np.mgrid[:size, :size]
    middle = size // 2 + np.round(4 * np.sin(np.arange(size) / 12)).astype(int)
    labels = np.zeros((size, size), np.int32)
    labels[np.abs(y - middle[None]) <= 2] = 1
    for k in range(n_spines):
        cx = round((k + 1) * size / (n_spines + 1))
        cy = middle[cx] + (-6 if k % 2 else 6)
        labels[(y - cy) ** 2 + (x - cx) ** 2 <= 5] = k + 2
    return labels


def dendrite(duration: float = 60.0, n_spines: int = 4, seed: int = 3) -> tuple[np.ndarray, np.ndarray, Any]:
    """Movie and label image of a simulated dendrite, and what it was made of."""
    theta = {"amplitude": 0.5, "tau_decay": 0.4, "synaptic_amplitude": 0.6, "synaptic_decay": 0.5, "baseline": 0.0}
    simulated = calvae.simulate(
        n_spines + 1, duration, FRAME_RATE, model="dendritic_spine", theta=theta, rate=0.3, variability=0.4, seed=seed
    )
    labels = dendrite_labels(n_spines)
    return render(simulated.traces.values, labels), labels, simulated


def show(viewer: Any, movie: np.ndarray, labels: np.ndarray, **metadata: Any) -> None:
    """Add movie and ROIs to a viewer."""
    viewer.add_image(movie, name="movie", scale=(1 / FRAME_RATE, 1, 1), metadata={"frame_rate": FRAME_RATE, **metadata})
    viewer.add_labels(labels.copy(), name="ROIs")
