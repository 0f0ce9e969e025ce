"""Qwen Scope: one torch file a layer, `layerN.sae.pt`, in repositories whose name says width and k (`...-W32K-L0_50`). TopK;
b_dec is not subtracted. `W_enc` is `(d_sae, d_in)` and `W_dec (d_in, d_sae)`: SAELens' names, the other orientation.
"""

from __future__ import annotations

import re
from typing import Any

from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.names import layer_of
from saelab.interop.source import Source, check_present

NAME = "qwen_scope"
WANTS = "layerN.sae.pt, in a folder or repository named ...-W{thousands}K-L0_{k}"
_FILE = re.compile(r"(?:^|/)layer(\d+)\.sae\.pt$")


def matches(source: Source) -> bool:
    return any(_FILE.search(name) for name in source.tensor_files)


def load(source: Source, answers: Answers) -> Blueprint:
    file = source.one_of(_FILE)
    tensors = source.tensors(file)
    check_present(tensors, ("W_enc", "W_dec", "b_enc", "b_dec"), source.label)
    named = re.search(r"SAE-Res-(.+)-W\d+K-L0_\d+", source.label)
    k = re.search(r"-L0_(\d+)", source.label)
    where = f"{source.label} (neither the file nor a folder named ...-L0_k)"
    layer = layer_of(file, r"layer(\d+)")
    origin: dict[str, Any] = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    origin["prepend_bos"] = answers.assume("prepend_bos", False)  # Qwen's tokenizers have no BOS
    return Blueprint(
        variant="topk",
        W_enc=tensors["W_enc"].float(),
        W_dec=tensors["W_dec"].float().T.contiguous(),
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        k=int(answers.need("k", int(k.group(1)) if k else None, where)),
        origin=origin | ({"model": {"name": f"Qwen/{named.group(1)}"}} if named else {}),
    )
