"""The files of a feature store and the columns of its tables; `writer.py` writes them, `reader.py` reads them."""

from __future__ import annotations

import math

FORMAT = "saelab features"
VERSION = 3
"""Versions 1 and 2 hold no labels, samples and near misses, and no search index; only a store with negative activations has the
table `feature_end` and the column "sign"."""
MANIFEST, DATABASE, TOKENS, SAMPLE = "manifest.json", "store.sqlite", "tokens.safetensors", "sample.safetensors"
STATE = "state.safetensors"
"""The collector's state, from which a store is extended; nothing else reads it."""

WINDOW_LEFT, WINDOW_RIGHT = 32, 16
BINS_PER_OCTAVE, LOWEST_OCTAVE, OCTAVES = 4, -24, 48
N_BINS = BINS_PER_OCTAVE * OCTAVES

COLUMNS = {
    "feature": "row of W_enc and W_dec",
    "n_fired": "counted tokens with a non-zero value",
    "density": "n_fired / counted tokens",
    "mean": "mean of the non-zero magnitudes at the dominant end",
    "std": "their standard deviation",
    "p99": "their 99th percentile",
    "max": "the largest of them",
    "cosine": "cosine between encoder and decoder row",
    "peak_token": "token id at the largest",
    "top_logit": "token id that the feature promotes most at that end",
    "p99_exact": "1 when p99 was read off the values, 0 when interpolated in the histogram",
}
LABEL_COLUMNS = {
    "label": "commonest words at the feature's peaks, and what follows them",
    "label_share": "share of the squared activation at peaks that falls on the words of the label",
    "sharpness": "bits that the feature's firing says about the word it fires on",
    "position": "the position in the context at which nearly all firings lie, counted from 0",
}
"""Of version 3. NULL where a feature fired too seldom."""
"""The dominant end of a feature is the sign it fires with most often; a feature that is never negative has only one end."""
END_COLUMNS = ("sign", "n_fired", "mean", "std", "p99", "max", "p99_exact")
SORTABLE = ("feature", "n_fired", "density", "mean", "std", "p99", "max", "cosine", "sharpness", "label_share")

_TYPES = {"feature": "INTEGER PRIMARY KEY", "label": "TEXT"}
_TYPES |= dict.fromkeys(("n_fired", "peak_token", "top_logit", "p99_exact", "position"), "INTEGER")
_TABLE = ", ".join(f'"{name}" {_TYPES.get(name, "REAL")}' for name in (*COLUMNS, *LABEL_COLUMNS))
DDL = [
    f"CREATE TABLE feature ({_TABLE})",
    "CREATE TABLE blob (feature INTEGER, kind TEXT, data BLOB, PRIMARY KEY (feature, kind)) WITHOUT ROWID",
    "CREATE TABLE token (id INTEGER PRIMARY KEY, bytes BLOB, word TEXT)",
    "CREATE TABLE peak (token INTEGER, feature INTEGER, count INTEGER, share REAL, mean REAL, "
    "PRIMARY KEY (token, feature)) WITHOUT ROWID",
    "CREATE VIRTUAL TABLE words USING fts5(label, peaks, context, content='', tokenize=\"unicode61 remove_diacritics 2\")",
]
SIGNED_DDL = [
    'ALTER TABLE feature ADD COLUMN "sign" INTEGER',
    'CREATE TABLE feature_end (feature INTEGER, "sign" INTEGER, "n_fired" INTEGER, "mean" REAL, "std" REAL, "p99" REAL, '
    '"max" REAL, "p99_exact" INTEGER, PRIMARY KEY (feature, sign)) WITHOUT ROWID',
]
INDEXES = [
    *(f'CREATE INDEX feature_{name} ON feature ("{name}", feature)' for name in SORTABLE if name != "feature"),
    "CREATE INDEX token_word ON token (word)",
]
MIN_BOTH = 10
"""Tokens of the sample on which both of two features fire, below which they are not believed to interact."""


def blob_kind(kind: str, sign: int) -> str:
    """The `kind` under which the "examples" or "histogram" of one end are stored."""
    return kind if sign > 0 else f"{kind}_negative"


def bin_edges() -> list[float]:
    """The N_BINS + 1 edges of the log-histogram: from 2^-24 to 2^24, each octave split into four at equal mantissa steps."""
    mantissas = [1 + step / BINS_PER_OCTAVE for step in range(BINS_PER_OCTAVE)]
    edges = [m * 2.0 ** (LOWEST_OCTAVE + octave) for octave in range(OCTAVES) for m in mantissas]
    return [*edges, 2.0 ** (LOWEST_OCTAVE + OCTAVES)]


def bin_name(value: float) -> str:
    """The bin of a non-zero value, told apart from that of its negative: "-37"."""
    mantissa, exponent = math.frexp(abs(value))  # in [0.5, 1): twice it lies in [1, 2)
    place = BINS_PER_OCTAVE * (exponent - 1 - LOWEST_OCTAVE) + int((2 * mantissa - 1) * BINS_PER_OCTAVE)
    return f"{'-' if value < 0 else ''}{min(max(place, 0), N_BINS - 1)}"
