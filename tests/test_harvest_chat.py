"""Conversations: the chat template once, a context each, no padding kept, and every row stored once."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import WORDS

import saelab
from saelab.activation_cache import layout
from saelab.activation_cache.harvest import harvest
from saelab.activation_cache.repair import repair
from saelab.activation_cache.shuffle_buffer import ShuffleBuffer
from saelab.tokens import document_id, load_texts

HOOK = "blocks.1.hook_resid_post"
SIZES = {"ctx_len": 48, "batch_size": 4, "shard_rows": 150, "pool_shards": 3, "progress": False}


def conversation(i: int) -> list[dict[str, str]]:
    asked = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 9))
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{i} {WORDS[i % len(WORDS)]}"}]


CHATS = [conversation(i) for i in range(70)]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.[sj]*") if p.name != layout.JOURNAL}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of conversations."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in CHATS))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_lm, chats):
    folder = tmp_path_factory.mktemp("chat") / "cache"
    return harvest(tiny_lm, load_texts(chats, "messages", chat=tiny_lm), HOOK, 10**6, folder, chat=True, **SIZES)


def places(cache):
    return torch.cat([torch.stack([i["seq"], i["pos"]], 1) for _, i in cache.shards()]).tolist()


def test_each_conversation_is_a_context_of_its_own_rendered_once(cache, tiny_lm):
    ids, doc = cache.tokens()
    texts = [f"<s>user: {one[0]['content']}\n<s>assistant: {one[1]['content']}\n" for one in CHATS]
    trained = [text for text in texts if document_id(text) in set(cache.document_ids.tolist())]
    assert len(ids) == len(trained) == cache.manifest["n_documents"] > 50
    for i, text in enumerate(trained):
        expected = tiny_lm.tokenizer(text, add_special_tokens=False).input_ids[:48]
        assert ids[i][doc[i] >= 0].tolist() == expected and set(doc[i].tolist()) <= {i, -1}
    assert cache.manifest["padding"] == int((doc < 0).sum()) > 0
    assert any(len(tiny_lm.tokenizer(text).input_ids) > 48 for text in trained)  # some are cut


def test_every_row_is_stored_once_and_no_padding(cache, tiny_lm):
    ids, doc = cache.tokens()
    kept = (doc >= 0) & ~torch.isin(ids, torch.tensor(tiny_lm.special_ids))
    kept[:, 0] = False
    assert cache.manifest["masked"]["norm"] == 0
    assert sorted(places(cache)) == kept.nonzero().tolist() != places(cache)


def test_rows_do_not_depend_on_the_other_conversations(cache, tiny_lm):
    ids, doc = cache.tokens()
    alone = [
        next(iter(tiny_lm.stream_activations([row[d >= 0][None].long()], [HOOK])))[HOOK][0]
        for row, d in zip(ids, doc, strict=True)
    ]
    for acts, index in cache.shards():
        expected = torch.stack([alone[s][p] for s, p in zip(index["seq"].tolist(), index["pos"].tolist(), strict=True)])
        torch.testing.assert_close(acts.float(), expected, rtol=1e-2, atol=1e-3)


def test_resume_and_repair(cache, tiny_lm, chats, tmp_path):
    whole, texts = contents(cache.path), load_texts(chats, "messages", chat=tiny_lm)
    for name, data in whole.items():
        if name != layout.MANIFEST:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    lines = (cache.path / layout.JOURNAL).read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if b'"kind": "shard"' in line)
    (tmp_path / layout.JOURNAL).write_bytes(b"".join(lines[: first + 2]))
    again = harvest(tiny_lm, texts, HOOK, 10**6, tmp_path, chat=True, **SIZES)
    assert contents(tmp_path) == whole
    lost = [
        f"shards/r000-000001/{HOOK}.safetensors",
        "shards/r000-000002/index.safetensors",
        "tokens/seq-000000.safetensors",
    ]
    for name in lost:
        (tmp_path / name).unlink()
    assert repair(again, tiny_lm, texts, progress=False) == dict.fromkeys(lost, True)
    with pytest.raises(ValueError, match="packing: each document.* -> EOS between"):
        harvest(tiny_lm, texts, HOOK, 10**6, tmp_path, **SIZES)


def test_tokens_asked_for_end_with_a_whole_conversation(cache, tiny_lm, tmp_path):
    small = harvest(tiny_lm, CHATS, HOOK, 200, tmp_path, chat=True, **SIZES)
    ids, doc = small.tokens()
    real = (doc >= 0).sum(1)
    assert int(real.sum()) >= 200 > int(real[:-1].sum()) and small.manifest["n_tokens"] == int(real.sum())
    assert torch.equal(ids, cache.tokens()[0][: len(ids)])


def test_an_sae_of_conversations_is_measured_on_conversations(cache, tiny_lm, tmp_path):
    config = saelab.TrainConfig(n_tokens=3_000, batch_size=100, warmup_steps=2, checkpoint_every=0)
    saelab.train(saelab.saes.TopKConfig(64, 4), cache, config, tmp_path / "sae", progress=False)
    sae = saelab.load_sae(tmp_path / "sae")
    report = saelab.evaluate(sae, tiny_lm, n_tokens_ce=300, progress=False)
    assert report.split == "held_out" and report.fvu is not None and 0 < report.fvu < 1.5
    held_out = list(load_texts(sae.provenance.origin["texts"], chat=tiny_lm).documents("held_out"))
    n_tokens = sum(min(48, len(tiny_lm.tokenizer(text).input_ids)) for text in held_out)
    assert report.fvu_special is not None and report.n_masked["special"] == len(held_out)  # the assistant's <s>
    assert report.n_masked["position"] == len(held_out) and report.n_tokens + sum(report.n_masked.values()) == n_tokens


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["only a text"], "chat=True expects conversations, but 1 string in memory begins with 'only a text'"),
        ([[{"role": "user"}]], r"\{'role': 'user'\} is not a message: expected"),
    ],
)
def test_what_is_no_conversation_is_refused(tiny_lm, tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        harvest(tiny_lm, texts, HOOK, 100, tmp_path / "new", chat=True, **SIZES)
    assert not (tmp_path / "new").exists()


def test_a_model_without_a_template_is_refused(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_lm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        harvest(tiny_lm, CHATS, HOOK, 100, tmp_path / "new", chat=True, **SIZES)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=12), shuffle=st.booleans())
def test_the_pool_gives_out_what_it_got_each_row_once(sizes, shuffle):
    buffer, given_in, taken = ShuffleBuffer(70), [], []
    generator = torch.Generator().manual_seed(0) if shuffle else None
    for n_in, n_out in sizes:
        index = torch.arange(len(given_in), len(given_in) + n_in)[:, None].repeat(1, 3).int()
        buffer.add(index, {"h": {"acts": index.float()}})
        given_in += index[:, 0].tolist()
        drawn, rows = buffer.draw(n_out, generator)
        assert torch.equal(rows["h"]["acts"], drawn.float())
        taken += drawn[:, 0].tolist()
    taken += buffer.draw(len(buffer), generator)[0][:, 0].tolist()
    assert sorted(taken) == given_in and (shuffle or taken == given_in)
