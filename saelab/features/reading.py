"""What the features of an SAE read in a text: per token, which fire and how unusually, and how much of the token they explain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.features.collected_with import all_models
from saelab.features.quantiles import share_below
from saelab.features.search import Search
from saelab.features.token_text import token_bytes
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes.hooks_used import HooksUsed

_SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "surprise": lambda row: row["percentile"] * row["surprise"],
    "value": lambda row: abs(row["value"]),
}


class Reading(NamedTuple):
    """A text as an SAE reads it."""

    store: Search
    token_ids: list[int]
    pieces: list[bytes]
    feature_acts: SparseActs
    explained: Float[Tensor, " n_tokens"]
    """Explained variance of each token: 1 - |y - y_hat|^2 / |y - mean|^2, the mean over these tokens."""

    def top(self, k: int = 10, *, by: str = "surprise") -> list[list[dict[str, Any]]]:
        """For each token the `k` features that stand out most (see `store.top_features`), or with `by="value"` the largest."""
        if by not in _SCORES:
            raise ValueError(f"by={by!r} is unknown; order by 'surprise' or 'value'.")
        found, percentiles, result = self.feature_acts, self._percentiles(), []
        fired = list(zip(found.features.tolist(), found.values.tolist(), percentiles, strict=True))
        bounds, score = found.offsets.tolist(), _SCORES[by]
        for first, stop in zip(bounds, bounds[1:], strict=False):
            rows = [self._entry(*one) for one in fired[first:stop]]
            result.append(sorted(rows, key=lambda row: -score(row))[:k])
        return result

    def best(self, k: int = 12, *, by: str = "surprise") -> list[dict[str, Any]]:
        """The `k` features that stand out most anywhere in the text, each at the token where it does: dicts as of `top`, with
        "position". The first token of a context is masked in training, and left out if there are others."""
        best: dict[int, dict[str, Any]] = {}
        top, score = self.top(self.feature_acts.d_sae, by=by), _SCORES[by]
        for position, rows in list(enumerate(top))[1 if len(top) > 1 else 0 :]:
            for row in rows:
                if row["feature"] not in best or score(row) > score(best[row["feature"]]):
                    best[row["feature"]] = row | {"position": position}
        return sorted(best.values(), key=lambda row: -score(row))[:k]

    def _entry(self, feature: int, value: float, percentile: float) -> dict[str, Any]:
        density = self.store.row_of(feature)["density"]
        surprise = -math.log10(max(density, 0.5 / self.store.n_tokens))
        return {"feature": feature, "value": value, "percentile": percentile, "surprise": surprise}

    def _percentiles(self) -> list[float]:
        """The share of its feature's firings at the same end below each value; 1 for one that never fired."""
        feature_acts, result = self.feature_acts, np.ones(self.feature_acts.nnz)
        for feature in feature_acts.features.unique().tolist():
            here = (feature_acts.features == feature).nonzero().flatten().numpy()
            values = feature_acts.values[here].numpy()
            for sign in (1, -1):
                histogram, chosen = self.store.histogram(feature, sign), np.sign(values) == sign
                if len(histogram.counts) and chosen.any():
                    result[here[chosen]] = share_below(histogram, np.abs(values[chosen]))
        return result.tolist()

    def of(self, feature: int) -> list[float]:
        """The activation of one feature on each token."""
        self.store.check_feature(feature)
        return self.feature_acts.column(feature).tolist()


@torch.no_grad()
def read_text(store: Search, lm: Any, text: Any) -> Reading:
    """Run a text (or token ids) through the model and the SAE of a store. Raises `ValueError` for a model whose weights are not
    those the store was collected with, and for what is no prompt."""
    lm, hooks = model_and_hooks(store, lm)
    ids = lm.to_ids(text) if isinstance(text, str) else torch.as_tensor(text).reshape(1, -1)
    batch = hooks.batch(next(iter(lm.stream_activations([ids], list(hooks.all)))))
    x, y = batch.x[0].float(), batch.y[0].float()
    sae: Any = store.sae
    x_hat, found = sae(x)
    feature_acts = SparseActs(found.values.cpu().float(), found.features.cpu(), found.offsets.cpu(), found.d_sae)
    error = (y - x_hat.float()).flatten(1).square().sum(1)
    spread = (y - y.mean(0)).flatten(1).square().sum(1).clamp_min(1e-30)
    token_ids = ids.flatten().tolist()
    spelled = token_bytes(lm.tokenizer, token_ids)
    return Reading(store, token_ids, [spelled[index] for index in token_ids], feature_acts, (1 - error / spread).cpu())


def model_and_hooks(store: Any, lm: Any) -> tuple[Any, HooksUsed]:
    """The model (or models, as one) and the hooks that a store was collected with. Raises `ValueError` for others."""
    return all_models(store, lm), HooksUsed(
        tuple(store.manifest["sites"]["reads"]), tuple(store.manifest["sites"]["writes"])
    )
