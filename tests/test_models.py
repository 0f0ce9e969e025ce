"""`load_model` and `LanguageModel`: hooks against TransformerLens, early exit, edits, generation, bad input."""

from __future__ import annotations

import copy
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import with_eos
from torch import Tensor

from saelab.errors import ModelError
from saelab.models import load_model
from saelab.models.sampling import choose

IDS = torch.tensor([[5, 17, 200, 33, 80, 41, 9], [250, 3, 77, 141, 60, 12, 299]])
PROMPT = "The weather today"


class Add:
    """An edit that adds a number at every token, the first too, and writes down what it saw."""

    first_token = True

    def __init__(self, hook_name: str, amount: float = 1.0, error: BaseException | None = None):
        self.hook_name, self.amount, self.error = hook_name, amount, error
        self.seen: list[Tensor] = []
        self.positions: list[Tensor] = []

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        self.seen.append(x.clone())
        self.positions.append(positions.clone())
        if self.error:
            raise self.error
        return x + self.amount


def activations(lm, hook_name: str, ids: Tensor = IDS) -> Tensor:
    return next(iter(lm.stream_activations([ids], [hook_name])))[hook_name]


def n_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def build(family: str) -> torch.nn.Module:
    """A tiny random model of a family, weights large enough to see differences."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    size = {"vocab_size": 300, "initializer_range": 0.2}
    neox = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if family == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **size))
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(use_parallel_residual=family == "gpt_neox", max_position_embeddings=64, **neox, **size)
        )


def bridge_of(lm):
    """TransformerLens' own bridge over a copy of the model, built without saelab."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        lm.model.config.model_type, hf_model=copy.deepcopy(lm.model), tokenizer=lm.tokenizer, device="cpu"
    )
    return bridge.eval()


