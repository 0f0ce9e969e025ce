"""Maps token ids to bytes, and runs of tokens to byte-exact text.

A byte-level tokenizer may split one CJK character or emoji into several tokens. Decoding each token alone shows
garbage, so the store keeps the bytes of each token, and `display_groups` joins neighbours until they form whole
characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEIGHBOURS = "a", "b"


class Group(NamedTuple):
    """A run of tokens shown as one piece of text: `text` is that of tokens `start` to `stop - 1`."""

    start: int
    stop: int
    text: str


def token_bytes(tokenizer: Any, ids: Iterable[int]) -> dict[int, bytes]:
    """The bytes of each token id of a Hugging Face tokenizer.

    Decodes each piece between two other tokens, to find out how the vocabulary spells bytes and spaces: byte-level BPE,
    SentencePiece with or without byte fallback, WordPiece, word endings. Special tokens keep their written form. Without a
    tokenizer a token is shown as its id.
    """
    if tokenizer is None:
        return {index: f"<|{index}|>".encode() for index in ids}
    added = tokenizer.added_tokens_decoder
    speller = _Speller(tokenizer.convert_tokens_to_string)
    result = {}
    for index in ids:
        piece = tokenizer.convert_ids_to_tokens(index)
        if piece is None:
            result[index] = f"<|{index}|>".encode()
        elif index in added and getattr(added[index], "special", True):
            result[index] = str(added[index]).encode()
        else:
            result[index] = speller.piece_bytes(piece)
    return result


class _Speller:
    """Turns vocabulary pieces back into bytes, as the tokenizer's decoder does in the middle of a text."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        left, right = _NEIGHBOURS
        self._before = decode([left])
        self._after = decode([left, right]).removeprefix(self._before)
        self._byte_level = self._between("\u0120") == " "
        self._byte_fallback = self._between("<0x41>") == "A"

    def _between(self, piece: str) -> str | None:
        """The text of `piece` between two other tokens; None where the decoder merges them."""
        left, right = _NEIGHBOURS
        text = self._decode([left, piece, right])
        if not text.startswith(self._before) or not text.endswith(self._after):
            return None
        return text[len(self._before) : len(text) - len(self._after)]

    def piece_bytes(self, piece: str) -> bytes:
        if self._byte_level and all(char in _byte_alphabet() for char in piece):
            return bytes(_byte_alphabet()[char] for char in piece)
        if self._byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        text = self._between(piece)
        return (piece if text is None else text).encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


def display_groups(pieces: Sequence[bytes]) -> list[Group]:
    """Join tokens until their bytes form whole UTF-8 characters; invalid bytes are shown as `\\xe4`."""
    groups: list[Group] = []
    start = 0
    while start < len(pieces):
        stop, text = _next_group(pieces, start)
        groups.append(Group(start, stop, text))
        start = stop
    return groups


def _next_group(pieces: Sequence[bytes], start: int) -> tuple[int, str]:
    with suppress(UnicodeDecodeError):
        return start + 1, pieces[start].decode()  # nearly all tokens are whole characters
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    text = ""
    for stop in range(start, len(pieces)):
        try:
            text += decoder.decode(pieces[stop])
        except UnicodeDecodeError:
            broken_from = max(stop, start + 1)  # the earlier bytes cannot be completed: escape them and continue here
            return broken_from, _escaped(pieces[start:broken_from])
        if not decoder.getstate()[0]:
            return stop + 1, text
    return len(pieces), _escaped(pieces[start:])


def _escaped(pieces: Sequence[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", errors="backslashreplace")


def trim_to_characters(pieces: Sequence[bytes], keep: int) -> tuple[int, int]:
    """The range `(start, stop)` of a window that splits no character at either edge; token `keep` always stays inside."""
    start, stop = 0, len(pieces)
    while start < keep and pieces[start] and 0x80 <= pieces[start][0] < 0xC0:
        start += 1
    last = display_groups(pieces[start:stop])[-1]
    tail = b"".join(pieces[start + last.start : stop])
    if start + last.start > keep and _is_cut(tail):
        stop = start + last.start
    return start, stop


def _is_cut(tail: bytes) -> bool:
    """True when `tail` ends inside a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        decoder.decode(tail)
    except UnicodeDecodeError:
        return False
    return bool(decoder.getstate()[0])
