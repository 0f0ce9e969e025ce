"""`SparseActs`: the codes of a batch as values, feature ids and row offsets (CSR), and its transpose by feature."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.ragged import stable_order


class ByFeature(NamedTuple):
    """The entries of a `SparseActs` sorted by feature: what a weight gradient walks through."""

    order: Tensor
    """(nnz) position of each entry in the row-wise arrays."""
    rows: Tensor
    """(nnz) batch row of each entry."""
    offsets: Tensor
    """(d_sae + 1) where each feature's entries begin."""


@dataclass
class SparseActs:
    """Feature activations of a batch; only the non-zero ones are stored.

    Within a row the feature ids ascend strictly. `values` carries the gradient; ids and offsets never do.
    """

    values: Float[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " batch_plus_1"]
    d_sae: int

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

    @cached_property
    def rows(self) -> Int[Tensor, " nnz"]:
        """Batch row of each entry."""
        ids = torch.arange(self.batch, device=self.offsets.device)
        return torch.repeat_interleave(ids, self.counts, output_size=self.nnz)

    @cached_property
    def by_feature(self) -> ByFeature:
        """The transpose, sorted stably so that its order is the same on every run."""
        order = stable_order(self.features)
        return ByFeature(order, self.rows[order], offsets_of(torch.bincount(self.features, minlength=self.d_sae)))

    def with_values(self, values: Float[Tensor, " nnz"]) -> SparseActs:
        """The same pattern with other values; the transpose is shared."""
        other = SparseActs(values, self.features, self.offsets, self.d_sae)
        for name in ("rows", "by_feature"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def detach(self) -> SparseActs:
        """The same codes, cut from the graph."""
        return self.with_values(self.values.detach())

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        dense = self.values.new_zeros(self.batch, self.d_sae)
        return dense.index_put((self.rows, self.features), self.values)

    def column(self, feature: int) -> Float[Tensor, " batch"]:
        """Activations of one feature, zeros included."""
        here = self.features == feature
        return self.values.new_zeros(self.batch).index_put((self.rows[here],), self.values[here])

    def select_rows(self, index: Tensor) -> SparseActs:
        """Keep some rows: a boolean mask or row ids `(n)`, in that order."""
        ids = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        counts = self.counts[ids]
        offsets = offsets_of(counts)
        within = torch.arange(int(offsets[-1]), device=ids.device) - torch.repeat_interleave(offsets[:-1], counts)
        entries = torch.repeat_interleave(self.offsets[:-1][ids], counts) + within
        return SparseActs(self.values[entries], self.features[entries], offsets, self.d_sae)

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "batch d_sae"]) -> SparseActs:
        """The non-zero entries of a dense code."""
        rows, features = dense.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=dense.shape[0])
        return cls(dense[rows, features], features, offsets_of(counts), dense.shape[1])


def replace_rows(acts: SparseActs, rows: Int[Tensor, " n"], by: SparseActs) -> SparseActs:
    """The code with its `rows` taken from `by`, in order."""
    values, features, counts = (
        torch.cat([getattr(acts, name), getattr(by, name)]) for name in ("values", "features", "counts")
    )
    source = torch.arange(acts.batch, device=rows.device)
    source[rows] = acts.batch + torch.arange(len(rows), device=rows.device)
    return SparseActs(values, features, offsets_of(counts), acts.d_sae).select_rows(source)


def offsets_of(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    """Running totals of `counts`, from 0."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


_beta_warning_seen = False


def csr_tensor(values: Tensor, features: Tensor, offsets: Tensor, n_columns: int) -> Tensor:
    """A torch CSR matrix `(batch, n_columns)`. The one place that builds them, after a check of its own.

    torch's invariant checks are off (they cost more than the products), and a wrong CSR is a crash, so the ids are
    checked here. Its "beta state" warning comes once a process: that one is silenced and no other.
    """
    global _beta_warning_seen
    shape = (offsets.numel() - 1, n_columns)
    if features.numel():
        ascending = features[1:] > features[:-1]
        ascending[offsets[1:-1][(offsets[1:-1] > 0) & (offsets[1:-1] < features.numel())] - 1] = True
        assert bool(ascending.all()), "feature ids must ascend within each row"
        assert int(features.min()) >= 0 and int(features.max()) < n_columns, "a feature id is out of range"
        assert int(offsets[-1]) == features.numel() and bool((offsets.diff() >= 0).all()), "offsets do not add up"
    if _beta_warning_seen:
        return torch.sparse_csr_tensor(offsets, features, values, shape, check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        matrix = torch.sparse_csr_tensor(offsets, features, values, shape, check_invariants=False)
    _beta_warning_seen = True
    return matrix
