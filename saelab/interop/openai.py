"""OpenAI's SAEs (Gao et al. 2024): one torch file with `encoder.weight`, `decoder.weight`, `pre_bias` and `latent_bias`. TopK
SAEs normalise every token (layer norm) in front; ReLU SAEs do not.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from saelab.errors import SaelabError
from saelab.interop.answers import Answers
from saelab.interop.blueprint import Blueprint
from saelab.interop.names import layer_of
from saelab.interop.source import Source, check_present

NAME = "openai"
WANTS = "one .pt file with encoder.weight, decoder.weight, pre_bias and latent_bias"
_TENSORS = ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")
_HOOKS = {
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_mlp": "hook_resid_post",
    "resid_delta_mlp": "hook_mlp_out",
    "mlp_post_act": "mlp.hook_post",
}


def matches(source: Source) -> bool:
    name = _file(source)
    return name is not None and all(key in source.tensors(name) for key in _TENSORS[2:])


def load(source: Source, answers: Answers) -> Blueprint:
    name = _file(source)
    assert name is not None
    tensors, words = source.tensors(name), source.words(name)
    check_present(tensors, _TENSORS, source.label)
    k, activation = tensors.get("activation_state_dict.k"), words.get("activation")
    if activation is None:
        activation = "ReLU" if k is None else "TopK"
    if activation not in ("TopK", "ReLU"):
        raise SaelabError(f"{source.label} has activation={activation!r}; saelab reads TopK and ReLU.")
    is_topk = activation == "TopK"
    stem = PurePosixPath(name).stem  # autoencoders/8.pt
    layer = int(stem) if stem.isdigit() else layer_of(source.label)
    hook = next((hook for named, hook in _HOOKS.items() if named in source.label), None)
    origin = {"model": {"name": "gpt2"}, "prepend_bos": answers.assume("prepend_bos", False), "ctx_len": 64}
    return Blueprint(
        variant="topk" if is_topk else "relu",
        W_enc=tensors["encoder.weight"].float(),
        W_dec=tensors["decoder.weight"].float().T.contiguous(),
        b_enc=tensors["latent_bias"],
        b_dec=tensors["pre_bias"],
        k=int(answers.need("k", None if k is None else int(k), source.label)) if is_topk else None,
        pre_bias=True,
        normalize="layer_norm" if is_topk else "none",
        origin=origin | ({"hook_name": f"blocks.{layer}.{hook}"} if hook and layer is not None else {}),
    )


def _file(source: Source) -> str | None:
    """The one torch file."""
    found = [name for name in source.tensor_files if name.endswith((".pt", ".pth"))]
    return found[0] if len(found) == 1 else None
