"""Suppressing a concept's 10 most separable features (TopK SAE of 2,048 features, L0 32, SmolLM2-135M block 14) by posterior
probability, by masking, and within 2.5 standard deviations; means over scripture and code. A probe 6 blocks later reads whether
the concept is there in held-out passages; the cost is the loss on passages of other kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from saelab.benchmarks.claims import Claim, Side
from saelab.claims.concept_texts import mean_nll, others_of, passages
from saelab.claims.smollm2 import HOOK, language_model, topk_sae
from saelab.models import LanguageModel
from saelab.steering import Probe, attenuate, probe
from saelab.steering.text_activations import text_vectors

CONCEPTS = ("bible_kjv", "python_code")
READ_AT = "blocks.20.hook_resid_post"
N_FIT, N_TEST = 48, 24
"""Passages of either side to fit the features and the probe on, and held-out ones."""
HOW = ("posterior", "mask", "range")
_PAPER = "Fereidouni et al. 2025 (APP): suppression by posterior probability removes concepts at the smallest rise of perplexity."


def measure(seed: int) -> dict[str, dict[str, float]]:
    sae = topk_sae(seed)
    texts = passages(N_FIT + N_TEST, 120, seed)
    rows = [_concept(sae, name, texts) for name in CONCEPTS]
    return {how: {name: fmean(row[how][name] for row in rows) for name in rows[0][how]} for how in HOW}


def _concept(sae: Any, name: str, texts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Of each way, by its name: how far the log odds of the concept fall towards those of other text, as a share, and how far the
    loss on other text rises."""
    lm, others = language_model(), others_of(name, texts, N_FIT + N_TEST)
    concept, held, held_others = texts[name][:N_FIT], texts[name][N_FIT:], others[N_FIT:]
    reader = probe(lm, concept, others[:N_FIT], READ_AT)
    edit = attenuate(sae, lm, concept, others[:N_FIT], hook_name=HOOK)
    start, end = (_log_odds(lm, reader, of) for of in (held, held_others))
    plain, rows = mean_nll(lm, held_others), {}
    for how in HOW:
        with lm.steer(one := replace(edit, how=how)):
            removed = (start - _log_odds(lm, reader, held)) / (start - end)
        rows[how] = {"removed": removed, "nll_rise": mean_nll(lm, held_others, [one]) - plain}
    return rows


def _log_odds(lm: LanguageModel, reader: Probe, texts: Sequence[str]) -> float:
    """Mean log odds of the concept, as the probe reads it under the edits that are active."""
    return float(reader.log_odds(text_vectors(lm, texts, READ_AT, "texts")).mean())


CLAIMS = [
    *(
        Claim(
            f"APP costs less on text without the concept than {name}",
            "attenuation",
            Side("posterior", "nll_rise"),
            Side(how, "nll_rise"),
            paper=_PAPER,
        )
        for how, name in (("mask", "masking"), ("range", "suppression within a range"))
    ),
    Claim(
        "APP removes at least 80 % of what masking removes of the concept",
        "attenuation",
        Side("posterior", "removed"),
        Side("mask", "removed"),
        below=False,
        times=0.8,
        paper=_PAPER,
    ),
    Claim(
        "Masking removes the concept: it goes a tenth of the way to other text",
        "attenuation",
        Side("mask", "removed"),
        0.1,
        below=False,
        paper=_PAPER,
    ),
]
