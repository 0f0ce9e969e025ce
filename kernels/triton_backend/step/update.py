"""The end of a step: dead-feature counters, gradient norm, clip factor and Adam, without a look at any number on the host.

`count_and_norm` takes one pass over both gradients; `finish` is a single program that puts the parts together, steps `b_dec` and
leaves a record of the step; `update` steps the rows of both matrices: it projects the decoder's gradient while reading it,
clips, applies Adam (Kingma & Ba 2015, algorithm 1) and rescales decoder rows to norm 1. If the norm is not finite, no weight
changes.
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

RECORD = ("fvu", "nnz", "grad_norm", "dead", "dead_soon", "uncertain", "auxk")
"""The entries of a step's record, fp32; "auxk" is written in steps that have it."""
_BLOCK = 1024
_WARPS = 4
_TINY = torch.finfo(torch.float32).eps


class Moments(NamedTuple):
    """A parameter with its two moments."""

    parameter: Tensor
    average: Tensor
    square: Tensor


class AdamOptions(NamedTuple):
    """What is the same in every step."""

    beta1: float
    beta2: float
    eps: float
    clip_norm: float
    decay: float
    """Weight decay of `W_enc`, decoupled from the gradient."""


@triton.jit(do_not_specialize=["n_rows", "d_in", "window", "soon"])
@no_type_check
def _count_and_norm_kernel(
    enc_ptr, dec_ptr, db_ptr, W_dec_ptr, offsets_ptr, since_ptr, void_ptr, parallel_ptr, out_ptr, n_rows, window, soon, d_in,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    along, dec, enc = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        at, inside = feature * d_in + columns, columns < d_in
        g = tl.load(dec_ptr + at, mask=inside, other=0.0)
        along += g * tl.load(W_dec_ptr + at, mask=inside, other=0.0)
        dec += g * g
        g = tl.load(enc_ptr + at, mask=inside, other=0.0)
        enc += g * g
    parallel, b = tl.sum(along, axis=0), tl.load(db_ptr + feature)
    if not UNIT:
        parallel = 0.0
    tl.store(parallel_ptr + feature, parallel)
    square = tl.maximum(tl.sum(dec, axis=0) - parallel * parallel, 0.0) + tl.sum(enc, axis=0) + b * b
    fired = tl.load(offsets_ptr + feature + 1) > tl.load(offsets_ptr + feature)
    since = tl.where(fired, 0, tl.load(since_ptr + feature) + n_rows)
    counts = True
    if void_ptr is not None:
        counts = tl.load(void_ptr) == 0
    tl.store(since_ptr + feature, since, mask=counts)
    tl.store(out_ptr + 3 * feature, square)
    tl.store(out_ptr + 3 * feature + 1, (since >= window).to(tl.float32))
    tl.store(out_ptr + 3 * feature + 2, (since >= soon).to(tl.float32))


@triton.jit
@no_type_check
def _adam(w, average, square, g, scale, decay, schedule_ptr, beta1, beta2, eps):
    """Parameter and moments after a step with the gradient `g / scale`."""
    g = g / scale
    lr = tl.load(schedule_ptr)
    average = average + (1 - beta1) * (g - average)
    square = beta2 * square + (1 - beta2) * g * g
    denominator = tl.sqrt_rn(square) / tl.load(schedule_ptr + 2) + eps
    return w - lr * decay * w - lr / tl.load(schedule_ptr + 1) * (average / denominator), average, square


@triton.jit
@no_type_check
def _step_bias(
    b_ptr, average_ptr, square_ptr, db_ptr, scale, finite, schedule_ptr, d_in, beta1, beta2, eps, BLOCK: tl.constexpr
):
    """Step a vector, unless its gradient is not finite."""
    for first in range(0, d_in, BLOCK):
        at = first + tl.arange(0, BLOCK)
        real = (at < d_in) & (tl.zeros([BLOCK], tl.float32) < finite)
        b = tl.load(b_ptr + at, mask=real, other=0.0)
        average = tl.load(average_ptr + at, mask=real, other=0.0)
        square = tl.load(square_ptr + at, mask=real, other=0.0)
        g = tl.load(db_ptr + at, mask=real, other=0.0)
        b, average, square = _adam(b, average, square, g, scale, 0.0, schedule_ptr, beta1, beta2, eps)
        tl.store(b_ptr + at, b, mask=real)
        tl.store(average_ptr + at, average, mask=real)
        tl.store(square_ptr + at, square, mask=real)


@triton.jit(do_not_specialize=["d_sae", "d_in", "n_losses"])
@no_type_check
def _finish_kernel(
    error_ptr, variance_ptr, each_ptr, offsets_ptr, n_uncertain_ptr, sums_ptr, through_ptr, schedule_ptr, b_ptr, average_ptr,
    square_ptr, db_ptr, control_ptr, record_ptr, losses_ptr, d_sae, d_in, n_losses, beta1, beta2, eps, clip_norm,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    squares, dead, soon = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_sae, BLOCK):
        real = first + at < d_sae
        squares += tl.load(each_ptr + 3 * (first + at), mask=real, other=0.0)
        dead += tl.load(each_ptr + 3 * (first + at) + 1, mask=real, other=0.0)
        soon += tl.load(each_ptr + 3 * (first + at) + 2, mask=real, other=0.0)
    variance = tl.maximum(tl.load(variance_ptr), 1.1754943508222875e-38)
    for first in range(0, d_in, BLOCK):
        real = first + at < d_in
        g = tl.load(sums_ptr + first + at, mask=real, other=0.0) * (2.0 / variance)
        if through_ptr is not None:
            g -= tl.load(through_ptr + first + at, mask=real, other=0.0)
        squares += g * g
        tl.store(db_ptr + first + at, g, mask=real)
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    finite = tl.where(norm < float("inf"), 1.0, 0.0)  # 0 for NaN too
    scale = tl.where(finite > 0.0, tl.maximum(norm / clip_norm, 1.0), 1.0)
    tl.debug_barrier()
    _step_bias(b_ptr, average_ptr, square_ptr, db_ptr, scale, finite, schedule_ptr, d_in, beta1, beta2, eps, BLOCK)
    tl.store(control_ptr, scale)
    tl.store(control_ptr + 1, finite)
    tl.store(record_ptr, tl.load(error_ptr) / variance)
    tl.store(record_ptr + 1, tl.load(offsets_ptr + d_sae).to(tl.float32))
    tl.store(record_ptr + 2, norm)
    tl.store(record_ptr + 3, tl.sum(dead, axis=0))
    tl.store(record_ptr + 4, tl.sum(soon, axis=0))
    tl.store(record_ptr + 5, tl.load(n_uncertain_ptr).to(tl.float32))
    tl.store(n_uncertain_ptr, 0)
    if losses_ptr is not None:
        loss = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n_losses, BLOCK):
            loss += tl.load(losses_ptr + first + at, mask=first + at < n_losses, other=0.0)
        tl.store(record_ptr + 6, tl.sum(loss, axis=0))


