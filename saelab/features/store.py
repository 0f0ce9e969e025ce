"""Reading a feature store: SQLite opened read-only, tokens memory-mapped; neither torch nor a tokenizer is needed.

`feature.py` holds what `store.feature(i)` returns, `schema.py` the files and columns.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from saelab.errors import SaelabError, StoreError
from saelab.features import schema
from saelab.features.blob import unpack_arrays
from saelab.features.feature import Feature
from saelab.features.manifest import COLLECT_AGAIN, read_manifest, signed_features
from saelab.files import read_json

if TYPE_CHECKING:
    from saelab.saes import SAE

Bounds = Mapping[str, tuple[float | int | None, float | int | None]]
"""Inclusive (lowest, highest) by column, None for open."""


class FeatureStore:
    """What one pass over held-out tokens found out about every feature of an SAE. Open one with `load_features`.

    `manifest` is the content of manifest.json: hashes, text source and split, mask and counts, `n_tokens` counted.
    """

    def __init__(self, folder: str | Path, sae: SAE | None = None) -> None:
        """Open the store in `folder`. Raises `StoreError` when it is missing, damaged, or of a newer version."""
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        self.verify()
        self._local = threading.local()
        self._tokens: Any = None
        self._sae = None
        self._pieces: dict[int, bytes] = {}
        if sae is not None:
            self._sae = self._checked(sae)
        (rows,) = self._query("SELECT count(*) FROM feature")[0]
        if rows != self.d_sae:
            raise StoreError(f"{self._database} holds {rows} features, its manifest says {self.d_sae}. {COLLECT_AGAIN}")

    @property
    def d_sae(self) -> int:
        """How many features there are, silent ones included."""
        return self.manifest["sae"]["d_sae"]

    @property
    def n_tokens(self) -> int:
        """Tokens that were counted: those the mask kept."""
        return self.manifest["n_tokens"]

    @property
    def hook_name(self) -> str:
        """The model site that features are steered at: where the SAE writes, of several sites the last."""
        return self.manifest["hook_name"]

    @cached_property
    def signed(self) -> bool | None:
        """Whether features were negative anywhere. None in a store of an earlier version whose SAE has negative values: its
        quantiles and examples are those of the signed value, and there is no unit to steer by."""
        config = None if self._sae is None else asdict(self._sae.config)
        if config is None and "signed" not in self.manifest and self.sae_folder is not None:
            with suppress(SaelabError, KeyError, TypeError):
                config = read_json(self.sae_folder / "sae.json")["config"]
        return signed_features(self.manifest, config)

    def __len__(self) -> int:
        return self.d_sae

    def __repr__(self) -> str:
        dead = self.count({"n_fired": (None, 0)})
        return (
            f"FeatureStore({str(self.folder)!r}: {self.d_sae} features of {self.hook_name}, {dead} of them silent "
            f"on {self.n_tokens:,} {self.manifest['split']} tokens)"
        )

    def feature(self, feature: int) -> Feature:
        """The feature with this index. Raises `ValueError` outside 0 to d_sae - 1."""
        if isinstance(feature, bool) or not isinstance(feature, int | np.integer):
            raise ValueError(f"feature={feature!r} is not an integer; this SAE has features 0 to {self.d_sae - 1}.")
        if not 0 <= feature < self.d_sae:
            raise ValueError(f"feature={feature} does not exist; this SAE has features 0 to {self.d_sae - 1}.")
        rows = self._rows("WHERE feature = ?", [int(feature)])
        if not rows:
            raise StoreError(f"{self._database} has no row for feature {feature}. {COLLECT_AGAIN}")
        return Feature(self, rows[0])

    def table(
        self,
        sort: str = "density",
        descending: bool = True,
        where: Bounds | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """One page of the feature table, a dict a row with the keys of `schema.COLUMNS` and "sign" (of the dominant
        end, None where a feature never fired); empty metrics sort last.

        `where` gives inclusive (lowest, highest) bounds by column, None for open: `{"density": (1e-4, None)}`.
        Raises `ValueError` for an unknown column or a negative `limit` or `offset`.
        """
        _check_column(sort)
        if limit < 0 or offset < 0:
            raise ValueError(f"limit={limit}, offset={offset}: both must be 0 or more.")
        clause, values = _where(where)
        order = "DESC" if descending else "ASC"
        tail = f'{clause} ORDER BY "{sort}" IS NULL, "{sort}" {order}, feature LIMIT ? OFFSET ?'
        return self._rows(tail, [*values, limit, offset])

    def count(self, where: Bounds | None = None) -> int:
        """How many features lie within the bounds of `where` (see `table`)."""
        clause, values = _where(where)
        return self._query(f"SELECT count(*) FROM feature {clause}", values)[0][0]

    def column(self, name: str) -> np.ndarray:
        """One metric of every feature, `(d_sae,)` float64 in feature order; NaN where a feature never fired."""
        _check_column(name)
        rows = self._query(f'SELECT "{name}" FROM feature ORDER BY feature')
        return np.array([np.nan if value is None else value for (value,) in rows], dtype=np.float64)

    def arrays(self, feature: int, kind: str) -> dict[str, np.ndarray]:
        """The stored arrays of one kind ("logits", or as `schema.blob_kind` says); {} where there are none."""
        rows = self._query("SELECT data FROM blob WHERE feature = ? AND kind = ?", [feature, kind])
        return unpack_arrays(rows[0][0]) if rows else {}

    def ends(self, feature: int) -> list[dict[str, Any]]:
        """What is known of each end (sign) that a feature fires with, a dict a row with `schema.END_COLUMNS`, the dominant
        one first; [] in a store that threw the signs together."""
        if self.signed is None:
            return []
        if not self.signed:
            row = self.feature(feature).row
            return [{name: row[name] for name in schema.END_COLUMNS}] if row["n_fired"] else []
        names = ", ".join(f'"{name}"' for name in schema.END_COLUMNS)
        found = self._query(f"SELECT {names} FROM feature_end WHERE feature = ?", [feature])
        rows: list[dict[str, Any]] = [dict(zip(schema.END_COLUMNS, row, strict=True)) for row in found]
        dominant = self.feature(feature).row["sign"]
        return sorted(rows, key=lambda row: row["sign"] != dominant)

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of tokens, from the store's own table."""
        ids = list(ids)
        for index in set(ids) - self._pieces.keys():
            rows = self._query("SELECT bytes FROM token WHERE id = ?", [index])
            self._pieces[index] = rows[0][0] if rows else f"<{index}>".encode()
        return [self._pieces[index] for index in ids]

    def sequence(self, index: int) -> np.ndarray:
        """Token ids `(ctx_len,)` of one packed sequence."""
        if self._tokens is None:
            from safetensors import safe_open

            path = self.folder / schema.TOKENS
            try:
                self._tokens = safe_open(str(path), framework="np").__enter__()
            except Exception as error:
                raise StoreError(f"{path} cannot be read ({error}). {COLLECT_AGAIN}") from error
        return self._tokens.get_slice("ids")[index]

    @property
    def sae(self) -> SAE:
        """The SAE the store was collected from, loaded on first use; `StoreError` when it is gone or another one."""
        if self._sae is None:
            from saelab.interop import load_sae

            folder = self.sae_folder
            if folder is None or not folder.is_dir():
                raise StoreError(
                    f"The SAE of {self.folder} is not at {folder}; give it with saelab.load_features(folder, sae=sae)."
                )
            self._sae = self._checked(load_sae(folder))
        return self._sae

    @property
    def sae_folder(self) -> Path | None:
        """Where the SAE was saved, resolved from the manifest; None when it had no folder."""
        folder = self.manifest["sae"]["folder"]
        return None if folder is None else (self.folder / folder).resolve()

    def verify(self) -> None:
        """Compare every file with the SHA-256 of the manifest, as opening does; `StoreError` names one that differs."""
        from saelab.files import sha256_file

        for name, entry in self.manifest["files"].items():
            if sha256_file(self.folder / name) != entry["sha256"]:
                raise StoreError(
                    f"{self.folder / name} was altered: its SHA-256 is not the manifest's. {COLLECT_AGAIN}"
                )

    def _checked(self, sae: SAE) -> SAE:
        expected = self.manifest["sae"]["hash"]
        if sae.hash != expected:
            raise StoreError(
                f"{self.folder} was collected from the SAE {expected[:12]}, this one is {sae.hash[:12]}. {COLLECT_AGAIN}"
            )
        return sae

    @property
    def _database(self) -> Path:
        return self.folder / schema.DATABASE

    def _rows(self, tail: str, values: list[Any]) -> list[dict[str, Any]]:
        sign = {True: '"sign"', False: "CASE WHEN n_fired THEN 1 END", None: "NULL"}[self.signed]
        names = ", ".join([*(f'"{name}"' for name in schema.COLUMNS), sign])
        return [
            dict(zip([*schema.COLUMNS, "sign"], row, strict=True))
            for row in self._query(f"SELECT {names} FROM feature {tail}", values)
        ]

    def _query(self, sql: str, values: Iterable[Any] = ()) -> list[tuple]:
        try:
            return self._connection().execute(sql, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self._database} cannot be read ({error}). {COLLECT_AGAIN}") from error

    def _connection(self) -> sqlite3.Connection:
        """One read-only connection per thread: SQLite connections do not travel between threads."""
        if not hasattr(self._local, "opened"):
            self._local.opened = _Opened(f"file:{quote(str(self._database.resolve()))}?mode=ro")
        return self._local.opened.connection


