"""The tokens whose logits a feature's decoder row changes most: in logits, and against what other features do to a token."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ModelError
from saelab.models import LanguageModel
from saelab.models.hooks import writes_to_residual
from saelab.models.multi_model import locate
from saelab.saes import SAE

TOP_LOGITS = 15
_ROWS = 256


@torch.inference_mode()
def top_logits(sae: SAE, lm: LanguageModel, hook_name: str) -> dict[str, Tensor] | None:
    """Ids and logit changes of the tokens each decoder row promotes and suppresses most; None off the residual stream.

    The logit change is the direct effect of one unit along the decoder row: `logit_weights @ W_dec[f]`. A crosscoder's
    row is that of its last source. `z_...` rank tokens by the z-score of that change among all features, which leaves out
    tokens that many features push; `z_..._logits` are their changes. Warns, and returns None, where the logits do not follow
    from the unembedding.
    """
    if not writes_to_residual(hook_name):
        return None
    try:
        unembed = locate(lm, hook_name)[0].logit_weights().float().cpu()  # (vocab, d_model)
    except ModelError as error:
        warnings.warn(f"The store will hold no logits, so it cannot show what features promote. {error}", stacklevel=4)
        return None
    decoder = sae.decoder()[0].detach().float().cpu()
    if unembed.shape[1] != decoder.shape[1]:
        return None
    mean, deviation = _over_features(decoder, unembed)
    n_top = min(TOP_LOGITS, len(unembed))
    found: dict[str, list[Tensor]] = {}
    for rows in decoder.split(_ROWS):
        logits = rows @ unembed.T
        for prefix, values in (("", logits), ("z_", (logits - mean) / deviation)):
            for side, largest in (("positive", True), ("negative", False)):
                best, ids = values.topk(n_top, 1, largest=largest)
                found.setdefault(f"{prefix}{side}", []).append(best)
                found.setdefault(f"{prefix}{side}_ids", []).append(ids)
                if prefix:
                    found.setdefault(f"{prefix}{side}_logits", []).append(logits.gather(1, ids))
    return {name: torch.cat(column) for name, column in found.items()}


def _over_features(
    decoder: Float[Tensor, "d_sae d_model"], unembed: Float[Tensor, "vocab d_model"]
) -> tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]:
    """Mean and standard deviation over features of each token's logit change, from mean and covariance of decoder rows."""
    mean = decoder.mean(0)
    centred = decoder - mean
    covariance = centred.T @ centred / len(decoder)
    variance = torch.einsum("vd,vd->v", unembed @ covariance, unembed)
    return unembed @ mean, variance.clamp_min(1e-30).sqrt()
