"""Configs that suit a first run on a CPU. The configs' own defaults are the papers' (or their authors' code's)."""

from __future__ import annotations

import difflib
from typing import Any

from saelab.saes import VARIANTS


def cpu(variant: str, d_sae: int = 4096, **changes: Any) -> Any:
    """The config of `variant` for runs of one or two million tokens, many of them seen several times.

    About 32 features fire on a token: where no count is selected, `target_l0` steers the penalty inside the run. Fields
    in `changes` go before. Raises `ValueError` for an unknown variant.
    """
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(VARIANTS)}."
        raise ValueError(f"Unknown variant {variant!r}; {hint}")
    cls = VARIANTS[variant]
    return cls.Config(d_sae=d_sae, **(cls.cpu_preset | changes))
