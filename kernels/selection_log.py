"""Counts of what the selections did: how many candidates they looked at, how many rows were certified or done anew."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class SelectionLog:
    """Totals since `reset`. Every row is either certified or recomputed."""

    rows: int = 0
    candidates: int = 0
    """Pairs whose exact value was computed."""
    certified: int = 0
    """Rows whose selection the bound proves complete."""
    recomputed: int = 0
    """Rows selected again in working precision, where the bound is rigorous from the start."""

    def add(self, rows: int, candidates: int, certified: int, recomputed: int) -> None:
        self.rows += rows
        self.candidates += candidates
        self.certified += certified
        self.recomputed += recomputed

    def reset(self) -> None:
        self.rows = self.candidates = self.certified = self.recomputed = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


LOG = SelectionLog()
