"""Steering vectors for other programs: GGUF control vectors, which llama.cpp and repeng read, and plain safetensors.

`direction.N` of a control vector is added to the output of layer N at every token, which is `blocks.N.hook_resid_post`; llama.cpp
has none for layer 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from saelab.edits.direction import VectorEdit
from saelab.edits.feature_edit import FeatureEdit
from saelab.errors import SaelabError
from saelab.files import atomic_path, atomic_save_safetensors
from saelab.models import Steering
from saelab.models.steered import at_each_hook
from saelab.saes.token_norm import TOKEN_NORMS

ARCHITECTURE = "controlvector"


def constant_vector(edit: Any) -> Float[Tensor, " d_in"]:
    """What an edit adds to every token, in raw units: `feature * 2.0`, `direction * 2.0`.

    Raises `SaelabError` for edits that depend on the activations (clamp, scale, ablate, units of a token's norm).
    """
    if isinstance(edit, FeatureEdit) and edit.mode == "add" and edit.where == "always":
        if edit.sae.additive and edit.sae.config.normalize not in TOKEN_NORMS:
            decoder, scale = edit.sae.decoder(edit.source)
            return (float(edit.value) * decoder[edit.feature].float() / scale.float()).detach().cpu()
    elif isinstance(edit, VectorEdit) and edit.mode == "raw":
        return (edit.strength * edit.vector).detach().float().cpu()
    raise SaelabError(
        f"{edit!r} depends on the activations, so it is no constant vector: export feature * 2.0 or direction * 2.0."
    )


def constant_edits(edits: Sequence[Any] | Steering) -> Sequence[Any]:
    """The edits of a plan, or those given, at each of their hooks. Raises `SaelabError` for a plan whose options make them
    depend on the token."""
    if not isinstance(edits, Steering):
        return at_each_hook(edits)
    options = {name: getattr(edits, name) for name in ("positions", "window", "gate", "cap")}
    given = {"on": edits.on} if edits.on != "both" else {}
    given |= {name: value for name, value in options.items() if value is not None}
    given |= {"keep_norm": True} if edits.keep_norm else {}
    if given:
        told = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise SaelabError(
            f"The plan has {told}, but a constant vector is added to every token alike: export one without these options."
        )
    return at_each_hook(edits.edits)


def save_gguf(edits: Sequence[Any] | Steering, path: str | Path, model: str) -> Path:
    """Write a control vector of the sum of the edits at each layer, of a list or a plan. `model` is the architecture that it is
    for, such as "llama".

    Raises `SaelabError` for an edit that is not added to the output of a layer from 1 on, and for a plan with options.
    """
    from gguf import GGUFWriter

    directions: dict[int, Tensor] = {}
    for edit in constant_edits(edits):
        layer = _layer(edit.hook_name)
        vector = constant_vector(edit)
        directions[layer] = directions[layer] + vector if layer in directions else vector
    if not directions:
        raise SaelabError("A control vector needs at least one edit, such as feature * 2.0.")
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, vector in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def _layer(hook_name: str) -> int:
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook_name)
    if not found or found.group(1) == "0":
        raise SaelabError(
            f"A control vector is added to the output of layers from 1 on (blocks.N.hook_resid_post), not at {hook_name}: use "
            "format 'directions' for other hooks."
        )
    return int(found.group(1))


def save_directions(edits: Sequence[Any] | Steering, path: str | Path, model: str) -> Path:
    """Write `HOOK/i` for the i-th edit of a list or a plan, `(d_in)` float32 in raw units, with the model's name as metadata."""
    listed = constant_edits(edits)
    tensors = {f"{edit.hook_name}/{i}": constant_vector(edit).contiguous() for i, edit in enumerate(listed)}
    if not tensors:
        raise SaelabError("There is nothing to write: give at least one edit, such as feature * 2.0.")
    atomic_save_safetensors(path, tensors, {"model": model})
    return Path(path)
