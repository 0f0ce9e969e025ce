"""Rebuilding the damaged files of a finished cache, and only those, byte for byte.

A shard's contents are a function of the texts, the model and the seed: the rows that the mask keeps go through the shuffle
buffer in order, and each shard is drawn from it by a generator that depends on its number. So the contexts whose rows a
broken shard held are run through the model again; if its index is lost too, the draws are replayed with indices only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, groupby

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelab.activation_cache import layout
from saelab.activation_cache.codec import Storage, kept_rows
from saelab.activation_cache.columns import columns_of, has_loss
from saelab.activation_cache.forward_pass import Reading, read_columns
from saelab.activation_cache.journal import Journal
from saelab.activation_cache.manifest import save_stats
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.shuffle_buffer import ShuffleBuffer
from saelab.activation_cache.writer import save_index, save_rows
from saelab.errors import CacheError
from saelab.files import atomic_save_safetensors, atomic_write_json
from saelab.models.language_model import LanguageModel
from saelab.tokens import Texts, TokenBatch
from saelab.tokens.mask import Mask, row_norms, token_mask


def repair(cache: ActivationCache, lm: LanguageModel, texts: Texts, progress: bool = True) -> dict[str, bool]:
    """Rebuild damaged files; returns, per file, whether it has its original bytes. If not, the manifest records the new ones.

    Bytes may differ under another torch version, device or thread count. Raises `ValueError` if the model, tokenizer or
    texts are not those the cache was made with, `CacheError` while another process writes to it.
    """
    config = cache.manifest["config"]
    for name, here in (
        ("model_hash", lm.hash),
        ("tokenizer_hash", lm.tokenizer_hash),
        ("texts_fingerprint", texts.fingerprint()),
    ):
        if here != config[name]:
            raise ValueError(f"{cache.path} was made with another {name}: {config[name]}, not {here}.")
    journal = Journal(cache.path)
    try:
        damaged = cache.damaged(progress)
        return _Repair(cache, lm, texts, damaged, journal).run(progress) if damaged else {}
    finally:
        journal.close()


class _Repair:
    """One repair of one cache."""

    def __init__(
        self, cache: ActivationCache, lm: LanguageModel, texts: Texts, damaged: Mapping[str, str], journal: Journal
    ) -> None:
        self.cache, self.lm, self.damaged, self.journal = cache, lm, damaged, journal
        self.manifest, self.config = cache.manifest, cache.manifest["config"]
        self.storage = Storage(self.config["dtype"], self.manifest.get("storage", {}).get("outliers", {}))
        self.folders = [shard["folder"] for shard in self.manifest["shards"]]
        self.broken = [i for i, folder in enumerate(self.folders) if any(f.startswith(f"{folder}/") for f in damaged)]
        self.reading = Reading(lm, texts, self.config)
        self.batches = list(self.reading.batches())

    def run(self, progress: bool) -> dict[str, bool]:
        known = {file: dict(entry) for file, entry in self.cache.files().items()}
        self._write_texts()
        self._write_shards(progress)
        for column in columns_of(self.config):
            if layout.stats_file(column) in self.damaged:
                save_stats(self.cache.path, column, self.manifest["shards"], self._medians().get(column))
        same = {
            file: layout.problem_of(self.cache.path / file, known[file], contents=True) is None for file in self.damaged
        }
        if not all(same.values()):
            self._tell_manifest()
        return same

    def _medians(self) -> dict[str, float]:
        for entry in self.journal.of_kind("mask"):
            return entry["median_norm"]
        raise CacheError(f"{self.journal.path} was emptied, and with it the median norms: harvest the cache again.")

    def _write_texts(self) -> None:
        """Packed contexts and document ids."""
        first = 0
        for entry in self.manifest["tokens"]:
            rows = slice(first, first := first + entry["sequences"])
            if entry["file"] in self.damaged:
                ids, doc = (torch.cat([getattr(b, name) for b in self.batches])[rows].int() for name in ("ids", "doc"))
                atomic_save_safetensors(self.cache.path / entry["file"], {"ids": ids, "doc": doc})
        if layout.DOCUMENTS in self.damaged:
            atomic_save_safetensors(self.cache.path / layout.DOCUMENTS, {"ids": self.reading.document_ids()})

    def _write_shards(self, progress: bool) -> None:
        if not self.broken:
            return
        indices = {i: self._read_index(i) for i in range(len(self.folders)) if not self._is_unreadable(i)}
        unreadable = [i for i in self.broken if i not in indices]
        kept = self._grid(indices)  # without the lost shards, so far
        wanted = self._grid({i: indices[i] for i in self.broken if i in indices})
        positions, rows = self._run_model(wanted, ~kept if unreadable else torch.zeros_like(kept), progress)
        if unreadable:
            kept.view(-1)[positions] = True
            replayed = dict(enumerate(self._drawn(kept)))
            same = len(replayed) == len(self.folders) and all(torch.equal(replayed[i], indices[i]) for i in indices)
            if not same:
                raise CacheError(
                    f"{self.cache.path}: the mask no longer keeps the rows that it kept before; harvest the cache again."
                )
            indices |= {i: replayed[i] for i in unreadable}
        order = positions.argsort()
        for i in self.broken:
            place = indices[i][:, 0].long() * self.config["ctx_len"] + indices[i][:, 1]
            at = order[torch.searchsorted(positions[order], place)]
            folder = self.cache.path / self.folders[i]
            if self._is_unreadable(i):
                save_index(folder, indices[i])
            for column, tensors in rows.items():
                if self._is_unreadable(i, f"{column}.safetensors"):
                    save_rows(folder, column, self.storage, {name: x[at] for name, x in tensors.items()})

    def _is_unreadable(self, shard: int, name: str = layout.INDEX) -> bool:
        return f"{self.folders[shard]}/{name}" in self.damaged

    def _read_index(self, shard: int) -> Int[Tensor, "n 3"]:
        columns = self.cache.index(shard)
        return torch.stack([columns[name] for name in ("seq", "pos", "token")], dim=1)

    def _grid(self, indices: Mapping[int, Int[Tensor, "_ 3"]]) -> Bool[Tensor, "n_sequences ctx_len"]:
        """Which tokens have a row in these shards."""
        grid = torch.zeros(self.manifest["n_sequences"], self.config["ctx_len"], dtype=torch.bool)
        for index in indices.values():
            grid[index[:, 0].long(), index[:, 1].long()] = True
        return grid

    def _run_model(
        self, wanted: Tensor, unknown: Tensor, progress: bool
    ) -> tuple[Int[Tensor, " n"], dict[str, dict[str, Tensor]]]:
        """Flat positions of the `wanted` tokens and of the `unknown` ones that the mask keeps, and their rows by column."""
        mask = Mask(tuple(self.config["special_ids"]), self.manifest["max_norm"])
        asked: list[TokenBatch] = []
        for batch in self.batches:
            out = token_mask(batch.ids, batch.doc, mask.special_ids)
            span = slice(batch.first_context, batch.first_context + len(batch.ids))
            unknown[span] &= ~(out["padding"] | out["position"] | out["special"])
            if "gradients" in self.config:
                unknown[span] &= has_loss(batch)
            if bool((wanted[span] | unknown[span]).any()):
                asked.append(batch)
        positions: list[Tensor] = []
        found: dict[str, list[dict[str, Tensor]]] = {column: [] for column in columns_of(self.config)}
        stream = read_columns(self.lm, self.config, asked)
        for batch, columns in tqdm(stream, "Repairing", len(asked), disable=not progress):
            first = batch.first_context
            keep, _ = mask.apply_norms(batch, row_norms({hook: columns[hook] for hook in self.config["hooks"]}))
            take = wanted[first : first + len(keep)] | (keep & unknown[first : first + len(keep)])
            positions.append(take.flatten().nonzero().flatten() + first * self.config["ctx_len"])
            for column, x in columns.items():
                found[column].append(self.storage.encode(column, kept_rows(x, take)))
        return torch.cat(positions), {
            column: {name: torch.cat([tensors[name] for tensors in batches]) for name in batches[0]}
            for column, batches in found.items()
        }

    def _drawn(self, kept: Bool[Tensor, "n_sequences ctx_len"]) -> Iterator[Int[Tensor, "n 3"]]:
        """The index of every shard, by replaying the draws without activations."""
        config = self.config
        buffer_rows = config["shard_rows"] * config["pool_shards"]
        for block, batches in groupby(self.batches, lambda batch: layout.block_of(config, batch.first_context)):
            buffer, numbers = ShuffleBuffer(buffer_rows + config["batch_size"] * config["ctx_len"]), count()
            for batch in [*batches, None]:
                if batch is not None:
                    seq, pos = kept[batch.first_context : batch.first_context + len(batch.ids)].nonzero(as_tuple=True)
                    buffer.add(torch.stack([seq + batch.first_context, pos, batch.ids[seq, pos]], dim=1).int(), {})
                while len(buffer) >= buffer_rows if batch is not None else len(buffer):
                    generator = layout.shard_generator(config, next(numbers), block)
                    yield buffer.draw(min(config["shard_rows"], len(buffer)), generator)[0]

    def _tell_manifest(self) -> None:
        """Record the new size and SHA-256 of the rebuilt files."""
        for file, known in self.cache.files().items():
            if file in self.damaged:
                known |= layout.describe_file(self.cache.path / file)
        atomic_write_json(self.cache.path / layout.MANIFEST, self.manifest)
