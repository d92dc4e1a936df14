"""Spikes to fluorescence through the kinetics of the indicator's states: jGCaMP8 with nine, GCaMP6 with five."""

from __future__ import annotations

import abc
import math
from dataclasses import replace
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from napari_calvae.generative.base import BASELINE, NOISE, GenerativeModel, Parameter, Theta, as_rate
from napari_calvae.generative.kinetic_loop import Cells, Cytosol, Medium, simulate_states
from napari_calvae.generative.lobes import JGCAMP8F, JGCAMP8M
from napari_calvae.generative.regression import ShapeGrid, baseline_and_noise, measured_frames
from napari_calvae.generative.sites import GCAMP6F, GCAMP6S
from napari_calvae.generative.states import RESTING, SATURATING


def _varying(name: str, unit: str, label: str, text: str, mean: float, sd: float, own: bool = False) -> Parameter:
    """A log-normal parameter with the mean and standard deviation that were published for somata."""
    spread = math.sqrt(math.log1p((sd / mean) ** 2))
    return Parameter(name, unit, label, text, mean * math.exp(-(spread**2) / 2), spread, own=own)


INDICATOR = _varying("indicator", "µM", "Indicator", "Concentration of the indicator", 60.0, 22.0, own=True)
EXTRUSION = _varying("extrusion", "1/s", "Extrusion", "Rate at which free calcium leaves the cell", 745.0, 298.0)
INFLUX = _varying(
    "calcium_per_spike", "µM", "Calcium per spike", "Total calcium that enters with a spike", 14.5, 6.0, own=True
)
RANGE = _varying(
    "dynamic_range", "", "Dynamic range", "Fluorescence in saturating over that without calcium", 5.1, 1.7, own=True
)
STORE_IN = _varying("store_in", "1/s", "Into the store", "Rate at which free calcium enters a slow store", 5.1, 1.5)
STORE_OUT = _varying("store_out", "1/s", "Out of the store", "Rate at which the slow store gives it back", 5.0, 1.5)


#: Median and spread of a parameter.
Prior = tuple[float, float]
#: In the order of `Cells`.
_OF_CELLS = (INDICATOR, EXTRUSION, INFLUX, STORE_IN, STORE_OUT)


