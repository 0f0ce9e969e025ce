"""Finds features by words, by the token at their peaks, and by direction or co-activation with another feature."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from saelab.errors import StoreError
from saelab.features import schema
from saelab.features.decoders import by_source
from saelab.features.reader import StoreReader
from saelab.validation import check_integer

_MOST_ROWS = 10_000_000
_WEIGHTS = "10.0, 5.0, 1.0"
"""Of the columns of the search index: label, words at peaks, text around them."""


class Search(StoreReader):
    """The calls of a store that lead from one thing to features."""

    @property
    def labels(self) -> dict[int, str]:
        """Labels that were added to features."""
        return {}

    @property
    def notes(self) -> dict[int, str]:
        """Notes that were added to features."""
        return {}

    def search(self, words: str, limit: int = 50) -> list[dict[str, Any]]:
        """Rows of the table (as `table` returns them) for features that these words find, the best first.

        Looks in labels and in the words at peaks, where a word counts by its share of the activation there: for these words, then
        for words that begin so; then in the text around. All of the words, or any of them where no feature has all. Labels and
        notes that were added are searched first. Text in double quotes, such as `'" don"'`, and text without letters or digits is
        looked for as a token. "found_in" says where: "label", "note", "peaks" or "text". Raises `ValueError` for an empty text.
        """
        check_integer("limit", limit, 1, _MOST_ROWS)
        quote = words.replace("\0", " ").strip()
        if len(quote) > 2 and quote[0] == quote[-1] == '"':
            return self.firing_on(quote[1:-1], limit)
        terms = quote.split()
        if not terms and words.strip():
            return []  # nothing that could be written
        if not terms:
            raise ValueError("search needs at least one word, such as store.search('weather').")
        self.check_version("search index")
        found_in: dict[int, str] = {}
        for where, texts in (("label", self.labels), ("note", self.notes)):
            for feature in sorted(feature for feature, text in texts.items() if _all_in(terms, text)):
                found_in.setdefault(feature, where)
        exact = ['"' + term.replace('"', '""') + '"' for term in terms if any(char.isalnum() for char in term)]
        if not exact:
            return self.firing_on(quote, limit)
        quoted = [f"{term}*" for term in exact]
        both, either = " ".join(quoted), " OR ".join(quoted)
        at_peaks = [f"{{label peaks}} : ({terms})" for terms in (" ".join(exact), both)]
        for match in [*at_peaks, both]:
            if len(found_in) < limit:  # ranking all texts that hold a common word takes long, and these come last
                for feature in self._matching(match, limit):
                    found_in.setdefault(feature, "text" if match == both else "peaks")
        found_in = found_in or dict.fromkeys(self._matching(either, limit), "text")
        return [row | {"found_in": found_in[row["feature"]]} for row in self.rows_of(list(found_in)[:limit])]

    def _matching(self, match: str, limit: int) -> list[int]:
        sql = f"SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words, {_WEIGHTS}) LIMIT ?"
        return [feature for (feature,) in self._query(sql, [match, limit])]

    def firing_on(self, token: str | int, limit: int = 50) -> list[dict[str, Any]]:
        """Rows of the table for features that peak on that token, with "peak_share" (the share of the squared activation at their
        peaks) and "peak_mean" (their mean activation there); the largest share first.

        A text is taken exactly (" dog" with its space), or, if no token is spelled so, without spaces and case. An int is a token
        id.
        """
        self.check_version("token index")
        check_integer("limit", limit, 1, _MOST_ROWS)
        if isinstance(token, int | np.integer) and not 0 <= token < 2**31:
            raise ValueError(f"token={token} is no token id.")
        ids = [int(token)] if isinstance(token, int | np.integer) else self._ids_of(token)
        if not ids:
            return []
        marks = ", ".join("?" * len(ids))
        found = self._query(
            f"SELECT feature, SUM(share), SUM(mean * count) / SUM(count) FROM peak WHERE token IN ({marks}) "
            "GROUP BY feature ORDER BY 2 DESC, 3 DESC, 1 LIMIT ?",
            [*ids, limit],
        )
        rows = self.rows_of([feature for feature, _, _ in found])
        return [
            row | {"peak_share": share, "peak_mean": mean} for row, (_, share, mean) in zip(rows, found, strict=True)
        ]

    def _ids_of(self, text: str) -> list[int]:
        if not text:
            raise ValueError("firing_on needs a token, such as store.firing_on(' dog').")
        exact = self._query("SELECT id FROM token WHERE bytes = ?", [text.encode()])
        found = exact or self._query("SELECT id FROM token WHERE word = ?", [text.strip().casefold()])
        return [index for (index,) in found]

    def peak_tokens(self, feature: int) -> list[tuple[int, float]]:
        """The commonest tokens (ids, at most 16) at a feature's sampled peaks, each with its share of the peaks."""
        self.check_version("token index")
        sql = "SELECT token, share FROM peak WHERE feature = ? ORDER BY share DESC, token"
        return self._query(sql, [feature])

    def rows_of(self, features: list[int]) -> list[dict[str, Any]]:
        """Rows of the table for these features, in this order."""
        if not features:
            return []
        rows = {
            row["feature"]: row for row in self._rows(f"WHERE feature IN ({', '.join('?' * len(features))})", features)
        }
        return [rows[feature] for feature in features]

    def row_of(self, feature: int) -> dict[str, Any]:
        """The row of one feature, read once."""
        if feature not in self._known_rows:
            (self._known_rows[feature],) = self._rows("WHERE feature = ?", [feature])
        return self._known_rows[feature]

    @cached_property
    def _known_rows(self) -> dict[int, dict[str, Any]]:
        return {}

    def neighbours(self, feature: int, *, by: str = "decoder", k: int = 20) -> list[dict[str, Any]]:
        """The `k` features of largest cosine to this one, as dicts with "feature" and "cosine", by their rows in the decoder or
        the encoder (all sources of a crosscoder concatenated); all others where `k` exceeds their number. Raises `ValueError`
        for another `by`, and for `k` under 1."""
        check_integer("k", k, 1)
        if by not in ("decoder", "encoder"):
            raise ValueError(f"by={by!r} is unknown; neighbours are by 'decoder' or 'encoder'.")
        self.check_feature(feature)
        cosines = self.directions(by) @ self.directions(by)[feature]
        cosines[feature] = -np.inf
        best = _largest(cosines, min(k, self.d_sae - 1))
        return [{"feature": int(i), "cosine": float(cosines[i])} for i in best]

    def directions(self, by: str = "decoder") -> np.ndarray:
        """The rows of the decoder, or of the encoder, at norm 1, `(d_sae, width)` float32; all sources of a crosscoder in one."""
        if by not in self._unit_rows:
            self._unit_rows[by] = unit_rows(self.weights["W_enc" if by == "encoder" else "W_dec"])
        return self._unit_rows[by]

    @cached_property
    def _unit_rows(self) -> dict[str, np.ndarray]:
        return {}

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Weights of the SAE by name in float32, `W_dec` by source if it has several; read from its folder without torch where
        they are stored so."""
        folder = self.sae_folder
        path = None if folder is None else folder / "sae.safetensors"
        if self._sae is None and path is not None and path.is_file():
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="np") as file:
                    found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if {"W_enc", "W_dec"} <= found.keys():
                    found["W_dec"] = by_source(found["W_dec"], self.d_sae)
                    return {name: array.astype(np.float32) for name, array in found.items()}
            except (SafetensorError, OSError, TypeError, AttributeError):
                pass  # bfloat16, which NumPy does not know
        sae = self.sae
        named = {
            name: tensor for name in ("W_enc", "W_dec", "b_enc") if (tensor := getattr(sae, name, None)) is not None
        }
        found = {name: tensor.detach().float().cpu().numpy() for name, tensor in named.items()}
        return found | ({"W_dec": by_source(found["W_dec"], self.d_sae)} if "W_dec" in found else {})

    def coactivation(self, feature: int, k: int = 20) -> list[dict[str, Any]]:
        """The `k` features that fire most often on the tokens on which this one fires, by exact counts over the token sample.

        Dicts with "feature", "n_both", "jaccard" (both / either), "lift" (P(both) / (P(this) P(other))), "p_given_this" =
        P(other | this) and "p_this_given" = P(this | other); the largest Jaccard first. [] where it fired on no token of the
        sample. Raises `ValueError` for `k` under 1.
        """
        check_integer("k", k, 1)
        self.check_feature(feature)
        both, counts, n = self.firing_together(feature)
        here = counts[feature]
        jaccard = both / np.maximum(counts + here - both, 1)
        jaccard[feature] = -1.0
        best = [int(i) for i in _largest(jaccard, min(k, self.d_sae - 1)) if both[i]]
        return [
            {
                "feature": i,
                "n_both": int(both[i]),
                "jaccard": float(jaccard[i]),
                "lift": float(both[i] * n / (counts[i] * here)),
                "p_given_this": float(both[i] / here),
                "p_this_given": float(both[i] / counts[i]),
            }
            for i in best
        ]

    def firing_together(self, feature: int) -> tuple[np.ndarray, np.ndarray, int]:
        """On how many tokens of the sample each feature fires together with this one, on how many it fires, `(d_sae,)` each, and
        how many tokens there are."""
        self.check_version("token sample")
        sample = self.sample
        begins, offsets = sample["feature_offsets"], sample["offsets"]
        rows = sample["by_feature"][begins[feature] : begins[feature + 1]].tolist()
        here = [sample["features"][offsets[row] : offsets[row + 1]] for row in rows]
        both = np.bincount(np.concatenate(here) if here else sample["features"][:0], minlength=self.d_sae)
        return both, np.diff(begins), len(sample["tokens"])

    @cached_property
    def sample(self) -> dict[str, np.ndarray]:
        """The token sample (`collecting/token_sample.py`): "tokens", "offsets" and "features"; by feature, "by_feature" (rows of
        the sample) and "feature_offsets"."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / schema.SAMPLE
        try:
            with safe_open(path, framework="np") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} cannot be read ({error}).") from error

    def check_feature(self, feature: int) -> None:
        """Raise `ValueError` for what is not the index of a feature."""
        if isinstance(feature, bool) or not isinstance(feature, int | np.integer):
            raise ValueError(f"feature={feature!r} is not an integer; this SAE has features 0 to {self.d_sae - 1}.")
        if not 0 <= feature < self.d_sae:
            raise ValueError(f"feature={feature} does not exist; this SAE has features 0 to {self.d_sae - 1}.")


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows `(d_sae, d)` at norm 1; those of a crosscoder, `(n_sources, d_sae, d)`, with all sources in one row."""
    if rows.ndim == 3:
        rows = rows.swapaxes(0, 1).reshape(rows.shape[1], -1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest values, the largest first; the smaller index wins a tie."""
    if k < len(values):
        chosen = np.argpartition(-values, k - 1)[:k]
        chosen = np.flatnonzero(values >= values[chosen].min())
    else:
        chosen = np.arange(len(values))
    return chosen[np.lexsort((chosen, -values[chosen]))][:k]


def _all_in(terms: list[str], text: str) -> bool:
    folded = text.casefold()
    return all(term.casefold() in folded for term in terms)
