"""`SparseActs`: the feature activations of a batch as values, feature ids and row offsets (CSR), and their transpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.kernels.ragged import stable_argsort


class ByFeature(NamedTuple):
    """The entries of a `SparseActs` sorted by feature, for the weight gradients."""

    order: Tensor
    """(nnz) position of each entry in the row-wise arrays, sorted by feature."""
    rows: Tensor
    """(nnz) batch row of each entry."""
    offsets: Tensor
    """(d_sae + 1) where the entries of each feature begin."""


@dataclass
class SparseActs:
    """Feature activations of a batch in CSR form; only the selected entries are stored.

    Within a row the feature ids ascend strictly. Gradients flow through `values` only.
    """

    values: Float[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " batch_plus_1"]
    d_sae: int
    _derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Cache of what is derived from ids and offsets, shared by all `SparseActs` with one pattern: a step sorts them once."""

    @property
    def batch(self) -> int:
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """L0 of each row."""
        return self.offsets.diff()

    @property
    def rows(self) -> Int[Tensor, " nnz"]:
        """Batch row of each entry."""
        if "rows" not in self._derived:
            self._derived["rows"] = torch.repeat_interleave(self.counts, output_size=self.nnz)
        return self._derived["rows"]

    @property
    def by_feature(self) -> ByFeature:
        """The entries sorted by feature, stably, so that their order is the same on every run."""
        if "by_feature" not in self._derived:
            order = stable_argsort(self.features)
            offsets = offsets_of(torch.bincount(self.features, minlength=self.d_sae))
            self._derived["by_feature"] = ByFeature(order, self.rows[order], offsets)
        return self._derived["by_feature"]

    def with_values(self, values: Float[Tensor, " nnz"]) -> SparseActs:
        """The same pattern with other values."""
        return SparseActs(values, self.features, self.offsets, self.d_sae, self._derived)

    def detach(self) -> SparseActs:
        """The same feature activations, detached from the graph."""
        return self.with_values(self.values.detach())

    def __getitem__(self, index: Any) -> Any:
        """Raises `TypeError`: rows, columns and dense tensors have methods of their own."""
        raise TypeError(
            f"SparseActs holds only the features that fire and takes no index ({index!r}): use .column(feature) for one feature "
            "of every row, .select_rows(rows) for some rows, .to_dense() for a tensor (batch, d_sae)."
        )

    __iter__ = None

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        dense = self.values.new_zeros(self.batch, self.d_sae)
        return dense.index_put((self.rows, self.features), self.values)

    def column(self, feature: int) -> Float[Tensor, " batch"]:
        """Activations of one feature, zeros included."""
        here = self.features == feature
        return self.values.new_zeros(self.batch).index_put((self.rows[here],), self.values[here])

    def select_rows(self, index: Tensor) -> SparseActs:
        """The rows chosen by a boolean mask `(batch)`, or by row ids `(n)` in the order given."""
        index = index.to(self.features.device)
        ids = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        counts = self.counts[ids]
        offsets = offsets_of(counts)
        within = torch.arange(int(offsets[-1]), device=ids.device) - torch.repeat_interleave(offsets[:-1], counts)
        entries = torch.repeat_interleave(self.offsets[:-1][ids], counts) + within
        return SparseActs(self.values[entries], self.features[entries], offsets, self.d_sae)

    def below(self, n_features: int) -> SparseActs:
        """The entries of the first `n_features` features; `d_sae` stays the same."""
        return self.where(self.features < n_features)

    def where(self, here: Bool[Tensor, " nnz"]) -> SparseActs:
        """The entries where `here` is true."""
        return SparseActs(self.values[here], self.features[here], self._offsets_where(here), self.d_sae)

    def split_features(self, sizes: list[int]) -> list[SparseActs]:
        """Split into consecutive groups of features of these sizes; the ids of each group start at 0."""
        parts, start = [], 0
        for size in sizes:
            here = (self.features >= start) & (self.features < start + size)
            parts.append(SparseActs(self.values[here], self.features[here] - start, self._offsets_where(here), size))
            start += size
        return parts

    def _offsets_where(self, here: Tensor) -> Tensor:
        return torch.cat([self.offsets.new_zeros(1), here.cumsum(0)])[self.offsets]

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "batch d_sae"]) -> SparseActs:
        """The non-zero entries of dense feature activations."""
        rows, features = dense.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=dense.shape[0])
        return cls(dense[rows, features], features, offsets_of(counts), dense.shape[1])


def columns(values: Float[Tensor, "batch n"], features: Sequence[int], d_sae: int) -> SparseActs:
    """The activations of a few features, each once, whose columns these are; all others are silent."""
    ids = torch.tensor(list(features), device=values.device)
    order = ids.argsort()
    few = SparseActs.from_dense(values[:, order])
    return SparseActs(few.values, ids[order][few.features], few.offsets, d_sae)


def summed(parts: Sequence[SparseActs]) -> SparseActs:
    """The sum of at least one; activations of one feature are added in order, and zeros are dropped."""
    batch, d_sae = parts[0].batch, parts[0].d_sae
    positions, where = torch.cat([one.rows * d_sae + one.features for one in parts]).unique(return_inverse=True)
    values = parts[0].values.new_zeros(len(positions))
    for one, at in zip(parts, where.split([one.nnz for one in parts]), strict=True):
        values = values.index_add(0, at, one.values)
    counts = torch.bincount(positions // d_sae, minlength=batch)
    total = SparseActs(values, positions % d_sae, offsets_of(counts), d_sae)
    return total.where(values != 0)


def join_features(parts: list[SparseActs]) -> SparseActs:
    """Consecutive groups of features as one `SparseActs`: the inverse of `split_features`."""
    first = torch.tensor([0, *(part.d_sae for part in parts)]).cumsum(0).tolist()
    order = stable_argsort(torch.cat([part.rows for part in parts]))
    values = torch.cat([part.values for part in parts])[order]
    features = torch.cat([part.features + start for part, start in zip(parts, first, strict=False)])[order]
    counts = torch.stack([part.counts for part in parts]).sum(0)
    return SparseActs(values, features, offsets_of(counts), first[-1])


def replace_rows(feature_acts: SparseActs, rows: Int[Tensor, " n"], by: SparseActs) -> SparseActs:
    """`feature_acts` with the rows `rows[i]` replaced by row i of `by`."""
    values, features, counts = (
        torch.cat([getattr(feature_acts, name), getattr(by, name)]) for name in ("values", "features", "counts")
    )
    source = torch.arange(feature_acts.batch, device=rows.device)
    source[rows] = feature_acts.batch + torch.arange(len(rows), device=rows.device)
    return SparseActs(values, features, offsets_of(counts), feature_acts.d_sae).select_rows(source)


def offsets_of(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    """CSR offsets of these counts: their running totals, starting at 0."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
