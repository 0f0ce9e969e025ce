"""From texts to a cache: right rows, right counts, exact resume, clean refusals."""

import errno
import json
import logging
import re
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import saelab
from saelab.activation_cache import harvest as harvest_module
from saelab.activation_cache import layout
from saelab.activation_cache.reader import ActivationCache
from saelab.cli.messages import shown
from saelab.errors import CacheError, SaelabError
from saelab.models.language_model import LanguageModel
from saelab.tokens import document_id, is_held_out

EOS = 1
TEXTS = [f"{'abcdefgh'[i % 8 :]} document number {i} " * (i % 5 + 1) for i in range(120)]
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


class Letters:
    eos_token_id, bos_token_id = EOS, 0

    def __call__(self, texts, **_):
        return {"input_ids": [[min(ord(letter), 129) for letter in text] for text in texts]}


class StandIn(LanguageModel):
    """A model whose activations are a table by token and position: nothing to load, every row can be checked."""

    name, max_ctx = "stand-in", 64
    bos_id: int = 0  # pyright: ignore[reportAssignmentType]
    eos_id: int = EOS  # pyright: ignore[reportAssignmentType]
    special_ids: tuple[int, ...] = (0, EOS)  # pyright: ignore[reportAssignmentType]
    config_hash: str = "c" * 64  # pyright: ignore[reportAssignmentType]
    logits_probe: list[float] = []  # pyright: ignore[reportAssignmentType]
    hash: str = "m" * 64  # pyright: ignore[reportAssignmentType]
    tokenizer_hash: str = "t" * 64  # pyright: ignore[reportAssignmentType]
    tokenizer_files: str = ""  # pyright: ignore[reportAssignmentType]
    dtype, device = torch.float32, torch.device("cpu")
    edits = ()  # pyright: ignore[reportAssignmentType]
    tokenizer = Letters()

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(len(HOOKS), 130, 12, generator=generator)
        self.batches_run = 0
        self.stop_at: int | None = None
        self.nan_at: int | None = None

    @property
    def hook_names(self):
        return HOOKS

    def check_hook(self, hook_name):
        if hook_name not in HOOKS:
            raise ValueError(f"no hook {hook_name}; there are {HOOKS}")

    def d_in(self, hook_name):
        return 12

    def rows(self, ids, hook_name):
        return self.table[HOOKS.index(hook_name), ids] + torch.arange(ids.shape[-1])[:, None] / 64

    def stream_activations(self, batches, hook_names):
        for ids in batches:
            if self.batches_run == self.stop_at:
                raise KeyboardInterrupt
            acts = {hook: self.rows(ids, hook) for hook in hook_names}
            if self.batches_run == self.nan_at:
                acts[hook_names[-1]][1, 2, 3] = float("nan")
            self.batches_run += 1
            yield acts


@pytest.fixture(autouse=True, scope="module")
def _early_norm_rule():
    """Shards are written only once the limit on norms is known: after 300 rows here, not 16,384."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saelab.tokens.mask.NORM_RULE_ROWS", 300)
        yield


@pytest.fixture
def lm():
    return StandIn()


ARGUMENTS = dict(
    hook_names=HOOKS, n_tokens=2600, ctx_len=16, batch_size=4, shard_rows=128, pool_shards=3, progress=False
)


def harvest(lm, out_dir, texts=TEXTS, **changes):
    return saelab.harvest(lm, texts, out_dir=out_dir, **{**ARGUMENTS, **changes})


def journaled_shards(folder):
    entries = map(json.loads, (folder / layout.JOURNAL).read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == "shard"]


def contents(folder):
    """Bytes of every file that an undisturbed run would have, the journal aside (it holds times)."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in Path(folder).rglob("*")
        if p.suffix in (".safetensors", ".json")
    }


# --- right rows


def test_rows_are_a_fresh_forward_pass_of_a_real_model(tiny_lm, tmp_path):
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"]
    cache = saelab.harvest(
        tiny_lm,
        "demo",
        hooks,
        1500,
        tmp_path / "c",
        ctx_len=32,
        batch_size=8,
        shard_rows=200,
        pool_shards=2,
        progress=False,
    )
    ids, _ = cache.tokens()
    assert ids.shape == (47, 32)  # 1500 tokens, rounded up to whole contexts
    for hook in hooks:
        fresh = torch.cat(
            [acts[hook] for acts in tiny_lm.stream_activations(iter(ids.long().split(8)), [hook])]
        ).bfloat16()
        n = 0
        for acts, index in cache.shards(hook):
            assert torch.equal(acts, fresh[index["seq"].long(), index["pos"].long()])
            n += len(acts)
        assert n == cache.n_rows > 1000


