"""The feature store: what one pass collects, how it is kept, and what a feature can do."""

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import saelab
from saelab.errors import ModelError, SaelabError, StoreError
from saelab.evaluation.heldout import open_score_stream
from saelab.features import schema
from saelab.features.blob import pack_arrays, unpack_arrays
from saelab.features.collecting import accumulate, collect
from saelab.features.collecting.accumulate import Accumulator
from saelab.features.collecting.collector import Collector
from saelab.features.collecting.entries import sorted_entries
from saelab.features.collecting.token_sample import TokenSample
from saelab.features.store import FeatureStore, load_features
from saelab.kernels.sparse_acts import SparseActs
from saelab.saes import CrosscoderConfig, CrosscoderSAE, TopKConfig, TopKSAE, TranscoderConfig, TranscoderSAE

HOOK = "blocks.1.hook_resid_post"
DOCUMENTS = [
    f"Document {i}: the river runs past mill {i % 7}, and \u6f22\u5b57 \U0001f600 was good." for i in range(40)
]


@pytest.fixture(scope="module")
def sae():
    return TopKSAE(TopKConfig(d_sae=48, k=4, normalize="none"), 32)


@pytest.fixture(scope="module")
def store(sae, tiny_lm, tmp_path_factory):
    return _collect(sae, tiny_lm, tmp_path_factory.mktemp("store") / "features")


def _collect(sae, lm, out_dir, **arguments):
    arguments = {"hook_name": HOOK, "ctx_len": 32, "batch_size": 5, "top_k": 6, "progress": False} | arguments
    return saelab.collect_features(sae, lm, DOCUMENTS, out_dir=out_dir, **arguments)


@pytest.fixture(scope="module")
def dense(sae, tiny_lm):
    """The same pass written the plain way: every code, its document, its sequence and position; kept tokens only."""
    stream = open_score_stream(sae, tiny_lm, DOCUMENTS, hook_name=HOOK, ctx_len=32, batch_size=5)
    codes, docs, where = [], [], []
    for tokens, acts, keep in stream:
        codes.append(sae.encode(acts[keep]).to_dense().detach())
        docs.append(tokens.doc[keep])
        where.append(keep.nonzero() + torch.tensor([tokens.first_context, 0]))
    return torch.cat(codes), torch.cat(docs), torch.cat(where)


