"""The tokens on which each feature came closest to firing, without doing so: for judging a label, and for finding out what a
dead feature waits for.

They are looked for on one token in 64 (chosen by hash), as they need the dense pre-activations, `(tokens, d_sae)`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.features.collecting.entries import Entries, float_rank, sort_by, token_hash
from saelab.features.collecting.kept import Kept
from saelab.kernels.primitives import sddmm
from saelab.kernels.ragged import flatnonzero
from saelab.kernels.sparse_acts import SparseActs, offsets_of
from saelab.saes import SAE

ONE_IN = 64
N_MISSES = 8
_CANDIDATES = 2 * N_MISSES


def is_looked_at(tokens: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """The tokens that are searched for near misses."""
    return token_hash(tokens) % ONE_IN == 0


class NearMisses(Kept):
    """For each feature the `N_MISSES` misses by the least, one per document. A miss's value is its margin: the pre-activation
    minus what it had to exceed to fire."""

    def __init__(self, d_sae: int, ctx_len: int) -> None:
        super().__init__(d_sae, N_MISSES, ctx_len, one_per_document=True)

    def update(
        self,
        margins: Margins,
        feature_acts: SparseActs,
        tokens: Int[Tensor, " n"],
        docs: Int[Tensor, " n"],
        around: Entries,
    ) -> None:
        """The tokens of one batch that are looked at; `around` holds the entries of the whole batch."""
        if not len(tokens):
            return
        rough = margins.dense().cpu().index_put((feature_acts.rows, feature_acts.features), torch.tensor(-torch.inf))
        best, row = rough.topk(min(_CANDIDATES, len(rough)), 0)
        features = torch.arange(rough.shape[1]).expand_as(best)
        found = best > -torch.inf
        features, row = features[found], row[found]
        entries = Entries(features, tokens[row], docs[row], margins.at(row, features).cpu())
        self.offer(entries.features, float_rank(entries.values), entries, around)


class Margins:
    """Pre-activations of raw activations `x` minus what each had to exceed to fire: the feature's threshold, or the smallest
    pre-activation that fired on the token where the largest are kept and no room is left, or 0. They are 0 or less where a
    feature is silent, except in a matching pursuit, of whose steps only the first is looked at."""

    def __init__(self, sae: SAE, x: Tensor, feature_acts: SparseActs) -> None:
        config: Any = sae.config
        self._encoders = _encoders(sae, sae.normalize(x).float())
        bias = getattr(sae, "b_enc", None)
        self._bias = None if bias is None else bias.detach().float()
        self._signed = bool(getattr(config, "signed", getattr(sae, "signed", False)))
        threshold = getattr(sae, "theta", getattr(sae, "threshold", None))
        by_norm = getattr(config, "score", "value") == "decoder_norm" or (threshold is not None and sae.W_enc.ndim == 3)
        folded = getattr(sae, "folded", None)
        self._norms = sae.decoder_norms.detach().float() if by_norm else None if folded is None else 1 / folded.float()
        self._threshold = None if threshold is None else threshold.detach().float()
        self._lowest = None
        if threshold is None and sae.competes:
            fired = self._scores_at(feature_acts.rows, feature_acts.features)
            lowest = fired.new_full((len(x),), torch.inf)
            lowest.scatter_reduce_(0, feature_acts.rows.to(fired.device), fired, "amin")
            n_fired = feature_acts.counts.to(fired.device)
            self._lowest = lowest.where((n_fired > 0) & (n_fired >= (sae.expected_l0(config) or 0)), 0)

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """All of them, to the rounding of a matrix product, which depends on the batch."""
        scores = torch.cat([rows @ W_enc.T for rows, W_enc in self._encoders], 1)
        scores = self._finished(scores, slice(None))
        level = self._threshold if self._lowest is None else self._lowest[:, None]
        return scores - (0.0 if level is None else level)

    def at(self, rows: Int[Tensor, " m"], features: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Those of these rows and features, to the same bits in any batch."""
        scores = self._scores_at(rows, features)
        rows, features = rows.to(scores.device), features.to(scores.device)
        if self._lowest is not None:
            return scores - self._lowest[rows]
        if self._threshold is None:
            return scores
        return scores - (self._threshold if self._threshold.ndim == 0 else self._threshold[features])

    def _scores_at(self, rows: Tensor, features: Tensor) -> Tensor:
        device, first = self._encoders[0][0].device, 0
        rows, features = rows.to(device), features.to(device)
        scores = torch.empty(len(rows), device=device)
        for x, W_enc in self._encoders:
            mine = flatnonzero((features >= first) & (features < first + len(W_enc)))
            order = mine[sort_by(rows[mine], features[mine])]
            offsets = offsets_of(torch.bincount(rows[mine], minlength=len(x)))
            scores[order] = sddmm(x, W_enc, features[order] - first, offsets)
            first += len(W_enc)
        return self._finished(scores, features)

    def _finished(self, scores: Tensor, features: Any) -> Tensor:
        if self._bias is not None:
            scores = scores + self._bias[features]
        scores = scores.abs() if self._signed else scores
        return scores if self._norms is None else scores * self._norms[features]


def _encoders(sae: SAE, x: Float[Tensor, "n width"]) -> list[tuple[Tensor, Tensor]]:
    """What features read and their encoder rows, in the order of the features: by layer where each reads its own."""
    if (layers := getattr(sae, "layers", None)) is not None:
        return [(layer.x, layer.W_enc.detach().float()) for layer in layers(x)]
    if getattr(sae, "b_dec", None) is not None and sae.pre_bias is not None:
        x = x - sae.pre_bias.detach().float()
    W_enc = sae.W_enc if sae.W_enc.ndim == 2 else sae.W_enc.transpose(0, 1).flatten(1)
    return [(x, W_enc.detach().float())]
