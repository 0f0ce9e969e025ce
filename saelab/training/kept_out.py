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
ENOUGH = 8_192
"""The number of features on a row scatters by half of its mean and more (17.7 at L0 32 on SmolLM2): so many rows give the mean
to within 0.6 %, a quarter of them to within 1.2 %."""
LARGEST_SHARE = 16


def n_kept_out(n_rows: int, rules: int) -> int:
    """A sixty-fourth of the rows, at most 16,384; of fewer than 524,288 rows 8,192, or a sixteenth where that is less.

    None of fewer than 16,384 rows, and none in a run of the first version; rules 2 keep to the sixty-fourth.
    """
    n = min(n_rows // SHARE, MOST)
    if n < LEAST or rules < 2:
        return 0
    return n if rules == 2 else max(n, min(ENOUGH, n_rows // LARGEST_SHARE))


def calibration_rows(
    source: DataSource, hooks: Sequence[str], batches: Iterator[Rows], last: Rows, n_tokens: int
) -> tuple[Mapping[str, Tensor], bool]:
    """Rows of these sites to calibrate on, and whether they were kept out of training.

    Where none were kept out they are the next rows of the data after the `last` batch: those of a stream are new, those of
    a small tensor or cache were trained on.
    """
    if source.kept_out is not None:
        return source.kept_out(hooks), True
    wanted = min(MOST, source.n_rows or max(n_tokens // SHARE, LEAST))
    parts: list[Rows] = []
    while sum(len(part[hooks[0]]) for part in parts) < wanted and (rows := next(batches, None)) is not None:
        parts.append(rows)
    parts = parts or [last]
    return {hook: torch.cat([part[hook] for part in parts])[:wanted] for hook in hooks}, False
