"""The features that interact most with one, where an SAE's decoder has products of features (`saelab/saes/interactions.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from saelab.features.collected_with import steered_model
from saelab.features.schema import MIN_BOTH
from saelab.features.token_text import token_bytes
from saelab.kernels.sparse_acts import SparseActs
from saelab.models.hooks import writes_to_residual
from saelab.saes.interactions import pair_directions
from saelab.validation import check_integer

N_TOKENS = 5
"""Tokens named of each interaction."""


def interactions(
    store: Any, feature: int, k: int = 20, lm: Any = None, *, min_both: int = MIN_BOTH
) -> list[dict[str, Any]]:
    """The `k` features whose product with this feature the decoder writes most strongly, of those that fire together with it on
    `min_both` tokens of the store's sample or more (0: of all that fired).

    Dicts with "feature"; "norm" (of the coefficient of both activations' product, in raw units); "at_p99" (the norm where both
    are at their p99); "cosine" and "cosine_other" (of the coefficient with this decoder row, and with the other's); "n_both",
    "lift" and "p_given_this" (how often they fire together, as `store.coactivation`); and given the language model, "promoted":
    the tokens whose logits the coefficient raises most ([] off the residual stream). The largest "at_p99" first.
    Raises `ValueError` for an SAE whose decoder has no products, and for a model other than the store's.
    """
    check_integer("k", k, 1)
    check_integer("min_both", min_both, 0)
    store.check_feature(feature)
    directions = pair_directions(store.sae, feature).float().cpu()  # (d_sae, d_in)
    norms, rows = directions.norm(dim=1), store.sae.decoder()[0].detach().float().cpu()
    both, counts, n = store.firing_together(feature)
    p99 = torch.from_numpy(store.column("p99")).abs()
    sizes = norms * p99[feature] * p99
    left_out = (torch.from_numpy(store.column("n_fired")) == 0) | (torch.from_numpy(both) < min_both)
    best = _largest(sizes, left_out.index_fill(0, torch.tensor(feature), True), k)
    tokens = [None] * len(best) if lm is None else _promoted(store, lm, directions[best])
    found = []
    for other, promoted in zip(best.tolist(), tokens, strict=True):
        n_both, n_this, n_other = int(both[other]), int(counts[feature]), int(counts[other])
        found.append(
            {
                "feature": other,
                "norm": float(norms[other]),
                "at_p99": float(sizes[other]),
                "cosine": float(cosine_similarity(directions[other], rows[feature], dim=0)),
                "cosine_other": float(cosine_similarity(directions[other], rows[other], dim=0)),
                "n_both": n_both,
                "lift": n_both * n / (n_this * n_other) if n_this and n_other else None,
                "p_given_this": n_both / n_this if n_this else None,
            }
            | ({} if promoted is None else {"promoted": promoted})
        )
    return found


def _largest(sizes: Float[Tensor, " d_sae"], left_out: Bool[Tensor, " d_sae"], k: int) -> Int[Tensor, " n"]:
    best = sizes.masked_fill(left_out, -1.0).topk(min(k, len(sizes))).indices
    return best[~left_out[best]]


def sampled_feature_acts(store: Any) -> SparseActs:
    """Which features fired on the tokens of the store's sample, each with 1: for `saelab.evaluation.interactions.pair_table`."""
    sample = store.sample
    features = torch.from_numpy(sample["features"]).long()
    return SparseActs(torch.ones(len(features)), features, torch.from_numpy(sample["offsets"]).long(), store.d_sae)


def _promoted(store: Any, lm: Any, directions: Float[Tensor, "n d_in"]) -> Sequence[list[str]]:
    """The tokens whose logits each direction raises most."""
    if not writes_to_residual(store.hook_name):
        return [[] for _ in directions]
    lm = steered_model(store, lm)
    ids = (directions @ lm.logit_weights().float().cpu().T).topk(N_TOKENS, 1).indices.tolist()
    spelled = token_bytes(lm.tokenizer, {one for row in ids for one in row})
    return [[spelled[one].decode("utf-8", "backslashreplace") for one in row] for row in ids]
