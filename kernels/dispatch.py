"""Choose the backend of an op: Triton on a GPU, PyTorch elsewhere, unless `SAELAB_KERNELS` says otherwise.

`SAELAB_KERNELS` is `auto` (the default), `torch`, `triton` or `reference`, and is read when the first op runs. With
`reference` every op is the dense formula of `kernels/reference`, differentiated by autograd. Triton is imported only
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
    """The primitives that every op is built from: the same signatures in every backend, without gradients."""

    name: str
    Screen: Callable[..., Any]
    """Upper bounds on all scores of a chunk of rows, and the pairs that reach a floor (`kernels/torch_backend/screen.py`)."""
    rows_at_once: Callable[[int, torch.dtype], int]
    """`(n_columns, dtype)`: how many rows one screen may hold."""
    sddmm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """`(x, W, features, offsets)`: `<x[row], W[feature]>` at the pairs, each independent of the others."""
    spmm: Callable[..., Tensor]
    """`(values, features, offsets, W)`: weighted sums of rows of W."""
    spmm_residual: Callable[..., tuple[Tensor, Tensor]]
    """`(values, features, offsets, W, bias, target)`: `spmm + bias - target`, and its squared norm."""
    spmm_transposed: Callable[..., Tensor]
    """`(feature_acts, values, g)`: `S.T @ g`."""
    bias_gradient: Callable[..., Tensor]
    """`(feature_acts, values)`: the sum of the values at each feature."""
    round_rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """`(W, low)`: write W, rounded, into `low`; returns the norms of each row and of its rounding error."""
    project_: Callable[[Tensor, Tensor], None]
    """`(gradient, W)`: remove from each row of the gradient its component along the row of W."""
    unit_norm_: Callable[[Tensor], None]
    """`(W)`: scale each row to norm 1."""


def backend(tensor: Tensor) -> Backend:
    """The backend for a tensor. Raises `ValueError` for an unknown value of `SAELAB_KERNELS`.

    Triton computes in float32, so float64 (used for checks) falls back to PyTorch.
    """
    name = backend_name(tensor)
    return _load("torch" if name == "triton" and tensor.dtype == torch.float64 else name)


def backend_name(tensor: Tensor) -> str:
    """The requested backend: "torch", "triton" or "reference". Raises `ValueError` as `backend` does."""
    name = _forced[-1] if _forced else _chosen()
    return name if name != "auto" else ("triton" if tensor.device.type == "cuda" else "torch")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Context manager that forces a backend. Raises `ValueError` for an unknown name."""
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
    """Context manager under which no device counts as having fast bfloat16."""
    _bf16_off.append(True)
    try:
        yield
    finally:
        _bf16_off.pop()


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the device has hardware bfloat16 products and `without_bf16` is not active."""
    return not _bf16_off and _has_fast_bf16(torch.device(device))


@cache
def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(found.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
