"""`Screen`: upper bounds of all scores, of which only group maxima are kept; the pairs above a floor are found again.

Exact by a lemma: the k groups with the largest maxima hold all of a row's top k, since an element that reaches the k-th
value lifts its group's maximum there too, and at most k groups get that far. So `maxima` give a floor, and only the
(row, group) pairs whose maximum reaches it are multiplied a second time, about k of n_groups.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend import launch
from saelab.kernels.triton_backend.group_max import group_max
from saelab.kernels.triton_backend.grouped_product import grouped_product


class Screen:
    """Upper bounds `u = a @ b.T` of all scores, kept only as group maxima; the group of feature j is `j % n_groups`.

    `a` and `b` are both bf16 or both fp32, summed in fp32. The two passes may sum in another order: whoever chooses a
    floor from `maxima` leaves room for an fp32 product's rounding, as for that of the scores themselves.
    Rows of a multiple of 8 elements (16 bytes) load fastest.
    """

    maxima: Float[Tensor, "rows n_groups"]
    """fp32 maximum of u (or |u|) over each group's features; members that do not exist count as -inf."""

    def __init__(
        self, a: Float[Tensor, "rows K"], b: Float[Tensor, "d_sae K"], n_groups: int, magnitude: bool = False
    ) -> None:
        if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"a and b must both be bfloat16 or both float32, got {a.dtype} and {b.dtype}")
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"a and b must agree in K, got {tuple(a.shape)} and {tuple(b.shape)}")
        if n_groups < 1:
            raise ValueError(f"n_groups must be at least 1, got {n_groups}")
        self._a, self._b = a.contiguous(), b.contiguous()
        self._magnitude = magnitude
        self.maxima = group_max(self._a, self._b, n_groups, magnitude)

    def pairs_above(self, floor: Float[Tensor, " rows"]) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " rows_plus_1"]]:
        """Every feature with `u >= floor[row]`: `features (nnz)`, ascending within each row, and `offsets (rows + 1)`."""
        rows, d_sae = self.maxima.shape[0], self._b.shape[0]
        if floor.shape != (rows,):
            raise ValueError(f"floor must have shape ({rows},), got {tuple(floor.shape)}")
        floor = floor.float().contiguous()
        row_bytes = self._a.shape[1] * self._a.element_size()
        cache = launch.usable_cache(launch.target_of(self._a.device))
        parts = [self._keys_of_part(floor, part) for part in launch.resident_parts(rows, row_bytes, cache)]
        keys = torch.cat([floor.new_empty(0, dtype=torch.int64), *parts])
        borders = torch.arange(rows + 1, device=keys.device) * d_sae
        return keys % d_sae, torch.searchsorted(keys, borders)

    def _keys_of_part(self, floor: Tensor, part: slice) -> Tensor:
        """`row * d_sae + feature` of one super-block's pairs, ascending: one integer sort puts rows and features in order."""
        n_groups, d_sae = self.maxima.shape[1], self._b.shape[0]
        reached = self.maxima[part] >= floor[part, None]  # (rows of the part, n_groups)
        groups, rows = reached.T.nonzero(as_tuple=True)  # by group, then by row
        rows = rows + part.start
        masks = grouped_product(self._a, self._b, floor, groups, rows, n_groups, self._magnitude)
        pairs, members = _set_bits(masks)
        return (rows[pairs] * d_sae + groups[pairs] + members * n_groups).sort().values


def _set_bits(masks: Int[Tensor, "n_pairs words"]) -> tuple[Int[Tensor, " n_set"], Int[Tensor, " n_set"]]:
    """(pair, bit) of every set bit, through the non-zero bytes, so that no tensor has more than 8 elements per set bit."""
    octets = masks.view(torch.uint8)  # little-endian: byte i of a row holds bits 8 i to 8 i + 7
    pairs, bytes_at = octets.nonzero(as_tuple=True)
    bits = torch.arange(8, device=masks.device, dtype=torch.uint8)
    hits, bit = ((octets[pairs, bytes_at, None] >> bits) & 1).nonzero(as_tuple=True)
    return pairs[hits], bytes_at[hits] * 8 + bit
