"""`Screen` and its two kernels against dense products: odd shapes, absent members, floors, order of programs, memory."""

import jaxtyping
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saelab.kernels.triton_backend import group_max as group_max_module
from saelab.kernels.triton_backend import launch
from saelab.kernels.triton_backend.group_max import group_max
from saelab.kernels.triton_backend.grouped_product import grouped_product
from saelab.kernels.triton_backend.screen import Screen

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
# rows, K, d_sae, n_groups
SHAPES = [
    (1, 1, 1, 1),
    (7, 5, 13, 4),
    (0, 4, 9, 3),
    (33, 24, 257, 16),  # d_sae prime, K no multiple of the tile
    (5, 16, 40, 40),  # one member a group
    (3, 3, 2, 5),  # groups without any member
    (17, 20, 131, 1),  # one group of several words and several chunks
    (40, 33, 300, 4),  # 75 members: the last word is not full
]
DTYPES = [torch.bfloat16, torch.float32]


def make(rows, K, d_sae, dtype=torch.float32, seed=0):
    """Small integers, so that every sum is exact in whatever order; NaN lies behind the end of both operands."""
    generator = torch.Generator().manual_seed(seed)
    ints = [torch.randint(-3, 4, (n, K), generator=generator).to(dtype) for n in (rows, d_sae)]
    a, b = (torch.cat([t, torch.full((1, K), float("nan"), dtype=dtype)]).to(DEVICE)[:-1] for t in ints)
    return a, b


def dense_u(a, b, magnitude=False):
    u = a.float() @ b.float().T
    return u.abs() if magnitude else u


def dense_maxima(u, n_groups):
    maxima = u.new_full((u.shape[0], n_groups), float("-inf"))
    for feature in range(u.shape[1]):
        maxima[:, feature % n_groups] = torch.maximum(maxima[:, feature % n_groups], u[:, feature])
    return maxima


