"""Text that is not ours, as Streamlit's Markdown shows it: as it is written."""

from __future__ import annotations

import re


def plain(text: str) -> str:
    """Text with every Markdown special character escaped."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]()<>#+-.!|$~:" else char for char in text)


def with_commands(text: str) -> str:
    """`plain(text)`, but what it names as a command in backticks stays one."""
    return re.sub(r"\\`(saelab [^`\n]*?)\\`", lambda found: f"`{_unescaped(found[1])}`", plain(text))


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
