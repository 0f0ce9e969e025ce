"""Small randomly initialised language models, for benchmarks that train one from scratch."""

from __future__ import annotations

from typing import Any

import torch

from saelab.models.language_model import LanguageModel
from saelab.models.loading import load_model


def build_tiny_llama(
    d_vocab: int, d_model: int, n_layers: int, n_heads: int, n_ctx: int, seed: int = 0, tokenizer: Any = None
) -> LanguageModel:
    """A Llama with random weights, in float32 on the CPU; without a tokenizer it reads token ids only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=n_ctx,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_model(LlamaForCausalLM(config), tokenizer)
