"""Nothing is trusted to have happened: hooks are counted, the caller's model stays as it was, `steer` ends what it began."""

from __future__ import annotations

import copy

import pytest
import torch

import saelab
from saelab.errors import ModelError
from saelab.saes import TopKConfig, TopKSAE
from saelab.steering import Direction

HOOK = "blocks.1.hook_resid_post"
IDS = torch.tensor([[5, 17, 30, 44]])


def skipped_layer(model):
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[2]])


def replaced_forward(model):
    layer = model.model.layers[1]
    model.model.layers[1].__class__ = type(
        "Fused", (type(layer),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    )


CAUSES = {"a layer is skipped": skipped_layer, "code calls forward and not the layer": replaced_forward}
PASSES = {
    "logits": lambda lm: lm.logits(IDS),
    "generate": lambda lm: lm.generate_ids(IDS, max_new_tokens=2),
    "run_with_edit": lambda lm: lm.run_with_edit(IDS, Direction(torch.ones(32), HOOK) * 1.0),
    "stream": lambda lm: next(iter(lm.stream_activations([IDS], [HOOK]))),
    "stream behind the edit": lambda lm: next(iter(lm.stream_activations([IDS], ["blocks.2.hook_resid_post"]))),
    "evaluate": lambda lm: saelab.evaluate(
        TopKSAE(TopKConfig(8, 2), 32), lm, ["The weather"] * 3, hook_name=HOOK, progress=False
    ),
}


@pytest.mark.parametrize("a_pass", PASSES)
@pytest.mark.parametrize("cause", CAUSES)
def test_a_hook_that_no_pass_comes_by_is_an_error(tiny_lm, cause, a_pass):
    lm = saelab.load_model(copy.deepcopy(tiny_lm.model), tiny_lm.tokenizer)
    CAUSES[cause](lm.model)
    edits = [] if a_pass in ("run_with_edit", "stream", "evaluate") else [Direction(torch.ones(32), HOOK) * 1.0]
    with pytest.raises(ModelError, match=f"{HOOK}.*did not reach it"), lm.steer(*edits):
        PASSES[a_pass](lm)


def test_an_edit_behind_the_last_capture_had_no_turn(tiny_lm):
    with tiny_lm.steer(Direction(torch.ones(32), "blocks.2.hook_resid_post") * 1.0):
        found = next(iter(tiny_lm.stream_activations([IDS], [HOOK])))[HOOK]
    assert torch.equal(found, next(iter(tiny_lm.stream_activations([IDS], [HOOK])))[HOOK])


def test_compiled_models_are_steered_as_they_were_before_or_refused(tiny_lm):
    model = copy.deepcopy(tiny_lm.model)
    lm = saelab.load_model(torch.compile(model, backend="eager"), tiny_lm.tokenizer)
    edit = Direction(torch.ones(32), HOOK) * 3.0
    assert torch.equal(lm.run_with_edit(IDS, edit), tiny_lm.run_with_edit(IDS, edit))
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(ModelError, match=r"compiled in place \(model.layers.1\)"):
        saelab.load_model(model, tiny_lm.tokenizer)


def test_offloaded_models_are_refused_when_they_are_loaded(tiny_lm):
    model = copy.deepcopy(tiny_lm.model)
    model.model.layers[2].to("meta")
    with pytest.raises(ModelError, match="offloaded: 9 of its weights, starting with model.layers.2"):
        saelab.load_model(model, tiny_lm.tokenizer)


def state_of(model, tokenizer):
    return {
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": model.config.to_dict(),
        "weights": [parameter.clone() for parameter in model.parameters()],
        "tokenizer": (tokenizer.model_max_length, tokenizer.padding_side, len(tokenizer)),
    }


@pytest.mark.parametrize("mode", ["training", "evaluating"])
@pytest.mark.parametrize("a_pass", ["load", *PASSES, "logit_weights", "a hook of the bridge"])
def test_the_callers_model_and_tokenizer_stay_as_they_were(tiny_lm, a_pass, mode):
    model, tokenizer = copy.deepcopy(tiny_lm.model), copy.deepcopy(tiny_lm.tokenizer)
    model.train(mode == "training").requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    tokenizer.model_max_length = 77
    before = state_of(model, tokenizer)
    lm = saelab.load_model(model, tokenizer)
    if a_pass == "a hook of the bridge":
        next(iter(lm.stream_activations([IDS], ["blocks.0.attn.hook_q"])))
    elif a_pass == "logit_weights":
        lm.logit_weights()
    elif a_pass != "load":
        PASSES[a_pass](lm)
    after = state_of(model, tokenizer)
    assert all(map(torch.equal, before.pop("weights"), after.pop("weights")))
    assert before == after


def test_dropout_never_acts_whatever_the_mode(tiny_lm):
    model = copy.deepcopy(tiny_lm.model)
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.5))
    lm = saelab.load_model(model.train(), tiny_lm.tokenizer)
    assert torch.equal(lm.logits(IDS), lm.logits(IDS)) and model.training


def edit(value):
    return Direction(torch.full((32,), value), HOOK) * 1.0


@pytest.mark.parametrize("order", ["first ends first", "last ends first"])
@pytest.mark.parametrize("same", [True, False], ids=["the same edit", "two edits"])
def test_overlapping_blocks_leave_nothing_behind(tiny_lm, order, same):
    plain = tiny_lm.logits(IDS)
    one = edit(1.0)
    blocks = [tiny_lm.steer(one), tiny_lm.steer(one if same else edit(2.0))]
    for block in blocks:
        block.__enter__()
    assert len(tiny_lm.edits) == 2
    ending, staying = (blocks[0], blocks[1]) if order == "first ends first" else (blocks[1], blocks[0])
    ending.__exit__(None, None, None)
    assert len(tiny_lm.edits) == 1
    left = tiny_lm.edits[0]
    staying.__exit__(None, None, None)
    assert tiny_lm.edits == () and torch.equal(tiny_lm.logits(IDS), plain)
    assert same or (left is one) == (order == "last ends first")


def test_a_block_that_fails_or_is_forgotten_leaves_nothing_behind(tiny_lm):
    def texts():
        with tiny_lm.steer(edit(1.0)):
            yield tiny_lm.logits(IDS)

    with pytest.raises(ZeroDivisionError), tiny_lm.steer(edit(2.0)):
        forgotten = texts()
        next(forgotten)
        raise ZeroDivisionError
    forgotten.close()
    assert tiny_lm.edits == ()
