"""The hooks of each model family: TransformerLens hook names -> modules of the running model (`HookPlace`).

A new family is a line in `_BLOCKS`; without one it has only the hooks of the residual stream. Two kinds of model share this
file: plain Hugging Face modules (fast, read with forward hooks) and a TransformerBridge, whose hook points are already modules.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Literal, NamedTuple

from torch import nn

from saelab.models.families import Decoder


class HookPlace(NamedTuple):
    """One place in a model: the input or output of a module, the stream between attention and MLP, or a hook point."""

    module: nn.Module
    kind: Literal["input", "output", "mid", "point"]
    layer: nn.Module | None = None
    copied: bool = False
    """Whether the model changes the tensor in place afterwards, so that what is captured has to be a copy."""
    flattened: bool = False
    """Whether contexts and tokens are one dimension there; `layer` tells how many there are of each."""


class Block(NamedTuple):
    """Attributes of a layer. What attention and MLP add to the stream is read behind the norm that follows them, if any."""

    projection: str
    """Output projection of attention; its input is `attn.hook_z`."""
    attn_out: str
    """Its output is what attention adds."""
    mlp_in: str
    """Its input is what the MLP reads, behind the norm."""
    mlp_out: str
    """Its output is what the MLP adds."""
    between: str | None
    """Reads the stream between attention and MLP: the norm in front of the MLP, or the MLP. None if both run in parallel."""
    flattened: bool = False
    """Whether tensors from there to the end of the MLP have contexts and tokens in one dimension (OPT)."""


def _block(
    between: str | None,
    attention: str = "self_attn",
    projection: str = "o_proj",
    mlp: str = "mlp",
    post_attention: str = "",
    post_mlp: str = "",
) -> Block:
    return Block(f"{attention}.{projection}", post_attention or attention, mlp, post_mlp or mlp, between)


_LLAMA = _block("post_attention_layernorm")
_GEMMA_2 = _block(
    "pre_feedforward_layernorm", post_attention="post_attention_layernorm", post_mlp="post_feedforward_layernorm"
)
_OLMO_2 = _block("mlp", post_attention="post_attention_layernorm", post_mlp="post_feedforward_layernorm")
_PHI = _block(None, projection="dense")
_GPT_2 = _block("ln_2", "attn", "c_proj")
_OPT = Block("self_attn.out_proj", "self_attn.out_proj", "fc1", "fc2", "final_layer_norm")
_BLOCKS = {
    **dict.fromkeys(
        (
            "llama", "mistral", "ministral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", "gemma", "gpt_oss", "phi3",
            "phimoe", "olmo", "olmoe", "granite", "nemotron", "smollm3", "seed_oss", "starcoder2", "arcee", "cwm", "ernie4_5",
            "helium", "hunyuan_v1_dense", "jais2", "glm", "stablelm", "glm4_moe", "dots1", "bitnet",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_2),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "flex_olmo"), _OLMO_2),
    **dict.fromkeys(("cohere", "cohere2"), _block(None)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT_2),
    **dict.fromkeys(("xglm", "biogpt"), _OPT),
    "opt": _OPT._replace(flattened=True),
    **dict.fromkeys(("gptj", "codegen"), _block(None, "attn", "out_proj")),
    "vaultgemma": _block("pre_feedforward_layernorm"),
    "glm4": _block("post_attention_layernorm", post_attention="post_self_attn_layernorm", post_mlp="post_mlp_layernorm"),
    "phi": _PHI,
    "persimmon": _block("post_attention_layernorm", projection="dense"),
    "gpt_neo": _block("ln_2", "attn", "attention.out_proj"),
    "gpt_neox": _block("post_attention_layernorm", "attention", "dense"),
    "falcon": Block("self_attention.dense", "self_attention.dense", "mlp", "mlp", "post_attention_layernorm"),
    # Attention and MLP of these add the residual stream themselves: what they add is the output of their last projection.
    "bloom": Block(
        "self_attention.dense", "self_attention.dense", "mlp", "mlp.dense_4h_to_h", "post_attention_layernorm"
    ),
    "mpt": Block("attn.out_proj", "attn", "ffn", "ffn.down_proj", "norm_2"),
    "granitemoe": _block("post_attention_layernorm", mlp="block_sparse_moe"),
}  # fmt: skip


def hf_hook_places(decoder: Decoder, with_submodules: bool = True) -> dict[str, HookPlace]:
    """Fast hooks of a Hugging Face decoder, in forward order; for families not in `_BLOCKS` only the residual stream."""
    hook_places: dict[str, HookPlace] = {}
    block = _BLOCKS.get(decoder.config.model_type) if with_submodules else None
    for i, layer in enumerate(decoder.layers):
        inside = {} if block is None else _inside(layer, block, decoder.config)
        here = {"hook_resid_pre": HookPlace(layer, "input"), **inside, "hook_resid_post": HookPlace(layer, "output")}
        hook_places |= {f"blocks.{i}.{suffix}": place for suffix, place in here.items()}
    return hook_places


def _inside(layer: nn.Module, block: Block, config: Any) -> dict[str, HookPlace]:
    """The hooks between a layer's input and output."""
    projection, attn_out, mlp_in, mlp_out = (attrgetter(name)(layer) for name in block[:4])
    found = {"attn.hook_z": HookPlace(projection, "input"), "hook_attn_out": HookPlace(attn_out, "output")}
    between = None if _is_parallel(config) or block.between is None else getattr(layer, block.between, None)
    if between is not None:  # parallel blocks have no stream between attention and MLP
        found["hook_resid_mid"] = HookPlace(between, "mid", layer, flattened=block.flattened)
        if block.between != block.mlp_in:
            found["hook_mlp_in"] = HookPlace(between, "input", layer, flattened=block.flattened)
    found["mlp.hook_in"] = HookPlace(mlp_in, "input", layer, flattened=block.flattened)
    return found | {"hook_mlp_out": HookPlace(mlp_out, "output", layer, between is None, block.flattened)}


def _is_parallel(config: Any) -> bool:
    """Whether attention and MLP read the same stream, by the options of families that have both kinds."""
    if config.model_type == "falcon":
        return bool(config.new_decoder_architecture or config.parallel_attn)
    return bool(getattr(config, "use_parallel_residual", False))


def bridge_hook_places(bridge: Any) -> dict[str, HookPlace]:
    """Every hook point of a TransformerBridge under each of its names."""
    return {name: HookPlace(point, "point") for name, point in bridge.hook_dict.items()}
