"""`label_features`: asks for the label of each feature, scores it, and writes both to the annotations at once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from saelab.features.feature import Feature
from saelab.features.store import FeatureStore
from saelab.labels import prompts
from saelab.labels.explainers import Endpoint, Explainer
from saelab.labels.scoring import detection, fuzzing

_LOG = logging.getLogger("saelab")
N_SHOWN = 12
"""Examples that a label is made from: the strongest, and some of every quantile."""
_SCORES = {"detection": detection, "fuzz": fuzzing}


def label_features(
    store: FeatureStore,
    explainer: Explainer,
    features: Sequence[int] | None = None,
    *,
    scores: Sequence[str] = ("detection", "fuzz"),
    seed: int = 0,
    progress: bool = True,
) -> dict[str, int]:
    """Label features (all that fired, the sharpest first, by default) and score the labels.

    Labels stand in `store.labels`, below those written by hand; scores in `feature.scores`. Features that this explainer has
    labelled already are left out, so the same call goes on where it stopped. Returns how many were labelled, were left out, and
    got no usable answer. Raises `ValueError` for an unknown score, `SaelabError` if the explainer cannot be reached.
    """
    for name in scores:
        if name not in _SCORES:
            raise ValueError(f"scores={list(scores)!r}: {name!r} is unknown; there are {', '.join(_SCORES)}.")
    if isinstance(explainer, Endpoint):
        _LOG.info(f"Examples of {store.folder} are sent to {explainer.address} (model {explainer.model}).")
    chosen = list(features) if features is not None else store.features("sharpness", True, {"n_fired": (1, None)})
    known = {entry.feature for entry in store.annotations.latest("model_label", _name(explainer))}
    counts = {"labelled": 0, "left_out": 0, "unusable": 0}
    for index in tqdm(chosen, desc="Labels", unit="feature", disable=not progress):
        feature = store.feature(index)
        if index in known or not feature.n_fired:
            counts["left_out"] += 1
            continue
        counts["labelled" if _label(feature, explainer, scores, seed) else "unusable"] += 1
    return counts


def said(counts: dict[str, int]) -> str:
    """What `label_features` returned, in words."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def _label(feature: Feature, explainer: Explainer, scores: Sequence[str], seed: int) -> bool:
    """Whether there is a label; scores come before it, so that an interrupted feature is asked for again."""
    examples = feature.examples(N_SHOWN // 2) + feature.examples(kind="quantile")[2 :: 20 // (N_SHOWN // 2)]
    label = prompts.phrase(explainer.ask(prompts.explain(examples), 60))
    if label is None:
        return False
    shown = {one.where for one in examples}
    notes, name = feature.store.annotations, _name(explainer)
    for kind in scores:
        found: dict[str, Any] | None = _SCORES[kind](feature, label, explainer, shown, seed)
        if found is not None:
            notes.add(feature.feature, "score", found | {"label": label}, kind, author=name)
    notes.add(feature.feature, "model_label", label, name, author=name)
    return True


def _name(explainer: Explainer) -> str:
    """What labels of this explainer and these questions are recorded under."""
    questions = hashlib.sha256(f"{prompts.VERSION}".encode()).hexdigest()[:8]
    return f"{explainer.name} ({questions})"
