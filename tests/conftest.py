"""Fixtures shared by all tests: a tiny random Llama with its own tokenizer on disk, and the real embedded model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# No test may reach the real hub: the hub tests set their own endpoint in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZER_TEXT = [
    "The weather today is fine, and the river runs quietly past the old mill.",
    "In the beginning there was the word; it came to pass that the light was good.",
    "def main(argument): return argument + 1  # the end of the function",
    "She said that the house on the hill was sold to the man with the red hat.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def build_tokenizer():
    """A byte-level BPE tokenizer of 300 tokens: every text can be written, `<s>` is BOS (not added by itself)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny_llama(folder: Path, n_layers: int = 3, seed: int = 0) -> Path:
    """Save a random Llama (d_model 32, 4 heads, 128 positions, fp32) and its tokenizer in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=0,  # <s>
        eos_token_id=1,  # <|endoftext|>
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder with a tiny random Llama: 3 layers, d_model 32, 4 heads, 300 tokens, 128 positions."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_lm(tiny_folder):
    """The tiny Llama as a `LanguageModel` in fp32 on the CPU."""
    from saelab.models import load_model

    return load_model(tiny_folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def smollm2():
    """The real embedded model (fetched once into the user's cache folder), in the dtype users get."""
    from saelab.models import load_model

    return load_model("smollm2")
