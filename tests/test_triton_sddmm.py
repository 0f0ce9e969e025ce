"""The Triton `sddmm` against its reference; in the interpreter where there is no GPU."""

import pytest
import torch

from saelab.kernels.reference.primitives import sddmm as reference
from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.triton_backend import sddmm as module
from saelab.kernels.triton_backend.sddmm import sddmm, sum_slices

SHAPES = [(1, 1, 1, 1.0), (6, 11, 5, 0.3), (0, 7, 3, 0.5), (4, 9, 6, 0.0), (5, 13, 300, 0.4), (3, 37, 256, 1.0)]


def make(device, batch, d_sae, d_in, share):
    generator = torch.Generator().manual_seed(batch + d_sae)
    x, W = torch.randn(batch, d_in, generator=generator), torch.randn(d_sae, d_in, generator=generator)
    acts = SparseActs.from_dense((torch.rand(batch, d_sae, generator=generator) < share).float().to(device))
    return x.to(device), W.to(device), acts


def walk_by_feature(monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 0)


@pytest.mark.parametrize("by_feature", [False, True], ids=["by row", "by feature"])
@pytest.mark.parametrize(("batch", "d_sae", "d_in", "share"), SHAPES)
def test_matches_the_reference(batch, d_sae, d_in, share, by_feature, device, poisoned_empty, monkeypatch):
    if by_feature:
        walk_by_feature(monkeypatch)
    x, W, acts = make(device, batch, d_sae, d_in, share)
    got = sddmm(x, W, acts.features, acts.offsets)
    want = reference(x.double(), W.double(), acts.features, acts.offsets)
    assert got.dtype == torch.float32 and got.shape == (acts.nnz,)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_by_hand(device):
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]], device=device)
    W = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -1.0]], device=device)
    features, offsets = torch.tensor([0, 1, 1], device=device), torch.tensor([0, 2, 3], device=device)
    assert sddmm(x, W, features, offsets).tolist() == [6, -1, 1]


def test_bf16_weights_and_strided_inputs(device):
    x, W, acts = make(device, 5, 13, 70, 0.5)
    wide = torch.full((5, 140), float("nan"), device=device)
    wide[:, ::2] = x
    got = sddmm(wide[:, ::2], W.bfloat16(), acts.features, acts.offsets)
    assert torch.equal(got, sddmm(x, W.bfloat16().float(), acts.features, acts.offsets))
    torch.testing.assert_close(
        got, reference(x, W.bfloat16().float(), acts.features, acts.offsets), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("d_in", [5, 300, 512])
def test_a_pair_has_the_same_bits_everywhere(d_in, device, monkeypatch):
    """Alone, in part of the batch, among all features, from an unaligned view, walked by row or by feature."""
    x, W, acts = make(device, 7, 19, d_in, 0.5)
    whole = sddmm(x, W, acts.features, acts.offsets)
    for rows in (slice(3, 4), slice(1, 7)):
        part = acts.select_rows(torch.arange(7, device=device)[rows])
        here = (acts.rows >= rows.start) & (acts.rows < rows.stop)
        assert torch.equal(sddmm(x[rows], W, part.features, part.offsets), whole[here])
    every = SparseActs.from_dense(torch.ones(7, 19, device=device))
    among_all = sddmm(x, W, every.features, every.offsets).view(7, 19)
    assert torch.equal(among_all[acts.rows, acts.features], whole)
    walk_by_feature(monkeypatch)
    assert torch.equal(sddmm(x, W, acts.features, acts.offsets), whole)


def test_bits_repeat_in_any_order_of_programs(device, reversed_grid, monkeypatch):
    walk_by_feature(monkeypatch)
    x, W, acts = make(device, 9, 17, 300, 0.5)
    first = sddmm(x, W, acts.features, acts.offsets)
    assert torch.equal(sddmm(x, W, acts.features, acts.offsets), first)
    with reversed_grid():
        assert torch.equal(sddmm(x, W, acts.features, acts.offsets), first)


def test_accuracy_of_a_long_sum(device):
    """Within Higham's bound for a sum of tiles of 256, far below that of one running sum."""
    x, W, acts = make(device, 2, 3, 4099, 1.0)
    got = sddmm(x.abs(), W.abs(), acts.features, acts.offsets)
    want = reference(x.double().abs(), W.double().abs(), acts.features, acts.offsets)
    assert float((got.double() / want - 1).abs().max()) < 40 * torch.finfo(torch.float32).eps / 2


def test_slices_are_added_from_the_first_to_the_last(device):
    slices = torch.tensor([[1e8, 1.0], [1.0, 1.0], [-1e8, 1.0]], device=device)
    assert sum_slices(slices).tolist() == [0, 3]
    assert sum_slices(slices, torch.tensor([1, 0], device=device)).tolist() == [3, 0]
