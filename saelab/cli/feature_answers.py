"""What `saelab features RUN` answers about features that have been collected: those that words find, single ones, and those that
tell two files of texts apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Answer = Callable[..., None]


def find(answer: Answer, store: Any, words: str, limit: int) -> None:
    """The features that words, or a token in double quotes, find."""
    from saelab.features.plain import rows_data

    found = rows_data(store, store.search(words, limit))
    lines = [_line(row) for row in found] or [f"No feature of {store.folder} is found by these words: try others."]
    answer({"folder": store.folder, "words": words, "features": found}, *lines)


def cards(answer: Answer, store: Any, features: Sequence[int], n_examples: int) -> None:
    """The cards of these features."""
    from saelab.features.plain import feature_data

    chosen = [store.feature(index) for index in features]
    found = [feature_data(one, n_examples) for one in chosen]
    answer({"folder": store.folder, "features": found}, *(f"{one!r}\n" for one in chosen))


def contrast(answer: Answer, store: Any, lm: Any, sets: Sequence[tuple[str, list[str]]], limit: int) -> None:
    """The features that fire in more texts of one named set than of the other."""
    from tqdm.auto import tqdm

    from saelab.features.text_sets import contrast_texts

    (name_a, a), (name_b, b) = sets
    with tqdm(unit=" texts", desc="Reading") as bar:
        found = contrast_texts(store, lm, a, b, progress=lambda done, _: bar.update(done - bar.n))
    more = [found.rows(limit, "a"), found.rows(limit, "b")]
    lines = [f"{found.summary} Marked *; in brackets the 95 % interval of the difference."]
    for name, rows in zip((name_a, name_b), more, strict=True):
        lines += ["", f"Fire in more texts of {name}:", *(_contrast_line(row) for row in rows)]
    data = {"folder": store.folder, "texts": [name_a, name_b], "n_texts": [found.a.n_texts, found.b.n_texts]}
    said = {"enough": found.enough, "n_tested": found.n_tested, "summary": found.summary}
    answer(data | said | {"more_in_a": more[0], "more_in_b": more[1]}, *lines)


def texts(path: Path, column: str) -> list[str]:
    """The lines of a text file, or the texts of any other."""
    from saelab.features.contrast import lines
    from saelab.tokens import load_texts

    if path.suffix.lower() == ".txt" and path.is_file():
        return lines(path.read_text(encoding="utf-8-sig", errors="replace"))
    return [one for one in load_texts(path, column=column).documents("all") if isinstance(one, str)]


def _line(row: dict[str, Any]) -> str:
    from saelab.features.render import fixed, percent
    from saelab.features.visible import visible

    numbers = f"{percent(row['density']):>8}  {fixed(row['sharpness'], 1):>5} bits"
    return f"{row['feature']:>7}  {numbers}  {visible(row['label'] or 'never fired')}"


def _contrast_line(row: dict[str, Any]) -> str:
    from saelab.features.visible import visible

    shares = f"{row['share_a']:>4.0%} and {row['share_b']:>4.0%}"
    interval = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
    mark = " *" if row["found"] else "  "
    return f"{row['feature']:>7}  {shares}  {interval}  q {row['q']:<7.2g}{mark}  {visible(row['label'] or '')}"
