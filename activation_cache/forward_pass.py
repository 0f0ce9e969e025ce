"""The forward pass of a harvest: contexts go through the model and the mask to the writer; the manifest is written last."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelab.activation_cache import layout
from saelab.activation_cache.calibration import Calibration, Read
from saelab.activation_cache.checks import finite_norms
from saelab.activation_cache.columns import gradient_of, has_loss
from saelab.activation_cache.journal import rows_on_disk
from saelab.activation_cache.manifest import Totals, contents
from saelab.activation_cache.writer import CacheWriter
from saelab.files import atomic_write_json
from saelab.models.language_model import LanguageModel
from saelab.models.loss_gradients import activations_and_gradients
from saelab.models.multi_model import names_and_hashes
from saelab.tokens import Texts, TokenBatch, document_id
from saelab.tokens.packing import contexts

_LOG = logging.getLogger("saelab")


class Reading:
    """The contexts of a cache in order, readable repeatedly; `documents` and `totals` are those of the most recent reading."""

    def __init__(self, lm: LanguageModel, texts: Texts, config: Mapping[str, Any]):
        self.lm, self.texts, self.config = lm, texts, config
        self.documents: list[int] = []
        """`document_id` of each document read."""
        self.totals = Totals()

    def batches(self, progress: bool = False) -> Iterator[TokenBatch]:
        """Batches of contexts, from the first on."""
        config = self.config
        documents, totals = self.documents, self.totals = [], Totals()
        sizes = (config[name] for name in ("ctx_len", "batch_size", "prepend_bos", "packing", "n_tokens"))
        note = lambda _, document: documents.append(document_id(document))  # noqa: E731
        batches = contexts(self.texts.documents(config["split"], self.lm), self.lm, *sizes, on_document=note)
        n_tokens = -(-config["n_tokens"] // config["ctx_len"]) * config["ctx_len"]
        with tqdm(total=n_tokens, unit=" tokens", unit_scale=True, desc="Harvesting", disable=not progress) as bar:
            for batch in batches:
                totals.add(batch)
                yield batch
                bar.update(int((batch.doc >= 0).sum()))

    def document_ids(self) -> Tensor:
        """Ids of the documents that contributed a token, (n_documents) int64."""
        return torch.tensor(self.documents[: self.totals.n_documents], dtype=torch.int64)


def read_model(lm: LanguageModel, config: Mapping[str, Any], batches: Iterable[TokenBatch]) -> Iterator[Read]:
    """The columns of each batch. Raises `CacheError` for non-finite rows, naming the batch."""
    for batch, columns in read_columns(lm, config, batches):
        norms = finite_norms(batch, columns, config["batch_size"], "Rows already on disk are intact.")
        yield Read(batch, columns, {hook: norms[hook] for hook in config["hooks"]})


def read_columns(
    lm: LanguageModel, config: Mapping[str, Any], batches: Iterable[TokenBatch]
) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
    """Each batch with its columns: the activations of each hook, and the gradients if the cache has them."""
    hooks, sent = list(config["hooks"]), deque[TokenBatch]()
    if "gradients" in config:
        for batch in batches:
            activations, gradients = activations_and_gradients(lm, batch.ids, hooks, batch.doc >= 0)
            yield batch, activations | {gradient_of(hook): g for hook, g in gradients.items()}
        return

    def ids() -> Iterator[Tensor]:
        for batch in batches:
            sent.append(batch)
            yield batch.ids

    for activations in lm.stream_activations(ids(), hooks):
        yield sent.popleft(), activations


def run_pass(lm: LanguageModel, batches: Iterable[TokenBatch], calibration: Calibration, writer: CacheWriter) -> None:
    """Run the model on the batches from `writer.start` on, and write the rows that the mask keeps."""

    def needed() -> Iterator[TokenBatch]:
        for batch in batches:
            writer.add_tokens(batch)
            if batch.first_context >= writer.start:
                yield batch

    def keep(ready: Iterable[Read]) -> None:
        writer.storage = calibration.storage
        for read in ready:
            assert calibration.mask is not None
            keep, counts = calibration.mask.apply_norms(read.batch, read.norms)
            if "gradients" in writer.config:
                without = keep & ~has_loss(read.batch)
                keep, counts = keep & ~without, counts | {"no_loss": int(without.sum())}
            writer.add(read.batch, read.columns, keep, counts)

    try:
        for read in read_model(lm, writer.config, needed()):
            keep(calibration.add(read))
        keep(calibration.finish())
        writer.flush()
    except KeyboardInterrupt:
        writer.close()
        raise KeyboardInterrupt(_kept(writer)) from None
    finally:
        writer.close()


def _kept(writer: CacheWriter) -> str:
    """What a repeated call need not compute again, for the message on Ctrl-C."""
    if rows := rows_on_disk(writer.folder):
        return f"{rows:,} activations are in {writer.folder}"
    buffer, asked = writer.buffer_rows, writer.config["n_tokens"]
    return f"No activations are on disk yet (the first {min(buffer, asked):,} wait in memory): this harvest will start again"


def finish(
    folder: Path,
    reading: Reading,
    calibration: Calibration,
    start: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    counts: Mapping[str, int],
) -> None:
    """Write documents, statistics and, last, the manifest, from the journals' `start` and `entries`.

    Raises `ValueError` if the texts hold no token, or the mask drops all of them.
    """
    totals, texts, config = reading.totals, reading.texts, start["config"]
    if not totals.n_tokens:
        raise ValueError(f"no document in {texts.describe(config['split'])}: give more text or another split.")
    if not any(entry["kind"] == "shard" for entry in entries):
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        raise ValueError(f"the mask drops all {totals.n_tokens} tokens of {texts.name} ({reasons}): give more text.")
    if totals.n_tokens < config["n_tokens"]:
        _LOG.info(
            f"The texts hold only {totals.n_tokens:,} of the {config['n_tokens']:,} tokens requested: all were used."
        )
    assert calibration.mask is not None
    assert calibration.mask.max_norm is not None
    manifest = {
        "format_version": config["format_version"],
        "config": config,
        "config_hash": start["config_hash"],
        "environment": start["environment"],
        "model_name": reading.lm.name,
        **({"models": models} if (models := names_and_hashes(reading.lm)) else {}),
        "texts": texts.spec,
        "max_norm": dict(calibration.mask.max_norm),
        **contents(
            folder, config, entries, totals, counts, calibration.storage, reading.document_ids(), calibration.medians
        ),
    }
    atomic_write_json(folder / layout.MANIFEST, manifest)
