"""One training loop, as a generator that yields a record per step: stop consuming it and training has stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from napari_calvae.formats import whole_files


class TrainConfig(BaseModel):
    """How to train; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_steps: int = Field(300, ge=1, title="Steps", description="Updates of the parameters")
    learning_rate: float = Field(5e-4, gt=0, title="Learning rate", description="Of AdamW, after warm-up")
    weight_decay: float = Field(1e-4, ge=0, title="Weight decay", description="Of AdamW")
    warmup: float = Field(0.05, ge=0, le=1, title="Warm-up", description="Share of the steps until the full rate")
    cosine: bool = Field(True, title="Cosine decay", description="Let the learning rate fall to zero at the end")
    ema: float = Field(0.0, ge=0, lt=1, title="Averaging", description="Decay of the running average of the weights")
    clip: float = Field(1.0, gt=0, title="Gradient clip", description="Largest norm of the gradient")
    batch: int = Field(8, ge=1, title="Snippets", description="Snippets of traces per step")
    window: int = Field(512, ge=16, title="Snippet", description="Length of a snippet in frames")
    n_samples: int = Field(8, ge=2, title="Samples", description="Spike trains drawn per snippet (VIMCO)")
    seed: int = Field(0, ge=0, title="Seed", description="Of every random number in training")
    checkpoint_every: int = Field(
        200, ge=1, title="Checkpoint", description="Steps between checkpoints, if any are kept"
    )


@dataclass(frozen=True)
class TrainRecord:
    """What one step of training did: the loss and its terms, and the seconds it has taken so far."""

    step: int
    n_steps: int
    loss: float
    seconds: float
    terms: dict[str, float] = field(default_factory=dict)


#: A loss for one step, drawn with the given generator, and terms to report.
Loss = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]


def iter_train(
    modules: nn.Module, loss: Loss, config: TrainConfig, checkpoint: Path | None = None
) -> Iterator[TrainRecord]:
    """Minimise ``loss`` over the parameters of ``modules``, in place.

    Parameters
    ----------
    modules
        Whatever is trained. After the last step it holds the running average of its weights if ``config.ema`` > 0.
    loss
        Called once per step. Every random number it needs comes from the generator, whose seed is derived from
        ``config.seed`` and the step: a resumed run sees the same data as an undisturbed one.
    checkpoint
        File from which training resumes when it exists, and which is rewritten every ``config.checkpoint_every`` steps.
    """
    optimiser = torch.optim.AdamW(modules.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = [p.detach().clone() for p in modules.parameters()] if config.ema else []
    start, before = 0, 0.0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimiser.load_state_dict(state["optimiser"])
        average, start, before = state["average"], state["step"], state["seconds"]
    began = time.perf_counter()
    modules.train()
    for step in range(start, config.n_steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rate = _schedule(step, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        value, terms = loss(generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(modules.parameters(), config.clip)
        if bool(torch.isfinite(norm)):
            optimiser.step()
        for kept, p in zip(average, modules.parameters(), strict=bool(average)):
            # A young average forgets faster, so that it does not remember the initial weights.
            kept.lerp_(p.detach(), max(1 - config.ema, 1 / (step + 2)))
        seconds = before + time.perf_counter() - began
        if checkpoint is not None and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.n_steps):
            state = {
                "modules": modules.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average,
                "step": step + 1,
                "seconds": seconds,
            }
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with whole_files(checkpoint) as (temporary,):
                torch.save(state, temporary)
        yield TrainRecord(step + 1, config.n_steps, float(value.detach()), seconds, terms)
    with torch.no_grad():
        for kept, p in zip(average, modules.parameters(), strict=bool(average)):
            p.copy_(kept)
    modules.eval()


def _schedule(step: int, config: TrainConfig) -> float:
    done = step / config.n_steps
    warm = min(1.0, (step + 1) / max(1.0, config.warmup * config.n_steps))
    decay = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done)))) if config.cosine else 1.0
    return config.learning_rate * warm * decay
