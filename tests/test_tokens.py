"""Texts from every kind of source, the document split, and packing."""

import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab.tokens import Texts, document_id, is_held_out, load_texts, pack

TEXTS = ["the first text", "", "a second, longer text", "third"]


class Letters:
    """A tokenizer of one token a letter: EOS 1, BOS 0."""

    eos_token_id, bos_token_id = 1, 0
    chat_template = "x"

    def __call__(self, texts, **_):
        return {"input_ids": [[0 if letter == "^" else ord(letter) for letter in text] for text in texts]}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class LM:
    tokenizer = Letters()


# --- identity and split


def test_document_id_and_split_by_hand():
    digest = hashlib.sha256(b"the weather").hexdigest()
    unsigned = int(digest[:16], 16)
    assert document_id("the weather") == (unsigned - 2**64 if unsigned >= 2**63 else unsigned)
    assert is_held_out("the weather") == (int(digest, 16) % 10 == 0)
    assert torch.tensor([document_id(f"text {i}") for i in range(50)], dtype=torch.int64).min() < 0


@given(st.lists(st.text(max_size=20), min_size=1).filter(any))
def test_train_and_held_out_part_the_documents(documents):
    texts = load_texts(documents)
    everything = list(texts.documents())
    train, held_out = list(texts.documents("train")), list(texts.documents("held_out"))
    assert everything == [text for text in documents if text]
    assert sorted(train + held_out) == sorted(everything)
    assert all(is_held_out(text) for text in held_out) and not any(is_held_out(text) for text in train)


def test_the_built_in_corpora():
    demo = load_texts("demo")
    assert sum(1 for _ in demo.documents()) == 3385
    assert sum(1 for _ in demo.documents("held_out")) == 338
    assert {"topic", "source"} <= set(next(demo.rows()))
    assert {"word", "concept"} <= set(next(load_texts("concepts").rows()))
    assert demo.spec == {"source": "demo", "column": "text"}
    assert "sha256(text) % 10 != 0" in demo.describe("train")


def test_unknown_split_is_refused_at_once():
    with pytest.raises(ValueError, match="split='test' does not exist; use one of 'train', 'held_out', 'all'"):
        load_texts(TEXTS).documents("test")


# --- sources


def write(path, texts, column="text"):
    rows = [{column: text, "topic": str(i)} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [column, "topic"])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_files_read_twice_the_same_and_open_again_from_their_spec(tmp_path, suffix):
    path = write(tmp_path / f"texts{suffix}", [*TEXTS, 'quotes " , and\nlines', "x" * 200_000])
    texts = load_texts(path)
    expected = [TEXTS[0], *TEXTS[2:], 'quotes " , and\nlines', "x" * 200_000]
    assert list(texts.documents()) == list(texts.documents()) == expected
    assert next(texts.rows()) == {"text": TEXTS[0], "topic": "0"}
    assert json.loads(json.dumps(texts.spec))["source"] == str(path)
    again = load_texts(texts.spec)
    assert list(again.documents()) == expected
    assert again.fingerprint() == texts.fingerprint() == load_texts(str(path)).fingerprint()
    assert load_texts(texts) is texts
    write(path, ["something else"])
    assert load_texts(texts.spec).fingerprint() != texts.fingerprint()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_missing_column_lists_those_that_exist(tmp_path, suffix):
    path = write(tmp_path / f"texts{suffix}", TEXTS, column="body")
    assert next(load_texts(path, "body").documents()) == TEXTS[0]
    with pytest.raises(ValueError, match="no column 'text'; its columns are body, topic"):
        load_texts(path)


def test_txt_is_cut_at_blank_lines_into_documents_and_loses_no_paragraph(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"paragraph {i} " + "word " * 100 for i in range(20)]
    path.write_text("\n\n".join(paragraphs))
    documents = [str(document) for document in load_texts(path).documents()]
    assert [p.strip() for d in documents for p in d.split("\n\n")] == [p.strip() for p in paragraphs]
    assert all(2_000 <= len(d) < 2_700 for d in documents[:-1])
    path.write_text("a line of text\n" * 2_000)
    documents = [str(document) for document in load_texts(path).documents()]
    assert all(len(d) < 8_100 for d in documents) and sum(d.count("line") for d in documents) == 2_000


