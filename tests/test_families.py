"""Every decoder family is read, continued, explained and steered right, or refused with its reason when it is loaded.

The models are built tiny from their configs, with random weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import saelab
from saelab.errors import ModelError
from saelab.models.sampling import Sampling

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR: dict[str, Any] = EXPERTS | {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
RECURRENT = ["falcon_mamba", "mamba", "mamba2", "rwkv"]  # their hidden states begin behind the first layer
DENSE = [
    "apertus", "arcee", "biogpt", "bitnet", "bloom", "cohere", "cohere2", "ctrl", "cwm", "doge", "ernie4_5",
    "exaone4", "falcon_h1", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "jais2",
    "jetmoe", "lfm2", "llama", "llama4_text", "minimax", "ministral", "mistral", "mixtral", "moshi", "mpt",
    "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm",
]  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = dict.fromkeys([*DENSE, *RECURRENT], {}) | {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "gptj": {"rotary_dim": 4},
    "falcon": {"new_decoder_architecture": False, "parallel_attn": True, "alibi": False, "multi_query": True},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "glm4_moe": EXPERTS,
    "dots1": EXPERTS,
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "gemma3": {
        "text_config": SIZES,
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 16, "patch_size": 8},
    },
}  # fmt: skip
REFUSED = {
    "bert": "not a causal language model: changing the last token changes earlier logits",
    "roberta": "not a causal language model",
    "electra": "not a causal language model",
    "xlm": "not a causal language model",
    "hrm_text": "no list of 16 layers",
    "minicpm3": "does not run on token ids alone",
}


class Family(NamedTuple):
    model: Any
    lm: saelab.models.LanguageModel


def build(family: str, more: dict[str, Any] | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | FAMILIES.get(family, {}) | (more or {})
    if family == "falcon":  # it computes the size of a head
        sizes.pop("head_dim")
    config = AutoConfig.for_model(family, **(FAMILIES["gemma3"] if family == "gemma3" else sizes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = build(request.param)
    return Family(model, saelab.load_model(model))


IDS = torch.tensor([[70, 33, 91, 12, 55, 101]])


class Add:
    """Adds one vector to every token from position `first` on."""

    def __init__(self, hook_name: str, vector: torch.Tensor, first: int = 1):
        self.hook_name, self.vector, self.first, self.seen = hook_name, vector, first, 0

    def apply(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x + self.vector * (positions >= self.first)[..., None]


def test_streams_are_the_models_own_hidden_states(family):
    with torch.inference_mode():
        states = family.model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    recurrent = family.model.config.model_type in RECURRENT
    expected = {"blocks.0.hook_resid_post": states[0]} if recurrent else {
        "blocks.0.hook_resid_pre": states[0], "blocks.0.hook_resid_post": states[1], "blocks.1.hook_resid_pre": states[1],
    }  # fmt: skip
    found = next(iter(family.lm.stream_activations([IDS], list(expected))))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_greedy_generation_is_plain_argmax(family):
    ids = IDS
    with torch.inference_mode():
        for _ in range(5):
            ids = torch.cat([ids, family.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) in family.lm.stop_ids:
                break
    assert family.lm.generate_ids(IDS, max_new_tokens=5).ids.tolist() == ids[0].tolist()


RUNS_OVER_PADDING = {"rwkv", "recurrent_gemma"}  # their state has no way to pass it by


def test_a_batch_of_prompts_is_padded_right_or_not_at_all(family):
    """Prompts of three lengths write what each does alone; padding in front has no influence, or is refused."""
    prompts = [IDS[0].tolist(), [33, 91], [12, 55, 101, 70]]
    alone = [family.lm.generate_ids(prompt, max_new_tokens=4, keep_logits=True) for prompt in prompts]
    together = family.lm._generate(
        [torch.tensor(prompt) for prompt in prompts], Sampling(4, stop_ids=family.lm.stop_ids, keep_logits=True), None
    )
    for one, other in zip(alone, together, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-3, atol=1e-4)
    padded = {"input_ids": [prompts[0], [5, 6, 7, 8, *prompts[1]]], "attention_mask": [[1] * 6, [0, 0, 0, 0, 1, 1]]}
    assert family.lm.backend.honours_padding == (family.model.config.model_type not in RUNS_OVER_PADDING)
    if not family.lm.backend.honours_padding:
        with pytest.raises(ModelError, match="reads padding in front of tokens as if it were tokens"):
            family.lm.logits(padded)
        return
    torch.testing.assert_close(family.lm.logits(padded)[1, 4:], family.lm.logits(prompts[1])[0], rtol=1e-3, atol=1e-4)


def test_logit_weights_say_how_logits_move(family):
    """Along a direction at right angles to the stream and to its mean the final norm's size does not change."""
    hook = "blocks.1.hook_resid_post"
    x = next(iter(family.lm.stream_activations([IDS], [hook])))[hook][0, -1]
    basis, _ = torch.linalg.qr(torch.stack([torch.ones(32), x], 1))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    direction -= basis @ (basis.T @ direction)
    direction *= 0.02 * x.norm() / direction.norm()
    before, after = family.lm.logits(IDS), family.lm.run_with_edit(IDS, Add(hook, direction))
    moved, said = (after - before)[0, -1], family.lm.logit_weights() @ direction
    assert torch.corrcoef(torch.stack([moved, said]))[0, 1] > 0.995


def test_logit_weights_leave_out_a_mean_that_the_final_norm_takes_off(family):
    hook, ones = "blocks.1.hook_resid_post", torch.ones(32)
    x = next(iter(family.lm.stream_activations([IDS], [hook])))[hook]
    moved = family.lm.run_with_edit(IDS, Add(hook, x.std() * ones)) - family.lm.logits(IDS)
    weights = family.lm.logit_weights()
    is_centred = float(moved.abs().max()) < 1e-4 * float(family.lm.logits(IDS).abs().max())
    assert (float((weights @ ones).abs().max()) < 1e-4 * float(weights.norm(dim=1).max())) == is_centred


def test_a_cache_that_gives_other_logits_is_not_used(monkeypatch):
    model = build("llama")
    plain = saelab.load_model(model).generate_ids(IDS, max_new_tokens=4).ids.tolist()
    forward = type(model).forward

    def drifts(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        output = forward(self, input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(type(model), "forward", drifts)
    lm = saelab.load_model(model)
    assert not lm.backend.has_cache and lm.generate_ids(IDS, max_new_tokens=4).ids.tolist() == plain


def test_steering_from_position_one_on(family):
    hook, vector = "blocks.0.hook_resid_post", torch.randn(32, generator=torch.Generator().manual_seed(1))
    edit = Add(hook, vector)
    before, after = family.lm.logits(IDS), family.lm.run_with_edit(IDS, edit)
    assert edit.seen == 1
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=1e-5, atol=1e-6)
    assert ((after - before)[:, 1:].abs().amax(-1) > 1e-4).all()
    states = next(iter(family.lm.stream_activations([IDS], [hook])))[hook]
    with family.lm.steer(edit):
        steered = next(iter(family.lm.stream_activations([IDS], ["blocks.1.hook_resid_pre"])))[
            "blocks.1.hook_resid_pre"
        ]
    torch.testing.assert_close(steered, edit.apply(states, torch.arange(6)[None]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_at_load(name):
    with pytest.raises(ModelError, match=REFUSED[name]):
        saelab.load_model(build(name))


def test_the_table_is_long_enough():
    assert len(FAMILIES) >= 70
