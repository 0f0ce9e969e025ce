"""Writing a cache: rows go through a shuffle buffer and are written durably, shard by shard. Independent of the model.

Each shard is drawn from the buffer by a generator that depends only on (seed, block, shard number). A killed harvest
therefore resumes with the same bytes: the forward passes since the oldest row still in the buffer are repeated, rows that
are already in shards are dropped, and the buffer ends up as it was.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from saelab.activation_cache import layout
from saelab.activation_cache.codec import Storage, decode, kept_rows
from saelab.activation_cache.journal import Journal
from saelab.activation_cache.shuffle_buffer import RowTensors, ShuffleBuffer
from saelab.files import atomic_save_safetensors
from saelab.tokens import TokenBatch
from saelab.tokens.mask import REASONS


class _Background:
    """One thread that runs tasks in order. After an error it runs no more of them; a later `submit` or `wait` raises it."""

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
    """Writes packed contexts and the activations of each batch, in stream order, to a cache.

    After a restart, pass every batch to `add_tokens` again, but activations only from the context `start` on.
    A `block` has its own journal, shards and token files, and is given only its own contexts.
    """

    def __init__(self, folder: Path, journal: Journal, config: Mapping[str, Any], block: int | None = None):
        self.folder = folder
        self.journal = journal
        self.config = config
        self._block = block
        self._first = (block or 0) * config.get("block_contexts", 0)
        self.ctx_len: int = config["ctx_len"]
        self.buffer_rows: int = config["shard_rows"] * config["pool_shards"]
        rows = -(-config["n_tokens"] // self.ctx_len) * self.ctx_len
        self._buffer = ShuffleBuffer(min(self.buffer_rows, rows) + config["batch_size"] * self.ctx_len)
        self.storage = Storage(config["dtype"])
        """For int8, set this, with the outlier columns, before adding the first row."""
        self._background = _Background()
        self._shards = len(journal.of_kind("shard"))
        self._tokens_written = self._first + sum(entry["sequences"] for entry in journal.of_kind("tokens"))
        self._tokens_waiting: list[TokenBatch] = []
        self._end = self._consumed = self._first
        self.counts = dict.fromkeys((*REASONS, *(("no_loss",) if "gradients" in config else ())), 0)
        self.start = self._cursor = self._first
        self._restore()

    def _restore(self) -> None:
        for entry in self.journal.of_kind("tokens"):
            layout.check_file(self.folder / entry["file"], entry, entry["file"])
        shards = self.journal.of_kind("shard")
        for shard in shards:
            for name, known in shard["files"].items():
                layout.check_file(self.folder / shard["folder"] / name, known, f"shard {shard['folder']}")
        if not shards:
            return
        last = shards[-1]
        self._cursor, oldest, self.counts = last["cursor"], last["oldest"], dict(last["counts"])
        self._consumed = self._cursor
        batch = self.config["batch_size"]
        self.start = self._cursor if oldest is None else oldest // batch * batch
        self._on_disk = torch.zeros(self._cursor - self.start, self.ctx_len, dtype=torch.bool)
        for shard in shards:
            index = load_file(self.folder / shard["folder"] / layout.INDEX)
            recent = index["seq"] >= self.start
            self._on_disk[index["seq"][recent].long() - self.start, index["pos"][recent].long()] = True

    def add_tokens(self, batch: TokenBatch) -> None:
        """Queue the token ids of the next batch."""
        self._end += len(batch.ids)
        self._tokens_waiting.append(batch)
        while self._end - self._first_waiting() >= layout.CONTEXTS_PER_FILE:
            self._write_tokens(layout.CONTEXTS_PER_FILE)

    def _first_waiting(self) -> int:
        return self._tokens_waiting[0].first_context if self._tokens_waiting else self._end

    def _write_tokens(self, n: int) -> None:
        first = self._first_waiting()
        ids = torch.cat([batch.ids for batch in self._tokens_waiting])
        doc = torch.cat([batch.doc for batch in self._tokens_waiting])
        rest = TokenBatch(ids[n:], doc[n:], first + n)
        self._tokens_waiting = [rest] if len(rest.ids) else []
        if first < self._tokens_written:
            return  # written before the restart
        tensors = {"ids": ids[:n].int(), "doc": doc[:n].int()}
        number = (first - self._first) // layout.CONTEXTS_PER_FILE
        self._background.submit(self._save_tokens, layout.tokens_file(number, self._block), tensors)

    def _save_tokens(self, name: str, tensors: dict[str, Tensor]) -> None:
        atomic_save_safetensors(self.folder / name, tensors)
        known = layout.describe_file(self.folder / name)
        self.journal.append({"kind": "tokens", "file": name, "sequences": len(tensors["ids"]), **known})

    def add(
        self,
        batch: TokenBatch,
        columns: Mapping[str, Float[Tensor, "n ctx d_in"]],
        keep: Bool[Tensor, "n ctx"],
        counts: Mapping[str, int],
    ) -> None:
        """Add the rows of a batch selected by `keep` (`counts`: the masked ones by reason), and write shards when the buffer is
        full.

        Raises `CacheError` if float16 overflows, before adding any row of the batch.
        """
        first, end = batch.first_context, batch.first_context + len(batch.ids)
        if first < self._cursor:  # repeated after a restart: its counts and some of its rows are on disk
            keep = keep & ~self._on_disk[first - self.start : end - self.start]
        else:
            self.counts = {reason: n + counts[reason] for reason, n in self.counts.items()}
        seq, pos = keep.nonzero(as_tuple=True)
        index = torch.stack([seq + first, pos, batch.ids[seq, pos]], dim=1).int()
        rows = {hook: self.storage.encode(hook, kept_rows(x, keep)) for hook, x in columns.items()}
        self._buffer.add(index, rows)
        if end < self._cursor:
            return
        self._consumed = end
        while len(self._buffer) >= self.buffer_rows:
            self._write_shard()

    def _write_shard(self) -> None:
        number, self._shards = self._shards, self._shards + 1
        generator = layout.shard_generator(self.config, number, self._block)
        index, rows = self._buffer.draw(min(self.config["shard_rows"], len(self._buffer)), generator)
        entry = {
            "kind": "shard",
            "folder": layout.shard_folder(number, self._block or 0),
            "rows": len(index),
            "cursor": self._consumed,
            "oldest": self._buffer.oldest_context,
            "counts": dict(self.counts),
        }
        self._background.submit(self._save_shard, entry, index, rows)

    def _save_shard(self, entry: dict[str, Any], index: Tensor, rows: RowTensors) -> None:
        folder = self.folder / entry["folder"]
        save_index(folder, index)
        for hook, tensors in rows.items():
            save_rows(folder, hook, self.storage, tensors)
        names = [layout.INDEX, *(f"{hook}.safetensors" for hook in rows)]
        files = {name: layout.describe_file(folder / name) for name in names}
        self.journal.append({**entry, "files": files, "time": time.time()})

    def flush(self) -> None:
        """Write everything still buffered, and return when it is on disk."""
        while len(self._buffer):
            self._write_shard()
        while self._tokens_waiting:
            self._write_tokens(min(layout.CONTEXTS_PER_FILE, self._end - self._first_waiting()))
        self._background.wait()

    def close(self) -> None:
        """Finish the pending writes, and end the thread."""
        self._background.close()


def save_index(folder: Path, index: Int[Tensor, "n 3"]) -> None:
    """Write where the rows of a shard come from: (seq, pos, token) of each."""
    columns = {name: index[:, i] for i, name in enumerate(("seq", "pos", "token"))}
    atomic_save_safetensors(folder / layout.INDEX, columns)


def save_rows(folder: Path, hook: str, storage: Storage, tensors: Mapping[str, Tensor]) -> None:
    """Write the rows of one hook of a shard, as returned by `storage.encode`, and the sums of what is stored."""
    stored = storage.tensors(hook, tensors)
    sums = _partial_sums(decode(stored))
    if "error" in tensors:
        sums["sum_error"] = tensors["error"].double().sum()
    atomic_save_safetensors(folder / f"{hook}.safetensors", {**stored, **sums})


def _partial_sums(x: Float[Tensor, "n d_in"]) -> dict[str, Tensor]:
    """fp64 sums of a shard; blocks of 2,048 rows are first summed in fp32."""
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
