"""Calibration of a cache on its first rows: the norm limit, and the columns that int8 storage keeps in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.activation_cache.codec import Storage, find_outliers, kept_rows
from saelab.activation_cache.columns import columns_of
from saelab.activation_cache.journal import Journal
from saelab.models.language_model import LanguageModel
from saelab.tokens import TokenBatch
from saelab.tokens.mask import Mask, NormRule


class Read(NamedTuple):
    """One forward pass."""

    batch: TokenBatch
    columns: dict[str, Tensor]
    """(n, ctx, d_in) per column: the activations of each hook, and their gradients if the cache has them."""
    norms: dict[str, Tensor]
    """(n, ctx) per hook."""


class Calibration:
    """Mask and storage of a cache, fixed once and recorded in its journal: the same after a restart, and in every process.

    Until the norm rule has enough rows, the first batches wait in memory; no forward pass is run twice.
    """

    def __init__(self, lm: LanguageModel, config: dict[str, Any], journal: Journal):
        self._journal, self._columns = journal, list(columns_of(config))
        self._special_ids = tuple(lm.special_ids)
        self._norm_rule = NormRule(lm.special_ids)
        self._waiting: list[Read] = []
        self.medians: dict[str, float] = {}
        self.mask: Mask | None = None
        """None until calibrated."""
        self.storage = Storage(config["dtype"])
        for entry in journal.of_kind("mask"):
            self.medians, self.mask = entry["median_norm"], Mask(self._special_ids, entry["max_norm"])
        for entry in journal.of_kind("storage"):
            self.storage = Storage(config["dtype"], entry["outliers"])

    def add(self, read: Read) -> list[Read]:
        """Returns the batches that can be stored now: none while the norm rule needs more rows, then all that were waiting."""
        if self.mask is not None:
            return [read]
        self._waiting.append(read)
        self._norm_rule.add(read.batch, read.norms)
        return self.finish() if self._norm_rule.ready else []

    def finish(self) -> list[Read]:
        """Calibrate on the rows seen so far, unless already done; returns the batches that were waiting."""
        if self.mask is None:
            self.medians, max_norms = self._norm_rule.medians(), self._norm_rule.max_norms()
            self.mask = Mask(self._special_ids, max_norms)
            if self.storage.name == "int8":
                self._choose_outliers(self._waiting, self.mask)
            entry = {"kind": "mask", "median_norm": self.medians, "max_norm": max_norms, "rows": self._norm_rule.n_rows}
            self._journal.append(entry)
        ready, self._waiting = self._waiting, []
        return ready

    def _choose_outliers(self, waiting: Sequence[Read], mask: Mask) -> None:
        """Choose the columns that int8 keeps in bfloat16, from the norm rule's rows that the mask keeps."""
        keeps = [mask.apply_norms(read.batch, read.norms)[0] for read in waiting]
        outliers: dict[str, list[int]] = {}
        for hook in self._columns if waiting else ():
            x = torch.cat([kept_rows(read.columns[hook], keep) for read, keep in zip(waiting, keeps, strict=True)])
            outliers[hook] = find_outliers(x)
            Storage("int8", outliers).check_error(hook, x)
        self.storage = Storage("int8", outliers)
        self._journal.append({"kind": "storage", "outliers": outliers})
