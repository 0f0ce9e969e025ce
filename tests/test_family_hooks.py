"""The hooks of every family: each is what the layer's own modules compute from the others, and moves what follows when edited."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import pytest
import torch
from test_families import IDS, Add, build
from torch import Tensor, nn

import saelab
from saelab.models.families import find_decoder
from saelab.models.hook_places import _BLOCKS, Block

SEQUENTIAL = {"parallel_attn": False, "new_decoder_architecture": False, "alibi": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in _BLOCKS} | {
    "falcon, sequential": ("falcon", SEQUENTIAL),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "granite, multiplied": ("granite", {"residual_multiplier": 0.22}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
}
PARALLEL = {"falcon", "falcon, new", "gptj", "codegen", "phi", "cohere", "cohere2", "gpt_neox", "stablelm, parallel"}
INPUT_NORMS = ("input_layernorm", "ln_1", "ln_mlp", "post_attention_layernorm")
"""Norms in front of a parallel block's MLP."""


class Layer(NamedTuple):
    lm: Any
    layer: nn.Module
    block: Block
    multiplier: float
    """What a family multiplies with what attention and MLP add (Granite)."""
    x: dict[str, Tensor]
    """Activations at the hooks of the layer."""


@pytest.fixture(scope="module", params=CASES)
def one(request) -> Layer:
    kind, more = CASES[request.param]
    model = build(kind, more)
    lm, decoder = saelab.load_model(model), find_decoder(model)
    names = [name for name in lm.hook_names if name.startswith("blocks.1.")]
    found = next(iter(lm.stream_activations([IDS], names)))
    x = {name.removeprefix("blocks.1."): found[name] for name in names}
    assert ("hook_resid_mid" in x) == (request.param not in PARALLEL)
    multiplier = float(getattr(decoder.config, "residual_multiplier", 1.0))
    return Layer(lm, decoder.layers[1], _BLOCKS[kind], multiplier, x)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)


def module(one: Layer, name: str) -> Any:
    return attrgetter(name)(one.layer)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def test_attention_adds_what_its_projection_makes_of_z(one):
    added = module(one, one.block.projection)(one.x["attn.hook_z"])
    if "norm" in one.block.attn_out:
        added = module(one, one.block.attn_out)(added)
    close(one.x["hook_attn_out"], added)


@torch.no_grad()
def test_the_mlp_reads_the_stream_behind_its_norm(one):
    if "hook_resid_mid" not in one.x:
        norms = [getattr(one.layer, name) for name in INPUT_NORMS if getattr(one.layer, name, None)]
        errors = [float((norm(one.x["hook_resid_pre"]) - one.x["mlp.hook_in"]).abs().max()) for norm in norms]
        assert min(errors) < 1e-4
        return
    mid, between = one.x["hook_resid_mid"], one.block.between
    close(one.x["mlp.hook_in"], mid if between == "mlp" else module(one, str(between))(mid))
    assert between == "mlp" or torch.equal(one.x["hook_mlp_in"], mid)


@torch.no_grad()
def test_the_mlp_adds_what_it_makes_of_its_input(one):
    inside, block = one.x["mlp.hook_in"], one.block
    if block.mlp_in == "fc1":
        added = module(one, "fc2")(one.layer.activation_fn(module(one, "fc1")(inside)))
    elif block.mlp_out.startswith(block.mlp_in + "."):  # it adds the stream itself
        added = first(module(one, block.mlp_in)(inside, torch.zeros_like(inside)))
    else:
        added = first(module(one, block.mlp_in)(inside))
    if "norm" in block.mlp_out:
        added = module(one, block.mlp_out)(added)
    close(one.x["hook_mlp_out"], added.reshape(inside.shape))


def test_the_stream_is_their_sum(one):
    x, by = one.x, one.multiplier
    middle = x.get("hook_resid_mid")
    if middle is not None:
        close(middle, x["hook_resid_pre"] + by * x["hook_attn_out"])
    before = x["hook_resid_pre"] + by * x["hook_attn_out"] if middle is None else middle
    close(x["hook_resid_post"], before + by * x["hook_mlp_out"])


@pytest.mark.parametrize("hook", ["hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"])
def test_an_edit_moves_the_stream_behind_it(one, hook):
    if hook not in one.x:
        return
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    by = one.multiplier if hook in ("hook_attn_out", "hook_mlp_out") else 1.0
    middle = "hook_resid_mid" in one.x and hook in ("hook_attn_out", "hook_resid_mid")
    behind = "hook_resid_mid" if middle and hook == "hook_attn_out" else "hook_resid_post"
    with one.lm.steer(Add(f"blocks.1.{hook}", vector)):
        moved = next(iter(one.lm.stream_activations([IDS], [f"blocks.1.{behind}", "blocks.1.hook_mlp_out"])))
    want = one.x[behind][:, 1:] + by * vector
    if hook == "hook_resid_mid":  # the MLP reads the edited stream too
        want = want + one.multiplier * (moved["blocks.1.hook_mlp_out"] - one.x["hook_mlp_out"])[:, 1:]
    close(moved[f"blocks.1.{behind}"][:, 1:], want)
    close(moved[f"blocks.1.{behind}"][:, :1], one.x[behind][:, :1])


def test_the_table_is_long_enough():
    assert len(_BLOCKS) >= 24


UNKNOWN_TO_BRIDGE = {"biogpt", "cwm", "dots1", "helium", "ministral", "persimmon", "phimoe"}


@pytest.mark.parametrize(
    "name", [name for name in _BLOCKS if name not in UNKNOWN_TO_BRIDGE | {"gpt2", "gpt_neox", "llama"}]
)
def test_hooks_are_those_of_the_bridge(name, tiny_lm, monkeypatch):
    """`hook_mlp_in` aside, which a bridge computes only on request: it is the stream in front of the MLP's norm.

    (gpt2, gpt_neox and llama: `test_models.py`.)
    """
    from transformer_lens.model_bridge import TransformerBridge

    model = build(name)
    lm = saelab.load_model(model)
    names = [hook for hook in lm.hook_names if hook.startswith("blocks.1.") and "hook_mlp_in" not in hook]
    found = next(iter(lm.stream_activations([IDS], names)))
    model.config.architectures = [type(model).__name__]
    bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tiny_lm.tokenizer, device="cpu").eval()
    with torch.inference_mode():
        cache = bridge.run_with_cache(IDS, output_attentions=False)[1]
    for hook in names:
        torch.testing.assert_close(
            found[hook], cache[hook].flatten(2), rtol=1e-4, atol=1e-5, msg=lambda m, h=hook: f"{h}: {m}"
        )
