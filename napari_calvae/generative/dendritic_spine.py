"""A dendrite's shaft and its spines: back-propagating action potentials that all see, synaptic inputs of each spine."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from napari_calvae.generative.base import BASELINE, NOISE, GenerativeModel, Parameter, Theta, as_rate
from napari_calvae.generative.linear_ar import AMPLITUDE, DECAY, RISE, LinearAR
from napari_calvae.generative.regression import baseline_and_noise, measured_frames

BAP = {
    "tau_rise": replace(RISE, label="bAP rise time", help="Time constant of the rise after an action potential"),
    "tau_decay": replace(DECAY, label="bAP decay time", help="Time constant of the decay after an action potential"),
    "amplitude": replace(
        AMPLITUDE, label="bAP amplitude", help="Peak of this compartment's response to one action potential"
    ),
}
#: The same response for synaptic inputs, by the names that it has among the parameters of an action potential's.
SYNAPTIC = {
    "tau_rise": replace(
        RISE, name="synaptic_rise", label="Synaptic rise time", help="Time constant of the rise after an input"
    ),
    "tau_decay": replace(
        DECAY, name="synaptic_decay", label="Synaptic decay time", help="Time constant of the decay after an input"
    ),
    "amplitude": replace(
        AMPLITUDE, name="synaptic_amplitude", label="Synaptic amplitude", help="Peak of the response to one input"
    ),
}

#: How often `first_guess` goes over both parts: amplitudes then have settled to a percent, even where a third of the
#: action potentials coincide with an input.
_ROUNDS = 4


@final
class DendriticSpine(GenerativeModel):
    """Fluorescence of the compartments of one dendrite, (…, compartment, time): compartment 0 is the shaft.

    Row 0 of the counts is the train of back-propagating action potentials (bAPs), which every compartment sees with
    kinetics and amplitude of its own; row i ≥ 1 is the train of synaptic inputs to spine i, which only that spine sees.
    Both add up linearly, each with the response of `LinearAR`. Were the shaft free of noise and all kinetics the same,
    this would be the regression by which Chen et al. (2013) and Wilson et al. (2016) subtract the shaft from a spine.
    The shaft has no synaptic input of its own, so that its synaptic parameters mean nothing and stay at their prior.
    ``log_prob`` is of each compartment given all trains; its sum is that of the dendrite.
    """

    name: ClassVar[str] = "dendritic_spine"
    label: ClassVar[str] = "Dendritic spines"
    coupled: ClassVar[bool] = True
    parameters: tuple[Parameter, ...] = (*BAP.values(), *SYNAPTIC.values(), BASELINE, NOISE)

    def fluorescence(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F of each frame: baseline, bAPs and synaptic inputs."""
        bap, synaptic = self.parts(counts, theta, frame_rate)
        return bap + synaptic + theta["baseline"].unsqueeze(-1)

    def parts(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> tuple[Float[Tensor, "*out time"], Float[Tensor, "*out time"]]:
        """Noise-free ΔF/F above baseline that bAPs make, and that synaptic inputs make; none in the shaft.

        Parameters
        ----------
        counts
            (…, compartment, time) bAPs and synaptic inputs per frame.
        theta
            Physical parameters, each (…, compartment).
        frame_rate
            Frames per second (Hz).
        """
        if counts.ndim < 2:
            raise ValueError(
                f"counts of {self.name}: expected (…, compartment, time), got shape {tuple(counts.shape)}. "
                "Stack the bAPs and the synaptic inputs of one dendrite."
            )
        bap = _response(counts[..., :1, :], BAP, theta, frame_rate)
        synaptic = _response(_inputs(counts), SYNAPTIC, theta, frame_rate)
        return bap, synaptic

    def first_guess(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """Action potentials and inputs in turn, each as `LinearAR` guesses it from what the other leaves over."""
        rate = as_rate(frame_rate, observed).expand(len(observed))
        counts = counts.to(observed.dtype).nan_to_num()
        measured, weights = measured_frames(observed, valid)
        baps, inputs = counts[:1].expand(len(counts), -1), _inputs(counts)
        linear = LinearAR()
        theta: dict[str, Tensor] = {}
        left = measured
        for _ in range(_ROUNDS):
            for kind, train in ((BAP, baps), (SYNAPTIC, inputs)):
                guess = linear.first_guess(left, train, rate, weights > 0)
                theta |= {p.name: guess[own] for own, p in kind.items()}
                left = measured - _response(train, kind, theta, rate)
        predicted = _response(baps, BAP, theta, rate) + _response(inputs, SYNAPTIC, theta, rate)
        return theta | baseline_and_noise(measured, predicted, weights, rate)


def _inputs(counts: Num[Tensor, "*counts compartment time"]) -> Num[Tensor, "*counts compartment time"]:
    """Synaptic inputs of every compartment: the counts, with none in the shaft."""
    return torch.cat([torch.zeros_like(counts[..., :1, :]), counts[..., 1:, :]], -2)


def _response(
    counts: Num[Tensor, "*counts time"],
    kind: dict[str, Parameter],
    theta: Theta,
    frame_rate: float | Num[Tensor, "*rate"],
) -> Float[Tensor, "*out time"]:
    """ΔF/F above baseline that trains make with the parameters of their kind."""
    own = {name: theta[p.name] for name, p in kind.items()}
    return LinearAR().fluorescence(counts, own | {"baseline": torch.zeros_like(own["amplitude"])}, frame_rate)
