"""Models and inputs at the edges of what is read: each is read right, or refused by name."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import with_eos
from tokenizers import Tokenizer, models, processors, trainers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

import saelab
from saelab.errors import ModelError, TrainingError
from saelab.models import load_model
from saelab.saes import TopKConfig
from saelab.steering import Direction
from saelab.tokens import load_texts, pack
from saelab.tokens.tokenizing import check_bos, context_start

HOOK = "blocks.1.hook_resid_post"
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def built(cls, config, dtype=torch.float32):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(cls(config).to(dtype).eval())


def test_longrope_keeps_what_a_short_prompt_reads_apart_from_a_long_one():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    ends: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "original_max_position_embeddings": 16,
    }
    more: dict[str, Any] = {
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rope_parameters": rope,
    }
    lm = built(Phi3ForCausalLM, Phi3Config(**SMALL, **ends, **more))
    long, short = list(range(20, 44)), [7, 50, 9]
    with pytest.raises(ModelError, match="over 16 tokens with other position frequencies"):
        lm.logits([long, short])
    batch = [list(lm.generate_ids(prompt, 24).ids) for prompt in (short, [*short, 11])]
    for prompt, found in zip((short, [*short, 11]), batch, strict=True):
        ids = list(prompt)
        while len(ids) < len(found):
            ids.append(int(lm.logits([ids])[0, -1].argmax()))
        assert ids == [int(token) for token in found]


def test_padding_that_half_precision_could_hide_is_seen():
    more: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    config = RecurrentGemmaConfig(**SMALL, **more, block_types=["recurrent", "attention"])
    lm = built(RecurrentGemmaForCausalLM, config, torch.bfloat16)
    with pytest.raises(ModelError, match="reads padding in front of tokens as if it were tokens"):
        lm.logits({"input_ids": [[9] * 8 + [20, 21]], "attention_mask": [[0] * 8 + [1] * 2]})


def test_positions_that_begin_behind_padding_shorten_the_context():
    lm = built(RobertaForCausalLM, RobertaConfig(**{**SMALL, "is_decoder": True, "max_position_embeddings": 64}))
    assert lm.max_ctx == 62
    lm.logits(torch.full((1, 62), 9))
    with pytest.raises(ValueError, match="63 tokens exceed the context"):
        lm.logits(torch.full((1, 63), 9))


def test_a_head_with_layers_of_its_own_is_no_linear_unembedding():
    lm = built(BertLMHeadModel, BertConfig(**{**SMALL, "is_decoder": True, "initializer_range": 0.2}))
    with pytest.raises(ModelError, match="is not the linear map that saelab derived"):
        lm.logit_weights()


def test_a_class_is_no_model():
    with pytest.raises(ValueError, match="got the class LlamaForCausalLM"):
        load_model(LlamaForCausalLM)


def test_a_tokenizer_without_latin_letters_keeps_its_bos():
    tokenizer = Tokenizer(models.BPE())
    words = ["\u043f\u043e\u0433\u043e\u0434\u0430 \u0440\u0435\u043a\u0430"] * 9
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert context_start(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")) == [0]


def test_one_eos_ends_a_document_of_ids(tiny_lm):
    lm = load_model(tiny_lm.model, with_eos(tiny_lm.tokenizer, 1))
    for documents in ([[5, 6], [7, 8]], [[5, 6, 1], [7, 8, 1]]):
        assert next(pack(iter(documents), lm, 6, 1)).ids.tolist() == [[5, 6, 1, 7, 8, 1]]


@pytest.mark.parametrize("prepend_bos", [1, np.True_, "yes", [True], torch.tensor(1)], ids=str)
def test_prepend_bos_is_a_bool_or_a_list_of_ids(prepend_bos):
    with pytest.raises(ValueError, match="prepend_bos=.* must be True, False, None"):
        check_bos(prepend_bos)


def test_a_seed_is_one_that_a_generator_takes(tiny_lm):
    with pytest.raises(ValueError, match="seed=1180591620717411303424"):
        tiny_lm.generate("a", seed=2**70)


def test_the_smallest_temperature_is_the_likeliest_token(tiny_lm):
    cold, greedy = (tiny_lm.generate_ids("a", 3, temperature=t).ids for t in (1e-310, 0.0))
    assert torch.equal(cold, greedy)


def test_text_is_not_generated_at_positions_of_the_callers(tiny_lm):
    with pytest.raises(ValueError, match=r"count from 0, got \[50, 51\]"):
        tiny_lm.generate({"input_ids": [[3, 4]], "position_ids": [[50, 51]]})


@pytest.mark.parametrize("size", [1e-30, 1e18])
def test_the_size_of_a_direction_that_is_taken_out_does_not_matter(tiny_lm, size):
    vector = torch.arange(32.0) + 1
    found, expected = (
        tiny_lm.run_with_edit([5, 6, 7], Direction(factor * vector, HOOK).ablate()) for factor in (size, 1.0)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"input_ids": [[5, 6, 7]], "attention_mask": [[2, 0, 7]]}, r"attention_mask holds \[2, 0, 7\]"),
        ([[True, 5, 3]], "neither a string nor a list of token ids"),
        ({"input_ids": ["[1, 2, 3]"]}, "input_ids holds the text"),
        ({"input_ids": torch.tensor(5)}, "a dict of columns needs a list"),
    ],
)
def test_documents_of_ids_are_ids(rows, message):
    with pytest.raises(ValueError, match=message):
        list(load_texts(rows).documents())


def test_a_mask_of_bools_is_a_mask():
    rows = {"input_ids": [[5, 6, 7]], "attention_mask": [[True, False, True]]}
    assert list(load_texts(rows).documents()) == [[5, 7]]


@pytest.mark.parametrize(
    "line", ['{"text":' + "[" * 100_000, '{"text":' + "9" * 5_000 + "}"], ids=["deep", "long number"]
)
def test_a_line_that_json_gives_up_on_is_named(tmp_path, line):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(load_texts(path).documents())


def planted(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, 32, generator=generator), dim=1)
    return (torch.rand(n, 96, generator=generator) < 0.04).float() @ directions + 0.02 * torch.randn(
        n, 32, generator=generator
    )


@pytest.mark.parametrize("size", [1e-20, 1e-30])
def test_very_small_activations_are_learned_like_others(size):
    x, train = planted(2048), saelab.TrainConfig(n_tokens=2048, batch_size=256, device="cpu")
    shares = []
    for factor in (1.0, size):
        sae = saelab.train(TopKConfig(64, 4), x * factor, train, progress=False)
        error = (sae(x * factor).x_hat.detach() - x * factor).double() / factor
        shares.append(float(error.square().sum() / (x - x.mean(0)).square().sum()))
    assert shares[1] == pytest.approx(shares[0], rel=1e-3)


@pytest.mark.parametrize("name, kind", [("topk", UserWarning), ("batch_topk", TrainingError)])
def test_an_sae_of_which_nothing_fires_at_the_end_is_named(name, kind):
    x, train = planted(12288) * 1e-3, saelab.TrainConfig(n_tokens=12288, batch_size=256, device="cpu")
    config = saelab.VARIANTS[name].Config(d_sae=64, k=4, normalize="none")
    with pytest.raises(kind, match="Nothing fires at the end of training"):
        saelab.train(config, x, train, progress=False)


def test_sparse_rows_are_refused():
    with pytest.raises(ValueError, match="layout torch.sparse_coo"):
        saelab.train(TopKConfig(8, 2), torch.eye(64).to_sparse(), saelab.TrainConfig(64, 32), progress=False)


def test_layers_that_run_twice_are_refused(tiny_lm):
    """An edit would apply twice, and a capture would be that of the first loop."""
    model = copy.deepcopy(tiny_lm.model)
    layers, forward = model.model.layers, model.model.layers[-1].forward

    def looped(x, *args, **kwargs):
        x = forward(x, *args, **kwargs)
        if not model.again:
            model.again = True
            for layer in layers:
                x = layer(x, *args, **kwargs)
        return x

    model.again, layers[-1].forward = False, looped
    with pytest.raises(ModelError, match="layers one after another, each once"):
        load_model(model, tiny_lm.tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_logits_that_are_no_numbers_are_named_at_load(tiny_lm, value):
    model = copy.deepcopy(tiny_lm.model)
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size)
    model.lm_head.bias.data[3] = value
    with pytest.raises(ModelError, match="computes NaN or infinite logits in float32"):
        load_model(model, tiny_lm.tokenizer)


class Adapted(torch.nn.Linear):
    """A linear map with a low-rank update beside it, in modules of its own."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.down, self.up = (
            torch.nn.Linear(base.in_features, 4, bias=False),
            torch.nn.Linear(4, base.out_features, bias=False),
        )

    def forward(self, x):
        return super().forward(x) + 8 * self.up(self.down(x))


def test_an_adapter_on_the_unembedding_is_part_of_it(tiny_lm):
    model = copy.deepcopy(tiny_lm.model)
    torch.manual_seed(0)
    model.lm_head = Adapted(model.lm_head)
    lm, head = load_model(model, tiny_lm.tokenizer), model.lm_head
    merged = copy.deepcopy(tiny_lm.model)
    merged.lm_head = torch.nn.Linear(32, merged.config.vocab_size, bias=False)
    merged.lm_head.weight.data = (head.weight + 8 * head.up.weight @ head.down.weight).detach()
    want = load_model(merged, tiny_lm.tokenizer)
    torch.testing.assert_close(lm.logits([[5, 6, 7]]), want.logits([[5, 6, 7]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lm.logit_weights(), want.logit_weights(), rtol=1e-4, atol=1e-5)
