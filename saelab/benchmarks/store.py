"""`python -m saelab.benchmarks.store FOLDER`: how fast a large feature store answers.

The first call makes a RUN in FOLDER: a TopK SAE with random weights on a real language model, and its store; random features
fire on many tokens each, so that every list is full. Later calls open it. One CSV row of milliseconds: `feature(i)` with what
its page shows, the slowest page of the table by any column, searches by words and by a token, neighbours and co-activation.
The dashboard on it is `saelab dash FOLDER`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from saelab.benchmarks.results import to_csv
from saelab.features import FeatureStore, schema
from saelab.interop import save_sae
from saelab.models import load_model
from saelab.saes import TopKConfig, TopKSAE
from saelab.tokens import load_texts

PAGE = 50


def opened(folder: Path, model: str, hook_name: str, d_sae: int, n_tokens: int) -> FeatureStore:
    """The store in `folder`, made if it is not there."""
    import torch

    from saelab.features.collecting.collect import collect_features

    lm = load_model(model)
    torch.manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=d_sae, k=64, normalize="none"), lm.d_model)
    if not (folder / "sae").exists():
        save_sae(sae, folder / "sae")
    return collect_features(
        sae, lm, load_texts("demo"), out_dir=folder / "features", hook_name=hook_name, n_tokens=n_tokens, split="all"
    )


def milliseconds(calls: Iterable[Callable[[], Any]]) -> list[float]:
    """Of each call, in ascending order."""
    found = []
    for call in calls:
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return sorted(found)


def card(store: FeatureStore, feature: int) -> None:
    """What the page of a feature shows of the store."""
    found = store.feature(feature)
    _ = found.examples(), found.histogram, found.promoted, found.label


def measured(store: FeatureStore) -> dict[str, float]:
    """The row of a store."""
    chance = random.Random(0)
    words = ["weather", "king", "the lord", "don", "morning", "and", "zeppelin quartz"]
    features = [chance.randrange(store.d_sae) for _ in range(400)]
    store.feature(features[0]).examples()  # the first call opens the files
    cards = milliseconds(lambda i=i: card(store, i) for i in features)
    pages = milliseconds(
        lambda sort=sort, down=down, offset=offset: store.table(sort, down, limit=PAGE, offset=offset)
        for sort in schema.SORTABLE
        for down in (True, False)
        for offset in (0, store.d_sae // 2, store.d_sae - PAGE)
    )
    filtered = milliseconds(
        lambda low=low: store.table("sharpness", where={"density": (low, None)}) for low in (1e-5, 1e-4, 1e-3, 1e-2)
    )
    store.neighbours(features[0])
    return {
        "d_sae": store.d_sae, "n_tokens": store.n_tokens,
        "feature_p95": cards[int(0.95 * len(cards))], "table_largest": pages[-1], "filtered_largest": filtered[-1],
        "search_largest": milliseconds(lambda word=word: store.search(word) for word in words)[-1],
        "firing_on_largest": milliseconds(lambda token=token: store.firing_on(token) for token in (" the", ",", " don", "Q"))[-1],
        "neighbours": statistics.median(milliseconds(lambda i=i: store.neighbours(i) for i in features[:20])),
        "coactivation": statistics.median(milliseconds(lambda i=i: store.coactivation(i) for i in features[:20])),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--hook-name", default="blocks.14.hook_resid_post")
    parser.add_argument("--d-sae", type=int, default=100_000)
    parser.add_argument("--n-tokens", type=int, default=40_000)
    given = parser.parse_args(arguments)
    store = opened(given.folder, given.model, given.hook_name, given.d_sae, given.n_tokens)
    print(to_csv([{name: round(value, 2) for name, value in measured(store).items()}]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
