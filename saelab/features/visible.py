"""Makes token text safe to display: no invisible characters, no bidirectional overrides, no markup.

Spaces between words stay spaces; a single token (`chip_text`) shows them as dots. A combining mark without a base gets a
dotted circle.
"""

from __future__ import annotations

import html
import unicodedata

SPACE = "\u00b7"
_DOTTED_CIRCLE = "\u25cc"

_GLYPHS = {
    "\n": "\u21b5",
    "\r": "\u240d",
    "\t": "\u21e5",
    "\x7f": "\u2421",
    "\u00a0": "\u237d",
    "\ufeff": "\u27e8BOM\u27e9",
}
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
# Letters, marks and symbols that Unicode calls default-ignorable or that render as nothing: fillers, joiners, variation
# selectors, a blank Braille cell, a null notehead, the object replacement character.
_BLANK = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\ufffc\U0001d159\U00016fe4"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)


def visible(text: str) -> str:
    """`text` with every character that is invisible or reorders others replaced by a glyph or its code point."""
    shown, has_base = [], False
    for char in text:
        glyph = _glyph(char)
        is_mark = glyph is None and unicodedata.category(char).startswith("M")
        if is_mark and not has_base:
            shown.append(_DOTTED_CIRCLE)
        shown.append(glyph or char)
        has_base = glyph is None and char != " "
    return "".join(shown)


def visible_lines(text: str) -> str:
    """`visible`, but for the ends of lines: what a terminal may print."""
    return "\n".join(map(visible, text.split("\n")))


def _glyph(char: str) -> str | None:
    """The replacement for an invisible character; None for a visible one."""
    if char in _GLYPHS:
        return _GLYPHS[char]
    if ord(char) < 0x20:
        return chr(0x2400 + ord(char))
    if char != " " and (unicodedata.category(char) in _HIDDEN or char in _BLANK):
        return f"\u27e8U+{ord(char):04X}\u27e9"
    return None


def escape(text: str) -> str:
    """`visible(text)`, HTML-escaped for use between tags or inside a quoted attribute."""
    return html.escape(visible(text), quote=True)


def chip_text(text: str) -> str:
    """`escape(text)` for a token shown on its own, with spaces as dots."""
    return escape(text).replace(" ", SPACE)
