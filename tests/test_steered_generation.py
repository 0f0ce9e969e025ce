"""Steered generation: the same random numbers for every arm, the same text alone and in a batch, and a model left as it was."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import torch
from tiny_saes import config_of, info

from saelab.saes import VARIANTS, Batch
from saelab.steering import Direction, FeatureHandle, Plan, compare

HOOK, HOOK_OUT = "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"
PROMPT = "The weather today"
PROMPTS = ["The weather today is fine, and", "She said", "def main(argument): return"]
N_NEW, N_FEW = 10, 5
TIE = 1e-4
"""Two logits as close as this may change places in a batch of another size, and with them all that follows."""


def handle(name: str) -> FeatureHandle:
    """A feature of a random SAE of this variant that fires on many tokens."""
    torch.manual_seed(1)
    sae = VARIANTS[name](config_of(name, normalize="none"), 32, seed=3)
    with torch.no_grad():
        if not bool(sae.W_dec.any()):  # a transcoder's starts at 0
            sae.W_dec.add_(0.2 * torch.randn(sae.W_dec.shape))
        rows = 2 * torch.randn(64, 32)
        sae.loss(Batch(rows, rows), info())  # sets the threshold of those that have one
    origin = {"hook_name": HOOK} | ({"hook_name_out": HOOK_OUT} if "d_out" in sae.shape else {})
    sae.provenance = replace(sae.provenance, origin=origin)
    return FeatureHandle(sae, 5)


@pytest.fixture(scope="module")
def feature() -> FeatureHandle:
    return handle("topk")


def edits_of(one: FeatureHandle) -> dict[str, Plan]:
    """Plans of every kind that this feature allows."""
    edits = {"add": one.add(3.0, unit="raw")}
    if one.hook_name == HOOK:  # a transcoder's activations are not known where it writes
        edits |= {"clamp": one.clamp(2.0, unit="raw"), "scale": one.scale(-2.0), "remove": one.project_out()}
    return {name: Plan([edit], on="generated" if name == "add" else "both") for name, edit in edits.items()}


def agree(alone, batched) -> None:
    """The same tokens, up to a step whose two best logits are as good as equal."""
    assert alone.n_prompt == batched.n_prompt
    for n, (a, b) in enumerate(zip(alone.ids[alone.n_prompt :], batched.ids[batched.n_prompt :], strict=False)):
        if a != b:
            best = alone.logits[n].topk(2).values
            assert float(best[0] - best[1]) <= TIE, f"token {n}"
            return
        assert torch.allclose(alone.logits[n], batched.logits[n], atol=TIE)
    assert len(alone.ids) == len(batched.ids)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_text_alone_is_the_text_in_a_batch(tiny_lm, name):
    plans = list(edits_of(handle(name)).values())
    batched = tiny_lm.generate_arms(PROMPT, [None, *plans], N_FEW, keep_logits=True)
    sampled = tiny_lm.generate_arms(PROMPT, [None, *plans], N_FEW, 1.2, seeds=(4, 0))
    for plan, (greedy,), drawn in zip([None, *plans], batched, sampled, strict=True):
        with tiny_lm.steer(*([plan] if plan else [])):
            agree(tiny_lm.generate_ids(PROMPT, N_FEW, keep_logits=True), greedy)
            for seed, one in zip((4, 0), drawn, strict=True):
                assert torch.equal(tiny_lm.generate_ids(PROMPT, N_FEW, 1.2, seed).ids, one.ids)
    assert any(not torch.equal(batched[0][0].logits[1], one[0].logits[1]) for one in batched[1:])


def test_every_arm_draws_the_same_numbers(tiny_lm, feature):
    nothing, same = Plan([feature.add(0.0, unit="raw")]), Plan([feature.scale(1.0)])
    arms = tiny_lm.generate_arms(PROMPT, [None, nothing, same], N_NEW, 1.5, seed=2, n_seeds=3)
    for seed in range(3):
        assert torch.equal(arms[0][seed].ids, arms[1][seed].ids) and torch.equal(arms[0][seed].ids, arms[2][seed].ids)
    assert len({tuple(one.ids.tolist()) for one in arms[0]}) == 3


@pytest.mark.parametrize(
    "where",
    [{}, {"on": "prompt"}, {"on": "generated"}, {"positions": (-1,)}, {"positions": (1, 2)}, {"window": (-2, None)}],
    ids=str,
)
def test_padding_moves_no_edit(tiny_lm, feature, where):
    """Prompts of different lengths are padded on the left; the edits of each are where they are without the others."""
    plan = Plan([feature.add(4.0, unit="raw")], **where)
    with tiny_lm.steer(plan):
        together = tiny_lm.generate(PROMPTS, N_NEW, temperature=1.0, seed=3)
        alone = [tiny_lm.generate(prompt, N_NEW, temperature=1.0, seed=3) for prompt in PROMPTS]
    assert together == alone
    assert alone != [tiny_lm.generate(prompt, N_NEW, temperature=1.0, seed=3) for prompt in PROMPTS]


def state_of(lm):
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules())
    return hooks, [parameter.clone() for parameter in lm.model.parameters()], lm.logits(PROMPT).clone(), lm.edits


def same_state(a, b) -> bool:
    return a[0] == b[0] and a[3] == b[3] and all(map(torch.equal, [*a[1], a[2]], [*b[1], b[2]]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("how", ["arms", "compare", "edit", "block"])
def test_what_ends_a_generation_leaves_the_model_as_it_was(tiny_lm, feature, error, how):
    before, training = state_of(tiny_lm), tiny_lm.model.training
    plan = Plan([feature.add(3.0, unit="raw"), Direction(torch.ones(32), HOOK_OUT).add(1.0)])

    def stop(n, *_):
        if n == 3:
            raise error

    class Broken:
        hook_name = HOOK_OUT

        def apply(self, x, positions):
            raise error

    with pytest.raises(error):
        if how == "arms":
            tiny_lm.generate_arms(PROMPT, [None, plan], N_NEW, on_token=stop)
        elif how == "compare":
            compare(tiny_lm, PROMPT, plan, max_new_tokens=N_NEW, on_step=stop, progress=False)
        elif how == "edit":
            tiny_lm.generate_arms(PROMPT, [None, Plan([*plan.edits, Broken()])], N_NEW)
        else:
            with tiny_lm.steer(plan):
                tiny_lm.generate(PROMPT, N_NEW, on_token=stop)
    assert same_state(before, state_of(tiny_lm)) and tiny_lm.model.training == training


def test_two_threads_write_what_each_writes_alone(tiny_lm, feature):
    before = state_of(tiny_lm)
    plans = [Plan([feature.add(size, unit="raw")]) for size in (3.0, -3.0)]
    alone = [compare(tiny_lm, PROMPT, plan, max_new_tokens=N_NEW, progress=False).data() for plan in plans]
    found, barrier = {}, threading.Barrier(2)

    def write(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            found[i] = compare(tiny_lm, PROMPT, plans[i], max_new_tokens=N_NEW, progress=False).data()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(2)] == alone and alone[0] != alone[1]
    assert same_state(before, state_of(tiny_lm))


def test_a_callback_may_compute_without_the_edits(tiny_lm, feature):
    plain, told = tiny_lm.logits(PROMPT), []

    def read(n: int) -> None:
        with tiny_lm.unsteered():
            assert not tiny_lm.edits
            told.append(torch.equal(tiny_lm.logits(PROMPT), plain))
            with tiny_lm.steer(feature.add(4.0, "raw")):
                told.append(not torch.equal(tiny_lm.logits(PROMPT), plain))
        assert tiny_lm.edits

    with tiny_lm.steer(feature.add(8.0, "raw")):
        text = tiny_lm.generate(PROMPT, 5)
        report = tiny_lm.last_report
        assert tiny_lm.generate(PROMPT, 5, on_token=read) == text and all(told) and len(told) == 10
        assert [one.n_applied for one in tiny_lm.last_report] == [one.n_applied for one in report]
        with pytest.raises(KeyError), tiny_lm.unsteered():
            raise KeyError
        assert tiny_lm.edits
    assert not tiny_lm.edits


def test_two_coroutines_keep_their_own_edits(tiny_lm, feature):
    before = state_of(tiny_lm)
    plans = [Plan([feature.add(size, unit="raw")]) for size in (3.0, -3.0)]

    def steered(plan):
        with tiny_lm.steer(plan):
            return tiny_lm.generate(PROMPT, N_NEW)

    async def write(plan):
        with tiny_lm.steer(plan):
            await asyncio.sleep(0)  # the other's block opens
            text = tiny_lm.generate(PROMPT, N_NEW)
            await asyncio.sleep(0)
            return text, len(tiny_lm.edits)

    async def both():
        return await asyncio.gather(*map(write, plans))

    assert asyncio.run(both()) == [(steered(plan), 1) for plan in plans]
    assert same_state(before, state_of(tiny_lm))
