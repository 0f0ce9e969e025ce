"""A gradient SAE with and without gradients at inference: held-out reconstruction, and the model's loss with it spliced in.

With gradients each token's features are selected as in training. That is no fair comparison with other SAEs, but a bound: the
gradient is computed from the token to be predicted, and costs a backward pass. Both reconstructions replace the same rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from saelab.evaluation.heldout import open_score_stream
from saelab.evaluation.loss_recovered import ReplaceRows
from saelab.evaluation.reconstruction import VarianceSums
from saelab.models import LanguageModel
from saelab.models.loss_gradients import activations_and_gradients
from saelab.saes import SAE
from saelab.saes.gradient import GradientSAE

_SIDES = ("", "_with_gradients")


class GradientSelection(NamedTuple):
    """Fraction of variance unexplained, features per token and cross-entropy in nats, without and with gradients."""

    fvu: float
    fvu_with_gradients: float
    l0: float
    l0_with_gradients: float
    ce_loss: float
    """Of the model as it is."""
    ce_loss_sae: float
    ce_loss_sae_with_gradients: float
    dead_fraction: float
    """Features that fire on none of these tokens."""
    dead_fraction_with_gradients: float
    n_tokens: int
    """Tokens whose rows were replaced and whose next token was scored."""


@torch.no_grad()
def gradient_selection(sae: SAE, lm: LanguageModel, texts: Any = None, **options: Any) -> GradientSelection:
    """Score on the texts and with the options of `evaluate` (`split`, `n_tokens`, `ctx_len`, ...).

    Raises `ValueError` for an SAE of another variant, and as `evaluate` does.
    """
    if not isinstance(sae, GradientSAE):
        raise ValueError(
            f"gradient_selection needs an SAE of the variant gradient; got {getattr(sae, 'variant', sae)!r}."
        )
    stream = open_score_stream(sae, lm, texts, **options)
    hook, sums = stream.hook_name, {side: VarianceSums() for side in _SIDES}
    totals = dict.fromkeys(("ce_loss", *(f"{name}{side}" for name in ("l0", "ce_loss_sae") for side in _SIDES)), 0.0)
    n, fired = 0, {side: torch.zeros(sae.d_sae, dtype=torch.bool) for side in _SIDES}
    for tokens, batch, keep in stream.pairs():
        keep, real = keep.cpu(), tokens.doc >= 0
        kept = keep.clone()
        kept[:, -1] = False  # no gradient, no next token
        kept[:, :-1] &= real[:, 1:]
        g = activations_and_gradients(lm, tokens.ids, [hook], real).gradients[hook]
        x, g = (one[kept.to(one.device)].to(sae.W_dec.device).float() for one in (batch.x, g))
        totals["ce_loss"] += _loss(lm.logits(tokens.ids), tokens.ids, kept)
        for side, feature_acts in zip(_SIDES, (sae.encode(x), sae.encode_with(x, g)), strict=True):
            x_hat = sae.decode(feature_acts, x)
            sums[side].add(x, x_hat)
            totals[f"l0{side}"] += feature_acts.nnz
            fired[side][feature_acts.features.cpu()] = True
            edited = lm.run_with_edit(tokens.ids, ReplaceRows(hook, kept.to(lm.device), x_hat.to(lm.device)))
            totals[f"ce_loss_sae{side}"] += _loss(edited, tokens.ids, kept)
        n += len(x)
    if not n:
        raise ValueError(f"There is no token to score in {stream.texts.name}: none is kept that another follows.")
    fvu = {f"fvu{side}": one.fvu or 0.0 for side, one in sums.items()}
    fvu |= {f"dead_fraction{side}": float((~ever).float().mean()) for side, ever in fired.items()}
    return GradientSelection(**fvu, **{name: total / n for name, total in totals.items()}, n_tokens=n)


def _loss(logits: Float[Tensor, "n seq vocab"], ids: Int[Tensor, "n seq"], kept: Bool[Tensor, "n seq"]) -> float:
    """Summed over the kept tokens, none of which is the last."""
    chosen, targets = kept[:, :-1], ids[:, 1:]
    at = chosen.to(logits.device)
    return float(cross_entropy(logits[:, :-1][at].float(), targets[chosen].long().to(logits.device), reduction="sum"))
