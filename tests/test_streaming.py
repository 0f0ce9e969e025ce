"""Streaming: the rows of the cache that a harvest would make, at any step the same, and trained on as from a cache."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from tiny_runs import HOOK, WORDS, write_texts
from tiny_saes import interrupt_before

from saelab.activation_cache.harvest import harvest
from saelab.activation_cache.streaming import ActivationStream, stream
from saelab.cli import main
from saelab.errors import CacheError
from saelab.evaluation import evaluate
from saelab.interop import load_sae
from saelab.models import load_model
from saelab.saes import CrosscoderConfig, TopKConfig, TranscoderConfig
from saelab.tokens import document_id, is_held_out
from saelab.training import TrainConfig, train

TWO = [HOOK, "blocks.1.hook_mlp_out"]
SIZES: dict[str, Any] = {"ctx_len": 32, "batch_size": 4, "shard_rows": 300, "pool_shards": 3}
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 20)) + f" {i}." for i in range(60)]
CONFIG = TrainConfig(n_tokens=100 * 20, batch_size=100, warmup_steps=5, checkpoint_every=5, log_every=10)


@pytest.fixture(scope="module")
def streamed(tiny_lm) -> ActivationStream:
    return stream(tiny_lm, TEXTS, TWO, **SIZES)


def taken(source: ActivationStream, n: int, start_step: int = 0, batch_size: int = 100, **options: Any) -> list[Any]:
    return list(itertools.islice(source.batches(batch_size, 5, start_step, **options), n))


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[hook], b[hook]) for hook in a) for a, b in pairs)


@pytest.fixture(scope="module")
def epoch(tmp_path_factory, tiny_lm):
    """All rows of both hooks in the order of a cache's shards."""
    folder = tmp_path_factory.mktemp("streaming") / "cache"
    cache = harvest(tiny_lm, TEXTS, TWO, 10**6, folder, seed=5, progress=False, **SIZES)
    assert cache.manifest["masked"]["norm"] == 0
    return {hook: torch.cat([x.float() for x, _ in cache.shards(hook)]) for hook in TWO}


