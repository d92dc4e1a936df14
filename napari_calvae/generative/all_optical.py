"""Spikes and fluorescence of a network that is imaged while light stimulates some of its cells.

After Aitchison et al. (2017), "Model-based Bayesian inference of neural activity and connectivity from all-optical
interrogation of a neural circuit": a generalised linear model of coupled neurons with sparse weights, stimulation that
also reaches neighbours of its target, photostimulation artefacts, linear calcium. Link, kernels and units are our own.

The rows depend on each other, hence it is no `GenerativeModel`, but a sibling that uses the same words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn.functional import softplus

from napari_calvae.generative.linear_ar import LinearAR
from napari_calvae.generative.parameters import Parameter, Theta
from napari_calvae.generative.recursion import exponential_filter
from napari_calvae.stimulation import Stimulation, check_positions

DRIVE = Parameter("drive", "Hz", "Drive", "Input without light or other cells' spikes", 0.5, 2.0, positive=False)
EXCITABILITY = Parameter(
    "excitability", "Hz", "Excitability", "Input while light of power 1 is on the cell", 10.0, 20.0, positive=False
)
ARTEFACT = Parameter(
    "artefact", "ΔF/F", "Artefact", "Fluorescence while light of power 1 is on the cell", 0.0, 1.0, positive=False
)
FALLOFF = Parameter(
    "falloff", "length", "Reach of stimulation", "Standard deviation of stimulation around a target", 15.0, 1.0
)
GLARE = Parameter("glare", "length", "Reach of artefact", "Standard deviation of the artefact", 100.0, 1.5)
COUPLING = Parameter("tau_coupling", "s", "Coupling time", "Over which a spike acts on other cells", 0.05, 0.7)

#: Below this (in units of the link's softness) an input is as good as none; exponentials stay within float32.
_LOWEST = -60.0


@dataclass(frozen=True, eq=False)
class Illumination:
    """A stimulation as the cells of one recording meet it.

    Parameters
    ----------
    light
        (site, time) power on each targeted site, averaged over each frame.
    squared_distance
        (cell, site) between cells and sites, in the square of the unit of length.
    """

    light: Float[Tensor, "site time"]
    squared_distance: Float[Tensor, "cell site"]

    @classmethod
    def of(
        cls, stimulation: Stimulation, positions: np.ndarray, n_frames: int, frame_rate: float, t0: float = 0.0
    ) -> Illumination:
        """From pulses and (cell, 2) positions of the cells (x, y)."""
        positions = check_positions(positions, len(positions))
        difference = positions[:, None] - stimulation.sites
        return cls(
            torch.as_tensor(stimulation.light(n_frames, frame_rate, t0), dtype=torch.get_default_dtype()),
            torch.as_tensor((difference**2).sum(-1), dtype=torch.get_default_dtype()),
        )

    def reaching(self, length: Float[Tensor, ""]) -> Float[Tensor, "cell time"]:
        """Power at each cell, falling off with distance d as exp(−d² / (2 length²)), summed over sites."""
        return torch.exp(-self.squared_distance / (2 * length**2)) @ self.light


@dataclass(frozen=True)
class SparseWeights:
    """Prior of connectivity: most weights are about zero, some are not. A spike and a slab, both normal.

    Weights of cells on themselves are from the slab.

    Parameters
    ----------
    share
        Prior probability of a connection.
    spike, slab
        Standard deviations of weights (spikes per spike) without and with a connection.
    """

    share: float = 0.1
    spike: float = 0.02
    slab: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 < self.spike < self.slab:
            raise ValueError(
                "SparseWeights: expected a share between 0 and 1 and a slab wider than the spike, both above 0, got "
                f"share {self.share:g}, spike {self.spike:g}, slab {self.slab:g}. For none, give a small share."
            )

    def log_prob(self, weights: Float[Tensor, "cell cell"]) -> Float[Tensor, ""]:
        """Log-density of all weights together."""
        absent, present = self.parts(weights)
        own = torch.eye(len(weights), dtype=torch.bool, device=weights.device)
        present_alone = present - math.log(self.share)
        return torch.where(own, present_alone, torch.logaddexp(absent, present)).sum()

    def parts(self, weights: Float[Tensor, "*any"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """Log-density of each weight jointly with there being no connection, and with there being one."""
        both = []
        for share, std in ((1 - self.share, self.spike), (self.share, self.slab)):
            both.append(math.log(share / std / math.sqrt(2 * math.pi)) - 0.5 * (weights / std) ** 2)
        return both[0], both[1]


@final
class AllOptical:
    """Coupled cells under light: p(F, s | θ, stimulation).

    Cell i receives, in frame t, the input (Hz)

        x_it = drive_i + excitability_i · p_it(falloff) + Σ_j weights_ij · h_jt,

    with p the power of light that reaches it and h_j the spikes of cell j in *earlier* frames, filtered by an
    exponential of time constant ``tau_coupling`` and integral one. So a weight is the number of spikes that one spike
    adds, where the input is above zero. Counts are Poisson with rate softness · log(1 + e^{x / softness}): about x
    above zero, about nothing below it. Fluorescence is `LinearAR`'s plus ``artefact`` times the power of light around
    the cell, which falls off over ``glare``. All is in seconds; the frame rate matters to first order in dt.

    θ holds (cell,) values of ``cell_parameters``, scalars of ``shared_parameters`` and ``weights`` (cell, cell): row i
    is what cell i receives.

    Parameters
    ----------
    softness
        Width (Hz) of the bend of the link around zero input.
    prior
        Of the weights.
    """

    name: ClassVar[str] = "all_optical"
    label: ClassVar[str] = "Coupled cells under photostimulation"
    cell_parameters: ClassVar[tuple[Parameter, ...]] = (*LinearAR.parameters, DRIVE, EXCITABILITY, ARTEFACT)
    shared_parameters: ClassVar[tuple[Parameter, ...]] = (FALLOFF, GLARE, COUPLING)

    def __init__(self, softness: float = 0.5, prior: SparseWeights | None = None) -> None:
        self.softness = softness
        self.prior = SparseWeights() if prior is None else prior
        self.calcium = LinearAR()

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All entries of θ but the weights."""
        return self.cell_parameters + self.shared_parameters

    def filtered(
        self, counts: Num[Tensor, "*sample cell time"], theta: Theta, frame_rate: float
    ) -> Float[Tensor, "*sample cell time"]:
        """Spikes of earlier frames (spikes/s), each an exponential in time whose integral is one."""
        tau = theta["tau_coupling"]
        left = torch.exp(-1 / (frame_rate * tau))
        spikes = counts.to(tau.dtype)
        return exponential_filter(spikes, torch.zeros_like(tau), (frame_rate * (1 - left))[None], left[None])

    def inputs(
        self, counts: Num[Tensor, "*sample cell time"], theta: Theta, frame_rate: float, light: Illumination
    ) -> Float[Tensor, "*sample cell time"]:
        """What each cell receives in each frame (Hz)."""
        alone = theta["drive"][:, None] + theta["excitability"][:, None] * light.reaching(theta["falloff"])
        return alone + theta["weights"] @ self.filtered(counts, theta, frame_rate)

    def rates(self, inputs: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Spikes per second that an input (Hz) makes."""
        return self.softness * softplus((inputs / self.softness).clamp_min(_LOWEST))

    def artefacts(self, theta: Theta, light: Illumination) -> Float[Tensor, "cell time"]:
        """What the light itself adds to ΔF/F."""
        return theta["artefact"][:, None] * light.reaching(theta["glare"])

    def fluorescence(
        self, counts: Num[Tensor, "*sample cell time"], theta: Theta, frame_rate: float, light: Illumination
    ) -> Float[Tensor, "*sample cell time"]:
        """Noise-free ΔF/F of each frame: response to spikes, baseline and artefact."""
        return self.calcium.fluorescence(counts, theta, frame_rate) + self.artefacts(theta, light)

    def log_prob_counts(
        self, counts: Num[Tensor, "*sample cell time"], theta: Theta, frame_rate: float, light: Illumination
    ) -> Float[Tensor, "*sample"]:
        """Log p(s | θ, stimulation) of the whole network."""
        mean = self.rates(self.inputs(counts, theta, frame_rate, light)) / frame_rate
        spikes = counts.to(mean.dtype)
        return (spikes * mean.log() - mean - torch.lgamma(spikes + 1)).sum((-2, -1))

    def log_prob(
        self,
        observed: Float[Tensor, "cell time"],
        counts: Num[Tensor, "*sample cell time"],
        theta: Theta,
        frame_rate: float,
        light: Illumination,
        valid: Bool[Tensor, "cell time"] | None = None,
    ) -> Float[Tensor, "*sample"]:
        """Log p(F, s | θ, stimulation); missing frames (NaN, or ``valid`` False) drop out of the fluorescence.

        Parameters
        ----------
        observed
            (cell, time) ΔF/F.
        counts
            (sample, cell, time) spikes per frame.
        theta
            Physical parameters.
        frame_rate
            Frames per second (Hz).
        light
            The stimulation.
        """
        unlit = observed - self.artefacts(theta, light)
        seen = self.calcium.log_prob(unlit, counts, theta, frame_rate, valid)
        return seen.sum(-1) + self.log_prob_counts(counts, theta, frame_rate, light)

    @torch.no_grad()
    def simulate(
        self, theta: Theta, frame_rate: float, light: Illumination, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "cell time"], Float[Tensor, "cell time"]]:
        """Draw spike counts and ΔF/F, both (cell, time), frame after frame.

        Raises
        ------
        ValueError
            If every spike would on average lead to more than one other.
        """
        weights = theta["weights"]
        growth = float(torch.linalg.eigvals(weights.clamp_min(0)).abs().max())
        if growth >= 1:
            raise ValueError(
                f"weights: expected an activity that dies out (spectral radius of the positive weights below 1), got "
                f"{growth:.2f}. Make them weaker or fewer."
            )
        alone = self.inputs(torch.zeros_like(light.reaching(theta["falloff"])), theta, frame_rate, light)
        left = torch.exp(-1 / (frame_rate * theta["tau_coupling"]))
        gained = frame_rate * (1 - left)
        trace, columns = torch.zeros_like(alone[:, 0]), []
        for input_alone in alone.unbind(1):
            spikes = torch.poisson(self.rates(input_alone + weights @ trace) / frame_rate, generator=generator)
            trace = left * trace + gained * spikes
            columns.append(spikes)
        counts = torch.stack(columns, 1)
        unlit = self.calcium.simulate(counts, theta, frame_rate, generator)
        return counts, unlit + self.artefacts(theta, light)

    def constrain(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Physical values of unconstrained ones: the exponential of positive parameters, the others as they are."""
        positive = {p.name for p in self.parameters if p.positive}
        return {name: value.exp() if name in positive else value for name, value in unconstrained.items()}

    def unconstrain(self, theta: Theta) -> dict[str, Tensor]:
        """Inverse of `constrain`; an error if something is missing."""
        names = [*(p.name for p in self.parameters), "weights"]
        missing = [name for name in names if name not in theta]
        if missing:
            raise ValueError(
                f"theta of {self.name}: expected {', '.join(names)}, got none for {', '.join(missing)}. Add them."
            )
        positive = {p.name for p in self.parameters if p.positive}
        return {name: theta[name].log() if name in positive else theta[name] for name in names}

    def log_prior(self, theta: Theta) -> Float[Tensor, ""]:
        """Log-density of θ, weights included, in the unconstrained space."""
        u = self.unconstrain(theta)
        total = self.prior.log_prob(theta["weights"])
        for p in self.parameters:
            z = (u[p.name] - p.centre) / p.spread
            total = total + (-0.5 * z**2 - math.log(p.spread) - 0.5 * math.log(2 * math.pi)).sum()
        return total

    def sample_prior(self, n_cells: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw θ for a network of ``n_cells``."""
        u: dict[str, Tensor] = {}
        for p in self.parameters:
            shape = (n_cells,) if p in self.cell_parameters else ()
            u[p.name] = p.centre + p.spread * torch.randn(shape, generator=generator)
        own = torch.eye(n_cells, dtype=torch.bool)
        connected = own | (torch.rand((n_cells, n_cells), generator=generator) < self.prior.share)
        std = torch.where(connected, self.prior.slab, self.prior.spike)
        u["weights"] = std * torch.randn((n_cells, n_cells), generator=generator)
        return self.constrain(u)
