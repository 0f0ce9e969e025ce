"""The Triton `spmm_transposed` and `bias_gradient` against dense products; interpreted where there is no GPU."""

import pytest
import torch

from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.triton_backend import spmm_transposed as module
from saelab.kernels.triton_backend.spmm_transposed import CHUNK, bias_gradient, spmm_transposed

SHAPES = [(1, 1, 1, 1.0), (6, 11, 5, 0.3), (0, 7, 3, 0.5), (4, 9, 6, 0.0), (40, 31, 24, 0.6), (5, 13, 300, 0.4)]


def make(device, batch, d_sae, d_in, share):
    generator = torch.Generator().manual_seed(batch + d_sae)
    dense = torch.randn(batch, d_sae, generator=generator) * (torch.rand(batch, d_sae, generator=generator) < share)
    return dense.to(device), torch.randn(batch, d_in, generator=generator).to(device)


def around_the_chunks(device, d_in=5):
    """Features that fire as often as makes a difference: one on every token, one never, some at the chunks' edges."""
    dense, g = make(device, 2 * CHUNK + 9, 7, d_in, 1.0)
    for feature, count in enumerate((2 * CHUNK + 9, 0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 1)):
        dense[count:, feature] = 0
    return dense, g


def both(dense, g):
    acts = SparseActs.from_dense(dense)
    return spmm_transposed(acts, acts.values, g), bias_gradient(acts, acts.values)


def check(dense, g):
    weights, biases = both(dense, g)
    torch.testing.assert_close(weights.double(), dense.double().T @ g.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(biases.double(), dense.double().sum(0), rtol=1e-5, atol=1e-5)
    never = (dense == 0).all(0)
    assert torch.equal(weights[never], torch.zeros_like(weights[never]))
    assert torch.equal(biases[never], torch.zeros_like(biases[never]))


@pytest.mark.parametrize(("batch", "d_sae", "d_in", "share"), SHAPES)
def test_matches_the_reference(batch, d_sae, d_in, share, device, poisoned_empty):
    check(*make(device, batch, d_sae, d_in, share))


def test_lists_around_the_chunk_length(device, poisoned_empty):
    check(*around_the_chunks(device))


def test_extra_chunks_in_several_tiles(device, poisoned_empty, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    check(*make(device, 9, 4, 300, 0.7))


def test_by_hand(device):
    dense = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 0.0, 0.0]], device=device)
    weights, biases = both(dense, torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device))
    assert weights.tolist() == [[-1, 0], [0, 0], [1, 2]]
    assert biases.tolist() == [1, 0, 1]


def test_other_values_on_the_same_pattern(device):
    """The gradient of the values, not the codes themselves, feeds `dW_enc`."""
    dense, g = make(device, 12, 9, 6, 0.5)
    acts = SparseActs.from_dense(dense)
    other = torch.arange(1.0, acts.nnz + 1, device=device)
    want = acts.with_values(other).to_dense().T @ g
    torch.testing.assert_close(spmm_transposed(acts, other, g), want, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_any_strides(device):
    dense, g = make(device, 6, 11, 8, 0.5)
    want, _ = both(dense, g)
    for strided in (g.T.contiguous().T, torch.stack([g, g], 2)[:, :, 0], torch.cat([g, g])[:6]):
        assert torch.equal(both(dense, strided)[0], want)
    assert torch.equal(both(dense, g[:1].expand(6, -1))[0], both(dense, g[:1].repeat(6, 1))[0])


def test_no_program_adds_more_than_a_chunk(device, monkeypatch):
    """With the second kernel left out, a feature on every token has the sum of its first 128 entries only."""
    launches, launch = [], module.launch

    def without_adding(kernel, grid, *args, **kwargs):
        launches.append((kernel, grid))
        if kernel is not module._add_extra_chunks_kernel:
            launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(module, "launch", without_adding)
    dense, g = around_the_chunks(device)
    weights, _ = both(dense, g)
    torch.testing.assert_close(weights, dense[:CHUNK].T @ g[:CHUNK], rtol=1e-4, atol=1e-4)
    assert (module._add_extra_chunks_kernel, (int((dense != 0).sum()) // CHUNK, 1)) in launches


def test_extra_chunks_by_hand(device):
    """Entries 128, 0, 300, 129: none, none, two and one chunks beyond the first; there could have been four."""
    owners, extra_offsets = module._extra_chunks(torch.tensor([0, 128, 128, 428, 557], device=device), 557)
    assert owners.tolist() == [2, 2, 3, 4]
    assert extra_offsets.tolist() == [0, 0, 0, 2, 3]


def test_bits_repeat_in_any_order_of_programs(device, reversed_grid, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    dense, g = make(device, 9, 5, 300, 0.7)
    first = both(dense, g)
    again = both(dense, g)
    with reversed_grid():
        backwards = both(dense, g)
    for a, b, c in zip(first, again, backwards, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