def test_masks_counts_documents_and_split(lm, tmp_path, capsys):
    cache = harvest(lm, tmp_path / "c")
    ids, doc = cache.tokens()
    manifest = cache.manifest
    assert manifest["n_sequences"] == len(ids) == 163 and manifest["n_tokens"] == 163 * 16 and manifest["padding"] == 0
    inner = ids[:, 1:]
    assert manifest["masked"] == {"position": 163, "special": int((inner == EOS).sum()), "norm": 0}
    assert cache.n_rows == 163 * 16 - sum(manifest["masked"].values())
    for _, index in cache.shards(HOOKS[0]):
        assert (index["pos"] > 0).all() and not (index["token"] == EOS).any()
    used = [text for text in TEXTS if not is_held_out(text)][: int(doc.max()) + 1]
    assert cache.document_ids.tolist() == [document_id(text) for text in used]
    assert 10 < len(used) < len(TEXTS) and manifest["n_documents"] == len(used)
    printed = capsys.readouterr().out
    assert "split 'train'" in printed and "will take up to" in printed and f"{cache.n_rows:,} rows" in printed


def test_held_out_split_and_the_notice_when_texts_run_out(lm, tmp_path, capsys):
    cache = harvest(lm, tmp_path / "c", split="held_out", n_tokens=10**6)
    used = [text for text in TEXTS if is_held_out(text)]
    assert cache.document_ids.tolist() == [document_id(text) for text in used]
    real = sum(map(len, used)) + len(used) - 1
    assert cache.manifest["n_tokens"] == real and cache.manifest["padding"] == -real % 16
    assert f"only {real:,} of the 1,000,000 tokens" in capsys.readouterr().out
    assert cache.origin(HOOKS[0])["split"] == "held_out"


def test_origin_says_all_an_sae_has_to_keep(lm, tmp_path):
    origin = json.loads(json.dumps(harvest(lm, tmp_path / "c", "demo", n_tokens=320).origin(HOOKS[1])))
    assert origin["hook_name"] == HOOKS[1] and origin["model"] == {"name": "stand-in", "hash": "m" * 64}
    assert origin["texts"] == {"source": "demo", "column": "text"}
    assert origin["dataset_fingerprint"] == saelab.load_texts("demo").fingerprint()
    assert origin["ctx_len"] == 16 and origin["prepend_bos"] is False and origin["tokenizer_hash"] == "t" * 64
    assert origin["mask"]["max_norm"] > 0 and origin["mask"]["rule"]["norm_factor"] == 5


def test_the_norm_rule_is_fixed_by_the_first_rows_and_drops_rows_at_every_hook(lm, tmp_path):
    lm.table[1, ord("7")] *= 1000
    cache = harvest(lm, tmp_path / "c")
    ids, _ = cache.tokens()
    assert cache.manifest["masked"]["norm"] == int((ids[:, 1:] == ord("7")).sum()) > 3
    for hook in HOOKS:
        kept = torch.cat([index["token"] for _, index in cache.shards(hook)])
        assert not (kept == ord("7")).any()
    first = [acts for i, acts in zip(range(12), lm.stream_activations(ids.long().split(4), HOOKS), strict=False)]
    allowed = (ids[:48, :] != EOS) & (torch.arange(16) > 0)
    for hook in HOOKS:
        norms = torch.cat([acts[hook] for acts in first]).norm(dim=-1)[allowed][:300]
        assert cache.stats(hook)["median_norm"] == pytest.approx(norms.median().item(), rel=1e-6)
        assert cache.origin(hook)["mask"]["max_norm"] == pytest.approx(5 * norms.median().item(), rel=1e-6)


def test_no_forward_pass_is_wasted(lm, tmp_path):
    harvest(lm, tmp_path / "c")
    assert lm.batches_run == 41
    harvest(lm, tmp_path / "c")
    assert lm.batches_run == 41  # finished: returns at once


def test_prepend_bos(lm, tmp_path):
    cache = harvest(lm, tmp_path / "c", prepend_bos=True)
    assert (cache.tokens()[0][:, 0] == 0).all() and cache.origin(HOOKS[0])["prepend_bos"] is True


# --- interrupt and resume


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvests") / "undisturbed"
    harvest(StandIn(), folder)
    return contents(folder)


