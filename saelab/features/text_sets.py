"""Reads two sets of texts, one text in each context, with the mask of a store, and counts in which of them each feature fires."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from saelab.activation_cache.checks import refuse_steered
from saelab.features.contrast import MIN_TEXTS, Contrast, Side, compare
from saelab.features.reading import model_and_hooks
from saelab.features.search import Search
from saelab.tokens import TokenBatch
from saelab.tokens.mask import Mask
from saelab.tokens.tokenizing import eos_and_start, tokenized

_BATCH = 16
Progress = Callable[[int, int], object]
"""Called with the number of texts read, and of all."""


@torch.no_grad()
def contrast_texts(
    store: Search, lm: Any, a: Sequence[str], b: Sequence[str], *, progress: Progress | None = None
) -> Contrast:
    """Read two sets of texts through the model and the SAE of a store, and compare in how many texts of each a feature fires.

    A text that comes twice in a set counts once. Raises `ValueError` for a set without a text that has a counted token, a text
    longer than the model's context, and a model of other weights.
    """
    lm, hooks = model_and_hooks(store, lm)
    refuse_steered(lm)
    sae: Any = store.sae
    max_norm = store.manifest["mask"]["max_norm"]
    max_norms = dict.fromkeys(hooks.all, max_norm) if isinstance(max_norm, float | int) else max_norm
    mask, sides = Mask(lm.special_ids, max_norms), []
    sets = [_ids(texts, name, store, lm) for texts, name in ((a, "a"), (b, "b"))]
    done, total = 0, sum(map(len, sets))
    for rows, texts, name in zip(sets, (a, b), "ab", strict=True):
        tally = _Tally(store.d_sae)
        for batch in _batches(rows, lm):
            found = next(iter(lm.stream_activations([batch.ids], list(hooks.all))))
            keep, _ = mask.apply(batch, found)
            x = hooks.batch(found).x
            if bool(keep.any()):
                tally.add(sae.encode(x[keep.to(x.device)].float().to(sae.W_enc.device)), batch.doc[keep.cpu()])
            done += len(batch.ids)
            if progress is not None:
                progress(done, total)
        if not tally.n_texts:
            raise ValueError(
                f"No text of {name} has a counted token (the first of a context and special tokens are not)."
            )
        sides.append(tally.side(len(texts)))
    return compare(store, *sides)


def _ids(texts: Sequence[str], name: str, store: Search, lm: Any) -> list[list[int]]:
    """Token ids of the different texts, with what a context begins with."""
    if isinstance(texts, str):
        raise ValueError(f"{name} is one text; give a list of texts.")
    eos, start = eos_and_start(lm, lm.max_ctx, _BATCH, store.manifest.get("prepend_bos"))
    rows = [start + ids for ids in tokenized(list(dict.fromkeys(texts)), lm, start, eos, None)]
    if not rows:
        raise ValueError(f"{name} holds no text; give at least one, and {MIN_TEXTS} for a claim.")
    longest = max(map(len, rows))
    if longest > lm.max_ctx:
        raise ValueError(
            f"A text of {name} has {longest:,} tokens, more than the context of {lm.name}, {lm.max_ctx:,}: split it."
        )
    return rows


def _batches(rows: list[list[int]], lm: Any) -> Iterator[TokenBatch]:
    """Texts of like length, one in each context, padded on the right; `doc` is the number of the text."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), _BATCH):
        chosen = order[first : first + _BATCH]
        ids = torch.full((len(chosen), len(rows[chosen[-1]])), lm.eos_id or 0)
        doc = torch.full_like(ids, -1)
        for i, text in enumerate(chosen):
            ids[i, : len(rows[text])] = torch.tensor(rows[text])
            doc[i, : len(rows[text])] = text
        yield TokenBatch(ids, doc, first)


class _Tally:
    """Sums over texts; memory is independent of their number."""

    def __init__(self, d_sae: int) -> None:
        self.n_texts = 0
        self.n_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.mean = torch.zeros(d_sae, dtype=torch.float64)

    def add(self, feature_acts: Any, texts: Tensor) -> None:
        """Count whole texts; `texts` is the text of each row."""
        numbers, counted = texts.unique(return_counts=True)
        self.n_texts += len(numbers)
        rows, features = feature_acts.rows.cpu(), feature_acts.features.cpu().long()
        fired = feature_acts.values.cpu() != 0
        pairs = (texts[rows[fired]] * len(self.mean) + features[fired]).unique()
        self.n_fired += torch.bincount(pairs % len(self.mean), minlength=len(self.mean))
        weight = 1 / counted.double()[torch.searchsorted(numbers, texts)]
        self.mean.index_add_(0, features, feature_acts.values.cpu().double() * weight[rows])

    def side(self, n_given: int) -> Side:
        return Side(self.n_texts, n_given - self.n_texts, self.n_fired.numpy(), (self.mean / self.n_texts).numpy())
