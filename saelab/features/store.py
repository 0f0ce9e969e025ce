"""`FeatureStore`: every feature of an SAE as a table, and single features to inspect and steer with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.errors import SaelabError, StoreError
from saelab.features import schema
from saelab.features.annotations import ALL_FEATURES, Annotations
from saelab.features.collecting.words import stem_of
from saelab.features.documents import Document, tokens_of
from saelab.features.feature import Feature
from saelab.features.html_file import write_features
from saelab.features.manifest import COLLECT_AGAIN
from saelab.features.peak_words import is_word, word_at_peak
from saelab.features.records import Promoted, PromotedToken
from saelab.features.search import Search
from saelab.features.steer_scores import STEER_SCORE, source, steer_scores
from saelab.hints.next_commands import command

if TYPE_CHECKING:
    from saelab.saes import SAE

Bounds = Mapping[str, tuple[float | int | None, float | int | None]]
"""Inclusive (lowest, highest) bounds by column, None for open."""


class FeatureStore(Search):
    """Statistics and examples of every feature of an SAE from one pass over held-out tokens. Open it with `load_features`.

    `manifest` is the content of manifest.json: hashes, text source and split, mask, and counts such as `n_tokens`.
    """

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
        self.check_feature(feature)
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
        """One page of the feature table: one dict per row with the keys of `schema.COLUMNS` and `LABEL_COLUMNS`, "sign" (of the
        dominant end, None where a feature never fired) and "steer_score" (from `saelab.steering.find`, None where a feature was
        not tried). Missing metrics sort last.

        `where` holds inclusive (lowest, highest) bounds by column, None for open: `{"density": (1e-4, None)}`.
        Raises `ValueError` for an unknown column or a negative `limit` or `offset`.
        """
        _check_column(sort)
        if limit < 0 or offset < 0:
            raise ValueError(f"limit={limit}, offset={offset}: both must be 0 or more.")
        clause, values = _where(where)
        table, marks = source(self.annotations, [sort, *(where or {})])
        tail = f"{clause} {_order(sort, descending)} LIMIT ? OFFSET ?"
        return self._scored(self._rows(tail, [*marks, *values, limit, offset], table))

    def rows_of(self, features: list[int]) -> list[dict[str, Any]]:
        """Rows of the table for these features, in this order."""
        return self._scored(super().rows_of(features))

    def _scored(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        scores = steer_scores(self.annotations)
        return [row | {STEER_SCORE: scores.get(row["feature"])} for row in rows]

    def features(self, sort: str = "density", descending: bool = True, where: Bounds | None = None) -> list[int]:
        """The features within the bounds of `where`, in this order (see `table`)."""
        _check_column(sort)
        clause, values = _where(where)
        table, marks = source(self.annotations, [sort, *(where or {})])
        sql = f"SELECT feature FROM {table} {clause} {_order(sort, descending)}"
        return [feature for (feature,) in self._query(sql, [*marks, *values])]

    @property
    def annotations(self) -> Annotations:
        """What people and jobs added to the features: `annotations.sqlite` in the RUN."""
        return Annotations(self.folder.resolve().parent / "annotations.sqlite", self.manifest["sae"]["hash"])

    @property
    def labels(self) -> dict[int, str]:
        """Labels written by hand, else those of a model, by feature."""
        found = {entry.feature: str(entry.value) for entry in self.annotations.latest("model_label")}
        return found | {entry.feature: str(entry.value) for entry in self.annotations.latest("label")}

    @property
    def notes(self) -> dict[int, str]:
        """Notes that people wrote, by feature."""
        return {entry.feature: str(entry.value) for entry in self.annotations.latest("note", "")}

    @property
    def lists(self) -> dict[str, list[int]]:
        """Named lists of features; "starred" holds those with a star."""
        found: dict[str, list[int]] = {}
        for entry in self.annotations.latest("list"):
            found.setdefault(entry.name, []).append(entry.feature)
        return found

    def to_html(self, path: str | Path, features: Iterable[int], title: str = "") -> Path:
        """Write features as one HTML file of at most 300 kB that stands on its own, in this order: of many with fewer examples
        each, of very many the first ones. Returns its path. Raises `ValueError` for an empty list or an index out of range."""
        return write_features([self.feature(feature) for feature in features], path, title)

    def verify(self, lm: Any = None, n_examples: int = 100, *, progress: bool = True) -> Any:
        """Compare every file with its SHA-256; with a model, check all numbers against each other and compute `n_examples` stored
        examples again (and all others of their contexts), which the annotations then record. Raises `StoreError` naming what
        differs."""
        self.verify_files()
        if lm is None:
            return None
        from saelab.features.verify import verify

        found = verify(self, lm, n_examples, progress=progress)
        self.record_verified(found)
        return found

    def record_verified(self, found: Any) -> None:
        """Note in the annotations that the store was verified."""
        self.annotations.add(ALL_FEATURES, "verified", found._asdict())

    def top_features(self, lm: Any, text: Any, k: int = 10) -> list[list[dict[str, Any]]]:
        """For each token of a text (or ids) the `k` features that stand out most: dicts with "feature", "value", "percentile"
        (share of the feature's firings below that value) and "surprise" (-log10 of its density), ordered by their product."""
        from saelab.features.reading import read_text

        return read_text(self, lm, text).top(k)

    def document(self, number: int) -> Document:
        """A whole document, by the number that its examples name: all of its tokens that the pass read. Raises `ValueError` for a
        number of no document."""
        bos = self.manifest.get("prepend_bos", True)
        n_start = int(bos) if isinstance(bos, bool) else len(bos)
        context, position = tokens_of(self._token_file.get_tensor("doc"), number, n_start)
        if number < 0 or not len(context):
            raise ValueError(
                f"document={number} is none of the {self.manifest['n_documents']:,} documents of {self.folder}."
            )
        first, last = int(context[0]), int(context[-1])
        ids = self._token_file.get_slice("ids")[first : last + 1][context - first, position].tolist()
        return Document(int(number), tuple(ids), tuple(self.pieces(ids)), context, position)

    def promoted(self, feature: int) -> Promoted:
        """Tokens whose logits its decoder row changes most against what other features do to them; empty off the residual stream,
        and by the size of the change in a store of an earlier saelab."""
        arrays = self.arrays(feature, "logits")
        sides = ("positive", "negative") if arrays else ()
        return Promoted(*([self._promoted(arrays, side) for side in sides] or ([], [])))

    def _promoted(self, arrays: dict[str, np.ndarray], side: str) -> list[PromotedToken]:
        if f"z_{side}" not in arrays:
            return [PromotedToken(text, None, logit) for text, logit in self._side(arrays, side)]
        logits = arrays.get(f"z_{side}_logits")
        found = self._side(arrays, f"z_{side}")
        return [
            PromotedToken(text, z, None if logits is None else float(logits[i])) for i, (text, z) in enumerate(found)
        ]

    def peak_stems(self, feature: int) -> list[str]:
        """The stem of the word at the peak of each of the strongest examples; "" where that is no word of three letters or more
        (in other scripts than Latin, of one)."""
        words = [word_at_peak(example) for example in self.feature(feature).examples()]
        return [stem_of(word) if is_word(word) else "" for word in words]

    def contrast(self, lm: Any, a: Any, b: Any) -> Any:
        """Which features fire in more texts of one list than of the other: see `contrast.Contrast`, whose `rows()` are sorted by
        the difference. At least 10 texts in each are needed for a claim."""
        from saelab.features.text_sets import contrast_texts

        return contrast_texts(self, lm, a, b)

    def to_parquet(
        self, folder: str | Path, *, kinds: Sequence[str] | None = None, progress: bool = True
    ) -> list[Path]:
        """Write the features and their examples as two Parquet files into a new folder: see `tables.save_tables`."""
        from saelab.features.tables import save_tables

        return save_tables(self, folder, kinds=kinds, progress=progress)

    def count(self, where: Bounds | None = None) -> int:
        """Number of features within the bounds of `where` (see `table`)."""
        clause, values = _where(where)
        table, marks = source(self.annotations, where or {})
        return self._query(f"SELECT count(*) FROM {table} {clause}", [*marks, *values])[0][0]

    @property
    def additive(self) -> bool:
        """Whether the SAE's decoder adds up features; otherwise it has products of them (`interactions`)."""
        return self.manifest["sae"].get("additive", True)

    def interactions(self, feature: int, k: int = 20, lm: Any = None, **options: Any) -> list[dict[str, Any]]:
        """The features whose products with this one a `poly` SAE decodes to most: see `interactions.interactions`."""
        from saelab.features.interactions import interactions

        return interactions(self, feature, k, lm, **options)

    def column(self, name: str) -> np.ndarray:
        """One metric of every feature, `(d_sae,)` float64 in feature order; NaN where a feature never fired
        or was not tried."""
        _check_column(name)
        table, marks = source(self.annotations, [name])
        rows = self._query(f'SELECT "{name}" FROM {table} ORDER BY feature', marks)
        return np.array([np.nan if value is None else value for (value,) in rows], dtype=np.float64)


def load_features(path: str | Path, sae: SAE | None = None) -> FeatureStore:
    """Open a feature store, given its folder, a RUN, or one SAE folder in a RUN.

    Pass `sae` to steer without loading it from disk; it must be the SAE the store was collected from.
    Raises `StoreError` when there is no readable store or it belongs to another SAE, `ValueError` when a RUN holds several.
    """
    path = Path(path)
    if (path / schema.MANIFEST).exists() or not path.is_dir():
        return FeatureStore(path, sae)
    from saelab.runs import find_saes

    try:
        runs = find_saes(path)
    except (SaelabError, ValueError) as error:
        raise StoreError(f"{path} holds no feature store: {error}") from error
    folders = [run.features_dir for run in runs if run.features_dir and (run.features_dir / schema.MANIFEST).exists()]
    if len(folders) > 1:
        names = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"{path} holds several feature stores; open one of them: {names}.")
    if not folders:
        raise StoreError(
            f"{path} holds no feature store. Collect one: `{command('features', path)}`, or saelab.collect_features(...) in "
            "Python."
        )
    return FeatureStore(folders[0], sae)


def _check_column(name: str) -> None:
    known = (*schema.SORTABLE, STEER_SCORE)
    if name not in known:
        raise ValueError(f"column {name!r} does not exist; there are {', '.join(known)}.")


def _order(sort: str, descending: bool) -> str:
    """Missing values last; equal ones by index, in the same direction: SQLite then reads the column's index and sorts nothing."""
    direction = "DESC" if descending else "ASC"
    return f'ORDER BY "{sort}" {direction} NULLS LAST, feature {direction}'


def _where(where: Bounds | None) -> tuple[str, list[float]]:
    terms, values = [], []
    for name, (low, high) in (where or {}).items():
        _check_column(name)
        for bound, sign in ((low, ">="), (high, "<=")):
            if bound is not None:
                terms.append(f'"{name}" {sign} ?')
                values.append(bound)
    return (f"WHERE {' AND '.join(terms)}" if terms else ""), values
