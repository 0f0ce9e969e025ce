"""A paper's claim as a comparison of two numbers that a benchmark measures, and its verdict.

A claim counts as held if the comparison comes out as claimed on every seed. Nothing is tuned to achieve that: a claim that
does not hold is printed as such, with the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from saelab.benchmarks.results import Row

SAME_L0 = 1.05
"""L0 counts as equal up to this factor."""


class Side(NamedTuple):
    """One side of a comparison: a measure of an SAE."""

    sae: str
    measure: str


@dataclass(frozen=True)
class Claim:
    """On `data`, `left` is below (or, with `below=False`, above) `times * right`; `right` may be a number."""

    text: str
    """What is tested here."""
    data: str
    """The experiment: a kind of planted data, or a module of `experiments`."""
    left: Side
    right: Side | float
    below: bool = True
    times: float = 1.0
    at_equal_l0: bool = False
    """Also require that the L0 of `left` is at most 5 % above that of `right`."""
    paper: str = ""
    """What the paper claims, and which paper that is."""


class Pair(NamedTuple):
    """Both numbers of a claim on one seed, and whether the claim holds for them."""

    seed: int
    left: float | None
    right: float | None
    held: bool


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim."""

    claim: Claim
    pairs: tuple[Pair, ...]

    @property
    def held(self) -> bool:
        return bool(self.pairs) and all(pair.held for pair in self.pairs)

    @property
    def word(self) -> str:
        """ "held", "not held" or "not run"."""
        return "held" if self.held else "not held" if self.pairs else "not run"

    def __str__(self) -> str:
        claim, sign = self.claim, "<" if self.claim.below else ">"
        numbers = ", ".join(
            f"seed {pair.seed}: {_number(pair.left)} {sign if pair.held else 'vs'} {_number(pair.right)}"
            for pair in self.pairs
        )
        times = f"{claim.times:g} x " if claim.times != 1 else ""
        sides = f"{_side(claim.left)} {sign} {times}{_side(claim.right)}"
        return f"{self.word:<8}  {claim.text} [{claim.data}: {sides}] {numbers}".rstrip()


def _side(side: Side | float) -> str:
    return f"{side.measure} of {side.sae}" if isinstance(side, Side) else f"{side:g}"


def check(claim: Claim, rows: Iterable[Row]) -> Verdict:
    """Check a claim on the rows of a benchmark; a seed without rows of both sides has no pair."""
    found = {(row["sae"], row["seed"]): row for row in rows if row["data"] == claim.data}
    seeds = sorted({seed for _, seed in found})
    against = claim.right.sae if isinstance(claim.right, Side) else claim.left.sae
    sides = [(seed, found.get((claim.left.sae, seed)), found.get((against, seed))) for seed in seeds]
    return Verdict(claim, tuple(_pair(claim, seed, left, right) for seed, left, right in sides if left and right))


def check_all(claims: Iterable[Claim], rows: Sequence[Row]) -> list[Verdict]:
    """Check each of `claims`."""
    return [check(claim, rows) for claim in claims]


def _pair(claim: Claim, seed: int, left_row: Row, right_row: Row) -> Pair:
    left = left_row.get(claim.left.measure)
    right = right_row.get(claim.right.measure) if isinstance(claim.right, Side) else claim.right
    if left is None or right is None:  # not measurable, for example the flagged share of no false exclusives
        return Pair(seed, left, right, False)
    held = left < claim.times * right if claim.below else left > claim.times * right
    if claim.at_equal_l0 and left_row["l0"] > SAME_L0 * right_row["l0"]:
        held = False
    return Pair(seed, left, right, held)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
