"""Harvesting: from texts and a language model to an activation cache.

The arguments are checked here and become the config of the cache; `forward_pass` does the work, for one block or the whole cache.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from saelab.activation_cache import layout
from saelab.activation_cache.blocks import calibrate, harvest_blocks
from saelab.activation_cache.calibration import Calibration
from saelab.activation_cache.checks import check_arguments, warn_if_none_held_out
from saelab.activation_cache.codec import identity
from saelab.activation_cache.columns import LOSS, columns_of
from saelab.activation_cache.forward_pass import Reading, finish, run_pass
from saelab.activation_cache.journal import Journal, begin, begun_with
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.writer import CacheWriter
from saelab.files import claim_folder
from saelab.identity import differences, of_rows
from saelab.models.language_model import LanguageModel
from saelab.models.multi_model import hook_keys, together
from saelab.tokens import Texts, load_texts
from saelab.tokens.documents import token_ids
from saelab.tokens.packing import UNPACKED
from saelab.tokens.tokenizing import Bos, resolved_bos
from saelab.validation import check_integer

_LOG = logging.getLogger("saelab")


def harvest(
    lm: LanguageModel | Sequence[LanguageModel],
    texts: Texts | str | Path | Mapping[str, Any] | Iterable[Any],
    hook_names: str | Sequence[str],
    n_tokens: int,
    out_dir: str | Path,
    ctx_len: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    split: str = "train",
    shard_rows: int = 32_768,
    pool_shards: int = 16,
    prepend_bos: Bos = None,
    max_bytes: int | None = None,
    progress: bool = True,
    storage: str = "bfloat16",
    shuffle: bool = True,
    chat: bool = False,
    block_contexts: int | None = None,
    gradients: bool = False,
) -> ActivationCache:
    """Run `lm` over texts and store the activations at `hook_names`, shuffled, in `out_dir`; see docs/cache.md.

    Reads `n_tokens` packed tokens of `split` (rounded up to contexts), `batch_size` contexts at a time; writes the rows that the
    mask keeps in shards of `shard_rows`, from a buffer of `pool_shards` shards. Repeating the call resumes it. With `chat` texts
    are conversations; `block_contexts` splits the work among processes; `gradients` also stores the gradient of the loss.

    Raises `ValueError` for bad arguments, no row, or an `out_dir` that holds something else; `CacheError` if rows are not finite
    or do not fit `max_bytes` or `storage`; `SaelabError` on a full disk. What was written is kept.
    """
    hooks = hook_keys(lm := together(lm), hook_names)
    sizes = {"n_tokens": n_tokens, "ctx_len": ctx_len, "batch_size": batch_size}
    sizes |= {"shard_rows": shard_rows, "pool_shards": pool_shards}
    check_arguments(lm, hooks, split, sizes, seed, gradients)
    texts = _conversations(texts, lm) if chat else load_texts(texts)
    modes = _modes(shuffle, chat, block_contexts, batch_size, gradients)
    config = of_rows(lm, texts, hooks) | identity(storage) | sizes | modes
    config |= {"split": split, "prepend_bos": _bos(lm, prepend_bos, Path(out_dir)), "seed": seed}
    folder = claim_folder(out_dir, layout.JOURNAL, "cache")
    return _harvest_into(folder, lm, texts, _as_begun(config, folder), max_bytes, progress)


def _bos(lm: LanguageModel, prepend_bos: Bos, folder: Path) -> bool | list[int]:
    """`prepend_bos` if given, else that of the harvest already begun in `folder`, else the tokenizer's default."""
    begun = begun_with(folder) if prepend_bos is None else {}
    return begun.get("prepend_bos", resolved_bos(lm, prepend_bos))


