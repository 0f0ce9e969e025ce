"""Retrieval of labelled items by their embeddings: sparse ones of an SAE against shorter dense ones (as in Wen et al. 2025, see
`saes/csr.py`). Two items are as similar as the cosine of

    sae      the k largest feature activations of the SAE
    pca      the k leading principal components of the centred embedding
    random   the k largest positive projections of the normalised embedding onto d_sae random directions, and no training
    dense    the centred embedding, all d_in numbers

The principal components stand for embeddings that can be truncated, as those of Matryoshka representation learning, which are
trained for it; this baseline and `random` are ours. A sparse embedding stores k numbers and k feature ids.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saelab.evaluation.labels import numbered
from saelab.kernels.encode_topk import encode_topk
from saelab.kernels.ragged import keep_largest
from saelab.saes import SAE
from saelab.saes.trained_hooks import check_is_sae
from saelab.validation import check_integer

NEAREST = 10
_ROWS_AT_ONCE = 512
_DIRECTIONS = 5 << 29
"""Added to the seed, so that directions share no random numbers with weights or data."""


class Retrieval(NamedTuple):
    """How well one kind of embedding retrieves items of the same label."""

    embedding: str
    """"sae", "pca", "random" or "dense"."""
    k: int
    """Numbers per item, at most."""
    l0: float
    """Numbers per item that are not zero, on average."""
    accuracy: float
    """Fraction of items whose nearest other item has their label (1-NN, leave-one-out)."""
    precision: float
    """Fraction of the `NEAREST` nearest other items that have the item's label, on average."""


@torch.no_grad()
def compare_retrieval(
    sae: SAE,
    x: Float[Tensor, "n d_in"],
    labels: Sequence[Any] | Tensor,
    ks: Sequence[int] = (4, 8, 16, 32),
    *,
    fit: Float[Tensor, "n_fit d_in"] | None = None,
    seed: int = 0,
) -> list[Retrieval]:
    """Retrieval among the items `x`, raw embeddings with a label each, by every kind of embedding at each of `ks`.

    `x` should not have been trained on. `fit` are the embeddings that centre and principal components are computed from, such as
    the training rows; None takes `x`. An SAE that selects by its config's `k` is asked for more features where one of `ks` is
    above that. Raises `ValueError` for labels that do not fit, fewer than two items, and a k above d_in or d_sae.
    """
    check_is_sae(sae, "compare_retrieval")
    if len(labels) != len(x) or len(x) < 2:
        raise ValueError(f"There are {len(labels)} labels for {len(x)} items; give one for each, and at least 2 items.")
    for k in ks:
        check_integer("k", k, 1)
        if k > min(sae.d_in, sae.d_sae):
            raise ValueError(f"k={k} must be at most d_in={sae.d_in} and d_sae={sae.d_sae}.")
    _, groups = numbered(labels)
    center, axes = _principal_axes(x if fit is None else fit)
    generator = torch.Generator().manual_seed(_DIRECTIONS + seed)
    directions = normalize(torch.randn(sae.d_sae, sae.d_in, generator=generator)).to(sae.center)
    found = []
    for k in ks:
        found += [
            _measured("sae", k, sparse_embedding(sae, x, k), groups),
            _measured("pca", k, (x.double() - center) @ axes[:, :k], groups),
            _measured("random", k, _random(sae, x, k, directions), groups),
        ]
    return [*found, _measured("dense", sae.d_in, x.double() - center, groups)]


@torch.no_grad()
def sparse_embedding(sae: SAE, x: Float[Tensor, "n d_in"], k: int) -> Float[Tensor, "n d_sae"]:
    """The k feature activations of largest magnitude of each item, the others 0."""
    if getattr(sae.config, "k", k) < k:
        sae = copy.copy(sae)
        sae.config = dataclasses.replace(sae.config, k=k)
    feature_acts = sae.encode(x)
    kept, _ = keep_largest(feature_acts.values.abs(), feature_acts.offsets, k)
    here = torch.zeros_like(feature_acts.features, dtype=torch.bool).index_fill(0, kept, True)
    return feature_acts.where(here).to_dense()


def _random(sae: SAE, x: Tensor, k: int, directions: Tensor) -> Tensor:
    return encode_topk(sae.normalize(x), directions, directions.new_zeros(len(directions)), k).to_dense()


def _principal_axes(x: Tensor) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
    """The mean, and the principal axes as columns, those of largest variance first; float64."""
    center = x.double().mean(0)
    _, axes = torch.linalg.eigh(torch.cov(x.double().T, correction=0))
    return center, axes.flip(1)


def _measured(name: str, k: int, embedding: Float[Tensor, "n width"], groups: Int[Tensor, " n"]) -> Retrieval:
    """Of equally similar items the earlier counts as nearer."""
    n, nearest = len(embedding), min(NEAREST, len(embedding) - 1)
    units, ids, groups = normalize(embedding.double()), torch.arange(n), groups.to(embedding.device)
    hits = []
    for rows in ids.split(_ROWS_AT_ONCE):
        cosines = units[rows] @ units.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        order = cosines.sort(dim=1, descending=True, stable=True).indices[:, :nearest]
        hits.append(groups[order] == groups[rows][:, None])
    same = torch.cat(hits).double()
    l0 = float((embedding != 0).double().sum(1).mean())
    return Retrieval(name, k, l0, float(same[:, 0].mean()), float(same.mean()))
