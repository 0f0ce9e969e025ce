"""The same ReLU SAE (2,048 features, L0 32) trained on 500 dialogues of SmolLM2-135M-Instruct, each read by itself (FAST), on the
same dialogues packed into blocks, and on as much ordinary text in blocks; scored on 114 other dialogues.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from saelab.activation_cache.harvest import harvest
from saelab.activation_cache.reader import ActivationCache
from saelab.benchmarks.claims import Claim, Side
from saelab.claims.smollm2 import HOOK, config_at, harvested, language_model, trained
from saelab.claims.workspace import workspace
from saelab.evaluation.document_error import document_error
from saelab.tokens import load_texts

N_TRAIN = 500


def measure(seed: int) -> dict[str, dict[str, Any]]:
    lm, dialogues = language_model(), _dialogues()
    unseen = load_texts(dialogues[N_TRAIN:], chat=lm)
    rows = {}
    for label, data in _data().items():
        (sae,) = trained({label: config_at("relu", 32)}, data, seed).values()
        found = document_error(sae, lm, unseen)
        rows[label] = {"mse": found.mse_kept, "mse_special": found.mse_special}
    return rows


def _dialogues() -> list[list[dict[str, str]]]:
    """Instructions and answers among the demo's texts."""
    import pyarrow.parquet as pq

    rows = pq.read_table(str(resources.files("saelab") / "data" / "corpus.parquet")).to_pylist()
    return [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["text"]}]
        for row in rows
        if row["source"] == "chat"
    ]


@cache
def _data() -> dict[str, ActivationCache]:
    """About as many rows for each."""
    lm, dialogues = language_model(), _dialogues()[:N_TRAIN]
    packed = [lm.tokenizer.apply_chat_template(one, tokenize=False) for one in dialogues]
    apart = harvest(lm, dialogues, HOOK, 10**7, workspace() / "fast", ctx_len=512, chat=True, progress=False)
    blocks = harvest(lm, packed, HOOK, 10**7, workspace() / "blocks", ctx_len=512, progress=False)
    return {"alone": apart, "in blocks": blocks, "other text": harvested((HOOK,), apart.n_rows)}


_PAPER = "Li et al. 2025 (FAST): SAEs err less, above all on special tokens, if every dialogue is read alone."
CLAIMS = [
    Claim(
        f"Dialogues read alone: lower error on {where} than {right}",
        "fast",
        Side("alone", error),
        Side(right, error),
        paper=_PAPER,
    )
    for error, where in (("mse_special", "special tokens"), ("mse", "all other tokens"))
    for right in ("in blocks", "other text")
]
