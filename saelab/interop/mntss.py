"""The cross-layer transcoders of mntss: `W_enc_N.safetensors` (`W_enc_N (d_sae, d_in)`, `b_enc_N`, `b_dec_N`) and
`W_dec_N.safetensors` (`W_dec_N (d_sae, n_layers - N, d_out)`), with `config.yaml`. Read as the encoder of layer N with its
decoder to the same layer: browsable, without FVU, loss or steering.
"""

from __future__ import annotations

import re
from typing import Any

from saelab.errors import SaelabError
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.gemma_scope_2 import cross_layer
from saelab.interop.source import Source, check_present

NAME = "mntss"
WANTS = "W_enc_N.safetensors and W_dec_N.safetensors, with config.yaml"
_FILE = re.compile(r"(?:^|/)W_(?:enc|dec)_(\d+)\.safetensors$")


def matches(source: Source) -> bool:
    return bool(_layers(source))


def load(source: Source, answers: Answers) -> Blueprint:
    layers = _layers(source)
    if len(layers) > 1:
        raise SaelabError(
            f"{source.label} holds {len(layers)} layers: name one of its files, such as W_enc_{layers[0]}.safetensors."
        )
    layer = layers[0]
    folder = source.tensor_files[0].rpartition("W_")[0]
    encoder = source.tensors(f"{folder}W_enc_{layer}.safetensors")
    decoders = source.tensors(f"{folder}W_dec_{layer}.safetensors")
    check_present(encoder, (f"W_enc_{layer}", f"b_enc_{layer}", f"b_dec_{layer}"), source.label)
    check_present(decoders, (f"W_dec_{layer}",), source.label)
    W_dec = decoders[f"W_dec_{layer}"]
    if W_dec.ndim != 3:
        raise SaelabError(
            f"{source.label}: W_dec_{layer} has shape {tuple(W_dec.shape)}, expected (d_sae, n_layers, d_out)."
        )
    config: dict[str, Any] = source.yaml("config.yaml") if source.has("config.yaml") else {}
    origin: dict[str, Any] = {
        "partial": cross_layer(W_dec.shape[1]),
        "prepend_bos": answers.assume("prepend_bos", True),
    }
    for key, named in (("hook_name", "feature_input_hook"), ("hook_name_out", "feature_output_hook")):
        if config.get(named):
            origin[key] = f"blocks.{layer}.{config[named]}"
    if config.get("model_name"):
        origin["model"] = {"name": str(config["model_name"])}
    return Blueprint(
        variant="relu_transcoder",
        W_enc=encoder[f"W_enc_{layer}"].float(),
        W_dec=W_dec[:, 0].float().contiguous(),
        b_enc=encoder[f"b_enc_{layer}"],
        b_dec=encoder[f"b_dec_{layer}"],
        origin=origin,
    )


def _layers(source: Source) -> list[int]:
    found = {int(match.group(1)) for name in source.tensor_files if (match := _FILE.search(name))}
    return sorted(found)
