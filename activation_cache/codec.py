"""How rows are stored: bfloat16, float16, or int8 with a scale per group of columns.

Each row is encoded independently of the others, so a resumed harvest writes the same bytes.

int8: each row has a scale for every 64 columns, scale = max |x| / 127 in bfloat16 (which has the range of float32, so
small and large activations both fit), and q = round(x / scale). A few columns are far larger than the rest ("massive
activations") and would inflate the scale of their group: these outlier columns are kept in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int, Int8
from torch import Tensor
from torch.nn.functional import pad

from saelab.activation_cache.columns import is_gradient
from saelab.errors import CacheError

NAMES = ("bfloat16", "float16", "int8")
GROUP = 64
OUTLIER_RATIO = 8.0
"""A column is an outlier if its root mean square exceeds this multiple of the median over all columns."""
OUTLIER_SHARE = 32
"""At most one column in 32 (the largest) is kept as an outlier."""
MAX_ERROR = 0.01
"""Largest fraction of the variance that int8 may lose on the norm rule's rows."""
FLOAT16_MAX = 65504.0


def identity(name: str) -> dict[str, Any]:
    """The entries of a cache's config that describe its storage. Raises `ValueError` for an unknown name.

    bfloat16 is still format 1, which every version of saelab reads.
    """
    if name not in NAMES:
        raise ValueError(f"storage={name!r} must be one of {', '.join(NAMES)}.")
    known: dict[str, Any] = {"format_version": 1 if name == "bfloat16" else 2, "dtype": name}
    if name == "int8":
        known["int8"] = {"group": GROUP, "outlier_ratio": OUTLIER_RATIO, "outlier_share": OUTLIER_SHARE}
    return known


def max_outliers(d_in: int) -> int:
    """Largest number of outlier columns of a hook."""
    return max(1, d_in // OUTLIER_SHARE)


def row_bytes(name: str, d_in: int) -> int:
    """Upper bound on the bytes of one stored row of a hook."""
    return 2 * d_in if name != "int8" else d_in + 2 * -(-d_in // GROUP) + 2 * max_outliers(d_in)


def find_outliers(x: Float[Tensor, "n d_in"]) -> list[int]:
    """Columns whose root mean square exceeds 8 times the median over all columns; at most the d_in / 32 largest."""
    if not len(x):
        return []
    rms = x.double().square().mean(0).sqrt()  # (d_in)
    largest = rms.topk(min(max_outliers(x.shape[1]), x.shape[1])).indices
    return sorted(largest[rms[largest] > OUTLIER_RATIO * rms.median()].tolist())


@dataclass(frozen=True)
class Storage:
    """Encodes the rows of each column as the tensors of a shard."""

    name: str
    outliers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """int8: hook -> columns kept in bfloat16, in ascending order."""

    def kind(self, hook: str) -> str:
        """How the rows of a hook are stored; its gradients, which may be too small for float16, are bfloat16 instead."""
        return "bfloat16" if self.name == "float16" and is_gradient(hook) else self.name

    def encode(self, hook: str, x: Float[Tensor, "n d_in"]) -> dict[str, Tensor]:
        """Rows as they wait in the shuffle buffer, on the CPU: the stored tensors and, except for bfloat16, `error (n)`.

        `error` is the squared distance of the stored row from `x`, fp32. Raises `CacheError` if float16 overflows.
        """
        if self.kind(hook) == "bfloat16":
            return {"acts": x.to("cpu", torch.bfloat16)}
        x = x.cpu()  # before any sum: on an accelerator its last bits may depend on the number of rows
        if self.name == "float16":
            _check_float16(hook, x)
            tensors = {"acts": x.to(torch.float16)}
        else:
            tensors = _encode_int8(x.float(), torch.tensor(self.outliers.get(hook, ()), dtype=torch.int64))
        stored = decode(self.tensors(hook, tensors))
        return {**tensors, "error": (x.float() - stored.float()).square().sum(1)}

    def tensors(self, hook: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a shard's file holds for these rows, apart from the sums: what `decode` needs, without `error`."""
        kept = {name: x for name, x in tensors.items() if name != "error"}
        if self.name == "int8":
            kept["outlier_dims"] = torch.tensor(self.outliers.get(hook, ()), dtype=torch.int32)
        return kept

    def check_error(self, hook: str, x: Float[Tensor, "n d_in"]) -> None:
        """Raise `CacheError` if int8 would lose more than 1 % of the variance of these rows."""
        if self.name != "int8" or len(x) < 2:
            return
        error = self.encode(hook, x)["error"].double().sum().item()
        variance = (x.double() - x.double().mean(0)).square().sum().item()
        if error > MAX_ERROR * variance:
            raise CacheError(
                f"storage='int8' loses {error / max(variance, 1e-300):.1%} of the variance of {hook} (first {len(x):,} "
                f"rows), more than {MAX_ERROR:.0%}: use storage='bfloat16'."
            )


def decode(tensors: Mapping[str, Tensor]) -> Float[Tensor, "n d_in"]:
    """The rows of a shard's file: bfloat16 or float16 as stored, int8 dequantised to float32, without rounding."""
    q = tensors["acts"]
    if q.dtype != torch.int8:
        return q
    n, d_in = q.shape
    scales = tensors["scales"].float().repeat_interleave(GROUP, 1)[:, :d_in]  # (n, d_in)
    x = q.float() * scales
    x[:, tensors["outlier_dims"].long()] = tensors["outliers"].float()
    return x


def kept_rows(x: Float[Tensor, "n ctx d_in"], keep: Bool[Tensor, "n ctx"]) -> Float[Tensor, "rows d_in"]:
    """The rows of a batch selected by `keep`, on the device of `x`."""
    rows = keep.flatten().nonzero().flatten()
    return x.flatten(0, 1).index_select(0, rows.to(x.device))


def _encode_int8(x: Float32[Tensor, "n d_in"], outlier_dims: Int[Tensor, " m"]) -> dict[str, Tensor]:
    """`acts` int8 (n, d_in), 0 in outlier columns; `scales` bf16 (n, groups); `outliers` bf16 (n, m)."""
    d_in = x.shape[1]
    rest = x.index_fill(1, outlier_dims, 0.0)
    grouped = pad(rest, (0, -d_in % GROUP)).unflatten(1, (-1, GROUP))  # (n, groups, GROUP)
    scales = (grouped.abs().amax(-1) / 127).bfloat16()  # (n, groups)
    safe = torch.where(scales == 0, 1.0, scales.float())  # a scale of 0 means that the whole group is 0
    q: Int8[Tensor, "n groups columns"] = (grouped / safe[..., None]).round().clamp(-127, 127).to(torch.int8)
    return {
        "acts": q.flatten(1)[:, :d_in].contiguous(),
        "scales": scales,
        "outliers": x.index_select(1, outlier_dims).bfloat16(),
    }


def _check_float16(hook: str, x: Float[Tensor, "n d_in"]) -> None:
    too_large = x[x.abs() > FLOAT16_MAX]
    if len(too_large):
        raise CacheError(
            f"{hook} has an activation of {too_large[0].item():g}, beyond float16's maximum of {FLOAT16_MAX:g}: no row of "
            "its batch was written. Harvest with storage='bfloat16' into another out_dir."
        )
