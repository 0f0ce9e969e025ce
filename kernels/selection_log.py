"""Counts what the selections did: how many candidates were evaluated, and how many rows were certified or selected again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class SelectionLog:
    """Totals of one `log_selections` block. Every row (for `encode_feature_topk`: feature) is either certified or recomputed."""

    rows: int = 0
    candidates: int = 0
    """Pairs whose exact value was computed."""
    certified: int = 0
    """Rows whose selection the error bound proves complete."""
    recomputed: int = 0
    """Rows that fell back to a second screen, with their k-th value as the floor."""


_open: list[SelectionLog] = []


@contextmanager
def log_selections() -> Iterator[SelectionLog]:
    """Counts the selections of this process inside the block; nothing is counted outside."""
    log = SelectionLog()
    _open.append(log)
    try:
        yield log
    finally:
        _open[:] = [other for other in _open if other is not log]  # equal counts are not the same block


def note_selection(rows: int, candidates: int, certified: int) -> None:
    """Add one selection to every open log; rows that are not certified were recomputed."""
    for log in _open:
        log.rows += rows
        log.candidates += candidates
        log.certified += certified
        log.recomputed += rows - certified
