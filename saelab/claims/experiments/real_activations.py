"""SAEs of 2,048 features on SmolLM2-135M's residual stream (block 14), 480 steps of 1,024 tokens at a target L0 of 32, scored on
held-out documents; TopK again at the L0 that top-AFA comes to.
"""

from __future__ import annotations

from typing import Any

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.smollm2 import config_at, harvested, scored, trained
from saelab.saes import TopAFAConfig, TopKConfig

L0 = 32
AT_L0 = ("topk", "batch_topk", "abs_topk", "mutual_choice", "feature_choice", "jumprelu", "gated", "relu")
AS_DENSE = "topk, as dense"
MEASURES = ("fvu", "l0", "dead_fraction", "bias", "ce_loss_recovered")


def measure(seed: int) -> dict[str, dict[str, Any]]:
    data = harvested()
    configs = {name: config_at(name, L0) for name in AT_L0}
    afa = TopAFAConfig(configs["topk"].d_sae, encoder_decay=1.0)
    rows = scored(trained({**configs, "top_afa": afa}, data, seed), MEASURES)
    dense = TopKConfig(afa.d_sae, round(rows["top_afa"]["l0"]), encoder_decay=1.0)
    return rows | scored(trained({AS_DENSE: dense}, data, seed), MEASURES)


def _better(text: str, left: str, right: str, paper: str, times: float = 1.0) -> Claim:
    return Claim(text, "real_activations", Side(left, "fvu"), Side(right, "fvu"), True, times, True, paper)


CLAIMS = [
    _better(
        "TopK reconstructs better than ReLU with L1 at equal L0",
        "topk",
        "relu",
        "Gao et al. 2024: at equal L0, TopK has a lower error than ReLU with L1.",
    ),
    _better(
        "BatchTopK reconstructs better than TopK at equal L0",
        "batch_topk",
        "topk",
        "Bussmann et al. 2024 (BatchTopK): lower error than TopK at equal mean L0.",
    ),
    _better(
        "AbsTopK reconstructs better than TopK at equal L0",
        "abs_topk",
        "topk",
        "Zhu et al. 2026 (AbsTopK): lower error than TopK at equal L0.",
    ),
    _better(
        "JumpReLU reconstructs better than TopK at equal L0",
        "jumprelu",
        "topk",
        "Rajamanoharan et al. 2024 (JumpReLU): at a given L0 at least as faithful as TopK.",
    ),
    _better(
        "JumpReLU reconstructs better than Gated at equal L0",
        "jumprelu",
        "gated",
        "Rajamanoharan et al. 2024 (JumpReLU): at a given L0 at least as faithful as Gated.",
    ),
    _better(
        "Gated reconstructs better than ReLU with L1 at equal L0",
        "gated",
        "relu",
        "Rajamanoharan et al. 2024 (Gated): lower error than ReLU with L1 at equal L0.",
    ),
    Claim(
        "ReLU with L1 shrinks what it reconstructs more than Gated",
        "real_activations",
        Side("relu", "bias"),
        Side("gated", "bias"),
        paper="Rajamanoharan et al. 2024 (Gated): L1 shrinks reconstructions (relative bias below 1), the gate does not.",
    ),
    _better(
        "Mutual Choice reconstructs better than TopK at equal L0",
        "mutual_choice",
        "topk",
        "Ayonrinde 2024: Mutual Choice has a lower error than TopK at equal L0.",
    ),
    _better(
        "Feature Choice reconstructs better than TopK at equal L0",
        "feature_choice",
        "topk",
        "Ayonrinde 2024: Feature Choice has a lower error than TopK at equal L0.",
    ),
    Claim(
        "Under 1 % of Feature Choice's features are dead",
        "real_activations",
        Side("feature_choice", "dead_fraction"),
        0.01,
        paper="Ayonrinde 2024: Feature Choice has nearly no dead features.",
    ),
    _better(
        "top-AFA reconstructs at most 5 % worse than TopK at the L0 that it comes to",
        "top_afa",
        AS_DENSE,
        "Lee et al. 2025 (top-AFA): error comparable to TopK of the best k, without a k to choose.",
        times=1.05,
    ),
]
