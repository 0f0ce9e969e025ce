"""One pass over tokens that a crosscoder was not trained on: the sums by which features are judged, block by block.

A feature's direction is its decoder row at the side where that row is longer. Beside it stand random directions of the same norm,
as in the code of Minder et al. (2025, arXiv 2504.02922).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.evaluation.crosscoder import checked_sources, compare_decoders
from saelab.evaluation.scaling_sums import ScalingSums
from saelab.saes import CrosscoderSAE

N_RANDOM = 4
"""Random directions for each feature."""


class Tokens(NamedTuple):
    """Tokens of a pass."""

    x: Float[Tensor, "n n_sources d_in"]
    """Raw activations."""
    block: Int[Tensor, " n"]
    document: Int[Tensor, " n"] | None = None


class Documents(NamedTuple):
    """In how many documents features fire."""

    n: tuple[int, int]
    """Documents that show the change, and others."""
    n_fired: np.ndarray
    """`(2, d_sae)` int64: of either, those in which the feature fires."""


class Measured(NamedTuple):
    """What the pass found; arrays are float64."""

    delta: np.ndarray
    """`(d_sae,)` relative decoder norm: 0 only a, 1 only b."""
    cosine: np.ndarray
    """`(d_sae,)` between the two decoder rows."""
    numerators: np.ndarray
    """`(2, 1 + N_RANDOM, 2, n_blocks, d_sae)`: error and reconstruction; the feature's direction and random ones; its own side
    (where its row is longer) and the other."""
    n_fired: np.ndarray
    """`(n_blocks, d_sae)` tokens."""
    n_tokens: np.ndarray
    """`(n_blocks,)`"""
    documents: Documents | None = None
    fvu: tuple[float | None, float | None] = (None, None)
    """Of the crosscoder's reconstruction of a and of b; None where the activations do not vary."""


def measure(
    sae: CrosscoderSAE,
    tokens: Iterable[Tokens],
    a: int = 0,
    b: int = -1,
    *,
    n_blocks: int,
    changed: Collection[int] | None = None,
    seed: int = 0,
) -> Measured:
    """Read the tokens once. `changed` are the documents that show the change, where that is known."""
    sources = checked_sources(sae, a, b)
    compared = compare_decoders(sae, a, b)
    of_b = (compared.delta >= 0.5).to(sae.W_dec.device)
    rows = sae.W_dec.detach()[sources]
    direction = torch.where(of_b[:, None], rows[1], rows[0])
    sums = ScalingSums(sae, sources, torch.stack([direction, *_random_like(direction, seed)]), n_blocks)
    n_tokens, tally = torch.zeros(n_blocks, dtype=torch.int64), _Tally(sae.d_sae, changed or ())
    for some in tokens:
        feature_acts = sums.add(some.x, some.block)
        n_tokens += torch.bincount(some.block.cpu(), minlength=n_blocks)
        if changed is not None and some.document is not None:
            tally.add(feature_acts, some.document.cpu())
    found = sums.numerators  # (target, direction, source, block, feature): source 1 is the feature's own where of_b
    local = torch.where(of_b, found[:, :, 1], found[:, :, 0])
    other = torch.where(of_b, found[:, :, 0], found[:, :, 1])
    return Measured(
        compared.delta.numpy(),
        compared.cosine.numpy(),
        torch.stack([local, other], 2).cpu().numpy(),
        sums.n_fired.cpu().numpy(),
        n_tokens.double().numpy(),
        None if changed is None else tally.documents,
        (sums.variances[0].fvu, sums.variances[1].fvu),
    )


def _random_like(direction: Float[Tensor, "d_sae d_in"], seed: int) -> Float[Tensor, "n_random d_sae d_in"]:
    """Random rows of the same norm for each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(N_RANDOM, *direction.shape, generator=generator).to(direction)
    return drawn * (direction.norm(dim=1) / drawn.norm(dim=2))[:, :, None]


class _Tally:
    """In which documents features fire; a document may go on in the next batch."""

    def __init__(self, d_sae: int, changed: Collection[int]) -> None:
        self.d_sae, self.changed = d_sae, torch.tensor(sorted(changed), dtype=torch.int64)
        self.read, self.pairs = (torch.zeros(0, dtype=torch.int64) for _ in range(2))

    def add(self, feature_acts: Any, document: Int[Tensor, " n"]) -> None:
        fired = feature_acts.values.cpu() != 0
        rows, features = feature_acts.rows.cpu()[fired], feature_acts.features.cpu()[fired].long()
        self.read = torch.cat([self.read, document]).unique()
        self.pairs = torch.cat([self.pairs, document[rows] * self.d_sae + features]).unique()

    @property
    def documents(self) -> Documents:
        shows = torch.isin(self.pairs // self.d_sae, self.changed)
        features = self.pairs % self.d_sae
        n = int(torch.isin(self.read, self.changed).sum())
        counts = [torch.bincount(features[here], minlength=self.d_sae).numpy() for here in (shows, ~shows)]
        return Documents((n, len(self.read) - n), np.stack(counts))
