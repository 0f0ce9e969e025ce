"""Questions about a feature store as an agent asks them: each answer is bounded, of plain data, and safe to show."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from saelab.features.plain import feature_data, rows_data
from saelab.features.store import FeatureStore
from saelab.features.text_size import bounded_ids, check_text
from saelab.features.visible import visible
from saelab.models.multi_model import together

MOST_ROWS, MOST_EXAMPLES = 50, 20
_MOST_CHARACTERS, _MOST_ENTRIES, _DIGITS = 600, 60, 4


class Tools:
    """The questions. Each public method is one; its docstring is what an agent reads of it."""

    def __init__(self, store: FeatureStore, load_model: Callable[[], Any]) -> None:
        """`load_model` is called at the first question about a text, for the model or the list of all that the SAE reads."""
        self._store, self._load_model, self._lock = store, load_model, threading.Lock()
        self._lm: Any = None

    def find(self, words: str, limit: int = 10) -> dict[str, Any]:
        """Find features by words in their labels, at their peaks and in the text around them, the best match first; or by the
        token they fire on, given in double quotes with its space: '" don"'. Words match from their beginning: "rain" finds
        "rainy"."""
        return brief({"features": rows_data(self._store, self._store.search(words[:200], _at_most("limit", limit)))})

    def feature(self, feature: int, examples: int = 5, kind: str = "top") -> dict[str, Any]:
        """The card of one feature: label, how often and how strongly it fires, scores, and examples of text, each split before
        and after the token on which it fires. kind: "top" (strongest, one per document), "quantile" (from weak to strong),
        "uniform" (a uniform sample of its firings), "near_miss" (it nearly fired), "bottom" (the other end of a signed
        feature). The strongest alone make most features look as if they meant one thing: look at "quantile" before you say what
        it means."""
        n = _at_most("examples", examples, MOST_EXAMPLES)
        return brief(feature_data(self._store.feature(feature), n, kind))

    def neighbours(self, feature: int, by: str = "decoder", limit: int = 10) -> dict[str, Any]:
        """The features of most similar direction (cosine) to this one, by rows of the "decoder" or of the "encoder"."""
        found = self._store.neighbours(feature, by=by, k=_at_most("limit", limit))
        return brief({"features": rows_data(self._store, found)})

    def coactivation(self, feature: int, limit: int = 10) -> dict[str, Any]:
        """The features that fire on the same tokens as this one: Jaccard, lift, P(other | this) as p_given_this, P(this |
        other) as p_this_given, counted on a sample of tokens."""
        return brief({"features": rows_data(self._store, self._store.coactivation(feature, _at_most("limit", limit)))})

    def top_features(self, text: str, order: str = "surprise", limit: int = 12) -> dict[str, Any]:
        """The features that stand out in a text, each at the token where it does most: its activation, the share of its firings
        that are weaker (percentile) and its rarity (surprise, -log10 of its density). order: "surprise" (percentile times
        surprise) or "value" (largest activation). The first call loads the language model, which takes a while."""
        from saelab.features.reading import read_text

        n = _at_most("limit", limit)
        check_text(text)
        with self._lock:
            self._lm = self._lm or together(self._load_model())
            reading = read_text(self._store, self._lm, bounded_ids(self._lm, text))
        rows = rows_data(self._store, reading.best(n, by=order))
        for row in rows:
            row["token"] = reading.pieces[row["position"]].decode("utf-8", "backslashreplace")
        return brief({"n_tokens": len(reading.pieces), "features": rows})

    def table(
        self,
        sort: str = "sharpness",
        descending: bool = True,
        min_density: float | None = None,
        max_density: float | None = None,
        limit: int = 20,
        offset: int = 0,
    ) -> dict[str, Any]:
        """Rows of the table of all features, sorted by "sharpness" (bits that a firing says about the word it fires on),
        "density" (share of tokens on which it fires), "n_fired", "p99", "max", "mean", "std", "cosine" (of encoder and decoder
        row), "label_share" or "feature" (its index). Silent features have a density of 0."""
        where = {"density": (min_density, max_density)}
        rows = self._store.table(sort, descending, where, _at_most("limit", limit), offset)
        return brief({"n_features": self._store.count(where), "features": rows_data(self._store, rows)})


def _at_most(name: str, value: int, most: int = MOST_ROWS) -> int:
    if not 0 < value <= most:
        raise ValueError(f"{name}={value} must be between 1 and {most}.")
    return value


def brief(value: Any) -> Any:
    """Plain data for an agent: floats to four digits, long text and lists cut, and every invisible or reordering character
    written out."""
    if isinstance(value, dict):
        return {visible(str(key)): brief(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [brief(one) for one in value[:_MOST_ENTRIES]]
    if isinstance(value, str):
        return visible(value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]} ...")
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
