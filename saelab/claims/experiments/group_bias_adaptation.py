"""SAEs of 128 features on 64 planted features of Zipf frequencies (32 dimensions, 3 active), 1,500 steps of 512 tokens: GBA with
the paper's range of target frequencies, with half its L0, and with targets far too high; TopK with k of 3, 12 and 24.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.planted import superposition
from saelab.benchmarks.synthetic import BATCH, HELD_OUT_ROWS, Kind
from saelab.benchmarks.synthetic import measure as measure_sae
from saelab.saes import SAE, GBAConfig, TopKConfig
from saelab.training import TrainConfig, train

_KIND = Kind(partial(superposition, zipf=True), (), 128)


def measure(seed: int) -> dict[str, dict[str, Any]]:
    gba = partial(GBAConfig, _KIND.d_sae, adapt_every=5, normalize="scale")  # 300 adaptations
    configs: dict[str, Any] = {f"topk, k={k}": TopKConfig(_KIND.d_sae, k, normalize="scale") for k in (3, 12, 24)}
    configs |= {"gba": gba(), "gba, half": gba(6.4), "gba, too high": gba(38.0, n_groups=1)}
    planted = _KIND.planted(seed)
    x = planted.held_out(HELD_OUT_ROWS, seed)
    run = TrainConfig(_KIND.n_steps * BATCH, BATCH, lr=3e-3, warmup_steps=100, seed=seed)
    saes: list[SAE] = train(list(configs.values()), planted.stream(seed), run, progress=False)
    return {label: measure_sae(sae, planted, x, _KIND) for label, sae in zip(configs, saes, strict=True)}


_PAPER = (
    "Chen et al. 2025 (GBA), on imbalanced synthetic data: 100 % of the features found, TopK 98 % with the best K and 24 % with "
    "others; 4 % with a wrong range of frequencies."
)


def _finds_more(text: str, left: str, right: str) -> Claim:
    sides = Side(left, "recovered"), Side(right, "recovered")
    return Claim(text, "group_bias_adaptation", *sides, below=False, paper=_PAPER)


CLAIMS = [
    _finds_more("GBA finds more planted features than TopK with the right k", "gba", "topk, k=3"),
    _finds_more("GBA finds more planted features than TopK with four times the right k", "gba", "topk, k=12"),
    _finds_more("GBA still does at half its L0", "gba, half", "topk, k=12"),
    _finds_more(
        "GBA finds more with the paper's range of target frequencies than with one that is too high",
        "gba",
        "gba, too high",
    ),
]
