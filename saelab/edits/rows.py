"""The tokens that an edit of features changes, as rows of the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import SAE


def edited_rows(
    x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "rows d_in"], Int[Tensor, " n_rows"]]:
    """All tokens as rows, and the numbers of those that are edited: not the first of a context, and no padding."""
    return x.reshape(-1, x.shape[-1]), (positions > 0).flatten().nonzero().squeeze(1)


def encoded_rows(
    sae: SAE, flat: Float[Tensor, "n d_in"], rows: Int[Tensor, " n_rows"], known: dict[Any, Any]
) -> SparseActs:
    """Feature activations of these rows, encoded once for all edits that share `known`."""
    if id(sae) not in known:
        known[id(sae)] = sae.encode(flat[rows].to(sae.W_dec.device))
    return known[id(sae)]


def with_changes(
    x: Float[Tensor, "batch seq d_in"], rows: Int[Tensor, " n_rows"], change: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch seq d_in"]:
    """`x` with `change(before)` added to these rows `(n_rows, d_in)`, in fp32; all others stay bit-identical."""
    edited = x.reshape(-1, x.shape[-1]).clone()
    before = edited[rows].float()
    edited[rows] = (before + change(before)).to(x.dtype)
    return edited.reshape(x.shape)
