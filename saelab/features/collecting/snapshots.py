"""A small store for each snapshot of a training run, all of the same contexts, to compare with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab.errors import SaelabError
from saelab.features.collecting.collect import collect_features
from saelab.features.store import FeatureStore
from saelab.interop import load_sae
from saelab.runs import find_snapshots

N_TOKENS = 65_536
"""So many are all in the token sample, on which firings are compared."""


def collect_snapshots(
    sae_dir: str | Path, lm: Any, texts: Any = None, *, n_tokens: int = N_TOKENS, **options: Any
) -> list[FeatureStore]:
    """Collect the features of each snapshot in the folder of an SAE (`TrainConfig.snapshot_every`): one store for
    each beside it, from the earliest step on.

    All read the first `n_tokens` tokens of the same texts, so that they see the same contexts; `options` are those of
    `collect_features` but for `out_dir`. Stores that are there are only opened. Raises `SaelabError` if there is no snapshot.
    """
    found = find_snapshots(sae_dir)
    if not found:
        raise SaelabError(
            f"{sae_dir} holds no snapshots: train with TrainConfig(snapshot_every=N), or saelab train ... --snapshot-every N."
        )
    device = lm[0].device if isinstance(lm, list | tuple) else lm.device
    return [
        collect_features(
            load_sae(one.sae_dir).to(device), lm, texts, out_dir=one.features_dir, n_tokens=n_tokens, **options
        )
        for one in found
    ]
