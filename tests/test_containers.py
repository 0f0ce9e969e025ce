"""What people hold texts and token ids in, against what reads them: each is read right, or refused by its name."""

import io
import json
import subprocess
import sys

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import BatchEncoding

from saelab import load_texts
from saelab.tokens import pack
from saelab.tokens.documents import document_id, is_held_out

TEXTS = ["The weather today", "is fine", "and the river runs past the mill"]
IDS = [[5, 6, 7], [8], [9, 10, 11, 12]]
PADDED = [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 11, 12]]
MASK = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
ROWS = [{"text": text, "topic": str(i)} for i, text in enumerate(TEXTS)]


def saved(folder, data):
    data.save_to_disk(folder)
    return folder


def parquet(folder, table, metadata=None):
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), folder / "rows.parquet")
    return folder / "rows.parquet"


def jsonl(folder, rows, mark=b""):
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "rows.jsonl").write_bytes(mark + lines.encode())
    return folder / "rows.jsonl"


TEXT_CONTAINERS = {
    "list": lambda _: TEXTS,
    "tuple": lambda _: tuple(TEXTS),
    "generator": lambda _: (text for text in TEXTS),
    "NumPy strings": lambda _: np.array(TEXTS),
    "Series": lambda _: pandas.Series(TEXTS, index=[3, 1, 2]),
    "rows": lambda _: ROWS,
    "columns": lambda _: {"topic": [0, 1, 2], "text": TEXTS},
    "DataFrame": lambda _: pandas.DataFrame(ROWS, index=[7, 5, 6]),
    "Arrow table": lambda _: pyarrow.Table.from_pylist(ROWS),
    "Dataset": lambda _: datasets.Dataset.from_list(ROWS),
    "Dataset for torch": lambda _: datasets.Dataset.from_list(ROWS).with_format("torch"),
    "DatasetDict of one": lambda _: datasets.DatasetDict({"only": datasets.Dataset.from_list(ROWS)}),
    "saved Dataset": lambda folder: saved(folder, datasets.Dataset.from_list(ROWS)),
    "saved DatasetDict": lambda folder: saved(folder, datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS)})),
    "jsonl with a byte order mark": lambda folder: jsonl(folder, ROWS, b"\xef\xbb\xbf"),
}
ID_CONTAINERS = {
    "lists": lambda _: IDS,
    "arrays": lambda _: [np.array(ids) for ids in IDS],
    "tensors": lambda _: [torch.tensor(ids) for ids in IDS],
    "rows": lambda _: [{"input_ids": ids} for ids in IDS],
    "columns": lambda _: {"input_ids": IDS},
    "padded by a tokenizer": lambda _: {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(MASK)},
    "BatchEncoding": lambda _: BatchEncoding({"input_ids": PADDED, "attention_mask": MASK}),
    "DataFrame": lambda _: pandas.DataFrame({"input_ids": IDS}),
    "Dataset": lambda _: datasets.Dataset.from_dict({"input_ids": PADDED, "attention_mask": MASK}),
    "saved Dataset": lambda folder: saved(folder, datasets.Dataset.from_dict({"input_ids": IDS})),
    "parquet": lambda folder: parquet(folder, pyarrow.table({"input_ids": IDS})),
    "jsonl": lambda folder: jsonl(folder, [{"input_ids": i, "attention_mask": m} for i, m in zip(PADDED, MASK, strict=True)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_CONTAINERS)
def test_texts_are_read_in_order_again_and_again(tmp_path, name):
    texts = load_texts(TEXT_CONTAINERS[name](tmp_path / "saved" if "saved" in name else tmp_path))
    assert list(texts.documents()) == list(texts.documents()) == TEXTS
    again = load_texts(TEXT_CONTAINERS[name](tmp_path / "again" if "saved" in name else tmp_path))
    assert texts.fingerprint() == again.fingerprint()
    if texts.spec["source"] != "strings":
        assert list(load_texts(json.loads(json.dumps(texts.spec))).documents()) == TEXTS


@pytest.mark.parametrize("name", ID_CONTAINERS)
def test_token_ids_are_documents_without_their_padding(tmp_path, name, tiny_lm):
    texts = load_texts(ID_CONTAINERS[name](tmp_path / "saved" if "saved" in name else tmp_path))
    assert list(texts.documents()) == IDS
    batch = next(pack(texts.documents(), tiny_lm, 10, 1))
    assert batch.ids[0].tolist() == [5, 6, 7, 1, 8, 1, 9, 10, 11, 12]


def test_memory_is_known_by_its_documents_whatever_holds_them():
    same = {load_texts(TEXT_CONTAINERS[name](None)).fingerprint() for name in ("list", "rows", "DataFrame", "Dataset")}
    ids = {
        load_texts(ID_CONTAINERS[name](None)).fingerprint() for name in ("rows", "columns", "BatchEncoding", "Dataset")
    }
    as_text = load_texts({"written": ["[5, 6, 7]", "[8]", "[9, 10, 11, 12]"]}, "written").fingerprint()
    assert len(same) == len(ids) == 1 and len(same | ids | {as_text}) == 3


def test_a_document_of_ids_is_held_out_by_the_sha256_of_little_endian_uint32():
    import hashlib

    digest = hashlib.sha256(b"\x05\x00\x00\x00\x01\x02\x00\x00").digest()  # 5, 513
    assert document_id([5, 513]) == int.from_bytes(digest[:8], "big", signed=True)
    assert is_held_out([5, 513]) == (int.from_bytes(digest, "big") % 10 == 0)
    many = [[i, i + 1] for i in range(300)]
    texts = load_texts(many)
    parts = list(texts.documents("train")), list(texts.documents("held_out"))
    assert sorted(parts[0] + parts[1]) == many and 15 < len(parts[1]) < 50
    assert all(is_held_out(document) for document in parts[1])


SEVERAL = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("train", "test")})
REFUSED = {
    "set": (lambda: set(TEXTS), "Got set, which has no order"),
    "bytes": (lambda: b"The weather", "Got bytes"),
    "open file": (lambda: io.StringIO("text"), "open file .*give its path"),
    "flat ids": (lambda: [1, 2, 3], "flat list of 3 numbers: give a list of documents"),
    "flat tensor": (lambda: torch.tensor([1, 2]), r"Tensor of shape \(2,\).*n_documents, n_tokens"),
    "floats": (lambda: [[0.5, 1.0]], r"row 0 .*holds \[0.5, 1.0\] \(list\), neither a string nor a list of token ids"),
    "truths": (lambda: np.array([[True, False]]), "row 0 .*neither a string nor a list of token ids"),
    "negative": (lambda: [[1, -3]], "row 0 .*-3 is not a token id"),
    "one conversation": (lambda: [{"role": "user", "content": "hi"}], "one conversation: give a list of conversations"),
    "unequal": (lambda: {"text": TEXTS, "n": [1]}, "unequal length.*'text': 3, 'n': 1"),
    "empty dict": (dict, "a dict of no columns"),
    "no columns": (lambda: {"text": "The weather"}, "'text' is 'The weather' .str.: a dict of columns needs a list"),
    "several splits": (lambda: SEVERAL, "splits 'train', 'test': choose one, e.g. hub_split='train'"),
    "another column": (lambda: pandas.DataFrame({"body": TEXTS}), "no column 'text'; its columns are body"),
    "mixed": (lambda: pandas.DataFrame({"text": ["a", 1.5]}), "pandas.*DataFrame has mixed types"),
    "streamed": (lambda: SEVERAL["test"].to_iterable_dataset(), "IterableDataset.*the dataset's id"),
    "mask of another length": (lambda: [{"input_ids": [1, 2], "attention_mask": [1]}], "row 0 .*attention_mask holds"),
    "folder": (lambda: "saelab/data", "is a folder; .*save_to_disk"),
    "number": (lambda: 7, "Got int"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_source_of_documents_is_refused_by_name(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        load_texts(make())


def test_one_of_several_splits(tmp_path):
    other = datasets.DatasetDict({"train": SEVERAL["train"], "test": datasets.Dataset.from_dict({"text": ["other"]})})
    other.save_to_disk(tmp_path)
    for source in (other, tmp_path):
        assert list(load_texts(source, hub_split="test").documents()) == ["other"]
        with pytest.raises(ValueError, match="splits 'train', 'test', not 'valid'"):
            load_texts(source, hub_split="valid")
    texts = load_texts(tmp_path, hub_split="test")
    assert list(load_texts(texts.spec).documents()) == ["other"]
    assert texts.fingerprint() != load_texts(tmp_path, hub_split="train").fingerprint()


@pytest.mark.parametrize("where", ["metadata", "column", "jsonl"])
def test_ids_of_another_tokenizer_are_refused(tmp_path, tiny_lm, where):
    def source(of):
        rows = [{"input_ids": ids, "tokenizer_hash": of} for ids in IDS]
        if where == "jsonl":
            return jsonl(tmp_path, rows)
        if where == "column":
            return parquet(tmp_path, pyarrow.Table.from_pylist(rows))
        return parquet(tmp_path, pyarrow.table({"input_ids": IDS}), {"tokenizer_hash": of})

    assert list(load_texts(source(tiny_lm.tokenizer_hash)).documents(lm=tiny_lm)) == IDS
    with pytest.raises(ValueError, match="from the tokenizer 0123456789ab, .* has " + tiny_lm.tokenizer_hash[:12]):
        load_texts(source("0123456789abcdef")).documents(lm=tiny_lm)


def test_rows_of_two_tokenizers_are_kept_apart():
    rows = [{"input_ids": [1], "tokenizer_hash": "a"}, {"input_ids": [2], "tokenizer_hash": "b"}]
    with pytest.raises(ValueError, match="row 1 .*a different tokenizer_hash"):
        list(load_texts(rows).documents())


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = tmp_path / f"texts.{suffix}"
    content = {"jsonl": '{"text": "first"}\n', "csv": "text\nfirst\n", "txt": "first\n"}[suffix]
    path.write_text(content, encoding="utf-8-sig")
    assert list(load_texts(path).documents()) == ["first"]


OFFLINE = """
import json, sys
from saelab import load_texts
def attempt(**options):
    try:
        texts = load_texts("tiny/Texts", **options)
        return [list(texts.documents()), texts.spec, list(load_texts(texts.spec).documents())]
    except ValueError as error:
        return str(error)
print(json.dumps([attempt(), attempt(revision=sys.argv[1]), attempt(revision="v2"), attempt(hub_split="test")]))
"""


def test_offline_a_dataset_is_read_from_the_cache_of_its_library(tmp_path):
    commit, home = "0123456789abcdef" * 2 + "01234567", tmp_path / "home"
    path = parquet(tmp_path, pyarrow.Table.from_pylist(ROWS))
    datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made" / "parquet").glob("*/*/*/")
    target = home / "datasets" / "tiny___texts" / "default" / "0.0.0" / commit
    target.parent.mkdir(parents=True)
    made.rename(target)
    for file in target.glob("parquet-*.arrow"):
        file.rename(target / file.name.replace("parquet-", "texts-"))
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "texts"}))
    env = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OFFLINE, commit], env=env, capture_output=True, text=True, check=True)
    default, pinned, other, missing = json.loads(done.stdout.splitlines()[-1])
    assert default == pinned and default[0] == default[2] == TEXTS and default[1]["revision"] == commit
    assert f"the cache holds commit {commit}" in other and "HF_HUB_OFFLINE is set" in other
    assert "hub_split='test'" in missing
