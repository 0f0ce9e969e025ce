"""Counts what a step asks of a GPU, without one: operators that start a kernel, kernel launches, and waits for the host."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from saelab.kernels.triton_backend.step import dense
from saelab.training import fused_batch_topk, fused_step, fused_threshold

FREE = (
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "slice",
        "select",
        "detach",
        "alias",
        "t",
        "transpose",
        "unsqueeze",
        "squeeze",
        "squeeze_",
    ),
    *("expand", "as_strided", "unbind", "split", "empty", "empty_like", "empty_strided", "new_empty", "permute"),
    *("is_pinned", "_pin_memory", "lift_fresh", "promote_types"),
)
"""Operators that start no kernel: views and allocations. `lift_fresh` makes a tensor of numbers of the host."""
WAITS = (
    "nonzero",
    "_local_scalar_dense",
    "masked_select",
    "unique",
    "_unique2",
    "repeat_interleave",
    "bincount",
    "equal",
)


class Counts(TorchDispatchMode):
    """Of the code in its block: the operators and launches in order, with their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.waits: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func, args) -> None:
        name = func.__name__.partition(".")[0]
        by_mask = name.startswith("index") and any(
            one is not None and one.dtype == torch.bool for arg in args if isinstance(arg, list | tuple) for one in arg
        )
        if name in WAITS or by_mask:
            self.waits.append(name)
        if name not in FREE:
            self.calls.append((name, *(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))))


@contextmanager
def counted():
    """Count within the block; kernels that the interpreter runs count as launches, not as what they do."""
    counts, real = Counts(), interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        counts.calls.append((self.fn.__name__, tuple(self.grid)))
        counts.inside = True
        try:
            return real(self, *args, **kwargs)
        finally:
            counts.inside = False

    def one_product(a, b, out):
        counts.calls.append(("mm", tuple(a.shape), tuple(b.shape)))
        counts.inside = True
        try:
            real_products[out.dtype](a, b, out)
        finally:
            counts.inside = False

    real_products = {torch.float16: fused_step.product, torch.float32: dense._product}
    with pytest.MonkeyPatch.context() as patch, counts:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        for module in (
            fused_step,
            fused_batch_topk,
            fused_threshold,
        ):  # the interpreter makes several operators of a product
            patch.setattr(module, "product", one_product)
        patch.setattr(dense, "_product", one_product)
        yield counts