def visible_files(folder):
    """All but the lock."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_numbers_equal_a_plain_computation(store, dense, sae):
    codes, _, _ = dense
    assert store.n_tokens == len(codes) and store.manifest["nnz"] == int((codes != 0).sum())
    for index in range(sae.d_sae):
        feature, values = store.feature(index), codes[:, index][codes[:, index] != 0].double()
        assert feature.n_fired == len(values)
        assert feature.density == len(values) / len(codes)
        if len(values):
            assert feature.mean == pytest.approx(float(values.mean()))
            assert feature.std == pytest.approx(float(values.std(correction=0)), abs=1e-6)
            assert feature.max == float(values.max())
            assert feature.p99 == pytest.approx(float(values.quantile(0.99)), rel=1e-12)
        else:
            assert feature.mean is feature.p99 is feature.max is None and feature.examples() == []
        assert feature.cosine == pytest.approx(1.0, abs=1e-6)  # a fresh SAE is tied


def test_a_steered_model_is_refused(sae, tiny_lm, tmp_path):
    edit = saelab.steering.FeatureHandle(sae, 3, HOOK).add(1.0, "raw")
    with tiny_lm.steer(edit), pytest.raises(ValueError, match="being steered"):
        _collect(sae, tiny_lm, tmp_path / "features")
    assert not (tmp_path / "features").exists()
    with tiny_lm.steer(edit), pytest.raises(ValueError, match="being steered"):
        saelab.evaluate(sae, tiny_lm, DOCUMENTS, hook_name=HOOK, progress=False)


def test_a_link_to_a_folder_and_an_unrelated_hidden_neighbour_do_no_harm(sae, tiny_lm, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / ".real.tmp-old").write_text("mine")
    _collect(sae, tiny_lm, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / schema.MANIFEST).exists()
    assert (tmp_path / ".real.tmp-old").read_text() == "mine"


def test_a_file_in_the_way_is_refused_before_the_pass(sae, tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "_collected", lambda *_: pytest.fail("read all tokens first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SaelabError, match="there is a file where a folder must be"):
        _collect(sae, tiny_lm, tmp_path / "file" / "features")


def test_the_folder_one_is_in_can_be_filled(sae, tiny_lm, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert len(_collect(sae, tiny_lm, Path(), n_tokens=64)) == 48


@pytest.mark.parametrize("name", [schema.DATABASE, schema.TOKENS])
def test_a_flipped_byte_is_noticed_on_opening(store, tmp_path, name):
    shutil.copytree(store.folder, tmp_path / "f")
    content = bytearray((tmp_path / "f" / name).read_bytes())
    content[-9] ^= 255
    (tmp_path / "f" / name).write_bytes(content)
    with pytest.raises(StoreError, match=f"{name} was altered"):
        FeatureStore(tmp_path / "f")


@pytest.mark.parametrize("key", ["model", "split", "files", "n_tokens"])
def test_a_key_that_the_manifest_lacks_is_named(store, tmp_path, key):
    shutil.copytree(store.folder, tmp_path / "f")
    manifest = json.loads((tmp_path / "f" / schema.MANIFEST).read_text())
    del manifest[key]
    (tmp_path / "f" / schema.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=f"not a feature manifest .'{key}'"):
        FeatureStore(tmp_path / "f")


def test_a_manifest_of_another_kind_and_another_batch_size_are_refused(sae, tiny_lm, store, tmp_path):
    with pytest.raises(StoreError, match="batch_size: 5 -> 4"):
        _collect(sae, tiny_lm, store.folder, batch_size=4)
    (tmp_path / schema.MANIFEST).write_text("[1]")
    with pytest.raises(StoreError, match="not a feature manifest"):
        _collect(sae, tiny_lm, tmp_path)


def test_histogram_counts_every_value(store, dense):
    codes, _, _ = dense
    for index in range(48):
        values = codes[:, index][codes[:, index] != 0].numpy()
        edges, counts = store.feature(index).histogram
        assert counts.sum() == len(values)
        if len(values):
            assert counts[0] > 0 and counts[-1] > 0
            assert (counts == np.histogram(values, edges)[0]).all()


def test_examples_are_the_strongest_of_each_document(store, dense):
    codes, docs, where = dense
    for index in range(48):
        column = codes[:, index]
        best = {int(doc): float(column[docs == doc].max()) for doc in docs.unique()}
        expected = sorted((value for value in best.values() if value > 0), reverse=True)[:6]
        examples = store.feature(index).examples()
        assert [example.value for example in examples] == expected
        assert len({example.document for example in examples}) == len(examples)
        for example in examples:
            assert best[example.document] == example.value
            assert example.values[example.peak] == example.value


def test_windows_hold_every_value_around_the_peak(store, dense):
    codes, _, where = dense
    seen = 0
    for index in range(48):
        at = {(int(s), int(p)): float(v) for (s, p), v in zip(where, codes[:, index], strict=True)}
        for example in store.feature(index).examples():
            first = example.position - example.peak
            assert example.peak <= schema.WINDOW_LEFT
            assert len(example.values) - example.peak - 1 <= schema.WINDOW_RIGHT
            expected = [at.get((example.sequence, first + i), 0.0) for i in range(len(example.values))]
            assert list(example.values) == expected
            assert example.token_ids == tuple(store.sequence(example.sequence)[first : first + len(expected)].tolist())
            seen += sum(value != 0 for value in expected)
    assert seen > 300


def test_example_text_is_byte_exact(store):
    joined = "".join(DOCUMENTS).encode()
    texts = [example.text for i in range(48) for example in store.feature(i).examples()]
    assert any("\u6f22\u5b57" in text for text in texts) and any("\U0001f600" in text for text in texts)
    # An EOS stands between documents, and the 32 tokens of a context may end inside a character.
    parts = [part for text in texts for part in re.split(r"<\|endoftext\|>|(?:\\x[0-9a-f]{2})+", text)]
    assert len(parts) > 300 and all(part.encode() in joined for part in parts)
    assert not any("\ufffd" in text for text in texts)


def test_top_logits_are_the_direct_effect(store, sae, tiny_lm):
    effect = tiny_lm.logit_weights().float() @ sae.W_dec[5].detach()
    positive, negative = store.feature(5).top_logits
    assert [value for _, value in positive] == pytest.approx(effect.topk(15).values.tolist(), abs=1e-6)
    assert [value for _, value in negative] == pytest.approx((-(-effect).topk(15).values).tolist(), abs=1e-6)
    assert positive[0][0] == tiny_lm.tokenizer.decode([int(effect.argmax())]) or "\\x" in positive[0][0]


def test_no_logits_off_the_residual_stream(tiny_lm, tmp_path):
    mlp = TopKSAE(TopKConfig(d_sae=16, k=2, normalize="none"), tiny_lm.d_in("blocks.1.mlp.hook_post"))
    store = _collect(mlp, tiny_lm, tmp_path / "f", hook_name="blocks.1.mlp.hook_post", n_tokens=64)
    assert store.feature(0).top_logits == ([], [])
    assert "No direct path" in store.feature(0)._repr_html_()


def test_equal_values_keep_the_earlier_token():
    state = Accumulator(1, 10, 2)
    for start in (0, 5):
        tokens = torch.arange(start, start + 5)
        entries = sorted_entries(SparseActs.from_dense(torch.ones(5, 1)), tokens, tokens)
        state.add(entries, entries)
    assert state.kept["examples"].examples.token.tolist() == [0, 1]


def test_p99_is_exact_or_near_when_values_are_too_many():
    torch.manual_seed(0)
    state, seen = Accumulator(3, 100, 1), []
    for start in range(0, 40_000, 1000):
        codes = torch.rand(1000, 3) + 0.01
        codes[:, 1] *= torch.arange(1000) % 500 == 0  # a rare feature
        codes[:, 2] = codes[:, 2].log().neg() + 1e-3
        seen.append(codes)
        tokens = torch.arange(start, start + 1000)
        entries = sorted_entries(SparseActs.from_dense(codes), tokens, torch.zeros(1000, dtype=torch.int64))
        state.add(entries, entries)
    codes = torch.cat(seen).double()
    p99, exact = state.quantile(0.99)
    assert exact.tolist() == [False, True, False]
    for feature in (0, 2):
        values = codes[:, feature][codes[:, feature] > 0]
        assert float(p99[feature]) == pytest.approx(float(values.quantile(0.99)), rel=0.03)
    assert float(p99[1]) == pytest.approx(float(codes[:, 1][codes[:, 1] > 0].quantile(0.99)))
    few = accumulate.N_LARGEST
    for n in (1, 2, 99, 100, 101, 100 * few - few, 100 * few + 2 * few):
        state, values = Accumulator(1, 100, 1), torch.rand(n, 1) + 1
        entries = sorted_entries(SparseActs.from_dense(values), torch.arange(n), torch.zeros(n, dtype=torch.int64))
        state.add(entries, entries)
        p99, exact = state.quantile(0.99)
        assert bool(exact[0]) == (n <= 100 * few)
        assert float(p99[0]) == pytest.approx(float(values.double().quantile(0.99)), rel=1e-6 if exact[0] else 0.02)


def test_same_call_returns_and_other_arguments_are_refused(sae, tiny_lm, tmp_path, monkeypatch):
    first = _collect(sae, tiny_lm, tmp_path / "f", n_tokens=200)
    stamp = (tmp_path / "f" / schema.DATABASE).stat().st_mtime_ns
    monkeypatch.setattr(collect, "_collected", None)  # a second pass would fail
    again = _collect(sae, tiny_lm, tmp_path / "f", n_tokens=200)
    assert again.manifest == first.manifest
    assert (tmp_path / "f" / schema.DATABASE).stat().st_mtime_ns == stamp
    with pytest.raises(StoreError, match="top_k: 6 -> 7"):
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=200, top_k=7)
    with pytest.raises(StoreError, match="sae_hash"):
        _collect(TopKSAE(TopKConfig(d_sae=48, k=4), 32, seed=1), tiny_lm, tmp_path / "f", n_tokens=200)
    again.verify()


def tables(folder: Path) -> dict[str, list]:
    """Every row of a store's database, and its manifest."""
    with contextlib.closing(sqlite3.connect(folder / schema.DATABASE)) as database:
        names = ("feature", "blob", "token", "peak")
        rows = {name: database.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in names}
    manifest = json.loads((folder / schema.MANIFEST).read_text(encoding="utf-8"))
    for key in ("files", "request"):  # the files of SQLite are not the same bytes
        del manifest[key]
    return rows | {"manifest": [manifest]}


