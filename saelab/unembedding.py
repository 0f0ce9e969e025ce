"""The unembedding as a linear map on the residual stream, so that a direction can be read as token logits."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "ln_final")


def logit_weights(model: Any) -> Float[Tensor, "vocab d_model"]:
    """fp32 unembedding of a Hugging Face model or a TransformerBridge, with the final norm's gain folded in.

    A LayerNorm also takes the mean off its input; that too is folded in. The norm's division is a factor common to all
    tokens and is left out.
    """
    if hasattr(model, "hook_dict"):
        unembed, norm = model.W_U.T, model.ln_final
        centred = model.cfg.normalization_type in ("LN", "LNPre")
    else:
        unembed = model.get_output_embeddings().weight
        norm = next((part for name, part in model.base_model.named_children() if name in _FINAL_NORMS), None)
        centred = isinstance(norm, nn.LayerNorm)
    weights = unembed.detach().float()
    gain = getattr(norm, "weight", None)
    if gain is not None:  # Gemma stores the gain minus one
        weights = weights * (gain.detach().float() + type(norm).__name__.startswith("Gemma"))
    return weights - weights.mean(1, keepdim=True) if centred else weights
