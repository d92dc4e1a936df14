"""Cells of the SCDF model, as in the second experiment of DeepSpike, and how networks are fitted to their fluorescence.

Speiser et al. (2017), section 3. The truth is made by the paper's recursion, step by step, and not by the model that is
fitted, which takes the same constants for a process in continuous time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from napari_calvae import objectives
from napari_calvae.benchmark.paper.base import Setting
from napari_calvae.fitting.losses import BoundLoss, Snippets
from napari_calvae.generative import DyeBinding, GenerativeModel, Parameter, SpikePrior, Theta
from napari_calvae.generative.parameters import as_rate
from napari_calvae.generative.recursion import exponential_filter, linear_scan
from napari_calvae.recognition import build_network
from napari_calvae.recording import Traces
from napari_calvae.training import Loss, TrainConfig, iter_train
from napari_calvae.vae import SpikeVAE

FRAME_RATE = 60.0
#: Spikes per second; a third of the cells each.
RATES = (0.7, 1.0, 1.2)
#: Ranges of the original's unconstrained units.
RANGES = {
    "gamma": (2.5, 3.5),
    "alpha": (0.2, 0.5),
    "beta": (-0.2, -0.2),
    "sigma": (0.02, 0.05),
    "kappa": (2.0, 2.5),
    "eta": (-5.9, -4.9),
    "zeta": (0.5, 1.0),
    "d_max": (5.5, 6.5),
}
#: Frames at either end of what is scored that are left out, as in the original.
BUFFER = 100
#: Peak of the response to one spike over the noise of a frame, in the simulations that training starts on.
_VISIBLE = (1.0, 20.0)


@dataclass(frozen=True, eq=False)
class Cells:
    """Simulated cells: (cell, time) fluorescence, its noise-free part and spikes, and θ in physical units, (cell,)."""

    dff: np.ndarray
    clean: np.ndarray
    spikes: np.ndarray
    theta: dict[str, np.ndarray]

    def traces(self, n_frames: int | None = None) -> Traces:
        """The first frames as a recording."""
        return Traces(self.dff[:, :n_frames].astype(np.float32), frame_rate=FRAME_RATE, unit="dff")

    def late(self, first: int) -> Cells:
        """The same from a frame on."""
        return Cells(self.dff[:, first:], self.clean[:, first:], self.spikes[:, first:], self.theta)

    @property
    def observed(self) -> Tensor:
        """(cell, time) fluorescence as networks want it."""
        return torch.from_numpy(self.dff.astype(np.float32))


def simulate(n_cells: int, n_frames: int, seed: int) -> Cells:
    """Simulate cells by the recursion of Speiser et al. (2017), section 2.2, step by step.

    c_t = γ c_{t−1} + s_t, d_t = k_on c_t^h (d_max − d_{t−1}) + κ d_{t−1} with d ≤ d_max, F_t = α d_t + β + σ noise;
    γ and κ by sigmoid, α and k_on by softplus, h = 1 + softplus(ζ), of numbers that are uniform in `RANGES`. At most
    one spike per frame.
    """
    rng = np.random.default_rng(seed)
    u = {name: rng.uniform(low, high, n_cells) for name, (low, high) in RANGES.items()}
    gamma, kappa = (1 / (1 + np.exp(-u[name])) for name in ("gamma", "kappa"))
    alpha, k_on, hill = (np.logaddexp(0, u[name]) for name in ("alpha", "eta", "zeta"))
    hill, d_max = 1 + hill, u["d_max"]
    spikes = rng.random((n_cells, n_frames)) < np.resize(RATES, n_cells)[:, None] / FRAME_RATE
    c, d = np.zeros(n_cells), np.zeros(n_cells)
    bound = np.empty((n_cells, n_frames))
    for t in range(n_frames):
        c = gamma * c + spikes[:, t]
        d = np.minimum(k_on * c**hill * (d_max - d) + kappa * d, d_max)
        bound[:, t] = d
    clean = alpha[:, None] * bound + u["beta"][:, None]
    theta = {
        "tau_calcium": -1 / (FRAME_RATE * np.log(gamma)),
        "k_on": k_on * FRAME_RATE,
        "hill": hill,
        "tau_unbind": -1 / (FRAME_RATE * np.log(kappa)),
        "saturation": alpha * d_max,
        "baseline": u["beta"],
        "noise_density": u["sigma"] / np.sqrt(FRAME_RATE),
    }
    dff = clean + u["sigma"][:, None] * rng.standard_normal(clean.shape)
    return Cells(dff, clean, spikes.astype(np.uint8), theta)


@final
class PaperStep(GenerativeModel):
    """`DyeBinding` in the paper's steps: of first order, a frame's spikes at its beginning and F read at its end.

    c_t = γ c_{t−1} + s_t, d_t = k_on dt c_t^h (1 − d_{t−1}) + κ d_{t−1}, F = saturation · d + baseline, with
    γ = e^{−dt/τ_calcium}, κ = e^{−dt/τ_unbind} and d in units of d_max, as in `simulate`. The original fitted the
    recursion that its cells came from. `DyeBinding` steps exactly and averages over where in its frame a spike was;
    given true spikes and constants, that alone misses these cells by half the standard deviation of their noise.
    """

    name: ClassVar[str] = DyeBinding.name
    label: ClassVar[str] = DyeBinding.label
    parameters: tuple[Parameter, ...] = DyeBinding.parameters

    def fluorescence(
        self, counts: Num[Tensor, "*counts time"], theta: Theta, frame_rate: float | Num[Tensor, "*rate"]
    ) -> Float[Tensor, "*out time"]:
        """Noise-free ΔF/F at the end of each frame."""
        rate = as_rate(frame_rate, theta["tau_calcium"])
        gamma, kappa = (torch.exp(-1 / (rate * theta[name])) for name in ("tau_calcium", "tau_unbind"))
        one = torch.ones_like(gamma)
        calcium = exponential_filter(counts.to(gamma.dtype), one, gamma.unsqueeze(-1), gamma.unsqueeze(-1))
        # The slope of c^h at c = 0 is taken as zero; more than all free dye cannot bind in a step.
        power = calcium.clamp_min(1e-9) ** theta["hill"].unsqueeze(-1) * (calcium > 1e-9)
        binding = (power * (theta["k_on"] / rate).unsqueeze(-1)).clamp_max(1)
        bound = linear_scan(kappa.unsqueeze(-1) - binding, binding)
        return theta["baseline"].unsqueeze(-1) + theta["saturation"].unsqueeze(-1) * bound

    def first_guess(
        self,
        observed: Float[Tensor, "roi time"],
        counts: Num[Tensor, "roi time"],
        frame_rate: float | Num[Tensor, "*rate"],
        valid: Bool[Tensor, "roi time"] | None = None,
    ) -> dict[str, Tensor]:
        """That of `DyeBinding`."""
        return DyeBinding().first_guess(observed, counts, frame_rate, valid)


_WARM = TrainConfig(n_steps=1500, learning_rate=3e-3, window=256, batch=48, ema=0.99)
_THETA = TrainConfig(n_steps=300, learning_rate=6e-2, window=224, batch=12, n_samples=32)
_SLEEP = TrainConfig(n_steps=200, learning_rate=1e-3, window=256, batch=48, ema=0.98)
_BOUND = TrainConfig(
    n_steps=500, learning_rate=1e-4, cell_learning_rate=2e-2, window=224, batch=12, n_samples=64, ema=0.98
)
_LAST = _SLEEP.model_copy(update={"n_steps": 12_000, "learning_rate": 2e-3, "ema": 0.998})
#: A shorter last stage, for networks that are compared with each other and not with the original.
COMPARED = _SLEEP.model_copy(update={"n_steps": 1000})
_SHORT = TrainConfig(n_steps=2, window=32, batch=4, n_samples=4)


@dataclass(frozen=True)
class Plan:
    """How much of everything: sizes, and how each stage of `fit_stages` trains."""

    n_cells: int = 30
    n_frames: int = 15_000
    n_fit: int = 12_000
    n_rounds: int = 4
    warm: TrainConfig = _WARM
    theta: TrainConfig = _THETA
    sleep: TrainConfig = _SLEEP
    bound: TrainConfig = _BOUND
    last: TrainConfig = _LAST


QUICK = Plan(
    n_cells=3, n_frames=900, n_fit=500, n_rounds=1, warm=_SHORT, theta=_SHORT, sleep=_SHORT, bound=_SHORT, last=_SHORT
)

#: Arguments of the networks; the factorised one is as large as lets both cost about the same per step.
NETWORK: dict[str, dict[str, Any]] = {"autoregressive": {}, "factorized": {"widths": (8, 16, 24, 32)}}


class PriorLoss:
    """Minus log q of the spikes of cells that the generative model makes, per frame: the sleep phase.

    Parameters
    ----------
    model
        Its network is trained.
    thetas
        Draws θ of some cells.
    config
        Snippets per step, from a fourth as many cells.
    """

    def __init__(self, model: SpikeVAE, thetas: Callable[[int, torch.Generator], Theta], config: TrainConfig) -> None:
        self.model, self.thetas, self.config = model, thetas, config

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and terms of one step."""
        generative, network = self.model.generative, self.model.recognition
        n, lead = max(1, self.config.batch // 4), 120
        theta = self.thetas(n, generator)
        rates = torch.exp(0.6 * torch.randn(n, generator=generator))
        prior = SpikePrior(rates, network.max_count)
        with torch.no_grad():
            counts = prior.sample((n, lead + 8 * self.config.window), FRAME_RATE, generator)
            dff = generative.simulate(counts, theta, FRAME_RATE, generator)[:, lead:]
        snippets = Snippets(Traces(dff.numpy(), frame_rate=FRAME_RATE, unit="dff"), self.config)
        index = snippets.draw(generator)
        log_q = snippets.posterior(network, index).log_prob(counts[:, lead:][index].long())
        return objectives.supervised(log_q, self.config.window), {}


def broad(generative: GenerativeModel) -> Callable[[int, torch.Generator], Theta]:
    """Draws θ from the prior of the generative model, of cells whose single spikes can just or well be seen."""
    pulse = torch.nn.functional.one_hot(torch.tensor(0), 120).float()

    def draw(n: int, generator: torch.Generator) -> Theta:
        theta = generative.sample_prior(32 * n, generator)
        with torch.no_grad():
            response = generative.fluorescence(pulse, theta, FRAME_RATE) - theta["baseline"][:, None]
            seen = response.amax(-1) / generative.noise_std(theta, FRAME_RATE)
        fits = (seen > _VISIBLE[0]) & (seen < _VISIBLE[1])
        # Where too few are in that range, those out of it follow.
        order = (~fits).int().argsort(stable=True)[:n]
        return {name: value[order] for name, value in theta.items()}

    return draw


def fitted_cells(bound: BoundLoss, jitter: float = 0.1) -> Callable[[int, torch.Generator], Theta]:
    """Draws θ from that of fitted cells as they are now, moved by ``jitter`` spreads of the prior."""
    cells = bound.cells
    u = cells(torch.arange(len(cells.start))).detach().clone()

    def draw(n: int, generator: torch.Generator) -> Theta:
        rows = torch.randint(len(u), (n,), generator=generator)
        moved = u[rows] + jitter * cells.spread * torch.randn((n, u.shape[1]), generator=generator)
        return bound.model.generative.constrain(moved)

    return draw


def blank_model(kind: str, seed: int) -> SpikeVAE:
    """An untrained network for at most one spike per frame, before the SCDF model."""
    torch.manual_seed(seed)
    return SpikeVAE(build_network(kind, {"max_count": 1, **NETWORK[kind]}), DyeBinding(), SpikePrior(1.0, 1))


@dataclass(eq=False)
class Fitted:
    """A network and per-cell parameters, and seconds it took."""

    model: SpikeVAE
    bound: BoundLoss
    seconds: float

    def theta(self) -> dict[str, Tensor]:
        """θ of every cell."""
        cells = self.bound.cells
        return self.model.generative.constrain(cells(torch.arange(len(cells.start))).detach())


def train(setting: Setting, name: str, modules: nn.Module, loss: Loss, config: TrainConfig) -> float:
    """Train, or resume from the cache; seconds that it took, all together."""
    checkpoint = setting.cache / f"scdf-{name}-{setting.seed}{'-quick' if setting.quick else ''}.pt"
    began, seconds = time.perf_counter(), 0.0
    for record in iter_train(modules, loss, config, checkpoint, rates={"1.": config.cell_learning_rate}):
        seconds = record.seconds
    if not seconds and checkpoint.is_file():
        seconds = float(torch.load(checkpoint, weights_only=True)["seconds"])
    return max(seconds, time.perf_counter() - began)


def fit_stages(setting: Setting, plan: Plan, cells: Cells, kind: str) -> Iterator[tuple[str, Fitted]]:
    """Warm start on the broad prior, rounds of fitting and sleep, VIMCO, and sleep on the cells that it leaves.

    In a round each cell's θ and rate follow from spikes as the network sees them, weighted by what they explain, and
    the network then learns from simulations of such cells: the wake and the sleep phase of wake-sleep. VIMCO fits all
    together, network included, to the cells' own traces. What is yielded holds until the next stage begins.
    """

    def seeded(config: TrainConfig, k: int = 0) -> TrainConfig:
        return config.model_copy(update={"seed": 100 * setting.seed + k})

    model = blank_model(kind, setting.seed)
    model.generative = PaperStep()
    network = model.recognition
    warm = seeded(plan.warm)
    seconds = train(setting, f"{kind}-warm", network, PriorLoss(model, broad(model.generative), warm), warm)
    began = time.perf_counter()
    traces = cells.traces(plan.n_fit)
    bound = BoundLoss(model, Snippets(traces, plan.theta), plan.theta, objectives.wake_theta)
    seconds += time.perf_counter() - began
    yield "warm start", Fitted(model, bound, seconds)

    def sleep(name: str, config: TrainConfig) -> float:
        return train(setting, f"{kind}-{name}", network, PriorLoss(model, fitted_cells(bound), config), config)

    for k in range(plan.n_rounds):
        network.requires_grad_(False)
        seconds += train(setting, f"{kind}-theta-{k}", bound.cells, bound, seeded(plan.theta, k))
        network.requires_grad_(True)
        seconds += sleep(f"sleep-{k}", seeded(plan.sleep, k))
    yield f"{plan.n_rounds} rounds of fitting and sleep", Fitted(model, bound, seconds)
    bound = BoundLoss(model, Snippets(traces, plan.bound), plan.bound, objectives.vimco, cells=bound.cells)
    both = nn.ModuleList([network, bound.cells])
    seconds += train(setting, f"{kind}-vimco", both, bound, seeded(plan.bound))
    yield "VIMCO", Fitted(model, bound, seconds)
    seconds += sleep(f"last-{plan.last.n_steps}", seeded(plan.last, plan.n_rounds))
    yield "sleep after VIMCO", Fitted(model, bound, seconds)
