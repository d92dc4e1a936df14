"""Scores, which need the true spikes, and quality metrics, which do not. Functions on arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

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
    norm = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
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
    in spikes/s, ``frame_rate`` in Hz. Missing frames of ``dff`` are NaN.
    """

    dff: np.ndarray
    rate: np.ndarray
    reconstruction: np.ndarray
    spread: np.ndarray
    frame_rate: float

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


#: Quality metrics by name: functions of ``Explained`` returning one number per ROI.
QC: dict[str, Callable[[Explained], np.ndarray]] = {
    "noise_level": qc_noise_level,
    "spike_rate": qc_spike_rate,
    "reconstruction_r2": qc_reconstruction_r2,
    "residual_autocorrelation": qc_residual_autocorrelation,
    "band_coverage": qc_band_coverage,
}


def quality_table(x: Explained) -> np.ndarray:
    """Structured array with one row per ROI and one float32 column per metric of ``QC``."""
    table = np.zeros(len(x.dff), [(name, "f4") for name in QC])
    for name, metric in QC.items():
        table[name] = metric(x)
    return table
