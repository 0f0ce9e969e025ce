"""Triton's interpreter without the searches that take half of its time.

At every launch, and at every call of a jitted function by another, it looks through the whole of `triton.language` for the
functions that it replaces, and after a launch puts most of them back. Where nothing is compiled, once and for good will do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def replace_once() -> None:
    """Replace the functions of `triton.language` now, and no more at launches; look up the numpy dtype of each type once."""
    from triton import language
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    dtype_of, known = interpreter._get_np_dtype, {}

    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = dtype_of(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered
