"""What a cache stores a row as: bfloat16 as ever, float16 with its limit, int8 in groups beside its outlier columns."""

import hashlib
import shutil

import pytest
import test_cache_repair
import test_harvest
import torch
from test_activation_cache import make_cache, stored_rows

import saelab
from saelab.activation_cache import layout
from saelab.activation_cache.codec import Storage, decode, find_outliers, identity, row_bytes
from saelab.activation_cache.reader import ActivationCache
from saelab.activation_cache.repair import repair
from saelab.cli.cache_commands import Info, Stats
from saelab.errors import CacheError
from saelab.identity import LATER
from saelab.saes import TopKConfig
from saelab.tokens import load_texts

HOOK, OTHER = test_harvest.HOOKS


@pytest.fixture(autouse=True)
def _early_norm_rule(monkeypatch):
    monkeypatch.setattr("saelab.tokens.mask.NORM_RULE_ROWS", 300)


def digest(folder):
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        sha.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return sha.hexdigest()


def encode_int8(x, outliers=()):
    storage = Storage("int8", {"h": list(outliers)})
    parts = storage.encode("h", x)
    return parts, decode(storage.tensors("h", parts))


class Outlying(test_harvest.StandIn):
    """The last column is 500 times as large."""

    def rows(self, ids, hook_name):
        x = super().rows(ids, hook_name)
        return torch.cat([x[..., :-1], 500 * x[..., -1:]], dim=-1)


# --- bfloat16: nothing changes


def test_a_bfloat16_cache_has_the_bytes_and_the_hash_of_format_1(tmp_path):
    """Frozen before there was a choice of storage."""
    make_cache(tmp_path / "rows")
    assert digest(tmp_path / "rows") == "9c4e009aabdb89568068df64ae59ea0b576df61c990c7dcca18acfd5a9a4173c"
    manifest = test_harvest.harvest(test_harvest.StandIn(), tmp_path / "cache").manifest
    known_then = {key: value for key, value in manifest["config"].items() if key not in LATER}
    assert layout.config_hash(known_then) == "99ad8068931a589964d230d64563040c7a00c9b6a775dd773a2f305bfab5e921"
    assert manifest["format_version"] == 1 and "storage" not in manifest


# --- int8 by hand


def test_each_group_of_a_row_has_its_own_scale():
    x = torch.zeros(2, 66)
    x[0, :3] = torch.tensor([127.0, 1.4, -0.6])
    x[0, 64] = -254.0
    x[1, 65] = 0.5 * 127
    parts, stored = encode_int8(x)
    assert parts["scales"].tolist() == [[1.0, 2.0], [0.0, 0.5]]  # the second group has two columns
    assert parts["acts"][0, :3].tolist() == [127, 1, -1] and parts["acts"][:, 64:].tolist() == [[-127, 0], [0, 127]]
    expected = x.clone()
    expected[0, 1:3] = torch.tensor([1.0, -1.0])
    assert torch.equal(stored, expected) and stored.dtype == torch.float32
    torch.testing.assert_close(parts["error"], torch.tensor([0.4**2 + 0.4**2, 0.0]))


def test_the_error_of_a_number_is_at_most_half_a_step_at_any_magnitude():
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    for size in (1e-20, 1e-3, 1.0, 1e6, 1e30):
        parts, stored = encode_int8(x * size)
        step = parts["scales"].float().repeat_interleave(64, 1)[:, :100]
        assert ((stored - x * size).abs() <= 0.501 * step).all()
    assert (encode_int8(torch.zeros(3, 5))[1] == 0).all()


def test_outlier_columns_are_found_and_spare_their_group():
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert find_outliers(x) == [] and find_outliers(x[:0]) == []
    x[:, [5, 40]] *= 500
    x[:, 7] *= 30
    assert find_outliers(x) == [5, 40]  # at most every 32nd column: the largest
    rest = [column for column in range(64) if column not in (5, 40, 7)]

    def lost(outliers):
        stored = encode_int8(x, outliers)[1]
        assert not outliers or torch.equal(stored[:, outliers], x[:, outliers].bfloat16().float())
        return ((stored - x)[:, rest].square().sum() / x[:, rest].square().sum()).item()

    assert lost([5, 7, 40]) < 1e-4 < 0.5 < lost([])


