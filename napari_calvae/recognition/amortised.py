"""q(θ | F): a Gaussian over the parameters of a generative model, read off the summary of a trace.

What it is told of the trace knows neither offset nor scale of ΔF/F; parameters that do, like the amplitude of a spike,
are predicted in units of the trace's own range. Scaling or shifting a trace therefore scales and shifts the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: Lags (frames) of the autocorrelation, which tells time constants faster than a network learns to.
LAGS = (1, 2, 4, 8, 16, 32, 64)


class TraceScale(NamedTuple):
    """What a trace is measured in: median, standard deviation of the noise and range (ΔF/F), each (roi, 1)."""

    centre: Tensor
    noise: Tensor
    spread: Tensor


@runtime_checkable
class DescribedParameter(Protocol):
    """What a generative model says of one of its parameters."""

    @property
    def name(self) -> str:
        """Key in θ."""

    @property
    def unit(self) -> str:
        """Physical unit; one that begins with ΔF/F, or with 1/(ΔF/F), goes with the scale of the trace."""

    @property
    def positive(self) -> bool:
        """Whether it is its logarithm that is normally distributed."""

    @property
    def centre(self) -> float:
        """Prior mean of the unconstrained value."""

    @property
    def spread(self) -> float:
        """Prior standard deviation of the unconstrained value."""


@dataclass(frozen=True)
class ThetaEntry:
    """One parameter as the network predicts it.

    Parameters
    ----------
    name
        Key in θ.
    positive
        Whether its logarithm is predicted.
    power
        Of the scale of ΔF/F that it goes with: 1, −1 or 0. A parameter of power 1 that may be negative, such as a
        baseline, is a position and moves with the offset of the trace as well.
    density
        Whether it is noise per √Hz.
    centre, spread
        Where the prediction starts and its unit, where ``power`` is 0.
    """

    name: str
    positive: bool
    power: int
    density: bool
    centre: float
    spread: float

    @classmethod
    def of(cls, parameter: DescribedParameter) -> ThetaEntry:
        """From what the generative model says of it."""
        power = -1 if parameter.unit.startswith("1/(ΔF/F)") else int(parameter.unit.startswith("ΔF/F"))
        density = parameter.unit.endswith("/√Hz")
        return cls(parameter.name, parameter.positive, power, density, parameter.centre, parameter.spread)

    def frame(
        self, scale: TraceScale, log_rate: Float[Tensor, " roi"]
    ) -> tuple[Float[Tensor, " roi"], Float[Tensor, " roi"]]:
        """Origin and unit of the unconstrained value in a trace, about where it is to be found."""
        centre, noise, spread = (x.squeeze(-1) for x in scale)
        if self.power == 0:
            return torch.full_like(spread, self.centre), torch.full_like(spread, self.spread)
        if not self.positive:
            return centre, noise**self.power
        size = noise.log() - log_rate / 2 if self.density else spread.log()
        return self.power * size, torch.ones_like(spread)


class ThetaPosterior:
    """A Gaussian over unconstrained θ of each ROI: over the logarithm of positive parameters, the others as they are.

    Parameters
    ----------
    entries
        What the columns are.
    mean
        (roi, parameter) in the unconstrained space.
    scale
        (roi, parameter, parameter) lower Cholesky factor of the covariance.
    """

    def __init__(
        self,
        entries: Sequence[ThetaEntry],
        mean: Float[Tensor, "roi parameter"],
        scale: Float[Tensor, "roi parameter parameter"],
    ) -> None:
        self.entries = tuple(entries)
        self.mean = mean
        self.scale = scale

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of θ, in the order of the columns."""
        return tuple(entry.name for entry in self.entries)

    @property
    def theta(self) -> dict[str, Tensor]:
        """(roi,) physical values of the mean: the posterior median of each parameter."""
        return self._constrain(self.mean)

    @property
    def std(self) -> dict[str, Tensor]:
        """(roi,) standard deviation of each physical value; that of positive ones is a log-normal distribution's."""
        variance = (self.scale**2).sum(-1)
        return {
            entry.name: (m + v / 2).exp() * torch.expm1(v).sqrt() if entry.positive else v.sqrt()
            for entry, m, v in zip(self.entries, self.mean.unbind(-1), variance.unbind(-1), strict=True)
        }

    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw θ of each ROI, (sample, roi), in physical units."""
        shape = (n, *self.mean.shape)
        normal = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self._constrain(self.mean + (self.scale @ normal.unsqueeze(-1)).squeeze(-1))

    def log_prob(self, theta: Mapping[str, Tensor]) -> Float[Tensor, "*sample roi"]:
        """Log-density of θ (physical values, each (…, roi)) in the unconstrained space."""
        missing = [name for name in self.names if name not in theta]
        if missing:
            raise ValueError(f"theta: expected {', '.join(self.names)}, got none for {', '.join(missing)}. Add them.")
        values = torch.broadcast_tensors(*(theta[name] for name in self.names))
        u = torch.stack([v.log() if e.positive else v for e, v in zip(self.entries, values, strict=True)], -1)
        residual = (u.to(self.mean.dtype) - self.mean).unsqueeze(-1)
        z = torch.linalg.solve_triangular(self.scale, residual, upper=False).squeeze(-1)
        log_det = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (z**2).sum(-1) - log_det - 0.5 * len(self.entries) * math.log(2 * math.pi)

    def select(self, rois: slice) -> ThetaPosterior:
        """The same distribution for some of the ROIs."""
        return ThetaPosterior(self.entries, self.mean[rois], self.scale[rois])

    def _constrain(self, u: Float[Tensor, "*batch parameter"]) -> dict[str, Tensor]:
        return {
            entry.name: value.exp() if entry.positive else value
            for entry, value in zip(self.entries, u.unbind(-1), strict=True)
        }


def autocorrelation(x: Float[Tensor, "roi time"]) -> Float[Tensor, "roi lag"]:
    """Mean of x_t x_{t+k} in units of that of x_t², for the lags k of `LAGS` (frames); zero beyond the trace."""
    power = (x**2).sum(-1).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.stack([(x[:, k:] * x[:, : max(x.shape[-1] - k, 0)]).sum(-1) / power for k in LAGS], -1)


class ThetaHead(nn.Module):
    """From the summary of a trace, its autocorrelation, frame rate and range in units of noise to a `ThetaPosterior`.

    Parameters
    ----------
    n_summary
        Columns of the summary.
    entries
        What to predict.
    n_hidden
        Units of its two layers; the frame rate and the range reach the output past them, too, since the logarithm of a
        noise level or of an uncertainty is nearly linear in them.
    """

    def __init__(self, n_summary: int, entries: Sequence[ThetaEntry], n_hidden: int = 64) -> None:
        super().__init__()
        self.entries = tuple(entries)
        n, n_known = len(self.entries), 3 + len(LAGS)
        self.rows, self.columns = torch.tril_indices(n, n, -1).tolist()
        self.layers = nn.Sequential(
            nn.Linear(n_summary + n_known, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_hidden), nn.ReLU()
        )
        self.out = nn.Linear(n_hidden + n_known, 2 * n + len(self.rows))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        summary: Float[Tensor, "roi summary"],
        centred: Float[Tensor, "roi time"],
        log_rate: Float[Tensor, " roi"],
        scale: TraceScale,
    ) -> ThetaPosterior:
        """Posterior of θ given what is known of each trace as a whole.

        Parameters
        ----------
        summary
            (roi, summary) from the network.
        centred
            (roi, time) the trace from its median, in any unit, missing frames zero.
        log_rate
            (roi,) logarithm of the frame rate (Hz).
        scale
            What the trace is measured in.
        """
        n = len(self.entries)
        rate = (log_rate - math.log(30.0)).unsqueeze(-1)
        known = torch.cat([rate, rate**2, (scale.spread / scale.noise).log() - 2, autocorrelation(centred)], -1)
        hidden = self.layers(torch.cat([summary, known], -1))
        mean, log_std, below = self.out(torch.cat([hidden, known], -1)).split([n, n, len(self.rows)], -1)
        lower = torch.diag_embed(torch.ones_like(mean))
        lower[:, self.rows, self.columns] = below
        frames = [entry.frame(scale, log_rate) for entry in self.entries]
        origin, unit = (torch.stack(part, -1) for part in zip(*frames, strict=True))
        factor = (log_std.clamp(-7, 3).exp() * unit).unsqueeze(-1) * lower
        return ThetaPosterior(self.entries, origin + unit * mean, factor)