@contextlib.contextmanager
def interrupted_after(n: int, lm, monkeypatch):
    """In the forward pass behind `n` batches; an earlier pass looks for the limit on norms."""
    real, passes = type(lm).stream_activations, []

    def stops(self, batches, hook_names):
        passes.append(hook_names)
        is_second = len(passes) == 2
        for number, found in enumerate(real(self, batches, hook_names)):
            if number == n and is_second:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(lm), "stream_activations", stops)
        yield


def test_a_state_that_is_cut_inside_a_batch_is_not_kept(sae, tiny_lm, tmp_path, monkeypatch):
    """Half of its statistics would know a batch that the others do not."""
    whole = _collect(sae, tiny_lm, tmp_path / "whole", n_tokens=300)
    real = TokenSample.update

    def stops(self, feature_acts, tokens):
        if int(tokens[0]) > 150:
            raise KeyboardInterrupt
        real(self, feature_acts, tokens)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenSample, "update", stops)
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=300)
    assert visible_files(tmp_path / "f") == []
    assert (
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=300).column("n_fired").tolist()
        == whole.column("n_fired").tolist()
    )


def test_an_interrupted_pass_shows_nothing_and_goes_on(sae, tiny_lm, tmp_path, monkeypatch):
    whole = _collect(sae, tiny_lm, tmp_path / "whole", n_tokens=600)
    with interrupted_after(2, tiny_lm, monkeypatch):
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=600)
    assert visible_files(tmp_path / "f") == ["state.0-of-1.safetensors"]
    with pytest.raises(StoreError, match="holds no feature store"):
        load_features(tmp_path / "f")
    with pytest.raises(StoreError, match="unfinished feature store.*top_k: 6 -> 7"):
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=600, top_k=7)
    again, before = [], Collector.update
    monkeypatch.setattr(Collector, "update", lambda *arguments: (again.append(0), before(*arguments)))
    _collect(sae, tiny_lm, tmp_path / "f", n_tokens=600)
    assert len(again) == len(whole.manifest and range(-(-whole.manifest["n_sequences"] // 5))) - 2
    assert tables(tmp_path / "f") == tables(tmp_path / "whole")


def test_a_store_that_is_cut_while_it_is_written_is_written_again(sae, tiny_lm, tmp_path, monkeypatch):
    def interrupted(folder: Path, *_):
        (folder / schema.DATABASE).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect, "write_store", interrupted)
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=100)
    with pytest.raises(StoreError):
        load_features(tmp_path / "f")
    monkeypatch.setattr(Collector, "update", None)  # a second pass would fail
    assert len(_collect(sae, tiny_lm, tmp_path / "f", n_tokens=100)) == 48


def test_a_finished_store_is_extended(sae, tiny_lm, tmp_path, monkeypatch):
    _collect(sae, tiny_lm, tmp_path / "f", n_tokens=200)
    real, seen = Collector.update, []
    monkeypatch.setattr(Collector, "update", lambda self, *given: (seen.append(given[2]), real(self, *given)))
    grown = _collect(sae, tiny_lm, tmp_path / "f", n_tokens=600)
    assert min(int(tokens.min()) for tokens in seen) >= 200
    fresh = _collect(sae, tiny_lm, tmp_path / "fresh", n_tokens=600)
    assert grown.n_tokens == fresh.n_tokens and grown.manifest["n_masked"] == fresh.manifest["n_masked"]
    for index in range(48):
        a, b = grown.feature(index), fresh.feature(index)
        assert a.n_fired == b.n_fired and [one.position for one in a.examples()] == [
            one.position for one in b.examples()
        ]
    with pytest.raises(StoreError, match="n_tokens: 600 -> 200"):
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=200)
    smaller = _collect(sae, tiny_lm, tmp_path / "f", n_tokens=200, renew=True)
    assert smaller.n_tokens < 230 and not smaller.folder.joinpath("state.0-of-1.safetensors").exists()


