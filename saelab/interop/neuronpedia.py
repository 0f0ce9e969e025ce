"""A feature store as Neuronpedia exports its own: gzipped JSON lines of features and of their examples.

`MODEL/LAYER-SET/features/batch-N.jsonl.gz` holds a line for each feature, `activations/batch-N.jsonl.gz` one for each example;
`source.jsonl` and `model.jsonl` name what they belong to. These are the files of Neuronpedia's public datasets, so what reads
those reads a store.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saelab.files import atomic_path, atomic_write_text
from saelab.interop.sae_dashboard import example_values, layer_of_store, tables

BATCH = 2048
"""Features per file."""
_NEVER = {"hasVector": False, "vector": [], "vectorLabel": None, "topkCosSimIndices": [], "topkCosSimValues": []}
_NO_ATTRIBUTION = {
    "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None, "lossValues": [], "logitContributions": None,
    "binMin": None, "binMax": None, "binContains": None, "dataIndex": None, "dataSource": None,
}  # fmt: skip


def save_store(store: Any, folder: str | Path, *, batch_size: int = BATCH) -> list[Path]:
    """Write all features of `store`, which `load_features` returns, and their examples; returns the files."""
    model, source = _ids(store)
    home = Path(folder) / model / source
    files: list[Path] = []
    for number, start in enumerate(range(0, len(store), batch_size)):
        chosen = [store.feature(index) for index in range(start, min(start + batch_size, len(store)))]
        where = {"modelId": model, "layer": source}
        features = ({**where, **_feature(store, feature)} for feature in chosen)
        examples = ({**where, **one} for feature in chosen for one in _examples(feature))
        files.append(_write(home / "features" / f"batch-{number}.jsonl.gz", features))
        files.append(_write(home / "activations" / f"batch-{number}.jsonl.gz", examples))
    about = {
        "id": source,
        "modelId": model,
        "setName": source.partition("-")[2],
        "dataset": store.manifest["texts"]["name"],
    }
    sizes = {"num_prompts": store.manifest["n_sequences"], "num_tokens_in_prompt": store.manifest["ctx_len"]}
    atomic_write_text(home / "source.jsonl", json.dumps(about | sizes | {"visibility": "PUBLIC"}) + "\n")
    atomic_write_text(home / "model.jsonl", json.dumps({"id": model, "displayName": model}) + "\n")
    return [*files, home / "source.jsonl", home / "model.jsonl"]


def _ids(store: Any) -> tuple[str, str]:
    """Ids of the model and of the source: letters, digits, dots and dashes, as both become names of folders."""
    model = _plain(Path(str(store.manifest["model"]["name"])).name)
    hook = store.hook_name.rpartition(".")[2].removeprefix("hook_")
    return model, _plain(f"{layer_of_store(store)}-saelab-{store.manifest['sae']['variant']}-{hook}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unknown"


def _feature(store: Any, feature: Any) -> dict[str, Any]:
    largest = feature.max or 0.0
    return {"index": feature.feature, "maxActApprox": largest, "hookName": store.hook_name, **_NEVER, **tables(feature)}


def _examples(feature: Any) -> Iterable[dict[str, Any]]:
    for rank, example in enumerate(feature.examples()):
        tokens, values = example_values(example)
        yield {
            "id": f"{feature.feature}-{rank}",
            "index": feature.feature,
            "tokens": tokens,
            "values": values,
            "maxValue": max(values),  # of another document's token, where that stands in the window and is larger
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "qualifyingTokenIndex": example.peak,
            **_NO_ATTRIBUTION,
        }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Gzipped JSON lines without a time, so that the same store gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), 6, mtime=0))
    return path
