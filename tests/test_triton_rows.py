"""The Triton row operations against PyTorch, and what the kernels' production entries promise."""

import pytest
import torch

from saelab.kernels.bench.traffic import rows, sddmm, spmm, spmm_transposed
from saelab.kernels.triton_backend.launch import packed
from saelab.kernels.triton_backend.rows import project_, round_rows, unit_norm_

SHAPES = [(1, 1), (5, 7), (0, 4), (3, 1024), (4, 1100), (2, 2049)]
SPECS = [spec for module in (sddmm, spmm, spmm_transposed, rows) for spec in module.production_specs()]
MIB = 1 << 20


def draw(device, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize(("m", "d_in"), SHAPES)
def test_rounding(m, d_in, device, poisoned_empty):
    """What the selection's certificate builds on: the rounded row, its norm, and the norm of exactly what was lost."""
    W, low = draw(device, m, d_in), torch.zeros(m, d_in + 3, dtype=torch.bfloat16, device=device)
    norms, lost = round_rows(W, low)
    difference = low[:, :d_in].double() - W.double()
    assert bool((difference.abs() <= W.double().abs() / 128).all()) and not low[:, d_in:].any()
    torch.testing.assert_close(norms.double(), W.double().norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(lost.double(), difference.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m", "d_in"), SHAPES)
def test_projection(m, d_in, device):
    W, gradient = draw(device, m, d_in), draw(device, m, d_in, seed=1)
    W /= W.norm(dim=1, keepdim=True)
    want = gradient.double() - (gradient.double() * W.double()).sum(1, keepdim=True) * W.double()
    project_(gradient, W)
    torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-5)


def test_projection_by_hand(device):
    gradient = torch.tensor([[3.0, 4.0], [5.0, 6.0]], device=device)
    project_(gradient, torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device))
    assert gradient.tolist() == [[0, 4], [5, 6]]


@pytest.mark.parametrize(("m", "d_in"), SHAPES)
def test_unit_norm(m, d_in, device):
    W = draw(device, m, d_in)
    want = W.double() / W.double().norm(dim=1, keepdim=True)
    unit_norm_(W)
    torch.testing.assert_close(W.double(), want, rtol=1e-6, atol=1e-7)


def test_a_row_shorter_than_eps_is_not_blown_up(device):
    W = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.25]], device=device)
    unit_norm_(W, eps=0.5)
    assert W.tolist() == [[0, 0], [pytest.approx(0.6), pytest.approx(0.8)], [0, 0.5]]


def test_bits_repeat_in_any_order_of_programs(device, reversed_grid):
    def run():
        W, gradient = draw(device, 5, 1100), draw(device, 5, 1100, seed=1)
        unit_norm_(W)
        project_(gradient, W)
        rounded = round_rows(W, torch.zeros(5, 1100, dtype=torch.bfloat16, device=device))
        return torch.cat([*rounded, W.flatten(), gradient.flatten()])

    first = run()
    assert torch.equal(run(), first)
    with reversed_grid():
        assert torch.equal(run(), first)


def test_the_reversed_grid_is_reversed(device, reversed_grid):
    """Programs that all add to the same number show their order."""
    import triton
    import triton.language as tl

    @triton.jit
    def race(out_ptr):
        tl.store(out_ptr, tl.load(out_ptr) * 10 + tl.program_id(0) * 3 + tl.program_id(1))

    out = torch.zeros(2, dtype=torch.int64, device=device)
    race[(2, 3)](out[0])
    with reversed_grid():
        race[(2, 3)](out[1])
    assert out.tolist() == [12345, 543210]


def test_in_place_operations_refuse_what_they_would_not_reach(device):
    W = draw(device, 4, 6)
    with pytest.raises(ValueError, match=r"shape \(6, 4\) and strides \(1, 6\)"):
        unit_norm_(W.T)
    with pytest.raises(ValueError, match="got torch.bfloat16"):
        project_(W.bfloat16(), W)


def test_packed_is_contiguous_and_aligned(device):
    base = draw(device, 3, 5)
    assert packed(base) is base
    for view in (base[1:], base.T, base[:, 1:]):
        assert packed(view).is_contiguous() and packed(view).data_ptr() % 16 == 0 and torch.equal(packed(view), view)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_modelled_bytes(spec):
    """At most 1.3 times the least on every target's cache (80 % of 40, 50, 126, 256 MB), never below the compulsory."""
    for cache in (32 * MIB, 40 * MIB, 100 * MIB, 204 * MIB):
        assert (
            spec.compulsory_bytes <= spec.least_bytes(cache) <= spec.hbm_bytes(cache) <= 1.3 * spec.least_bytes(cache)
        )


@pytest.mark.parametrize("name", ["sddmm", "spmm", "spmm_transposed"])
def test_a_cache_too_small_for_the_tile_costs(name):
    spec = next(spec for spec in SPECS if spec.name == name)
    assert spec.hbm_bytes(MIB) > 2 * spec.hbm_bytes(32 * MIB)
