"""Checks of the activations passed to an SAE, and of the dtype of its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


def as_activations(x: Any) -> Tensor:
    """A float tensor or NumPy array as a contiguous float tensor. Raises `ValueError` for anything else."""
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        wide = np.float64 if x.dtype.itemsize > 4 else np.float32  # in this machine's byte order
        return torch.from_numpy(np.require(x, wide, ["C", "W"]))
    kind = f"{type(x).__name__} of {x.dtype}" if isinstance(x, np.ndarray | Tensor) else type(x).__name__
    if not isinstance(x, Tensor):
        fix = "convert nested lists with torch.tensor(x, dtype=torch.float32)"
    elif not x.is_floating_point():
        fix = "token ids are not activations: get those from lm.stream_activations(...); convert integer data with x.float()"
    else:
        return x.contiguous()  # the layout decides the order of a sum, and so its last bit
    raise ValueError(
        f"An SAE reads activations, a tensor or NumPy array of floats (n_tokens, d_in), got {kind}: {fix}."
    )


def tokens_given(kind: str, x: Any) -> Tensor:
    """The raw activations that sizes are taken from. Raises `ValueError` if they were not passed."""
    if x is None:
        raise ValueError(
            f"This SAE normalises every token by its own size (normalize={kind!r}): pass the activations too, "
            "sae.decode(feature_acts, x), or call sae(x)."
        )
    return as_activations(x)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises `ValueError` for a dtype that weights cannot have."""
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"An SAE's weights must be one of {names}, not {str(dtype).removeprefix('torch.')}.")


def check_finite(x: Tensor, hook_name: str | None) -> None:
    """Raise `ValueError` if an activation is NaN, infinite, or too large for its dtype."""
    if bool(x.detach().sum().isfinite()):  # one pass; a sum may also be too large
        return
    bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(x)} activations{f' of {hook_name}' if hook_name else ''} are NaN, infinite or too large for "
            f"{x.dtype} (the first is row {bad[0]}): leave them out, or run the model in float32."
        )