def test_an_epoch_is_what_a_cache_would_hold_in_the_order_of_its_shards(streamed, epoch):
    n_rows = len(epoch[HOOK])
    batches = taken(streamed, 2 * n_rows // 100)
    rows = {hook: torch.cat([batch[hook] for batch in batches]) for hook in TWO}
    for hook in TWO:
        assert rows[hook].dtype == torch.float32
        assert torch.equal(rows[hook][:n_rows], epoch[hook])
    again = rows[HOOK][n_rows : 2 * n_rows]
    assert not torch.equal(again[:100], epoch[HOOK][:100])
    whole = taken(streamed, 2, batch_size=n_rows, hook_name=[HOOK])[1][HOOK]  # the second epoch alone
    assert torch.equal(whole[: len(again)], again)
    assert torch.equal(whole.sort(0).values, epoch[HOOK].sort(0).values)


def test_any_step_can_be_the_first_and_runs_only_what_the_pool_holds(streamed, epoch, monkeypatch):
    per_epoch = len(epoch[HOOK]) / 100
    last = math.ceil(3.4 * per_epoch)
    reference = taken(streamed, last + 2)
    real, seen = type(streamed.lm).stream_activations, []
    n_contexts = sum(len(batch.ids) for batch in streamed._contexts())

    def counted(self, batches, hooks):
        for ids in batches:
            seen.append(len(ids))
            yield from real(self, [ids], hooks)

    for start in (1, math.floor(per_epoch), math.ceil(per_epoch), last):
        fresh = stream(streamed.lm, TEXTS, TWO, **SIZES)
        with monkeypatch.context() as patch:
            assert fresh.stats(HOOK)["n"] > 0
            fresh._beginning[1].clear()  # as of texts that are longer than the norm rule's rows
            patch.setattr(type(streamed.lm), "stream_activations", counted)
            seen.clear()
            assert same(taken(fresh, 2, start), reference[start : start + 2]), start
        assert 0 < sum(seen) < n_contexts, start
        assert len(fresh.document_ids) == len(streamed.document_ids) or start < per_epoch


@pytest.fixture(scope="module")
def loud_lm(tiny_folder):
    """The tiny model with one token whose rows are giant."""
    lm = load_model(tiny_folder, dtype=torch.float32, device="cpu")
    loud = lm.tokenizer.encode(" river")[0]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[loud] *= 300
    return lm


def test_rows_over_the_limit_never_come_and_the_order_is_kept(loud_lm):
    source = stream(loud_lm, TEXTS, [HOOK], **SIZES)
    limit = source.origin(HOOK)["mask"]["max_norm"]
    batches = taken(source, 40)
    assert all(float(batch[HOOK].norm(dim=1).max()) <= 1.01 * limit for batch in batches)  # bfloat16 may round up
    indices = [rows[0] for rows in source._beginning[1].values()]
    dropped = sum(int((index[:, 2] < 0).sum()) for index in indices)
    assert 0 < dropped < sum(map(len, indices)) / 5
    assert same(taken(stream(loud_lm, TEXTS, [HOOK], **SIZES), 3, 33), batches[33:36])


def test_a_stand_in_is_the_kept_row_before():
    from saelab.activation_cache.streaming import _replacement_rows

    index = torch.tensor([[0, p, token] for p, token in enumerate([-1, -1, 7, 8, -1, -1, 9])])
    assert _replacement_rows(index).tolist() == [2, 2, 2, 3, 3, 3, 6]
    with pytest.raises(CacheError, match="drops all 2 rows"):
        _replacement_rows(index[:2])


def test_statistics_and_origin_are_those_of_a_cache(streamed, epoch, tmp_path, tiny_lm):
    stats = streamed.stats(HOOK)
    assert stats["n"] == len(epoch[HOOK])
    torch.testing.assert_close(stats["mean"], epoch[HOOK].double().mean(0))
    torch.testing.assert_close(stats["second_moment"], epoch[HOOK].double().square().mean(0))
    cache = harvest(tiny_lm, TEXTS, TWO, 10**6, tmp_path / "cache", progress=False, **SIZES)
    assert streamed.origin(HOOK) == cache.origin(HOOK)
    assert same(taken(streamed, 1), taken(streamed, 1))
    taken(streamed, 40)
    assert torch.equal(streamed.document_ids, cache.document_ids)


@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(48, 4),
        CrosscoderConfig(48, 4, hook_names=tuple(TWO)),
        TranscoderConfig(48, 4, hook_name_out=TWO[1]),
    ],
    ids=["topk", "crosscoder", "transcoder"],
)
def test_training_on_a_stream_goes_on_bit_for_bit(tmp_path, monkeypatch, streamed, config):
    hook = HOOK if not isinstance(config, CrosscoderConfig) else None
    whole = train(config, streamed, CONFIG, tmp_path / "whole", hook_name=hook, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_before(13, patch)
        train(config, streamed, CONFIG, tmp_path / "cut", hook_name=hook, progress=False)
    fresh = stream(streamed.lm, TEXTS, TWO, **SIZES)
    assert train(config, fresh, CONFIG, tmp_path / "cut", hook_name=hook, progress=False).hash == whole.hash
    for name in ("sae.safetensors", "golden.safetensors", "sae.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_only_documents_that_were_read_count_as_seen(tiny_lm, tmp_path):
    short = TrainConfig(n_tokens=100, batch_size=100)
    many = [*TEXTS, *(f"{text} And on." for text in TEXTS * 3)]
    sae = train(TopKConfig(48, 4), stream(tiny_lm, many, HOOK, **SIZES), short, tmp_path / "sae", progress=False)
    seen = set(sae.provenance.train_documents.tolist())
    training = [document_id(text) for text in many if not is_held_out(text)]
    assert set(training[:5]) < seen < set(training)
    assert load_sae(tmp_path / "sae").provenance.train_documents.tolist() == sae.provenance.train_documents.tolist()
    with pytest.raises(ValueError, match="used to train this SAE"):
        evaluate(sae, tiny_lm, many, split="train", progress=False)
    assert evaluate(sae, tiny_lm, many, split="held_out", n_tokens=200, n_tokens_ce=64, progress=False).n_tokens > 0


def test_another_stream_in_the_folder_is_refused(tmp_path, tiny_lm, streamed):
    once = TrainConfig(n_tokens=100, batch_size=100)
    train(TopKConfig(48, 4), streamed, once, tmp_path / "sae", hook_name=HOOK, progress=False)
    sizes: dict[str, Any] = SIZES | {"pool_shards": 2}
    other = stream(tiny_lm, TEXTS, TWO, **sizes)
    with pytest.raises(Exception, match=r"different arguments \(data: stream "):
        train(TopKConfig(48, 4), other, once, tmp_path / "sae", hook_name=HOOK, progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hook_names": "blocks.9.hook_resid_post"}, "blocks.9"),
        ({"pool_shards": 0}, "pool_shards=0 must be at least 1"),
        ({"split": "test"}, "split='test'"),
        ({"texts": ["?"]}, "The mask drops every token|no document"),
    ],
    ids=["hook", "pool", "split", "no row"],
)
def test_what_cannot_be_streamed_is_named(tiny_lm, change, says):
    arguments: dict[str, Any] = {"texts": TEXTS, "hook_names": HOOK} | SIZES | change
    with pytest.raises(ValueError, match=says), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of the one text, none is held out
        stream(tiny_lm, **arguments).stats(HOOK)


def test_a_steered_model_and_infinite_rows_are_refused(tiny_folder, streamed):
    from saelab.steering import Direction

    with streamed.lm.steer(Direction(torch.ones(32), HOOK) * 1.0), pytest.raises(ValueError, match="is being steered"):
        stream(streamed.lm, TEXTS, HOOK, **SIZES)
    lm = load_model(tiny_folder, dtype=torch.float32, device="cpu")
    source = stream(lm, TEXTS, HOOK, **SIZES)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer.encode(" river")[0]] = math.inf
    with pytest.raises(CacheError, match=rf"at {HOOK} are NaN or infinite.*last training checkpoint is intact"):
        train(TopKConfig(48, 4), source, CONFIG, progress=False)


def test_the_command_trains_without_a_cache_and_eval_needs_no_flag(tmp_path, tiny_folder, capsys):
    run = tmp_path / "run"
    texts = write_texts(tmp_path / "texts.jsonl")
    source = ["--stream", HOOK, "--model", str(tiny_folder), "--dtype", "float32", "--texts", str(texts)]
    words = ["train", str(run), "--d-sae", "48", "--k", "4", "--n-tokens", "1_000", "--batch-size", "200"]
    assert main.main([*words, *source, "--ctx-len", "64"]) == 0
    assert {path.name for path in run.iterdir()} == {"sae"}
    capsys.readouterr()
    assert main.main(["eval", str(run), "--json", "--dtype", "float32", "--n-tokens", "200"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["split"], report["hook_name"], report["request"]["texts"]["own"]) == ("held_out", HOOK, True)
    assert main.main(words) == 2
    assert "holds no cache" in capsys.readouterr().err
    assert main.main([*words, *source, "--ctx-len", "32"]) == 2
    assert "different arguments (data: stream" in capsys.readouterr().err
