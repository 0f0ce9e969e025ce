"""The papers' claims about their variants, each as a comparison of two numbers that a benchmark measures.

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
    data: str
    left: Side
    right: Side | float
    below: bool = True
    times: float = 1.0
    at_equal_l0: bool = False
    """Also require that the L0 of `left` is at most 5 % above that of `right`."""


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

    def __str__(self) -> str:
        claim, sign = self.claim, "<" if self.claim.below else ">"
        numbers = ", ".join(
            f"seed {pair.seed}: {_number(pair.left)} {sign if pair.held else 'vs'} {_number(pair.right)}"
            for pair in self.pairs
        )
        word = "held" if self.held else "not held" if self.pairs else "not run"
        times = f"{claim.times:g} x " if claim.times != 1 else ""
        sides = f"{_side(claim.left)} {sign} {times}{_side(claim.right)}"
        return f"{word:<8}  {claim.text} [{claim.data}: {sides}] {numbers}".rstrip()


def _side(side: Side | float) -> str:
    return f"{side.measure} of {side.sae}" if isinstance(side, Side) else f"{side:g}"


def check(claim: Claim, rows: Iterable[Row]) -> Verdict:
    """Check a claim on the rows of a benchmark; a seed without rows of both sides has no pair."""
    found = {(row["sae"], row["seed"]): row for row in rows if row["data"] == claim.data}
    seeds = sorted({seed for _, seed in found})
    against = claim.right.sae if isinstance(claim.right, Side) else claim.left.sae
    sides = [(seed, found.get((claim.left.sae, seed)), found.get((against, seed))) for seed in seeds]
    return Verdict(claim, tuple(_pair(claim, seed, left, right) for seed, left, right in sides if left and right))


def check_all(rows: Sequence[Row]) -> list[Verdict]:
    """Check all of `CLAIMS`."""
    return [check(claim, rows) for claim in CLAIMS]


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


def _choice(sae: str, name: str) -> list[Claim]:
    """Claims about Mutual Choice and Feature Choice relative to TopK."""

    def claim(text: str, data: str, measure: str, at_equal_l0: bool) -> Claim:
        return Claim(f"{name} {text}", data, Side(sae, measure), Side("topk", measure), at_equal_l0=at_equal_l0)

    return [
        claim("reconstructs tokens of unequal complexity better than TopK at equal L0", "mixed", "fvu", True),
        claim("reconstructs Zipf features better than TopK at equal L0", "zipf", "fvu", True),
        claim("has fewer dead features than TopK", "zipf", "dead_fraction", False),
    ]


def _aux(sae: str, with_zipf: str, without: str) -> list[Claim]:
    """Claims about aux_zipf relative to no auxiliary loss."""
    sides = {name: (Side(with_zipf, name), Side(without, name)) for name in ("under_used", "mmcs_rare")}
    return [
        Claim(f"aux_zipf leaves fewer features of {sae} under-used", "zipf", *sides["under_used"]),
        Claim(f"aux_zipf finds rare features of {sae} better", "zipf", *sides["mmcs_rare"], below=False),
    ]


_L1, _BATCH = "crosscoder, L1", "crosscoder, BatchTopK"
CLAIMS = [
    *_choice("mutual_choice", "Mutual Choice"),
    *_choice("feature_choice", "Feature Choice"),
    *_aux("TopK", "topk, aux_zipf", "topk, no aux"),
    *_aux("Mutual Choice", "mutual_choice", "mutual_choice, no aux"),
    Claim(
        "Hiding coordinates finds more features of noisy data with too large a dictionary and k",
        "noisy",
        Side("masked_topk", "recovered"),
        Side("topk", "recovered"),
        below=False,
    ),
    Claim(
        "AbsTopK finds more of the signed axes than TopK",
        "signed",
        Side("abs_topk", "recovered"),
        Side("topk", "recovered"),
        below=False,
    ),
    Claim("AbsTopK needs fewer features per axis", "signed", Side("abs_topk", "copies"), Side("topk", "copies")),
    Claim(
        "AbsTopK reconstructs signed features better",
        "signed",
        Side("abs_topk", "fvu"),
        Side("topk", "fvu"),
        at_equal_l0=True,
    ),
    Claim(
        "Matching pursuit reconstructs a hierarchy better than TopK at equal L0",
        "hierarchy",
        Side("matching_pursuit", "fvu"),
        Side("topk", "fvu"),
        at_equal_l0=True,
    ),
    Claim(
        "Matching pursuit finds the children better than TopK",
        "hierarchy",
        Side("matching_pursuit", "mmcs_children"),
        Side("topk", "mmcs_children"),
        below=False,
    ),
    Claim(
        "A BatchTopK crosscoder invents fewer exclusive features than an L1 one",
        "diffing",
        Side(_BATCH, "false_exclusives"),
        Side(_L1, "false_exclusives"),
    ),
    Claim(
        "Latent Scaling flags the exclusives that the L1 crosscoder invents, not the true ones",
        "diffing",
        Side(_L1, "flagged_false"),
        Side(_L1, "flagged_true"),
        below=False,
    ),
    Claim("States get their own codes", "fsm", Side("codebook", "purity"), 0.9, below=False),
    Claim(
        "A model with codebooks follows the machine's rules",
        "fsm",
        Side("codebook", "accuracy"),
        Side("codebook", "accuracy_bare"),
        below=False,
        times=0.95,
    ),
    Claim(
        "Forcing a state's codes moves the model to that state",
        "fsm",
        Side("codebook", "js_forced"),
        Side("codebook", "js_before"),
        times=0.5,
    ),
]