def bridge_cache(bridge, ids: Tensor = IDS) -> dict[str, Tensor]:
    with torch.inference_mode():
        return bridge.run_with_cache(ids, output_attentions=False)[1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


# --- hooks against TransformerLens


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gpt_neox_sequential"])
def test_fast_hooks_equal_the_bridge(family, tiny_lm):
    lm = tiny_lm if family == "llama" else load_model(build(family), tiny_lm.tokenizer)
    _compare(lm, bridge_cache(bridge_of(lm)))
    parallel = family == "gpt_neox"
    assert len(lm.hook_names) == lm.n_layers * (6 if parallel else 8)
    assert ("blocks.0.hook_resid_mid" in lm.hook_names) == (not parallel)


def _compare(lm, cache):
    """All hooks that a bridge has too; it leaves out `hook_mlp_in`, which is the stream in front of the MLP's norm."""
    found = next(iter(lm.stream_activations([IDS], lm.hook_names)))
    for name in lm.hook_names:
        other = name.replace("hook_mlp_in", "hook_resid_mid")
        assert_close(found[name], cache[other].flatten(2))


def test_other_hooks_come_through_the_bridge_and_leave_the_model_alone(tiny_lm):
    before = tiny_lm.logits(IDS)
    names = ["blocks.1.attn.hook_q", "blocks.2.mlp.hook_post", "blocks.0.hook_resid_post"]
    found = next(iter(tiny_lm.stream_activations([IDS], names)))
    cache = bridge_cache(bridge_of(tiny_lm))
    for name in names:
        assert_close(found[name], cache[name].flatten(2))
    assert tiny_lm.d_in("blocks.1.attn.hook_q") == 32 and tiny_lm.d_in("blocks.2.mlp.hook_post") == 64
    assert torch.equal(tiny_lm.logits(IDS), before)


def test_edits_act_on_bridge_hooks_too(tiny_lm):
    plain = activations(tiny_lm, "blocks.1.attn.hook_q")
    with tiny_lm.steer(Add("blocks.0.hook_resid_post", 0.5)):
        assert not torch.allclose(activations(tiny_lm, "blocks.1.attn.hook_q"), plain)


def test_native_bridge():
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(
        d_model=32, d_head=8, n_heads=4, n_layers=2, n_ctx=16, d_vocab=50, act_fn="gelu", seed=0
    )
    bridge = TransformerBridge.boot_native(config)  # pyright: ignore[reportAttributeAccessIssue]
    ids = IDS % 50
    cache = bridge_cache(bridge, ids)
    lm = load_model(bridge)
    assert (lm.n_layers, lm.d_model, lm.max_ctx) == (2, 32, 16)
    for name in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"):
        assert_close(activations(lm, name, ids), cache[name].flatten(2))
    with torch.inference_mode():
        assert torch.equal(lm.logits(ids), bridge(ids))
    edit = Add("blocks.0.hook_resid_post", 0.0)
    generation = lm.generate_ids(ids[:1], max_new_tokens=4)
    assert torch.equal(generation.ids[:7], ids[0]) and len(generation.ids) == 11
    with lm.steer(edit):
        assert torch.equal(lm.generate_ids(ids[:1], max_new_tokens=4).ids, generation.ids)
    assert edit.positions[-1].tolist() == [list(range(10))]  # no cache: the whole prefix each time
    assert lm.logit_weights().shape == (50, 32)
    with pytest.raises(ValueError, match="blocks.1.hook_resid_post"):
        lm.check_hook("blocks.2.hook_resid_post")


# --- streaming


def test_stream_stops_after_the_last_hooked_layer(tiny_lm):
    ran = []
    modules = {"layer1": tiny_lm.model.model.layers[1], "layer2": tiny_lm.model.model.layers[2]}
    modules["head"] = tiny_lm.model.lm_head
    handles = [m.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, m in modules.items()]
    try:
        activations(tiny_lm, "blocks.1.hook_resid_post")
    finally:
        for handle in handles:
            handle.remove()
    assert ran == ["layer1"]


def test_stream_gives_a_batch_at_a_time_in_the_models_dtype(tiny_folder):
    lm = load_model(tiny_folder, dtype=torch.bfloat16, device="cpu")
    batches = [IDS, IDS[:1, :3]]
    found = list(lm.stream_activations(iter(batches), ["blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre"]))
    assert [f["blocks.0.hook_mlp_out"].shape for f in found] == [(2, 7, 32), (1, 3, 32)]
    assert found[0]["blocks.0.hook_resid_pre"].dtype == torch.bfloat16
    assert not torch.is_inference_mode_enabled()


def test_no_hook_stays_on_the_model(tiny_lm):
    clean = n_hooks(tiny_lm.model)
    activations(tiny_lm, "blocks.1.hook_resid_mid")
    with pytest.raises(KeyboardInterrupt), tiny_lm.steer(Add("blocks.1.hook_resid_mid", error=KeyboardInterrupt())):
        tiny_lm.logits(IDS)
    with pytest.raises(RuntimeError, match="stop"), tiny_lm.steer(Add("blocks.0.hook_mlp_out")):
        raise RuntimeError("stop")
    assert n_hooks(tiny_lm.model) == clean
    with torch.inference_mode():
        assert torch.equal(tiny_lm.logits(IDS), tiny_lm.model(IDS).logits)


@pytest.mark.parametrize(
    "name", ["blocks.3.hook_resid_post", "blocks.-1.hook_resid_pre", "model.layers.0", "", "blocks.1.hook_resid_end"]
)
def test_unknown_hook_lists_those_that_exist(tiny_lm, name):
    for call in (tiny_lm.check_hook, tiny_lm.d_in, lambda n: tiny_lm.stream_activations([IDS], [n])):
        with pytest.raises(ValueError, match=r"Nearest: .*hook_.*Available: blocks\.\{0\.\.2\}") as caught:
            call(name)
        assert repr(name) in str(caught.value)


def test_hooks_that_carry_no_token_vectors_are_refused(tiny_lm):
    with pytest.raises(ValueError, match="not one vector per token"):
        activations(tiny_lm, "blocks.0.attn.hook_pattern")
    with pytest.raises(ModelError, match="blocks.0.attn.hook_result.*did not reach it"):
        activations(tiny_lm, "blocks.0.attn.hook_result")
    with pytest.raises(ValueError, match="hook_names is empty"):
        tiny_lm.stream_activations([IDS], [])


def test_widths(tiny_lm):
    assert {tiny_lm.d_in(name) for name in tiny_lm.hook_names} == {32}
    assert (tiny_lm.n_layers, tiny_lm.d_model, tiny_lm.max_ctx, tiny_lm.d_vocab) == (3, 32, 128, 300)
    assert (tiny_lm.bos_id, tiny_lm.eos_id, tiny_lm.special_ids) == (0, 1, (0, 1))


# --- logits and edits


def test_logits_are_the_models_own(tiny_lm):
    with torch.inference_mode():
        expected = tiny_lm.model(IDS).logits
    assert torch.equal(tiny_lm.logits(IDS), expected)
    assert torch.equal(tiny_lm.logits(IDS[0].tolist()), tiny_lm.logits(IDS[0]))
    assert torch.equal(tiny_lm.logits(PROMPT), tiny_lm.logits(tiny_lm.tokenizer(PROMPT).input_ids))


def test_texts_of_different_length_are_padded_on_the_right(tiny_lm):
    ids, positions = tiny_lm.to_batch(["The", PROMPT])
    n = len(tiny_lm.tokenizer("The").input_ids)
    assert positions[0].tolist() == list(range(n)) + [-1] * (ids.shape[1] - n)
    assert positions[1].tolist() == list(range(ids.shape[1]))
    edit = Add("blocks.0.hook_resid_pre", 0.0)
    batched = tiny_lm.run_with_edit(["The", PROMPT], edit)
    assert torch.equal(edit.positions[0], positions)
    assert torch.allclose(batched[0, :n], tiny_lm.logits("The")[0], atol=1e-5)


def test_edits_at_one_site_see_the_same_x_and_are_summed(tiny_lm):
    hook = "blocks.1.hook_resid_post"
    plain = activations(tiny_lm, hook)
    one, two = Add(hook, 1.0), Add(hook, 2.0)
    with tiny_lm.steer(one), tiny_lm.steer(two):
        both = activations(tiny_lm, hook)
    assert torch.equal(one.seen[-1], plain) and torch.equal(two.seen[-1], plain)
    assert torch.allclose(both, plain + 3.0, atol=1e-5)
    with tiny_lm.steer(two, one):
        assert torch.equal(activations(tiny_lm, hook), both)


def test_edits_at_two_sites_act_in_forward_order(tiny_lm):
    late, early = Add("blocks.2.hook_resid_post", 1.0), Add("blocks.0.hook_mlp_out", 1.0)
    plain = activations(tiny_lm, "blocks.2.hook_resid_post")
    with tiny_lm.steer(late, early):
        tiny_lm.logits(IDS)
    assert not torch.allclose(late.seen[-1], plain)


@pytest.mark.parametrize("names", [("hook_resid_mid", "hook_resid_post"), ("hook_resid_post", "hook_resid_mid")])
def test_the_end_of_a_layer_sees_the_edit_in_its_middle(tiny_lm, names):
    edits = {name: Add(f"blocks.1.{name}", 1.0) for name in names}
    with tiny_lm.steer(edits["hook_resid_mid"]):
        expected = activations(tiny_lm, "blocks.1.hook_resid_post")
    with tiny_lm.steer(edits[names[0]]), tiny_lm.steer(edits[names[1]]):
        tiny_lm.logits(IDS)
    assert torch.equal(edits["hook_resid_post"].seen[-1], expected)


def test_leaving_an_inner_block_leaves_the_outer_one_active(tiny_lm):
    hook = "blocks.1.hook_resid_post"
    plain = activations(tiny_lm, hook)
    with tiny_lm.steer(Add(hook, 1.0)):
        with pytest.raises(RuntimeError), tiny_lm.steer(Add(hook, 5.0)):
            raise RuntimeError
        assert torch.allclose(activations(tiny_lm, hook), plain + 1.0)
    assert torch.equal(activations(tiny_lm, hook), plain)


@pytest.mark.parametrize("amount", [0.0, 0.7])
def test_an_edit_between_attention_and_mlp_goes_both_ways(tiny_lm, amount):
    """Adding to the stream behind the attention is the same as adding to the attention's output."""
    mid = tiny_lm.run_with_edit(IDS, Add("blocks.1.hook_resid_mid", amount))
    attention = tiny_lm.run_with_edit(IDS, [Add("blocks.1.hook_attn_out", amount)])
    assert torch.allclose(mid, attention, atol=1e-4)
    assert torch.allclose(mid, tiny_lm.logits(IDS), atol=1e-4) == (amount == 0.0)


@pytest.mark.parametrize(
    "suffix", ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
)
def test_every_site_can_be_edited_and_captured_after_the_edit(tiny_lm, suffix):
    hook = f"blocks.1.{suffix}"
    plain, logits = activations(tiny_lm, hook), tiny_lm.logits(IDS)
    with tiny_lm.steer(Add(hook, 1.0)):
        assert torch.equal(activations(tiny_lm, hook), plain + 1.0)
        assert not torch.allclose(tiny_lm.logits(IDS), logits, atol=1e-3)


def test_steer_refuses_what_is_no_edit(tiny_lm):
    class Wide(Add):
        d_in = 48

    class Crooked(Add):
        def apply(self, x: Tensor, positions: Tensor) -> Tensor:
            return x[:, :1]

    with (
        pytest.raises(ValueError, match="blocks.9.hook_resid_post.*Nearest"),
        tiny_lm.steer(Add("blocks.9.hook_resid_post")),
    ):
        pass
    with (
        pytest.raises(ValueError, match="does not exist in the editable hooks"),
        tiny_lm.steer(Add("blocks.0.attn.hook_q")),
    ):
        pass
    with pytest.raises(ValueError, match="width 48.*has width\\s+32"), tiny_lm.steer(Wide("blocks.0.hook_resid_post")):
        pass
    with (
        pytest.raises(ValueError, match="steer needs edits, such as `feature . 2.0`.*lacks a hook_name or apply"),
        tiny_lm.steer(SimpleNamespace(hook_name=3, apply=print)),
    ):
        pass
    with pytest.raises(ValueError, match=r"returned \(2, 1, 32\)"):
        tiny_lm.run_with_edit(IDS, Crooked("blocks.0.hook_resid_post"))


def test_a_thread_never_meets_anothers_edits(tiny_lm):
    plain = tiny_lm.logits(IDS)
    seen: list[Tensor] = []
    thread = threading.Thread(target=lambda: seen.append(tiny_lm.logits(IDS)))
    with tiny_lm.steer(Add("blocks.1.hook_resid_post", 3.0)):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not seen
    thread.join()
    assert torch.equal(seen[0], plain)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("", "empty"),
        ([], "non-empty list"),
        (["The", ""], "empty"),
        (torch.zeros(1, 0, dtype=torch.int64), "non-empty"),
        (torch.zeros(1, 3), "float32"),
        ([5, 300], "300 is outside the vocabulary.*0 to 299"),
        ([5, -1], "-1 is outside"),
        (torch.zeros(1, 129, dtype=torch.int64), "129 tokens exceed the context.*128"),
    ],
)
def test_bad_prompts(tiny_lm, prompt, words):
    with pytest.raises(ValueError, match=words):
        tiny_lm.logits(prompt)