@triton.jit
@no_type_check
def _stepped(w_ptr, average_ptr, square_ptr, g_ptr, along, at, inside, scale, decay, schedule_ptr, beta1, beta2, eps):
    """Step one block of a row; the component `along` the row is removed from its gradient."""
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    g = tl.load(g_ptr + at, mask=inside, other=0.0) - along * w
    average, square = (
        tl.load(average_ptr + at, mask=inside, other=0.0),
        tl.load(square_ptr + at, mask=inside, other=0.0),
    )
    w, average, square = _adam(w, average, square, g, scale, decay, schedule_ptr, beta1, beta2, eps)
    tl.store(w_ptr + at, w, mask=inside)
    tl.store(average_ptr + at, average, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    return w


@triton.jit(do_not_specialize=["d_in"])
@no_type_check
def _update_kernel(
    enc_ptr, enc_average_ptr, enc_square_ptr, dec_ptr, dec_average_ptr, dec_square_ptr, b_ptr, b_average_ptr, b_square_ptr,
    denc_ptr, ddec_ptr, db_ptr, parallel_ptr, control_ptr, schedule_ptr, d_in, beta1, beta2, eps, decay, tiny,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(control_ptr + 1) == 0.0:  # the gradient is not finite
        return
    feature = tl.program_id(0).to(tl.int64)
    scale = tl.load(control_ptr)
    along = tl.load(parallel_ptr + feature)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        at, inside = feature * d_in + columns, columns < d_in
        _stepped(
            enc_ptr, enc_average_ptr, enc_square_ptr, denc_ptr, 0.0, at, inside, scale, decay, schedule_ptr, beta1, beta2, eps
        )  # fmt: skip
        w = _stepped(
            dec_ptr, dec_average_ptr, dec_square_ptr, ddec_ptr, along, at, inside, scale, 0.0, schedule_ptr, beta1, beta2, eps
        )  # fmt: skip
        squares += tl.where(inside, w * w, 0.0)
    if UNIT:
        norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), tiny)
        tl.debug_barrier()
        for first in range(0, d_in, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            at, inside = feature * d_in + columns, columns < d_in
            tl.store(dec_ptr + at, tl.div_rn(tl.load(dec_ptr + at, mask=inside, other=0.0), norm), mask=inside)
    b, average, square = tl.load(b_ptr + feature), tl.load(b_average_ptr + feature), tl.load(b_square_ptr + feature)
    g = tl.load(db_ptr + feature)
    b, average, square = _adam(b, average, square, g, scale, 0.0, schedule_ptr, beta1, beta2, eps)
    tl.store(b_ptr + feature, b)
    tl.store(b_average_ptr + feature, average)
    tl.store(b_square_ptr + feature, square)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _update_vector_kernel(
    w_ptr, average_ptr, square_ptr, g_ptr, control_ptr, schedule_ptr, n, beta1, beta2, eps, BLOCK: tl.constexpr
):
    finite = tl.load(control_ptr + 1)
    if finite == 0.0:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(control_ptr)
    _stepped(
        w_ptr, average_ptr, square_ptr, g_ptr, 0.0, at, at < n, scale, 0.0, schedule_ptr, beta1, beta2, eps
    )  # fmt: skip


def count_and_norm(
    gradients: Gradients, W_dec: Tensor, pairs: Pairs, since: Int[Tensor, " d_sae"], n_rows: int, window: int, soon: int,
    void: Tensor | None = None, unit_norm: bool = True,
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, "d_sae 3"]]:  # fmt: skip
    """Add `n_rows` to the counters of features that did not fire and reset the others. Returns `<dW_dec, W_dec>` of each row
    (0 if rows are not kept at `unit_norm`), and for each feature its part of the squared norm, whether it is dead, and whether
    it is so from `soon` tokens on. Counters are left as they are if `void` is not 0."""
    (d_sae, d_in), device = W_dec.shape, since.device
    parallel = torch.empty(d_sae, dtype=torch.float32, device=device)
    out = torch.empty(d_sae, 3, dtype=torch.float32, device=device)
    operands = (gradients.W_enc, gradients.W_dec, gradients.b_enc, W_dec, pairs.offsets, since, void, parallel, out)
    launch(_count_and_norm_kernel, (d_sae,), *operands, n_rows, window, soon, d_in, UNIT=unit_norm, **_tile(d_in))
    return parallel, out


