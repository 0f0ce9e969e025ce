"""The tokens that an edit of features changes, as rows of the activations, and the change that it makes there:

    h' = h + decode(z') - decode(z)

where z are the feature activations that the SAE itself encodes, so that its reconstruction error stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs, columns, summed
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
        known[id(sae)] = sae.encode(flat[rows].to(sae.W_enc.device))
    return known[id(sae)]


def with_moved_features(
    x: Float[Tensor, "batch seq d_in"],
    rows: Int[Tensor, " n_rows"],
    sae: SAE,
    features: Sequence[int],
    change: Float[Tensor, "n_rows n_features"],
    known: dict[Any, Any],
    source: int = -1,
) -> Float[Tensor, "batch seq d_in"]:
    """`x` as these rows are when the activations of these features change by `change`; `x` itself where none does.

    A linear decoder adds its rows. Any other one decodes twice: what the edits before, which share `known`, have made of the
    activations, and what this one makes of that; so the changes of several edits add up to the change of all.
    """
    moved = (change != 0).any(1)
    if not bool(moved.any()):
        return x
    if sae.additive:
        decoder, scale = sae.decoder(source)
        directions = (decoder[list(features)].float() / scale.float()).to(x.device)  # (n_features, d_in)
        change = change[moved]
        return with_changes(x, rows[moved], lambda before: (change @ directions) * sae.token_sizes(before))
    encoded = encoded_rows(sae, x.reshape(-1, x.shape[-1]), rows, known)
    before = known.get(("moved", id(sae)), encoded)
    after = summed([before, columns(change.to(before.values), features, sae.d_sae)])
    known["moved", id(sae)] = after
    before, after = (one.select_rows(moved) for one in (before, after))
    return with_changes(x, rows[moved], lambda x: (sae.decode(after, x) - sae.decode(before, x)).to(x))


def with_changes(
    x: Float[Tensor, "batch seq d_in"], rows: Int[Tensor, " n_rows"], change: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch seq d_in"]:
    """`x` with `change(before)` added to these rows `(n_rows, d_in)`, in fp32; all others stay bit-identical."""
    edited = x.reshape(-1, x.shape[-1]).clone()
    before = edited[rows].float()
    edited[rows] = (before + change(before)).to(x.dtype)
    return edited.reshape(x.shape)
