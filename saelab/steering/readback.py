"""Read-back: what the unsteered model and the SAE see in a text that was generated under steering.

One forward pass yields both: the logits, and the activations at the hooks that the SAE reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.sparse_acts import SparseActs
from saelab.models import LanguageModel
from saelab.models.sampling import Generation
from saelab.saes import SAE
from saelab.saes.hooks_used import HooksUsed
from saelab.steering.unsteered import refuse_steered, unsteered_pass


class Read(NamedTuple):
    """The generated part of one text, as the unsteered model reads it, without special tokens."""

    ids: Int[Tensor, " n"]
    nll: Float[Tensor, " n"]
    """Negative log-likelihood of each token, in nats."""
    feature_acts: SparseActs
    """Feature activations on each token."""

    def share_above(self, feature: int, bound: float) -> float:
        """Share of the tokens on which a feature is above `bound`, below it where that is negative; 0 without any token."""
        z = self.feature_acts.column(feature)
        return float((z > bound if bound >= 0 else z < bound).float().mean()) if len(z) else 0.0

    @property
    def mean_nll(self) -> float:
        """Nats per token; 0 without any token."""
        return float(self.nll.mean()) if len(self.nll) else 0.0


class Reader:
    """Reads texts with a model and an SAE at these hooks. Raises `ValueError` if the model is being steered."""

    def __init__(self, lm: LanguageModel, sae: SAE, hooks: HooksUsed) -> None:
        self.lm, self.sae, self.hooks = lm, sae, hooks
        self._special = torch.tensor(lm.special_ids, dtype=torch.int64)
        refuse_steered(lm)

    @torch.no_grad()
    def read(self, texts: Sequence[Generation]) -> list[Read]:
        """Texts in one batch. Raises as `lm.logits` does, and `ValueError` for a hook that cannot be edited."""
        found = unsteered_pass(self.lm, [text.ids for text in texts], self.hooks.inputs)
        x = HooksUsed(self.hooks.inputs, self.hooks.inputs).batch(found.x).x  # (batch, seq, [n_sources,] d_in)
        return [self._read(text, found.logits[i], x[i]) for i, text in enumerate(texts)]

    def _read(self, text: Generation, logits: Float[Tensor, "seq vocab"], x: Tensor) -> Read:
        first, stop = text.n_prompt, len(text.ids)
        ids = text.ids[first:stop].cpu()
        kept = ~torch.isin(ids, self._special)
        before = logits[first - 1 : stop - 1].float().log_softmax(-1)  # (n_generated, vocab)
        nll = -before.gather(1, ids[:, None].to(before.device)).squeeze(1).cpu()
        feature_acts = self.sae.encode(_flat(x[first:stop]).to(self.sae.W_enc.device))
        return Read(ids[kept], nll[kept], _on_cpu(feature_acts).select_rows(kept.nonzero().flatten()))


def _flat(x: Any) -> Tensor:
    return x.float().clone()  # inference tensors cannot be saved for a backward pass that a variant may prepare


def _on_cpu(found: SparseActs) -> SparseActs:
    return SparseActs(found.values.detach().float().cpu(), found.features.cpu(), found.offsets.cpu(), found.d_sae)
