"""Nine states of a GCaMP with two calcium-binding lobes, the rates between them, and published constants.

The scheme and the constants are those of Broussard et al. (2025/26, C-SPIKES): the N- and the C-lobe bind two calcium
ions each, at once and cooperatively, and interact with the rest of the protein in a further step (P) after binding.
States: 0 empty; 1 N bound, 2 N bound and interacting; 4 C bound, 5 C bound and interacting; 7 both bound, 3 and 6 both
bound with N or C interacting, 8 with both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from napari_calvae.generative.states import StateScheme, rate_matrix_of

#: Calcium ions bound in each state.
BOUND_CALCIUM = (0.0, 2.0, 2.0, 4.0, 2.0, 2.0, 4.0, 4.0, 4.0)
#: Which states shine.
BRIGHT = (0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)

#: From, to, and the rate between them: a field of `LobeConstants`, or binding to the lobe "n" or "c".
TRANSITIONS = (
    (0, 1, "n"), (1, 0, "n_off"), (1, 2, "pn"), (2, 0, "pn_off"),
    (0, 4, "c"), (4, 0, "c_off"), (4, 5, "pc"), (5, 0, "pc_off"),
    (2, 3, "c"), (3, 2, "c_off"), (5, 6, "n"), (6, 5, "n_off"),
    (1, 7, "c"), (7, 1, "c_off"), (4, 7, "n"), (7, 4, "n_off"),
    (7, 3, "pn2"), (3, 4, "pn2_off"), (7, 6, "pc2"), (6, 1, "pc2_off"),
    (3, 8, "pc2"), (8, 2, "pc2_off"), (6, 8, "pn2"), (8, 5, "pn2_off"),
)  # fmt: skip


@dataclass(frozen=True)
class LobeConstants:
    """Rates of one indicator.

    Parameters
    ----------
    n_half, c_half
        Free calcium (µM) at which a lobe binds as fast as it lets go.
    n_off, c_off
        Rate at which a lobe lets its calcium go (1/s).
    n_hill, c_hill
        Cooperativity: binding goes as calcium to this power.
    pn, pc, pn2, pc2, and with _off
        Interaction of a bound lobe and its end (1/s), with the other lobe empty, or bound (2).
    """

    n_half: float
    n_off: float
    n_hill: float
    c_half: float
    c_off: float
    c_hill: float
    pn: float
    pn_off: float
    pc: float
    pc_off: float
    pn2: float
    pn2_off: float
    pc2: float
    pc2_off: float

    @functools.cached_property
    def scheme(self) -> StateScheme:
        """The states as the kinetic loop runs them."""
        n, c = (
            rate_matrix_of(9, [(a, b, off) for a, b, rate in TRANSITIONS if rate == lobe])
            for lobe, off in (("n", self.n_off), ("c", self.c_off))
        )
        fixed = rate_matrix_of(9, [(a, b, getattr(self, rate)) for a, b, rate in TRANSITIONS if rate not in ("n", "c")])
        return StateScheme(
            bound=torch.tensor(BOUND_CALCIUM, dtype=torch.float64),
            bright=torch.tensor(BRIGHT, dtype=torch.float64),
            fixed=fixed,
            binding=torch.stack([n, c]),
            half=torch.tensor([self.n_half, self.c_half], dtype=torch.float64),
            hill=torch.tensor([self.n_hill, self.c_hill], dtype=torch.float64),
        )


#: Broussard et al. (2025/26): fitted to recordings in vivo.
JGCAMP8F = LobeConstants(
    0.41428, 25.217, 1.6782, 8.6725e-3, 0.73748, 0.58864,
    219.97, 209.71, 10.562, 171.77, 298.81, 114.27, 2.0e-4, 1.2518,
)  # fmt: skip
JGCAMP8M = LobeConstants(
    0.32323, 110.67, 1.6051, 0.13877, 0.91646, 1.7733,
    142.16, 96.421, 3.3665e-6, 83.904, 996.73, 132.53, 11.276, 0.99024,
)  # fmt: skip
#: The same source: purified protein and slices.
JGCAMP8F_IN_VITRO = LobeConstants(
    0.5139, 56.494, 1.7536, 2.3858e-2, 0.46121, 0.95594,
    38.508, 344.72, 0.13588, 36.790, 59.626, 386.10, 0.62465, 29.381,
)  # fmt: skip
