"""How long a text may be that a page or an agent has read: it should be answered within seconds."""

from __future__ import annotations

from typing import Any

MAX_CHARACTERS, MAX_TOKENS = 8000, 1000


def check_text(text: str) -> None:
    """Raise `ValueError` for a text that is empty or too long; needs no model."""
    if not text.strip():
        raise ValueError("The text is empty: write a few words.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The text has {len(text):,} characters; shorten it to at most {MAX_CHARACTERS:,}.")


def bounded_ids(lm: Any, text: str) -> Any:
    """Token ids (1, seq) of a text. Raises `ValueError` for one of too many tokens."""
    ids, most = lm.to_ids(text), min(MAX_TOKENS, lm.max_ctx)
    if ids.shape[1] > most:
        raise ValueError(f"The text has {ids.shape[1]:,} tokens; shorten it to at most {most:,}.")
    return ids
