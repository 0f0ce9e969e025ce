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


class _Recorder:
    """An edit that changes nothing and keeps the activations."""

    def __init__(self, hook_name: str) -> None:
        self.hook_name, self.x = hook_name, torch.empty(0)

    def apply(self, x: Float[Tensor, "batch seq d_in"], positions: Int[Tensor, "batch seq"]) -> Tensor:
        self.x = x.clone()  # a later layer may write into the tensor
        return x


class Reader:
    """Reads texts with a model and an SAE at these hooks. Raises `ValueError` if the model is being steered."""

    def __init__(self, lm: LanguageModel, sae: SAE, hooks: HooksUsed) -> None:
        self.lm, self.sae, self.hooks = lm, sae, hooks
        self._special = torch.tensor(lm.special_ids, dtype=torch.int64)
        _refuse_steered(lm)

    @torch.no_grad()
    def read(self, texts: Sequence[Generation]) -> list[Read]:
        """Texts in one batch. Raises as `lm.logits` does, and `ValueError` for a hook that cannot be edited."""
        _refuse_steered(self.lm)
        ids, positions = _right_padded([text.ids for text in texts])
        recorders = [_Recorder(name) for name in dict.fromkeys(self.hooks.inputs)]
        with self.lm.steer(*recorders):
            logits = self.lm.logits(ids, positions=positions)
        rows = {one.hook_name: one.x for one in recorders}
        x = HooksUsed(self.hooks.inputs, self.hooks.inputs).batch(rows).x  # (batch, seq, [n_sources,] d_in)
        return [self._read(text, logits[i], x[i]) for i, text in enumerate(texts)]

    def _read(self, text: Generation, logits: Float[Tensor, "seq vocab"], x: Tensor) -> Read:
        first, stop = text.n_prompt, len(text.ids)
        ids = text.ids[first:stop].cpu()
        kept = ~torch.isin(ids, self._special)
        before = logits[first - 1 : stop - 1].float().log_softmax(-1)  # (n_generated, vocab)
        nll = -before.gather(1, ids[:, None].to(before.device)).squeeze(1).cpu()
        feature_acts = self.sae.encode(_flat(x[first:stop]).to(self.sae.W_dec.device))
        return Read(ids[kept], nll[kept], _on_cpu(feature_acts).select_rows(kept.nonzero().flatten()))


def _flat(x: Any) -> Tensor:
    return x.float().clone()  # inference tensors cannot be saved for a backward pass that a variant may prepare


def _on_cpu(found: SparseActs) -> SparseActs:
    return SparseActs(found.values.detach().float().cpu(), found.features.cpu(), found.offsets.cpu(), found.d_sae)


def _right_padded(rows: Sequence[Int[Tensor, " n_tokens"]]) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
    """Ids padded on the right to one length, and their positions, -1 on padding."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.full_like(ids, -1)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        positions[i, : len(row)] = torch.arange(len(row))
    return ids, positions


def _refuse_steered(lm: LanguageModel) -> None:
    if lm.edits:
        raise ValueError(
            f"The model is being steered by {lm.edits[0]!r}, but the unsteered model is to read: call this outside of "
            "`with lm.steer(...)`."
        )
