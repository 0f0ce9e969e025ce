"""The non-zero feature activations of one batch, sorted for the collector's statistics; and integers to rank them by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs


class Entries(NamedTuple):
    """Non-zero values of one batch, sorted by feature and then by token."""

    features: Int[Tensor, " nnz"]
    tokens: Int[Tensor, " nnz"]
    """Token number in the whole pass: context * ctx_len + position."""
    docs: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]

    def take(self, index: Tensor) -> Entries:
        return Entries(*(column[index] for column in self))


def sorted_entries(feature_acts: SparseActs, tokens: Int[Tensor, " batch"], docs: Int[Tensor, " batch"]) -> Entries:
    """Sort the feature activations of the kept rows by feature; `tokens` (ascending) and `docs` number those rows."""
    order, rows, _ = feature_acts.by_feature
    return Entries(feature_acts.features[order], tokens[rows], docs[rows], feature_acts.values[order].float())


def token_hash(tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A fixed pseudo-random int64 for each token number (splitmix64): the tokens with the smallest hashes are a uniform sample,
    the same one in whatever order and on whatever process they are seen."""
    x = tokens * -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def float_rank(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """An int64 for each float32 that orders as the floats do."""
    bits = values.float().contiguous().view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def hash_rank(tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """An int64 for each token that is larger the smaller its hash is."""
    return ~token_hash(tokens)


def sort_by(first: Tensor, second: Tensor) -> Tensor:
    """Indices that sort by `first`, then `second`; stable."""
    order = torch.argsort(second, stable=True)
    return order[torch.argsort(first[order], stable=True)]


def rank_in_group(groups: Tensor) -> Tensor:
    """Position of each element within its run of equal consecutive `groups`."""
    index = torch.arange(len(groups))
    starts = torch.ones(len(groups), dtype=torch.bool)
    starts[1:] = groups[1:] != groups[:-1]
    return index - torch.cummax(torch.where(starts, index, 0), 0).values
