"""The cache on disk: shuffling through the pool, reading batches, noticing damage. No model here."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.activation_cache import layout, prefetch
from saelab.activation_cache.bench import read
from saelab.activation_cache.codec import identity
from saelab.activation_cache.journal import Journal
from saelab.activation_cache.manifest import Totals, contents
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.shuffle_buffer import ShuffleBuffer
from saelab.activation_cache.writer import CacheWriter
from saelab.errors import CacheError, SaelabError
from saelab.files import atomic_write_json
from saelab.tokens import TokenBatch

CTX, BATCH = 8, 4


def feature_acts_of(seq, pos):
    """Rows that tell where they come from (exact in bf16: whole numbers below 256)."""
    return torch.stack([seq % 256, seq // 256, pos, torch.ones_like(seq)], dim=-1).float()


def acts_by_hook(hooks, seq, pos):
    """The last number of a row tells the hook: 1 for the first."""
    x = feature_acts_of(seq, pos)
    return {hook: x + torch.tensor([0.0, 0, 0, i]) for i, hook in enumerate(hooks)}


def make_cache(folder, n_sequences=40, shard_rows=32, pool_shards=3, seed=0, hooks=("h",), storage="bfloat16"):
    folder.mkdir(exist_ok=True)
    config = {
        **identity(storage),
        "hooks": dict.fromkeys(hooks, 4),
        "ctx_len": CTX,
        "batch_size": BATCH,
        "n_tokens": n_sequences * CTX,
        "shard_rows": shard_rows,
        "pool_shards": pool_shards,
        "seed": seed,
        **{"model_hash": "m", "tokenizer_hash": "t", "texts_fingerprint": "f", "split": "all"},
        **{"prepend_bos": False, "mask_rule": {}},
    }
    journal = Journal(folder)
    writer, totals = CacheWriter(folder, journal, config), Totals()
    for first in range(0, n_sequences, BATCH):
        n = min(BATCH, n_sequences - first)
        seq, pos = torch.meshgrid(torch.arange(first, first + n), torch.arange(CTX), indexing="ij")
        batch = TokenBatch(seq * CTX + pos, seq.clone(), first)
        writer.add_tokens(batch)
        keep = pos > 0
        writer.add(batch, acts_by_hook(hooks, seq, pos), keep, {"position": n, "special": 0, "norm": 0})
        totals.add(batch)
    writer.flush()
    writer.close()
    medians = dict.fromkeys(hooks, 2.0)
    listed = contents(
        folder, config, journal.entries, totals, writer.counts, writer.storage, torch.arange(n_sequences), medians
    )
    known = {"config": config, "config_hash": layout.config_hash(config), "model_name": "m", "texts": {}}
    known["max_norm"] = dict.fromkeys(hooks, 10.0)
    manifest = {"format_version": config["format_version"], **known, **listed}
    atomic_write_json(folder / layout.MANIFEST, manifest)
    journal.close()
    return ActivationCache(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("caches") / "cache")


def rows_of(x):
    return Counter(map(tuple, x.float().tolist()))


def stored_rows(cache):
    return torch.cat([acts for acts, _ in cache.shards()])


# --- what is written


def test_pool_gives_out_what_it_got_each_row_once_and_reuses_slots():
    buffer = ShuffleBuffer(6)
    seen = Counter()
    generator = torch.Generator().manual_seed(0)
    for seq in range(20):
        index = torch.tensor([[seq, pos, 0] for pos in range(3)], dtype=torch.int32)
        buffer.add(index, {"h": {"acts": feature_acts_of(index[:, 0], index[:, 1])}})
        if seq % 2:
            drawn, acts = buffer.draw(6 if seq == 19 else len(buffer), generator)
            torch.testing.assert_close(acts["h"]["acts"], feature_acts_of(drawn[:, 0], drawn[:, 1]))
            seen.update(map(tuple, drawn.tolist()))
    assert len(buffer) == 0 and buffer.oldest_context is None
    assert seen == Counter((seq, pos, 0) for seq in range(20) for pos in range(3))


def test_every_row_is_stored_once_with_its_sequence_position_and_token(cache):
    ids, doc = cache.tokens()
    assert ids.shape == doc.shape == (40, CTX)
    places = Counter()
    for acts, index in cache.shards("h"):
        seq, pos = index["seq"].long(), index["pos"].long()
        assert acts.dtype == torch.bfloat16
        assert torch.equal(acts.float(), feature_acts_of(seq, pos))
        assert torch.equal(index["token"], ids[seq, pos])
        places.update(zip(seq.tolist(), pos.tolist(), strict=True))
    assert places == Counter((seq, pos) for seq in range(40) for pos in range(1, CTX))
    assert cache.n_rows == 40 * 7 == sum(shard["rows"] for shard in cache.manifest["shards"])
    assert cache.manifest["masked"] == {"position": 40, "special": 0, "norm": 0}
    assert cache.document_ids.tolist() == list(range(40))


def test_rows_are_shuffled_over_the_whole_pool_and_by_seed(tmp_path, cache):
    sizes = [len(acts) for acts, _ in cache.shards()]
    assert sizes[:-1] == [32] * (len(sizes) - 1)
    first = next(cache.shards())[1]["seq"]
    assert len(set(first.tolist())) > 8 and first.max() >= 8  # drawn from all 96 waiting rows, not the first 32
    assert first.tolist() != sorted(first.tolist())
    same = make_cache(tmp_path / "same")
    other = make_cache(tmp_path / "other", seed=1)
    assert torch.equal(stored_rows(same), stored_rows(cache))
    assert not torch.equal(stored_rows(other), stored_rows(cache))
    assert rows_of(stored_rows(other)) == rows_of(stored_rows(cache))


def test_two_hooks_share_one_order(tmp_path):
    cache = make_cache(tmp_path / "two", hooks=("a", "b"))
    for (a, _), (b, _) in zip(cache.shards("a"), cache.shards("b"), strict=True):
        assert torch.equal(a + torch.tensor([0, 0, 0, 1]), b)
    assert cache.hook_names == ["a", "b"]
    with pytest.raises(ValueError, match="hook_name=None is not in .*: it holds a, b"):
        cache.d_in()
    with pytest.raises(ValueError, match="'c' is not in"):
        cache.batches(4, hook_name="c")


def test_statistics_are_those_of_the_stored_rows(cache):
    x = stored_rows(cache).double()
    stats = cache.stats("h")
    torch.testing.assert_close(stats["mean"], x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats["second_moment"], x.square().mean(0), rtol=1e-12, atol=0)
    assert stats["mean_norm"] == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-7)
    assert stats["n"] == len(x) and stats["median_norm"] == 2.0
    assert stats["mean"].dtype == torch.float64


def test_packed_contexts_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "CONTEXTS_PER_FILE", 6)
    cache = make_cache(tmp_path / "cache", n_sequences=15)
    assert [known["sequences"] for known in cache.manifest["tokens"]] == [6, 6, 3]
    assert cache.tokens()[0].flatten().tolist() == list(range(15 * CTX))


def test_seeded_generators_depend_on_every_part():
    draws = {
        torch.rand(1, generator=layout.seeded("rows", *parts)).item() for parts in [(0, 1), (1, 0), (0, 10), (1, 1)]
    }
    assert len(draws) == 4


# --- batches


def take(batches, n):
    return [next(batches) for _ in range(n)]


@settings(deadline=None, max_examples=25)
@given(batch_size=st.integers(1, 300), start=st.integers(0, 12), seed=st.integers(0, 3))
def test_batches_are_a_pure_function_of_seed_and_step(cache, batch_size, start, seed):
    whole = cache.batches(batch_size, seed=seed)
    resumed = cache.batches(batch_size, seed=seed, start_step=start, prefetch=1)
    for a, b in zip(take(whole, start + 3)[start:], take(resumed, 3), strict=True):
        assert a.shape == (batch_size, 4) and a.dtype == torch.float32
        assert torch.equal(a, b)
    whole.close()
    resumed.close()


def test_each_epoch_gives_every_row_once_in_another_order(cache):
    stream = torch.cat(take(cache.batches(40), 3 * cache.n_rows // 40))
    epochs = stream.split(cache.n_rows)
    everything = rows_of(stored_rows(cache))
    assert len(epochs) == 3
    assert all(rows_of(epoch) == everything for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], stored_rows(cache).float())
    assert not torch.equal(epochs[0], torch.cat(take(cache.batches(40, seed=1), 7)))
    first_shard = rows_of(next(cache.shards())[0])
    assert any(rows_of(epoch[:32]) != first_shard for epoch in epochs)  # the order of shards changes too


def test_start_step_skips_whole_shards_without_reading_them(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_AHEAD", (4, 4))
    cache = make_cache(tmp_path / "cache")
    read = []
    load = cache._read
    cache._read = lambda shard, name: (read.append(shard), load(shard, name))[1]
    batches = cache.batches(32, start_step=7, prefetch=1)
    next(batches)
    batches.close()
    assert len(read) <= 7  # the batches ahead touch no more; with the 7 that are left out it would be 12 and more


@pytest.mark.parametrize("batch_size", [5, 33, 200])
def test_several_hooks_come_in_the_order_of_one(tmp_path, batch_size):
    cache = make_cache(tmp_path / "cache", hooks=("a", "b", "c"))
    hooks = ["c", "a"]
    alone = {hook: take(cache.batches(batch_size, 1, 2, hook), 6) for hook in hooks}
    for i, found in enumerate(take(cache.batches(batch_size, 1, 2, hook_name=hooks), 6)):
        assert list(found) == hooks
        for hook, x in found.items():
            assert torch.equal(x, alone[hook][i]) and x.dtype == torch.float32
        assert found["c"][:, 3].unique().tolist() == [3.0] and found["a"][:, 3].unique().tolist() == [1.0]


def test_only_the_hooks_asked_for_are_read_and_few_shards_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_AHEAD", (4, 4))
    cache = make_cache(tmp_path / "cache", hooks=("a", "b", "c"))
    read = []
    load = cache._read
    cache._read = lambda shard, name: (read.append(name), load(shard, name))[1]
    batches = cache.batches(32, hook_name=["b", "c"], prefetch=2)
    next(batches)
    batches.close()
    assert set(read) == {"b.safetensors", "c.safetensors"} and len(read) <= 2 * (
        2 + 5
    )  # prefetch, and the batches ahead
    with pytest.raises(ValueError, match="'d' is not in"):
        cache.batches(4, hook_name=["a", "d"])
    with pytest.raises(ValueError, match="names no hook"):
        cache.batches(4, hook_name=[])


def test_rows_can_be_had_as_they_are_stored(cache):
    stored, widened = (take(cache.batches(33, dtype=dtype), 12) for dtype in (torch.bfloat16, torch.float32))
    for a, b in zip(stored, widened, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a.float(), b)


def test_the_bench_reads_and_trains(cache, capsys):
    found = read.main(read.Settings(cache.path, batch_size=64, pairs=2, d_sae=16, k=2, steps=2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["op", "read", "train"]
    assert found.keys() == {"read", "train"} and min(found.values()) > 0


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"batch_size": 4, "start_step": -1}, {"batch_size": 4, "prefetch": 0}]
)
def test_bad_batch_arguments_are_refused_at_once(cache, arguments):
    with pytest.raises(ValueError, match="must be at least"):
        cache.batches(**arguments)


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_the_thread_ends_with_the_iterator(cache, how):
    batches = cache.batches(4)
    next(batches)
    assert any("saelab-cache-reader" in thread.name for thread in threading.enumerate())
    if how == "closed":
        batches.close()
    del batches
    for _ in range(100):
        if not any("saelab-cache-reader" in thread.name for thread in threading.enumerate()):
            return
        time.sleep(0.02)
    raise AssertionError("the reading thread lives on")


# --- damage


def test_an_iterator_forgotten_until_the_interpreter_ends_says_nothing(cache):
    code = (
        "import sys, concurrent.futures.thread as pool; from saelab.activation_cache.reader import ActivationCache\n"
        "pool.keep = ActivationCache(sys.argv[1]).batches(5); next(pool.keep)"  # is freed when half of pool is gone
    )
    run = subprocess.run([sys.executable, "-c", code, str(cache.path)], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", "bytes instead of"), ("altered", "does not contain what was written"), ("missing", "is missing")],
)
@pytest.mark.parametrize("file", ["h.safetensors", "index.safetensors"])
def test_a_damaged_shard_is_named(tmp_path, how, message, file):
    cache = make_cache(tmp_path / "cache")
    damage(tmp_path / "cache" / "shards" / "r000-000002" / file, how)
    with pytest.raises(CacheError, match=f"shard shards/r000-000002.*{message}"):
        cache.verify()
    with pytest.raises(CacheError, match=f"shard shards/r000-000002.*{message}"):
        list(cache.shards())
    if file == "h.safetensors":
        with pytest.raises(CacheError, match="r000-000002"):
            take(cache.batches(10), 30)


@pytest.mark.parametrize("part", ["tokens/seq-000000.safetensors", "stats/h.safetensors", "documents.safetensors"])
def test_damage_elsewhere_is_named_too(tmp_path, part):
    cache = make_cache(tmp_path / "cache")
    cache.verify()
    damage(tmp_path / "cache" / part, "altered")
    with pytest.raises(CacheError, match=part.split("/")[-1]):
        cache.verify()
    with pytest.raises(CacheError, match="altered"):
        print(cache.tokens(), cache.stats(), cache.document_ids)


def test_a_shard_altered_between_epochs_in_size_is_noticed(tmp_path):
    cache = make_cache(tmp_path / "cache")
    batches = cache.batches(cache.n_rows, prefetch=1)
    next(batches)
    path = tmp_path / "cache" / "shards" / "r000-000001" / "h.safetensors"
    shorter = Path(shutil.copy(path, tmp_path))
    damage(shorter, "truncated")
    shorter.replace(path)  # the batches that are ready keep the file they have mapped
    with pytest.raises(CacheError, match="r000-000001"):
        take(batches, 30)


def test_newer_foreign_and_unfinished_caches_are_refused(tmp_path):
    cache = make_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(json.dumps({**cache.manifest, "format_version": 99}))
    with pytest.raises(CacheError, match="cache format 99.*install a newer saelab"):
        ActivationCache(tmp_path / "cache")
    path.write_text("{}")
    with pytest.raises(CacheError, match="not the manifest of an activation cache"):
        ActivationCache(tmp_path / "cache")
    path.write_text("{")
    with pytest.raises(SaelabError, match="not valid JSON"):
        ActivationCache(tmp_path / "cache")
    path.unlink()
    with pytest.raises(CacheError, match="unfinished: repeat the same harvest call"):
        ActivationCache(tmp_path / "cache")
    with pytest.raises(CacheError, match="holds no finished activation cache; harvest one there first"):
        ActivationCache(tmp_path)


# --- journal and sizes


def test_journal_drops_a_half_written_line_and_refuses_an_altered_one(tmp_path):
    journal = Journal(tmp_path)
    journal.append({"kind": "start", "n": 1})
    journal.append({"kind": "shard", "n": 2})
    journal.close()
    whole = journal.path.read_bytes()
    for torn in (whole[-10:], b'{"kind": "sh', b"\x00\x00\n"):
        journal.path.write_bytes(whole + torn)
        again = Journal(tmp_path)
        assert [entry["n"] for entry in again.entries] == [1, 2]
        again.close()
        assert journal.path.read_bytes() == whole
    journal.path.write_bytes(b'{"kind": "]\n' + whole)
    with pytest.raises(CacheError, match="line 1 was altered"):
        Journal(tmp_path)


def test_a_full_disk_leaves_the_journal_whole(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.append({"kind": "start"})
    before = journal.path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaelabError, match="disk is full"):
            journal.append({"kind": "shard"})
    assert journal.path.read_bytes() == before and len(journal.entries) == 1
    journal.close()


def test_one_process_at_a_time(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(CacheError, match="another process is harvesting"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_estimate_is_close_above_the_real_size(tmp_path):
    cache = make_cache(tmp_path / "cache", n_sequences=200, shard_rows=512, hooks=("a", "b"))
    files = [path for path in (tmp_path / "cache").rglob("*.safetensors") if "documents" not in path.name]
    real = sum(path.stat().st_size for path in files)
    estimate = layout.estimate_bytes(200, CTX, cache.manifest["config"]["hooks"], 512)
    assert real < estimate < 2 * real


@pytest.mark.parametrize(("n", "text"), [(0, "0 bytes"), (999, "999 bytes"), (288e6, "288.0 MB"), (2.5e12, "2.5 TB")])
def test_human_bytes(n, text):
    assert layout.human_bytes(n) == text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(shards=[]), "says 280 rows, but its 0 shards hold 0"),
        (lambda m: m.update(shards=[], n_rows=0), "says 0 rows"),
        (lambda m: m.update(n_rows=100), "says 100 rows, but its . shards hold 280"),
        (lambda m: m.pop("stats"), "'stats'"),
        (lambda m: m.pop("config_hash"), "'config_hash'"),
        (lambda m: m["config"]["hooks"].update(h=16), "its config is not the one"),
        (lambda m: m["shards"][0]["files"].pop("h.safetensors"), r"'h\.safetensors'"),
        (lambda m: m.update(shards=[1]), "TypeError"),
    ],
)
def test_an_altered_manifest_is_refused(tmp_path, change, says):
    make_cache(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=says):
        ActivationCache(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"entry": "my diary"}\n', "my diary", '{"kind": "start"}\n{"a": 1}\n', '{"kind": "start"}\n[1]\n{}\n']
)
def test_a_foreign_or_altered_journal_is_refused_and_unharmed(tmp_path, content):
    (tmp_path / "journal.jsonl").write_text(content)
    with pytest.raises(CacheError, match="not the journal|was altered"):
        Journal(tmp_path)
    assert (tmp_path / "journal.jsonl").read_text() == content