def test_a_generator_is_kept_and_can_be_read_twice():
    texts = load_texts(text for text in TEXTS)
    assert list(texts.documents()) == list(texts.documents()) == [TEXTS[0], *TEXTS[2:]]
    assert texts.fingerprint() == load_texts(TEXTS).fingerprint() != load_texts(TEXTS[:2]).fingerprint()
    with pytest.raises(ValueError, match="strings in memory.*give the texts themselves"):
        Texts.from_spec(texts.spec)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["fine", 7], r"row 1 of 2 documents in memory holds 7 \(int\), neither a string"),
        ([b"bytes"], r"row 0 .* \(bytes\), neither a string"),
        ([[{"role": "user", "content": "hi"}]], r"load_texts\(\.\.\., chat=lm\)"),
        ([], "holds no text at all"),
        (["", ""], "holds no text at all"),
        ("nowhere.jsonl", "'nowhere.jsonl' does not exist"),
        ("The text itself, as a string.", "nor a Hugging Face dataset id.*put it in a list"),
        (7, "Got int, which is not a list of documents"),
    ],
)
def test_bad_sources_name_the_value_and_the_fix(source, message):
    with pytest.raises(ValueError, match=message):
        list(load_texts(source).documents())


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="is a folder; texts are read from .parquet, .jsonl, .csv, .txt"):
        load_texts(str(tmp_path))
    (tmp_path / "x.doc").write_text("x")
    with pytest.raises(ValueError, match="is a .doc file"):
        load_texts(str(tmp_path / "x.doc"))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match="x.jsonl' line 2 is not JSON"):
        list(load_texts(tmp_path / "x.jsonl").documents())
    (tmp_path / "z.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"row 1 of .*z.jsonl has no column 'text'; its columns are txt"):
        list(load_texts(tmp_path / "z.jsonl").documents())
    (tmp_path / "y.jsonl").write_text('"a"\n')
    with pytest.raises(ValueError, match="line 1 holds a str, not an object"):
        load_texts(tmp_path / "y.jsonl")
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="x.parquet' is not a Parquet file"):
        load_texts(tmp_path / "x.parquet")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="holds no text at all"):
        load_texts(tmp_path / "empty.csv")


def test_an_unreachable_dataset_is_named(monkeypatch):
    with pytest.raises(ValueError, match="'nobody/nothing-here' .*could not be opened as a Hugging Face dataset"):
        load_texts("nobody/nothing-here")


def test_messages_are_rendered_once_and_the_template_is_part_of_the_spec(tmp_path):
    messages = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]
    path = tmp_path / "chat.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": m} for m in messages]), path)
    texts = load_texts(path, "messages", chat=LM())
    assert list(texts.documents()) == ["<user>hi<assistant>ho"]
    assert texts.fingerprint() != load_texts(TEXTS).fingerprint()
    assert list(load_texts(texts.spec, chat=LM()).documents()) == ["<user>hi<assistant>ho"]
    with pytest.raises(ValueError, match="give the language model that has it"):
        load_texts(texts.spec)


# --- packing


def flatten(batches):
    ids = torch.cat([batch.ids for batch in batches]).flatten().tolist()
    return ids, torch.cat([batch.doc for batch in batches]).flatten().tolist()


def test_packing_by_hand():
    batches = list(pack(["abc", "de"], LM(), ctx_len=4, batch_size=3))
    a, b, c, d, e = map(ord, "abcde")
    assert [batch.ids.tolist() for batch in batches] == [[[a, b, c, 1], [d, e, 1, 1]]]
    assert batches[0].doc.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]


