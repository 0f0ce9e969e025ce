"""Damage to a finished cache: `verify` names it, reading refuses it, `repair` rebuilds those files and no others."""

import shutil
from pathlib import Path

import pytest
import torch

import saelab
from saelab.activation_cache.harvest import harvest
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.repair import repair
from saelab.errors import CacheError
from saelab.tokens import load_texts

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
SENTENCE = "the river runs past an old mill where nobody came to see what the light of morning had made of it"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60)) + f" {i}." for i in range(60)]
SIZES = {"ctx_len": 32, "batch_size": 4, "shard_rows": 200, "pool_shards": 3, "split": "all", "progress": False}
ACTS, OTHER = f"{HOOKS[0]}.safetensors", f"{HOOKS[1]}.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_lm) -> Path:
    """A finished cache of two hooks, 10 shards."""
    folder = tmp_path_factory.mktemp("repair") / "cache"
    harvest(tiny_lm, TEXTS, HOOKS, 2_000, folder, **SIZES)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def swap(path: Path) -> None:
    """The file of the same name in another shard: whole, of the same size, and wrong."""
    other = path.parent.parent / ("r000-000001" if path.parent.name != "r000-000001" else "r000-000002")
    shutil.copy(other / path.name, path)


SHARD = "shards/r000-00000{}"
DAMAGE = {
    "rows altered": {f"{SHARD.format(3)}/{ACTS}": alter},
    "rows cut": {f"{SHARD.format(0)}/{OTHER}": shorten},
    "rows of another shard": {f"{SHARD.format(5)}/{ACTS}": swap},
    "an index gone": {f"{SHARD.format(2)}/index.safetensors": Path.unlink},
    "a shard gone": {f"{SHARD.format(4)}/{name}": Path.unlink for name in ("index.safetensors", ACTS, OTHER)},
    "the last shard gone": {f"{SHARD.format(9)}/{name}": Path.unlink for name in ("index.safetensors", ACTS, OTHER)},
    "two indices and rows": {
        f"{SHARD.format(1)}/index.safetensors": alter,
        f"{SHARD.format(7)}/index.safetensors": shorten,
        f"{SHARD.format(6)}/{OTHER}": alter,
    },
    "texts and sums": {
        "tokens/seq-000000.safetensors": shorten,
        "documents.safetensors": alter,
        f"stats/{HOOKS[1]}.safetensors": Path.unlink,
    },
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_repaired_byte_for_byte(whole, folder, tiny_lm, damage):
    for file, how in damage.items():
        how(folder / file)
    cache = ActivationCache(folder)
    assert set(cache.damaged()) == set(damage)
    with pytest.raises(CacheError) as caught:
        cache.verify()
    assert all(str(folder / file) in str(caught.value) for file in damage)
    untouched = {
        file: (folder / file).stat().st_mtime_ns for file in contents(folder).keys() - damage.keys() - {"journal.jsonl"}
    }
    assert repair(cache, tiny_lm, load_texts(TEXTS), progress=False) == dict.fromkeys(damage, True)
    assert contents(folder) == contents(whole)
    assert {file: (folder / file).stat().st_mtime_ns for file in untouched} == untouched
    assert repair(cache, tiny_lm, load_texts(TEXTS), progress=False) == {}


def test_a_cache_in_the_order_of_the_texts_is_repaired(tmp_path, tiny_lm):
    cache = harvest(tiny_lm, TEXTS, HOOKS, 2_000, tmp_path / "cache", shuffle=False, **SIZES)
    whole = contents(cache.path)
    damage = [f"{SHARD.format(4)}/index.safetensors", f"{SHARD.format(4)}/{ACTS}", f"{SHARD.format(7)}/{OTHER}"]
    for file in damage:
        (cache.path / file).unlink()
    assert repair(cache, tiny_lm, load_texts(TEXTS), progress=False) == dict.fromkeys(damage, True)
    assert contents(cache.path) == whole


@pytest.mark.parametrize("name", [ACTS, "index.safetensors"])
def test_nothing_damaged_is_trained_on(folder, name):
    alter(folder / SHARD.format(6) / name)
    cache = ActivationCache(folder)
    with pytest.raises(CacheError, match="shard shards/r000-000006: .*altered.*saelab cache repair RUN"):
        if name == ACTS:
            config = saelab.TrainConfig(n_tokens=2_000, batch_size=100)
            saelab.train(saelab.saes.TopKConfig(48, 4), cache, config, hook_name=HOOKS[0], progress=False)
        else:
            list(cache.shards(HOOKS[0]))


def test_only_the_contexts_that_are_needed_are_run(folder, tiny_lm, monkeypatch):
    cache = ActivationCache(folder)
    broken = cache.index(0)["seq"]
    (folder / SHARD.format(0) / ACTS).unlink()
    real, run = tiny_lm.stream_activations, []

    def counted(batches, hooks):
        return real((run.append(len(ids)) or ids for ids in batches), hooks)

    monkeypatch.setattr(tiny_lm, "stream_activations", counted)
    repair(cache, tiny_lm, load_texts(TEXTS), progress=False)
    assert len(run) == len(torch.unique(broken // SIZES["batch_size"])) < -(-cache.manifest["n_sequences"] // 4)


def test_other_texts_or_another_model_are_refused(folder, tiny_lm, tiny_folder):
    alter(folder / SHARD.format(3) / ACTS)
    cache = ActivationCache(folder)
    with pytest.raises(ValueError, match="another texts_fingerprint"):
        repair(cache, tiny_lm, load_texts(TEXTS[1:]), progress=False)
    assert set(cache.damaged()) == {f"{SHARD.format(3)}/{ACTS}"}


def test_bytes_that_cannot_come_back_are_told_to_the_manifest(folder, tiny_lm, monkeypatch):
    """As under another torch: the rows differ in their last bits."""
    alter(folder / SHARD.format(3) / ACTS)
    cache, real = ActivationCache(folder), tiny_lm.stream_activations

    def other_bits(batches, hooks):
        return ({hook: x * 1.01 for hook, x in found.items()} for found in real(batches, hooks))

    monkeypatch.setattr(tiny_lm, "stream_activations", other_bits)
    assert repair(cache, tiny_lm, load_texts(TEXTS), progress=False) == {f"{SHARD.format(3)}/{ACTS}": False}
    again = ActivationCache(folder)
    again.verify()
    assert sum(len(rows) for rows, _ in again.shards(HOOKS[0])) == again.n_rows


def test_a_lost_index_is_not_guessed_where_the_mask_keeps_other_rows(folder, tiny_lm, monkeypatch):
    (folder / SHARD.format(3) / "index.safetensors").unlink()
    cache, real = ActivationCache(folder), tiny_lm.stream_activations
    monkeypatch.setattr(
        tiny_lm, "stream_activations", lambda ids, hooks: ({h: x * 1e3 for h, x in f.items()} for f in real(ids, hooks))
    )
    with pytest.raises(CacheError, match="no longer keeps the rows"):
        repair(cache, tiny_lm, load_texts(TEXTS), progress=False)
    assert not (folder / SHARD.format(3) / "index.safetensors").exists()
