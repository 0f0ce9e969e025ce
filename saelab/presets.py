"""Configs that suit a first run on a CPU. The configs' own defaults are those of the papers (or of their authors' code)."""

from __future__ import annotations

import difflib
from typing import Any

from saelab.saes import VARIANTS, TopKConfig
from saelab.training import TrainConfig
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


def fast(
    variant: str, d_in: int, expansion: int = 8, n_tokens: int = 40_960_000, **changes: Any
) -> tuple[Any, TrainConfig]:
    """The SAE and the training run of FAST (Li et al. 2025), for a cache of dialogues, each read by itself (`harvest --chat`).

    `variant` is "relu" or "jumprelu". Warm-ups keep their share of a shorter run. Unlike theirs, the learning rate falls linearly
    to 0 (cosine to a tenth), inputs are normalised, `b_dec` starts at the mean, and training leaves special tokens out: score
    those with `saelab.evaluation.document_error`. Raises `ValueError` for another variant.
    """
    if variant not in _FAST:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(_FAST)}: those that FAST was published with.")
    config = VARIANTS[variant].Config(d_sae=expansion * d_in, **(_FAST[variant] | changes))
    warmup = round(n_tokens / 128 * 16_000 / 320_000)
    return config, TrainConfig(n_tokens, 128, lr=7e-5, seed=42, warmup_steps=warmup, decay_fraction=0.95)


_FAST: dict[str, dict[str, Any]] = {
    "relu": {"l1_coefficient": 5.0, "l1_warmup": 10_000 / 320_000},
    "jumprelu": {
        "sparsity_coefficient": 0.01,
        "bandwidth": 0.001,
        "initial_threshold": 0.001,
        "sparsity_warmup": 10_000 / 320_000,
    },
}
