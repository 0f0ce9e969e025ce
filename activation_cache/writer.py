"""Writing a cache: rows are shuffled through a pool, and shards leave it safely, one after the other. Knows no model.

Each shard is drawn from the pool by a generator that depends on (seed, shard number) alone. A killed harvest therefore
goes on with the same bytes: the forward passes since the oldest row still in the pool are repeated, the rows that are
in shards already are dropped, and the pool is what it was.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from saelab.activation_cache import format
from saelab.activation_cache.journal import Journal
from saelab.activation_cache.pool import Parts, Pool
from saelab.activation_cache.storage import Storage, decode, kept_rows
from saelab.files import atomic_save_safetensors, atomic_write_json
from saelab.tokens import TokenBatch


class _Background:
    """One thread that does things in the order given. After an error it does nothing more; the next call raises it."""

    def __init__(self, waiting: int = 2):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="saelab-cache-writer")
        self._pending: deque[Future[None]] = deque()
        self._waiting = waiting
        self._failed = False

    def submit(self, task: Callable[..., None], *arguments: Any) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._waiting):
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._run, task, arguments))

    def _run(self, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            task(*arguments)
        except BaseException:
            self._failed = True
            raise

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._executor.shutdown(wait=True)


class CacheWriter:
    """Takes packed contexts and the activations of each batch in stream order, and leaves a cache.

    After a restart, give every batch to `add_tokens` again, but activations only from the context `start` on.
    """

    def __init__(self, folder: Path, journal: Journal, config: Mapping[str, Any]):
        self.folder = folder
        self.journal = journal
        self.config = config
        self.ctx_len: int = config["ctx_len"]
        self.pool_rows: int = config["shard_rows"] * config["pool_shards"]
        rows = -(-config["n_tokens"] // self.ctx_len) * self.ctx_len
        self._pool = Pool(min(self.pool_rows, rows) + config["batch_size"] * self.ctx_len)
        self.storage = Storage(config["dtype"])
        """For int8, set it with the outlier columns before the first row is added."""
        self._background = _Background()
        self._shards = len(journal.of_kind("shard"))
        self._tokens_written = sum(entry["sequences"] for entry in journal.of_kind("tokens"))
        self._tokens_waiting: list[TokenBatch] = []
        self.n_sequences = self.n_tokens = self.n_padding = self.n_documents = 0
        self._consumed = 0
        self.counts = {"position": 0, "special": 0, "norm": 0}
        self.start = self._cursor = 0
        self.n_rows = sum(entry["rows"] for entry in journal.of_kind("shard"))
        """Rows in shards or waiting for one."""
        self._restore()

    def _restore(self) -> None:
        for entry in self.journal.of_kind("tokens"):
            format.check_file(self.folder / entry["file"], entry, entry["file"])
        shards = self.journal.of_kind("shard")
        for shard in shards:
            for name, known in shard["files"].items():
                format.check_file(self.folder / shard["folder"] / name, known, f"shard {shard['folder']}")
        if not shards:
            return
        last = shards[-1]
        self._cursor, oldest, self.counts = last["cursor"], last["oldest"], dict(last["counts"])
        self._consumed = self._cursor
        batch = self.config["batch_size"]
        self.start = self._cursor if oldest is None else oldest // batch * batch
        self._written = torch.zeros(self._cursor - self.start, self.ctx_len, dtype=torch.bool)
        for shard in shards:
            index = load_file(self.folder / shard["folder"] / format.INDEX)
            recent = index["seq"] >= self.start
            self._written[index["seq"][recent].long() - self.start, index["pos"][recent].long()] = True

    def add_tokens(self, batch: TokenBatch) -> None:
        """Keep the token ids of the next batch."""
        self.n_sequences += len(batch.ids)
        padding = int((batch.doc < 0).sum())
        self.n_padding += padding
        self.n_tokens += batch.ids.numel() - padding
        self.n_documents = max(self.n_documents, int(batch.doc.max()) + 1)
        self._tokens_waiting.append(batch)
        while self.n_sequences - self._first_waiting() >= format.SEQUENCES_PER_FILE:
            self._write_tokens(format.SEQUENCES_PER_FILE)

    def _first_waiting(self) -> int:
        return self._tokens_waiting[0].first_sequence if self._tokens_waiting else self.n_sequences

    def _write_tokens(self, n: int) -> None:
        first = self._first_waiting()
        ids = torch.cat([batch.ids for batch in self._tokens_waiting])
        doc = torch.cat([batch.doc for batch in self._tokens_waiting])
        rest = TokenBatch(ids[n:], doc[n:], first + n)
        self._tokens_waiting = [rest] if len(rest.ids) else []
        if first < self._tokens_written:
            return  # on disk since before the restart
        tensors = {"ids": ids[:n].int(), "doc": doc[:n].int()}
        self._background.submit(self._save_tokens, format.tokens_file(first // format.SEQUENCES_PER_FILE), tensors)

    def _save_tokens(self, name: str, tensors: dict[str, Tensor]) -> None:
        atomic_save_safetensors(self.folder / name, tensors)
        known = format.describe_file(self.folder / name)
        self.journal.append({"kind": "tokens", "file": name, "sequences": len(tensors["ids"]), **known})

    def add(
        self,
        batch: TokenBatch,
        acts: Mapping[str, Float[Tensor, "n ctx d_in"]],
        keep: Bool[Tensor, "n ctx"],
        counts: Mapping[str, int],
    ) -> None:
        """Take the rows `keep` of a batch (`counts`: why not the others), and write shards when the pool is full.

        Raises `CacheError` where float16 overflows, before any row of the batch is taken.
        """
        first, end = batch.first_sequence, batch.first_sequence + len(batch.ids)
        if first < self._cursor:  # repeated after a restart: its counts and some of its rows are on disk
            keep = keep & ~self._written[first - self.start : end - self.start]
        else:
            self.counts = {reason: n + counts[reason] for reason, n in self.counts.items()}
        seq, pos = keep.nonzero(as_tuple=True)
        index = torch.stack([seq + first, pos, batch.ids[seq, pos]], dim=1).int()
        rows = {hook: self.storage.encode(hook, kept_rows(x, keep)) for hook, x in acts.items()}
        self._pool.add(index, rows)
        self.n_rows += len(index)
        if end < self._cursor:
            return
        self._consumed = end
        while len(self._pool) >= self.pool_rows:
            self._write_shard()

    def _write_shard(self) -> None:
        number, self._shards = self._shards, self._shards + 1
        generator = format.shard_generator(self.config, number)
        index, rows = self._pool.draw(min(self.config["shard_rows"], len(self._pool)), generator)
        entry = {
            "kind": "shard",
            "folder": format.shard_folder(number),
            "rows": len(index),
            "cursor": self._consumed,
            "oldest": self._pool.oldest_sequence,
            "counts": dict(self.counts),
        }
        self._background.submit(self._save_shard, entry, index, rows)

    def _save_shard(self, entry: dict[str, Any], index: Tensor, rows: Parts) -> None:
        folder = self.folder / entry["folder"]
        save_index(folder, index)
        for hook, parts in rows.items():
            save_acts(folder, hook, self.storage, parts)
        names = [format.INDEX, *(f"{hook}.safetensors" for hook in rows)]
        files = {name: format.describe_file(folder / name) for name in names}
        self.journal.append({**entry, "files": files, "time": time.time()})

    def finish(self, document_ids: Int[Tensor, " n_documents"], medians: Mapping[str, float]) -> dict[str, Any]:
        """Write what is still waiting, the documents and the statistics; returns the manifest's list of contents."""
        while len(self._pool):
            self._write_shard()
        while self._tokens_waiting:
            self._write_tokens(min(format.SEQUENCES_PER_FILE, self.n_sequences - self._first_waiting()))
        self._background.wait()
        atomic_save_safetensors(self.folder / format.DOCUMENTS, {"ids": document_ids})
        shards = [{k: e[k] for k in ("folder", "rows", "files")} for e in self.journal.of_kind("shard")]
        tokens = [{k: e[k] for k in ("file", "sequences", "bytes", "sha256")} for e in self.journal.of_kind("tokens")]
        stats = {hook: save_stats(self.folder, hook, shards, medians[hook]) for hook in self.config["hooks"]}
        return {
            "n_rows": sum(shard["rows"] for shard in shards),
            "n_sequences": self.n_sequences,
            "n_tokens": self.n_tokens,
            "n_documents": len(document_ids),
            "masked": self.counts,
            "padding": self.n_padding,
            "shards": shards,
            "tokens": tokens,
            "stats": stats,
            **self._storage_entry(shards),
            "documents": format.describe_file(self.folder / format.DOCUMENTS),
        }

    def _storage_entry(self, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the manifest says of a storage other than bfloat16: outlier columns (int8) and error of each hook."""
        if self.storage.name == "bfloat16":
            return {}
        error = {hook: _relative_error(self.folder, hook, shards) for hook in self.config["hooks"]}
        outliers = {hook: list(dims) for hook, dims in self.storage.outliers.items()}
        return {"storage": {"error": error, "outliers": outliers}}

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """The last step: from now on the cache is finished."""
        atomic_write_json(self.folder / format.MANIFEST, dict(manifest))

    def close(self) -> None:
        """Let shards on their way reach the disk, and end the thread."""
        self._background.close()


def save_index(folder: Path, index: Int[Tensor, "n 3"]) -> None:
    """Write where the rows of a shard come from: (seq, pos, token) of each."""
    columns = {name: index[:, i] for i, name in enumerate(("seq", "pos", "token"))}
    atomic_save_safetensors(folder / format.INDEX, columns)


def save_acts(folder: Path, hook: str, storage: Storage, parts: Mapping[str, Tensor]) -> None:
    """Write the rows of one hook of a shard, as `storage.encode` gave them, and the sums of what is stored."""
    tensors = storage.tensors(hook, parts)
    sums = _partial_sums(decode(tensors))
    if "error" in parts:
        sums["sum_error"] = parts["error"].double().sum()
    atomic_save_safetensors(folder / f"{hook}.safetensors", {**tensors, **sums})


def save_stats(folder: Path, hook: str, shards: Sequence[Mapping[str, Any]], median: float) -> dict[str, Any]:
    """Write the statistics of a hook from the sums in its shards; gives size and SHA-256."""
    n = sum(shard["rows"] for shard in shards)
    totals = _totals(folder, hook, shards, "sum", "sum_squares", "sum_norms")
    tensors = {
        "n": torch.tensor(n),
        "mean": totals["sum"] / n,
        "second_moment": totals["sum_squares"] / n,
        "mean_norm": totals["sum_norms"] / n,
        "median_norm": torch.tensor(median, dtype=torch.float64),
    }
    path = folder / format.stats_file(hook)
    atomic_save_safetensors(path, tensors)
    return format.describe_file(path)


def _totals(folder: Path, hook: str, shards: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Tensor]:
    """Sums of a hook over all shards."""
    totals: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(folder / shard["folder"] / f"{hook}.safetensors", "pt") as file:
            for name in names:
                totals[name] = totals.get(name, 0) + file.get_tensor(name)
    return totals


def _relative_error(folder: Path, hook: str, shards: Sequence[Mapping[str, Any]]) -> float:
    """sum |x - x~|^2 / sum |x~ - mean|^2 over the harvest, x~ being the stored row; 0 where rows do not vary."""
    totals = _totals(folder, hook, shards, "sum", "sum_squares", "sum_error")
    n = sum(shard["rows"] for shard in shards)
    variance = (totals["sum_squares"] - totals["sum"].square() / n).sum().item()
    return totals["sum_error"].item() / variance if variance > 0 else 0.0


def _partial_sums(x: Float[Tensor, "n d_in"]) -> dict[str, Tensor]:
    """fp64 sums of a shard; blocks of rows are added up in fp32 first."""
    d_in = x.shape[1]
    sums = {"sum": torch.zeros(d_in), "sum_squares": torch.zeros(d_in), "sum_norms": torch.zeros(())}
    sums = {name: tensor.double() for name, tensor in sums.items()}
    for block in x.split(2048):
        block = block.float()
        squares = block.square()
        sums["sum"] += block.sum(0)
        sums["sum_squares"] += squares.sum(0)
        sums["sum_norms"] += squares.sum(1).sqrt().sum()
    return sums