def test_a_row_is_stored_the_same_alone_and_among_others():
    x = torch.randn(300, 576, generator=torch.Generator().manual_seed(0)) * 3
    for name in ("float16", "int8"):
        storage = Storage(name, {"h": [3, 77]})
        together = storage.encode("h", x)
        for rows in (slice(0, 0), slice(0, 1), slice(17, 20), slice(50, 250)):
            assert all(torch.equal(part, together[key][rows]) for key, part in storage.encode("h", x[rows]).items())


# --- float16


@pytest.mark.parametrize("value", [65504.5, -1e6])
def test_float16_refuses_what_it_cannot_hold(value):
    x = torch.full((2, 3), 65504.0)
    assert decode(Storage("float16").encode("h", x))[0, 0] == 65504
    x[1, 2] = value
    with pytest.raises(
        CacheError, match=r"h has an activation of .*beyond float16's maximum of 65504.*storage='bfloat16'"
    ):
        Storage("float16").encode("h", x)


def test_a_batch_that_overflows_leaves_nothing_and_the_shards_before_it_stay(tmp_path, monkeypatch):
    lm = test_harvest.StandIn()
    real = lm.rows
    lm.rows = lambda ids, hook_name: real(ids, hook_name) * (1e6 if lm.batches_run == 20 and hook_name == OTHER else 1)
    monkeypatch.setattr("saelab.tokens.mask.NORM_RULE_FACTOR", 1e9)
    with pytest.raises(CacheError, match=rf"{OTHER} has an activation of -?[\d.e+]+, beyond"):
        test_harvest.harvest(lm, tmp_path / "c", storage="float16")
    shards = test_harvest.journaled_shards(tmp_path / "c")
    assert shards and max(entry["cursor"] for entry in shards) <= 80
    with pytest.raises(ValueError, match="dtype: float16 -> bfloat16"):
        test_harvest.harvest(lm, tmp_path / "c")


