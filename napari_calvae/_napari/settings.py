"""Settings of an inference, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """All that decides a result besides movie and ROIs; equal settings give equal results.

    Baseline percentile and window (s) are those that the model was trained with where they are None; the amplitude
    (ΔF/F per spike) is unknown where it is None.
    """

    frame_rate: float
    neuropil_coefficient: float = 0.7
    n_samples: int = 50
    model: str = "universal"
    device: str = "auto"
    seed: int = 0
    baseline_percentile: float | None = None
    baseline_window: float | None = None
    amplitude: float | None = None

    @property
    def own_baseline(self) -> bool:
        """Whether the user wants another baseline than the model's."""
        return self.baseline_percentile is not None or self.baseline_window is not None

    @property
    def for_inference(self) -> dict[str, Any]:
        """Arguments of `calvae.iter_infer` and `calvae.iter_batch`."""
        given = {} if self.amplitude is None else {"amplitude": self.amplitude}
        return {"model": self.model, "n_samples": self.n_samples, "seed": self.seed, "device": self.device} | given
