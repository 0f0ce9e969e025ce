"""Whole documents of a store: every byte of the text, in every context, with the window of an example marked."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
from conftest import HOSTILE, TOKENIZER_TEXT

import saelab
from saelab.features.documents import tokens_of
from saelab.features.render import DocumentLinks, examples_html
from saelab.features.token_text import display_groups
from saelab.features.visible import visible
from saelab.saes import TopKConfig, TopKSAE
from saelab.saes.provenance import Provenance

HOOK, END = "blocks.1.hook_resid_post", "<|endoftext|>"
TEXTS = [f"{HOSTILE[i % len(HOSTILE)]} {TOKENIZER_TEXT[i % 4] * (i % 3)} \U0001f600 Number {i}." for i in range(24)]


@pytest.fixture(scope="module", params=[True, False], ids=["BOS", "no BOS"])
def store(request, tiny_lm, tmp_path_factory):
    sae = TopKSAE(TopKConfig(d_sae=32, k=4, normalize="none"), 32)
    sae.provenance = Provenance(origin={"hook_name": HOOK, "prepend_bos": request.param})
    folder = tmp_path_factory.mktemp("documents") / "features"
    return saelab.collect_features(sae, tiny_lm, TEXTS, out_dir=folder, ctx_len=24, progress=False)


@pytest.fixture
def example(store):
    """One that does not begin its document, in a document of several contexts."""
    feature = store.feature(int(np.nanargmax(store.column("n_fired"))))
    found = [one for one in feature.examples() if one.document_position and one.document_position > 30]
    return found[0]


def test_documents_are_whole_to_the_byte(store):
    shown = [store.document(i) for i in range(len(TEXTS))]
    assert [b"".join(one.pieces).decode().removesuffix(END) for one in shown] == TEXTS
    assert shown[3].text == "".join(group.text for group in display_groups(shown[3].pieces))
    assert len({int(row) for row in shown[4].context}) > 1  # of several contexts
    where = zip(shown[4].context.tolist(), shown[4].position.tolist(), strict=True)
    ids = [store.sequence(row)[place] for row, place in where]
    assert tuple(ids) == shown[4].token_ids and f"Document(4: {len(ids)} tokens" in repr(shown[4])


def test_an_example_names_its_place_in_its_document(store):
    for row in store.table("n_fired", limit=6):
        for one in store.feature(row["feature"]).examples():
            document = store.document(one.document)
            assert document.pieces[one.document_position] == one.pieces[one.peak]
            assert one.document_text() == document.text and one.place == f"{one.document}:{one.document_position}"


@pytest.mark.parametrize("number", [-1, 24, 10**9])
def test_a_number_of_no_document_is_refused(store, number):
    with pytest.raises(ValueError, match=f"document={number} is none of the 24 documents"):
        store.document(number)


def test_values_stand_in_the_window_alone(store, example):
    document = store.document(example.document)
    whole, start, stop = document.around(example)
    assert whole.pieces == document.pieces and whole.peak == example.document_position
    assert 0 < start <= whole.peak < stop and stop - start <= len(example.values)
    shift = whole.peak - example.peak
    for i, value in enumerate(whole.values):
        assert value == (example.values[i - shift] if start <= i < stop else 0.0)
    with pytest.raises(ValueError, match=f"not of document {(example.document + 1) % 24}"):
        store.document((example.document + 1) % 24).around(example)


def test_an_example_opens_to_its_document(store, example):
    links = DocumentLinks(lambda place: f"feature?x=<&>&doc={place}", example.place)
    shown, closed = (examples_html([example], 9.0, links=one) for one in (links, links._replace(opened="")))
    text = html.unescape(re.sub("<[^>]*>", "", shown[shown.index("sl-doc") :]))
    assert visible(store.document(example.document).text) in text
    window = shown[shown.index("sl-window") :]
    assert window.count("sl-peak") == 1 and shown.count("sl-peak") == 2 and closed.count("sl-peak") == 1
    assert 'aria-expanded="true"' in shown and 'aria-expanded="false"' in closed and "sl-doc" not in closed
    assert 'href="feature?x=&lt;&amp;&gt;&amp;doc="' in shown  # an open one closes
    assert f"doc={example.place}" in closed and "<a " not in examples_html([example], 9.0)
    assert not re.search("<(script|img|svg|iframe)", shown)


def test_what_is_far_away_is_left_out_and_counted(store, example, monkeypatch):
    monkeypatch.setattr("saelab.features.render._MAX_AROUND", 2)
    document = store.document(example.document)
    _, start, stop = document.around(example)
    shown = examples_html([example], 9.0, links=DocumentLinks(str, example.place))
    kept = min(start, 2) + stop - start + min(len(document.pieces) - stop, 2)
    assert f"{len(document.pieces)} tokens, of which {len(document.pieces) - kept} far away are left out" in shown


def test_tokens_of_a_document_in_several_contexts():
    docs = np.array([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 2, 2], [3, 3, -1, -1]])
    rows, columns = tokens_of(docs, 1, 1)  # the first of each context is BOS
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 3), (1, 1), (1, 2), (1, 3), (2, 1)]
    assert len(tokens_of(docs, 7, 1)[0]) == 0 and len(tokens_of(docs, 3, 0)[0]) == 2
