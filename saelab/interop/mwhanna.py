"""The transcoders of circuit-tracer (mwhanna): `layer_N.safetensors` for each layer, with `config.yaml` and `wandb-config.yaml`.
ReLU, from the input of the MLP to its output; `W_enc` and `W_dec` are both `(d_sae, d_model)`.
"""

from __future__ import annotations

import re
from typing import Any

from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.names import layer_of
from saelab.interop.source import Source, check_present

NAME = "mwhanna"
WANTS = "layer_N.safetensors with W_enc, W_dec, b_enc, b_dec"
_FILE = re.compile(r"(?:^|/)layer_(\d+)\.safetensors$")


def matches(source: Source) -> bool:
    return any(_FILE.search(name) for name in source.tensor_files)


def load(source: Source, answers: Answers) -> Blueprint:
    file = source.one_of(_FILE)
    tensors = source.tensors(file)
    check_present(tensors, ("W_enc", "W_dec", "b_enc", "b_dec"), source.label)
    layer = layer_of(file, r"layer_(\d+)")
    origin: dict[str, Any] = {
        "hook_name": f"blocks.{layer}.mlp.hook_in",
        "hook_name_out": f"blocks.{layer}.hook_mlp_out",
    }
    origin |= _model(source)
    origin["prepend_bos"] = answers.assume("prepend_bos", False)
    return Blueprint(
        variant="relu_transcoder",
        W_enc=tensors["W_enc"].float(),
        W_dec=tensors["W_dec"].float(),
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        W_skip=None if "W_skip" not in tensors else tensors["W_skip"].float(),
        origin=origin,
    )


def _model(source: Source) -> dict[str, Any]:
    config = source.yaml("config.yaml") if source.has("config.yaml") else {}
    name = config.get("model_name")
    if name is None and (size := re.search(r"qwen3-([0-9.]+b)", source.label.lower())):
        name = f"Qwen/Qwen3-{size.group(1).upper()}"
    return {"model": {"name": str(name)}} if name else {}
