"""The gradient column of a cache: what it holds, and that everything a cache does treats it as it does the activations."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_harvest
import torch
from test_cache_repair import TEXTS, alter, contents
from test_cache_storage import digest

import saelab
from saelab.activation_cache import forward_pass, layout
from saelab.activation_cache.codec import decode
from saelab.activation_cache.columns import LOSS, gradient_of
from saelab.activation_cache.harvest import harvest
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.repair import repair
from saelab.cli.cache_commands import Info, Stats
from saelab.errors import CacheError
from saelab.models import loss_gradients
from saelab.models.loss_gradients import activations_and_gradients
from saelab.tokens import load_texts

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
COLUMNS = [*HOOKS, *map(gradient_of, HOOKS)]
CTX = 32
SIZES = {
    **{"ctx_len": CTX, "batch_size": 4, "shard_rows": 100, "pool_shards": 3, "split": "all"},
    **{"progress": False, "gradients": True},
}

pytestmark = pytest.mark.usefixtures("early_norm_rule")


def made(lm: Any, folder: Path, texts: Any = TEXTS, hooks: Any = HOOKS, n_tokens: int = 1_000, **changes: Any) -> Any:
    arguments: dict[str, Any] = SIZES | changes
    return harvest(lm, texts, hooks, n_tokens, folder, **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_lm) -> Path:
    """A finished cache of two hooks with gradients, 10 shards."""
    folder = tmp_path_factory.mktemp("gradients") / "cache"
    made(tiny_lm, folder)
    return folder


def by_hand(model: Any, ids: torch.Tensor, hook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation and gradient at a hook of a Llama: the derivative by something of 0 that is added there."""
    layer, name = model.model.layers[int(hook.split(".")[1])], hook.split(".", 2)[2]
    module = {"hook_resid_post": layer, "hook_mlp_out": layer.mlp, "hook_attn_out": layer.self_attn}[name]
    seen: list[torch.Tensor] = []
    added = torch.zeros(*ids.shape, model.config.hidden_size, dtype=model.dtype, requires_grad=True)

    def add(_module: Any, _given: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x.detach())
        return (x + added, *output[1:]) if isinstance(output, tuple) else x + added

    handle = module.register_forward_hook(add)
    try:
        log_probs = model(ids).logits.log_softmax(-1)
    finally:
        handle.remove()
    each = [log_probs[i, t, ids[i, t + 1]] for i in range(len(ids)) for t in range(ids.shape[1] - 1)]
    loss = -torch.stack(each).sum()
    (gradient,) = torch.autograd.grad(loss, added)
    return seen[0], gradient


# --- without gradients nothing changes


class Exact(test_harvest.StandIn):
    """One number per row, whole and small: its sums are exact on every machine."""

    def rows(self, ids, hook_name):
        x = torch.nn.functional.one_hot(ids % 12, 12) * (1 + ids % 7)[..., None]
        return x.float() * (1 + test_harvest.HOOKS.index(hook_name))


BLOCKS = {"block_contexts": 32, "shuffle": False}
FROZEN = [
    ("bfloat16", {}, "2bc2db336d119b070d2666c10c327c841ee0ada6f103e0bc6301ba75c7c332fd", "d2ea033c21fec596"),
    ("int8", BLOCKS, "5339301f90fdfd74c1229ec2f9d634b327f67af112a3fc94bd6336e0ff574fa5", "f1f80b8715169129"),
]


@pytest.mark.parametrize(("storage", "modes", "files", "manifest"), FROZEN)
def test_a_cache_without_gradients_has_the_bytes_it_had_before_there_were_any(
    tmp_path, storage, modes, files, manifest
):
    """Frozen before there was the column: the files, and the manifest but for environment and texts."""
    cache = test_harvest.harvest(Exact(), tmp_path / "cache", storage=storage, **modes)
    assert digest(cache.path) == files
    kept = {key: value for key, value in cache.manifest.items() if key not in ("environment", "texts")}
    assert hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16] == manifest
    assert cache.gradients is None and not list(cache.path.rglob("*gradient*"))


