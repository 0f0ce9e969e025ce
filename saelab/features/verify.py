"""Checks a feature store against itself, and against what its model and SAE compute.

Hashes tell that no byte has changed since the store was made. They say nothing of a store that was altered and hashed again; so
the numbers of every feature are compared with each other, and a hundred stored examples, with all others of the contexts that
they lie in, are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from saelab.errors import StoreError
from saelab.features import schema
from saelab.features.collecting.near_misses import Margins
from saelab.features.reader import StoreReader
from saelab.features.reading import model_and_hooks
from saelab.saes import SAE

_KINDS = ("examples", "uniform", "octave")
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF = 5e-2
"""Relative error of a value computed in half precision in a batch of another shape."""


class Verified(NamedTuple):
    """What was checked."""

    n_features: int
    n_examples: int
    """Examples that were computed again."""
    n_contexts: int
    largest_error: float
    """Of their activations, relative to the feature's p99."""

    def __str__(self) -> str:
        return (
            f"hashes, the numbers of {self.n_features} features, and {self.n_examples} activations of {self.n_contexts} "
            f"contexts, computed again; largest difference {self.largest_error:.1e} of a p99."
        )


class _Stored(NamedTuple):
    """A stored non-zero activation."""

    feature: int
    position: int
    value: float
    p99: float


def verify(store: StoreReader, lm: Any, n_examples: int = 100, *, seed: int = 0, progress: bool = True) -> Verified:
    """Check hashes and consistency of a store, and compute stored examples again. Raises `StoreError` naming the first feature
    whose numbers do not hold, `ValueError` for a model other than the one it was collected with."""
    store.check_version("document positions and samples")
    check_hashes(store)
    ends = {feature: check_numbers(store, feature) for feature in range(store.d_sae)}
    by_context = _chosen(store, ends, n_examples, seed)
    n, error = _recomputed(store, lm, by_context, progress)
    return Verified(store.d_sae, n, len(by_context), error)


def check_hashes(store: StoreReader) -> None:
    """Compare every file of a store with its SHA-256."""
    store.verify_files()
    with torch.inference_mode():
        store._checked(store.sae)


def check_numbers(store: StoreReader, feature: int) -> list[dict[str, Any]]:
    """Compare what a store says of one feature: counts, histogram, maxima and examples. Returns its ends."""
    (row,) = store._rows("WHERE feature = ?", [feature])
    ends = store.ends(feature)

    def hold(condition: Any, what: str) -> None:
        if not bool(condition):
            raise StoreError(f"{store.folder}: feature {feature}: {what}. The store was altered: collect it again.")

    hold(row["n_fired"] == sum(end["n_fired"] for end in ends), "its count is not the sum of its ends'")
    hold(abs(row["density"] * store.n_tokens - row["n_fired"]) < 0.5, "its density is not its count over all tokens")
    for end in ends:
        histogram = store.histogram(feature, end["sign"])
        hold(histogram.counts.sum() == end["n_fired"], "its histogram does not sum to its count")
        hold(histogram.edges[-2] <= end["max"] * (1 + 1e-6), "its maximum is not in the last bin of its histogram")
        for kind in _KINDS:
            arrays = store.arrays(feature, schema.blob_kind(kind, end["sign"]))
            hold(arrays and len(arrays["value"]) <= end["n_fired"], f"it has {kind} examples of nothing")
            values, peaks = arrays["value"], arrays["window"][:, schema.WINDOW_LEFT]
            hold(np.array_equal(values, peaks), f"a value of its {kind} examples differs from the one in its window")
            hold((end["sign"] * values > 0).all(), f"a value of its {kind} examples is of the other sign")
            hold(
                np.abs(values).max() <= end["max"] * (1 + 1e-6), f"a value of its {kind} examples is above its maximum"
            )
        top = np.abs(store.arrays(feature, schema.blob_kind("examples", end["sign"]))["value"])
        hold(top[0] == np.float32(end["max"]), "its strongest example is not its maximum")
        hold((np.diff(top) <= 0).all(), "its strongest examples are not in order")
    return ends


def _chosen(
    store: StoreReader, ends: Mapping[int, list[dict[str, Any]]], n_examples: int, seed: int
) -> dict[int, list[_Stored]]:
    """All stored activations of the contexts in which `n_examples` examples of a seeded draw lie, by context."""
    draw = np.random.default_rng(seed)
    alive = [feature for feature, found in ends.items() if found]
    if not alive:
        return {}
    contexts = set()
    for feature in draw.choice(alive, n_examples).tolist():
        end = ends[feature][int(draw.integers(len(ends[feature])))]
        kind = _KINDS[int(draw.integers(len(_KINDS)))]
        of_example = store.arrays(feature, schema.blob_kind(kind, end["sign"]))["sequence"]
        contexts.add(int(of_example[int(draw.integers(len(of_example)))]))
    by_context: dict[int, list[_Stored]] = {context: [] for context in contexts}
    for feature in alive:
        for end in ends[feature]:
            for context, one in _activations(store, feature, end):
                if context in by_context:
                    by_context[context].append(one)
    return by_context


def _activations(store: StoreReader, feature: int, end: Mapping[str, Any]) -> Iterator[tuple[int, _Stored]]:
    for kind in _KINDS:
        arrays = store.arrays(feature, schema.blob_kind(kind, end["sign"]))
        rows = zip(arrays["sequence"].tolist(), arrays["position"].tolist(), arrays["value"].tolist(), strict=True)
        for context, position, value in rows:
            yield context, _Stored(feature, position, value, end["p99"])


@torch.inference_mode()
def _recomputed(
    store: StoreReader, lm: Any, by_context: Mapping[int, list[_Stored]], progress: bool
) -> tuple[int, float]:
    """The number of activations that were compared and the largest error."""
    lm, hooks = model_and_hooks(store, lm)
    sae: SAE = store.sae
    contexts = sorted(by_context)
    batches = (torch.from_numpy(store.sequence(context).astype(np.int64))[None] for context in contexts)
    stream = lm.stream_activations(batches, list(hooks.all))
    n, largest, shown = 0, 0.0, {"desc": "Verifying", "unit": "context", "disable": not progress}
    for context, found in tqdm(zip(contexts, stream, strict=True), total=len(contexts), **shown):
        x = hooks.batch(found).x[0]
        tolerance = _TOLERANCE.get(x.dtype, _HALF)
        stored = by_context[context]
        rows = torch.tensor([one.position for one in stored])
        feature_acts = sae.encode(x[rows.to(x.device)].float())
        here = torch.arange(len(stored))
        features = torch.tensor([one.feature for one in stored])
        values = feature_acts.to_dense()[here, features].cpu()
        missed = Margins(sae, x[rows.to(x.device)].float(), feature_acts).at(here, features).cpu()
        for one, value, margin in zip(stored, values.tolist(), missed.tolist(), strict=True):
            unit = max(abs(one.p99), abs(one.value))
            error = abs(value - one.value) / unit
            if value == 0:  # it is kept by a hair in one batch and not in another
                error = abs(margin) / unit
            if error > tolerance:
                raise StoreError(
                    f"{store.folder}: feature {one.feature} is said to be {one.value:.6g} at token {one.position} of context "
                    f"{context}, but model and SAE give {value:.6g}. The store was altered, or made with other files."
                )
            n, largest = n + 1, max(largest, error)
    return n, largest
