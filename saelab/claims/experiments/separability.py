"""Separability of the six kinds of text in the package's corpus (48 passages each), by Jensen-Shannon distance of histograms over
tokens: features of a TopK SAE (2,048, L0 32) on SmolLM2-135M's residual stream (block 14) against the coordinates of that stream.
"""

from __future__ import annotations

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.concept_texts import passages
from saelab.claims.smollm2 import HOOK, language_model, topk_sae
from saelab.steering import concept_separability

N_TEXTS = 48
TOPS = {"all": None, "top 100": 100, "top 10": 10}
_PAPER = "Fereidouni et al. 2025: concepts are more separable in the features of SAEs than in neurons of the model."


def measure(seed: int) -> dict[str, dict[str, float]]:
    sae = topk_sae(seed)
    found = concept_separability(sae, language_model(), passages(N_TEXTS, seed=seed), hook_name=HOOK, seed=seed)
    rows = {}
    for label, units in (("SAE features", found.features), ("coordinates", found.coordinates)):
        rows[label] = {name: units.top(n) for name, n in TOPS.items()}
        rows[label] |= {f"{name}, above chance": units.top(n) - units.top_chance(n) for name, n in TOPS.items()}
    return rows


CLAIMS = [
    Claim(
        f"SAE features are more separable than coordinates ({measure})",
        "separability",
        Side("SAE features", measure),
        Side("coordinates", measure),
        below=False,
        paper=_PAPER,
    )
    for measure in (*TOPS, *(f"{name}, above chance" for name in TOPS))
]