@pytest.mark.parametrize("stop_at", [0, 1, 6, 7, 8, 23, 40])
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(undisturbed, tmp_path, stop_at):
    lm = StandIn()
    lm.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt) as stopped:
        harvest(lm, tmp_path)
    shards = len(list(tmp_path.glob("shards/*")))
    assert shards == 0 if stop_at < 7 else shards > 0
    nothing = r"No activations are on disk yet \(the first 384 .*will start again"
    assert re.match(rf"{128 * shards:,} activations are in " if shards else nothing, str(stopped.value))
    before = contents(tmp_path)
    assert all(undisturbed[name] == data for name, data in before.items())
    with pytest.raises(CacheError, match="unfinished"):
        ActivationCache(tmp_path)
    lm.stop_at = None
    harvest(lm, tmp_path).verify()
    assert contents(tmp_path) == undisturbed


def test_killed_many_times_with_half_written_files_about(undisturbed, tmp_path):
    for stop_at in (9, 17, 26, 35):
        lm = StandIn()
        lm.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            harvest(lm, tmp_path)
        journal = tmp_path / layout.JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])  # the last shard's line is torn
        (tmp_path / "shards" / "r000-000001" / ".index.safetensors.tmp-1").write_bytes(b"half")
    harvest(StandIn(), tmp_path)
    assert contents(tmp_path) == undisturbed
    assert not list(tmp_path.rglob(".*.tmp-*"))


def test_interrupted_between_the_shards_of_the_end(undisturbed, tmp_path, monkeypatch):
    harvest(StandIn(), tmp_path)
    journal = (tmp_path / layout.JOURNAL).read_bytes().splitlines(keepends=True)
    shards = [i for i, line in enumerate(journal) if b'"kind": "shard"' in line]
    for keep in shards[-3:]:
        (tmp_path / layout.MANIFEST).unlink()
        (tmp_path / layout.JOURNAL).write_bytes(b"".join(journal[: keep + 1]))
        harvest(StandIn(), tmp_path)
        assert contents(tmp_path) == undisturbed


def test_resume_with_shards_smaller_than_a_batch(tmp_path):
    sizes = dict(shard_rows=20, pool_shards=2, n_tokens=800)
    harvest(StandIn(), tmp_path / "a", **sizes)
    harvest(StandIn(), tmp_path / "b", **sizes)
    (tmp_path / "b" / layout.MANIFEST).unlink()
    journal = (tmp_path / "b" / layout.JOURNAL).read_bytes().splitlines(keepends=True)
    cursors = [json.loads(line).get("cursor") for line in journal]
    keep = next(i for i in range(len(journal) - 1, 0, -1) if cursors[i] == cursors[i - 1] and cursors[i] < 50)
    (tmp_path / "b" / layout.JOURNAL).write_bytes(b"".join(journal[:keep]))  # between two shards of one batch
    harvest(StandIn(), tmp_path / "b", **sizes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_resume_repeats_only_what_the_pool_needs(undisturbed, tmp_path):
    lm = StandIn()
    lm.stop_at = 38
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, tmp_path)
    oldest = journaled_shards(tmp_path)[-1]["oldest"]
    again = StandIn()
    harvest(again, tmp_path)
    assert oldest > 8
    assert again.batches_run == 41 - oldest // 4


