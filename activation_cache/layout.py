"""On-disk layout of an activation cache: file names, manifest, sizes. Independent of the model.

manifest.json                      written last: a folder without it is unfinished
journal.jsonl                      append-only: one flushed line for the start, the norm limit, each finished file set
documents.safetensors              ids (n_documents) int64, in order of appearance
tokens/seq-000000.safetensors      ids, doc (n_sequences, ctx_len) int32; doc is a row of documents, -1 on padding
shards/r000-000000/index.safetensors   seq, pos, token (n_rows) int32, shared by all hooks
shards/r000-000000/HOOK.safetensors    acts (n_rows, d_in) in the cache's storage, and fp64 sums for the statistics
shards/.../HOOK.gradient.safetensors   the same of the gradient at the hook, in a cache with gradients; also in stats/
stats/HOOK.safetensors             mean, second_moment (d_in) fp64, mean_norm, median_norm, n

A harvest in blocks: block 7 has journals/r007.jsonl, tokens/r007-000000.safetensors and shards/r007-000000/.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from saelab.activation_cache.codec import row_bytes
from saelab.activation_cache.columns import columns_of
from saelab.errors import CacheError
from saelab.files import read_json, sha256_file
from saelab.tokens.packing import PACKED

_LOG = logging.getLogger("saelab")

FORMAT_VERSION = (
    4  # 1: bfloat16; 2: other storage (`codec.identity`); 3: a mode; 4: gradients. The lowest that suffices is written.
)
MODES_VERSION = 3
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
BLOCK_JOURNALS = "journals"
INDEX = "index.safetensors"
DOCUMENTS = "documents.safetensors"
CONTEXTS_PER_FILE = 4096
INDEX_BYTES = 12  # seq, pos, token: three int32 per row
TOKEN_BYTES = 8  # id and document: two int32 per token


def namespace(block: int) -> str:
    """File name prefix of a block."""
    return f"r{block:03d}"


def shard_folder(number: int, block: int = 0) -> str:
    """Path of a shard inside the cache."""
    return f"shards/{namespace(block)}-{number:06d}"


def tokens_file(number: int, block: int | None = None) -> str:
    """Path of a file of packed contexts inside the cache."""
    return f"tokens/{'seq' if block is None else namespace(block)}-{number:06d}.safetensors"


def block_journal(block: int) -> str:
    """Path of a block's journal inside the cache."""
    return f"{BLOCK_JOURNALS}/{namespace(block)}.jsonl"


def stats_file(hook_name: str) -> str:
    """Path of a hook's statistics inside the cache."""
    return f"stats/{hook_name}.safetensors"


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of everything that determines the bytes of a cache."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def origin(
    config: Mapping[str, Any],
    hook_name: str,
    model: Mapping[str, str],
    max_norm: float,
    texts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Where the rows of a hook come from, JSON-serialisable: an SAE trained on them stores it in `sae.json`."""
    return {
        "hook_name": hook_name,
        "model": model,
        "tokenizer_hash": config["tokenizer_hash"],
        "ctx_len": config["ctx_len"],
        "prepend_bos": config["prepend_bos"],
        "mask": {"max_norm": max_norm, "rule": config["mask_rule"]},
        "texts": texts,
        "dataset_fingerprint": config["texts_fingerprint"],
        "split": config["split"],
        **({"packing": config["packing"]} if config.get("packing", PACKED) != PACKED else {}),
    }


def seeded(*values: object) -> torch.Generator:
    """A generator seeded by `values` alone."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def block_of(config: Mapping[str, Any], context: int) -> int | None:
    """The block that holds a context; None if the harvest was not split into blocks."""
    return context // config["block_contexts"] if "block_contexts" in config else None


def shard_generator(config: Mapping[str, Any], number: int, block: int | None = None) -> torch.Generator | None:
    """Generator that draws a shard (of the cache or a block) from the shuffle buffer; None if rows keep their order."""
    if not config.get("shuffle", True):
        return None
    return seeded("shard", config["seed"], *(() if block is None else ("block", block)), number)


