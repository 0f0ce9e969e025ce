"""Which code runs an op: Triton on a GPU, PyTorch elsewhere. Decided once a device type, forced by `SAELAB_KERNELS`.

`SAELAB_KERNELS=auto` (the default), `torch`, `triton` or `reference`; it is read when the first op runs. Under
`reference` the ops are the dense formulas of `kernels/reference`. Triton is imported only where it is used.
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


class Backend(NamedTuple):
    """The primitives that every op is made of; the same signatures everywhere, no gradient."""

    name: str
    Screen: Callable[..., Any]
    """Upper bounds of all scores of some rows, and the pairs that reach a floor (`kernels/cpu/screen.py`)."""
    rows_at_once: Callable[[int, torch.dtype], int]
    """How many rows one screen may take."""
    sampled_product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """`(x, W, features, offsets)`: `<x[row], W[feature]>` at the pairs, each by itself."""
    bag_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """`(values, rows, offsets, W)`: weighted sums of rows of W."""


def backend(device: torch.device) -> Backend:
    """The code for tensors on `device`. Raises `ValueError` when `SAELAB_KERNELS` says something unknown."""
    return _load(backend_name(device.type))


def backend_name(device_type: str) -> str:
    """ "torch", "triton" or "reference"."""
    return _forced[-1] if _forced else _choose(device_type)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force a backend inside a `with` (for tests and benches)."""
    _forced.append(_checked(name))
    try:
        yield
    finally:
        _forced.pop()


@cache
def _choose(device_type: str) -> str:
    name = _checked(os.environ.get(VARIABLE, "auto"))
    return name if name != "auto" else ("triton" if device_type == "cuda" else "torch")


def _checked(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name!r} must be one of {', '.join(CHOICES)}.")
    return name


@cache
def _load(name: str) -> Backend:
    if name == "triton":
        from saelab.kernels import gpu

        return Backend(name, gpu.Screen, gpu.rows_at_once, gpu.sampled_product, gpu.bag_sum)
    from saelab.kernels.cpu import bag_sum, sampled_product, screen

    return Backend(name, screen.Screen, screen.rows_at_once, sampled_product.sampled_product, bag_sum.bag_sum)


@cache
def fast_bf16(device_type: str) -> bool:
    """Has this kind of device units for bfloat16 products?"""
    if device_type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    found = torch.cpu.get_capabilities() if device_type == "cpu" else {}
    return any(found.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
