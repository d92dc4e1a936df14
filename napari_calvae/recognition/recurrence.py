"""A gated recurrent unit that draws its own inputs: one loop over time for sampling, scoring and their gradient.

``nn.GRU`` knows all of its inputs beforehand. Here each input is the count drawn in the frame before, which has a
handful of values only: their projections are a table, and what all samples share is computed once. With the activations
of the drawing kept, its log-probabilities have a gradient without a second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

#: Function of step and (sample, lane, output) readout of the state that gives the counts drawn in that step.
Draw = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """What one step needs, projected as far as samples have it in common; a lane is a stretch of one trace.

    Parameters
    ----------
    from_input
        (step, lane, 3 hidden) projection of the lane's inputs, with its bias; gates in the order of ``nn.GRU``.
    from_count
        (token, 3 hidden) projection of the count before.
    recurrent, bias
        (3 hidden, hidden) and (3 hidden,) of the state.
    readout
        (output, hidden) from the state to the outputs.
    """

    from_input: Float[Tensor, "step lane gates"]
    from_count: Float[Tensor, "token gates"]
    recurrent: Float[Tensor, "gates hidden"]
    bias: Float[Tensor, " gates"]
    readout: Float[Tensor, "output hidden"]

    def some(self, first: int, lanes: Int[Tensor, " chosen"]) -> Weights:
        """From a step on, for some of the lanes, each as often as it is named."""
        return replace(self, from_input=self.from_input[first:, lanes])


@dataclass(frozen=True)
class Run:
    """What `run` leaves behind.

    Parameters
    ----------
    tokens
        (step + 1, sample, lane) count before each step, and after the last one.
    out
        (step, sample, lane, output) readout of the state of each step; empty if not asked for.
    state
        (sample, lane, hidden) after the last step.
    kept
        Activations for the gradient, if asked for: states before each step and after the last one, gates, candidate
        state and its recurrent part.
    """

    tokens: Int[Tensor, "edge sample lane"]
    out: Float[Tensor, "step sample lane output"]
    state: Float[Tensor, "sample lane hidden"]
    kept: tuple[Tensor, ...] = ()


@torch.no_grad()
def run(
    weights: Weights,
    tokens: Int[Tensor, "edge sample lane"],
    state: Float[Tensor, "sample lane hidden"],
    draw: Draw | None = None,
    keep: bool = False,
    outputs: bool = True,
) -> Run:
    """Go through all steps from ``state``.

    Parameters
    ----------
    weights
        Of the recurrence.
    tokens
        Count before each step. With ``draw`` only the first is looked at, and the rest is overwritten.
    state
        Before the first step.
    draw
        Gives the counts drawn in a step; none where they are known.
    keep
        Whether to keep the activations for `differentiable`.
    outputs
        Whether to keep the readouts.
    """
    n_steps, n_lanes, _ = weights.from_input.shape
    n, size = tokens.shape[1], state.shape[-1]
    both = torch.cat([weights.recurrent, weights.readout]).T.contiguous()
    bias = torch.cat([weights.bias, weights.readout.new_zeros(len(weights.readout))])
    h = state.reshape(-1, size)
    projected = torch.addmm(bias, h, both)
    n_rows = n * n_lanes
    out = h.new_empty(n_steps if outputs else 0, n_rows, len(weights.readout))
    states = h.new_empty(n_steps + 1 if keep else 0, n_rows, size)
    gates = h.new_empty(n_steps if keep else 1, n_rows, 2 * size)
    candidates = h.new_empty(n_steps if keep else 1, n_rows, size)
    recalled = h.new_empty(n_steps if keep else 0, n_rows, size)
    if keep:
        states[0] = h
    for t in range(n_steps):
        at = t if keep else 0
        given = (weights.from_count[tokens[t]] + weights.from_input[t]).flatten(0, 1)
        gate = torch.sigmoid(given[:, : 2 * size].add_(projected[:, : 2 * size]), out=gates[at])
        old = projected[:, 2 * size : 3 * size]
        new = given[:, 2 * size :].addcmul_(gate[:, :size], old)
        new = torch.tanh(new, out=candidates[at])
        h = torch.lerp(new, h, gate[:, size:])
        if keep:
            states[t + 1], recalled[t] = h, old
        projected = torch.addmm(bias, h, both)
        readout = projected[:, 3 * size :]
        if outputs:
            out[t] = readout
        if draw is not None:
            tokens[t + 1] = draw(t, readout.unflatten(0, (n, n_lanes)))
    kept = (states, gates, candidates, recalled) if keep else ()
    return Run(tokens, out.unflatten(1, (n, n_lanes)), h.unflatten(0, (n, n_lanes)), kept)


def differentiable(weights: Weights, done: Run) -> Float[Tensor, "step sample lane output"]:
    """Outputs of a `run`, with their gradient for the weights if it kept its activations; the first state has none."""
    if not done.kept:
        return done.out
    return _Replay.apply(done, weights.from_input, weights.from_count, weights.recurrent, weights.bias, weights.readout)


class _Replay(torch.autograd.Function):
    """Backpropagation through time, a step at a time: what one step needs stays in the cache."""

    @staticmethod
    def forward(ctx: Any, done: Run, *weights: Tensor) -> Tensor:
        ctx.done = done
        ctx.save_for_backward(*weights)
        return done.out.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from_input, from_count, recurrent, bias, readout = ctx.saved_tensors
        states, gates, candidates, recalled = ctx.done.kept
        n_steps, n, n_lanes, _ = grad.shape
        size = states.shape[-1]
        before = one_hot(ctx.done.tokens[:-1].flatten(1), len(from_count)).to(grad.dtype)
        g_input, g_count = torch.empty_like(from_input), torch.zeros_like(from_count)
        g_recurrent, g_bias = torch.zeros_like(recurrent), torch.zeros_like(bias)
        g_readout = torch.zeros_like(readout)
        g = torch.zeros_like(states[0])
        inner = g.new_empty(n * n_lanes, 3 * size)  # of the inputs of reset, stay and candidate
        g_reset, g_stay, g_new = inner.split(size, -1)
        for t in range(n_steps - 1, -1, -1):
            out = grad[t].flatten(0, 1)
            g = g.addmm_(out, readout)
            g_readout.addmm_(out.T, states[t + 1])
            reset, stay = gates[t].chunk(2, -1)
            torch.mul(torch.addcmul(g, g, stay, value=-1), 1 - candidates[t].square(), out=g_new)
            torch.mul(g * (states[t] - candidates[t]), torch.addcmul(stay, stay, stay, value=-1), out=g_stay)
            torch.mul(g_new * recalled[t], torch.addcmul(reset, reset, reset, value=-1), out=g_reset)
            torch.sum(inner.unflatten(0, (n, n_lanes)), 0, out=g_input[t])
            g_count.addmm_(before[t].T, inner)
            g_new.mul_(reset)  # from here on the gates' inputs from the state
            g_bias += inner.sum(0)
            g_recurrent.addmm_(inner.T, states[t])
            g = (g * stay).addmm_(inner, recurrent)
        return None, g_input, g_count, g_recurrent, g_bias, g_readout
