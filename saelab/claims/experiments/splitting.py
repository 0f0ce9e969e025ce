"""How many features a parent of the planted hierarchy takes: as many as each raise the F1 of a k-sparse probe by 0.03. BatchTopK
SAEs of 40 features (as many as planted) and of 160, and a Matryoshka SAE of 160, L0 2.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean

import numpy as np
import torch

from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.planted import hierarchy
from saelab.benchmarks.synthetic import at_l0
from saelab.probing.sparse_probes import sparse_weights, split_of
from saelab.training import TrainConfig, train

N_TOKENS, N_HELD_OUT = 3000 * 512, 8192
SAES = {
    "batch_topk, 40": ("batch_topk", 40),
    "batch_topk, 160": ("batch_topk", 160),
    "matryoshka, 160": ("matryoshka", 160),
}


def measure(seed: int) -> dict[str, dict[str, float]]:
    planted = hierarchy(seed)
    config = TrainConfig(N_TOKENS, batch_size=512, lr=3e-3, warmup_steps=100, seed=seed)
    x = planted.held_out(N_HELD_OUT, seed)
    parents = planted.held_out_feature_acts(N_HELD_OUT, seed)[:, planted.groups["parents"]] != 0
    test = np.arange(N_HELD_OUT) % 2 == 1
    rows = {}
    for label, (variant, d_sae) in SAES.items():
        sae = train(at_l0(variant, d_sae, 2, normalize="scale"), planted.stream(seed), config, progress=False)
        with torch.no_grad():
            feature_acts = sae.encode(x)
        weights = sparse_weights(feature_acts.select_rows(torch.from_numpy(np.flatnonzero(~test))), parents[~test])
        split = partial(split_of, feature_acts, test=test, max_k=10)
        found = [split(weight, y=y.numpy()) for weight, y in zip(weights, parents.T, strict=True)]
        first = fmean(one.f1[0] if one.f1 else 0.0 for one in found)
        rows[label] = {"features_per_parent": fmean(len(one.main) for one in found), "f1_of_one_feature": first}
    return rows


CLAIMS = [
    Claim(
        "A parent takes more features of a BatchTopK SAE four times as wide",
        "splitting",
        Side("batch_topk, 160", "features_per_parent"),
        Side("batch_topk, 40", "features_per_parent"),
        below=False,
        paper="Chanin et al. 2024 (A is for Absorption): wider SAEs split features more.",
    ),
    Claim(
        "A parent takes fewer features of a Matryoshka SAE than of a BatchTopK SAE as wide",
        "splitting",
        Side("matryoshka, 160", "features_per_parent"),
        Side("batch_topk, 160", "features_per_parent"),
        paper="Bussmann et al. 2025 (Matryoshka): general features are split less in nested dictionaries.",
    ),
]