# --- whole caches


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("int8", torch.float32)])
def test_what_is_read_is_what_is_stored_and_its_error_is_told(tmp_path, name, dtype, capsys):
    lm = Outlying()
    exact = {}
    cache = test_harvest.harvest(lm, tmp_path / "cache", storage=name)
    ids = cache.tokens()[0].long()
    for hook in cache.hook_names:
        x = lm.rows(ids, hook)
        pairs = [(rows, x[index["seq"].long(), index["pos"].long()]) for rows, index in cache.shards(hook)]
        stored, original = (torch.cat(part).double() for part in zip(*pairs, strict=True))
        assert pairs[0][0].dtype == dtype
        exact[hook] = ((stored - original).square().sum() / (original - original.mean(0)).square().sum()).item()
        assert cache.storage_error(hook) == pytest.approx(exact[hook], rel=1e-3) and 0 < exact[hook] < 1e-4
        stats = cache.stats(hook)
        torch.testing.assert_close(stats["mean"], stored.mean(0), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(stats["second_moment"], stored.square().mean(0), rtol=1e-6, atol=0)
        batch = next(cache.batches(cache.n_rows, hook_name=hook))
        assert batch.dtype == torch.float32 and torch.equal(batch.sort(0).values, stored.float().sort(0).values)
    outliers = {hook: [11] for hook in cache.hook_names} if name == "int8" else {}
    assert cache.manifest["storage"]["outliers"] == outliers and cache.manifest["format_version"] == 2
    capsys.readouterr()
    Info(tmp_path / "cache").run()
    said = capsys.readouterr().out
    columns = ", columns in bfloat16: 11" if name == "int8" else ""
    assert f"{HOOK} {cache.storage_error(HOOK):.4%} of the variance{columns}" in said and f"shards, {name}" in said
    Stats(tmp_path / "cache").run()
    assert f"quantisation error  {cache.storage_error(OTHER):.4%} of the variance{columns}\n" in capsys.readouterr().out


@pytest.mark.parametrize("stop_at", [1, 23, 40])
def test_an_interrupted_int8_harvest_goes_on_to_the_same_bytes(tmp_path, stop_at):
    test_harvest.harvest(Outlying(), tmp_path / "whole", storage="int8")
    lm = Outlying()
    lm.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        test_harvest.harvest(lm, tmp_path / "cut", storage="int8")
    if stop_at > 1:
        with pytest.raises(ValueError, match="dtype: int8 -> bfloat16"):
            test_harvest.harvest(lm, tmp_path / "cut")
    lm.stop_at = None
    test_harvest.harvest(lm, tmp_path / "cut", storage="int8").verify()
    assert test_harvest.contents(tmp_path / "cut") == test_harvest.contents(tmp_path / "whole")


def test_a_damaged_int8_cache_is_repaired_byte_for_byte(tmp_path, tiny_lm):
    hooks, sizes = test_cache_repair.HOOKS, {**test_cache_repair.SIZES, "storage": "int8"}
    saelab.harvest(tiny_lm, test_cache_repair.TEXTS, hooks, 2_000, tmp_path / "whole", **sizes)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    first, second = (folder / "shards" / f"r000-00000{i}" for i in (2, 5))
    test_cache_repair.alter(first / f"{hooks[0]}.safetensors")
    for name in ("index", *hooks):
        (second / f"{name}.safetensors").unlink()
    (folder / layout.stats_file(hooks[1])).unlink()
    rebuilt = repair(ActivationCache(folder), tiny_lm, load_texts(test_cache_repair.TEXTS), progress=False)
    assert len(rebuilt) == 5 and all(rebuilt.values())
    assert test_cache_repair.contents(folder) == test_cache_repair.contents(tmp_path / "whole")


def test_int8_is_refused_where_it_would_lose_over_a_hundredth(tmp_path):
    lm = test_harvest.StandIn()
    lm.table = lm.table / 1000 + 5  # rows that hardly differ from their mean
    lm.rows = lambda ids, hook_name: lm.table[test_harvest.HOOKS.index(hook_name), ids]
    with pytest.raises(CacheError, match=rf"int8' loses [\d.]+% of the variance of {HOOK}.*use storage='bfloat16'"):
        test_harvest.harvest(lm, tmp_path / "c", storage="int8")
    assert not list((tmp_path / "c").glob("shards/*"))


def test_an_unknown_storage_is_refused_and_sizes_are_counted(tmp_path):
    with pytest.raises(ValueError, match="storage='int4' must be one of bfloat16, float16, int8"):
        test_harvest.harvest(test_harvest.StandIn(), tmp_path / "c", storage="int4")
    assert not (tmp_path / "c").exists()
    assert [row_bytes(name, 576) for name in ("bfloat16", "float16", "int8")] == [1152, 1152, 576 + 18 + 36]
    assert identity("bfloat16") == {"format_version": 1, "dtype": "bfloat16"}
    cache = make_cache(tmp_path / "small", storage="int8")
    torch.testing.assert_close(
        stored_rows(cache), stored_rows(make_cache(tmp_path / "exact")).float(), rtol=0, atol=0.2
    )


def test_an_sae_trained_on_int8_explains_as_much_of_held_out_rows(tmp_path, tiny_lm):
    hook, texts = test_cache_repair.HOOKS[0], test_cache_repair.TEXTS * 4
    sizes = {"ctx_len": 64, "shard_rows": 1_000, "pool_shards": 3, "progress": False}
    scored = saelab.harvest(tiny_lm, texts, hook, 6_000, tmp_path / "held_out", split="held_out", **sizes)
    held_out = stored_rows(scored).float()
    fvu = {}
    for name in ("bfloat16", "int8"):
        cache = saelab.harvest(tiny_lm, texts, hook, 6_000, tmp_path / name, storage=name, **sizes)
        training = saelab.TrainConfig(n_tokens=20_000, batch_size=200, checkpoint_every=0)
        sae = saelab.train(TopKConfig(64, 4), cache, training, progress=False)
        with torch.no_grad():
            error = (sae(held_out).x_hat - held_out).square().sum()
        fvu[name] = (error / (held_out - held_out.mean(0)).square().sum()).item()
    assert fvu["bfloat16"] < 0.5 and abs(fvu["int8"] - fvu["bfloat16"]) < 0.003
