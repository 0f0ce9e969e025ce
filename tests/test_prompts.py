"""What a model is given to read: containers of texts and ids, padding that the caller says, and what the tokenizer adds."""

import copy

import numpy as np
import pandas
import pytest
import torch
from conftest import with_eos
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding

import saelab
from saelab.errors import ModelError
from saelab.models import load_model
from saelab.steering import Direction
from saelab.tokens.tokenizing import context_start, resolved_bos

TEXTS = ["The weather today", "the river"]
A, B = [40, 41, 42, 43, 44], [50, 51]
LEFT = {"input_ids": torch.tensor([A, [7, 7, 7, *B]]), "attention_mask": torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])}


class Add:
    """Adds one vector to every token from position 1 on, and notes the positions."""

    def __init__(self, vector, hook_name="blocks.1.hook_resid_post"):
        self.hook_name, self.vector, self.positions = hook_name, vector, []

    def apply(self, x, positions):
        self.positions.append(positions.tolist())
        return x + self.vector * (positions >= 1)[..., None]


# --- containers

CONTAINERS = {
    "list": A,
    "tuple": tuple(A),
    "list of lists": [A],
    "NumPy": np.array(A),
    "NumPy int32 rows": np.array([A], dtype=np.int32),
    "list of NumPy numbers": list(np.array(A)),
    "tensor": torch.tensor(A),
    "rows": torch.tensor([A]),
    "encoding": BatchEncoding({"input_ids": torch.tensor([A]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}),
    "encoding of lists": {"input_ids": [A], "token_type_ids": [[0] * 5]},
    "encoding of one": {"input_ids": A, "attention_mask": [1] * 5},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_token_ids_in_any_container_are_read_by_every_reader(tiny_lm, name):
    prompt, expected = CONTAINERS[name], torch.tensor([A])
    assert tiny_lm.to_ids(prompt).tolist() == expected.tolist()
    assert torch.equal(tiny_lm.logits(prompt), tiny_lm.logits(expected))
    assert tiny_lm.generate_ids(prompt, 3).ids.tolist() == tiny_lm.generate_ids(expected, 3).ids.tolist()
    hook = "blocks.1.hook_resid_post"
    found, wanted = (next(iter(tiny_lm.stream_activations([one], [hook])))[hook] for one in (prompt, expected))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("make", [list, tuple, np.array, pandas.Series])
def test_several_texts(tiny_lm, make):
    assert torch.equal(tiny_lm.logits(make(TEXTS)), tiny_lm.logits(TEXTS))


REFUSED = {
    "a tokenizer's output with labels": ({"input_ids": [A], "labels": [A]}, "dict with 'input_ids', 'labels'; expected"),
    "columns of texts": ({"text": TEXTS}, "dict with 'text'; expected"),
    "messages": ([{"role": "user", "content": "hi"}], "list .*expected.*lm.chat"),
    "bools for ids": ([[True, 5]], "list .*expected"),
    "text for ids": ({"input_ids": "The weather"}, "dict with 'input_ids'; expected"),
    "texts for ids": ({"input_ids": TEXTS}, "dict with 'input_ids'; expected"),
    "set": ({1, 2}, "Got set"),
    "bytes": (b"The", "Got bytes"),
    "truths": ([True, False], "Got list"),
    "floats": ([0.5], "Got list"),
    "mixed": (["a", 3], "Got list"),
    "generator": ((text for text in TEXTS), "Got generator"),
    "nothing": (None, "Got NoneType"),
    "empty rows": ([[1], []], "Got list"),
    "three axes": (np.zeros((1, 2, 3), dtype=np.int64), r"int64 \(1, 2, 3\)"),
    "texts loaded": (saelab.load_texts(TEXTS), "Got Texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prompt_is_refused_by_name(tiny_lm, name):
    prompt, message = REFUSED[name]
    for read in (
        tiny_lm.logits,
        tiny_lm.generate,
        lambda one: list(tiny_lm.stream_activations([one], tiny_lm.hook_names)),
    ):
        with pytest.raises(ValueError, match=message):
            read(prompt)


# --- padding and positions


PADDED = {
    "mask": lambda: (LEFT["input_ids"], {"attention_mask": LEFT["attention_mask"]}),
    "encoding": lambda: (LEFT, {}),
    "positions": lambda: (LEFT["input_ids"], {"positions": torch.tensor([[0, 1, 2, 3, 4], [-1, -1, -1, 0, 1]])}),
    "both": lambda: (LEFT, {"positions": torch.tensor([[0, 1, 2, 3, 4], [1, 1, 1, 0, 1]])}),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_in_front_is_seen_by_the_model_as_by_the_edits(tiny_lm, name):
    prompt, options = PADDED[name]()
    edit = Add(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    for edits in ([], [edit]):
        with tiny_lm.steer(*edits):
            found = tiny_lm.logits(prompt, **options)
            alone = [tiny_lm.logits(ids)[0] for ids in (A, B)]
        torch.testing.assert_close(found[0], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1, 3:], alone[1], rtol=1e-4, atol=1e-5)
    assert edit.positions[0] == [[0, 1, 2, 3, 4], [-1, -1, -1, 0, 1]]
    hook = "blocks.2.hook_resid_post"
    if not options:
        padded = next(iter(tiny_lm.stream_activations([prompt], [hook])))[hook][1, 3:]
        torch.testing.assert_close(
            padded, next(iter(tiny_lm.stream_activations([B], [hook])))[hook][0], rtol=1e-4, atol=1e-5
        )


def test_padding_inside_and_positions_that_leave_gaps(tiny_lm):
    """A hidden token is as if it were not there; RoPE sees distances alone, so all positions may be moved."""
    ids, mask = torch.tensor([[*B, 9, 9, *A]]), torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1]])
    expected = tiny_lm.logits([*B, *A])[0]
    torch.testing.assert_close(
        tiny_lm.logits(ids, attention_mask=mask)[0][mask[0] == 1], expected, rtol=1e-4, atol=1e-5
    )
    moved = tiny_lm.logits([*B, *A], positions=torch.arange(7)[None] + 30)[0]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    gap = tiny_lm.logits([*B, *A], positions=torch.tensor([[0, 1, 30, 31, 32, 33, 34]]))[0]
    assert float((gap - expected)[2:].abs().max()) > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"positions": torch.tensor([[0, 1, 2]])}, r"positions is int64 \(1, 3\).*\(1, 5\)"),
        ({"positions": torch.tensor([[0.0, 1, 2, 3, 4]])}, "positions is float32"),
        ({"positions": torch.tensor([[0, 1, 1, 2, 3]])}, "increase from each token"),
        ({"positions": torch.tensor([[-1, -1, -1, -1, -1]])}, "every row needs at least one token"),
        ({"positions": torch.tensor([[-2, 0, 1, 2, 3]])}, "-1 on padding"),
        ({"positions": torch.tensor([[0, 1, 2, 3, 128]])}, "Position 128 is outside the context of .*128"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 1, 1]])}, "must hold only 0 .padding. and 1"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0, 0]])}, "every row needs at least one token"),
    ],
)
def test_positions_and_masks_that_do_not_fit(tiny_lm, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_lm.logits(A, **options)


HOOK = "blocks.1.hook_resid_post"


def test_padding_in_front_may_be_the_first_thing_a_model_reads(tiny_lm):
    padded, alone = {"input_ids": [[9, 5, 6, 7]], "attention_mask": [[0, 1, 1, 1]]}, [5, 6, 7]
    found = next(load_model(tiny_lm.model, tiny_lm.tokenizer).stream_activations(padded, HOOK))[HOOK][:, 1:]
    torch.testing.assert_close(found, next(tiny_lm.stream_activations([alone], HOOK))[HOOK])
    edit = Direction(torch.ones(32), HOOK) * 1.0
    with (fresh := load_model(tiny_lm.model, tiny_lm.tokenizer)).steer(edit):
        torch.testing.assert_close(fresh.logits(padded)[:, 1:], tiny_lm.run_with_edit(alone, edit))


def test_a_text_or_a_tokenizers_output_is_one_batch(tiny_lm):
    encoded = tiny_lm.tokenizer(["The weather", "a"], padding=True, return_tensors="pt")
    for prompt in ("The weather", encoded, encoded["input_ids"]):
        (found,) = tiny_lm.stream_activations(prompt, HOOK)
        torch.testing.assert_close(found[HOOK], next(tiny_lm.stream_activations([prompt], HOOK))[HOOK])


def test_what_a_tokenizer_gives_without_padding_is_read(tiny_lm):
    encoded, texts = tiny_lm.tokenizer(["The weather", "a"]), ["The weather", "a"]
    torch.testing.assert_close(tiny_lm.logits(encoded), tiny_lm.logits(texts))
    assert tiny_lm.generate(encoded, 3) == tiny_lm.generate(texts, 3)
    assert tiny_lm.to_batch([[4, 5], [6]], attention_mask=[[1, 1], [1, 1]]).positions.tolist() == [[0, 1], [0, -1]]


@pytest.mark.parametrize("only_with_cache", [False, True])
def test_a_model_that_overlooks_the_mask_is_not_believed(tiny_lm, monkeypatch, only_with_cache):
    forward = type(tiny_lm.model).forward

    def deaf(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        told = {"attention_mask": attention_mask, "position_ids": position_ids}
        told = told if only_with_cache and past_key_values is None else {}
        return forward(self, input_ids, past_key_values=past_key_values, use_cache=use_cache, **told)

    monkeypatch.setattr(type(tiny_lm.model), "forward", deaf)
    lm = load_model(tiny_lm.model, tiny_lm.tokenizer)
    with pytest.raises(ModelError, match="reads padding in front of tokens as if it were tokens: pad on the right"):
        lm.logits(LEFT)
    assert lm.generate(TEXTS, 4) == [lm.generate(text, 4) for text in TEXTS]


# --- several prompts, several sequences


def test_a_batch_writes_what_each_prompt_does_alone(tiny_lm):
    edit = Add(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    texts = [
        *TEXTS,
        "x",
        "In the beginning there was the word<s>",
    ]  # a special token of a prompt stays as it was written
    for options in ({}, {"temperature": 1.5, "seed": 3}):
        for edits in ([], [edit]):
            with tiny_lm.steer(*edits):
                alone = [tiny_lm.generate(text, 12, **options) for text in texts]
                assert tiny_lm.generate(texts, 12, **options) == alone
    assert tiny_lm.generate([TEXTS[0]], 12) == [tiny_lm.generate(TEXTS[0], 12)]


def test_a_row_that_ended_leaves_the_others_alone_and_counts_for_no_edit(tiny_lm):
    texts = ["The weather today", "the river runs"]
    free = [tiny_lm.generate_ids(text, 10) for text in texts]
    eos = next(int(t) for t in free[0].ids[free[0].n_prompt :] if t not in free[1].ids[free[1].n_prompt :])
    lm = load_model(tiny_lm.model, with_eos(tiny_lm.tokenizer, eos))
    edit = Add(torch.zeros(32))
    with lm.steer(edit):
        written = lm.generate(texts, 10)
    assert written == [lm.generate(text, 10) for text in texts]
    assert len(lm.generate_ids(texts[0], 10).ids) < len(free[0].ids)
    ended = [row for step in edit.positions[1:] for row in (step[0],) if row == [-1]]
    assert ended and all(step[1][0] >= 0 for step in edit.positions[1:])


def test_sequences_of_one_prompt_are_those_of_seeds_in_a_row(tiny_lm):
    several = tiny_lm.generate(TEXTS, 8, temperature=1.2, seed=5, num_return_sequences=3)
    assert several == [tiny_lm.generate(text, 8, temperature=1.2, seed=5 + j) for text in TEXTS for j in range(3)]
    assert len(set(several[:3])) > 1


def test_ids_that_the_user_padded_are_generated_from(tiny_lm):
    written = tiny_lm.generate(LEFT, 6)
    assert written == [tiny_lm.generate(ids, 6) for ids in (A, B)]
    assert tiny_lm.generate(LEFT["input_ids"], 6, attention_mask=LEFT["attention_mask"]) == written
    right = {"input_ids": [A, [*B, 0, 0, 0]], "attention_mask": [[1] * 5, [1, 1, 0, 0, 0]]}
    assert tiny_lm.generate(right, 6) == written
    with pytest.raises(ValueError, match="takes one prompt, got 2"):
        tiny_lm.generate_ids(LEFT, 6)


# --- what the tokenizer adds


def tokenizer_of(lm, template):
    tokenizer = copy.deepcopy(lm.tokenizer)
    special = [("<s>", 0), ("<|endoftext|>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


TEMPLATES = {  # what the tokenizer does by itself -> what texts begin with, and how that is recorded
    "$A": ([], False),
    "<s> $A": ([0], True),
    "<s> $A <|endoftext|>": ([0], True),
    "$A <|endoftext|>": ([], False),
    "<|endoftext|> <s> $A": ([1, 0], [1, 0]),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_road_begins_as_the_tokenizer_does_and_ends_open(tmp_path, tiny_lm, template):
    """Prompts, harvests, streams, reports and stores; `prepend_bos` says otherwise; the SAE keeps which."""
    start, recorded = TEMPLATES[template]
    lm = load_model(tiny_lm.model, tokenizer_of(tiny_lm, template))
    plain = tiny_lm.to_ids("The weather")[0].tolist()
    assert context_start(lm.tokenizer) == start and resolved_bos(lm, None) == recorded
    assert lm.to_ids("The weather")[0].tolist() == start + plain
    assert lm.to_ids(["The weather", "x"])[0].tolist() == start + plain
    encoded = lm.tokenizer(["The weather"], return_tensors="pt")
    assert torch.equal(lm.generate_ids(encoded, 4).ids, lm.generate_ids("The weather", 4).ids)
    assert lm.generate(encoded, 4) == lm.tokenizer.decode(
        lm.generate_ids("The weather", 4).ids, skip_special_tokens=True
    )
    texts, hook = ["The weather today is fine. " * 9 + str(i) for i in range(60)], "blocks.1.hook_resid_post"
    options = {"ctx_len": 16, "batch_size": 4, "progress": False}
    cache = saelab.harvest(lm, texts, hook, 640, tmp_path / "cache", shard_rows=64, pool_shards=2, **options)
    assert all(ids[: len(start)].tolist() == start for ids in cache.tokens()[0])
    assert cache.manifest["config"]["prepend_bos"] == recorded
    for asked, begins in ((False, []), (True, [0])):
        other = saelab.harvest(lm, texts, hook, 640, tmp_path / f"{asked}", prepend_bos=asked, **options)
        assert other.tokens()[0][:, : len(begins)].unique().tolist() == begins
    config = saelab.VARIANTS["topk"].Config(d_sae=32, k=4)
    sae = saelab.train(config, cache, saelab.TrainConfig(n_tokens=640, batch_size=64), tmp_path / "sae", progress=False)
    assert sae.provenance.origin["prepend_bos"] == recorded
    store = saelab.collect_features(sae, lm, texts, out_dir=tmp_path / "store", split="held_out", progress=False)
    assert store.manifest["prepend_bos"] == recorded
    ids = load_file(store.folder / "tokens.safetensors")["ids"]
    assert all(context[: len(start)].tolist() == start for context in ids)


def test_a_cache_made_without_bos_answers_the_default_call(tmp_path, tiny_lm, capsys):
    """The first version put no BOS in front of contexts unless it was asked to."""
    lm = load_model(tiny_lm.model, tokenizer_of(tiny_lm, "<s> $A"))
    call = {
        "texts": [f"{i} The weather today is fine. " * 9 for i in range(30)],
        "hook_names": "blocks.1.hook_resid_post",
        "n_tokens": 320,
    }
    call |= {"out_dir": tmp_path, "ctx_len": 16, "progress": False}
    made = saelab.harvest(lm, prepend_bos=False, **call).manifest["config_hash"]
    assert saelab.harvest(lm, **call).manifest["config_hash"] == made
    with pytest.raises(ValueError, match="prepend_bos: False -> True"):
        saelab.harvest(lm, prepend_bos=True, **call)


# --- no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_that_says_where(tiny_lm, value):
    edit = Add(torch.full((32,), value))
    with (
        tiny_lm.steer(edit),
        pytest.raises(ModelError, match=r"NaN or infinite logits, in float32, under 1 edits .*wider dtype"),
    ):
        tiny_lm.logits(TEXTS)
    late = Add(torch.zeros(32))
    late.apply = lambda x, positions: x * torch.where(positions == 6, value, 1.0)[..., None]
    with tiny_lm.steer(late), pytest.raises(ModelError, match="at new token 3 of 9"):
        tiny_lm.generate_ids(A, 9)
    assert tiny_lm.logits(LEFT).isfinite().all()


# --- no tokenizer


def test_a_model_without_tokenizer_reads_documents_of_ids_on_every_road(tmp_path, tiny_lm):
    lm, hook = load_model(tiny_lm.model), "blocks.1.hook_resid_post"
    documents = [[3 + (7 * i + j) % 290 for j in range(40)] for i in range(60)]
    cache = saelab.harvest(lm, documents, hook, 640, tmp_path / "cache", ctx_len=16, progress=False)
    sae = saelab.train(
        saelab.VARIANTS["topk"].Config(d_sae=32, k=4), cache, saelab.TrainConfig(n_tokens=640, batch_size=64),
        tmp_path / "sae", progress=False,
    )  # fmt: skip
    assert saelab.evaluate(sae, lm, documents, split="held_out").n_tokens > 100
    store = saelab.collect_features(sae, lm, documents, out_dir=tmp_path / "store", split="held_out", progress=False)
    feature = next(store.feature(i) for i in range(32) if store.feature(i).n_fired)
    shown = feature.examples(1)[0]
    assert [piece.decode() for piece in shown.pieces] == [f"<|{token}|>" for token in shown.token_ids]
    other = next(iter(lm.stream_activations([A], ["blocks.0.attn.hook_q"])))[
        "blocks.0.attn.hook_q"
    ]  # through the bridge
    assert other.shape == (1, 5, 32)
    texts = [f"{i} The weather today" for i in range(40)]
    for read in (
        lambda: saelab.harvest(lm, texts, hook, 64, tmp_path / "no", ctx_len=16, progress=False),
        lambda: saelab.evaluate(sae, lm, texts),
        lambda: saelab.collect_features(sae, lm, texts, out_dir=tmp_path / "other", progress=False),
        lambda: lm.generate(A),
    ):
        with pytest.raises(ValueError, match=r"no tokenizer.*load_model"):
            read()


def test_a_stream_of_the_first_version_goes_on_without_bos(tiny_lm):
    from saelab.activation_cache.streaming import stream

    lm = load_model(tiny_lm.model, tokenizer_of(tiny_lm, "<s> $A"))
    call = {
        "texts": [f"{i} The weather today is fine. " * 9 for i in range(30)],
        "hook_names": "blocks.1.hook_resid_post",
    }
    without, asked = (stream(lm, ctx_len=16, prepend_bos=bos, **call) for bos in (False, True))
    default = stream(lm, ctx_len=16, **call)
    assert default.fingerprint == asked.fingerprint != without.fingerprint
    first = without.by_rules(1).fingerprint
    assert default.by_rules(1).fingerprint == first != asked.by_rules(1).fingerprint
    assert default.by_rules(2).fingerprint == asked.by_rules(1).fingerprint != default.fingerprint
    assert default.by_rules(4).fingerprint == default.fingerprint