# --- what it holds


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_attn_out"])
def test_gradients_are_autograds_of_the_same_loss(tiny_lm, hook):
    """In float64, at one hook and at several together, for a few contexts at a time as for all."""
    lm = saelab.load_model(tiny_lm.model.__class__(tiny_lm.model.config).double(), tiny_lm.tokenizer)
    ids = torch.randint(2, 300, (5, 12), generator=torch.Generator().manual_seed(0))
    x, g = by_hand(lm.model, ids, hook)
    others = ["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_in", "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post"]
    for hooks in ([hook], [hook, *others], [*others[::-1], hook]):
        found = activations_and_gradients(lm, ids, hooks)
        torch.testing.assert_close(found.activations[hook], x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.gradients[hook], g, rtol=1e-9, atol=1e-12)
        assert list(found.gradients) == hooks and not any(p.grad is not None for p in lm.model.parameters())
    assert all(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize(
    "hook", ["hook_resid_pre", "attn.hook_z", "hook_resid_mid", "hook_mlp_in", "mlp.hook_in", "hook_resid_post"]
)
def test_the_gradient_is_the_slope_of_the_loss_when_the_activation_moves(tiny_lm, hook):
    """By finite differences in float64 through `run_with_edit`, all hooks of a block at once having been read."""
    lm = saelab.load_model(tiny_lm.model.__class__(tiny_lm.model.config).double(), tiny_lm.tokenizer)
    block = [name for name in lm.hook_names if name.startswith("blocks.1.")]
    ids = torch.randint(2, 300, (1, 8), generator=torch.Generator().manual_seed(1))
    name = f"blocks.1.{hook}"
    g = activations_and_gradients(lm, ids, block).gradients[name][0, 3]
    d = torch.randn(len(g), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    class Moved:
        hook_name, first_token = name, True

        def __init__(self, by: float) -> None:
            self.by = by

        def apply(self, x, positions):
            return x + self.by * d * (positions == 3)[..., None]

    def loss(by: float) -> float:
        logits = lm.run_with_edit(ids, Moved(by))[0, :-1]
        return float(-logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum())

    h = 0.02  # not less: the model's norms compute in float32
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert slope == pytest.approx(float(d @ g), rel=1e-3)
    assert abs(float(d @ g)) > 1e-4


def test_rows_and_gradients_of_a_cache_are_those_of_their_tokens(whole, tiny_lm):
    """Shuffled or not, each row has the gradient of its own token; the last token of a context has none and is left out."""
    cache = ActivationCache(whole)
    ids, _ = cache.tokens()
    for hook in HOOKS:
        x, g = (
            torch.cat(parts)
            for parts in zip(*(by_hand(tiny_lm.model, some, hook) for some in ids.split(8)), strict=True)
        )
        for (rows, index), (gradients, same) in zip(cache.shards(hook), cache.shards(gradient_of(hook)), strict=True):
            seq, pos = index["seq"].long(), index["pos"].long()
            assert torch.equal(seq, same["seq"].long()) and int(pos.max()) < CTX - 1
            torch.testing.assert_close(rows.float(), x[seq, pos].bfloat16().float(), rtol=1e-2, atol=1e-5)
            torch.testing.assert_close(gradients.float(), g[seq, pos].bfloat16().float(), rtol=1e-2, atol=1e-5)
            assert bool(gradients.float().norm(dim=1).min() > 0)
    masked = cache.manifest["masked"]
    assert cache.n_rows + sum(masked.values()) == cache.manifest["n_tokens"]
    assert 0 < masked["no_loss"] <= cache.manifest["n_sequences"]
    assert cache.manifest["format_version"] == 4 and cache.gradients == LOSS


def test_the_activations_are_those_of_a_cache_without_gradients(whole, tiny_lm, tmp_path):
    plain = made(tiny_lm, tmp_path / "plain", gradients=False)
    cache = ActivationCache(whole)
    assert cache.manifest["max_norm"] == pytest.approx(plain.manifest["max_norm"], rel=1e-5)
    of = [
        {
            (s, p): row
            for rows, i in one.shards(HOOKS[0])
            for s, p, row in zip(i["seq"].tolist(), i["pos"].tolist(), rows, strict=True)
        }
        for one in (cache, plain)
    ]
    assert {place for place in of[1] if place[1] < CTX - 1} == of[0].keys()
    for place, row in of[0].items():
        torch.testing.assert_close(row, of[1][place], rtol=1e-2, atol=1e-5)


def test_in_conversations_the_last_token_before_the_padding_has_no_loss(tiny_lm, tmp_path):
    chats = [[{"role": "user", "content": text[: 20 + i]}] for i, text in enumerate(TEXTS)]
    cache = made(tiny_lm, tmp_path / "chat", chats, n_tokens=600, chat=True, ctx_len=64)
    _, doc = cache.tokens()
    last = (doc >= 0).sum(1) - 1
    for _, index in cache.shards(HOOKS[0]):
        assert bool((index["pos"] < last[index["seq"].long()]).all())
    assert cache.manifest["masked"]["no_loss"] == cache.manifest["n_sequences"]  # none ends in a special token
    ids, real = cache.tokens()[0][:1], doc[:1] >= 0
    found = activations_and_gradients(tiny_lm, ids, HOOKS, real).gradients[HOOKS[0]]
    assert not bool(found[0, int(last[0]) :].any()) and bool(found[0, : int(last[0])].any(-1).all())
    alone = activations_and_gradients(tiny_lm, ids[:, : int(last[0]) + 1], HOOKS).gradients[HOOKS[0]]
    torch.testing.assert_close(found[:, : int(last[0]) + 1], alone)


def test_several_models_have_each_its_own_loss(tiny_lm, tmp_path):
    other = saelab.load_model(tiny_lm.model.__class__(tiny_lm.model.config), tiny_lm.tokenizer)
    cache = made([tiny_lm, other], tmp_path / "two", hooks=HOOKS[0], n_tokens=500)
    ids, _ = cache.tokens()
    for label, lm in zip(cache.models, (tiny_lm, other), strict=True):
        _, g = by_hand(lm.model, ids, HOOKS[0])
        for gradients, index in cache.shards(gradient_of(f"{label}/{HOOKS[0]}")):
            expected = g[index["seq"].long(), index["pos"].long()]
            torch.testing.assert_close(gradients.float(), expected, rtol=1e-2, atol=1e-5)


# --- reading


def test_batches_keep_activation_and_gradient_together(whole):
    cache = ActivationCache(whole)
    pairs = set[tuple[float, ...]]()
    for (rows, _), (gradients, _) in zip(cache.shards(HOOKS[0]), cache.shards(COLUMNS[2]), strict=True):
        pairs |= set(map(tuple, torch.cat([rows, gradients], 1).tolist()))
    assert len(pairs) > cache.n_rows / 2
    for batch in itertools.islice(cache.batches(64, seed=3, start_step=2, hook_name=COLUMNS), 12):
        assert list(batch) == COLUMNS
        assert pairs.issuperset(map(tuple, torch.cat([batch[HOOKS[0]], batch[COLUMNS[2]]], 1).tolist()))
    left = cache.left_out(50, COLUMNS)
    assert pairs.issuperset(map(tuple, torch.cat([left[HOOKS[0]], left[COLUMNS[2]]], 1).tolist()))
    assert cache.hook_names == list(HOOKS) and cache.d_in(COLUMNS[2]) == 32
    with pytest.raises(ValueError, match=r"'blocks.2.hook_resid_post.gradient' is not in .*hook_mlp_out.gradient"):
        cache.batches(4, hook_name="blocks.2.hook_resid_post.gradient")


def test_a_cache_of_one_hook_needs_no_name_for_its_activations(tiny_lm, tmp_path):
    cache = made(tiny_lm, tmp_path / "one", TEXTS[:8], HOOKS[0], 200)
    assert torch.equal(next(cache.batches(8)), next(cache.batches(8, hook_name=HOOKS[0])))


def test_info_and_stats_tell_of_the_gradients(whole, capsys):
    Info(whole).run()
    Stats(whole).run()
    told = capsys.readouterr().out
    assert f"gradients           at each hook, of the {LOSS}" in told and "no_loss" in told
    cache = ActivationCache(whole)
    stats, gradients = cache.stats(COLUMNS[2]), torch.cat([g.double() for g, _ in cache.shards(COLUMNS[2])])
    torch.testing.assert_close(stats["second_moment"], gradients.square().mean(0), rtol=1e-5, atol=0)
    assert stats["mean_norm"] == pytest.approx(float(gradients.norm(dim=1).mean()), rel=1e-5)
    assert f"mean norm, gradient {stats['mean_norm']:.4g}" in told


# --- crashes, blocks, damage, storage


class Stopped:
    """`activations_and_gradients` that is interrupted at a call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, *given: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return activations_and_gradients(*given)


@pytest.mark.parametrize("stop_at", [1, 6])
def test_an_interrupted_harvest_goes_on_to_the_same_bytes(whole, tiny_lm, tmp_path, monkeypatch, stop_at):
    with monkeypatch.context() as patch:
        patch.setattr(forward_pass, "activations_and_gradients", Stopped(stop_at))
        with pytest.raises(KeyboardInterrupt):
            made(tiny_lm, tmp_path / "cache")
    begun = len(list((tmp_path / "cache").glob("shards/*")))
    assert bool(begun) == (stop_at > 2)
    made(tiny_lm, tmp_path / "cache").verify()
    assert test_harvest.contents(tmp_path / "cache") == test_harvest.contents(whole)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_blocks_hold_the_same_rows_and_go_on_after_an_interruption(whole, tiny_lm, tmp_path, monkeypatch, storage):
    blocks = {"block_contexts": 8, "storage": storage}
    alone = made(tiny_lm, tmp_path / "alone", **blocks)
    with monkeypatch.context() as patch:
        patch.setattr(forward_pass, "activations_and_gradients", Stopped(6))
        with pytest.raises(KeyboardInterrupt):
            made(tiny_lm, tmp_path / "cache", **blocks)
    made(tiny_lm, tmp_path / "cache", **blocks)
    assert test_harvest.contents(tmp_path / "cache") == test_harvest.contents(alone.path)
    assert (
        alone.n_rows == ActivationCache(whole).n_rows
        and alone.manifest["masked"] == ActivationCache(whole).manifest["masked"]
    )


@pytest.mark.parametrize(
    "damage",
    [
        [f"shards/r000-000003/{COLUMNS[2]}.safetensors"],
        [f"shards/r000-000002/{HOOKS[0]}.safetensors", f"shards/r000-000002/{COLUMNS[3]}.safetensors"],
        ["shards/r000-000004/index.safetensors", f"stats/{COLUMNS[2]}.safetensors"],
    ],
)
def test_damage_is_named_and_repaired_byte_for_byte(whole, tiny_lm, tmp_path, damage):
    folder = shutil.copytree(whole, tmp_path / "cache")
    for file in damage:
        alter(folder / file)
    with pytest.raises(CacheError) as told:
        ActivationCache(folder).verify()
    assert all(file.split("/")[-1] in str(told.value) for file in damage)
    assert repair(ActivationCache(folder), tiny_lm, load_texts(TEXTS), progress=False) == dict.fromkeys(damage, True)
    assert contents(folder) == contents(whole)


def test_int8_and_float16_store_gradients_within_their_error(whole, tiny_lm, tmp_path):
    """float16 has no room for small numbers: there gradients are bfloat16."""
    exact = ActivationCache(whole)
    for storage, dtype in (("int8", torch.int8), ("float16", torch.bfloat16)):
        cache = made(tiny_lm, tmp_path / storage, storage=storage)
        known = cache._read(0, f"{COLUMNS[2]}.safetensors")
        assert known["acts"].dtype == dtype
        stored, close = decode(known).float(), next(exact.shards(COLUMNS[2]))[0].float()
        assert 0 < float((stored - close).square().sum() / close.square().sum()) < 3e-4 or storage == "float16"
        if storage == "float16":
            assert torch.equal(stored, close) and cache.storage_error(COLUMNS[2]) is None
        else:
            error = cache.storage_error(COLUMNS[2])
            assert error is not None and 0 < error < 1e-3
        assert cache.storage_error(HOOKS[0]) is not None
        Info(cache.path).run()
        file = f"shards/r000-000003/{COLUMNS[2]}.safetensors"
        alter(cache.path / file)
        assert repair(cache, tiny_lm, load_texts(TEXTS), progress=False) == {file: True}


def test_the_space_of_the_gradients_is_counted(tiny_lm, tmp_path):
    plain = layout.estimate_bytes(32, CTX, dict.fromkeys(HOOKS, 32), 100)
    with pytest.raises(CacheError, match="more than max_bytes"):
        made(tiny_lm, tmp_path / "cache", max_bytes=plain)
    made(tiny_lm, tmp_path / "cache", max_bytes=plain, gradients=False)


# --- refusals


def test_a_cache_without_gradients_does_not_go_on_with_them(whole, tiny_lm):
    with pytest.raises(ValueError, match=r"gradients: sum of the next-token .* -> \(none\)"):
        made(tiny_lm, whole, gradients=False)


def test_a_hook_that_cannot_be_edited_is_refused_before_work_starts(tiny_lm, tmp_path):
    with pytest.raises(ValueError, match="the hooks of .* where gradients can be taken"):
        made(tiny_lm, tmp_path / "cache", hooks="blocks.0.attn.hook_q")
    assert not (tmp_path / "cache").exists()


def test_gradients_that_are_not_finite_stop_the_harvest_and_are_named(tiny_lm, tmp_path, monkeypatch):
    def broken(*given: Any) -> Any:
        found = activations_and_gradients(*given)
        found.gradients[HOOKS[1]][0, 3, 5] = torch.inf
        return found

    monkeypatch.setattr(forward_pass, "activations_and_gradients", broken)
    with pytest.raises(CacheError, match=r"1 of 128 rows at blocks.1.hook_mlp_out.gradient are NaN or infinite"):
        made(tiny_lm, tmp_path / "cache")


def test_contexts_are_run_a_few_at_a_time(tiny_lm, monkeypatch):
    ids = torch.randint(2, 300, (5, 12), generator=torch.Generator().manual_seed(0))
    all_at_once = activations_and_gradients(tiny_lm, ids, HOOKS).gradients
    sizes, logits = [], tiny_lm.backend.logits
    monkeypatch.setattr(tiny_lm.backend, "logits", lambda ids: sizes.append(len(ids)) or logits(ids))
    monkeypatch.setattr(loss_gradients, "MAX_LOGITS", 2 * 12 * tiny_lm.d_vocab)
    for hook, g in activations_and_gradients(tiny_lm, ids, HOOKS).gradients.items():
        torch.testing.assert_close(g, all_at_once[hook])
    assert sizes == [2, 2, 1]