# --- generation


def test_greedy_generation_is_the_models_own(tiny_lm):
    ids = tiny_lm.to_ids(PROMPT)
    expected = tiny_lm.model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    found = tiny_lm.generate_ids(PROMPT, max_new_tokens=12, keep_logits=True)
    assert torch.equal(found.ids, expected[0]) and found.n_prompt == ids.shape[1]
    whole = tiny_lm.logits(found.ids[:-1])[0, found.n_prompt - 1 :]
    assert torch.allclose(found.logits, whole, atol=1e-4)
    text = tiny_lm.generate(PROMPT, max_new_tokens=12)
    assert text.startswith(PROMPT) and text == tiny_lm.tokenizer.decode(found.ids, skip_special_tokens=True)


def test_positions_in_cached_generation_are_absolute(tiny_lm):
    edit = Add("blocks.0.hook_resid_post", 0.0)
    with tiny_lm.steer(edit):
        n = tiny_lm.generate_ids(PROMPT, max_new_tokens=3).n_prompt
    assert [p.tolist() for p in edit.positions] == [[list(range(n))], [[n]], [[n + 1]]]


def test_steered_and_plain_runs_meet_the_same_luck(tiny_lm):
    def sampled(seed, edit=None):
        with tiny_lm.steer(*([edit] if edit else [])):
            return tiny_lm.generate_ids(PROMPT, 15, temperature=1.5, seed=seed).ids.tolist()

    assert sampled(1) == sampled(1) == sampled(1, Add("blocks.1.hook_resid_post", 0.0))
    assert sampled(1) != sampled(2)
    assert sampled(1) != sampled(1, Add("blocks.1.hook_mlp_out", 3.0))


