"""One training loop, as a generator that yields a record per step: stop consuming it and training has stopped."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from napari_calvae.formats import whole_files
from napari_calvae.recording import RecordingError

if TYPE_CHECKING:
    from napari_calvae.vae import SpikeVAE


class TrainConfig(BaseModel):
    """How to train; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_steps: int = Field(300, ge=1, title="Steps", description="Updates of the parameters")
    learning_rate: float = Field(5e-4, gt=0, le=10, title="Learning rate", description="Of AdamW, after warm-up")
    weight_decay: float = Field(1e-4, ge=0, title="Weight decay", description="Of AdamW")
    warmup: float = Field(0.05, ge=0, le=1, title="Warm-up", description="Share of the steps until the full rate")
    cosine: bool = Field(True, title="Cosine decay", description="Let the learning rate fall to zero at the end")
    ema: float = Field(0.0, ge=0, lt=1, title="Averaging", description="Decay of the running average of the weights")
    clip: float = Field(1.0, gt=0, title="Gradient clip", description="Largest norm of the gradient")
    batch: int = Field(8, ge=1, title="Snippets", description="Snippets of traces per step")
    window: int = Field(512, ge=16, title="Snippet", description="Length of a snippet in frames")
    n_samples: int = Field(8, ge=2, title="Samples", description="Spike trains drawn per snippet (VIMCO)")
    seed: int = Field(0, ge=0, le=2**40, title="Seed", description="Of every random number in training")
    cell_learning_rate: float = Field(
        5e-3, gt=0, title="Learning rate of cells", description="Of each cell's parameters, in spreads of their prior"
    )
    margin: float = Field(
        0.25,
        ge=0,
        lt=0.6,
        title="Margin",
        description="Share of a snippet at its beginning, and half as much at its end, that is context only (VIMCO)",
    )
    rate_spread: float = Field(
        0.3, gt=0, title="Doubt about rates", description="Spread of the log-normal prior of each cell's rate (VIMCO)"
    )
    label_weight: float = Field(
        10.0, ge=0, title="Weight of labels", description="Of true spikes beside the bound, if some cells have them"
    )
    discrepancy_weight: float = Field(
        100.0, ge=0, title="Weight of the discrepancy", description="Of the spikes from their prior, in nats (InfoVAE)"
    )
    shared_kinetics: bool = Field(
        False,
        title="Same kinetics",
        description="All cells have the same time constants and cooperativity, and amplitudes and noise of their own",
    )
    early_stopping: bool = Field(
        False, title="Early stopping", description="Stop a fit when the cells that it holds out stop gaining"
    )
    check_every: int = Field(20, ge=1, title="Check", description="Steps between held-out values, if there are any")
    patience: int = Field(5, ge=1, title="Patience", description="Checks without a better held-out value before a stop")
    checkpoint_every: int = Field(
        200, ge=1, title="Checkpoint", description="Steps between checkpoints, if any are kept"
    )
    snapshot_every: int = Field(
        0, ge=0, title="Snapshots", description="Steps between copies of the model that a fit reports; 0 for none"
    )


@dataclass(frozen=True)
class TrainRecord:
    """What one step of training did: the loss and its terms, and the seconds it has taken so far.

    ``model`` is a copy of what is being fitted as it is after this step, at the first and every
    ``TrainConfig.snapshot_every``-th step of a fit, to infer with while the fit goes on.
    """

    step: int
    n_steps: int
    loss: float
    seconds: float
    terms: dict[str, float] = field(default_factory=dict)
    model: SpikeVAE | None = None


