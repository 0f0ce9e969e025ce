"""Which code runs an op: Triton on a GPU, PyTorch elsewhere. Decided by the device, forced by `SAELAB_KERNELS`.

`SAELAB_KERNELS=auto` (the default), `torch`, `triton` or `reference`; it is read when the first op runs. Under
`reference` every op is the dense formula of `kernels/reference`, and its gradient is autograd's. Triton is imported only
where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

VARIABLE = "SAELAB_KERNELS"
CHOICES = ("auto", "torch", "triton", "reference")
_forced: list[str] = []
_bf16_off: list[bool] = []


class Backend(NamedTuple):
    """The primitives that every op is made of; the same signatures everywhere, no gradient."""

    name: str
    Screen: Callable[..., Any]
    """Upper bounds of all scores of some rows, and the pairs that reach a floor (`kernels/torch_backend/screen.py`)."""
    rows_at_once: Callable[[int, torch.dtype], int]
    """How many rows one screen may take."""
    sddmm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """`(x, W, features, offsets)`: `<x[row], W[feature]>` at the pairs, each by itself."""
    spmm: Callable[..., Tensor]
    """`(values, features, offsets, W)`: weighted sums of rows of W."""
    spmm_residual: Callable[..., tuple[Tensor, Tensor]]
    """`(values, features, offsets, W, bias, target)`: the same plus bias less target, and the squared norm of that."""
    spmm_transposed: Callable[..., Tensor]
    """`(feature_acts, values, g)`: `S.T @ g`."""
    bias_gradient: Callable[..., Tensor]
    """`(feature_acts, values)`: the sum at each feature."""
    round_rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """`(W, low)`: W rounded into `low`; each row's norm, and that of what it lost."""
    project_: Callable[[Tensor, Tensor], None]
    """`(gradient, W)`: take out each row's part along the row of W."""
    unit_norm_: Callable[[Tensor], None]
    """`(W)`: rows to norm 1."""


def backend(tensor: Tensor) -> Backend:
    """The code for a tensor. Raises `ValueError` when `SAELAB_KERNELS` says something unknown.

    Triton computes in float32: float64, for checking, always goes through PyTorch.
    """
    name = backend_name(tensor)
    return _load("torch" if name == "triton" and tensor.dtype == torch.float64 else name)


def backend_name(tensor: Tensor) -> str:
    """ "torch", "triton" or "reference"."""
    name = _forced[-1] if _forced else _chosen()
    return name if name != "auto" else ("triton" if tensor.device.type == "cuda" else "torch")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force a backend inside a `with`."""
    _forced.append(_checked(name))
    try:
        yield
    finally:
        _forced.pop()


@cache
def _chosen() -> str:
    return _checked(os.environ.get(VARIABLE, "auto"))


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name!r} must be one of {', '.join(CHOICES)}.")
    return name


@cache
def _load(name: str) -> Backend:
    if name == "reference":
        from saelab.kernels.reference import primitives

        spmm = rows = sddmm = screen = spmm_transposed = primitives
    elif name == "triton":
        from saelab.kernels.triton_backend import operands as screen
        from saelab.kernels.triton_backend import rows, sddmm, spmm, spmm_transposed
    else:
        from saelab.kernels.torch_backend import rows, screen, sddmm, spmm, spmm_transposed

    return Backend(
        name=name,
        Screen=screen.Screen,
        rows_at_once=screen.rows_at_once,
        sddmm=sddmm.sddmm,
        spmm=spmm.spmm,
        spmm_residual=spmm.spmm_residual,
        spmm_transposed=spmm_transposed.spmm_transposed,
        bias_gradient=spmm_transposed.bias_gradient,
        round_rows=rows.round_rows,
        project_=rows.project_,
        unit_norm_=rows.unit_norm_,
    )


@contextmanager
def without_bf16() -> Iterator[None]:
    """Inside a `with` every device counts as one without units for bfloat16."""
    _bf16_off.append(True)
    try:
        yield
    finally:
        _bf16_off.pop()


def fast_bf16(device: torch.device | str) -> bool:
    """Has this device units for bfloat16 products, and may they be used?"""
    return not _bf16_off and _has_fast_bf16(torch.device(device))


@cache
def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(found.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
