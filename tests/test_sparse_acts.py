"""`SparseActs` on numbers that can be checked by hand, and its CSR builder's own check."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.kernels.sparse_acts import SparseActs, replace_rows
from saelab.kernels.torch_backend.sddmm import sddmm

DENSE = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0]])


def test_from_dense_by_hand():
    acts = SparseActs.from_dense(DENSE)
    assert acts.values.tolist() == [2, -1, 3, 4]
    assert acts.features.tolist() == [1, 3, 0, 2]
    assert acts.offsets.tolist() == [0, 2, 2, 4]
    assert acts.rows.tolist() == [0, 0, 2, 2]
    assert acts.counts.tolist() == [2, 0, 2]
    assert torch.equal(acts.to_dense(), DENSE)


def test_by_feature_is_the_transpose():
    order, rows, offsets = SparseActs.from_dense(DENSE).by_feature
    assert order.tolist() == [2, 0, 3, 1]
    assert rows.tolist() == [2, 0, 2, 0]
    assert offsets.tolist() == [0, 1, 2, 3, 4]


def test_column_and_select_rows():
    acts = SparseActs.from_dense(DENSE)
    assert acts.column(3).tolist() == [-1, 0, 0]
    assert torch.equal(acts.select_rows(torch.tensor([2, 0])).to_dense(), DENSE[[2, 0]])
    assert torch.equal(acts.select_rows(torch.tensor([False, True, True])).to_dense(), DENSE[1:])


def test_replace_rows_puts_new_rows_in_place():
    acts = SparseActs.from_dense(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))
    new = SparseActs.from_dense(torch.tensor([[7.0, 0.0, 0.0], [0.0, 8.0, 9.0]]))
    got = replace_rows(acts, torch.tensor([2, 1]), new)
    assert got.to_dense().tolist() == [[1, 0, 2], [0, 8, 9], [7, 0, 0]]


@given(st.integers(0, 5), st.integers(1, 7), st.integers(0, 2**16))
def test_round_trip(batch, d_sae, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch, d_sae, generator=generator) * (torch.rand(batch, d_sae, generator=generator) < 0.4)
    acts = SparseActs.from_dense(dense)
    assert torch.equal(acts.to_dense(), dense)
    assert int(acts.offsets[-1]) == acts.nnz == int((dense != 0).sum())


@pytest.mark.parametrize(
    ("features", "offsets"),
    [([0, 4], [0, 2]), ([-1, 0], [0, 2]), ([0, 1], [0, 1])],
    ids=["too large", "negative", "offsets short"],
)
def test_pairs_out_of_range_are_refused_before_memory_is_read(features, offsets):
    with pytest.raises(IndexError, match="W has 4 rows"):
        sddmm(torch.ones(1, 3), torch.ones(4, 3), torch.tensor(features), torch.tensor(offsets))


def test_the_transpose_is_made_once_for_all_codes_of_a_pattern():
    acts = SparseActs.from_dense(DENSE)
    others = acts.with_values(acts.values * 2), acts.detach()  # before anybody asked for it
    assert acts.by_feature is others[0].by_feature is others[1].by_feature
    assert acts.rows is others[0].rows


def test_an_index_says_what_to_do_instead():
    acts = SparseActs.from_dense(torch.eye(3))
    with pytest.raises(TypeError, match=r"takes no index .*\.column\(feature\).*\.to_dense\(\)"):
        acts[:, 2]
    with pytest.raises(TypeError):
        iter(acts)
