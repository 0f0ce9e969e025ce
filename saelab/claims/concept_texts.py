"""Passages by kind of text (scripture, plays, code and others): the concepts of experiments that steer or compare concepts; and
what an edit costs on text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from saelab.models import LanguageModel
from saelab.steering.text_activations import BATCH, counted_tokens
from saelab.tokens.sources import open_named


def passages(n: int, n_chars: int = 160, seed: int = 0) -> dict[str, list[str]]:
    """The beginnings of `n` documents of each kind in the package's corpus, at most `n_chars` long, drawn with `seed`."""
    found: dict[str, list[str]] = {}
    for row in open_named("demo", "text").rows(["text", "source"]):
        text = str(row["text"]).strip()
        if len(text) > n_chars:
            found.setdefault(str(row["source"]), []).append(text[:n_chars].rsplit(None, 1)[0])
    generator = np.random.default_rng(seed)
    return {kind: [texts[i] for i in generator.permutation(len(texts))[:n]] for kind, texts in sorted(found.items())}


def others_of(kind: str, texts: Mapping[str, Sequence[str]], n: int) -> list[str]:
    """`n` passages of all other kinds, as many of each as that allows."""
    rows = zip(*(of for name, of in texts.items() if name != kind), strict=True)
    return [text for row in rows for text in row][:n]


@torch.no_grad()
def mean_nll(lm: LanguageModel, texts: Sequence[str], edits: Iterable[Any] = ()) -> float:
    """Nats per token of the texts under edits; position 0 and special tokens do not count."""
    total, n = 0.0, 0
    with lm.steer(*edits):
        for start in range(0, len(texts), BATCH):
            batch = lm.to_batch(list(texts[start : start + BATCH]))
            kept = counted_tokens(lm, batch)[:, 1:]
            logits = lm.logits(batch.ids, batch.positions)[:, :-1]
            chosen, targets = logits[kept.to(logits.device)].float(), batch.ids[:, 1:][kept].to(logits.device)
            total += float(F.cross_entropy(chosen, targets, reduction="sum"))
            n += len(targets)
    return total / n
