"""A harvest that several processes share, in blocks: whoever takes part, comes and goes, the bytes are the same."""

import json
import shutil
import threading

import pytest
import torch
from test_harvest import HOOKS, TEXTS, StandIn, contents, harvest, places

from saelab.activation_cache import blocks as blocks_module
from saelab.activation_cache import layout
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.repair import repair
from saelab.cli.cache_commands import Info, Stats
from saelab.errors import CacheError
from saelab.tokens import load_texts

BLOCKS = {"block_contexts": 32}  # 163 contexts: five blocks and a small one


pytestmark = pytest.mark.usefixtures("early_norm_rule")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By one process, undisturbed."""
    folder = tmp_path_factory.mktemp("blocks") / "alone"
    return harvest(StandIn(), folder, **BLOCKS)


def share(folder, models, **changes):
    """One thread for each model, at the same time; locks are between open files, so threads are as good as processes."""

    def take_part(lm):
        try:
            harvest(lm, folder, **BLOCKS, **changes)
        except KeyboardInterrupt:
            lm.stopped = True

    threads = [threading.Thread(target=take_part, args=(lm,)) for lm in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_cache_of_blocks_holds_what_any_cache_holds(alone, tmp_path, capsys):
    whole = harvest(StandIn(), tmp_path / "whole")
    assert torch.equal(places(alone).sort().values, places(whole).sort().values)
    for hook in HOOKS:
        stats, expected = alone.stats(hook), whole.stats(hook)
        assert stats["n"] == expected["n"] and stats["median_norm"] == expected["median_norm"]
        torch.testing.assert_close(stats["mean"], expected["mean"])
        for acts, index in alone.shards(hook):
            table = StandIn().rows(index["token"].long()[:, None], hook)[:, 0] + index["pos"][:, None] / 64
            assert torch.equal(acts, table.bfloat16())
    for name in ("n_rows", "n_sequences", "n_tokens", "n_documents", "masked", "padding", "max_norm"):
        assert alone.manifest[name] == whole.manifest[name], name
    for ours, theirs in zip(alone.tokens(), whole.tokens(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(alone.document_ids, whole.document_ids)
    added = {"format_version": 3, "block_contexts": 32}
    assert alone.manifest["config"] == whole.manifest["config"] | added
    alone.verify()
    Info(alone.path).run()
    Stats(alone.path).run()
    assert "163 of 16 tokens" in capsys.readouterr().out
    assert sum(len(x) for x, _ in zip(alone.batches(100, hook_name=HOOKS[0]), range(9), strict=False)) == 900


def test_a_block_keeps_to_itself(alone):
    for number, shard in enumerate(alone.manifest["shards"]):
        block = int(shard["folder"][len("shards/r") :].split("-")[0])
        assert set((alone.index(number)["seq"] // 32).tolist()) == {block}
    first = alone.index(0)["seq"]
    assert len(set(first.tolist())) > 8 and first.tolist() != sorted(first.tolist())  # and is shuffled


def test_many_at_once_leave_the_same_bytes(alone, tmp_path):
    models = [StandIn() for _ in range(3)]
    share(tmp_path, models)
    assert contents(tmp_path) == contents(alone.path)
    limits = 6  # batches that decide the limit on norms are run by one of them, and once more in their block
    assert sum(lm.batches_run for lm in models) == 41 + limits


@pytest.mark.parametrize("stops", [(12, 7, 20), (6, 30)], ids=str)
def test_they_may_come_and_go(alone, tmp_path, stops):
    models = [StandIn() for _ in stops]
    for lm, stop_at in zip(models, stops, strict=True):
        lm.stop_at = stop_at
    share(tmp_path, models)
    assert not (tmp_path / layout.MANIFEST).exists()
    before = {name: data for name, data in contents(tmp_path).items() if name.startswith("shards")}
    assert all(contents(alone.path)[name] == data for name, data in before.items())
    share(tmp_path, [StandIn()] if len(stops) == 3 else [StandIn() for _ in range(3)])
    assert contents(tmp_path) == contents(alone.path)


def test_a_block_that_was_left_behind_is_taken_over(alone, tmp_path):
    """One waits for the other's block, and does it when the other ends without it."""
    one, other, waiting = StandIn(), StandIn(), threading.Event()
    harvest(StandIn(), tmp_path, **BLOCKS)
    (tmp_path / layout.MANIFEST).unlink()
    (tmp_path / layout.block_journal(2)).unlink()
    stream = one.stream_activations

    def slow(batches, hook_names):
        for acts in stream(batches, hook_names):
            waiting.set()
            assert released.wait(20)
            yield acts

    released, one.stop_at = threading.Event(), 2
    one.stream_activations = slow
    first = threading.Thread(target=share, args=(tmp_path, [one]))
    first.start()
    assert waiting.wait(20)
    second = threading.Thread(target=share, args=(tmp_path, [other]))
    second.start()
    released.set()
    first.join()
    second.join()
    assert one.batches_run == 2 and other.batches_run == 8
    assert contents(tmp_path) == contents(alone.path)


