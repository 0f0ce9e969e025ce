"""A picture of which features interact against which fire together (`evaluation/interactions.py`)."""

from __future__ import annotations

import torch

from saelab.benchmarks.svg import scatter
from saelab.evaluation.interactions import PairTable


def interactions_picture(table: PairTable, n_pairs: int = 800) -> str:
    """The norm of each interaction against the share of tokens on which both fire, as SVG: `n_pairs` of the pairs that fire
    together, drawn at random. Raises `ValueError` where none does."""
    drawn = torch.randperm(len(table.pairs), generator=torch.Generator().manual_seed(0))
    drawn = drawn[(table.together[drawn] > 0) & (table.norms[drawn] > 0)][:n_pairs]
    points = list(zip(table.together[drawn].tolist(), table.norms[drawn].tolist(), strict=True))
    return scatter(points, "share of tokens on which both fire", "norm of their interaction")