def test_a_share_that_was_merged_is_not_counted_twice(sae, tiny_lm, tmp_path, monkeypatch):
    """Killed after the merged state is written and before the shares are removed."""
    whole = _collect(sae, tiny_lm, tmp_path / "f", n_tokens=300)
    share = tmp_path / "f" / "state.0-of-1.safetensors"
    shutil.copy(tmp_path / "f" / schema.STATE, share)
    (tmp_path / "f" / schema.MANIFEST).unlink()
    again = _collect(sae, tiny_lm, tmp_path / "f", n_tokens=300)
    assert again.n_tokens == whole.n_tokens and not share.exists()
    assert again.manifest["n_masked"] == whole.manifest["n_masked"]
    with monkeypatch.context() as patch:  # the same while it was extended
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        longer = _collect(sae, tiny_lm, tmp_path / "f", n_tokens=600)
    (tmp_path / "f" / schema.MANIFEST).unlink()
    assert len(list((tmp_path / "f").glob("state*"))) == 2
    assert _collect(sae, tiny_lm, tmp_path / "f", n_tokens=600).n_tokens == longer.n_tokens


def test_processes_share_a_pass(sae, tiny_lm, tmp_path, monkeypatch):
    """Ranks one after another, as the last to finish is rank 0 here; also where one of them had stopped in the middle."""
    whole = _collect(sae, tiny_lm, tmp_path / "whole")

    def rank(number: int):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "3")
        return _collect(sae, tiny_lm, tmp_path / "f")

    with interrupted_after(1, tiny_lm, monkeypatch):
        rank(1)
    monkeypatch.setattr(collect, "FeatureStore", lambda *_: whole)
    monkeypatch.setattr(collect, "wait_for", lambda *_: None)
    for number in (2, 1, 0):
        rank(number)
    with pytest.raises(ValueError, match="renew with one process"):
        _collect(sae, tiny_lm, tmp_path / "f", renew=True)
    found, wanted = tables(tmp_path / "f"), tables(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    for name in ("blob", "token", "peak", "manifest"):
        assert found[name] == wanted[name], name
    assert [row[:3] for row in found["feature"]] == [row[:3] for row in wanted["feature"]]
    for row, other in zip(found["feature"], wanted["feature"], strict=True):
        for a, b in zip(row, other, strict=True):
            assert a == b or a == pytest.approx(b, rel=1e-9)
    assert sorted(path.name for path in (tmp_path / "f").glob("state*")) == ["state.safetensors"]
    assert whole.n_tokens == found["manifest"][0]["n_tokens"]


def test_a_full_disk_names_the_fix(sae, tiny_lm, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collect, "write_store", full)
    with pytest.raises(SaelabError, match="free some space"):
        _collect(sae, tiny_lm, tmp_path / "f", n_tokens=100)
    assert not (tmp_path / "f" / schema.MANIFEST).exists()


def test_bad_calls_name_the_value(sae, tiny_lm, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis.txt"):
        _collect(sae, tiny_lm, tmp_path / "other")
    with pytest.raises(ValueError, match="width 32, but the SAE reads d_in=31"):
        _collect(TopKSAE(TopKConfig(d_sae=8, k=2), 31), tiny_lm, tmp_path / "a")
    with pytest.raises(ValueError, match="top_k=0"):
        _collect(sae, tiny_lm, tmp_path / "b", top_k=0)
    with pytest.raises(ValueError, match="pass texts"):
        saelab.collect_features(sae, tiny_lm, out_dir=tmp_path / "c")
    with pytest.raises(ValueError, match="no text|no token"):
        saelab.collect_features(sae, tiny_lm, ["a"], hook_name=HOOK, out_dir=tmp_path / "d", progress=False)


def test_nan_activations_stop_the_pass(sae, tiny_lm, tmp_path, monkeypatch):
    original = type(tiny_lm).stream_activations

    def broken(self, batches, hook_names):
        for acts in original(self, batches, hook_names):
            yield {name: x.clone().index_fill_(1, torch.tensor([3]), torch.nan) for name, x in acts.items()}

    monkeypatch.setattr(type(tiny_lm), "stream_activations", broken)
    with pytest.raises(ModelError, match="from context 0"):
        _collect(sae, tiny_lm, tmp_path / "f")
    assert visible_files(tmp_path / "f") == []


def test_table_sorts_filters_and_pages(store):
    rows = store.table("p99", descending=False, where={"n_fired": (1, None)}, limit=5, offset=2)
    everything = sorted(
        (store.feature(i).row | {"steer_score": None} for i in range(48) if store.feature(i).n_fired),
        key=lambda row: row["p99"],
    )
    assert rows == everything[2:7]
    assert store.count({"n_fired": (1, None)}) == len(everything)
    assert store.count({"density": (0.05, 0.2)}) == sum(0.05 <= row["density"] <= 0.2 for row in everything)
    density = store.column("density")
    assert density.tolist() == [store.feature(i).density for i in range(48)]


@pytest.mark.parametrize("name", ["label", "density; DROP TABLE feature", 'p99"', ""])
def test_unknown_columns_are_refused(store, name):
    with pytest.raises(ValueError, match="does not exist"):
        store.table(name)
    with pytest.raises(ValueError, match="does not exist"):
        store.count({name: (0, 1)})


@pytest.mark.parametrize("index", [-1, 48, 10**30, True])
def test_features_out_of_range_are_refused(store, index):
    with pytest.raises(ValueError, match="0 to 47"):
        store.feature(index)


def test_damaged_stores_say_what_to_do(store, tmp_path):
    def copy(name):
        return Path(shutil.copytree(store.folder, tmp_path / name))

    with pytest.raises(StoreError, match="no feature store"):
        load_features(tmp_path / "nowhere")
    newer = copy("newer")
    manifest = json.loads((newer / schema.MANIFEST).read_text())
    (newer / schema.MANIFEST).write_text(json.dumps(manifest | {"version": schema.VERSION + 1}))
    with pytest.raises(StoreError, match="update saelab"):
        load_features(newer)
    truncated = copy("truncated")
    data = (truncated / schema.DATABASE).read_bytes()
    (truncated / schema.DATABASE).write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="truncated"):
        load_features(truncated)
    garbage = copy("garbage")
    (garbage / schema.DATABASE).write_bytes(b"x" * len(data))
    with pytest.raises(StoreError, match="was altered"):
        load_features(garbage)
    altered = copy("altered")
    (altered / schema.DATABASE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="was altered"):
        load_features(altered)
    foreign = copy("foreign")
    (foreign / schema.MANIFEST).write_text("[]")
    with pytest.raises(StoreError):
        load_features(foreign)


def test_a_store_is_opened_read_only_from_any_thread(store):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._connection().execute("DELETE FROM feature")
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(store.feature(i).n_fired)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(store.feature(i).n_fired for i in range(8))


def test_blobs_describe_themselves():
    arrays = {"a": np.arange(6, dtype="<i4").reshape(2, 3), "b": np.array([0.5], dtype="<f4")}
    again = unpack_arrays(pack_arrays(arrays))
    assert all((again[name] == arrays[name]).all() and again[name].dtype == arrays[name].dtype for name in arrays)
    for bad in (b"", b"SLB\x02xx", b"SLB\x01nonsense", pack_arrays(arrays)[:-4]):
        with pytest.raises(StoreError):
            unpack_arrays(bad)


def test_the_run_of_an_sae_uses_its_held_out_texts(hostile_run, tiny_lm):
    store = load_features(hostile_run)
    report = json.loads((hostile_run / "report.json").read_text())
    assert store.manifest["split"] == report["split"] == "held_out"
    assert store.n_tokens == report["n_tokens"] and store.manifest["n_masked"] == report["n_masked"]
    assert store.manifest["mask"]["max_norm"] == report["mask"]["max_norm"]
    assert store.manifest["l0"] == pytest.approx(report["l0"])
    assert store.count({"n_fired": (None, 0)}) / store.d_sae == report["dead_fraction"]
    assert not Path(store.manifest["sae"]["folder"]).is_absolute()
    assert load_features(hostile_run / "sae").folder == load_features(hostile_run / "features").folder
    assert store.sae.hash == store.manifest["sae"]["hash"]


def test_another_sae_is_refused(hostile_run, sae):
    with pytest.raises(StoreError, match="was collected from"):
        load_features(hostile_run, sae=sae)


def test_a_feature_steers(hostile_run, tiny_lm):
    store = load_features(hostile_run)
    feature = store.feature(store.table("density", limit=1)[0]["feature"])
    before = tiny_lm.logits("The weather today")
    for edit in (
        feature * 2.0,
        2.0 * feature,
        feature.add(1.0),
        feature.clamp(3.0),
        feature.scale(2.0),
        feature.ablate(),
    ):
        with tiny_lm.steer(edit):
            assert tiny_lm.logits("The weather today").shape == before.shape
    with tiny_lm.steer(feature * 2.0):
        assert not torch.equal(tiny_lm.logits("The weather today"), before)
    assert torch.equal(tiny_lm.logits("The weather today"), before)
    assert feature.p99 and (feature * 2.0).value == pytest.approx(2.0 * feature.p99)


def test_a_missing_sae_folder_is_explained(hostile_run, tmp_path):
    moved = FeatureStore(shutil.copytree(hostile_run / "features", tmp_path / "alone" / "features"))
    with pytest.raises(StoreError, match="pass it with saelab.load_features"):
        moved.feature(0).ablate()


def test_several_stores_in_a_run_must_be_chosen_from(hostile_run, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(hostile_run / "sae", tmp_path / f"sae-{name}")
        shutil.copytree(hostile_run / "features", tmp_path / f"features-{name}")
    with pytest.raises(ValueError, match="features-a.*features-b"):
        load_features(tmp_path)
    assert load_features(tmp_path / "sae-b").folder == tmp_path / "features-b"
    with pytest.raises(StoreError, match="holds no feature store"):
        (tmp_path / "empty").mkdir()
        load_features(tmp_path / "empty")


def test_browsing_imports_no_torch(store):
    code = (
        "import sys, saelab; store = saelab.load_features(sys.argv[1]); f = store.feature(3);"
        "repr(store), repr(f), f._repr_html_(), f.examples(), f.histogram, f.top_logits, store.table();"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- SAEs of several sites


def test_a_crosscoders_features_are_read_at_its_last_hook(tiny_lm, tmp_path):
    hooks = ["blocks.0.hook_resid_post", HOOK]
    sae = CrosscoderSAE(CrosscoderConfig(48, 4, sparsity="l1", normalize="none"), 32, seed=1, n_sources=2)
    with torch.no_grad():
        sae.b_enc.sub_(0.1)
    store = _collect(sae, tiny_lm, tmp_path / "features", hook_name=hooks)
    assert store.hook_name == HOOK and store.manifest["sites"]["reads"] == hooks
    stream = open_score_stream(sae, tiny_lm, DOCUMENTS, hook_name=hooks, ctx_len=32, batch_size=5)
    codes = torch.cat([sae.encode(acts[keep]).to_dense().detach() for _, acts, keep in stream])
    assert store.column("n_fired").tolist() == (codes != 0).sum(0).tolist()
    effect = tiny_lm.logit_weights().float() @ sae.W_dec[1, 5].detach()
    assert store.feature(5).top_logits.positive[0][1] == pytest.approx(effect.max().item(), abs=1e-6)
    flat = [W.detach()[:, 5].flatten() for W in (sae.W_enc, sae.W_dec)]
    assert store.feature(5).cosine == pytest.approx(torch.cosine_similarity(*flat, dim=0).item(), abs=1e-6)
    again = saelab.features.collecting.collect.collect_features(
        sae,
        tiny_lm,
        DOCUMENTS,
        out_dir=tmp_path / "features",
        hook_name=tuple(hooks),
        ctx_len=32,
        batch_size=5,
        top_k=6,
    )
    assert again.manifest == store.manifest
    with pytest.raises(StoreError, match="hook_name"):
        _collect(sae, tiny_lm, tmp_path / "features", hook_name=hooks[::-1])


def test_a_transcoders_features_are_read_where_it_writes(tiny_lm, tmp_path):
    config = TranscoderConfig(48, 4, normalize="none", hook_name_out="blocks.1.hook_mlp_out")
    sae = TranscoderSAE(config, tiny_lm.d_in("blocks.1.mlp.hook_post"), d_out=32)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)))
    store = _collect(sae, tiny_lm, tmp_path / "features", hook_name="blocks.1.mlp.hook_post")
    assert store.hook_name == "blocks.1.hook_mlp_out"
    effect = tiny_lm.logit_weights().float() @ sae.W_dec[5].detach()
    assert store.feature(5).top_logits.positive[0][1] == pytest.approx(effect.max().item(), abs=1e-6)
    assert store.feature(5).cosine is None and np.isnan(store.column("cosine")).all()  # of rows of two widths
    assert store.feature(int(store.column("n_fired").argmax()))._repr_html_()
