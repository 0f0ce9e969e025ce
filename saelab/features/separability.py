"""How far apart the activations of a feature are in two or more sets of tokens: the Jensen-Shannon distance of their histograms.

    JSD(P, Q) = (KL(P || M) + KL(Q || M)) / 2,   M = (P + Q) / 2,   distance = sqrt(JSD)

in bits, so that the distance is 0 for equal and 1 for disjoint distributions, and a metric (Endres and Schindelin 2003). A
histogram has a bin for zero, and equal bins over the other activations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

N_BINS = 64
TAIL = 0.001
"""Share of a feature's activations at either end that the outermost bins take in, whatever their size."""


def js_divergence(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """Jensen-Shannon divergence of each pair of rows, in bits: 0 if equal, 1 if disjoint."""
    middle = ((p + q) / 2).clamp_min(1e-30)
    to_p, to_q = (torch.xlogy(r, r / middle).sum(1) for r in (p, q))
    return (to_p + to_q) / (2 * math.log(2))


def js_distance(p: Float[Tensor, "n bins"], q: Float[Tensor, "n bins"]) -> Float[Tensor, " n"]:
    """Its square root, a metric between 0 and 1."""
    return js_divergence(p, q).clamp(0, 1).sqrt()


def separability(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    concept: Bool[Tensor, " nnz"],
    n_tokens: tuple[int, int],
    d_sae: int,
) -> Float[Tensor, " d_sae"]:
    """Jensen-Shannon distance of each feature between tokens of a concept and others, from the activations that are not zero.

    `concept` says for each activation which set its token is in; `n_tokens` are the sizes of both sets, the concept's first. A
    feature that never fired has 0.
    """
    return pairwise_separability(values, features, (~concept).long(), n_tokens, d_sae)


def pairwise_separability(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    sets: Int[Tensor, " nnz"],
    n_tokens: Sequence[int],
    d_sae: int,
) -> Float[Tensor, " d_sae"]:
    """The same for several sets of tokens, the mean over all pairs of them; `sets` is the number of the set of each activation's
    token, `n_tokens` the size of each set. All sets share the bins."""
    shares = histograms(values, features, sets, n_tokens, d_sae)
    distances = [js_distance(p, q) for p, q in itertools.combinations(shares, 2)]
    return torch.stack(distances).mean(0)


def histograms(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    sets: Int[Tensor, " nnz"],
    n_tokens: Sequence[int],
    d_sae: int,
) -> Float[Tensor, "n_sets d_sae bins"]:
    """Shares of each set's tokens in the bins of each feature, the bin of zero first."""
    order = values.argsort(stable=True)
    order = order[features[order].argsort(stable=True)]
    values, features, sets = values[order].double(), features[order], sets[order]
    counts = torch.bincount(features, minlength=d_sae)
    starts = counts.cumsum(0) - counts
    fired = counts > 0
    low, high = torch.zeros(2, d_sae, dtype=torch.float64)
    edge = (TAIL * (counts - 1)).round().long()
    low[fired] = values[(starts + edge)[fired]]
    high[fired] = values[(starts + counts - 1 - edge)[fired]]
    width = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    bins = ((values - low[features]) / width[features] * N_BINS).long().clamp(0, N_BINS - 1)
    shares = []
    for number, n in enumerate(n_tokens):
        here = sets == number
        table = torch.bincount(features[here] * N_BINS + bins[here], minlength=d_sae * N_BINS).view(d_sae, N_BINS)
        silent = n - table.sum(1, keepdim=True)
        shares.append(torch.cat([silent, table], 1).double() / n)
    return torch.stack(shares)
