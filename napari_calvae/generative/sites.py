"""Five states of a GCaMP that binds four calcium ions one after the other, and constants.

The scheme is the sequential binding model of Greenberg et al. (2018), "Accurate action potential inference from a
calcium sensor protein through biophysical modeling", bioRxiv 479055: state i has i ions bound, takes up the next one at
on_i times free calcium and lets it go at off_i, and shines when all four are bound.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from napari_calvae.generative.states import StateScheme

Four = tuple[float, float, float, float]


@dataclass(frozen=True)
class SiteConstants:
    """Rates of one indicator.

    Parameters
    ----------
    on
        Rates at which the first to the fourth ion bind (1/(µM s)).
    off
        Rates at which they leave again (1/s).
    """

    on: Four
    off: Four

    @functools.cached_property
    def scheme(self) -> StateScheme:
        """The states as the kinetic loop runs them."""
        return sequential_scheme(*(torch.tensor(rates, dtype=torch.float64) for rates in (self.on, self.off)))


def sequential_scheme(on: Float[Tensor, " site"], off: Float[Tensor, " site"]) -> StateScheme:
    """States with no to all sites bound, the last of them bright; ``on`` and ``off`` may require gradients."""

    def chain(rates: Tensor, ends: Sequence[int]) -> Tensor:
        """Rate matrix of moves from state i + ends[0] to i + ends[1], one at each rate."""
        one_way = torch.eye(len(rates) + 1, dtype=torch.float64)
        origin, target = (one_way[end : len(rates) + end] for end in ends)
        return torch.einsum("ki,kj,k->ij", target - origin, origin, rates)

    n_states = len(on) + 1
    return StateScheme(
        bound=torch.arange(n_states, dtype=torch.float64),
        bright=torch.eye(n_states, dtype=torch.float64)[-1],
        fixed=chain(off, (1, 0)),
        binding=chain(on, (0, 1))[None],
        half=torch.ones(1, dtype=torch.float64),
        hill=torch.ones(1, dtype=torch.float64),
    )


#: Greenberg et al. (2018), GCaMP6s: the values in the authors' program (github.com/dgreenberg/sbmvivo,
#: params_and_opts_by_indicator.m of the first release), fitted by them to binding assays and recordings in vivo.
GCAMP6S_GREENBERG = SiteConstants(
    on=(2.516340108, 16.93083934, 1.087582073, 1068.893443),
    off=(0.1001686918, 204.7802878, 11.77442605, 5.831340864),
)

#: Fitted here, by `pretrained.fit_kinetics`, to recordings with known spikes, since GCaMP6f has no published table: two
#: cells of three of mouse visual cortex (Rupprecht et al. 2021: DS13, DS15 and DS16 for GCaMP6s, DS10 and DS11 for
#: GCaMP6f), 29 and 31 cells, 30 s each, 10 steps, starting from the values above and with a prior around them (a factor
#: of e at one standard deviation). On cells left out, those of GCaMP6s explain about as much as the published ones
#: (proof "kinetics"). Single rates are uncertain by factors: they trade off with each other and with what differs
#: between cells. Trust responses, not affinities.
GCAMP6S = SiteConstants(on=(17.811, 23.098, 1.0692, 794.70), off=(0.4598, 132.11, 19.554, 8.9616))
GCAMP6F = SiteConstants(on=(2.3656, 19.111, 2.1448, 185.34), off=(0.3262, 264.81, 6.1667, 46.183))
