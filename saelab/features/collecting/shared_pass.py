"""The pass over the contexts that a feature store counts: it goes on where it stopped, and torchrun's processes share it.

Every process keeps the state of its share in a file that says which contexts it covers; the files are merged in the end. So an
interrupted pass goes on, on as many processes as then run, and a finished one is extended by more contexts: nothing is counted
twice, and the result has the same bits (sums: to rounding) as one pass of one process.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from saelab.distributed import rank_and_world_size
from saelab.errors import StoreError
from saelab.evaluation.heldout import ScoreStream
from saelab.features import schema
from saelab.features.collecting.collector import Collector
from saelab.saes import SAE
from saelab.tokens import TokenBatch

_LOG = logging.getLogger("saelab")

SAVE_SECONDS = 120.0
_REASONS: tuple[str, ...] = ("special", "position", "norm")
Ranges = list[tuple[int, int]]
"""Contexts from first to last, the last not included."""


class SharedPass:
    """A pass whose files are in `folder`; `request` says what is collected."""

    def __init__(self, folder: Path, request: dict[str, Any], collector: tuple[int, int, int]) -> None:
        self.folder, self.request, self._size = folder, request, collector
        self.rank, self.n_ranks = rank_and_world_size()

    def files(self) -> list[Path]:
        """State files, of this and of other numbers of processes."""
        return sorted([*self.folder.glob(schema.STATE), *self.folder.glob("state.*-of-*.safetensors")])

    def run(self, sae: SAE, stream: ScoreStream, progress: bool) -> tuple[Collector, dict[str, int]]:
        """Collect what is missing; returns the state and the counts of masked tokens: of all contexts on rank 0, which waits for
        the others, of its share on another rank."""
        share = _ours(self.folder, self.rank, self.n_ranks)
        covered = [one for path in self.files() if not path.name.endswith(f"-of-{self.n_ranks}.safetensors")
                   for one in read_state(path)[1]]  # fmt: skip
        state, done = Collector(*self._size), Ranges()
        masked = dict.fromkeys(_REASONS, 0)
        if share.exists():
            state, done, masked = self._load(share)
        todo = list(_without(stream.batches, covered))[self.rank :: self.n_ranks]
        todo = list(_without(todo, done))
        if todo:
            here = replace(stream, batches=todo, n_tokens=0, n_masked=dict.fromkeys(_REASONS, 0))
            self._collect(sae, here, state, done, masked, progress)
        elif not share.exists():
            self._save(share, state, done, masked)
        return (state, masked) if self.rank else self._merged(stream)

    def _collect(
        self, sae: SAE, stream: ScoreStream, state: Collector, done: Ranges, masked: dict[str, int], progress: bool
    ) -> None:
        share, saved, before = _ours(self.folder, self.rank, self.n_ranks), time.monotonic(), dict(masked)
        total = sum(int((batch.doc >= 0).sum()) for batch in stream.batches)
        shown, complete = progress and not self.rank, True
        try:
            with tqdm(total=total, unit="token", unit_scale=True, desc="Features", disable=not shown) as bar:
                for tokens, activations, keep in stream:
                    where = keep.cpu().flatten()
                    number = torch.arange(len(where)) + tokens.first_context * self._size[1]
                    complete = False
                    state.update(sae, activations[keep].float(), number[where], tokens.doc.flatten()[where])
                    complete = True
                    done.append((tokens.first_context, tokens.first_context + len(tokens.ids)))
                    masked.update({name: before[name] + stream.n_masked[name] for name in _REASONS})
                    bar.update(int((tokens.doc >= 0).sum()))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save(share, state, done, masked)
                        saved = time.monotonic()
        finally:
            if done and complete:  # not when it is interrupted in the middle of an update
                self._save(share, state, done, masked)

    def _merged(self, stream: ScoreStream) -> tuple[Collector, dict[str, int]]:
        """All files as one state, saved as such once the other ranks are done."""
        wanted = {context for batch in stream.batches for context in _contexts(batch)}
        found = self._covered()
        while not wanted <= set[int]().union(*(contexts for contexts, _ in found)):
            time.sleep(0.5)
            found = self._covered()
        merged, covered, masked = Collector(*self._size), set[int](), dict.fromkeys(_REASONS, 0)
        for contexts, path in sorted(found, key=lambda pair: -len(pair[0])):
            # A share that was merged before it could be removed is skipped.
            if contexts and not contexts & covered:
                state, _, counts = self._load(path)
                merged.merge(state)
                covered |= contexts
                masked = {name: masked[name] + counts[name] for name in _REASONS}
        self._save(self.folder / schema.STATE, merged, _ranges(covered), masked)
        for path in self.files():
            if path.name != schema.STATE:
                path.unlink()
        return merged, masked

    def _covered(self) -> list[tuple[set[int], Path]]:
        """The contexts that each state file covers."""
        return [({one for pair in read_state(path)[1] for one in range(*pair)}, path) for path in self.files()]

    def _save(self, path: Path, state: Collector, done: Ranges, masked: dict[str, int]) -> None:
        covered = _ranges({one for first, last in done for one in range(first, last)})
        metadata = {"request": json.dumps(self.request), "contexts": json.dumps(covered), "masked": json.dumps(masked)}
        state.save(path, metadata)

    def _load(self, path: Path) -> tuple[Collector, Ranges, dict[str, int]]:
        state = Collector(*self._size)
        metadata, ranges = state.load(path), read_state(path)[1]
        return state, ranges, json.loads(metadata["masked"])


def read_state(path: Path) -> tuple[dict[str, Any], Ranges]:
    """The request that a state file belongs to, and the contexts it covers. Raises `StoreError` for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
        return json.loads(metadata["request"]), [(int(a), int(b)) for a, b in json.loads(metadata["contexts"])]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}): remove its folder and collect the features again.") from error


def _ours(folder: Path, rank: int, n_ranks: int) -> Path:
    return folder / f"state.{rank}-of-{n_ranks}.safetensors"


def _contexts(batch: TokenBatch) -> range:
    return range(batch.first_context, batch.first_context + len(batch.ids))


def _without(batches: list[TokenBatch], covered: Ranges) -> Iterator[TokenBatch]:
    """The batches without the contexts that are covered; what is left of a batch stays together."""
    known = {one for first, last in covered for one in range(first, last)}
    for batch in batches:
        left = [i for i, context in enumerate(_contexts(batch)) if context not in known]
        if left:
            first, last = left[0], left[-1] + 1
            yield replace(
                batch, ids=batch.ids[first:last], doc=batch.doc[first:last], first_context=batch.first_context + first
            )


def _ranges(contexts: set[int]) -> Ranges:
    """Consecutive numbers as ranges."""
    result: Ranges = []
    for context in sorted(contexts):
        if result and result[-1][1] == context:
            result[-1] = (result[-1][0], context + 1)
        else:
            result.append((context, context + 1))
    return result
