"""Splitting and absorption of first letters: BatchTopK against Matryoshka (2,048 features, L0 32) on SmolLM2-135M's residual
stream (block 14), at most 90 words of each letter; means over the letters that a probe on activations knows.
"""

from __future__ import annotations

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.smollm2 import HOOK, config_at, harvested, language_model, trained
from saelab.claims.workspace import workspace
from saelab.probing import LetterConfig, first_letters

_PAPER = "Bussmann et al. 2025 (Matryoshka): less feature absorption of first letters than BatchTopK."


def measure(seed: int) -> dict[str, dict[str, float | None]]:
    saes = trained({name: config_at(name, 32) for name in ("batch_topk", "matryoshka")}, harvested(), seed)
    rows = {}
    for name, sae in saes.items():
        report = first_letters(
            sae,
            language_model(),
            LetterConfig(90),
            folder=workspace() / "letters",
            hook_name=HOOK,
            progress=False,
        ).data()
        means = {kind: found and found["mean"] for kind, found in report["absorption"].items()}
        rows[name] = means | {key: report[key] for key in ("n_measured", "n_main", "f1_of_one_feature")}
    return rows


CLAIMS = [
    Claim(
        f"Matryoshka absorbs first letters less ({name})",
        "letters",
        Side("matryoshka", measure),
        Side("batch_topk", measure),
        paper=_PAPER,
    )
    for measure, name in (("fraction", "absorption fraction"), ("full", "full absorption"))
]
