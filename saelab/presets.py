"""Configs that suit a first run on a CPU. The configs' own defaults are those of the papers (or of their authors' code)."""

from __future__ import annotations

import difflib
from typing import Any

from saelab.saes import VARIANTS, TopKConfig
from saelab.validation import check_integer


def cpu(variant: str, d_sae: int = 4096, n_tokens: int = 2_000_000, **changes: Any) -> Any:
    """The config of `variant` for a run of `n_tokens` (as `TrainConfig.n_tokens`).

    About 32 features fire per token: in variants without `k`, `target_l0` adapts the penalty during the run. Up to 4 million
    tokens, where most rows are typically seen several times, variants with `k` get `encoder_decay=1.0` against memorisation;
    longer runs do not, as it erodes rare features (`SelectionConfig.encoder_decay`). Fields in `changes` take precedence.

    Raises `ValueError` for an unknown variant.
    """
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(VARIANTS)}."
        raise ValueError(f"Unknown variant {variant!r}; {hint}")
    check_integer("n_tokens", n_tokens, 1)
    cls = VARIANTS[variant]
    return cls.Config(d_sae=d_sae, **(cls.preset(n_tokens) | changes))


def k_sparse(d_sae: int = 4096, k: int = 32, k_start: int | None = None, **changes: Any) -> TopKConfig:
    """The k-sparse autoencoder of Makhzani and Frey (2013): TopK without aux loss or pre-bias, whose k falls during training.

    `k_start` defaults to the ratio of the paper's example, which falls from 100 to 15. Unlike theirs, the decoder is not tied to
    the encoder (but starts equal to it) and has rows of norm 1, and what is negative does not fire.
    """
    start = min(round(k * 100 / 15), d_sae) if k_start is None else k_start
    return TopKConfig(d_sae, k, **({"k_start": start, "auxk_alpha": 0.0, "pre_bias": False} | changes))
