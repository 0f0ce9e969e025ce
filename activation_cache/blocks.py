"""Harvesting with several processes: contexts are split into blocks; the process that locks a block's journal harvests it.

Processes do not communicate. A lock is released when its process exits, for whatever reason, and a block's contents
depend only on the config. So processes may join and leave at any time, and the result is the same as with a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from saelab.activation_cache import layout
from saelab.activation_cache.calibration import Calibration
from saelab.activation_cache.forward_pass import Reading, finish, read_model, run_pass
from saelab.activation_cache.journal import BusyError, Journal
from saelab.activation_cache.writer import CacheWriter
from saelab.errors import CacheError
from saelab.tokens import TokenBatch


def calibrate(reading: Reading, calibration: Calibration) -> None:
    """Fix the mask and storage of all blocks from the first rows; the caller holds the lock of the cache's journal."""
    if calibration.mask is None:
        for read in read_model(reading.lm, reading.config, reading.batches()):
            calibration.add(read)
            if calibration.mask is not None:
                return
        calibration.finish()


def harvest_blocks(folder: Path, reading: Reading, calibration: Calibration, progress: bool) -> None:
    """Harvest the blocks that no other process has locked, then those that others left unfinished; finish the cache.

    Returns once the cache is finished, by this process or another.
    """
    for block, batches in _blocks(reading, progress):
        _harvest_block(folder, reading, calibration, block, lambda batches=batches: batches, wait=False)
    n_blocks = -(-reading.totals.n_contexts // reading.config["block_contexts"])
    for block in range(n_blocks):
        _harvest_block(folder, reading, calibration, block, lambda block=block: _block(reading, block), wait=True)
    with closing(Journal(folder, wait=True)) as journal:
        if (folder / layout.MANIFEST).exists():
            return
        blocks = [_entries(folder, block, n_blocks) for block in range(n_blocks)]
        ends = [entries[-1]["counts"] for entries in blocks]
        counts = {reason: sum(end[reason] for end in ends) for reason in (ends[0] if ends else ())}
        finish(folder, reading, calibration, journal.of_kind("start")[0], sum(blocks, []), counts)


def _blocks(reading: Reading, progress: bool = False) -> Iterator[tuple[int, Iterator[TokenBatch]]]:
    """Each block number with its contexts; contexts that are not consumed are skipped."""
    return groupby(reading.batches(progress), lambda batch: batch.first_context // reading.config["block_contexts"])


def _block(reading: Reading, block: int) -> Iterator[TokenBatch]:
    """The contexts of one block; reads the texts again from the start."""
    again = Reading(reading.lm, reading.texts, reading.config)
    return next(batches for number, batches in _blocks(again) if number == block)


def _harvest_block(
    folder: Path,
    reading: Reading,
    calibration: Calibration,
    block: int,
    batches: Callable[[], Iterable[TokenBatch]],
    wait: bool,
) -> None:
    """Harvest a block unless it is done or, without `wait`, locked by another process."""
    try:
        journal = Journal(folder, layout.block_journal(block), wait)
    except BusyError:
        return
    with closing(journal):
        if not journal.of_kind("end"):
            name = layout.namespace(block)
            for leftover in (*folder.glob(f"shards/{name}-*/.*.tmp-*"), *folder.glob(f"tokens/.{name}-*.tmp-*")):
                leftover.unlink()
            writer = CacheWriter(folder, journal, reading.config, block)
            run_pass(reading.lm, batches(), calibration, writer)
            journal.append({"kind": "end", "counts": writer.counts})


def _entries(folder: Path, block: int, n_blocks: int) -> list[dict[str, Any]]:
    """The journal entries of a block. Raises `CacheError` unless all its files are on disk."""
    with closing(Journal(folder, layout.block_journal(block), wait=True)) as journal:
        if not journal.of_kind("end"):
            raise CacheError(f"block {block} of {n_blocks} in {folder} is missing: repeat the same harvest call.")
        for entry in journal.of_kind("shard"):
            for name, known in entry["files"].items():
                layout.check_file(folder / entry["folder"] / name, known, f"shard {entry['folder']}")
        for entry in journal.of_kind("tokens"):
            layout.check_file(folder / entry["file"], entry, entry["file"])
        return journal.entries
