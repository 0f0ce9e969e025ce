"""Configs that suit a first run on a CPU. The configs' own defaults are those of the papers (or of their authors' code)."""

from __future__ import annotations

import difflib
from typing import Any

from saelab.saes import VARIANTS
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
