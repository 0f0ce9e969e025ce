"""What became of the features between two SAEs: between two snapshots of a training run, or a small SAE and a large one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saelab.features.matching import COUNTERPART, Counterparts, Matching

INSIDE = 0.5
"""The share of a feature's firings that must lie within those of the feature it is said to come from or to go into."""


class Changes(NamedTuple):
    """Features of a (before) and of b (after); those that fired on no token of their store have no part in it.

    A counterpart is the feature of the other SAE with the most similar decoder row, if their cosine is at least the threshold.

    - Every feature of a that fired has `died` (it has no counterpart), was `split`, or neither: then it goes on.
    - Every feature of b that fired was `born` (it has no counterpart), is `merged`, or neither.
    - i of a is split into the features j of b whose counterpart is i and at least half of whose firings are also firings of i,
      if there are two or more.
    - j of b is merged from the features i of a whose counterpart is j and at least half of whose firings are also firings of j,
      if there are two or more.

    A feature may be split and one of its parts be merged from others. Firings are those on the tokens that both stores sampled;
    a feature that has none there takes no part in a split or merger.
    """

    born: np.ndarray
    """Features of b, the least similar to any of a first."""
    died: np.ndarray
    """Features of a, the least similar to any of b first."""
    split: dict[int, list[int]]
    """By feature of a, those of b."""
    merged: dict[int, list[int]]
    """By feature of b, those of a."""


def changes(matching: Matching, cosine: float = COUNTERPART) -> Changes:
    """Which features were born, died, were split and merged. Raises `ValueError` for a cosine outside 0 to 1."""
    if not 0 <= cosine <= 1:
        raise ValueError(
            f"cosine={cosine} must be between 0 and 1: the similarity from which two features are counterparts."
        )
    of_a, of_b = matching.of_a, matching.of_b
    return Changes(of_b.missing(cosine), of_a.missing(cosine), _several(of_b, cosine), _several(of_a, cosine))


def _several(of: Counterparts, cosine: float) -> dict[int, list[int]]:
    """The features of the other SAE that two or more of these have as their counterpart and fire within."""
    inside = of.found(cosine) & (np.nan_to_num(of.within, nan=0.0) >= INSIDE)
    groups: dict[int, list[int]] = {}
    for feature in np.flatnonzero(inside).tolist():
        groups.setdefault(int(of.best[feature]), []).append(feature)
    return {other: features for other, features in sorted(groups.items()) if len(features) > 1}
