"""Counters of the selections: how many candidates were evaluated, how many rows were certified or selected again."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class SelectionLog:
    """Totals since `reset`. Every row (for `encode_feature_topk`: feature) is either certified or recomputed."""

    rows: int = 0
    candidates: int = 0
    """Pairs whose exact value was computed."""
    certified: int = 0
    """Rows whose selection the error bound proves complete."""
    recomputed: int = 0
    """Rows that fell back to a second screen, with their k-th value as the floor."""

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