def picked(logits, temperature, uniforms):
    rows = logits.expand(len(uniforms), -1)
    return choose(rows, temperature, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_choose_by_hand():
    logits = torch.log(torch.tensor([0.5, 0.0, 0.2, 0.3]))
    assert picked(logits, 1.0, [0.0, 0.49, 0.51, 0.69, 0.71, 0.9999]) == [0, 0, 2, 2, 3, 3]
    assert picked(logits, 0.0, [0.99]) == [0]
    assert picked(logits, 100.0, [0.3, 0.4]) == [0, 2]  # nearly uniform over the three possible tokens


def test_a_row_is_chosen_alone_as_in_a_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator) * 3
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    for temperature in (0.0, 0.7, 1.3):
        together = choose(logits, temperature, uniforms)
        alone = [choose(logits[i : i + 1], temperature, uniforms[i : i + 1]) for i in range(64)]
        assert torch.equal(together, torch.cat(alone)) and len(set(together.tolist())) > 30


def test_generation_tells_each_token_and_can_be_ended(tiny_lm):
    told = []

    def until_three(n):
        told.append(n)
        if n == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tiny_lm.generate("the river", max_new_tokens=9, on_token=until_three)
    assert told == [1, 2, 3]
    assert not tiny_lm.edits and tiny_lm.generate("the river", max_new_tokens=2)  # the model is free again


