"""Which features of a store are worth trying: neither rare nor dense, and with several different words at their peaks.

A feature whose peaks are all one word writes that word again and again; one whose peaks are spaces and signs writes no topic.
"""

from __future__ import annotations

from typing import Any

import torch

DENSITY = (1e-3, 1.5e-2)
N_STEMS = 5
"""Fewest distinct stems among the words at the peaks of a feature's strongest examples."""
WORDS = 0.8
"""Smallest share of these peaks that are words."""


def draw_candidates(store: Any, n: int, seed: int = 0) -> list[int]:
    """`n` features drawn with `seed`, or all there are if these are fewer, in the order drawn. Raises `ValueError` if there is
    none."""
    eligible = store.features("feature", False, {"density": DENSITY})
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[int] = []
    for i in order:
        if len(found) == n:
            break
        stems = store.peak_stems(eligible[i])
        words = [stem for stem in stems if stem]
        if len(set(words)) >= N_STEMS and len(words) >= WORDS * len(stems):
            found.append(eligible[i])
    if not found:
        raise ValueError(
            f"None of the {len(eligible)} features with a density of {DENSITY[0]:g} to {DENSITY[1]:g} has {N_STEMS} distinct "
            "words at its peaks: name features=[...], or collect features on more tokens."
        )
    return found
