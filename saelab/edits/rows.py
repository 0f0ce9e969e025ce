"""The tokens that an edit of features changes, as rows of the activations."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor


def edited_rows(
    x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "rows d_in"], Int[Tensor, " n_rows"]]:
    """All tokens as rows, and the numbers of those that are edited: not the first of a context, and no padding."""
    return x.reshape(-1, x.shape[-1]), (positions > 0).flatten().nonzero().squeeze(1)


def with_changes(
    x: Float[Tensor, "batch seq d_in"], rows: Int[Tensor, " n_rows"], change: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch seq d_in"]:
    """`x` with `change(before)` added to these rows `(n_rows, d_in)`, in fp32; all others stay bit-identical."""
    edited = x.reshape(-1, x.shape[-1]).clone()
    before = edited[rows].float()
    edited[rows] = (before + change(before)).to(x.dtype)
    return edited.reshape(x.shape)
