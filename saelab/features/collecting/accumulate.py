"""Streaming statistics of every feature at one end (its positive or its negative activations), batch by batch.

Memory is bounded: it grows with the number of features, not of tokens. Counts, maxima, histogram and the strongest examples are
exact. So is p99 for a feature that fired at most about 100 * `N_LARGEST` times; beyond, it is interpolated in the histogram,
whose bins are a fifth wide. Two accumulators of different tokens merge to what one would have held of all, to the same bits
(sums: to rounding).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.features.collecting.entries import Entries, float_rank, hash_rank
from saelab.features.collecting.kept import Kept
from saelab.features.collecting.largest import Largest
from saelab.features.schema import BINS_PER_OCTAVE, LOWEST_OCTAVE, N_BINS, OCTAVES, bin_edges

N_UNIFORM, PER_OCTAVE, N_LARGEST = 64, 4, 128
"""Examples per feature of the uniform sample of firings, per octave of activation, and values that p99 is read off."""
_COUNTS = ("n_fired", "total", "total_square", "maximum", "histogram")


class Accumulator:
    """Running statistics of `d_sae` features with positive values only; `signed.py` holds one for each end of signed features."""

    def __init__(self, d_sae: int, ctx_len: int, top_k: int) -> None:
        self.d_sae, self.ctx_len, self.top_k = d_sae, ctx_len, top_k
        self.n_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.total_square = torch.zeros(d_sae, dtype=torch.float64)
        self.maximum = torch.full((d_sae,), -torch.inf)
        self.histogram = torch.zeros(d_sae, N_BINS, dtype=torch.int32)
        self.largest = Largest(d_sae, N_LARGEST)
        self.kept = {
            "examples": Kept(d_sae, top_k, ctx_len, one_per_document=True),
            "uniform": Kept(d_sae, N_UNIFORM, ctx_len),
            "octave": Kept(d_sae * OCTAVES, PER_OCTAVE, ctx_len),
        }

    def add(self, entries: Entries, around: Entries) -> None:
        """Count the entries of one batch; the windows of examples show the values of `around`."""
        features, values = entries.features, entries.values
        self.n_fired += torch.bincount(features, minlength=self.d_sae)
        self.total.index_add_(0, features, values.double())
        self.total_square.index_add_(0, features, values.double().square())
        self.maximum.scatter_reduce_(0, features, values, "amax")
        bins = _bins(values)
        self.histogram.view(-1).index_add_(0, features * N_BINS + bins, torch.ones_like(bins, dtype=torch.int32))
        self.largest.offer(features, values)
        by_hash = hash_rank(entries.tokens)
        self.kept["examples"].offer(features, float_rank(values), entries, around)
        self.kept["uniform"].offer(features, by_hash, entries, around)
        self.kept["octave"].offer(features * OCTAVES + bins // BINS_PER_OCTAVE, by_hash, entries, around)

    def merge(self, other: Accumulator) -> None:
        """Add the statistics of other tokens."""
        for name in ("n_fired", "total", "total_square", "histogram"):
            getattr(self, name).add_(getattr(other, name))
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.largest.merge(other.largest)
        for name, kept in self.kept.items():
            kept.merge(other.kept[name])

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors for a file."""
        named = {name: getattr(self, name) for name in _COUNTS}
        named |= {f"largest.{name}": tensor for name, tensor in self.largest.tensors().items()}
        return named | {
            f"{kind}.{name}": one for kind, kept in self.kept.items() for name, one in kept.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned."""
        for name in _COUNTS:
            getattr(self, name).copy_(tensors[name])
        self.largest.load({name.partition(".")[2]: one for name, one in tensors.items() if name.startswith("largest.")})
        for kind, kept in self.kept.items():
            kept.load({name.partition(".")[2]: one for name, one in tensors.items() if name.startswith(f"{kind}.")})

    def quantile(self, q: float) -> tuple[Float[Tensor, " d_sae"], Bool[Tensor, " d_sae"]]:
        """The `q` quantile of each feature's values, NaN without any, and whether it is exact (linear interpolation between the
        values next to it)."""
        position = (self.n_fired - 1).clamp_min(0).double() * q
        above = self.n_fired - 1 - position.floor().long()  # values that are larger than the lower neighbour
        exact = (above < N_LARGEST) & (self.n_fired > 0)
        result = torch.full((self.d_sae,), torch.nan, dtype=torch.float64)
        here = exact.nonzero().squeeze(1)
        upper = (above - (position > position.floor()).long())[here]
        low, high = self.largest.nth(here, above[here]), self.largest.nth(here, upper)
        result[here] = torch.lerp(low.double(), high.double(), (position - position.floor())[here])
        far = ((self.n_fired > 0) & ~exact).nonzero().squeeze(1)
        result[far] = _in_histogram(self.histogram[far], position[far])
        return result, exact | (self.n_fired == 0)


def _bins(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Bin of each positive value: its exponent and the two leading mantissa bits of a float32, four exact bins per octave."""
    bins = (values.view(torch.int32) >> 21) - BINS_PER_OCTAVE * (127 + LOWEST_OCTAVE)
    return bins.clamp(0, N_BINS - 1).long()


def _in_histogram(counts: Int[Tensor, "n bins"], position: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The value at this position among the ascending values of each row, as if they were spread evenly in log over a bin."""
    below = counts.cumsum(1, dtype=torch.float64)
    bin_ = (below <= position[:, None]).sum(1, keepdim=True).clamp_max(N_BINS - 1)
    inside = counts.gather(1, bin_).squeeze(1).double().clamp_min(1)
    share = (position - (below.gather(1, bin_).squeeze(1) - inside) + 0.5) / inside
    edges = torch.tensor(bin_edges(), dtype=torch.float64)
    low, high = edges[bin_.squeeze(1)], edges[bin_.squeeze(1) + 1]
    return low * (high / low) ** share.clamp(0, 1)
