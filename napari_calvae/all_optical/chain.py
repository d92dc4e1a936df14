"""A Markov chain whose states are draws from p(s, θ | F, stimulation): spikes, cells, network, each given the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Gamma

from napari_calvae.all_optical.coupling import Coefficients, Coupling, draw_connections, stack, unstack
from napari_calvae.all_optical.spikes import Recording, move_spikes
from napari_calvae.generative.all_optical import ARTEFACT, COUPLING, FALLOFF, GLARE, AllOptical
from napari_calvae.generative.linear_ar import AMPLITUDE, DECAY, RISE
from napari_calvae.generative.parameters import BASELINE, NOISE, Parameter

#: Acceptance that random walks are tuned to while the chain settles.
_ACCEPTANCE = 0.35
#: Random walks per sweep, of each kind.
_WALKS = 2
#: Reaches of the artefact that a start compares.
_N_GRID = 17
#: Mean and standard deviation of the amplitude under its prior, which is log-normal.
_MEAN = AMPLITUDE.median * math.exp(AMPLITUDE.spread**2 / 2)
_STD = _MEAN * math.sqrt(math.expm1(AMPLITUDE.spread**2))


class Chain:
    """State of the chain, and what leads to the next.

    Parameters
    ----------
    model, recording
        The distribution.
    counts, theta
        (cell, time) spikes per frame and parameters to begin with.
    generator
        Of every random number.
    coupled
        Without, weights stay as they are (zero, to begin with): every cell is by itself.

    Attributes
    ----------
    counts, theta
        The state.
    connected, connection
        (cell, cell) which weights are connections, and the probability of it given the weights.
    coefficients
        Drives, excitabilities and weights as they are distributed given the rest.
    """

    def __init__(
        self,
        model: AllOptical,
        recording: Recording,
        counts: Float[Tensor, "cell time"],
        theta: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        coupled: bool = True,
    ) -> None:
        self.model, self.recording, self.generator, self.coupled = model, recording, generator, coupled
        self.counts, self.theta = counts, dict(theta)
        self.connected: Bool[Tensor, "cell cell"] = torch.ones_like(self.theta["weights"], dtype=torch.bool)
        self.connection: Float[Tensor, "cell cell"] = torch.ones_like(self.theta["weights"])
        self._steps = {p.name: torch.tensor(0.1) for p in (GLARE, FALLOFF, COUPLING)}
        self._steps |= {name: torch.full((len(counts),), 0.05) for name in ("shape", AMPLITUDE.name)}
        self.coefficients: Coefficients = self._coupling().fit(self._stacked())

    @torch.no_grad()
    def sweep(self, settling: bool = False) -> None:
        """Renew everything once; while ``settling`` the random walks find their step lengths."""
        self.counts = move_spikes(self.model, self.recording, self.counts, self.theta, self.generator)
        self._renew_response(settling)
        self._renew_noise()
        self._renew_coupling(settling)
        for parameter in (FALLOFF, COUPLING) if self.coupled else (FALLOFF,):
            self._renew_reach(parameter, settling)

    @torch.no_grad()
    def seek_glare(self) -> None:
        """Set the reach of the artefact to the most probable of a grid over its prior, to begin a random walk there."""
        grid = GLARE.median * torch.exp(GLARE.spread * torch.linspace(-2, 2, _N_GRID))
        tried = [self.theta | {GLARE.name: value} for value in grid]
        self.theta = max(tried, key=lambda theta: float(self._evidence(theta)[0].sum() + _log_prior(GLARE, theta)))

    def log_joint(self) -> float:
        """Log p(F, s, θ), with θ unconstrained."""
        r = self.recording
        seen = self.model.log_prob(r.observed, self.counts, self.theta, r.frame_rate, r.light, r.valid > 0)
        return float(seen + self.model.log_prior(self.theta))

    def log_prob_cells(self) -> Float[Tensor, " cell"]:
        """Log p(F, s | θ) of each cell given the others."""
        r, model = self.recording, self.model
        seen = self._log_prob_seen(self.theta)
        mean = model.rates(model.inputs(self.counts, self.theta, r.frame_rate, r.light)) / r.frame_rate
        return seen + (self.counts * mean.log() - mean - torch.lgamma(self.counts + 1)).sum(-1)

    def _log_prob_seen(self, theta: Mapping[str, Tensor]) -> Float[Tensor, " cell"]:
        """Log p(F | s, θ) of each cell."""
        r, model = self.recording, self.model
        unlit = r.observed - model.artefacts(theta, r.light)
        return model.calcium.log_prob(unlit, self.counts, theta, r.frame_rate, r.valid > 0)

    def _coupling(self) -> Coupling:
        r, theta = self.recording, self.theta
        n_sources = len(self.counts) if self.coupled else 0
        filtered = self.model.filtered(self.counts, theta, r.frame_rate)[:n_sources]
        power = r.light.reaching(theta["falloff"])
        return Coupling(self.model, self.counts, filtered, power, r.frame_rate, self.connected[:, :n_sources])

    def _stacked(self) -> Float[Tensor, "cell coefficient"]:
        return stack(self.theta) if self.coupled else stack(self.theta)[:, :2]

    def _renew_coupling(self, settling: bool) -> None:
        coupling = self._coupling()
        self.coefficients = coupling.fit(self.coefficients.mode)
        drawn = coupling.draw(self._stacked(), self.coefficients, self.generator, settling)
        self.theta |= unstack(drawn) | ({} if self.coupled else {"weights": self.theta["weights"]})
        if self.coupled:
            self.connected, self.connection = draw_connections(self.model, drawn[:, 2:], self.generator)

    def _renew_reach(self, parameter: Parameter, settling: bool) -> None:
        """Random walk of a scale that all cells share, given the coefficients of the inputs."""
        r = self.recording

        def density(theta: Mapping[str, Tensor]) -> Tensor:
            seen = self.model.log_prob_counts(self.counts, theta, r.frame_rate, r.light)
            return seen + _log_prior(parameter, theta)

        new = self.theta | {parameter.name: self._walk(parameter.name, self.theta[parameter.name])}
        if self._accept(density(new) - density(self.theta), parameter.name, settling):
            self.theta = new

    def _renew_noise(self) -> None:
        """From its distribution under a flat prior of its logarithm, accepted by the prior that it has."""
        r, theta = self.recording, self.theta
        expected = self.model.fluorescence(self.counts, theta, r.frame_rate, r.light)
        power = (r.valid * (r.observed - expected) ** 2).sum(-1, dtype=torch.double)
        shape = (0.5 * r.valid.sum(-1).double()).clamp_min(0.5)
        precision = _gamma(shape, self.generator) / (0.5 * power).clamp_min(1e-12)
        new = (precision**-0.5 / math.sqrt(r.frame_rate)).float()

        taken = self._accept(_log_prior(NOISE, {NOISE.name: new}) - _log_prior(NOISE, theta))
        self.theta[NOISE.name] = torch.where(taken, new, theta[NOISE.name])

    def _renew_response(self, settling: bool) -> None:
        """Shape of the response and reach of the artefact, each with the coefficients that are linear given them.

        A walk of the former draws the latter anew from their normal distribution, under which they are integrated out
        of the ratio; what their priors differ from normal ones is put right by it.
        """
        for walk in range(1 + _WALKS):
            new = dict(self.theta)
            if walk:
                new |= {p.name: self._walk("shape", self.theta[p.name]) for p in (RISE, DECAY)}
            ratio, new = self._linear(new)
            taken = self._accept(ratio, "shape" if walk else "", settling)
            self.theta |= {name: torch.where(taken, new[name], self.theta[name]) for name in new}
        for _ in range(_WALKS):
            # The log-normal prior's tail is heavier than that of the normal draw, which gets there too seldom.
            new = self.theta | {AMPLITUDE.name: self._walk(AMPLITUDE.name, self.theta[AMPLITUDE.name])}
            change = self._log_prob_seen(new) + _log_prior(AMPLITUDE, new)
            change = change - self._log_prob_seen(self.theta) - _log_prior(AMPLITUDE, self.theta)
            taken = self._accept(change, AMPLITUDE.name, settling)
            self.theta[AMPLITUDE.name] = torch.where(taken, new[AMPLITUDE.name], self.theta[AMPLITUDE.name])
        for _ in range(_WALKS):
            new = self.theta | {GLARE.name: self._walk(GLARE.name, self.theta[GLARE.name])}
            ratio, linear = self._linear(new)
            change = _log_prior(GLARE, new) - _log_prior(GLARE, self.theta)
            if self._accept(ratio.sum() + change, GLARE.name, settling):
                self.theta |= new | linear

    def _linear(self, new: dict[str, Tensor]) -> tuple[Float[Tensor, " cell"], dict[str, Tensor]]:
        """Draw amplitude, artefact and baseline given the ``new`` rest; and the log-ratio to accept all that by."""
        value, mean, factor = self._evidence(new)
        normal = torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype)
        drawn = mean + torch.linalg.solve_triangular(factor.mT, normal[..., None], upper=True)[..., 0]
        before, _, _ = self._evidence(self.theta)
        ratio = value + _correction(drawn[:, 0], new) - before
        ratio = ratio - _correction(self.theta[AMPLITUDE.name].double(), self.theta)
        amplitude, artefact, baseline = drawn.float().unbind(1)
        names = (RISE.name, DECAY.name)
        linear = {AMPLITUDE.name: amplitude, ARTEFACT.name: artefact, BASELINE.name: baseline}
        return ratio, {name: new[name] for name in names} | linear

    def _evidence(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a linear model under normal priors: log-evidence up to a constant, mean, factor of the precision."""
        r = self.recording
        nothing = torch.zeros_like(theta[BASELINE.name])
        unit = {**theta, AMPLITUDE.name: torch.ones_like(nothing), BASELINE.name: nothing}
        response = self.model.calcium.fluorescence(self.counts, unit, r.frame_rate)
        light = r.light.reaching(theta[GLARE.name]).expand_as(response)
        columns = torch.stack([response, light, torch.ones_like(response)], 1).double()
        noise = self.model.calcium.noise_std(theta, r.frame_rate)[:, None]
        weighted = columns * (r.valid / noise**2)[:, None]
        prior = columns.new_tensor([_STD, ARTEFACT.spread, BASELINE.spread]) ** -2
        centre = columns.new_tensor([_MEAN, ARTEFACT.median, BASELINE.median])
        precision = weighted @ columns.mT + torch.diag(prior)
        pull = (weighted @ r.observed.double()[..., None])[..., 0] + prior * centre
        factor = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve(pull[..., None], factor)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * ((pull * mean).sum(-1) - log_det), mean, factor

    def _walk(self, name: str, value: Tensor) -> Tensor:
        """A step of a positive number's logarithm."""
        return value * torch.exp(self._steps[name] * torch.randn(value.shape, generator=self.generator))

    def _accept(self, log_ratio: Tensor, name: str = "", settling: bool = False) -> Bool[Tensor, "*batch"]:
        """Metropolis–Hastings; ``name`` is of the step whose length is to be tuned."""
        taken = torch.rand(log_ratio.shape, generator=self.generator).log() < log_ratio
        if name and settling:
            chance = log_ratio.clamp_max(0).exp().nan_to_num(0).float()
            self._steps[name] = (self._steps[name] * torch.exp(0.3 * (chance - _ACCEPTANCE))).clamp(1e-3, 1.0)
        return taken


def _correction(amplitude: Float[Tensor, " cell"], theta: Mapping[str, Tensor]) -> Float[Tensor, " cell"]:
    """Log-prior of amplitude and shape, less that of the normal amplitude that `_evidence` assumes; −∞ below zero."""
    log_amplitude = amplitude.clamp_min(1e-12).log()
    z = (log_amplitude - AMPLITUDE.centre) / AMPLITUDE.spread
    total = -0.5 * z**2 - log_amplitude + 0.5 * ((amplitude - _MEAN) / _STD) ** 2
    return torch.where(amplitude > 0, total + _log_prior(RISE, theta) + _log_prior(DECAY, theta), -torch.inf)


def _log_prior(parameter: Parameter, theta: Mapping[str, Tensor]) -> Tensor:
    """Log-density of a positive parameter's logarithm, up to a constant."""
    return -0.5 * ((theta[parameter.name].log() - parameter.centre) / parameter.spread) ** 2


def _gamma(shape: Float[Tensor, " cell"], generator: torch.Generator) -> Float[Tensor, " cell"]:
    """Gamma variables of scale one; torch draws them from its global generator only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return Gamma(shape, torch.ones_like(shape)).sample()
