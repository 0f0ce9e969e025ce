"""A small transformer (2 layers, width 64) is trained on walks of a finite-state machine, and SAEs with 256 features and L0 4 on
its residual stream behind the first layer: `gradient` with the gradients of the model's loss, and TopK on the same rows. Scored
on other walks with their reconstruction spliced in. `with gradients` also selects with the gradient at inference, which no other
SAE is given and which is computed from the token to be predicted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from saelab.activation_cache.harvest import harvest
from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.fsm_language import BOS, D_VOCAB, Machine
from saelab.evaluation.gradient_selection import gradient_selection
from saelab.models.language_model import LanguageModel
from saelab.models.tiny import build_tiny_llama
from saelab.saes import GradientConfig
from saelab.saes.codebook import finetune
from saelab.training import TrainConfig, train

HOOK = "blocks.0.hook_resid_post"
D_SAE, L0 = 256, 4
STEPS, BATCH = 400, 512
_BETA = {"topk": 0.0, "gradient": 1.0}
"""With beta 0 the variant is TopK, exactly."""


def measure(seed: int) -> dict[str, dict[str, Any]]:
    lm, documents = _model_and_walks(seed)
    run = TrainConfig(n_tokens=STEPS * BATCH, batch_size=BATCH, seed=seed)
    configs = [GradientConfig(D_SAE, L0, beta=beta) for beta in _BETA.values()]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"ctx_len": lm.max_ctx, "batch_size": 64, "prepend_bos": [BOS], "gradients": True}
        cache = harvest(lm, documents, HOOK, 10**7, Path(folder) / "cache", progress=False, **options)
        saes: Any = train(configs, cache, run, progress=False)
    found: dict[str, dict[str, Any]] = {}
    for label, sae in zip(_BETA, saes, strict=True):
        one = gradient_selection(sae, lm, documents, split="held_out")
        for name, side in ((label, ""), (f"{label}, with gradients", "_with_gradients")):
            values = {key: getattr(one, f"{key}{side}") for key in ("fvu", "l0", "dead_fraction")}
            found[name] = values | {"ce_increase": getattr(one, f"ce_loss_sae{side}") - one.ce_loss}
    return {name: values for name, values in found.items() if name != "topk, with gradients"}


def _model_and_walks(seed: int) -> tuple[LanguageModel, list[list[int]]]:
    """The trained model, and walks that it has not seen as documents of token ids: each fills a context between BOS and BOS."""
    machine = Machine.random(seed=seed)
    seen, unseen = (machine.write(machine.walks(n, 24, seed + i)) for i, n in ((1, 20_000), (2, 3_000)))
    texts = torch.cat([seen, torch.full_like(seen[:, :1], BOS)], 1)
    lm = build_tiny_llama(D_VOCAB, 64, 2, 4, texts.shape[1], seed)
    lm.model.config.eos_token_id = BOS
    finetune(lm, texts, n_steps=600, batch_size=32, lr=3e-3, seed=seed, progress=False)
    return lm, unseen[:, 1:].tolist()


_PAPER = "Olmo et al. 2025 (g-SAE): at equal L0 the model's loss rises less with the SAE spliced in, and fewer features are dead."
CLAIMS = [
    Claim(f"{text} than TopK's", "gradient", Side(label, name), Side("topk", name), at_equal_l0=True, paper=_PAPER)
    for label, inference in (("gradient", "without gradients"), ("gradient, with gradients", "with gradients"))
    for name, text in (
        ("ce_increase", f"Gradient SAE, {inference} at inference: the loss rises less"),
        ("dead_fraction", f"Gradient SAE, {inference} at inference: a smaller share of dead features"),
    )
]