def test_generation_tells_the_text_so_far(tiny_lm):
    told = []
    text = tiny_lm.generate("the river", max_new_tokens=12, seed=3, temperature=1.0, on_text=told.append)
    assert len(told) == 12 and told[-1] == text.rstrip("\ufffd") and told[0].startswith("the river")
    shorter = tiny_lm.generate("the river", max_new_tokens=5, seed=3, temperature=1.0)
    assert told[4] == shorter.rstrip("\ufffd")
    with pytest.raises(ValueError, match="one text, got 2"):
        tiny_lm.generate(["the river", "a mill"], on_text=told.append)


def test_generation_stops_at_eos(tiny_lm):
    free = tiny_lm.generate_ids(PROMPT, max_new_tokens=6)
    third = int(free.ids[free.n_prompt + 2])
    first = free.ids[free.n_prompt :].tolist().index(third)
    lm = load_model(tiny_lm.model, with_eos(tiny_lm.tokenizer, third))
    stopped = lm.generate_ids(PROMPT, max_new_tokens=6)
    assert torch.equal(stopped.ids, free.ids[: free.n_prompt + first + 1])


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"prompt": ""}, "empty"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"num_return_sequences": 2}, "at temperature 0 would be the same text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 500}, "exceed the context.*128"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_generation_requests(tiny_lm, wrong, words):
    with pytest.raises(ValueError, match=words):
        tiny_lm.generate(**{"prompt": PROMPT, **wrong})


def test_chat_applies_the_template_once(tiny_lm):
    text = tiny_lm.chat("Hello")
    assert text == "<s>user: Hello\n<s>assistant: " == tiny_lm.chat([{"role": "user", "content": "Hello"}])
    assert tiny_lm.to_ids(text)[0].tolist().count(tiny_lm.bos_id) == 2
    assert tiny_lm.generate(text, max_new_tokens=3).startswith(text)


def test_bos_of_a_tokenizer_that_adds_it_is_never_doubled(tiny_lm):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    lm = load_model(tiny_lm.model, tokenizer)
    assert lm.to_ids("The")[0, 0] == 0
    assert torch.equal(lm.to_ids("The"), lm.to_ids("<s>The"))
    assert lm.tokenizer_hash != tiny_lm.tokenizer_hash


