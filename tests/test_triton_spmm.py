"""The Triton `spmm` against the dense decoder; in the interpreter where there is no GPU."""

import pytest
import torch

from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.triton_backend import spmm as module
from saelab.kernels.triton_backend.spmm import spmm

SHAPES = [(1, 1, 1, 1.0), (6, 11, 5, 0.3), (0, 7, 3, 0.5), (4, 9, 6, 0.0), (5, 131, 300, 0.4), (3, 37, 64, 1.0)]


def make(device, batch, d_sae, d_in, share):
    generator = torch.Generator().manual_seed(batch + d_sae)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    dense = draw(batch, d_sae) * (torch.rand(batch, d_sae, generator=generator) < share).to(device)
    return dense, SparseActs.from_dense(dense), draw(d_sae, d_in), draw(d_in), draw(batch, d_in)


def narrow_tiles(monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 0)


def bits(acts, W, bias, target):
    return torch.cat(
        [t.flatten() for t in spmm(acts.values, acts.features, acts.offsets, W, bias, target, squares=True)]
    )


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
@pytest.mark.parametrize(("batch", "d_sae", "d_in", "share"), SHAPES)
def test_matches_the_reference(batch, d_sae, d_in, share, narrow, device, poisoned_empty, monkeypatch):
    if narrow:
        narrow_tiles(monkeypatch)
    dense, acts, W, bias, target = make(device, batch, d_sae, d_in, share)
    got, squares = spmm(acts.values, acts.features, acts.offsets, W, bias, target, squares=True)
    want = dense.double() @ W.double() + bias.double() - target.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), want.square().sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("with_bias", "with_target"), [(False, False), (True, False), (False, True)])
def test_bias_and_target_may_be_absent(with_bias, with_target, device, poisoned_empty):
    dense, acts, W, bias, target = make(device, 4, 11, 33, 0.5)
    got = spmm(
        acts.values, acts.features, acts.offsets, W, bias if with_bias else None, target if with_target else None
    )
    torch.testing.assert_close(got, dense @ W + with_bias * bias - with_target * target, rtol=1e-5, atol=1e-5)


def test_by_hand(device):
    values, features = torch.tensor([2.0, -1.0, 3.0], device=device), torch.tensor([0, 1, 1], device=device)
    offsets, W = (
        torch.tensor([0, 2, 2, 3], device=device),
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], device=device),
    )
    assert spmm(values, features, offsets, W).tolist() == [[2, 3, 6], [0, 0, 0], [0, 3, 0]]
    _, squares = spmm(values, features, offsets, W, squares=True)
    assert squares.tolist() == [49, 0, 9]


def test_an_empty_row_is_bias_less_target(device, poisoned_empty):
    _, _, W, bias, target = make(device, 3, 5, 300, 0.0)
    acts = SparseActs.from_dense(torch.tensor([[0.0] * 5, [0, 1, 0, 0, 2.0], [0.0] * 5], device=device))
    got = spmm(acts.values, acts.features, acts.offsets, W, bias, target)
    assert torch.equal(got[[0, 2]], (bias - target)[[0, 2]])


def test_rows_that_do_not_fire_are_not_touched(device):
    dense, acts, W, bias, target = make(device, 4, 11, 33, 0.5)
    spoiled = torch.cat([W, torch.full((1, 33), float("nan"), device=device)])
    assert torch.equal(bits(acts, spoiled, bias, target), bits(acts, W, bias, target))


def test_a_value_that_is_not_finite_spoils_only_its_row(device):
    _, acts, W, bias, target = make(device, 4, 11, 33, 0.5)
    values = acts.values.clone()
    values[acts.rows == 1] = float("nan")
    got = spmm(values, acts.features, acts.offsets, W, bias, target)
    assert bool(got[1].isnan().all()) and not bool(got[[0, 2, 3]].isnan().any())


def test_bf16_weights_and_strided_inputs(device):
    dense, acts, W, bias, target = make(device, 5, 13, 70, 0.5)
    strided = target.T.contiguous().T
    assert torch.equal(bits(acts, W.bfloat16(), bias, strided), bits(acts, W.bfloat16().float(), bias, target))
    got = spmm(acts.values, acts.features, acts.offsets, W.bfloat16(), bias, strided)
    torch.testing.assert_close(got, dense @ W.bfloat16().float() + bias - target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d_in", [5, 300])
def test_a_row_has_the_same_bits_everywhere(d_in, device):
    _, acts, W, bias, target = make(device, 9, 90, d_in, 0.5)
    whole, whole_squares = spmm(acts.values, acts.features, acts.offsets, W, bias, target, squares=True)
    for rows in (slice(4, 5), slice(1, 8)):
        part = acts.select_rows(torch.arange(9, device=device)[rows])
        out, squares = spmm(part.values, part.features, part.offsets, W, bias, target[rows], squares=True)
        assert torch.equal(out, whole[rows]) and torch.equal(squares, whole_squares[rows])


def test_bits_repeat_in_any_order_of_programs(device, reversed_grid, monkeypatch):
    narrow_tiles(monkeypatch)
    _, acts, W, bias, target = make(device, 6, 150, 100, 0.6)
    first = bits(acts, W, bias, target)
    assert torch.equal(bits(acts, W, bias, target), first)
    with reversed_grid():
        assert torch.equal(bits(acts, W, bias, target), first)


@pytest.mark.parametrize(
    ("d_sae", "d_in", "element_size", "columns"),
    [(131072, 4096, 4, 32), (131072, 4096, 2, 64), (8192, 576, 4, 256), (8192, 100, 4, 128), (2**24, 4096, 4, 32)],
)
def test_the_widest_tile_that_fits_the_cache(d_sae, d_in, element_size, columns):
    assert module._columns(d_sae, d_in, element_size) == columns