def human_bytes(n: int | float) -> str:
    """A number of bytes in readable form, e.g. 288.0 MB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def estimate_bytes(
    n_contexts: int, ctx_len: int, widths: Mapping[str, int], shard_rows: int, storage: str = "bfloat16"
) -> int:
    """Upper bound on the disk space of a cache in bytes: no token masked."""
    n_rows = n_contexts * ctx_len
    per_row = sum(row_bytes(storage, d) for d in widths.values()) + INDEX_BYTES + TOKEN_BYTES
    per_shard = sum(16 * d + 1024 for d in widths.values()) + 1024
    return n_rows * per_row + (n_rows // shard_rows + 2) * per_shard


def check_space(folder: Path, needed: int, max_bytes: int | None) -> None:
    """Log the disk space a cache will take. Raises `CacheError` if it exceeds `max_bytes` or the free space."""
    have = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process has just renamed it
            have += path.stat().st_size if path.is_file() else 0
    free = shutil.disk_usage(folder).free
    _LOG.info(f"The cache in {folder} will take up to {human_bytes(needed)} (free there: {human_bytes(free)}).")
    if max_bytes is not None and needed > max_bytes:
        raise CacheError(
            f"the cache would take up to {human_bytes(needed)}, more than max_bytes={max_bytes} "
            f"({human_bytes(max_bytes)}): lower n_tokens, harvest fewer hooks, or raise max_bytes."
        )
    if needed - have > free:
        raise CacheError(
            f"the cache would take up to {human_bytes(needed)}, but {folder} has {human_bytes(free)} free: "
            f"make room, lower n_tokens, or give an out_dir on another disk."
        )


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a finished file, as journal and manifest record them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def problem_of(path: Path, known: Mapping[str, Any], contents: bool = False) -> str | None:
    """What is wrong with a file: missing, wrong size or, with `contents`, wrong SHA-256. None if nothing is."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return "is missing"
    if size != known["bytes"]:
        return f"has {size} bytes instead of {known['bytes']}: it was truncated or altered"
    if contents and sha256_file(path) != known["sha256"]:
        return "does not contain what was written (SHA-256 differs): it was altered, or belongs to another cache"
    return None


FIX = "Restore it from a backup, or rebuild what is damaged: `saelab cache repair RUN`."


def check_file(path: Path, known: Mapping[str, Any], unit: str, contents: bool = False) -> None:
    """Raise `CacheError` naming `unit` if something is wrong with a file (`problem_of`)."""
    if problem := problem_of(path, known, contents):
        raise CacheError(f"{unit}: {path} {problem}. {FIX}")


def unit_of(file: str) -> str:
    """How messages name the part of the cache that a file belongs to."""
    return f"shard {'/'.join(file.split('/')[:2])}" if file.startswith("shards/") else file


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache. Raises `CacheError` for an unfinished, foreign or newer one."""
    if not (folder / MANIFEST).exists():
        unfinished = (folder / JOURNAL).exists()
        hint = (
            "it is unfinished: repeat the same harvest call to resume it" if unfinished else "harvest one there first"
        )
        raise CacheError(f"{str(folder)!r} holds no finished activation cache; {hint}.")
    manifest = read_json(folder / MANIFEST)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise CacheError(
            f"{folder / MANIFEST} is not the manifest of an activation cache (format_version={version!r})."
        )
    if version > FORMAT_VERSION:
        raise CacheError(
            f"{folder} has cache format {version}, but this saelab reads up to {FORMAT_VERSION}: install a newer saelab."
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CacheError(
            f"{folder / MANIFEST} was altered ({error if isinstance(error, ValueError) else repr(error)}): restore it "
            "from a backup, or delete the cache and harvest again."
        ) from error
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise `ValueError`, or whatever a missing or malformed value raises, unless a reader can rely on the manifest."""
    if manifest["config_hash"] != config_hash(manifest["config"]):
        raise ValueError("its config is not the one that was harvested")
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if manifest["n_rows"] != rows or not rows:
        raise ValueError(f"it says {manifest['n_rows']} rows, but its {len(manifest['shards'])} shards hold {rows}")
    _ = manifest["model_name"], manifest["texts"], manifest["documents"], manifest["tokens"], manifest["n_tokens"]
    if manifest["config"]["dtype"] != "bfloat16":
        _ = manifest["storage"]["error"], manifest["storage"]["outliers"]
    _ = [manifest["max_norm"][hook] for hook in manifest["config"]["hooks"]]
    for column in columns_of(manifest["config"]):
        _ = manifest["stats"][column]
        for shard in manifest["shards"]:
            _ = shard["folder"], shard["files"][f"{column}.safetensors"], shard["files"][INDEX]