def pairs_of(above):
    """Features and offsets of a boolean `(rows, d_sae)` matrix."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device=above.device), above.sum(1).cumsum(0)])
    return above.nonzero()[:, 1], offsets


def assert_pairs(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.int64 and torch.equal(ours, theirs)


@pytest.mark.parametrize("magnitude", [False, True], ids=["signed", "magnitude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "K", "d_sae", "n_groups"), SHAPES)
def test_matches_the_dense_product(rows, K, d_sae, n_groups, dtype, magnitude, poisoned_empty):
    a, b = make(rows, K, d_sae, dtype)
    u = dense_u(a, b, magnitude)
    screen = Screen(a, b, n_groups, magnitude)
    assert screen.maxima.dtype == torch.float32
    assert torch.equal(screen.maxima, dense_maxima(u, n_groups))
    floor = u.quantile(0.8, dim=1) if rows else u.new_empty(0)
    floor = torch.where(torch.arange(rows, device=DEVICE) % 3 == 0, u.amax(1), floor)  # ties with the maximum count
    assert_pairs(screen.pairs_above(floor), pairs_of(u >= floor[:, None]))


@pytest.mark.parametrize("magnitude", [False, True], ids=["signed", "magnitude"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 7, 10])
def test_any_number_of_tiles_along_K(tiles, magnitude):
    """Compilers unroll short loops, and one of them then lost the sums of 3, 4 and 5 tiles (Triton 3.6, `tl.abs`)."""
    depth = group_max_module.TILES[launch.target_of(torch.device(DEVICE))].depth
    a, b = make(20, tiles * depth - 3, 128, torch.bfloat16)
    u = dense_u(a, b, magnitude)
    screen = Screen(a, b, 4, magnitude)
    assert torch.equal(screen.maxima, dense_maxima(u, 4))
    floor = u.quantile(0.9, dim=1)
    assert_pairs(screen.pairs_above(floor), pairs_of(u >= floor[:, None]))


def test_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, -2.0]], device=DEVICE)
    b = torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, -1.0], [4.0, 1.0], [0.0, 2.0]], device=DEVICE)
    screen = Screen(a, b, 2)  # u = [[1, 2, 3, 4, 0], [-2, 0, 2, -2, -4]]; groups {0, 2, 4} and {1, 3}
    assert screen.maxima.tolist() == [[3.0, 4.0], [2.0, 0.0]]
    features, offsets = screen.pairs_above(torch.tensor([2.0, -2.0], device=DEVICE))
    assert features.tolist() == [1, 2, 3, 0, 1, 2, 3] and offsets.tolist() == [0, 3, 7]
    assert Screen(a, b, 2, magnitude=True).maxima.tolist() == [[3.0, 4.0], [4.0, 2.0]]


@pytest.mark.parametrize(("rows", "K", "d_sae", "n_groups"), SHAPES)
def test_a_floor_of_minus_infinity_gives_everything(rows, K, d_sae, n_groups, poisoned_empty):
    features, offsets = Screen(*make(rows, K, d_sae), n_groups).pairs_above(torch.full((rows,), -torch.inf).to(DEVICE))
    assert torch.equal(features.view(rows, d_sae), torch.arange(d_sae, device=DEVICE).expand(rows, -1))
    assert offsets.tolist() == list(range(0, rows * d_sae + 1, d_sae))


def test_rows_below_their_floor_have_no_pairs():
    a, b = make(20, 8, 50)
    screen = Screen(a, b, 5)
    floor = torch.full((20,), torch.inf, device=DEVICE)
    assert_pairs(screen.pairs_above(floor), pairs_of(torch.zeros(20, 50, dtype=torch.bool, device=DEVICE)))
    floor[11] = screen.maxima[11].max()
    features, offsets = screen.pairs_above(floor)
    assert offsets.tolist() == [0] * 12 + [len(features)] * 9 and len(features) >= 1
    floor[11] = torch.nan  # nothing is at least NaN
    assert screen.pairs_above(floor)[0].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_made_in_fp32(dtype):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, 70, generator=generator).to(dtype).to(DEVICE) for n in (9, 60))
    want = dense_maxima((a.double() @ b.double().T), 6)
    torch.testing.assert_close(Screen(a, b, 6).maxima.double(), want, rtol=1e-5, atol=2e-5)


def test_the_kth_group_maximum_finds_the_top_k():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(12, 16, generator=generator).to(DEVICE), torch.randn(200, 16, generator=generator).to(DEVICE)
    k, screen = 5, Screen(a, b, 25)
    floor = screen.maxima.topk(k).values[:, -1] - 1e-4  # the rounding of the second pass
    features, offsets = screen.pairs_above(floor)
    for row, top in enumerate((a @ b.T).topk(k).indices.tolist()):
        assert set(top) <= set(features[offsets[row] : offsets[row + 1]].tolist())
    assert features.numel() < 12 * 40


def run_everything():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(n, 20, generator=generator).bfloat16().to(DEVICE) for n in (40, 90))
    screen = Screen(a, b, 10)
    return screen.maxima, *screen.pairs_above(screen.maxima.median(dim=1).values)


def test_two_runs_have_the_same_bits():
    assert all(torch.equal(x, y) for x, y in zip(run_everything(), run_everything(), strict=True))


def test_the_order_of_the_programs_changes_no_bit(reversed_grid):
    want = run_everything()
    with reversed_grid():
        assert all(torch.equal(x, y) for x, y in zip(run_everything(), want, strict=True))


def test_super_blocks_change_no_bit(monkeypatch):
    want = run_everything()
    monkeypatch.setattr(launch, "PART_BLOCK", 16)
    monkeypatch.setattr(launch, "usable_cache", lambda target: 20 * 40)  # 20 rows of 40 bytes
    assert launch.resident_parts(40, 40, 20 * 40) == [slice(0, 16), slice(16, 32), slice(32, 40)]
    assert all(torch.equal(x, y) for x, y in zip(run_everything(), want, strict=True))


def test_views_are_taken():
    a, b = make(20, 12, 30)
    want = Screen(a, b, 4).maxima
    assert torch.equal(Screen(a.T.contiguous().T, torch.cat([b, b], 1)[:, :12], 4).maxima, want)


def test_hit_masks_by_hand():
    """One group of 40 members; only pairs (0, row 1) and (0, row 0) are asked for."""
    a, b = torch.tensor([[1.0], [-1.0]], device=DEVICE), torch.arange(40.0, device=DEVICE)[:, None]
    groups, rows = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    masks = grouped_product(a, b, torch.tensor([31.0, -2.0], device=DEVICE), groups, rows, 1)
    assert masks.tolist() == [[0b111, 0], [-(2**31), 0b11111111]]


class Largest(TorchDispatchMode):
    """Remembers the largest size in bytes of any tensor that an operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.nbytes)
        return out


def test_no_tensor_of_rows_times_features_is_made():
    rows, d_sae, n_groups, k = 32, 256, 32, 4
    assert k * d_sae // n_groups < d_sae / 4
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 4, generator=generator).bfloat16().to(DEVICE) for n in (rows, d_sae))
    with Largest() as seen:
        screen = Screen(a, b, n_groups)
        features, _ = screen.pairs_above(screen.maxima.topk(k).values[:, -1])
    assert features.numel() >= 0.9 * rows * k
    assert screen.maxima.nbytes <= seen.nbytes < rows * d_sae  # not even of one byte each


def test_refuses_what_it_cannot_take(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users do not have the run-time checker
    a, b = make(4, 6, 8)
    for bad_a, bad_b, n_groups, floor, message in [
        (a.double(), b.double(), 2, a[:, 0], "float64"),
        (a.bfloat16(), b, 2, a[:, 0], "bfloat16"),
        (a[:, :5], b, 2, a[:, 0], "agree in K"),
        (a, b, 0, a[:, 0], "n_groups"),
        (a, b, 2, a[:3, 0], "floor must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            Screen(bad_a, bad_b, n_groups).pairs_above(floor)


def test_the_compiled_path_is_not_taken_for_cpu_tensors(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        group_max(torch.zeros(2, 3), torch.zeros(4, 3), 2)
