"""Configs that suit a first run on a CPU. The configs' own defaults are the papers' (or their authors' code's)."""

from __future__ import annotations

import difflib
from typing import Any

from saelab.saes import VARIANTS
from saelab.validation import check_integer


def cpu(variant: str, d_sae: int = 4096, n_tokens: int = 2_000_000, **changes: Any) -> Any:
    """The config of `variant` for a run of `n_tokens` (as `TrainConfig.n_tokens`).

    About 32 features fire on a token: where no count is selected, `target_l0` steers the penalty inside the run. Up to 4
    million tokens, in which a CPU sees most rows several times, the selecting variants get `encoder_decay=1.0`, against
    memorising them; longer runs do not, as it wears away features that are rare (`SelectionConfig.encoder_decay`). Fields in
    `changes` take precedence. Raises `ValueError` for an unknown variant.
    """
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(VARIANTS)}."
        raise ValueError(f"Unknown variant {variant!r}; {hint}")
    check_integer("n_tokens", n_tokens, 1)
    cls = VARIANTS[variant]
    return cls.Config(d_sae=d_sae, **(cls.preset(n_tokens) | changes))
