"""The least work of a TopK training step, of an encode and of a decode, and the time that a GPU needs for it at the least.

Only what the algorithm cannot avoid is counted: products on tensor cores, parameters and moments read and written once, the
batch and the residual a few times, gathers of decoder, encoder and batch rows from the cache. The three kinds of work are added
up, as the phases of a step follow each other. A measured time is never below the model's unless the model is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

ADAM_BYTES = 28
"""Per weight: parameter, both moments and gradient are read, the first three written, all in fp32."""
ROW_PASSES = 4
"""Passes over fp32 `(batch, d_in)`: the batch for the encoder and as target, the residual once written and once read."""
GROUP = 32
"""Features per group of the screen: the best k groups of each row are multiplied a second time."""


class Work(NamedTuple):
    """Operations and bytes of one step."""

    flops: float
    """Of matrix products, two per multiply-add."""
    hbm_bytes: float
    """Of device memory, read and written."""
    l2_bytes: float
    """Of gathered rows, which the last-level cache holds in part."""


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU, per second."""

    flops: Mapping[str, float]
    """By the precision of the products: "bf16", "tf32" and "fp32"."""
    hbm_bytes: float
    l2_bytes: float


MACHINES = {"H100": Machine({"bf16": 798e12, "tf32": 495e12, "fp32": 67e12}, hbm_bytes=3.0e12, l2_bytes=6.5e12)}
"""By a word of the GPU's name. bf16 products, copies and gathers as measured; TF32 and fp32 from the data sheet."""


def machine_of(name: str) -> Machine | None:
    """The rates of the GPU with this name, None if they are unknown."""
    return next((machine for word, machine in MACHINES.items() if word in name), None)


def least_ms(flops: float, hbm_bytes: float, l2_bytes: float, machine: Machine, precision: str = "bf16") -> float:
    """Milliseconds of this work on the machine, one kind after the other."""
    return 1e3 * (flops / machine.flops[precision] + hbm_bytes / machine.hbm_bytes + l2_bytes / machine.l2_bytes)


def sparse_step(batch: int, d_in: int, d_sae: int, k: int) -> Work:
    """Our step: one product over all features, and five gathers of `(batch, k, d_in)`.

    These are the scores of the candidates, the decoder, the gradient of the values and both weight gradients.
    """
    hbm_bytes = _update_bytes(d_in, d_sae) + _row_bytes(batch, d_in)
    return Work(_screen_flops(batch, d_in, d_sae, k), hbm_bytes, 5 * _gather_bytes(batch, d_in, k))


def dense_step(batch: int, d_in: int, d_sae: int, k: int) -> Work:
    """A dense step: encoder, decoder, the gradient of the activations and both weight gradients are products.

    The bf16 matrix `(batch, d_sae)` is written, read by `topk`, and read or written once more.
    """
    hbm_bytes = _update_bytes(d_in, d_sae) + _row_bytes(batch, d_in) + 3 * _matrix_bytes(batch, d_sae)
    return Work(5 * _product_flops(batch, d_in, d_sae), hbm_bytes, 0)


def encoder_step(batch: int, d_in: int, d_sae: int, k: int) -> Work:
    """A dense encoder with a sparse decoder: two products, and the gathers of the decoder and its two gradients."""
    dense = dense_step(batch, d_in, d_sae, k)
    return Work(2 * _product_flops(batch, d_in, d_sae), dense.hbm_bytes, 3 * _gather_bytes(batch, d_in, k))


def sparse_encode(batch: int, d_in: int, d_sae: int, k: int) -> Work:
    """One product over all features from fp32 weights, and the scores of the candidates."""
    flops = _screen_flops(batch, d_in, d_sae, k)
    return Work(flops, 4 * d_in * (d_sae + batch) + 8 * batch * k, _gather_bytes(batch, d_in, k))


def dense_encode(batch: int, d_in: int, d_sae: int, k: int) -> Work:
    """One product from bf16 weights, whose result is written and read by `topk`."""
    hbm_bytes = 2 * d_in * d_sae + 4 * batch * d_in + 2 * _matrix_bytes(batch, d_sae) + 8 * batch * k
    return Work(_product_flops(batch, d_in, d_sae), hbm_bytes, 0)


def sparse_decode(batch: int, d_in: int, d_sae: int, k: int) -> Work:
    """The rows of `W_dec` that fire, read once from memory and `k` per token from the cache, and the result."""
    hbm_bytes = 4 * d_in * (min(d_sae, batch * k) + batch) + 8 * batch * k
    return Work(0, hbm_bytes, _gather_bytes(batch, d_in, k))


def dense_decode(batch: int, d_in: int, d_sae: int, k: int) -> Work:
    """One product of bf16 activations and bf16 weights."""
    hbm_bytes = 2 * d_in * d_sae + 4 * batch * d_in + _matrix_bytes(batch, d_sae)
    return Work(_product_flops(batch, d_in, d_sae), hbm_bytes, 0)


def dense_is_less(batch: int, d_in: int, d_sae: int, k: int, machine: Machine = MACHINES["H100"]) -> bool:
    """Whether a dense step in bf16 takes less time than a sparse one, by this model."""
    sparse, dense = (work(batch, d_in, d_sae, k) for work in (sparse_step, dense_step))
    return least_ms(*dense, machine) < least_ms(*sparse, machine)


def _product_flops(batch: int, d_in: int, d_sae: int) -> int:
    return 2 * batch * d_in * d_sae


def _screen_flops(batch: int, d_in: int, d_sae: int, k: int) -> int:
    return _product_flops(batch, d_in, d_sae) + _product_flops(batch, d_in, min(k * GROUP, d_sae))


def _update_bytes(d_in: int, d_sae: int) -> int:
    """Adam over both matrices and both biases."""
    return ADAM_BYTES * (2 * d_in * d_sae + d_in + d_sae)


def _row_bytes(batch: int, d_in: int) -> int:
    return ROW_PASSES * 4 * batch * d_in


def _gather_bytes(batch: int, d_in: int, k: int) -> int:
    """One fp32 row for every active pair."""
    return 4 * batch * k * d_in


def _matrix_bytes(batch: int, d_sae: int) -> int:
    """A bf16 matrix `(batch, d_sae)` once."""
    return 2 * batch * d_sae
