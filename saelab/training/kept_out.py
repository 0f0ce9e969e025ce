"""Rows that are kept out of training, for the calibration at its end: on rows that were trained on fewer features fire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from saelab.training.data_source import DataSource, Rows

SHARE = 64
MOST = 16_384
LEAST = 256
"""Fewer tell the number of features on a row less well than rows that were trained on do."""


def n_kept_out(n_rows: int, rules: int) -> int:
    """A sixty-fourth of the rows, at most 16,384; none of fewer than 16,384 rows, and none in a run of the first version."""
    n = min(n_rows // SHARE, MOST)
    return n if n >= LEAST and rules > 1 else 0


def calibration_rows(
    source: DataSource, sites: Sequence[str], batches: Iterator[Rows], last: Rows, n_tokens: int
) -> tuple[Mapping[str, Tensor], bool]:
    """Rows of these sites to calibrate on, and whether they were kept out of training.

    Where none were kept out they are the next rows of the data after the `last` batch: those of a stream are new, those of
    a small tensor or cache were trained on.
    """
    if source.kept_out is not None:
        return source.kept_out(sites), True
    wanted = min(MOST, source.n_rows or max(n_tokens // SHARE, LEAST))
    parts: list[Rows] = []
    while sum(len(part[sites[0]]) for part in parts) < wanted and (rows := next(batches, None)) is not None:
        parts.append(rows)
    parts = parts or [last]
    return {site: torch.cat([part[site] for part in parts])[:wanted] for site in sites}, False
