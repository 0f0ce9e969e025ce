"""Feature absorption on a planted hierarchy (after Chanin et al. 2024, "A is for absorption"): does the feature of a parent
stay off where a child's feature already implies the parent? With planted features the truth is known, so no probe is needed."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.benchmarks.recovery import cosines


def absorption(
    features: Float[Tensor, "n_features d_in"],
    learned: Float[Tensor, "d_sae d_in"],
    true_feature_acts: Float[Tensor, "n n_features"],
    fired: Bool[Tensor, "n d_sae"],
    n_parents: int,
) -> dict[str, float]:
    """`absorption`: how often a parent's feature is off where the parent and one of its children are on, the mean over parents;
    `missed`: how often it is off where the parent is on alone.

    A parent's feature is the learned one of the largest cosine. The first `n_parents` features are parents; the children of each
    follow, parent by parent. Tokens on which a parent is off do not count; a parent never seen counts as 0.
    """
    on = true_feature_acts != 0
    with_child = on[:, n_parents:].unflatten(1, (n_parents, -1)).any(2)
    off = ~fired[:, cosines(features[:n_parents], learned).argmax(1)]
    shares = []
    for where in (on[:, :n_parents] & with_child, on[:, :n_parents] & ~with_child):
        shares.append(float(((off & where).sum(0) / where.sum(0).clamp_min(1)).mean()))
    return {"absorption": shares[0], "missed": shares[1]}
