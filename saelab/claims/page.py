"""`docs/claims.md`: one table of the papers' claims with what was tested, the verdict and the figures of every seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from saelab.benchmarks.claims import Side, Verdict
from saelab.benchmarks.results import spread

HEAD = """# Claims of the papers, tested here

`saelab bench claims` made this page{seeds}. It keeps each experiment that is finished, and judges each claim: **held** if the
comparison comes out as claimed on every seed ("at equal L0": an L0 at most 5 % higher), else **not held**. Nothing was tuned
until a claim held. These are small experiments on a CPU: they tell whether an effect is there in principle, not how large it is
in a large model.

{held} of {run} claims held{missing}.

| the paper claims | tested here | experiment | verdict | figures: mean ± standard deviation (each seed) |
|---|---|---|---|---|
"""
NOT_TESTED = (
    (
        "Makhzani & Frey 2013: k-sparse autoencoders classify MNIST and NORB better than other autoencoders",
        "needs MNIST",
    ),
    ("Gao et al. 2024: about 7 % dead features among 16 million", "needs their size"),
    ("Zhu et al. 2026 (AbsTopK): 30 % of its features have two ends of opposite meaning", "people judged the meanings"),
    ("Paulo et al. 2025: transcoder features are more interpretable than those of SAEs", "a large model judged them"),
    (
        "Tamkin et al. 2023: models of up to 410 M parameters keep their performance with codebooks",
        "needs their training",
    ),
    ("Kissane et al. 2024: over 90 % of GPT-2's heads are polysemantic", "people judged the features"),
    ("Li et al. 2025 (FAST): more features score 4 to 5 of 5, and special tokens steer", "GPT-4o scored them"),
    (
        "Karvonen et al. 2025 (SAEBench): SCR and TPP",
        "left out on purpose: they fail at their standard settings (docs/probing.md)",
    ),
)
"""Claims that are out of reach here, and why."""
TAIL = """
## Not tested here

{not_tested}
## The experiments

`saelab bench claims --only NAME` runs one of them.

"""


def claims_page(verdicts: Sequence[Verdict], about: Iterable[tuple[str, str]]) -> str:
    """The page as Markdown; `about` has the name of each experiment and what it does."""
    run = [verdict for verdict in verdicts if verdict.pairs]
    missing = f"; {len(verdicts) - len(run)} were not run" if len(run) < len(verdicts) else ""
    seeds = sorted({pair.seed for verdict in run for pair in verdict.pairs})
    told = f", on seeds {', '.join(map(str, seeds))}" if seeds else ""
    head = HEAD.format(seeds=told, held=sum(verdict.held for verdict in run), run=len(run), missing=missing)
    lines = [f"| {' | '.join(map(_cell, _row(verdict)))} |\n" for verdict in verdicts]
    tail = TAIL.format(not_tested="".join(f"- {claim}: {why}.\n" for claim, why in NOT_TESTED))
    return head + "".join(lines) + tail + "".join(f"- **{name}**: {what}\n" for name, what in about)


def _row(verdict: Verdict) -> tuple[str, ...]:
    claim = verdict.claim
    return claim.paper, claim.text, f"`{claim.data}`", f"**{verdict.word}**", _figures(verdict)


def _figures(verdict: Verdict) -> str:
    """`fvu` of topk 0.05 ± 0.01 (0.04, 0.05, 0.06) < relu 0.33 ± 0.02 (...)."""
    claim, pairs = verdict.claim, verdict.pairs
    if not pairs:
        return ""
    left = f"`{claim.left.measure}` of {claim.left.sae} {_values([pair.left for pair in pairs])}"
    sign, times = "<" if claim.below else ">", f"{claim.times:g} × " if claim.times != 1 else ""
    if not isinstance(claim.right, Side):
        return f"{left}; claimed {sign} {claim.right:g}"
    measure = "" if claim.right.measure == claim.left.measure else f"`{claim.right.measure}` of "
    return f"{left}; claimed {sign} {times}{measure}{claim.right.sae} {_values([pair.right for pair in pairs])}"


def _values(values: Sequence[float | None]) -> str:
    shown = ", ".join("none" if value is None else f"{value:.3g}" for value in values)
    return f"{spread(values)} ({shown})"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
