"""A feature store as SAEDashboard's files, `batch-N.json`, which Neuronpedia's importer reads.

A feature's tables that a store does not hold (aligned neurons, correlated features) are empty, as is the histogram of all logits.
The strongest examples stand in one group, as SAEDashboard marks its "top activations".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saelab.files import atomic_write_json

BATCH = 128
_TOP = -1.0
"""Bin limits of the group of strongest examples."""
_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
    "vector",
)  # fmt: skip


def save_store(store: Any, folder: str | Path, *, batch_size: int = BATCH) -> list[Path]:
    """Write the features that fired, `batch_size` per file; returns the files. `store` is what `load_features` returns."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alive = [feature for feature in range(len(store)) if store.feature(feature).n_fired]
    files: list[Path] = []
    for start in range(0, len(alive), batch_size):
        features = [_feature(store, index) for index in alive[start : start + batch_size]]
        files.append(folder / f"batch-{len(files)}.json")
        atomic_write_json(files[-1], _header(store) | {"features": features})
    return files


def layer_of_store(store: Any) -> int:
    """The layer of the store's hook; 0 for a hook outside the layers."""
    layer = re.search(r"blocks\.(\d+)\.", store.hook_name)
    return int(layer.group(1)) if layer else 0


def _header(store: Any) -> dict[str, Any]:
    return {
        "model_id": store.manifest["model"]["name"],
        "layer": layer_of_store(store),
        "sae_set": f"{store.manifest['sae']['variant']}-{store.hook_name.rpartition('.')[2]}",
        "sae_id_suffix": None,
    }


def _feature(store: Any, index: int) -> dict[str, Any]:
    feature, manifest = store.feature(index), store.manifest
    return {
        "feature_index": index,
        **tables(feature),
        "n_prompts_total": int(manifest["n_sequences"]),
        "n_tokens_in_prompt": int(manifest["ctx_len"]),
        "dataset": str(manifest["texts"]["name"]),
        "activations": list(_examples(feature)),
    }


def tables(feature: Any) -> dict[str, Any]:
    """Density, histogram and logits of a feature under the names of SAEDashboard and Neuronpedia."""
    logits, histogram = feature.top_logits, feature.histogram
    edges = histogram.edges
    return {
        **{name: [] for name in _EMPTY},
        "neg_str": [token for token, _ in logits.negative],
        "neg_values": [float(value) for _, value in logits.negative],
        "pos_str": [token for token, _ in logits.positive],
        "pos_values": [float(value) for _, value in logits.positive],
        "frac_nonzero": float(feature.density),
        "freq_hist_data_bar_values": [float(middle) for middle in (edges[1:] + edges[:-1]) / 2],
        "freq_hist_data_bar_heights": [float(count) for count in histogram.counts],
    }


def _examples(feature: Any) -> Iterator[dict[str, Any]]:
    for example in feature.examples():
        tokens, values = example_values(example)
        marks = {"bin_min": _TOP, "bin_max": _TOP, "bin_contains": _TOP, "qualifying_token_index": int(example.peak)}
        yield {**marks, "tokens": tokens, "values": values}


def example_values(example: Any) -> tuple[list[str], list[float]]:
    """The tokens of an example as text, and the feature's activation on each."""
    return [piece.decode("utf-8", "replace") for piece in example.pieces], [float(value) for value in example.values]