class IndicatorKinetics(GenerativeModel, abc.ABC):
    """Free calcium drives the states of the indicator, which buffers it in turn; some of the states shine.

    In the cytosol total calcium T is free calcium x, that in a fast buffer in equilibrium, T_B = B x / (K_B + x), and
    that on the indicator. dT/dt = −(extrusion + store_in)(x − x₀) + store_out · y and dy/dt = store_in (x − x₀) −
    store_out · y with the store's excess y; each spike adds calcium_per_spike to T. Hence no calcium is lost to the
    indicator's binding at any step, and a small change of T shows in x divided by 1 + B/K_B. The states are those of
    `lobes` (nine; Broussard et al. 2025/26, C-SPIKES) or `sites` (five; Greenberg et al. 2018, whose slow buffer is the
    store, without its limit). ΔF/F = (b − b₀) / (b₀ + b_sat / (dynamic_range − 1)), with the brightness b, b₀ at rest
    and b_sat in saturating calcium; without calcium none shines.

    A frame's spikes come in its middle, and F is the mean over the frame. Steps are short after spikes and at most
    12 ms long at any frame rate. In each, the states move by the matrix exponential of their rates at the calcium
    of the step's middle, found implicitly, which gives the mean brightness over it as well: second order, and
    within 1 % of a stiff solver. The exponentials are tabulated over log calcium and interpolated; as weighted
    means of stochastic matrices they keep occupancies within [0, 1] and their sum at one.

    This is a loop over time, run side by side on pieces of 2 s; see `simulate_states`.
    """

    parameters: tuple[Parameter, ...] = (
        INDICATOR, EXTRUSION, INFLUX, RANGE, STORE_IN, STORE_OUT, BASELINE, NOISE,
    )  # fmt: skip
    #: The indicator, and the buffer beside it.
    medium: Medium

    @final
    def fluorescence(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F of each frame: baseline and the gain in brightness."""
        gain = self._gain(theta[RANGE.name])
        return theta["baseline"].unsqueeze(-1) + gain.unsqueeze(-1) * self._brightening(counts, theta, frame_rate)

    @final
    def first_guess(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """Most probable of a few values of calcium per spike and extrusion, the dynamic range that goes with each.

        These are compared on the 600 frames that hold the most spikes. The rest is at its prior's median, so that this
        is a start for gradient steps, not an estimate of concentrations.
        """
        rate = as_rate(frame_rate, observed).expand(len(observed))
        counts = counts.to(observed.dtype).nan_to_num()
        measured, weights = measured_frames(observed, valid)
        usual = {p.name: torch.full_like(rate, p.median) for p in self.parameters}
        own = {p.name: p for p in self.parameters}
        median = float(self._gain(usual[RANGE.name][:1]))
        scale = Parameter("scale", "ΔF/F", "Scale", "ΔF/F per brightness", median, own[RANGE.name].spread)

        def respond(spikes: Tensor, shape: Theta, frame_rate: Tensor) -> Tensor:
            rest = {name: values[:1] for name, values in usual.items()}
            return self._brightening(spikes, rest | dict(shape), frame_rate)

        grid = {own[INFLUX.name]: (-1.5, -0.5, 0.5, 1.5), own[EXTRUSION.name]: (-1.2, 0.0, 1.2)}
        shape = ShapeGrid(grid, scale, respond, n_frames=600).fit(measured, counts, weights, rate)
        b_rest, b_full = (float(value) for value in self._brightness())
        rest = (1 / shape.pop("scale") - b_rest).clamp_min(b_full / 50)
        theta = usual | shape | {RANGE.name: 1 + (b_full / rest).clamp_min(0.05)}
        predicted = self._gain(theta[RANGE.name]).unsqueeze(-1) * self._brightening(counts, theta, rate)
        return theta | baseline_and_noise(measured, predicted, weights, rate)

    def _brightness(self) -> tuple[Tensor, Tensor]:
        """Brightness at rest and in saturating calcium."""
        scheme = self.medium.scheme
        rest, full = (scheme.steady_state(x) @ scheme.bright for x in (RESTING, SATURATING))
        return rest, full

    def _gain(self, dynamic_range: Tensor) -> Tensor:
        """ΔF/F per gain in brightness."""
        rest, full = (value.to(dynamic_range) for value in self._brightness())
        return 1 / (rest + full / (dynamic_range - 1).clamp_min(1e-2))

    def _brightening(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Brightness beyond that at rest, mean over each frame."""
        values = torch.stack(torch.broadcast_tensors(*(theta[p.name] for p in _OF_CELLS)), -1)
        rate = as_rate(frame_rate, values)
        batch = torch.broadcast_shapes(counts.shape[:-1], values.shape[:-1], rate.shape)
        n_frames = counts.shape[-1]
        spikes = counts.to(values.dtype).expand(*batch, n_frames).reshape(-1, n_frames)
        values, rate = values.expand(*batch, -1).reshape(len(spikes), -1), rate.expand(batch).reshape(-1)
        trace = torch.empty_like(spikes)
        for one in rate.unique():
            rows = (rate == one).nonzero().squeeze(-1)
            cells = Cells(*values[rows].unbind(-1))
            trace = trace.index_copy(0, rows, simulate_states(self.medium, cells, spikes[rows], float(one)))
        return trace.reshape(*batch, n_frames)


#: Of Broussard et al. (2025/26): 1e4 /s over 1e8 /M/s fill half of it.
_BROUSSARD = Cytosol(buffer=4000.0, half=100.0)
#: Of Greenberg et al. (2018).
_GREENBERG = Cytosol(buffer=63.77391739, half=3.391135289)


@final
class JGCaMP8f(IndicatorKinetics):
    """`IndicatorKinetics` with the constants of jGCaMP8f, fitted in vivo."""

    name: ClassVar[str] = "jgcamp8f"
    label: ClassVar[str] = "Nine states of jGCaMP8f"
    medium = Medium(JGCAMP8F.scheme, _BROUSSARD)


@final
class JGCaMP8m(IndicatorKinetics):
    """`IndicatorKinetics` with the constants of jGCaMP8m, fitted in vivo."""

    name: ClassVar[str] = "jgcamp8m"
    label: ClassVar[str] = "Nine states of jGCaMP8m"
    medium = Medium(JGCAMP8M.scheme, _BROUSSARD)


def _of_gcamp6(indicator: Prior, extrusion: Prior, influx: Prior, dynamic_range: Prior) -> tuple[Parameter, ...]:
    """θ of a GCaMP6: medians and spreads over the cells to which its rates were fitted; the store is Greenberg's."""
    cells = ((INDICATOR, indicator), (EXTRUSION, extrusion), (INFLUX, influx), (RANGE, dynamic_range))
    store = ((STORE_IN, (10.8, 0.3)), (STORE_OUT, (0.063, 0.3)))
    found = (replace(p, median=median, spread=spread) for p, (median, spread) in (*cells, *store))
    return (*found, BASELINE, NOISE)


@final
class GCaMP6s(IndicatorKinetics):
    """`IndicatorKinetics` of GCaMP6s, which binds four ions one after the other, with rates fitted in vivo."""

    name: ClassVar[str] = "gcamp6s"
    label: ClassVar[str] = "Five states of GCaMP6s"
    parameters: tuple[Parameter, ...] = _of_gcamp6((28.0, 1.2), (157.0, 0.4), (15.0, 0.5), (16.0, 1.0))
    medium = Medium(GCAMP6S.scheme, _GREENBERG)


@final
class GCaMP6f(IndicatorKinetics):
    """`IndicatorKinetics` of GCaMP6f, which binds four ions one after the other, with rates fitted in vivo."""

    name: ClassVar[str] = "gcamp6f"
    label: ClassVar[str] = "Five states of GCaMP6f"
    parameters: tuple[Parameter, ...] = _of_gcamp6((47.0, 1.2), (265.0, 0.5), (21.5, 0.5), (23.0, 1.0))
    medium = Medium(GCAMP6F.scheme, _GREENBERG)
