"""`Screen`: upper bounds on all scores, of which only group maxima are stored; pairs above a floor are recomputed.

This is exact because the k groups with the largest maxima contain all of a row's top k: a group with an element that
reaches the k-th value has a maximum that does too, and there are at most k such groups. So `maxima` determine a floor, and
only the (row, group) pairs whose maximum reaches it, about k of n_groups, are multiplied a second time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_backend import launch
from saelab.kernels.triton_backend.group_max import group_max
from saelab.kernels.triton_backend.grouped_product import grouped_product


class Screen:
    """Upper bounds `u = a @ b.T` on all scores, stored only as group maxima; feature j belongs to group `j % n_groups`.

    `a` and `b` are both bf16 or both fp32, summed in fp32. The two passes may sum in a different order, so a floor chosen
    from `maxima` needs a margin for the rounding of an fp32 product, as well as for that of the scores themselves.
    Rows load fastest if their length is a multiple of 8 elements (16 bytes in bf16). Raises `ValueError` for operands that
    do not match and for `n_groups` below 1.
    """

    maxima: Float[Tensor, "rows n_groups"]
    """fp32 maximum of u (or |u|) over the features of each group; members beyond d_sae count as -inf."""

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
        """All features with `u >= floor[row]`: `features (nnz)`, ascending within each row, and `offsets (rows + 1)`."""
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
        """`row * d_sae + feature` of the pairs of one super-block, ascending: one integer sort orders rows and features."""
        n_groups, d_sae = self.maxima.shape[1], self._b.shape[0]
        reached = self.maxima[part] >= floor[part, None]  # (rows of the part, n_groups)
        groups, rows = reached.T.nonzero(as_tuple=True)  # by group, then by row
        rows = rows + part.start
        masks = grouped_product(self._a, self._b, floor, groups, rows, n_groups, self._magnitude)
        pairs, members = _set_bits(masks)
        return (rows[pairs] * d_sae + groups[pairs] + members * n_groups).sort().values


def _set_bits(masks: Int[Tensor, "n_pairs words"]) -> tuple[Int[Tensor, " n_set"], Int[Tensor, " n_set"]]:
    """(pair, bit) of every set bit, found via the non-zero bytes so that no tensor has more than 8 elements per set bit."""
    octets = masks.view(torch.uint8)  # little-endian: byte i of a row holds bits 8 i to 8 i + 7
    pairs, bytes_at = octets.nonzero(as_tuple=True)
    bits = torch.arange(8, device=masks.device, dtype=torch.uint8)
    hits, bit = ((octets[pairs, bytes_at, None] >> bits) & 1).nonzero(as_tuple=True)
    return pairs[hits], bytes_at[hits] * 8 + bit
