"""ITDA dictionaries of at most 512 activations (k of 10, tau of 0.3), each from one pass over 6,144 tokens of SmolLM2-135M's
residual stream, after blocks 4, 9, 14, 19 and 24; beside that of block 14, TopK and ReLU with L1 of 512 features and L0 10.
"""

from __future__ import annotations

from typing import Any

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.smollm2 import HOOK, config_at, harvested, scored, trained
from saelab.evaluation.similarity import jaccard_matrix
from saelab.saes import ITDAConfig
from saelab.training import TrainConfig, train

D_SAE, L0 = 512, 10
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in (4, 9, 14, 19, 24))
_ONE_PASS = 6 * 1024


def measure(seed: int) -> dict[str, dict[str, Any]]:
    data, run = harvested(HOOKS, 10_000), TrainConfig(_ONE_PASS, 1024, seed=seed)
    layers = [train(ITDAConfig(D_SAE, L0, tau=0.3), data, run, hook_name=name, progress=False) for name in HOOKS]
    similar = jaccard_matrix(layers, layers)
    others = similar.clone().fill_diagonal_(0)
    apart = [abs(i - j) for i in range(len(HOOKS)) for j in range(len(HOOKS))]
    pairs = list(zip(apart, similar.flatten().tolist(), strict=True))
    next_to, far = ([value for distance, value in pairs if distance in these] for these in ((1,), (3, 4)))
    nearest = [abs(int(j) - i) == 1 for i, j in enumerate(others.argmax(1))]
    alike = {
        "neighbours": sum(next_to) / len(next_to),
        "far": sum(far) / len(far),
        "nearest": sum(nearest) / len(nearest),
    }
    beside = trained({name: config_at(name, L0, D_SAE) for name in ("topk", "relu")}, harvested((HOOK,)), seed)
    return {"layers": alike} | scored({"itda": layers[HOOKS.index(HOOK)], **beside}, ("fvu", "l0", "ce_loss_recovered"))


_SIMILAR = "Leask et al. 2025 (ITDA): the share of common atoms finds the layer of the same depth in 88 % of the cases."
_WORSE = "Leask et al. 2025 (ITDA): reconstructs better than ReLU SAEs and worse than TopK."
_NAME = "inference_time_decomposition"
CLAIMS = [
    Claim(
        "ITDA reconstructs worse than TopK", _NAME, Side("itda", "fvu"), Side("topk", "fvu"), below=False, paper=_WORSE
    ),
    Claim(
        "ITDA reconstructs better than ReLU with L1 at equal L0",
        _NAME,
        Side("itda", "fvu"),
        Side("relu", "fvu"),
        at_equal_l0=True,
        paper=_WORSE,
    ),
    Claim(
        "Neighbouring layers share more atoms than layers 15 or more blocks apart",
        _NAME,
        Side("layers", "neighbours"),
        Side("layers", "far"),
        below=False,
        paper=_SIMILAR,
    ),
    Claim(
        "Of the other layers the one with most common atoms is a neighbour, for more than four of five",
        _NAME,
        Side("layers", "nearest"),
        0.8,
        below=False,
        paper=_SIMILAR,
    ),
]
