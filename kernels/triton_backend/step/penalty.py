"""Activations, sparsity penalties and thresholds of SAEs that keep what is above a threshold (ReLU, JumpReLU).

For a kept pair of pre-activation u with z = u H(u - theta), the loss `|residual|^2 / n + lambda penalty / n` has, in units of
2 / n (`gradients.py`), the gradients

    dz = <residual, d> + lambda/2 f'(z |d|) |d|,      d|d| = lambda/2 f'(z |d|) z,
    dtheta = -(dz theta + s/2) K,                     du = dz H(u - theta) - dtheta if the estimator reaches u

with K the rectangular kernel over its width, f the penalty (identity, or tanh(c .)), and s the slope of one that counts steps.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import ceil_div, launch
from saelab.kernels.triton_backend.step.gradients import Gradients, Pairs
from saelab.kernels.triton_backend.step.keep import Kept

LINEAR, TANH, STEPS = 0, 1, 2
"""What is penalised: z |d|, tanh(c z |d|), or the number of steps."""
_BLOCK = 1024
_PAIRS = 128
_COLUMNS = 256
_WARPS = 4


class Penalty(NamedTuple):
    """What is the same in every step."""

    kind: int
    scale: float
    """c."""
    bandwidth: float
    """Width of the rectangular kernel."""
    to_input: bool
    """Whether the estimator reaches u."""


class Slopes(NamedTuple):
    """Of each kept pair, in the order of the list."""

    feature_acts: Float[Tensor, " room"]
    du: Float[Tensor, " room"]
    dtheta: Float[Tensor, " room"]
    dnorm: Float[Tensor, " room"]
    penalty: Float[Tensor, " room"]


class Sums(NamedTuple):
    """Of each feature."""

    dtheta: Float[Tensor, " d_sae"]
    """Gradient of the log threshold."""
    penalty: Float[Tensor, " d_sae"]
    fired: Int[Tensor, " d_sae"]
    """Tokens on which it is active."""


@triton.jit(do_not_specialize=["room", "d_sae"])
@no_type_check
def _activate_kernel(values_ptr, features_ptr, theta_ptr, z_ptr, fired_ptr, room, d_sae, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.load(features_ptr + pair, mask=pair < room, other=d_sae)
    real = feature < d_sae
    z = tl.load(values_ptr + pair, mask=real, other=0.0)
    if theta_ptr is not None:
        z = tl.where(z > tl.load(theta_ptr + feature, mask=real, other=0.0), z, 0.0)
    tl.store(z_ptr + pair, z, mask=pair < room)
    n = tl.sum((real & (z != 0)).to(tl.int32), axis=0)
    if n > 0:
        tl.atomic_add(fired_ptr, n)


@triton.jit(do_not_specialize=["room", "d_sae"])
@no_type_check
def _slopes_kernel(
    values_ptr, features_ptr, theta_ptr, norms_ptr, strength_ptr, z_ptr, dvalues_ptr, du_ptr, dtheta_ptr, dnorm_ptr,
    penalty_ptr, room, d_sae, scale, bandwidth, KIND: tl.constexpr, TO_INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.load(features_ptr + pair, mask=pair < room, other=d_sae)
    real = feature < d_sae
    u = tl.load(values_ptr + pair, mask=real, other=0.0)
    z = tl.load(z_ptr + pair, mask=real, other=0.0)
    dz = tl.load(dvalues_ptr + pair, mask=real, other=0.0)
    strength, step_slope = tl.load(strength_ptr) / 2, tl.load(strength_ptr + 1) / 2
    penalty, dnorm = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if norms_ptr is not None:
        norm = tl.load(norms_ptr + feature, mask=real, other=0.0)
        penalty = z * norm
        slope = tl.zeros([BLOCK], tl.float32) + 1.0
        if KIND == 1:
            decay = tl.exp(-2 * scale * tl.maximum(penalty, -penalty))
            size = (1 - decay) / (1 + decay)
            penalty = tl.where(penalty < 0, -size, size)
            slope = scale * (1 - size * size)
        dz += strength * slope * norm
        dnorm = strength * slope * z
    du = dz
    if theta_ptr is not None:
        theta = tl.load(theta_ptr + feature, mask=real, other=0.0)
        off = u - theta
        window = tl.where(tl.maximum(off, -off) < bandwidth / 2, 1.0 / bandwidth, 0.0)
        dtheta = -dz * theta * window
        if KIND == 2:
            dtheta -= step_slope * window
        du = tl.where(off > 0, dz, 0.0)
        if TO_INPUT:
            du -= dtheta
        tl.store(dtheta_ptr + pair, dtheta, mask=real)
    tl.store(du_ptr + pair, du, mask=real)
    tl.store(dnorm_ptr + pair, dnorm, mask=real)
    tl.store(penalty_ptr + pair, penalty, mask=real)


@triton.jit(do_not_specialize=["d_in"])
@no_type_check
def _sum_by_feature_kernel(
    offsets_ptr, order_ptr, z_ptr, dtheta_ptr, dnorm_ptr, penalty_ptr, theta_ptr, norms_ptr, W_dec_ptr, dW_dec_ptr,
    dtheta_sum_ptr, penalty_sum_ptr, fired_ptr, d_in, scale, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_ptr + feature + 1)
    fired = tl.zeros([PAIRS], tl.int32)
    dtheta, dnorm, penalty = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
    for first in range(tl.load(offsets_ptr + feature), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        at = tl.load(order_ptr + pair, mask=pair < end, other=0)
        fired += (tl.load(z_ptr + at, mask=pair < end, other=0.0) != 0).to(tl.int32)
        dnorm += tl.load(dnorm_ptr + at, mask=pair < end, other=0.0)
        penalty += tl.load(penalty_ptr + at, mask=pair < end, other=0.0)
        if theta_ptr is not None:
            dtheta += tl.load(dtheta_ptr + at, mask=pair < end, other=0.0)
    tl.store(fired_ptr + feature, tl.sum(fired, axis=0))
    tl.store(penalty_sum_ptr + feature, tl.sum(penalty, axis=0))
    if theta_ptr is not None:
        tl.store(dtheta_sum_ptr + feature, tl.sum(dtheta, axis=0) * scale * tl.load(theta_ptr + feature))
    if norms_ptr is not None:
        norm = tl.load(norms_ptr + feature)
        along = tl.where(norm > 0, tl.sum(dnorm, axis=0) * scale / norm, 0.0)
        for first in range(0, d_in, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            at, inside = feature * d_in + columns, columns < d_in
            w = tl.load(W_dec_ptr + at, mask=inside, other=0.0)
            tl.store(dW_dec_ptr + at, tl.load(dW_dec_ptr + at, mask=inside, other=0.0) + along * w, mask=inside)


def activate(kept: Kept, theta: Tensor | None, d_sae: int, out: Slopes, fired: Int[Tensor, " 1"]) -> None:
    """Fill `out.feature_acts`, and add the number of active pairs to `fired`."""
    room = kept.values.numel()
    operands = (kept.values, kept.features, theta, out.feature_acts, fired, room, d_sae)
    launch(_activate_kernel, (ceil_div(room, _BLOCK),), *operands, BLOCK=_BLOCK, num_warps=_WARPS)


def fill_slopes(
    kept: Kept, theta: Tensor | None, norms: Tensor | None, strength: Tensor, dvalues: Tensor, penalty: Penalty, d_sae: int,
    out: Slopes,
) -> None:  # fmt: skip
    """Fill the rest of `out`; `dvalues` is `<residual, d>`, `strength` is lambda and s."""
    room = kept.values.numel()
    operands = (kept.values, kept.features, theta, norms, strength, out.feature_acts, dvalues, *out[1:], room, d_sae)
    options = {"KIND": penalty.kind, "TO_INPUT": penalty.to_input, "BLOCK": _BLOCK}
    grid = (ceil_div(room, _BLOCK),)
    launch(_slopes_kernel, grid, *operands, penalty.scale, penalty.bandwidth, **options, num_warps=_WARPS)


def sum_by_feature(
    pairs: Pairs, slopes: Slopes, theta: Tensor | None, norms: Tensor | None, W_dec: Tensor, n_rows: int, out: Gradients,
    sums: Sums,
) -> None:  # fmt: skip
    """Fill `sums`, and add the penalty's gradient to that of the decoder."""
    d_sae, d_in = W_dec.shape
    z, _, *terms = slopes
    operands = (pairs.offsets, pairs.order, z, *terms, theta, norms, W_dec, out.W_dec, *sums, d_in, 2 / n_rows)
    launch(_sum_by_feature_kernel, (d_sae,), *operands, PAIRS=_PAIRS, COLUMNS=_COLUMNS, num_warps=_WARPS // 2)


def empty_slopes(room: int, device: torch.device) -> Slopes:
    return Slopes(*torch.zeros(5, room, device=device))


def empty_sums(d_sae: int, device: torch.device) -> Sums:
    dtheta, penalty = torch.zeros(2, d_sae, device=device)
    return Sums(dtheta, penalty, torch.zeros(d_sae, dtype=torch.int32, device=device))