def test_bos_stands_at_every_start_and_never_twice():
    batches = list(pack(["^abc", "^d"], LM(), ctx_len=3, batch_size=1, prepend_bos=True))
    a, b, c, d = map(ord, "abcd")
    assert [batch.ids.tolist() for batch in batches] == [[[0, a, b]], [[0, c, 1]], [[0, d, 1]]]
    assert [batch.doc.tolist() for batch in batches] == [[[0, 0, 0]], [[0, 0, 0]], [[1, 1, -1]]]
    assert [batch.first_context for batch in batches] == [0, 1, 2]


words = st.text(alphabet="abcdefgh", max_size=30)


@settings(deadline=None)
@given(st.lists(words, max_size=100), st.integers(2, 9), st.integers(1, 4), st.booleans())
def test_packing_keeps_every_token_in_order_with_its_document(documents, ctx_len, batch_size, prepend_bos):
    seen = []
    batches = []
    for batch in pack(iter(documents), LM(), ctx_len, batch_size, prepend_bos, lambda i, text: seen.append((i, text))):
        assert batch.doc.max() < len(seen)  # a document is announced before its tokens
        assert batch.first_context == sum(len(b.ids) for b in batches)
        batches.append(batch)
    documents = [text for text in documents if text]
    assert seen == list(enumerate(documents))
    if not documents:
        assert batches == []
        return
    assert all(len(batch.ids) == batch_size for batch in batches[:-1])
    ids, doc = flatten(batches)
    if prepend_bos:
        assert ids[::ctx_len] == [0] * (len(ids) // ctx_len)
        assert doc[::ctx_len] == doc[1::ctx_len]
        ids = [x for i, x in enumerate(ids) if i % ctx_len]
        doc = [x for i, x in enumerate(doc) if i % ctx_len]
    n = sum(map(len, documents)) + len(documents) - 1
    assert [chr(x) if x > 1 else "|" for x in ids[:n]] == list("|".join(documents))
    assert doc[:n] == [i for i, text in enumerate(documents) for _ in text + "|"][:n]
    assert ids[n:] == [1] * (len(ids) - n) and doc[n:] == [-1] * (len(ids) - n)
    assert len(ids) - n < ctx_len


def test_packing_does_not_read_to_the_end():
    def endless():
        while True:
            yield "abcdefgh" * 10

    first = next(pack(endless(), LM(), ctx_len=16, batch_size=2))
    assert first.ids.shape == (2, 16)


def test_a_real_tokenizer_adds_nothing_and_does_not_warn(tiny_lm):
    text = "The weather today " * 100  # longer than the model's 128 positions
    (batch,) = pack([text], tiny_lm, ctx_len=4096, batch_size=1)
    real = batch.ids[batch.doc >= 0]
    assert tiny_lm.tokenizer.decode(real.tolist()) == text
    assert not torch.isin(real, torch.tensor(tiny_lm.special_ids)).any()
    (batch,) = pack([text], tiny_lm, ctx_len=4096, batch_size=1, prepend_bos=True)
    assert (batch.ids == tiny_lm.bos_id).sum() == 1 and batch.ids[0, 0] == tiny_lm.bos_id


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"eos_token_id": None}, {}, "no EOS token"),
        ({"bos_token_id": None}, {"prepend_bos": True}, "no BOS token: use prepend_bos=False"),
        ({}, {"ctx_len": 0}, "ctx_len=0"),
        ({}, {"ctx_len": 1, "prepend_bos": True}, "ctx_len must be at least 2"),
        ({}, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_packing_arguments_are_refused_at_once(change, arguments, message):
    tokenizer = Letters()
    vars(tokenizer).update(change)
    with pytest.raises(ValueError, match=message):
        pack(["abc"], tokenizer, **{"ctx_len": 4, "batch_size": 1, **arguments})


def test_load_texts_is_public():
    assert saelab.load_texts is load_texts


def test_texts_say_what_they_are():
    assert repr(load_texts("demo")) == "Texts('demo', column 'text')"
    assert repr(load_texts(["one", "two"])) == "Texts('2 strings in memory', column 'text')"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=f"{name}' is not UTF-8 text"):
        load_texts(tmp_path / name)