def test_a_full_disk_stops_cleanly_and_the_same_call_goes_on(undisturbed, tmp_path, monkeypatch):
    import safetensors.torch as real

    calls = {"left": 14}
    save_file = real.save_file

    def full(tensors, path, metadata=None):
        calls["left"] -= 1
        if calls["left"] < 0:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(real, "save_file", full)
        with pytest.raises(SaelabError, match="disk is full while writing .*r000-00000.*repeat the same call"):
            harvest(StandIn(), tmp_path)
    assert not list(tmp_path.rglob(".*.tmp-*"))
    before = contents(tmp_path)
    assert sum("shards" in name for name in before) == 14
    assert all(undisturbed[name] == data for name, data in before.items())
    assert len(journaled_shards(tmp_path)) == 4  # three files each: the fifth shard is not there
    harvest(StandIn(), tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_real_file_size_limit_stops_it_the_same_way(undisturbed, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        with pytest.raises(SaelabError, match="disk is full while writing"):
            harvest(StandIn(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob(".*.tmp-*"))
    harvest(StandIn(), tmp_path)
    assert contents(tmp_path) == undisturbed


def test_resume_elsewhere_warns(tmp_path, monkeypatch):
    lm = StandIn()
    lm.stop_at = 20
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, tmp_path)
    environment = harvest_module._environment(lm)
    monkeypatch.setattr(harvest_module, "_environment", lambda lm: {**environment, "threads": 77})
    with pytest.warns(UserWarning, match=r"begun in another environment \(threads: \d+ -> 77\)"):
        harvest(StandIn(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        harvest(StandIn(), tmp_path)  # finished: nothing to warn about


def test_a_damaged_shard_stops_a_resume(tmp_path):
    lm = StandIn()
    lm.stop_at = 20
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, tmp_path)
    path = tmp_path / "shards" / "r000-000000" / f"{HOOKS[0]}.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CacheError, match="shard shards/r000-000000.*truncated or altered"):
        harvest(StandIn(), tmp_path)


# --- in the order of the texts


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvests") / "ordered"
    return harvest(StandIn(), folder, shuffle=False)


def places(cache):
    """Sequence and position of every row as one number, in stored order."""
    each = [cache.index(i) for i in range(len(cache.manifest["shards"]))]
    return torch.cat([index["seq"].long() * 16 + index["pos"] for index in each])


def test_without_shuffle_rows_keep_the_order_of_the_texts(ordered, tmp_path):
    shuffled = harvest(StandIn(), tmp_path / "shuffled")
    assert torch.equal(places(ordered), places(shuffled).sort().values)
    assert not torch.equal(places(ordered), places(shuffled))
    assert ordered.manifest["masked"] == shuffled.manifest["masked"]
    config = shuffled.manifest["config"]
    assert ordered.manifest["config"] == config | {"shuffle": False, "pool_shards": 1, "format_version": 3}
    for acts, index in ordered.shards(HOOKS[0]):
        table = StandIn().table[0, index["token"].long()] + index["pos"][:, None] / 64
        assert torch.equal(acts, table.bfloat16())


def test_batches_in_stored_order(ordered):
    rows = torch.cat([acts for acts, _ in ordered.shards(HOOKS[0])]).float()
    batches = ordered.batches(100, hook_name=HOOKS, shuffle=False)
    read = torch.cat([next(batches)[HOOKS[0]] for _ in range(-(-len(rows) // 100) + 1)])
    assert torch.equal(read[: len(rows)], rows) and torch.equal(read[len(rows) :], rows[: len(read) - len(rows)])
    later = next(ordered.batches(100, start_step=7, hook_name=HOOKS[0], shuffle=False))
    assert torch.equal(later, rows[700:800])


@pytest.mark.parametrize("stop_at", [1, 9, 23, 40])
def test_without_shuffle_an_interrupted_harvest_goes_on_to_the_same_bytes(ordered, tmp_path, stop_at):
    lm = StandIn()
    lm.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, tmp_path, shuffle=False)
    shards = len(journaled_shards(tmp_path))
    assert shards == 0 if stop_at < 5 else shards >= (stop_at - 5) // 3  # one shard waits in memory, no more
    harvest(StandIn(), tmp_path, shuffle=False).verify()
    assert contents(tmp_path) == contents(ordered.path)
    with pytest.raises(ValueError, match="shuffle: False -> .none."):
        harvest(StandIn(), tmp_path)


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"ctx_len": 8}, "ctx_len: 16 -> 8"),
        ({"hook_names": HOOKS[:1]}, "not blocks.0.hook_resid_post: harvest those into another RUN"),
        ({"split": "all"}, "split: train -> all"),
        ({"texts": TEXTS[:-1]}, "texts_fingerprint: "),
    ],
)
def test_other_arguments_are_refused_with_both_values_and_nothing_changes(
    tmp_path_factory, undisturbed, change, message
):
    folder = tmp_path_factory.mktemp("harvest")
    for name, data in undisturbed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    config = json.loads(undisturbed[layout.MANIFEST])["config"]
    (folder / layout.JOURNAL).write_text(json.dumps({"kind": "start", "config": config, "environment": {}}) + "\n")
    with pytest.raises(ValueError, match=message):
        harvest(StandIn(), folder, **change)
    assert contents(folder) == undisturbed
    assert ActivationCache(folder).n_rows


def test_texts_without_a_held_out_document_warn(lm, tmp_path):
    texts = [text for text in TEXTS if not is_held_out(text)]
    with pytest.warns(UserWarning, match=r"no held-out document .*eval --texts"):
        harvest(lm, tmp_path / "train", texts)
    harvest(lm, tmp_path / "all", texts, split="all")


def test_another_model_is_refused(lm, tmp_path):
    harvest(lm, tmp_path)
    lm.hash = "n" * 64
    with pytest.raises(ValueError, match="model_hash: mmm.* -> nnn"):
        harvest(lm, tmp_path)


def test_a_folder_of_something_else_is_refused(lm, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="already holds something else \\(thesis.tex\\)"):
        harvest(lm, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_nan_stops_with_batch_and_hook_and_what_is_written_stays(undisturbed, lm, tmp_path):
    lm.nan_at = 20
    with pytest.raises(
        CacheError, match=r"batch 20 \(contexts 80 to 83\): 1 of 64 rows at blocks.1.hook_resid_post are NaN"
    ):
        harvest(lm, tmp_path)
    before = contents(tmp_path)
    assert before and all(undisturbed[name] == data for name, data in before.items())
    harvest(StandIn(), tmp_path)
    assert contents(tmp_path) == undisturbed


def test_it_must_fit(lm, tmp_path, monkeypatch):
    with pytest.raises(CacheError, match=r"more than max_bytes=1000 \(1.0 KB\): lower n_tokens"):
        harvest(lm, tmp_path, max_bytes=1000)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
        with pytest.raises(CacheError, match=r"has 5.0 KB free: make room"):
            harvest(lm, tmp_path)
    assert lm.batches_run == 0
    harvest(lm, tmp_path, max_bytes=10**6)


def test_a_text_of_one_token_leaves_nothing_and_the_folder_stays_free(lm, tmp_path):
    with pytest.raises(ValueError, match=r"drops all 1 tokens .*\(1 position, 0 special, 0 norm\)"):
        harvest(lm, tmp_path, texts=["a"], split="all")
    with pytest.raises(ValueError, match=r"no document in 1 string in memory, split 'held_out'"):
        harvest(lm, tmp_path, texts=["a"], split="held_out" if not is_held_out("a") else "train")
    with pytest.raises(ValueError, match="holds no text at all"):
        harvest(lm, tmp_path, texts=["", ""])
    assert harvest(lm, tmp_path).n_rows > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 0}, "n_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"ctx_len": 65}, "ctx_len=65 exceeds the context length of .*, 64 tokens"),
        ({"shard_rows": 0}, "shard_rows=0"),
        ({"pool_shards": 0}, "pool_shards=0"),
        ({"hook_names": []}, "expected a hook name"),
        ({"hook_names": [HOOKS[0], HOOKS[0]]}, "distinct hook names"),
        ({"hook_names": ["blocks.9.hook_resid_post"]}, "no hook blocks.9.hook_resid_post; there are"),
        ({"split": "test"}, "split='test' does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(lm, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        harvest(lm, tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


def test_a_steered_model_is_refused(tiny_lm, tmp_path):
    """A cache holds the model's own activations: nothing in it would say that they were edited."""
    import saelab
    from saelab.steering import Direction

    hook = "blocks.0.hook_resid_post"
    with (
        tiny_lm.steer(Direction(torch.ones(32), hook) * 1.0),
        pytest.raises(ValueError, match="being steered"),
    ):
        saelab.harvest(tiny_lm, ["some text to read"], [hook], 100, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_files_beside_an_empty_journal_stay(tiny_lm, tmp_path):
    (tmp_path / "journal.jsonl").write_text("")
    (tmp_path / "mine.safetensors").write_text("years of work")
    saelab.harvest(
        tiny_lm, ["some text for the cache"] * 30, HOOKS[:1], 200, tmp_path, ctx_len=16, split="all", progress=False
    )
    assert (tmp_path / "mine.safetensors").read_text() == "years of work"


def test_a_lone_surrogate_does_not_stop_a_harvest(tiny_lm, tmp_path):
    texts = [f"a lone \ud800 surrogate {i}" for i in range(30)]
    cache = saelab.harvest(tiny_lm, texts, HOOKS[:1], 200, tmp_path, ctx_len=16, split="all", progress=False)
    assert cache.n_rows > 0


def test_messages_are_logged_and_shown_only_where_asked(lm, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("saelab"), "handlers", [])
    with caplog.at_level(logging.INFO, "saelab"):
        harvest(lm, tmp_path / "c")
    assert capsys.readouterr().out == "" and any("rows in" in record.getMessage() for record in caplog.records)
    with shown():
        harvest(lm, tmp_path / "c")
    assert "rows in" in capsys.readouterr().out