def test_a_missing_block_is_seen(alone, tmp_path):
    folder = shutil.copytree(alone.path, tmp_path / "cache")
    journal = folder / layout.block_journal(3)
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(CacheError, match="block 3 of 6 in .* is missing: repeat"):
        blocks_module._entries(folder, 3, 6)
    (folder / layout.MANIFEST).unlink()
    with pytest.raises(CacheError, match="unfinished"):
        ActivationCache(folder)
    lost = folder / "shards" / "r004-000000" / "index.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CacheError, match="shard shards/r004-000000.* is missing"):
        harvest(StandIn(), folder, **BLOCKS)
    lost.write_bytes(content)
    harvest(StandIn(), folder, **BLOCKS)
    assert contents(folder) == contents(alone.path)


def test_in_order_blocks_change_no_row_and_no_place(tmp_path):
    plain = harvest(StandIn(), tmp_path / "plain", shuffle=False)
    cut = harvest(StandIn(), tmp_path / "cut", shuffle=False, **BLOCKS)
    assert torch.equal(places(cut), places(plain))
    batch = next(cut.batches(700, hook_name=HOOKS[0], shuffle=False))
    assert torch.equal(batch, next(plain.batches(700, hook_name=HOOKS[0], shuffle=False)))


def test_int8_columns_are_the_same_for_all(tmp_path):
    plain = harvest(StandIn(), tmp_path / "plain", storage="int8")
    cut = harvest(StandIn(), tmp_path / "cut", storage="int8", **BLOCKS)
    assert cut.manifest["storage"]["outliers"] == plain.manifest["storage"]["outliers"]
    assert cut.storage_error(HOOKS[0]) == pytest.approx(plain.storage_error(HOOKS[0]))


@pytest.mark.parametrize("lost", [["index.safetensors"], ["index.safetensors", f"{HOOKS[1]}.safetensors"]], ids=len)
def test_repair_knows_blocks(alone, tmp_path, lost):
    folder = shutil.copytree(alone.path, tmp_path / "cache")
    files = [f"shards/{name}/{file}" for name in ("r001-000002", "r005-000000") for file in lost]
    files += ["tokens/r002-000000.safetensors", f"shards/r000-000001/{HOOKS[0]}.safetensors"]
    for file in files:
        (folder / file).unlink()
    cache = ActivationCache(folder)
    assert repair(cache, StandIn(), load_texts(TEXTS), progress=False) == dict.fromkeys(files, True)
    assert contents(folder) == contents(alone.path)


def test_other_blocks_are_other_caches(tmp_path):
    lm = StandIn()
    lm.stop_at = 12
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, tmp_path, **BLOCKS)
    before = contents(tmp_path)
    for other, message in (({}, "block_contexts: 32 -> .none."), ({"block_contexts": 16}, "block_contexts: 32 -> 16")):
        with pytest.raises(ValueError, match=message):
            harvest(StandIn(), tmp_path, **other)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="block_contexts=6 must be a multiple of batch_size=4"):
        harvest(StandIn(), tmp_path / "new", block_contexts=6)


def test_texts_that_leave_nothing_leave_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="drops all 1 tokens"):
        harvest(StandIn(), tmp_path, texts=["a"], split="all", **BLOCKS)
    assert harvest(StandIn(), tmp_path, **BLOCKS).n_rows > 1000
    kinds = [json.loads(line)["kind"] for line in (tmp_path / layout.JOURNAL).read_text().splitlines()]
    assert kinds == ["start", "mask"]
