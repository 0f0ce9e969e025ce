"""Dictionaries of 256 features on planted data of 64 dimensions, 256 features with Zipf frequencies and 6 active per token: ICFL
(3 rounds of 2) and TopK with k = 6, with and without its aux loss, 600 steps of 512 tokens; measured on 16,384 held-out tokens.
"""

from __future__ import annotations

from typing import Any

from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.planted import superposition
from saelab.benchmarks.synthetic import HELD_OUT_ROWS, Kind
from saelab.benchmarks.synthetic import measure as measure_planted
from saelab.saes import ICFLConfig, TopKConfig
from saelab.training import TrainConfig, train

D_IN, N_FEATURES, L0, BATCH, STEPS = 64, 256, 6, 512, 600
MEASURES = ("dead_fraction", "fvu", "l0", "mmcs_rare")
PAPER = (
    "Donhauser et al. 2025: of 8,192 features 55 die with iterative codebook feature learning (341 on whitened inputs), where "
    "7,640 (8,026) die with TopK."
)


def measure(seed: int) -> dict[str, dict[str, Any]]:
    planted = superposition(seed, D_IN, N_FEATURES, L0, zipf=True)
    configs: dict[str, Any] = {
        "icfl": ICFLConfig(N_FEATURES, L0, per_round=2, normalize="scale"),
        "topk": TopKConfig(N_FEATURES, L0, normalize="scale"),
        "topk, no aux": TopKConfig(N_FEATURES, L0, auxk_alpha=0.0, normalize="scale"),
    }
    steps = TrainConfig(n_tokens=STEPS * BATCH, batch_size=BATCH, lr=3e-3, warmup_steps=100, seed=seed)
    saes = train(list(configs.values()), planted.stream(seed), steps, progress=False)
    x, kind = planted.held_out(HELD_OUT_ROWS, seed), Kind(superposition, (), N_FEATURES, L0)
    found = {label: measure_planted(sae, planted, x, kind) for label, sae in zip(configs, saes, strict=True)}
    return {label: {name: row[name] for name in MEASURES} for label, row in found.items()}


CLAIMS = [
    Claim(
        f"ICFL has fewer dead features than TopK {with_aux} its aux loss, on features of unequal frequency",
        "icfl",
        Side("icfl", "dead_fraction"),
        Side(other, "dead_fraction"),
        paper=PAPER,
    )
    for other, with_aux in (("topk", "with"), ("topk, no aux", "without"))
]
