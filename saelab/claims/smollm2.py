"""What experiments on real activations share: SmolLM2-135M, its activations over the demo's texts, and SAEs trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from saelab.activation_cache.harvest import harvest
from saelab.activation_cache.reader import ActivationCache
from saelab.benchmarks.synthetic import at_l0
from saelab.claims.workspace import workspace
from saelab.evaluation import evaluate
from saelab.models import load_model
from saelab.models.caching import Remembered
from saelab.saes import SAE, VARIANTS
from saelab.training import TrainConfig, train

HOOK = "blocks.14.hook_resid_post"
D_SAE = 2048
TOKENS = 120_000
"""Of the text that is harvested, special tokens included."""
STEPS, BATCH = 480, 1024
"""About four passes over the harvest."""
HELD_OUT, HELD_OUT_CE = 20_000, 2048
"""Held-out tokens to score reconstructions on, and to measure the model's loss on."""


@cache
def language_model() -> Remembered:
    """SmolLM2-135M, which remembers the held-out activations."""
    return Remembered(load_model("smollm2"))


@cache
def harvested(hook_names: tuple[str, ...] = (HOOK,), n_tokens: int = TOKENS) -> ActivationCache:
    """Activations over the demo's texts; its held-out documents stay out."""
    folder = workspace() / f"harvest-{'-'.join(hook_names)}-{n_tokens}"
    return harvest(language_model(), "demo", list(hook_names), n_tokens, folder, progress=False)


def config_at(variant: str, l0: int, d_sae: int = D_SAE, **options: Any) -> Any:
    """The config of a first run of a variant (`saelab.presets.cpu`) with `l0` features per token."""
    return at_l0(variant, d_sae, l0, **(VARIANTS[variant].preset(STEPS * BATCH) | options))


def trained(configs: Mapping[str, Any], data: ActivationCache, seed: int) -> dict[str, SAE]:
    """An SAE of each config, by label, trained side by side on the same batches."""
    run = TrainConfig(n_tokens=STEPS * BATCH, batch_size=BATCH, seed=seed)
    saes: Any = train(list(configs.values()), data, run, progress=False)
    return dict(zip(configs, saes, strict=True))


@cache
def topk_sae(seed: int) -> SAE:
    """A TopK SAE at an L0 of 32, which several experiments look at."""
    (sae,) = trained({"topk": config_at("topk", 32)}, harvested(), seed).values()
    return sae


def scored(saes: Mapping[str, SAE], measures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measures of `saelab.evaluate` on held-out documents, by label; `bias` is the relative reconstruction bias."""
    found = {}
    for label, sae in saes.items():
        report = evaluate(sae, language_model(), n_tokens=HELD_OUT, n_tokens_ce=HELD_OUT_CE, progress=False)
        names = {name: "relative_reconstruction_bias" if name == "bias" else name for name in measures}
        found[label] = {name: getattr(report, field) for name, field in names.items()}
    return found
