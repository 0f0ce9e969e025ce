"""Reads the files of a feature store: SQLite opened read-only, tokens memory-mapped; needs neither torch nor a tokenizer.

`schema.py` describes the files and columns; the reader returns the records of `records.py`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from saelab.errors import SaelabError, StoreError
from saelab.features import schema
from saelab.features.blob import unpack_arrays
from saelab.features.manifest import COLLECT_AGAIN, read_manifest, signed_features
from saelab.features.quantiles import chosen
from saelab.features.records import Example, Histogram, Logits
from saelab.features.token_text import trim_to_characters
from saelab.files import read_json
from saelab.hints.next_commands import command

if TYPE_CHECKING:
    from saelab.saes import SAE


class StoreReader:
    """An open store. `manifest` is the content of manifest.json."""

    def __init__(self, folder: str | Path, sae: SAE | None = None) -> None:
        """Open the store in `folder`. Raises `StoreError` when it is missing, damaged, of a newer version, or of an SAE other
        than `sae`."""
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        self.verify_files()
        self._local = threading.local()
        self._tokens: Any = None
        self._sae = None
        self._pieces: dict[int, bytes] = {}
        if sae is not None:
            self._sae = self._checked(sae)
        (rows,) = self._query("SELECT count(*) FROM feature")[0]
        if rows != self.d_sae:
            raise StoreError(
                f"{self._database} holds {rows} features, but its manifest says {self.d_sae}. {COLLECT_AGAIN}"
            )

    @property
    def d_sae(self) -> int:
        """Number of features, including those that never fired."""
        return self.manifest["sae"]["d_sae"]

    @property
    def n_tokens(self) -> int:
        """Number of counted tokens: those the mask kept."""
        return self.manifest["n_tokens"]

    @property
    def hook_name(self) -> str:
        """The hook that features are steered at: the SAE's output hook, the last one if it has several."""
        return self.manifest["hook_name"]

    @cached_property
    def signed(self) -> bool | None:
        """Whether any feature activation was negative. None in a store written by an earlier version whose SAE may have negative
        values: its quantiles and examples are of the signed value, so it has no steering units."""
        config = None if self._sae is None else asdict(self._sae.config)
        if config is None and "signed" not in self.manifest and self.sae_folder is not None:
            with suppress(SaelabError, KeyError, TypeError):
                config = read_json(self.sae_folder / "sae.json")["config"]
        return signed_features(self.manifest, config)

    def arrays(self, feature: int, kind: str) -> dict[str, np.ndarray]:
        """The stored arrays of one kind ("logits", or a kind from `schema.blob_kind`); {} where there are none."""
        rows = self._query("SELECT data FROM blob WHERE feature = ? AND kind = ?", [feature, kind])
        return unpack_arrays(rows[0][0]) if rows else {}

    def ends(self, feature: int) -> list[dict[str, Any]]:
        """One dict with the keys `schema.END_COLUMNS` for each end (sign) that a feature fires at, the dominant one first; []
        in a store that mixed the signs."""
        if self.signed is None:
            return []
        (row,) = self._rows("WHERE feature = ?", [feature])
        if not self.signed:
            return [{name: row[name] for name in schema.END_COLUMNS}] if row["n_fired"] else []
        names = ", ".join(f'"{name}"' for name in schema.END_COLUMNS)
        found = self._query(f"SELECT {names} FROM feature_end WHERE feature = ?", [feature])
        rows: list[dict[str, Any]] = [dict(zip(schema.END_COLUMNS, row, strict=True)) for row in found]
        return sorted(rows, key=lambda end: end["sign"] != row["sign"])

    def examples(self, feature: int, sign: int, limit: int | None = None, kind: str = "top") -> list[Example]:
        """Examples at one end, all that are stored or `limit` of them: the strongest, one per document ("top"); from groups of
        equally many firings, the largest group first ("quantile"); a uniform sample of firings ("uniform"); or tokens on which
        the feature nearly fired ("near_miss")."""
        if limit is not None and limit < 0:
            raise ValueError(f"limit={limit} is negative; give 0 or more, or None for all.")
        if kind == "quantile":
            return self._quantiles(feature, sign)[:limit]
        stored = {"top": "examples", "uniform": "uniform", "near_miss": "near_miss"}[kind]
        if kind != "top":
            self.check_version(f"{kind} examples")
        arrays = self.arrays(feature, schema.blob_kind(stored, 1 if kind == "near_miss" else sign))
        count = len(arrays.get("value", ()))
        return [self._example(arrays, i) for i in range(count if limit is None else min(limit, count))]

    def _quantiles(self, feature: int, sign: int) -> list[Example]:
        self.check_version("quantile examples")
        samples = [self.arrays(feature, schema.blob_kind(kind, sign)) for kind in ("uniform", "octave", "examples")]
        found = chosen(samples, self.histogram(feature, sign))
        return [replace(self._example(samples[number], row), quantile=bounds) for number, row, bounds in found]

    def check_version(self, what: str) -> None:
        """Raise `StoreError` with the command that renews the store if it was made before stores held `what`."""
        if self.manifest["version"] < 3:
            raise StoreError(
                f"{self.folder} was collected by an earlier saelab and holds no {what}: renew it with "
                f"`{command('features', self.sae_folder or 'RUN', '--renew')}`."
            )

    def histogram(self, feature: int, sign: int = 1) -> Histogram:
        """Log-histogram of the magnitudes at one end; empty where the feature never fired."""
        arrays = self.arrays(feature, schema.blob_kind("histogram", sign))
        if not arrays:
            return Histogram(np.zeros(1), np.zeros(0, dtype=np.int64))
        first, counts = int(arrays["first"][0]), arrays["counts"].astype(np.int64)
        return Histogram(np.array(schema.bin_edges()[first : first + len(counts) + 1]), counts)

    def logits(self, feature: int) -> Logits:
        """Tokens that one unit along the decoder row promotes and suppresses most; empty off the residual stream."""
        arrays = self.arrays(feature, "logits")
        return Logits(*(self._side(arrays, side) if arrays else [] for side in ("positive", "negative")))

    def _side(self, arrays: dict[str, np.ndarray], side: str) -> list[tuple[str, float]]:
        pieces = self.pieces(arrays[f"{side}_ids"].tolist())
        return list(zip([p.decode("utf-8", "backslashreplace") for p in pieces], arrays[side].tolist(), strict=True))

    def _example(self, arrays: dict[str, np.ndarray], i: int) -> Example:
        sequence, position = int(arrays["sequence"][i]), int(arrays["position"][i])
        ids = self.sequence(sequence)
        start, stop = max(0, position - schema.WINDOW_LEFT), min(len(ids), position + schema.WINDOW_RIGHT + 1)
        pieces = self.pieces(ids[start:stop].tolist())
        left, right = trim_to_characters(pieces, position - start)
        start, stop, pieces = start + left, start + right, pieces[left:right]
        first = schema.WINDOW_LEFT + start - position  # window column 32 is the peak
        values = arrays["window"][i, first : first + stop - start]
        return Example(
            value=float(arrays["value"][i]),
            document=int(arrays["document"][i]),
            sequence=sequence,
            position=position,
            token_ids=tuple(ids[start:stop].tolist()),
            pieces=tuple(pieces),
            values=tuple(values.tolist()),
            peak=position - start,
            document_position=int(arrays["document_position"][i]) if "document_position" in arrays else None,
            store=self,
        )

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each token, from the store's own table."""
        ids = list(ids)
        if unknown := list(set(ids) - self._pieces.keys()):
            marks = ", ".join("?" * len(unknown))
            found = dict(self._query(f"SELECT id, bytes FROM token WHERE id IN ({marks})", unknown))
            self._pieces |= {index: found.get(index, f"<{index}>".encode()) for index in unknown}
        return [self._pieces[index] for index in ids]

    def sequence(self, index: int) -> np.ndarray:
        """Token ids `(ctx_len,)` of one packed context."""
        return self._token_file.get_slice("ids")[index]

    @property
    def contexts(self) -> np.ndarray:
        """Token ids of all packed contexts, `(n_contexts, ctx_len)`."""
        return self._token_file.get_tensor("ids")

    def context_documents(self, index: int) -> np.ndarray:
        """The document of each token of one context, `(ctx_len,)`; -1 on padding."""
        return self._token_file.get_slice("doc")[index]

    @property
    def _token_file(self) -> Any:
        if self._tokens is None:
            from safetensors import safe_open

            path = self.folder / schema.TOKENS
            try:
                self._tokens = safe_open(str(path), framework="np").__enter__()
            except Exception as error:
                raise StoreError(f"{path} cannot be read ({error}). {COLLECT_AGAIN}") from error
        return self._tokens

    @property
    def sae(self) -> SAE:
        """The SAE the store was collected from, loaded on first use. Raises `StoreError` when it is gone or has changed."""
        if self._sae is None:
            from saelab.interop import load_sae

            folder = self.sae_folder
            if folder is None or not folder.is_dir():
                raise StoreError(
                    f"The SAE of {self.folder} is not at {folder}; pass it with saelab.load_features(folder, sae=sae)."
                )
            self._sae = self._checked(load_sae(folder))
        return self._sae

    @property
    def sae_folder(self) -> Path | None:
        """Where the SAE was saved, resolved from the manifest; None when it had no folder."""
        folder = self.manifest["sae"]["folder"]
        return None if folder is None else (self.folder / folder).resolve()

    def verify_files(self) -> None:
        """Compare every file with its SHA-256 in the manifest, as opening does. Raises `StoreError` naming one that differs."""
        from saelab.files import sha256_file

        for name, entry in self.manifest["files"].items():
            if sha256_file(self.folder / name) != entry["sha256"]:
                raise StoreError(
                    f"{self.folder / name} was altered: its SHA-256 differs from the manifest. {COLLECT_AGAIN}"
                )

    def _checked(self, sae: SAE) -> SAE:
        expected = self.manifest["sae"]["hash"]
        if sae.hash != expected:
            raise StoreError(
                f"{self.folder} was collected from SAE {expected[:12]}, but this SAE is {sae.hash[:12]}. {COLLECT_AGAIN}"
            )
        return sae

    @property
    def _database(self) -> Path:
        return self.folder / schema.DATABASE

    def _rows(self, tail: str, values: list[Any], source: str = "feature") -> list[dict[str, Any]]:
        sign = {True: '"sign"', False: "CASE WHEN n_fired THEN 1 END", None: "NULL"}[self.signed]
        known = self.manifest["version"] >= 3
        columns = [f'"{name}"' for name in schema.COLUMNS]
        columns += [f'"{name}"' if known else f'NULL AS "{name}"' for name in schema.LABEL_COLUMNS]
        names = ", ".join([*columns, sign])
        return [
            dict(zip([*schema.COLUMNS, *schema.LABEL_COLUMNS, "sign"], row, strict=True))
            for row in self._query(f"SELECT {names} FROM {source} {tail}", values)
        ]

    def _query(self, sql: str, values: Iterable[Any] = ()) -> list[tuple]:
        try:
            return self._connection().execute(sql, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self._database} cannot be read ({error}). {COLLECT_AGAIN}") from error

    def _connection(self) -> sqlite3.Connection:
        """One read-only connection per thread: SQLite connections cannot be shared between threads."""
        if not hasattr(self._local, "opened"):
            self._local.opened = _Opened(f"file:{quote(str(self._database.resolve()))}?mode=ro")
        return self._local.opened.connection


class _Opened:
    """A connection that closes when its thread ends or its store is deleted."""

    def __init__(self, address: str) -> None:
        self.connection = sqlite3.connect(address, uri=True, check_same_thread=False)

    def __del__(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()