class _Opened:
    """A connection that closes when its thread or its store ends."""

    def __init__(self, address: str) -> None:
        self.connection = sqlite3.connect(address, uri=True, check_same_thread=False)

    def __del__(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()


def load_features(path: str | Path, sae: SAE | None = None) -> FeatureStore:
    """Open the feature store in a feature folder, in a RUN, or of one SAE folder in a RUN.

    `sae` saves loading it from disk when a feature is used to steer; it must be the one the store was collected from.
    Raises `StoreError` when there is no readable store, `ValueError` when a RUN holds several.
    """
    path = Path(path)
    if (path / schema.MANIFEST).exists() or not path.is_dir():
        return FeatureStore(path, sae)
    from saelab.runs import find_saes

    try:
        runs = find_saes(path)
    except (SaelabError, ValueError):
        runs = []
    folders = [run.features_dir for run in runs if run.features_dir and (run.features_dir / schema.MANIFEST).exists()]
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"{path} holds several feature stores; open one of them: {names}.")
    if not folders:
        raise StoreError(f"{path} holds no feature store. {COLLECT_AGAIN}")
    return FeatureStore(folders[0], sae)


def _check_column(name: str) -> None:
    if name not in schema.SORTABLE:
        raise ValueError(f"column {name!r} does not exist; there are {', '.join(schema.SORTABLE)}.")


def _where(where: Bounds | None) -> tuple[str, list[float]]:
    terms, values = [], []
    for name, (low, high) in (where or {}).items():
        _check_column(name)
        for bound, sign in ((low, ">="), (high, "<=")):
            if bound is not None:
                terms.append(f'"{name}" {sign} ?')
                values.append(bound)
    return (f"WHERE {' AND '.join(terms)}" if terms else ""), values
