"""A posterior over what a shaft and its spines did, from a network that sees them together.

Two U-Nets, each of them a `FactorizedNetwork`: one reads the shaft, and what all spines show of its action potentials;
the other reads each spine beside the shaft, beside what is left of the spine once the shaft is regressed out of it, and
beside the action potentials that the first one found. The spines share their network, so that there may be any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from napari_calvae.recognition.base import N_FEATURES, RecognitionNetwork, trace_features
from napari_calvae.recognition.factorized import GAIN_LIMIT, FactorizedNetwork, GainCategorical

#: Channels that say what a spine shows once the shaft is regressed out: the rest twice, and the slope.
_N_REST = 3
#: Channels that tell the spines of the action potentials: their log-rate and their expected number.
_N_BAP = 2
#: Residuals beyond this many standard deviations have no weight in the regression: Tukey's usual value.
_TUKEY = 4.685


class SpineNetwork(RecognitionNetwork):
    """q(b, s | F) of a dendrite: counts of row 0, the shaft, are action potentials b, those of other rows inputs s.

    Given the fluorescence and a gain per row all counts are independent. The order of the spines does not matter.

    Parameters
    ----------
    shaft_widths, spine_widths
        Channels of each level of the two U-Nets, equally many levels.
    n_shared
        Channels by which the spines, averaged, tell the shaft's network what they see.
    max_count
        Highest count per frame.
    gain_scale
        Factor on the standard deviation of the log-gains, calibrated on simulations unlike those of training.
    min_frames
        Shortest recording that it is trained on.
    gain_limit
        Highest standard deviation of the log-gains before ``gain_scale``; None in networks from before there was one.
    """

    name: ClassVar[str] = "spines"
    unnamed: ClassVar[Mapping[str, Any]] = {"gain_limit": None}
    coupled: ClassVar[bool] = True

    def __init__(
        self,
        shaft_widths: Sequence[int] = (8, 12, 16, 20, 24),
        spine_widths: Sequence[int] = (12, 16, 20, 28, 32),
        n_shared: int = 8,
        max_count: int = 10,
        gain_scale: float = 1.0,
        min_frames: int = 1,
        gain_limit: float | None = GAIN_LIMIT,
    ) -> None:
        super().__init__()
        if len(shaft_widths) != len(spine_widths):
            raise ValueError(
                f"SpineNetwork: expected as many levels for the shaft as for the spines, got {len(shaft_widths)} and "
                f"{len(spine_widths)}. Give both widths the same length."
            )
        self.config: dict[str, Any] = {
            "shaft_widths": list(shaft_widths),
            "spine_widths": list(spine_widths),
            "n_shared": n_shared,
            "max_count": max_count,
            "gain_scale": gain_scale,
            "min_frames": min_frames,
            "gain_limit": gain_limit,
        }
        self.max_count = max_count
        self.min_frames = min_frames
        n_spine = 2 * N_FEATURES + _N_REST + _N_BAP
        self.shared = nn.Conv1d(N_FEATURES + _N_REST, n_shared, 5, padding=2)
        self.shaft = FactorizedNetwork(
            shaft_widths, max_count, gain_scale, n_features=N_FEATURES + n_shared, gain_limit=gain_limit
        )
        self.spine = FactorizedNetwork(spine_widths, max_count, gain_scale, n_features=n_spine, gain_limit=gain_limit)
        self.stride = self.shaft.stride
        self.halo = 2 + self.shaft.halo + self.spine.halo
        # Their summaries differ in length; both come before the slope, the shorter one filled up.
        self.n_summary = max(shaft_widths[-1], spine_widths[-1])

    def set_gain_scale(self, gain_scale: float) -> None:
        """Widen the posteriors of the log-gains by this factor."""
        self.config["gain_scale"] = float(gain_scale)
        self.shaft.set_gain_scale(gain_scale)
        self.spine.set_gain_scale(gain_scale)

    def summarise(self, features: Tensor, log_rate: Tensor) -> Tensor:
        """What each U-Net wants to know of its trace, and how much of the shaft is in it."""
        return self._read(features, log_rate, _n_compartments(features))[0]

    def local(self, features: Tensor, log_rate: Tensor, summary: Tensor) -> Tensor:
        """Outputs of the two U-Nets, the shaft's first."""
        return self._local(features, log_rate, summary, _n_compartments(features))

    def summary_and_local(self, features: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
        """Summaries and outputs of the two U-Nets, the shaft read once."""
        return self._look(features, log_rate, _n_compartments(features))

    def posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor) -> GainCategorical:
        """Counts and gain of each compartment, as its U-Net says."""
        return self._posterior(local, log_rate, summary, _n_compartments(local))

    def together(
        self, fluorescence: Float[Tensor, "dendrite compartment time"], frame_rate: Float[Tensor, " dendrite"]
    ) -> GainCategorical:
        """Posteriors of several dendrites with equally many spines, row after row, in one pass: for training.

        Parameters
        ----------
        fluorescence
            (dendrite, compartment, time) ΔF/F, compartment 0 the shaft; NaN is missing.
        frame_rate
            Frames per second (Hz).
        """
        n = _n_compartments(fluorescence[0])
        features = trace_features(fluorescence.flatten(0, 1))
        log_rate = frame_rate.log().repeat_interleave(n)
        summary, local = self._look(features, log_rate, n)
        return self._posterior(local, log_rate, summary, n)

    def _look(self, features: Tensor, log_rate: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """As `_local` after `_read`, but the shaft is read only once."""
        summary, baps, seen = self._read(features, log_rate, n)
        inputs = self.spine.local(seen, _spines(log_rate, n), self._summaries(summary, n)[1])
        return summary, _join(baps, inputs, n)

    def _read(self, features: Tensor, log_rate: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Summary of each row, outputs of the shaft's network, and what the spines' network sees."""
        slope = _slopes(features, n)
        rest = _rest(features, slope, n)
        seen, rate = self._shaft_features(features, rest, n), log_rate[::n]
        shaft = self.shaft.summarise(seen, rate)
        baps = self.shaft.local(seen, rate, shaft)
        seen = _spine_features(features, rest, baps, rate, n)
        spine = self.spine.summarise(seen, _spines(log_rate, n))
        shaft, spine = (nn.functional.pad(x, (0, self.n_summary - x.shape[1])) for x in (shaft, spine))
        return torch.cat([_join(shaft, spine, n), slope[:, None]], 1), baps, seen

    def _local(self, features: Tensor, log_rate: Tensor, summary: Tensor, n: int) -> Float[Tensor, "row output time"]:
        rest = _rest(features, summary[:, -1], n)
        rate, (shaft, spine) = log_rate[::n], self._summaries(summary, n)
        baps = self.shaft.local(self._shaft_features(features, rest, n), rate, shaft)
        seen = _spine_features(features, rest, baps, rate, n)
        return _join(baps, self.spine.local(seen, _spines(log_rate, n), spine), n)

    def _posterior(self, local: Tensor, log_rate: Tensor, summary: Tensor, n: int) -> GainCategorical:
        shaft, spine = self._summaries(summary, n)
        baps = self.shaft.posterior(local[::n], log_rate[::n], shaft)
        inputs = self.spine.posterior(_spines(local, n), _spines(log_rate, n), spine)
        return GainCategorical(
            _join(baps.logits, inputs.logits, n),
            _join(baps.gain_mean, inputs.gain_mean, n),
            _join(baps.gain_std, inputs.gain_std, n),
            reach=baps.reach,
        )

    def _summaries(self, summary: Tensor, n: int) -> tuple[Tensor, Tensor]:
        shaft, spine = self.config["shaft_widths"][-1], self.config["spine_widths"][-1]
        return summary[::n, :shaft], _spines(summary, n)[:, :spine]

    def _shaft_features(self, features: Tensor, rest: Tensor, n: int) -> Tensor:
        seen = torch.relu(self.shared(torch.cat([_spines(features, n), rest], 1)))
        return torch.cat([features[::n], seen.unflatten(0, (-1, n - 1)).mean(1)], 1)


def _n_compartments(rows: Tensor) -> int:
    if len(rows) < 2:
        raise ValueError(
            f"spine network: expected a shaft and at least one spine, got {len(rows)} trace(s). "
            "Put the shaft's trace first and those of its spines behind it."
        )
    return len(rows)


def _spines(rows: Tensor, n: int) -> Tensor:
    """Rows without the first of every ``n``."""
    return rows.unflatten(0, (-1, n))[:, 1:].flatten(0, 1)


def _join(shaft: Tensor, spine: Tensor, n: int) -> Tensor:
    """Put every shaft before its ``n`` − 1 spines."""
    return torch.cat([shaft.unsqueeze(1), spine.unflatten(0, (-1, n - 1))], 1).flatten(0, 1)


@torch.no_grad()
def _slopes(features: Float[Tensor, "row channel time"], n: int) -> Float[Tensor, " row"]:
    """How much of its shaft's trace is in each, both in units of their noise; 1 for the shaft.

    Robust regression through the median: iteratively reweighted least squares, first with Huber's weights, then with
    Tukey's, so that synaptic inputs do not count.
    """
    z = features[:, 0].sinh()
    x = z[::n].repeat_interleave(n, 0)
    both = features[:, -1] * features[::n, -1].repeat_interleave(n, 0)
    weight = both
    slope = torch.zeros_like(z[:, 0])
    for step in range(12):
        slope = ((weight * x * z).sum(-1) / (weight * x * x).sum(-1).clamp_min(1e-6)).clamp(0, 30)
        # Noise of either trace has a standard deviation of one.
        size = (z - slope[:, None] * x).abs() / (1 + slope[:, None] ** 2).sqrt()
        robust = 1 / size.clamp_min(1) if step < 5 else (1 - (size / _TUKEY) ** 2).clamp_min(0) ** 2
        weight = both * robust
    return slope


def _rest(features: Tensor, slope: Tensor, n: int) -> Float[Tensor, "spine rest time"]:
    """What is left of each spine without its share of the shaft, in units of noise, and that share."""
    z = features[:, 0].sinh()
    share = _spines(slope, n)[:, None]
    left = (_spines(z, n) - share * z[::n].repeat_interleave(n - 1, 0)) / (1 + share**2).sqrt()
    return torch.stack([torch.asinh(left), (left / 10).clamp(-2, 10), torch.asinh(share).expand_as(left)], 1)


def _spine_features(features: Tensor, rest: Tensor, baps: Tensor, log_rate: Tensor, n: int) -> Tensor:
    """All that the network of the spines sees, of each spine: itself, what is left of it, its shaft and the bAPs."""
    expected = torch.exp((baps[:, 0] - log_rate[:, None]).clamp_max(2.0))
    known = torch.stack([(baps[:, 0] / 4).clamp(-2, 1), expected], 1)
    shaft = torch.cat([features[::n], known], 1).repeat_interleave(n - 1, 0)
    return torch.cat([_spines(features, n), rest, shaft], 1)
