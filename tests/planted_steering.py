"""A real transformer whose language is known, and an SAE with one feature that steers it and some that do not.

Its layers add nothing, so a token's activation is its embedding at every hook. It writes the tokens of `TEXT` only, each most
often followed by the next one in their order. Feature 0 promotes the token that it fires on, each other one a token that another
one fires on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import saelab
from saelab.models import load_model
from saelab.saes import ReLUConfig, ReLUSAE

D, SIZE, SHARPNESS, COMMON = 64, 4.0, 2.5, 0.3
N_FEATURES = 8
STEERS = 0
HOOK = "blocks.0.hook_resid_post"
TEXT = "The old mill by the river runs quietly past the light of the morning. "
PROMPTS = ("The old mill", " the river", " quietly past", " the light of")
STRENGTHS = (4.0, 0.5, 12.0)
TEMPERATURE = 0.7
"""At 0.5 next to nothing happens, at 12 the token of feature 0 is all that is written."""


def planted_model(tokenizer: Any) -> tuple[Any, list[int], torch.Tensor]:
    """The model, the tokens that it writes, and their orthogonal directions `(n_tokens, D)`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D,
        intermediate_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokens = list(dict.fromkeys(tokenizer(TEXT, add_special_tokens=False)["input_ids"]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        rows = torch.linalg.qr(torch.randn(D, D)).Q
        directions, common = rows[: len(tokens)], rows[-1]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedded, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedded.copy_(SIZE * COMMON * common.expand_as(embedded))
        other = torch.randn(len(embedded), D - len(tokens) - 1) / math.sqrt(D) @ rows[len(tokens) : -1]
        embedded += SIZE * other
        embedded[tokens] = SIZE * (directions + COMMON * common)
        head.copy_(other - 10 * common)  # all activations share a direction, by which other tokens are unlikely
        head[tokens] = directions.roll(1, 0) * SHARPNESS / math.sqrt(D)
    return load_model(model, tokenizer), tokens, directions


def planted_sae(directions: torch.Tensor) -> ReLUSAE:
    """Feature i fires on the i-th token."""
    sae = ReLUSAE(ReLUConfig(N_FEATURES, normalize="none"), d_in=D)
    promoted = [0, *range(2, N_FEATURES), 1]
    with torch.no_grad():
        sae.W_enc.copy_(directions[:N_FEATURES])
        sae.W_dec.copy_(directions[[i - 1 for i in promoted]])
        sae.b_enc.fill_(-0.7 * SIZE)
    sae.provenance = replace(sae.provenance, origin={"hook_name": HOOK})
    return sae.requires_grad_(False)


def planted_store(folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    """The model and its feature store."""
    lm, _, directions = planted_model(tokenizer)
    texts, sae = [TEXT * 3 + str(i) for i in range(12)], planted_sae(directions)
    return lm, saelab.collect_features(sae, lm, texts, out_dir=folder / "features", ctx_len=64, progress=False)
