"""From texts and a language model to an activation cache: the one place where the cache meets a model.

Text is packed, run through the model up to the last hook, masked and handed to the writer. The limit on norms has to be
known before the first row is kept, so the first batches wait in memory until it is; no forward pass is done twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelab.activation_cache import format
from saelab.activation_cache.checks import check_arguments, finite_norms, warn_if_none_held_out
from saelab.activation_cache.journal import Journal, begin
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.storage import Storage, find_outliers, identity, kept_rows
from saelab.activation_cache.writer import CacheWriter
from saelab.files import claim_folder
from saelab.language_model import LanguageModel
from saelab.masking import MASK_RULE, Mask, NormRule
from saelab.models_together import hook_keys, names_and_hashes, together
from saelab.tokens import Texts, TokenBatch, document_id, load_texts, pack


def harvest(
    lm: LanguageModel | Sequence[LanguageModel],
    texts: Texts | str | Path | Mapping[str, Any] | Iterable[str],
    hook_names: str | Sequence[str],
    n_tokens: int,
    out_dir: str | Path,
    ctx_len: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    split: str = "train",
    shard_rows: int = 32_768,
    pool_shards: int = 16,
    prepend_bos: bool = False,
    max_bytes: int | None = None,
    progress: bool = True,
    storage: str = "bfloat16",
) -> ActivationCache:
    """Run `lm` over texts and store the activations at `hook_names`, shuffled, in `out_dir`.

    `n_tokens` packed tokens are read (rounded up to whole contexts of `ctx_len`; fewer where the texts end),
    `batch_size` contexts at a time, from the documents of `split`. Rows that the mask drops are counted, not stored.
    Rows leave in shards of `shard_rows`, drawn at random from `pool_shards` times as many, held in memory as they are
    stored (`storage`, see docs/cache.md). The same call again goes on where it stopped, or returns when finished.
    A list of models is read on the same tokens: each hook of each model, as "MODEL/HOOK".

    Raises `ValueError` for bad arguments, texts that leave no row, and an `out_dir` that holds something else or
    another cache; `CacheError` when it does not fit the disk or `max_bytes`, and for activations that are not finite
    or that `storage` cannot hold; `SaelabError` when the disk is full. What is written stays valid in each case.
    """
    hooks = hook_keys(lm := together(lm), hook_names)
    sizes = {"n_tokens": n_tokens, "ctx_len": ctx_len, "batch_size": batch_size}
    sizes |= {"shard_rows": shard_rows, "pool_shards": pool_shards}
    check_arguments(lm, hooks, split, sizes, seed)
    texts = load_texts(texts)
    config = identity_of(lm, texts, hooks) | identity(storage) | sizes
    config |= {"split": split, "prepend_bos": prepend_bos, "seed": seed}
    return _harvest_into(claim_folder(out_dir, format.JOURNAL, "cache"), lm, texts, config, max_bytes, progress)


def _harvest_into(
    folder: Path, lm: LanguageModel, texts: Texts, config: dict[str, Any], max_bytes: int | None, progress: bool
) -> ActivationCache:
    journal = Journal(folder)
    try:
        if not begin(folder, journal, config, _environment(lm)):
            print(f"Harvesting {texts.describe(config['split'])}.")
            warn_if_none_held_out(texts, config["split"], 3)
            n_sequences = math.ceil(config["n_tokens"] / config["ctx_len"])
            sizes = config["ctx_len"], config["hooks"], config["shard_rows"], config["dtype"]
            needed = format.estimate_bytes(n_sequences, *sizes)
            format.check_space(folder, needed, max_bytes)
            _Harvest(lm, texts, config, folder, journal).run(progress)
    finally:
        journal.close()
    cache = ActivationCache(folder)
    masked = ", ".join(f"{n:,} {reason}" for reason, n in cache.manifest["masked"].items())
    print(f"{cache.n_rows:,} rows in {folder} ({cache.manifest['n_tokens']:,} tokens; masked: {masked}).")
    return cache


def identity_of(lm: LanguageModel, texts: Texts, hooks: list[str]) -> dict[str, Any]:
    """What decides the bytes of a cache beside the numbers that the caller gives."""
    return {
        "model_hash": lm.hash,
        "tokenizer_hash": lm.tokenizer_hash,
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "hooks": {hook: lm.d_in(hook) for hook in hooks},
        "texts_fingerprint": texts.fingerprint(),
        "packing": "EOS between documents, attention not reset",
        "special_ids": sorted(lm.special_ids),
        "mask_rule": MASK_RULE,
    }


def _environment(lm: LanguageModel) -> dict[str, Any]:
    backend = torch.backends.cpu.get_cpu_capability() if torch.device(lm.device).type == "cpu" else torch.version.cuda
    threads = torch.get_num_threads()
    return {"torch": str(torch.__version__), "device": str(lm.device), "threads": threads, "backend": str(backend)}


def contexts(lm: LanguageModel, texts: Texts, config: Mapping[str, Any], documents: list[int]) -> Iterator[TokenBatch]:
    """Packed contexts of a cache of this config, up to the number asked for; `documents` gets the ids of those read."""
    left, batch_size = math.ceil(config["n_tokens"] / config["ctx_len"]), config["batch_size"]
    packed = pack(
        texts.documents(config["split"]), lm, config["ctx_len"], batch_size, config["prepend_bos"],
        on_document=lambda _, text: documents.append(document_id(text)),
    )  # fmt: skip
    for batch in islice(packed, math.ceil(left / batch_size)):
        n = min(left, len(batch.ids))
        left -= n
        yield TokenBatch(batch.ids[:n], batch.doc[:n], batch.first_sequence)


class _Harvest:
    """One run of `harvest` over one folder."""

    def __init__(self, lm: LanguageModel, texts: Texts, config: dict[str, Any], folder: Path, journal: Journal):
        self.lm, self.texts, self.config, self.journal = lm, texts, config, journal
        self.hooks = list(config["hooks"])
        self.documents: list[int] = []
        self.rule = NormRule(lm.special_ids)
        self.medians: dict[str, float] = {}
        self.mask: Mask | None = None
        for entry in journal.of_kind("mask"):
            self.medians, self.mask = entry["median_norm"], Mask(tuple(lm.special_ids), entry["max_norm"])
        for leftover in folder.rglob(".*.tmp-*"):
            leftover.unlink()
        self.writer = CacheWriter(folder, journal, config)
        for entry in journal.of_kind("storage"):
            self.writer.storage = Storage(config["dtype"], entry["outliers"])

    def run(self, progress: bool) -> None:
        waiting: list[tuple[TokenBatch, dict[str, Tensor], dict[str, Tensor]]] = []
        try:
            total = math.ceil(self.config["n_tokens"] / self.config["ctx_len"]) * self.config["ctx_len"]
            with tqdm(total=total, unit=" tokens", unit_scale=True, desc="Harvesting", disable=not progress) as bar:
                for batch, acts in self._activations(bar):
                    norms = finite_norms(
                        batch, acts, self.config["batch_size"], f"What is in {self.writer.folder} is intact."
                    )
                    if self.mask is None:
                        waiting.append((batch, acts, norms))
                        self.rule.add(batch, norms)
                        if self.rule.ready:
                            self._fix_mask(waiting)
                    else:
                        self._keep(batch, acts, norms)
            if self.mask is None:
                self._fix_mask(waiting)
            self._finish()
        except KeyboardInterrupt:
            self.writer.close()
            raise KeyboardInterrupt(self._kept()) from None
        finally:
            self.writer.close()

    def _kept(self) -> str:
        """What a repeated call need not do again, for the message of Ctrl-C."""
        rows = sum(entry["rows"] for entry in self.journal.of_kind("shard"))
        if rows:
            return f"{rows:,} activations are in {self.writer.folder}"
        pool, asked = self.writer.pool_rows, self.config["n_tokens"]
        return (
            f"No activation is on disk yet (the first {min(pool, asked):,} are shuffled in memory): "
            "this harvest begins anew"
        )

    def _activations(self, bar: tqdm) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
        """Batches that the writer needs, with their activations; all of them leave their tokens with the writer."""
        sent: deque[TokenBatch] = deque()

        def ids() -> Iterator[Tensor]:
            for batch in contexts(self.lm, self.texts, self.config, self.documents):
                self.writer.add_tokens(batch)
                if batch.first_sequence >= self.writer.start:
                    sent.append(batch)
                    yield batch.ids
                bar.update(batch.ids.numel())

        for acts in self.lm.stream_activations(ids(), self.hooks):
            yield sent.popleft(), acts

    def _keep(self, batch: TokenBatch, acts: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        assert self.mask is not None
        keep, counts = self.mask.apply_norms(batch, norms)
        self.writer.add(batch, acts, keep, counts)

    def _fix_mask(self, waiting: list[tuple[TokenBatch, dict[str, Tensor], dict[str, Tensor]]]) -> None:
        """Fix the limit on norms for good, then keep the rows of the batches that waited for it."""
        self.medians, limits = self.rule.medians(), self.rule.limits()
        self.mask = Mask(tuple(self.lm.special_ids), limits)
        if self.config["dtype"] == "int8":
            self._fix_outliers(waiting)
        self.journal.append({"kind": "mask", "median_norm": self.medians, "max_norm": limits, "rows": self.rule.n_rows})
        while waiting:
            self._keep(*waiting.pop(0))

    def _fix_outliers(self, waiting: Sequence[tuple[TokenBatch, dict[str, Tensor], dict[str, Tensor]]]) -> None:
        """Choose the columns that int8 leaves in bfloat16, for good, from the norm rule's rows that the mask keeps."""
        assert self.mask is not None
        keeps = [self.mask.apply_norms(batch, norms)[0] for batch, _, norms in waiting]
        outliers: dict[str, list[int]] = {}
        for hook in self.hooks if waiting else ():
            x = torch.cat([kept_rows(acts[hook], keep) for (_, acts, _), keep in zip(waiting, keeps, strict=True)])
            outliers[hook] = find_outliers(x)
            Storage("int8", outliers).check_error(hook, x)
        self.writer.storage = Storage("int8", outliers)
        self.journal.append({"kind": "storage", "outliers": outliers})

    def _finish(self) -> None:
        writer, config = self.writer, self.config
        if not writer.n_tokens:
            raise ValueError(f"no document in {self.texts.describe(config['split'])}: give more text or another split.")
        if not writer.n_rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in writer.counts.items())
            raise ValueError(
                f"the mask leaves nothing of the {writer.n_tokens} tokens of {self.texts.name} ({reasons}): "
                f"give more text."
            )
        if writer.n_tokens < config["n_tokens"]:
            print(f"The texts hold only {writer.n_tokens:,} of the {config['n_tokens']:,} tokens asked for: took all.")
        assert self.mask is not None
        assert self.mask.max_norm is not None
        ids = torch.tensor(self.documents[: writer.n_documents], dtype=torch.int64)
        contents = writer.finish(ids, self.medians)
        start = self.journal.of_kind("start")[0]
        writer.write_manifest(
            {
                "format_version": config["format_version"],
                "config": config,
                "config_hash": start["config_hash"],
                "environment": start["environment"],
                "model_name": self.lm.name,
                **({"models": models} if (models := names_and_hashes(self.lm)) else {}),
                "texts": self.texts.spec,
                "max_norm": dict(self.mask.max_norm),
                **contents,
            }
        )