def _as_begun(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with the logits probe of the harvest already begun in `folder`, if they differ only by rounding between
    machines: processes that share a harvest write the same config."""
    begun = config | {"logits_probe": begun_with(folder).get("logits_probe", config["logits_probe"])}
    return config if differences(begun, config) else begun


def _harvest_into(
    folder: Path, lm: LanguageModel, texts: Texts, config: dict[str, Any], max_bytes: int | None, progress: bool
) -> ActivationCache:
    reading, blocks = Reading(lm, texts, config), "block_contexts" in config
    environment = _environment(lm)
    if blocks:  # any of several GPUs will do
        environment["device"] = torch.device(lm.device).type
    with closing(Journal(folder, wait=blocks)) as journal:
        finished, calibration = begin(folder, journal, config, environment), Calibration(lm, config, journal)
        if not finished:
            _announce(folder, texts, config, max_bytes)
            if blocks:
                calibrate(reading, calibration)
            else:
                _harvest_stream(folder, reading, calibration, journal, progress)
    if blocks and not finished:
        harvest_blocks(folder, reading, calibration, progress)
    cache = ActivationCache(folder)
    masked = ", ".join(f"{n:,} {reason}" for reason, n in cache.manifest["masked"].items())
    _LOG.info(f"{cache.n_rows:,} rows in {folder} ({cache.manifest['n_tokens']:,} tokens; masked: {masked}).")
    return cache


def _announce(folder: Path, texts: Texts, config: dict[str, Any], max_bytes: int | None) -> None:
    """Log what is harvested and the disk space it takes. Raises `CacheError` if it does not fit."""
    _LOG.info(f"Harvesting {texts.describe(config['split'])}.")
    warn_if_none_held_out(texts, config["split"], 4)
    n_contexts = math.ceil(config["n_tokens"] / config["ctx_len"])
    sizes = config["ctx_len"], columns_of(config), config["shard_rows"], config["dtype"]
    layout.check_space(folder, layout.estimate_bytes(n_contexts, *sizes), max_bytes)


def _harvest_stream(folder: Path, reading: Reading, calibration: Calibration, journal: Journal, progress: bool) -> None:
    """The default: one process, one pass."""
    for leftover in folder.rglob(".*.tmp-*"):
        leftover.unlink()
    writer = CacheWriter(folder, journal, reading.config)
    run_pass(reading.lm, reading.batches(progress), calibration, writer)
    finish(folder, reading, calibration, journal.of_kind("start")[0], journal.entries, writer.counts)


def _modes(shuffle: bool, chat: bool, block_contexts: int | None, batch_size: int, gradients: bool) -> dict[str, Any]:
    """The config entries of modes other than the default. Raises `ValueError` if a block would split a batch."""
    modes: dict[str, Any] = {} if shuffle else {"pool_shards": 1, "shuffle": False}
    modes |= {"packing": UNPACKED} if chat else {}
    if block_contexts is not None:
        check_integer("block_contexts", block_contexts, 1)
        if block_contexts % batch_size:
            raise ValueError(f"block_contexts={block_contexts} must be a multiple of batch_size={batch_size}.")
        modes["block_contexts"] = block_contexts
    if gradients:
        return modes | {"gradients": LOSS, "format_version": layout.FORMAT_VERSION}
    return modes | ({"format_version": layout.MODES_VERSION} if modes else {})


def _conversations(texts: Any, lm: LanguageModel) -> Texts:
    """Texts whose rows are lists of messages. Raises `ValueError` for any others, and for a model without a chat template."""
    texts = load_texts(texts, chat=lm)
    first = next(row[texts.spec["column"]] for row in texts.rows())
    if "chat" not in texts.spec or isinstance(first, str) or token_ids(first):
        raise ValueError(
            f"chat=True expects conversations, but {texts.name} begins with {str(first)[:40]!r}: give lists of "
            '{"role", "content"} messages; for a file, name their column (load_texts(..., column=, chat=lm); --column).'
        )
    return texts


def _environment(lm: LanguageModel) -> dict[str, Any]:
    backend = torch.backends.cpu.get_cpu_capability() if torch.device(lm.device).type == "cpu" else torch.version.cuda
    threads = torch.get_num_threads()
    return {"torch": str(torch.__version__), "device": str(lm.device), "threads": threads, "backend": str(backend)}
