"""Rows held out of training for the calibration at its end, since fewer features fire on rows seen in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from saelab.training.data_source import DataSource, Rows

SHARE = 64
MOST = 16_384
MIN_ROWS = 256
"""Fewer held-out rows estimate L0 less accurately than training rows do."""
ENOUGH = 8_192
"""The number of features per row has a standard deviation of half its mean or more (17.7 at L0 32 on SmolLM2): this many rows
estimate the mean to within 0.6 %, a quarter of them to within 1.2 %."""
LARGEST_SHARE = 16


def n_kept_out(n_rows: int, rules: int) -> int:
    """Number of rows to hold out: 1/64, at most 16,384; of fewer than 524,288 rows 8,192 or 1/16, whichever is less.

    Zero for fewer than 16,384 rows, and under rules 1 (the first version); rules 2 always hold out 1/64.
    """
    n = min(n_rows // SHARE, MOST)
    if n < MIN_ROWS or rules < 2:
        return 0
    return n if rules == 2 else max(n, min(ENOUGH, n_rows // LARGEST_SHARE))


def calibration_rows(
    source: DataSource, hooks: Sequence[str], batches: Iterator[Rows], last: Rows, n_tokens: int
) -> tuple[Mapping[str, Tensor], bool]:
    """Rows of these hooks to calibrate on, and whether they were held out of training.

    If none were held out, they are the rows that follow the `last` batch: new ones from a stream, but rows already trained
    on from a small tensor or cache.
    """
    if source.kept_out is not None:
        return source.kept_out(hooks), True
    wanted = min(MOST, source.n_rows or max(n_tokens // SHARE, MIN_ROWS))
    chunks: list[Rows] = []
    while sum(len(chunk[hooks[0]]) for chunk in chunks) < wanted and (rows := next(batches, None)) is not None:
        chunks.append({hook: rows[hook] for hook in hooks})  # without the copies on a GPU
    chunks = chunks or [last]
    return {hook: torch.cat([chunk[hook] for chunk in chunks])[:wanted] for hook in hooks}, False
