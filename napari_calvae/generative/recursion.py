"""Recursions over time without a loop over time: what the generative models are built of.

Both functions are exact (to rounding), cost a number of operations linear in the number of frames at logarithmic depth,
and pass gradients to all of their arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

#: Frames per block of `exponential_filter`: one matrix product per block, and the same over the blocks.
BLOCK = 32


def linear_scan(a: Float[Tensor, "*a #time"], b: Float[Tensor, "*b time"]) -> Float[Tensor, "*out time"]:
    """Solve x_t = a_t x_{t−1} + b_t with x_{−1} = 0.

    Neighbouring steps are merged pairwise until one is left, or until the merged factors vanish: a recursion that
    forgets within 2^k frames takes k levels however long the recording is.

    Parameters
    ----------
    a, b
        (batch, time) factors and inputs; batches broadcast. |a| ≤ 1, or x grows.
    """
    a, b = torch.broadcast_tensors(a, b)
    return _LinearScan.apply(a, b)


class _LinearScan(torch.autograd.Function):
    """The adjoint of a linear recursion is the same recursion backwards in time, so nothing but x is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        x = _merge_pairs(a, b)
        ctx.save_for_backward(a, x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, x = ctx.saved_tensors
        following = pad(a[..., 1:], (0, 1))
        grad_b = _LinearScan.apply(following.flip(-1), grad.flip(-1)).flip(-1)
        return grad_b * pad(x[..., :-1], (1, 0)), grad_b


def _merge_pairs(a: Tensor, b: Tensor) -> Tensor:
    n = b.shape[-1]
    if n < 2 or bool(a.abs().amax() < torch.finfo(a.dtype).eps ** 2):
        return b.clone()
    even = 2 * (n // 2)
    odd_steps = _merge_pairs(
        a[..., 0:even:2] * a[..., 1:even:2],
        torch.addcmul(b[..., 1:even:2], a[..., 1:even:2], b[..., 0:even:2]),
    )
    x = b.clone()
    x[..., 1::2] = odd_steps
    x[..., 2::2] += a[..., 2::2] * odd_steps[..., : (n - 1) // 2]
    return x


def exponential_filter(
    x: Float[Tensor, "*x time"],
    first: Float[Tensor, "*batch"],
    tails: Float[Tensor, "*batch mode"],
    decays: Float[Tensor, "*batch mode"],
) -> Float[Tensor, "*out time"]:
    """Filter x with an impulse response that is a sum of exponentials.

    y_t = first · x_t + Σ_m tails_m Σ_{n ≥ 1} decays_m^{n−1} x_{t−n}

    Within blocks of `BLOCK` frames this is one product with a triangular Toeplitz matrix; what each block leaves behind
    decays from block to block as it does from frame to frame, so that this very filter passes it on, a level up.

    Parameters
    ----------
    x
        (batch, time) input; its batch broadcasts against that of the coefficients.
    first
        Response in the frame of the impulse.
    tails, decays
        Response one frame later, and its factor from frame to frame (0 to 1), per mode.
    """
    n = x.shape[-1]
    size = min(BLOCK, n)
    lags = torch.arange(size, device=x.device)
    powers = decays.unsqueeze(-1) ** lags.to(x.dtype)
    late = tails.unsqueeze(-1) * powers
    response = torch.cat([first.unsqueeze(-1), late[..., :-1].sum(-2)], -1)
    # Row j is the response to an impulse in frame j of the block: zeros, then as much of it as there is room for.
    within = pad(response, (size - 1, 0)).unfold(-1, size, 1).flip(-2)
    blocks = (pad(x, (0, -n % size)) if n % size else x).unflatten(-1, (-1, size))
    y = blocks @ within
    if blocks.shape[-2] > 1:
        left = blocks[..., :-1, :] @ powers.flip(-1).mT
        kept = powers[..., -1] * decays
        left = exponential_filter(left.mT, torch.ones_like(kept), kept.unsqueeze(-1), kept.unsqueeze(-1)).mT
        y[..., 1:, :] += left @ late
    return y.flatten(-2)[..., :n]
