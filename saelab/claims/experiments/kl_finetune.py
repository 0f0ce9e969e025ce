"""A two-layer transformer trained on the language of a finite-state machine of 50 states, and a TopK SAE of 256 features, k 4, of
its first layer's residual stream. Copies of the SAE are trained 150 steps further on the same contexts: by the KL alone, by
KL + FVU, and by the FVU alone; scored on held-out texts.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from saelab.activation_cache.harvest import harvest
from saelab.benchmarks.claims import Claim, Side
from saelab.benchmarks.fsm_language import BOS, D_VOCAB, Machine
from saelab.evaluation import evaluate
from saelab.models.language_model import LanguageModel
from saelab.models.tiny import build_tiny_llama
from saelab.saes import SAE, TopKConfig
from saelab.saes.codebook import finetune as train_model
from saelab.tokens import Texts, load_texts
from saelab.training import TrainConfig, finetune, train

HOOK, CTX = "blocks.0.hook_resid_post", 128
WEIGHTS = {
    "finetuned by KL": {"fvu_weight": 0.0},
    "finetuned by KL + FVU": {},
    "finetuned by FVU": {"kl_weight": 0.0},
}


def measure(seed: int) -> dict[str, dict[str, Any]]:
    machine = Machine.random(seed=seed)
    ids = machine.write(machine.walks(8_000, 24, seed + 1))
    lm = build_tiny_llama(D_VOCAB, 64, 2, 4, CTX, seed)
    lm.model.config.eos_token_id = BOS  # it stands between the texts of a context
    train_model(lm, ids, n_steps=400, batch_size=32, lr=3e-3, seed=seed, progress=False)
    texts = load_texts(ids[:, 1:].tolist())
    with TemporaryDirectory() as folder:
        cache = harvest(lm, texts, HOOK, 150_000, Path(folder) / "cache", ctx_len=CTX, progress=False)
        sae = train(TopKConfig(256, 4), cache, TrainConfig(200_000, batch_size=512, seed=seed), progress=False)
    further = TrainConfig(CTX * 4 * 150, batch_size=CTX * 4, warmup_steps=10, seed=seed)
    tuned = {
        label: finetune(sae, lm, further, texts=texts, progress=False, **weights) for label, weights in WEIGHTS.items()
    }
    return {label: _scores(each, lm, texts) for label, each in {"before": sae, **tuned}.items()}


def _scores(sae: SAE, lm: LanguageModel, texts: Texts) -> dict[str, Any]:
    report = evaluate(sae, lm, texts, split="held_out", n_tokens_ce=16_000, progress=False)
    assert report.ce_loss_sae is not None and report.ce_loss is not None
    gap = report.ce_loss_sae - report.ce_loss
    return {"fvu": report.fvu, "l0": report.l0, "kl": report.kl, "ce_gap": gap}


_PAPER = (
    "Karvonen 2025: a short KL + MSE finetuning lowers the cross-entropy gap of an SAE trained by MSE by 20 to 50 %."
)
CLAIMS = [
    Claim(
        "A short finetuning by KL + FVU lowers the KL at equal L0 more than as many steps by the FVU",
        "kl_finetune",
        Side("finetuned by KL + FVU", "kl"),
        Side("finetuned by FVU", "kl"),
        at_equal_l0=True,
        paper=_PAPER,
    ),
    Claim(
        "A short finetuning by KL + FVU lowers the cross-entropy gap at equal L0 by a fifth or more",
        "kl_finetune",
        Side("finetuned by KL + FVU", "ce_gap"),
        Side("before", "ce_gap"),
        times=0.8,
        at_equal_l0=True,
        paper=_PAPER,
    ),
]