def load_optimizer() -> None:
    """Import what torch imports with its first optimizer: 800 modules, some of which hold the interpreter for 0.3 s."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


#: A loss for one step, drawn with the given generator, and terms to report.
Loss = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]


#: A loss on data that no step sees; smaller is better.
HeldOut = Callable[[], float]


def iter_train(
    modules: nn.Module,
    loss: Loss,
    config: TrainConfig,
    checkpoint: Path | None = None,
    *,
    held_out: HeldOut | None = None,
    rates: Mapping[str, float] | None = None,
    made_for: str = "",
) -> Iterator[TrainRecord]:
    """Minimise ``loss`` over the parameters of ``modules``, in place.

    Parameters
    ----------
    modules
        Whatever is trained. After the last step it holds the running average of its weights if ``config.ema`` > 0, and
        with ``held_out`` those of the best check.
    loss
        Called once per step. Every random number it needs comes from the generator, whose seed is derived from
        ``config.seed`` and the step: a resumed run sees the same data as an undisturbed one.
    checkpoint
        File from which training resumes when it exists, and which is rewritten every ``config.checkpoint_every`` steps.
    held_out
        Called before the first step, every ``config.check_every`` steps and after the last one, on the weights that
        would be kept. Training stops when ``config.patience`` checks in a row found nothing better. Reported as the
        term ``held_out``.
    rates
        Learning rates of the parameters whose names begin with these, in place of ``config.learning_rate``; they do not
        decay towards zero (``config.weight_decay``).
    made_for
        What is trained on what. A checkpoint that was made for something else is refused.

    Raises
    ------
    RecordingError
        If the checkpoint was made for something else.
    """
    groups = _parameter_groups(modules, config, rates or {})
    optimiser = torch.optim.AdamW(groups)
    average = [p.detach().clone() for p in modules.parameters()] if config.ema else []
    watch = _Watch(modules, average, held_out, config.patience)
    start, before = 0, 0.0
    history: list[dict[str, Any]] = []
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state.get("made_for", "") != made_for:
            raise RecordingError(
                f"checkpoint {checkpoint.name}: expected one of this fit ({made_for or 'unnamed'}), got one of another "
                f"({state.get('made_for') or 'unnamed'}). Give another name, or the same recording, model and settings."
            )
        modules.load_state_dict(state["modules"])
        optimiser.load_state_dict(state["optimiser"])
        start, before = state["step"], state["seconds"]
        for kept, saved in zip(average, state["average"], strict=True):
            kept.copy_(saved)
        watch.load(state["watch"])
        history = state["history"]
    elif held_out is not None:
        watch.check()
    began = time.perf_counter()
    modules.train()
    for step in range(start, config.n_steps):
        if watch.stopped:
            break
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = group["full_rate"] * _schedule(step, config)
        value, terms = loss(generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(modules.parameters(), config.clip)
        if bool(torch.isfinite(norm)):
            optimiser.step()
        for kept, p in zip(average, modules.parameters(), strict=bool(average)):
            # A young average forgets faster, so that it does not remember the initial weights.
            kept.lerp_(p.detach(), max(1 - config.ema, 1 / (step + 2)))
        last = step + 1 == config.n_steps
        if held_out is not None and (last or (step + 1) % config.check_every == 0):
            terms = {**terms, "held_out": watch.check()}
        seconds = before + time.perf_counter() - began
        record = TrainRecord(step + 1, config.n_steps, float(value.detach()), seconds, terms)
        history.append(asdict(record))
        if checkpoint is not None and (last or watch.stopped or (step + 1) % config.checkpoint_every == 0):
            state = {
                "modules": modules.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average,
                "watch": watch.state(),
                "step": step + 1,
                "seconds": seconds,
                "history": history,
                "made_for": made_for,
            }
            content = io.BytesIO()  # by itself torch does not say that a disk is full
            torch.save(state, content)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with whole_files(checkpoint) as (temporary,):
                temporary.write_bytes(content.getbuffer())
        yield record
    watch.finish()
    modules.eval()


def read_history(checkpoint: Path) -> list[TrainRecord]:
    """Records of every step until a checkpoint was written, those before an interruption included."""
    return [TrainRecord(**fields) for fields in torch.load(checkpoint, weights_only=True)["history"]]


class _Watch:
    """Keeps the weights of the best held-out value, and says when to stop."""

    def __init__(self, modules: nn.Module, average: list[Tensor], held_out: HeldOut | None, patience: int) -> None:
        self.modules, self.average, self.held_out, self.patience = modules, average, held_out, patience
        self.best: list[Tensor] = []
        self.value, self.worse = float("inf"), 0

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.worse >= self.patience

    def check(self) -> float:
        """Held-out value of the weights that would be kept now."""
        training = self.modules.training
        self.modules.eval()
        with torch.no_grad(), self._averaged():
            value = self.held_out() if self.held_out is not None else float("nan")
            if value < self.value:
                self.value, self.worse = value, 0
                self.best = [p.detach().clone() for p in self.modules.parameters()]
            else:
                self.worse += 1
        self.modules.train(training)
        return value

    @torch.no_grad()
    def finish(self) -> None:
        """Put the weights in place that are kept."""
        kept = self.best or self.average
        for saved, p in zip(kept, self.modules.parameters(), strict=bool(kept)):
            p.copy_(saved)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember."""
        return {"best": self.best, "value": self.value, "worse": self.worse}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self.value, self.worse = state["best"], state["value"], state["worse"]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The running average in place of the weights, for a while."""
        own = [p.detach().clone() for p in self.modules.parameters()] if self.average else []
        for saved, p in zip(self.average, self.modules.parameters(), strict=bool(own)):
            p.copy_(saved)
        try:
            yield
        finally:
            for saved, p in zip(own, self.modules.parameters(), strict=bool(own)):
                p.copy_(saved)


def _parameter_groups(modules: nn.Module, config: TrainConfig, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters by learning rate; each belongs to the first prefix that its name begins with."""
    groups: dict[str, dict[str, Any]] = {
        prefix: {"params": [], "full_rate": rate, "weight_decay": 0.0} for prefix, rate in rates.items()
    }
    groups[""] = {"params": [], "full_rate": config.learning_rate, "weight_decay": config.weight_decay}
    for name, parameter in modules.named_parameters():
        next(group for prefix, group in groups.items() if name.startswith(prefix))["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _schedule(step: int, config: TrainConfig) -> float:
    """Share of the full learning rate."""
    done = step / config.n_steps
    warm = min(1.0, (step + 1) / max(1.0, config.warmup * config.n_steps))
    decay = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done)))) if config.cosine else 1.0
    return warm * decay
