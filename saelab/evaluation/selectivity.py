"""How selective features are for labels (Donhauser et al. 2025, see `saes/icfl.py`). With p_f(i) the fraction of the items of
label i that feature f is active on, and p_f(not i) that of all other items:

    average_f(i) = p_f(i) - p_f(not i),   maximum_f(i) = p_f(i) - max_{j != i} p_f(j)

Both lie in [-1, 1]. The first is 1 for a feature that is active on all items of a label and no other. For two labels they are
equal, and the selectivity for one label is minus that for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.evaluation.labels import numbered
from saelab.kernels.sparse_acts import SparseActs


class Selectivity(NamedTuple):
    """Of every feature for every label, float64."""

    labels: tuple[Any, ...]
    """In the order of the rows below: that of their first items."""
    average: Float[Tensor, "n_labels d_sae"]
    maximum: Float[Tensor, "n_labels d_sae"]


@torch.no_grad()
def selectivity(feature_acts: SparseActs, labels: Sequence[Any] | Tensor) -> Selectivity:
    """The selectivity of the features for the labels of the items (rows) whose activations these are.

    Raises `ValueError` unless there is one label for each row, and at least two different ones.
    """
    names, groups = numbered(labels)
    if len(groups) != feature_acts.batch or len(names) < 2:
        raise ValueError(
            f"There are {len(groups)} labels, {len(names)} of them different, for {feature_acts.batch} rows of feature "
            "activations: give one for each row, at least two different."
        )
    groups = groups.to(feature_acts.features.device)
    fired = groups[feature_acts.rows] * feature_acts.d_sae + feature_acts.features
    fired = torch.bincount(fired[feature_acts.values != 0], minlength=len(names) * feature_acts.d_sae)
    counts = fired.view(len(names), -1).double()
    sizes = torch.bincount(groups)[:, None].double()
    p = counts / sizes
    others = (counts.sum(0) - counts) / (sizes.sum() - sizes)
    first, second = p.topk(2, dim=0).values
    strongest = p.argmax(0) == torch.arange(len(p), device=p.device)[:, None]
    return Selectivity(names, p - others, p - torch.where(strongest, second, first))
