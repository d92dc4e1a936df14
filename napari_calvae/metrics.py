"""Scores, which need the true spikes, and quality metrics, which do not. Functions on arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import KDTree

from napari_calvae.preprocess import noise_level


def smooth_spikes(counts: np.ndarray, frame_rate: float, sigma: float) -> np.ndarray:
    """(…, time) rate (spikes/s) of the spike counts per frame, smoothed with a Gaussian of ``sigma`` seconds."""
    return gaussian_filter1d(
        np.asarray(counts, float) * frame_rate, sigma * frame_rate, axis=-1, mode="constant", truncate=5
    )


def score_correlation(rate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(…) Pearson correlation over time of two arrays (…, time); NaN where one of them is constant."""
    a, b = np.asarray(rate, float), np.asarray(truth, float)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    # The mean of equal numbers need not be that number.
    changes = (np.ptp(a, -1) > 0) & (np.ptp(b, -1) > 0)
    norm = np.where(changes, np.sqrt((a**2).sum(-1) * (b**2).sum(-1)), 0)
    return np.where(norm > 0, (a * b).sum(-1) / np.where(norm > 0, norm, 1), np.nan)


def score_error(rate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(…) summed absolute difference over summed true rate, CASCADE's error (Rupprecht et al. 2021)."""
    rate, truth = np.asarray(rate, float), np.asarray(truth, float)
    total = truth.sum(-1)
    return np.where(total > 0, np.abs(rate - truth).sum(-1) / np.where(total > 0, total, 1), np.nan)


def score_bias(rate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(…) relative excess of inferred spikes, CASCADE's bias (Rupprecht et al. 2021)."""
    rate, truth = np.asarray(rate, float), np.asarray(truth, float)
    total = truth.sum(-1)
    return np.where(total > 0, (rate - truth).sum(-1) / np.where(total > 0, total, 1), np.nan)


def randomised_pit(samples: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(…) probability integral transform of integer truths under integer samples (sample, …), ties spread at random.

    Uniform on [0, 1] if the truth is just another sample (Czado, Gneiting & Held 2009).
    """
    below = (samples < truth).sum(0)
    ties = (samples == truth).sum(0)
    return (below + rng.random(truth.shape) * (ties + 1)) / (len(samples) + 1)


#: Scores by name: functions of (rate, true rate), both (…, time) in spikes/s.
SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "correlation": score_correlation,
    "error": score_error,
    "bias": score_bias,
}


@dataclass(frozen=True, eq=False)
class Explained:
    """Traces beside their explanation, all (roi, time): what the quality metrics look at.

    ``dff``, ``reconstruction`` and ``spread`` (standard deviation expected around the reconstruction) in ΔF/F, ``rate``
    in spikes/s, ``frame_rate`` in Hz. Missing frames of ``dff`` are NaN. ``trained_on``, (trace, descriptor), is what
    `describe` says of traces that the model was trained on, if it knows.
    """

    dff: np.ndarray
    rate: np.ndarray
    reconstruction: np.ndarray
    spread: np.ndarray
    frame_rate: float
    trained_on: np.ndarray | None = None

    @property
    def residual(self) -> np.ndarray:
        """(roi, time) fluorescence that the reconstruction leaves unexplained, NaN where missing."""
        return self.dff - self.reconstruction


def qc_noise_level(x: Explained) -> np.ndarray:
    """ν (%/√Hz)."""
    return noise_level(x.dff, x.frame_rate)


def qc_spike_rate(x: Explained) -> np.ndarray:
    """Mean inferred rate (spikes/s)."""
    return x.rate.mean(-1)


def qc_reconstruction_r2(x: Explained) -> np.ndarray:
    """Share of the variance of ΔF/F that the reconstruction explains."""
    variance = np.nanvar(x.dff, -1)
    return 1 - np.nanmean(x.residual**2, -1) / np.where(variance > 0, variance, np.nan)


def qc_residual_autocorrelation(x: Explained) -> np.ndarray:
    """Correlation of successive residuals; 0 if the explanation leaves nothing but white noise."""
    r = x.residual - np.nanmean(x.residual, -1, keepdims=True)
    variance = np.nanmean(r**2, -1)
    return np.nanmean(r[:, 1:] * r[:, :-1], -1) / np.where(variance > 0, variance, np.nan)


def qc_band_coverage(x: Explained) -> np.ndarray:
    """Share of the frames within two standard deviations of the reconstruction; 0.95 is as it should be."""
    measured = np.isfinite(x.dff)
    inside = np.abs(np.nan_to_num(x.residual)) <= 2 * x.spread
    return (inside & measured).sum(-1) / np.maximum(measured.sum(-1), 1)


def describe(dff: np.ndarray, frame_rate: float) -> np.ndarray:
    """What a trace is like, whatever its cell did, (roi, descriptor).

    Logarithms of the frame rate (Hz), of ν (%/√Hz) and of peak over noise; skewness (asinh of it); and correlation of
    successive differences, which is −0.5 for white noise and more where frames were smoothed, interpolated or denoised.

    Parameters
    ----------
    dff
        (roi, time) ΔF/F; NaN is missing.
    frame_rate
        Frames per second (Hz).
    """
    rows = [_describe(row, frame_rate) for row in np.atleast_2d(np.asarray(dff, float))]
    return np.array(rows, np.float32).reshape(-1, 5)


def _describe(trace: np.ndarray, frame_rate: float) -> tuple[float, ...]:
    step = np.diff(trace)
    pairs = np.isfinite(step[1:]) & np.isfinite(step[:-1])
    kept = trace[np.isfinite(trace)]
    if pairs.sum() < 8 or kept.std() == 0:
        return (np.nan,) * 5
    nu = max(float(noise_level(trace, frame_rate)), 1e-6)
    noise = nu / 100 * np.sqrt(frame_rate) / 0.954
    middle, peak = np.quantile(kept, [0.5, 0.995])
    z = (kept - kept.mean()) / kept.std()
    skewness = float(np.mean(z * z * z))
    smooth = float(score_correlation(step[1:][pairs], step[:-1][pairs]))
    over = max((peak - middle) / noise, 1e-3)
    return float(np.log(frame_rate)), float(np.log(nu)), float(np.log(over)), float(np.arcsinh(skewness)), smooth


def unfamiliarity(described: np.ndarray, known: np.ndarray, n_near: int = 5) -> np.ndarray:
    """(roi,) how far traces are from all that are known: 1 as far as the outermost 5 % of those are from each other.

    Distances are to the ``n_near``-th nearest of the known, each descriptor in units of its spread among them.
    """
    spread, places, outermost = _places(np.ascontiguousarray(known, np.float32).tobytes(), known.shape[1], n_near)
    finite = np.isfinite(described).all(-1)
    found = np.full(len(described), np.nan)
    if finite.any():
        found[finite] = places.query(described[finite] / spread, k=n_near)[0][:, -1]
    return found / outermost


@functools.lru_cache(maxsize=8)  # a model's are the same for every ROI
def _places(raw: bytes, n_columns: int, n_near: int) -> tuple[np.ndarray, KDTree, float]:
    """Spread of known descriptors, their places in units of it, and how far from the others the outermost 5 % are."""
    known = np.frombuffer(raw, np.float32).reshape(-1, n_columns)
    spread = known.std(0) + 1e-6
    places = KDTree(known / spread)
    own = places.query(known / spread, k=n_near + 1)[0][:, -1]
    return spread, places, float(np.quantile(own, 0.95))


def qc_unfamiliarity(x: Explained) -> np.ndarray:
    """How unlike everything that the model was trained on a trace is: to 1 is usual, beyond 1.5 beware; NaN unknown."""
    if x.trained_on is None:
        return np.full(len(x.dff), np.nan)
    return unfamiliarity(describe(x.dff, x.frame_rate), x.trained_on)


#: Quality metrics by name: functions of ``Explained`` returning one number per ROI.
QC: dict[str, Callable[[Explained], np.ndarray]] = {
    "noise_level": qc_noise_level,
    "spike_rate": qc_spike_rate,
    "reconstruction_r2": qc_reconstruction_r2,
    "residual_autocorrelation": qc_residual_autocorrelation,
    "band_coverage": qc_band_coverage,
    "unfamiliarity": qc_unfamiliarity,
}


def quality_table(x: Explained) -> np.ndarray:
    """Structured array with one row per ROI and one float32 column per metric of ``QC``."""
    table = np.zeros(len(x.dff), [(name, "f4") for name in QC])
    for name, metric in QC.items():
        table[name] = metric(x)
    return table
