"""Which features of a store are worth trying: neither rare nor dense, several words at their peaks, and a topic.

A feature whose peaks are all one word writes that word again and again; one whose peaks are spaces and signs writes nothing to
read. A topic is what a feature fires on several times in a text: that share of an on-topic text bounds what can be read back.
"""

from __future__ import annotations

from typing import Any

import torch

DENSITY = (1e-3, 1.5e-2)
N_STEMS = 5
"""Fewest distinct stems among the words at the peaks of a feature's strongest examples."""
WORDS = 0.8
"""Smallest share of these peaks that are words."""
SPREAD = 0.04
"""Smallest share of the other tokens of these examples on which the feature exceeds a quarter of its p99."""


def draw_candidates(store: Any, n: int, seed: int = 0) -> list[int]:
    """`n` features drawn with `seed`, or all there are if these are fewer, in the order drawn. Raises `ValueError` if there is
    none."""
    eligible = store.features("feature", False, {"density": DENSITY})
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[int] = []
    for i in order:
        if len(found) == n:
            break
        if _is_worth_trying(store, eligible[i]):
            found.append(eligible[i])
    if not found:
        raise ValueError(
            f"None of the {len(eligible)} features with a density of {DENSITY[0]:g} to {DENSITY[1]:g} has {N_STEMS} distinct "
            "words at its peaks and a topic: name features=[...], or collect features on more tokens."
        )
    return found


def _is_worth_trying(store: Any, index: int) -> bool:
    feature = store.feature(index)
    examples = feature.examples()
    if not examples or spread(examples, 0.25 * (feature.p99 or 0.0)) < SPREAD:
        return False
    stems = store.peak_stems(index)
    words = [stem for stem in stems if stem]
    return len(set(words)) >= N_STEMS and len(words) >= WORDS * len(stems)


def spread(examples: Any, bound: float) -> float:
    """Mean share of the tokens besides the peak whose activation exceeds `bound`, towards the sign of the peak."""
    shares = []
    for one in examples:
        sign = -1 if one.value < 0 else 1
        others = [sign * value > bound for i, value in enumerate(one.values) if i != one.peak]
        shares.append(sum(others) / max(len(others), 1))
    return sum(shares) / len(shares)
