"""Configs that suit a first run on a CPU. The configs' own defaults are those of the papers (or of their authors' code)."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from saelab.saes import VARIANTS, TopKConfig
from saelab.training import TrainConfig
from saelab.validation import check_integer

Preset = Literal["k_sparse", "fast"]
"""Presets of a paper that the command line takes."""


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
    start = {} if k_start is None else {"k_start": k_start}
    fields: dict[str, Any] = _k_sparse(d_sae, k) | start | changes
    return TopKConfig(d_sae, k, **fields)


def fast(
    variant: str, d_in: int, expansion: int = 8, n_tokens: int = 40_960_000, **changes: Any
) -> tuple[Any, TrainConfig]:
    """The SAE and the training run of FAST (Li et al. 2025), for a cache of dialogues, each read by itself (`harvest --chat`).

    `variant` is "relu" or "jumprelu". Warm-ups keep their share of a shorter run. Unlike theirs, the learning rate falls linearly
    to 0 (cosine to a tenth), inputs are normalised, `b_dec` starts at the mean, and training leaves special tokens out: score
    those with `saelab.evaluation.document_error`. Raises `ValueError` for another variant.
    """
    check_variant("fast", variant)
    config = VARIANTS[variant].Config(d_sae=expansion * d_in, **(_FAST[variant] | changes))
    return config, TrainConfig(n_tokens, **_fast_run(n_tokens))


def check_variant(name: Preset, variant: str) -> None:
    """Raise `ValueError` if the preset `name` is not for this variant."""
    if variant not in PRESETS[name]:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(PRESETS[name])}: those of the preset {name}.")


def settings(name: Preset, variant: str, d_sae: int, n_tokens: int, k: int | None) -> dict[str, Any]:
    """The fields of the variant's config and of `TrainConfig` that the preset `name` sets, for the command line. Raises
    `ValueError` for a variant that it is not for."""
    check_variant(name, variant)
    return _k_sparse(d_sae, k or 1) if name == "k_sparse" else _FAST[variant] | _fast_run(n_tokens)


def _k_sparse(d_sae: int, k: int) -> dict[str, Any]:
    return {"k_start": min(round(k * 100 / 15), d_sae), "auxk_alpha": 0.0, "pre_bias": False}


def _fast_run(n_tokens: int) -> dict[str, Any]:
    warmup = round(n_tokens / 128 * 16_000 / 320_000)
    return {"batch_size": 128, "lr": 7e-5, "seed": 42, "warmup_steps": warmup, "decay_fraction": 0.95}


_FAST: dict[str, dict[str, Any]] = {
    "relu": {"l1_coefficient": 5.0, "l1_warmup": 10_000 / 320_000},
    "jumprelu": {
        "sparsity_coefficient": 0.01,
        "bandwidth": 0.001,
        "initial_threshold": 0.001,
        "sparsity_warmup": 10_000 / 320_000,
    },
}
PRESETS: dict[Preset, tuple[str, ...]] = {"k_sparse": ("topk",), "fast": tuple(_FAST)}
"""The variants that each preset of a paper is for."""
