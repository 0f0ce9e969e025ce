"""The strength of a sparsity penalty on the device: given by the host, or moved by the controller of `saes/l0_controller.py`."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend.launch import launch


class Controller(NamedTuple):
    """Its state, and what is the same in every step."""

    state: Float[Tensor, " 3"] | None
    """I, m and the log L0 of the first step; None if the host gives the strength."""
    last_step: Int[Tensor, ""] | None
    log_target: float
    lowest: float
    """Least log L0."""
    most: float
    """Largest error that counts."""
    gain: float
    """Proportional."""
    decay: float
    """Of the moving average."""


class Square(NamedTuple):
    """The penalty `weight (L0 / target - 1)^2`; `target` 0 for one of the number of active features itself."""

    weight: float
    target: float


@triton.jit
@no_type_check
def _strength_kernel(
    fired_ptr, schedule_ptr, void_ptr, state_ptr, last_step_ptr, out_ptr, n_rows, log_target, lowest, most, gain, decay, weight,
    target,
):  # fmt: skip
    l0 = tl.load(fired_ptr).to(tl.float32) / n_rows
    strength = tl.load(schedule_ptr)
    if state_ptr is not None:
        log_l0 = tl.log(tl.maximum(l0, lowest))
        integral, mean, first = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
        first = tl.where(tl.load(last_step_ptr) < 0, log_l0, first)
        wanted = log_target + (first - log_target) * tl.load(schedule_ptr + 2)
        low, high = tl.minimum(wanted, log_target), tl.maximum(wanted, log_target)
        error = log_l0 - tl.minimum(tl.maximum(log_l0, low), high)
        error = tl.minimum(tl.maximum(error, -most), most)
        mean += (1 - decay) * (error - mean)
        integral += tl.load(schedule_ptr + 3) * mean
        integral = tl.minimum(tl.maximum(integral, tl.load(schedule_ptr + 5)), tl.load(schedule_ptr + 6))
        strength = tl.load(schedule_ptr + 1) * tl.exp(integral + gain * mean)
        if tl.load(void_ptr) == 0:
            tl.store(state_ptr, integral)
            tl.store(state_ptr + 1, mean)
            tl.store(state_ptr + 2, first)
            tl.store(last_step_ptr, tl.load(schedule_ptr + 4).to(tl.int64))
    slope, penalty = strength, l0
    if target > 0:
        gap = l0 / target - 1
        slope = strength * weight * 2 * gap / target
        penalty = weight * gap * gap
    tl.store(out_ptr, strength)
    tl.store(out_ptr + 1, slope)
    tl.store(out_ptr + 2, penalty)
    tl.store(out_ptr + 3, l0)
    tl.store(fired_ptr, 0)


def find_strength(
    fired: Int[Tensor, " 1"],
    schedule: Tensor,
    void: Tensor,
    n_rows: int,
    controller: Controller,
    square: Square,
    out: Tensor,
) -> None:
    """Fill `out`: lambda, the slope of a penalty on the number of active features, that penalty, and L0; set `fired` to 0.

    `schedule` is lambda if the host gives it; and for a controller the fraction of the warm-up, how far the target has moved,
    its integral gain, the step, and the ends of the range of I. A void step leaves the state as it is.
    """
    operands = (fired, schedule, void, *controller[:2], out, n_rows, *controller[2:], *square)
    launch(_strength_kernel, (1,), *operands, num_warps=1)
