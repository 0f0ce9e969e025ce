"""From texts and a language model to an activation cache: the one place where the cache meets a model.

Text is packed, run through the model up to the last hook, masked and handed to the writer. The limit on norms has to be
known before the first row is kept, so the first batches wait in memory until it is; no forward pass is done twice.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelab.activation_cache import format
from saelab.activation_cache.journal import Journal, begin
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.score import refuse_steered
from saelab.activation_cache.storage import Storage, find_outliers, identity, kept_rows
from saelab.activation_cache.writer import CacheWriter
from saelab.arguments import check_integer
from saelab.contexts import ALONE, PACKED, contexts
from saelab.errors import CacheError
from saelab.files import claim_folder
from saelab.language_model import LanguageModel
from saelab.masking import MASK_RULE, Mask, NormRule, row_norms
from saelab.models_together import hook_keys, names_and_hashes, together
from saelab.tokens import Texts, TokenBatch, check_split, document_id, load_texts


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
    prepend_bos: bool = False,
    max_bytes: int | None = None,
    progress: bool = True,
    storage: str = "bfloat16",
    shuffle: bool = True,
    chat: bool = False,
) -> ActivationCache:
    """Run `lm` over texts and store the activations at `hook_names`, shuffled, in `out_dir`.

    `n_tokens` packed tokens are read (rounded up to whole contexts of `ctx_len`; fewer where the texts end),
    `batch_size` contexts at a time, from the documents of `split`. Rows that the mask drops are counted, not stored.
    Rows leave in shards of `shard_rows`, drawn at random from `pool_shards` times as many, held in memory as they are
    stored (`storage`). `shuffle=False` keeps them in the order of the texts; with `chat` these are lists of messages,
    each for the chat template and a context of its own. Of a list of models, read on the same tokens, hooks are named
    "MODEL/HOOK". docs/cache.md tells more. The same call again goes on where it stopped, or returns when finished.

    Raises `ValueError` for bad arguments, texts that leave no row, and an `out_dir` that holds something else or
    another cache; `CacheError` when it does not fit the disk or `max_bytes`, and for activations that are not finite
    or that `storage` cannot hold; `SaelabError` when the disk is full. What is written stays valid in each case.
    """
    hooks = hook_keys(lm := together(lm), hook_names)
    sizes = {"n_tokens": n_tokens, "ctx_len": ctx_len, "batch_size": batch_size}
    sizes |= {"shard_rows": shard_rows, "pool_shards": pool_shards}
    _check_arguments(lm, hooks, split, sizes, seed)
    texts = _conversations(texts, lm) if chat else load_texts(texts)
    config = _identity(lm, texts, hooks) | identity(storage) | sizes
    config |= {"split": split, "prepend_bos": prepend_bos, "seed": seed} | _modes(shuffle, chat)
    return _harvest_into(claim_folder(out_dir, format.JOURNAL, "cache"), lm, texts, config, max_bytes, progress)


def _harvest_into(
    folder: Path, lm: LanguageModel, texts: Texts, config: dict[str, Any], max_bytes: int | None, progress: bool
) -> ActivationCache:
    journal = Journal(folder)
    try:
        if not begin(folder, journal, config, _environment(lm)):
            print(f"Harvesting {texts.describe(config['split'])}.")
            if config["split"] == "train" and next(texts.documents("held_out"), None) is None:
                warnings.warn(
                    f"{texts.name} has no held-out document (a tenth of the documents on average), so an SAE trained on it "
                    "can only be measured on other texts (evaluate(texts=...), eval --texts). Give more, or shorter, documents.",
                    stacklevel=3,
                )
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


def _identity(lm: LanguageModel, texts: Texts, hooks: list[str]) -> dict[str, Any]:
    """What decides the bytes of a cache beside the numbers that the caller gives."""
    return {
        "model_hash": lm.hash,
        "tokenizer_hash": lm.tokenizer_hash,
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "hooks": {hook: lm.d_in(hook) for hook in hooks},
        "texts_fingerprint": texts.fingerprint(),
        "packing": PACKED,
        "special_ids": sorted(lm.special_ids),
        "mask_rule": MASK_RULE,
    }


def _modes(shuffle: bool, chat: bool) -> dict[str, Any]:
    """What a config says of modes that are not the default."""
    modes: dict[str, Any] = {} if shuffle else {"pool_shards": 1, "shuffle": False}
    modes |= {"packing": ALONE} if chat else {}
    return modes | ({"format_version": format.FORMAT_VERSION} if modes else {})


def _conversations(texts: Any, lm: LanguageModel) -> Texts:
    """Texts whose rows are lists of messages. Raises `ValueError` for others, and for a model without a template."""
    texts = load_texts(texts, chat=lm)
    first = next(row[texts.spec["column"]] for row in texts.rows())
    if "chat" not in texts.spec or isinstance(first, str):
        raise ValueError(
            f"chat=True harvests conversations, and {texts.name} begins with {str(first)[:40]!r}: give lists of "
            '{"role", "content"} messages, in a file of them their column (load_texts(..., column=, chat=lm); --column).'
        )
    return texts


def _check_arguments(lm: LanguageModel, hooks: list[str], split: str, sizes: dict[str, int], seed: int) -> None:
    check_split(split)
    for name, value in sizes.items():
        check_integer(name, value, 1)
    check_integer("seed", seed, 0)
    if not hooks or not all(isinstance(hook, str) for hook in hooks) or len(set(hooks)) < len(hooks):
        raise ValueError(f"hook_names={hooks!r}: give the name of a hook, or a list of names, each once.")
    refuse_steered(lm)
    for hook in hooks:
        lm.check_hook(hook)
    if sizes["ctx_len"] > lm.max_ctx:
        raise ValueError(f"ctx_len={sizes['ctx_len']} is more than the {lm.max_ctx} tokens that {lm.name} can read.")


def _environment(lm: LanguageModel) -> dict[str, Any]:
    backend = torch.backends.cpu.get_cpu_capability() if torch.device(lm.device).type == "cpu" else torch.version.cuda
    threads = torch.get_num_threads()
    return {"torch": str(torch.__version__), "device": str(lm.device), "threads": threads, "backend": str(backend)}


def cache_contexts(
    lm: LanguageModel, texts: Texts, config: Mapping[str, Any], documents: list[int]
) -> Iterator[TokenBatch]:
    """The contexts of a cache of this config; `documents` gets the ids of the documents read."""
    sizes = (config[name] for name in ("ctx_len", "batch_size", "prepend_bos", "packing", "n_tokens"))
    note = lambda _, text: documents.append(document_id(text))  # noqa: E731
    return contexts(texts.documents(config["split"]), lm, *sizes, on_document=note)


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
                    norms = self._finite_norms(batch, acts)
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
        return f"No activation is on disk yet (the first {min(pool, asked):,} wait in memory): this harvest begins anew"

    def _activations(self, bar: tqdm) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
        """Batches that the writer needs, with their activations; all of them leave their tokens with the writer."""
        sent: deque[TokenBatch] = deque()

        def ids() -> Iterator[Tensor]:
            for batch in cache_contexts(self.lm, self.texts, self.config, self.documents):
                self.writer.add_tokens(batch)
                if batch.first_sequence >= self.writer.start:
                    sent.append(batch)
                    yield batch.ids
                bar.update(batch.ids.numel())

        for acts in self.lm.stream_activations(ids(), self.hooks):
            yield sent.popleft(), acts

    def _finite_norms(self, batch: TokenBatch, acts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norms = row_norms(acts)
        for hook, norm in norms.items():
            bad = (~norm.isfinite()).cpu() & (batch.doc >= 0)
            if bad.any():
                first, last = batch.first_sequence, batch.first_sequence + len(batch.ids) - 1
                raise CacheError(
                    f"batch {first // self.config['batch_size']} (contexts {first} to {last}): {int(bad.sum())} of "
                    f"{bad.numel()} rows at {hook} are NaN or infinite. Load the model in another dtype "
                    f"(load_model(..., dtype=torch.float32)). What is in {self.writer.folder} is intact."
                )
        return norms

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
