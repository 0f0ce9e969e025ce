"""Probes on the last token of labelled sentences (the 16 concepts of WordNet in the package), on SmolLM2-135M's residual stream
(block 14) and on the features of a TopK SAE trained on it; validation chooses a probe, among the baselines and with SAE probes.
"""

from __future__ import annotations

from statistics import fmean

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.smollm2 import language_model, topk_sae
from saelab.claims.workspace import workspace
from saelab.probing import ProbeConfig, ProbeReport, probe_sets

BELIEVED = 0.005
"""Differences in mean AUC below this are luck of the draw (docs/probing.md)."""


def measure(seed: int) -> dict[str, dict[str, float]]:
    sae = topk_sae(seed)
    config = ProbeConfig(n_splits=3)
    report = probe_sets(sae, language_model(), ["concepts"], config, folder=workspace() / "probing", progress=False)
    gains = {regime: _gain(report, regime) for regime in report.regimes}
    hard = [gain for regime, gain in gains.items() if regime != "standard"]
    return {"standard regime": {"gain": gains["standard"]}, "hard regimes": {"gain": fmean(hard)}}


def _gain(report: ProbeReport, regime: str) -> float:
    """Mean over the sets of test AUC with SAE probes among the candidates, minus that of the baselines alone."""
    return fmean(arrow.after - arrow.before for arrow in report.arrows(regime))


CLAIMS = [
    Claim(
        f"SAE probes among the candidates gain under {BELIEVED} AUC in the {regime}",
        "probing",
        Side(regime, "gain"),
        BELIEVED,
        paper="Kantamneni et al. 2025: adding SAE probes to the baselines improves probing in no regime.",
    )
    for regime in ("standard regime", "hard regimes")
]
