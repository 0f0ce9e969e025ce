"""Reading a cache: statistics, whole shards, and endless shuffled batches. Independent of the model."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from saelab.activation_cache import layout
from saelab.activation_cache.codec import decode
from saelab.activation_cache.columns import columns_of
from saelab.activation_cache.prefetch import shuffled_batches
from saelab.errors import CacheError

_OPEN: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _close_batches() -> None:
    """Close abandoned iterators while the interpreter is intact; later their thread pool could no longer shut down."""
    for batches in list(_OPEN):
        with suppress(ValueError):  # being read by another thread at this moment
            batches.close()


class ActivationCache:
    """A finished activation cache in the folder `path`.

    Raises `CacheError` if there is none, if it is unfinished, or if a newer saelab wrote it. Each file's size is
    checked whenever it is read, its SHA-256 the first time.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest: dict[str, Any] = layout.read_manifest(self.path)
        self._widths: dict[str, int] = columns_of(self.manifest["config"])
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"ActivationCache({str(self.path)!r}: {self.n_rows:,} rows of {', '.join(self.hook_names)})"

    @property
    def hook_names(self) -> list[str]:
        """Hooks in the cache."""
        return list(self.manifest["config"]["hooks"])

    @property
    def gradients(self) -> str | None:
        """The loss whose gradients the cache also holds, as the rows of "HOOK.gradient"; None if it holds none."""
        return self.manifest["config"].get("gradients")

    @property
    def n_rows(self) -> int:
        """Rows of each hook, after the mask."""
        return self.manifest["n_rows"]

    @property
    def models(self) -> dict[str, dict[str, str]]:
        """With several models, the name and hash of each, by the label before "/" in its hook names; {} with one model."""
        return self.manifest.get("models", {})

    def d_in(self, hook_name: str | None = None) -> int:
        """Width of a hook's rows. `hook_name` may be omitted if there is only one."""
        return self._widths[self._hook(hook_name)]

    def stats(self, hook_name: str | None = None) -> dict[str, Any]:
        """Exact statistics over all rows as they are stored: `n`, `mean` and `second_moment` (d_in) fp64, `mean_norm`,
        and, of activations, `median_norm`.

        `second_moment` is the mean square of each dimension; `median_norm` is the norm rule's (first 16,384 rows).
        """
        hook_name = self._hook(hook_name)
        tensors = self._load(layout.stats_file(hook_name), self.manifest["stats"][hook_name], f"stats of {hook_name}")
        return {name: x if x.ndim else x.item() for name, x in tensors.items()}

    def storage_error(self, hook_name: str | None = None) -> float | None:
        """Quantisation error: sum |x - x~|^2 / sum |x~ - mean|^2 over all rows, x~ as stored; None for bfloat16, where it
        is not measured.
        """
        hook_name = self._hook(hook_name)
        return self.manifest.get("storage", {"error": {}})["error"].get(hook_name)

    @overload
    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        hook_name: str | None = None,
        prefetch: int = 2,
        dtype: torch.dtype = ...,
        shuffle: bool = True,
        leave_out: int = 0,
        pin_memory: bool = False,
    ) -> Generator[Float[Tensor, "batch d_in"], None, None]: ...
    @overload
    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        *,
        hook_name: Sequence[str],
        prefetch: int = 2,
        dtype: torch.dtype = ...,
        shuffle: bool = True,
        leave_out: int = 0,
        pin_memory: bool = False,
    ) -> Generator[dict[str, Float[Tensor, "batch d_in"]], None, None]: ...
    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        hook_name: str | Sequence[str] | None = None,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
        shuffle: bool = True,
        leave_out: int = 0,
        pin_memory: bool = False,
    ) -> Generator[Any, None, None]:
        """Endless shuffled batches, a pure function of (cache, seed, step); `start_step` skips that many.

        Each epoch reshuffles the shards and the rows within each; batches may span shards and epochs. `prefetch` shards
        are opened ahead. `dtype=torch.bfloat16` yields rows stored in bfloat16 unchanged. `shuffle=False` yields consecutive
        rows in stored order (`index(shard)` says where they come from). A list of hooks yields dicts by hook: row i is the
        same token in each, in the same order as for one hook alone. "HOOK.gradient" names the gradients at a hook.
        `leave_out` rows, spread over all shards, appear in no batch (see `left_out`).
        `pin_memory` gathers the rows into pinned memory, for asynchronous copies to a GPU.
        Raises `ValueError` for bad arguments, and `CacheError` naming a damaged shard.
        """
        one = hook_name is None or isinstance(hook_name, str)
        asked: list[str | None] = [hook_name] if hook_name is None or isinstance(hook_name, str) else list(hook_name)
        hooks = [self._hook(name) for name in asked]
        if not hooks:
            raise ValueError(f"hook_name=[] names no hook; {self.path} holds {', '.join(self.hook_names)}.")
        for name, value, minimum in (
            ("batch_size", batch_size, 1),
            ("start_step", start_step, 0),
            ("prefetch", prefetch, 1),
            ("leave_out", leave_out, 0),
        ):
            if value < minimum:
                raise ValueError(f"{name}={value} must be at least {minimum}.")
        plan = self.plan(seed if shuffle else None, start_step * batch_size, leave_out)
        batches = self._batches(plan, batch_size, hooks, prefetch, dtype, pin_memory, one)
        _OPEN.add(batches)
        return batches

    def _batches(
        self,
        plan: Iterator[Any],
        batch_size: int,
        hooks: list[str],
        prefetch: int,
        dtype: torch.dtype,
        pin_memory: bool,
        one: bool,
    ) -> Generator[Any, None, None]:
        def opened(shard: int) -> list[Tensor]:
            return [decode(self._read(shard, f"{hook}.safetensors")) for hook in hooks]

        widths = [self._widths[hook] for hook in hooks]
        for batch in shuffled_batches(plan, opened, widths, batch_size, prefetch, dtype, pin_memory):
            yield batch[0] if one else dict(zip(hooks, batch, strict=True))

    def left_out(self, n: int, hook_names: Sequence[str]) -> dict[str, Float[Tensor, "n d_in"]]:
        """The rows that `batches(leave_out=n)` leaves out, fp32, by hook: the last ones of each shard."""
        kept, hooks = self._kept_rows(n), [self._hook(name) for name in hook_names]

        def rows(hook: str) -> Iterator[Tensor]:
            for shard, first in enumerate(kept):
                yield decode(self._read(shard, f"{hook}.safetensors"))[first:].float()

        return {hook: torch.cat(list(rows(hook))) for hook in hooks}

    def _kept_rows(self, leave_out: int) -> list[int]:
        """Rows left in each shard when `leave_out` are left out in proportion. Raises `ValueError` if none would be."""
        if leave_out and leave_out >= self.n_rows:
            raise ValueError(f"leave_out={leave_out} leaves no row: {self.path} holds {self.n_rows}.")
        kept, before = [], 0
        for shard in self.manifest["shards"]:
            after = before + shard["rows"]
            gone = after * leave_out // self.n_rows - before * leave_out // self.n_rows
            kept.append(shard["rows"] - gone)
            before = after
        return kept

    def plan(self, seed: int | None, skip: int, leave_out: int) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
        """Endlessly, a shard and the order of those of its rows that are not left out, after skipping `skip` rows of the
        stream; stored order if `seed` is None."""
        return self._planned(
            seed, skip, self._kept_rows(leave_out)
        )  # a bad `leave_out` is refused here, not at the first row

    @staticmethod
    def _planned(seed: int | None, skip: int, kept: Sequence[int]) -> Iterator[tuple[int, Int[Tensor, " n"]]]:

        def order(n: int, *what: object) -> Tensor:
            return torch.arange(n) if seed is None else torch.randperm(n, generator=layout.seeded(*what))

        epoch, skip = divmod(skip, sum(kept))
        while True:
            for shard in order(len(kept), "epoch", seed, epoch).tolist():
                n_rows = kept[shard]
                if skip < n_rows:
                    yield shard, order(n_rows, "rows", seed, epoch, shard)[skip:]
                skip = max(0, skip - n_rows)
            epoch += 1

    def shards(
        self, hook_name: str | None = None
    ) -> Iterator[tuple[Float[Tensor, "n d_in"], dict[str, Int[Tensor, " n"]]]]:
        """Each shard in order: its rows, and their origin: `seq` (row of `tokens()`), `pos` (column) and `token`.

        Rows are bfloat16 or float16 as stored; int8 is dequantised to float32.
        """
        name = f"{self._hook(hook_name)}.safetensors"
        return ((decode(self._read(i, name)), self.index(i)) for i in range(len(self.manifest["shards"])))

    def index(self, shard: int) -> dict[str, Int[Tensor, " n"]]:
        """Where the rows of a shard come from: `seq`, `pos` and `token`, int32."""
        return self._read(shard, layout.INDEX)

    def tokens(self) -> tuple[Int[Tensor, "n_sequences ctx_len"], Int[Tensor, "n_sequences ctx_len"]]:
        """All packed contexts: token ids, and the index into `document_ids` of each token's document, -1 on padding."""
        files = [self._load(known["file"], known, known["file"]) for known in self.manifest["tokens"]]
        return torch.cat([file["ids"] for file in files]), torch.cat([file["doc"] for file in files])

    @property
    def document_ids(self) -> Int[Tensor, " n_documents"]:
        """`tokens.document_id` of every document that contributed a token, in order of appearance."""
        return self._load(layout.DOCUMENTS, self.manifest["documents"], layout.DOCUMENTS)["ids"]

    def origin(self, hook_name: str | None = None) -> dict[str, Any]:
        """Where a hook's rows come from, JSON-serialisable: an SAE trained on them stores it in `sae.json`."""
        hook_name, manifest = self._hook(hook_name), self.manifest
        together = {"name": manifest["model_name"], "hash": manifest["config"]["model_hash"]}
        model = self.models.get(hook_name.partition("/")[0], together)
        return layout.origin(manifest["config"], hook_name, model, manifest["max_norm"][hook_name], manifest["texts"])

    def files(self) -> dict[str, dict[str, Any]]:
        """Every file by its path in the cache, with the size and SHA-256 it was written with."""
        manifest = self.manifest
        files = {
            f"{shard['folder']}/{name}": known for shard in manifest["shards"] for name, known in shard["files"].items()
        }
        files |= {known["file"]: known for known in manifest["tokens"]}
        files |= {layout.stats_file(column): known for column, known in manifest["stats"].items()}
        return files | {layout.DOCUMENTS: manifest["documents"]}

    def damaged(self, progress: bool = False) -> dict[str, str]:
        """Read every file and compare size and SHA-256: what is wrong with each damaged one, by path."""
        bar = tqdm(self.files().items(), "Verifying", unit="file", disable=not progress)
        found = {file: layout.problem_of(self.path / file, known, contents=True) for file, known in bar}
        return {file: problem for file, problem in found.items() if problem}

    def verify(self, progress: bool = False) -> None:
        """Read every file. Raises `CacheError` naming all that are damaged."""
        if damaged := self.damaged(progress):
            parts = "; ".join(f"{layout.unit_of(file)}: {self.path / file} {what}" for file, what in damaged.items())
            raise CacheError(f"{parts}. {layout.FIX}")

    def _hook(self, hook_name: str | None) -> str:
        if hook_name is None and len(self.hook_names) == 1:
            return self.hook_names[0]
        if hook_name not in self._widths:
            raise ValueError(f"hook_name={hook_name!r} is not in {self.path}: it holds {', '.join(self._widths)}.")
        return hook_name

    def _read(self, shard: int, name: str) -> dict[str, Tensor]:
        known = self.manifest["shards"][shard]
        return self._load(f"{known['folder']}/{name}", known["files"][name], f"shard {known['folder']}")

    def _load(self, file: str, known: dict[str, Any], unit: str) -> dict[str, Tensor]:
        path = self.path / file
        layout.check_file(path, known, unit, contents=file not in self._checked)
        self._checked.add(file)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{unit}: {path} cannot be read ({error}). Harvest the cache again.") from error
