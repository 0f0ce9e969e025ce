"""Documents of Hugging Face datasets: streamed from a fixed commit, read from the cache when offline, or saved to disk."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from saelab.files import sha256_file
from saelab.tokens.containers import Source, choose_split, known_column, rows_of


def open_hub(name: str, column: str, config: str | None, hub_split: str, revision: str | None) -> Source:
    """Open a dataset by its id. Raises `ValueError` if it cannot be loaded, saying what was tried."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        data, revision = (_cached if offline else _streamed)(name, config, hub_split, revision)
    except Exception as error:  # the two libraries share no base class for "not found" and "no network"
        raise ValueError(
            f"{name!r} is not a file here and could not be opened as a Hugging Face dataset (config={config!r}, "
            f"hub_split={hub_split!r}, revision={revision!r}{', HF_HUB_OFFLINE is set' if offline else ''}): "
            f"{type(error).__name__}: {error}"
        ) from error
    spec = {"source": name, "column": column, "config": config, "hub_split": hub_split, "revision": revision}
    known = hashlib.sha256(repr(spec).encode()).hexdigest
    return Source(name, spec, column, lambda _: iter(data), known)


def _streamed(name: str, config: str | None, hub_split: str, revision: str | None) -> tuple[Any, str | None]:
    import datasets
    import huggingface_hub

    # The commit is pinned, so that reopening the texts yields the same documents.
    revision = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    return datasets.load_dataset(name, config, split=hub_split, revision=revision, streaming=True), revision


def _cached(name: str, config: str | None, hub_split: str, revision: str | None) -> tuple[Any, str | None]:
    """The dataset from the cache of `datasets`, whose folders are named by the commit they hold."""
    import datasets

    data: Any = datasets.load_dataset(name, config, split=hub_split, revision=revision)
    folders = {Path(file["filename"]).parent.name for file in data.cache_files}
    commit = next((folder for folder in folders if re.fullmatch("[0-9a-f]{40}", folder)), None)
    if len(folders) != 1 or commit is None:
        raise ValueError(f"its cache ({', '.join(sorted(folders)) or 'in memory'}) does not say which commit it holds")
    if revision not in (None, commit):
        raise ValueError(f"the cache holds commit {commit}: request that one, or omit revision")
    return data, commit


def is_saved(path: Path) -> bool:
    """Whether `path` is a folder that `open_saved` can read."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(path: Path, column: str, split: str | None) -> Source:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    folder, chosen = path, {}
    if (path / "dataset_dict.json").is_file():
        split = choose_split(json.loads((path / "dataset_dict.json").read_text())["splits"], split)
        path, chosen = path / split, {"folder_split": split}
    rows = rows_of(datasets.load_from_disk(str(path)), column, None)
    column = known_column(rows.read, column)
    spec = {"source": str(folder), "column": column} | chosen
    files = [path / entry["filename"] for entry in json.loads((path / "state.json").read_text())["_data_files"]]

    def content_hash() -> str:
        return hashlib.sha256("\n".join(map(sha256_file, files)).encode()).hexdigest()

    return Source(folder.name, spec, column, rows.read, content_hash)
