"""Checks shared by `harvest` and `stream`: bad arguments, a steered model, non-finite activations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from saelab.errors import CacheError
from saelab.models.language_model import LanguageModel
from saelab.models.loss_gradients import check_gradient_hooks
from saelab.tokens import Texts, TokenBatch, check_split
from saelab.tokens.mask import row_norms
from saelab.validation import check_integer


def check_arguments(
    lm: LanguageModel, hooks: list[str], split: str, sizes: dict[str, int], seed: int = 0, gradients: bool = False
) -> None:
    """Raise `ValueError` for a bad split, size, seed or hook (also one where no gradient can be taken, if `gradients` are
    wanted), a context too long for the model, or a steered model."""
    check_split(split)
    for name, value in sizes.items():
        check_integer(name, value, 1)
    check_integer("seed", seed, 0)
    if not hooks or not all(isinstance(hook, str) for hook in hooks) or len(set(hooks)) < len(hooks):
        raise ValueError(f"hook_names={hooks!r}: expected a hook name, or a list of distinct hook names.")
    refuse_steered(lm)
    if gradients:
        check_gradient_hooks(lm, hooks)
    for hook in hooks:
        lm.check_hook(hook)
    if sizes["ctx_len"] > lm.max_ctx:
        raise ValueError(f"ctx_len={sizes['ctx_len']} exceeds the context length of {lm.name}, {lm.max_ctx} tokens.")


def warn_if_none_held_out(texts: Texts, split: str, stacklevel: int) -> None:
    """Warn, at the caller of `harvest` or `stream` (`stacklevel` frames up), if no document would be held out."""
    if split == "train" and next(texts.documents("held_out"), None) is None:
        warnings.warn(
            f"{texts.name} has no held-out document (on average one document in ten is held out), so an SAE trained on "
            "it can only be evaluated on other texts (evaluate(texts=...), eval --texts). Use more, or shorter, documents.",
            stacklevel=stacklevel + 1,
        )


def finite_norms(batch: TokenBatch, activations: Mapping[str, Tensor], batch_size: int, kept: str) -> dict[str, Tensor]:
    """`row_norms` of a batch. Raises `CacheError` if a token's row is NaN or infinite; `kept` ends its message."""
    norms = row_norms(activations)
    for hook, norm in norms.items():
        bad = (~norm.isfinite()).cpu() & (batch.doc >= 0)
        if bad.any():
            first, last = batch.first_context, batch.first_context + len(batch.ids) - 1
            raise CacheError(
                f"batch {first // batch_size} (contexts {first} to {last}): {int(bad.sum())} of "
                f"{bad.numel()} rows at {hook} are NaN or infinite. Load the model in another dtype "
                f"(load_model(..., dtype=torch.float32)). {kept}"
            )
    return norms


def refuse_steered(lm: LanguageModel) -> None:
    """Raise `ValueError` inside `lm.steer`: only unedited activations are measured and stored."""
    if lm.edits:
        raise ValueError(
            f"{lm.name} is being steered ({lm.edits[0]!r}): caches, feature stores and reports need unedited activations. "
            "Leave the lm.steer block first."
        )