def test_a_model_without_tokenizer_takes_ids_only(tiny_lm):
    lm = load_model(tiny_lm.model)
    assert torch.equal(lm.logits(IDS), tiny_lm.logits(IDS))
    assert lm.tokenizer_hash == "" and lm.special_ids == (lm.bos_id, lm.eos_id) == (0, 1)
    with pytest.raises(ValueError, match="no tokenizer"):
        lm.logits("The weather")
    with pytest.raises(ValueError, match="no chat template"):
        lm.chat("The weather")


# --- logit weights, hashes, loading


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logit_weights_rank_tokens_as_the_model_does(family, tiny_lm):
    """Final norm and unembedding of x differ from `logit_weights @ x` by one positive factor and a constant."""
    lm = tiny_lm if family == "llama" else load_model(build(family))
    base = lm.model.base_model
    norm = base.norm if family == "llama" else base.ln_f
    gain = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5
    before = norm.weight.clone()
    x = torch.randn(32, generator=torch.Generator().manual_seed(1))
    try:
        norm.weight.data.copy_(gain)
        with torch.inference_mode():
            expected = lm.model.lm_head(norm(x))
            found = lm.logit_weights() @ x
        assert torch.corrcoef(torch.stack([expected, found]))[0, 1] > 0.99999
    finally:
        norm.weight.data.copy_(before)


def test_hash_is_of_the_stored_weights(tiny_folder, tiny_lm, tmp_path):
    half = load_model(tiny_folder, dtype=torch.bfloat16)
    assert half.hash == tiny_lm.hash and len(half.hash) == 64
    assert half.tokenizer_hash == tiny_lm.tokenizer_hash
    built = load_model(tiny_lm.model, tiny_lm.tokenizer)
    assert built.hash == load_model(copy.deepcopy(tiny_lm.model)).hash
    changed = copy.deepcopy(tiny_lm.model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-6
    assert load_model(changed).hash != built.hash
    changed.save_pretrained(tmp_path)
    tiny_lm.tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path).hash != tiny_lm.hash


def test_dtype_is_stated_and_can_be_chosen(tiny_folder, tiny_lm, capsys):
    lm = load_model(tiny_folder, dtype=torch.bfloat16, device="cpu")
    output = capsys.readouterr()
    assert lm.dtype == torch.bfloat16 and output.out == ""
    assert "bfloat16 on cpu" in output.err and "bfloat16 on cpu" in repr(lm)
    other = load_model(tiny_lm.model, dtype=torch.float64)
    assert other.dtype == torch.float64 and tiny_lm.model.dtype == torch.float32  # a copy


@pytest.mark.parametrize("source", ["/nowhere/model", "./missing", "a/b/c", "two words", "file"])
def test_unknown_sources_name_the_value(source, tmp_path):
    if source == "file":
        source = str(tmp_path / "model.txt")
        (tmp_path / "model.txt").write_text("no model")
    with pytest.raises(ModelError, match="Give 'smollm2'") as caught:
        load_model(source)
    assert source in str(caught.value)


def test_damaged_folders_name_the_folder(tiny_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        load_model(tmp_path / "empty")
    folder = tmp_path / "cut"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cut.*could not be loaded"):
        load_model(folder)


@pytest.mark.parametrize("source", [3, None, torch.nn.Linear(2, 2)])
def test_objects_that_are_no_model(source):
    with pytest.raises(ValueError, match="expected 'smollm2', a folder"):
        load_model(source)


# --- the real model


def test_smollm2_speaks(smollm2):
    assert (smollm2.n_layers, smollm2.d_model, smollm2.max_ctx) == (30, 576, 8192)
    assert smollm2.name == "smollm2" and {0, 1, 2} <= set(smollm2.special_ids) and smollm2.eos_id == 2
    assert "Paris" in smollm2.generate("The capital of France is", max_new_tokens=6)
    ids = smollm2.to_ids("The quick brown fox jumps over the lazy dog.")
    assert smollm2.bos_id not in ids  # this tokenizer adds none
    loss = torch.nn.functional.cross_entropy(smollm2.logits(ids)[0, :-1].float(), ids[0, 1:])
    assert loss < 5  # 10.8 for a model that knows nothing