def finish(
    error: Tensor, variance: Tensor, each: Tensor, pairs: Pairs, n_uncertain: Tensor, sums: Tensor, through: Tensor | None,
    schedule: Tensor, b_dec: Moments, db_dec: Tensor, control: Tensor, record: Tensor, options: AdamOptions,
    losses: Tensor | None = None,
) -> None:  # fmt: skip
    """Step `b_dec`, and write `control` (clip factor, whether the norm is finite) and the `record` of the step.

    `sums` are the column sums of the residual, `through` is `db_enc @ W_enc` where `b_dec` is subtracted from the input,
    `losses` are the shares of the term for dead features.
    """
    d_sae, d_in = pairs.offsets.shape[0] - 1, sums.shape[0]
    operands = (
        error,
        variance,
        each,
        pairs.offsets,
        n_uncertain,
        sums,
        through,
        schedule,
        *b_dec,
        db_dec,
        control,
        record,
        losses,
    )
    n_losses = 0 if losses is None else losses.numel()
    numbers = (d_sae, d_in, n_losses, options.beta1, options.beta2, options.eps, options.clip_norm)
    launch(_finish_kernel, (1,), *operands, *numbers, BLOCK=_BLOCK, num_warps=8)


def update(
    W_enc: Moments, W_dec: Moments, b_enc: Moments, gradients: Gradients, parallel: Tensor, control: Tensor, schedule: Tensor,
    options: AdamOptions, unit_norm: bool = True,
) -> None:  # fmt: skip
    """Step the rows of both matrices and the encoder's bias; decoder rows end with norm 1 if they are kept at `unit_norm`."""
    d_sae, d_in = W_enc.parameter.shape
    operands = (*W_enc, *W_dec, *b_enc, gradients.W_enc, gradients.W_dec, gradients.b_enc, parallel, control, schedule)
    numbers = (d_in, options.beta1, options.beta2, options.eps, options.decay, _TINY)
    launch(_update_kernel, (d_sae,), *operands, *numbers, UNIT=unit_norm, **_tile(d_in))


def update_vector(of: Moments, gradient: Tensor, control: Tensor, schedule: Tensor, options: AdamOptions) -> None:
    """Step a parameter with one entry for each feature."""
    n = gradient.numel()
    operands = (*of, gradient, control, schedule, n, options.beta1, options.beta2, options.eps)
    launch(_update_vector_kernel, (ceil_div(n, _BLOCK),), *operands, BLOCK=_BLOCK, num_warps=_WARPS)


def _tile(d_in: int) -> dict[str, int]:
    """Columns of a row at a time, with no more than 255 of them idle."""
    return (
        {"BLOCK": _BLOCK, "num_warps": _WARPS}
        if d_in % _BLOCK == 0
        else {"BLOCK": _BLOCK // 4, "num_warps": _WARPS // 2}
    )
