"""Transcoders of 2,048 features and L0 32 from SmolLM2-135M's residual stream before an MLP (block 14) to the MLP's output, and a
TopK SAE of 2,048 features and L0 16 on the outputs of the heads of the same block, scored on held-out documents.
"""

from __future__ import annotations

from typing import Any

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.smollm2 import config_at, harvested, scored, trained

READ, PREDICTED, HEADS = "blocks.14.hook_resid_mid", "blocks.14.hook_mlp_out", "blocks.14.attn.hook_z"


def measure(seed: int) -> dict[str, dict[str, Any]]:
    kinds = ("transcoder", "skip_transcoder")
    configs = {name: config_at(name, 32, hook_name_out=PREDICTED) for name in kinds}
    rows = scored(trained(configs, harvested((READ, PREDICTED)), seed), ("fvu", "l0", "ce_loss_recovered"))
    heads = trained({"topk on heads": config_at("topk", 16)}, harvested((HEADS,)), seed)
    return rows | scored(heads, ("fvu", "l0", "ce_loss_recovered"))


_SKIP = "Paulo et al. 2025: a skip lowers a transcoder's error at equal L0, with features as interpretable."
CLAIMS = [
    Claim(
        "A skip transcoder predicts the MLP better than a transcoder at equal L0",
        "transcoders",
        Side("skip_transcoder", "fvu"),
        Side("transcoder", "fvu"),
        at_equal_l0=True,
        paper=_SKIP,
    ),
    Claim(
        "A skip transcoder in the MLP's place recovers more of the model's loss",
        "transcoders",
        Side("skip_transcoder", "ce_loss_recovered"),
        Side("transcoder", "ce_loss_recovered"),
        below=False,
        paper=_SKIP,
    ),
    Claim(
        "An SAE on the heads' outputs recovers over 80 % of the loss of ablating them, with an L0 of 16",
        "transcoders",
        Side("topk on heads", "ce_loss_recovered"),
        0.8,
        below=False,
        paper="Kissane et al. 2024 (attention output SAEs): over 80 % of the loss of zero ablation at an L0 under 20.",
    ),
]
