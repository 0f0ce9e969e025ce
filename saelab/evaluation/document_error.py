"""Squared error averaged within each document first, over all tokens and over special tokens (FAST, Li et al. 2025, "Training
superior sparse autoencoders for instruct models"):

    MSE = 1/N sum_i 1/L_i sum_j |x_ij - x_hat_ij|^2 / d,   MSE_st: the same over the special tokens of each document

A dialogue is a document. The figures in the paper's abstract are log2 of MSE_st.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.evaluation.heldout import open_score_stream
from saelab.models import LanguageModel
from saelab.saes import SAE


class DocumentError(NamedTuple):
    """Mean over documents of their mean squared error, in squared raw units; None where no document has such a token."""

    mse: float | None
    """All tokens, the first of each context included: its norm is often far larger than that of the rest."""
    mse_kept: float | None
    """The tokens that training keeps (neither first, nor special, nor of outlying norm)."""
    mse_special: float | None
    """Control tokens and the words given."""
    n_documents: int
    n_special: int
    """Special tokens scored."""


class DocumentMean:
    """Mean over documents of the mean over their tokens."""

    def __init__(self) -> None:
        self.sums, self.counts = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)

    def add(self, document: Int[Tensor, " n"], errors: Float[Tensor, " n"]) -> None:
        """Add the errors of tokens of the documents with these numbers, which may have had tokens before."""
        length = max(len(self.sums), int(document.max()) + 1 if len(document) else 0)
        more = torch.zeros(length, dtype=torch.float64).index_add(0, document, errors.double())
        more[: len(self.sums)] += self.sums
        counts = torch.bincount(document, minlength=length)
        counts[: len(self.counts)] += self.counts
        self.sums, self.counts = more, counts

    @property
    def value(self) -> float | None:
        seen = self.counts > 0
        return float((self.sums[seen] / self.counts[seen]).mean()) if bool(seen.any()) else None


@torch.no_grad()
def document_error(
    sae: SAE,
    lm: LanguageModel,
    texts: Any = None,
    *,
    special: Sequence[str] = ("user", "assistant"),
    **options: Any,
) -> DocumentError:
    """Score an SAE by documents, on the texts and with the options of `evaluate` (`split`, `n_tokens`, `ctx_len`, ...).

    `special` are words of a chat template that count as special wherever they stand, besides the tokenizer's control tokens.
    Raises `ValueError` for an empty one, and as `evaluate` does.
    """
    stream = open_score_stream(sae, lm, texts, **options)
    every, kept, of_special = DocumentMean(), DocumentMean(), DocumentMean()
    for tokens, batch, keep in stream.pairs():
        real, device = tokens.doc >= 0, sae.W_enc.device
        x, y = (each[real.to(each.device)].to(device).float() for each in (batch.x, batch.y))
        errors = (y - sae(x).x_hat).square().mean(1).cpu()
        doc, keep, is_special = tokens.doc[real], keep[real].cpu(), _special(lm, special, tokens.ids)[real]
        every.add(doc, errors)
        kept.add(doc[keep], errors[keep])
        of_special.add(doc[is_special], errors[is_special])
    n_documents = int((every.counts > 0).sum())
    return DocumentError(every.value, kept.value, of_special.value, n_documents, int(of_special.counts.sum()))


def _special(lm: LanguageModel, words: Sequence[str], ids: Int[Tensor, "n ctx_len"]) -> Bool[Tensor, "n ctx_len"]:
    """Control tokens, and wherever one of the words stands, in one token or several."""
    found = torch.isin(ids, torch.tensor(lm.special_ids, dtype=ids.dtype))
    for word in words:
        pattern = torch.tensor(lm.tokenizer.encode(word, add_special_tokens=False), dtype=ids.dtype)
        if not 0 < len(pattern) <= ids.shape[1]:
            raise ValueError(
                f"special contains {word!r}, which is {len(pattern)} tokens: give words of 1 to ctx_len={ids.shape[1]} tokens."
            )
        starts = (ids.unfold(1, len(pattern), 1) == pattern).all(2)  # (n, ctx_len - len(pattern) + 1)
        for shift in range(len(pattern)):
            found[:, shift : shift + starts.shape[1]] |= starts
    return found
