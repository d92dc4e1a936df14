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


def stimulated(duration: float = 40.0, n_cells: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Movie and label image of coupled cells, the pulses on them (x, y in pixels), and their true spike counts."""
    import torch

    from napari_calvae.generative.all_optical import AllOptical, Illumination

    side = int(np.ceil(np.sqrt(n_cells)))
    spacing = 40
    centres = [(20 + spacing * (k // side), 20 + spacing * (k % side)) for k in range(n_cells)]
    labels = calvae.RoiMasks.from_discs(centres, 9, (spacing * side,) * 2).to_labels()
    positions = calvae.RoiMasks.from_labels(labels).centroids
    rng = np.random.default_rng(seed)
    onset = np.arange(1.0, duration - 1, 0.8)
    targets = tuple(positions[[k]] for k in rng.integers(0, n_cells, len(onset)))
    stimulation = calvae.Stimulation(onset, 0.1, targets)
    weights = np.diag([-0.1] * n_cells)
    weights[1, 0], weights[n_cells - 1, n_cells - 2] = 0.7, 0.6
    values = {"tau_rise": 0.03, "tau_decay": 0.5, "amplitude": 0.3, "baseline": 0.0, "noise_density": 0.02}
    values |= {"drive": 0.5, "excitability": 14.0, "artefact": 0.5}
    theta = {name: torch.full((n_cells,), value) for name, value in values.items()}
    theta |= {"falloff": torch.tensor(8.0), "glare": torch.tensor(25.0), "tau_coupling": torch.tensor(0.06)}
    theta["weights"] = torch.as_tensor(weights, dtype=torch.float32)
    n_frames = round(duration * FRAME_RATE)
    light = Illumination.of(stimulation, positions, n_frames, FRAME_RATE)
    counts, observed = AllOptical().simulate(theta, FRAME_RATE, light, torch.Generator().manual_seed(seed))
    return render(observed.numpy(), labels), labels, stimulation, counts.numpy()
