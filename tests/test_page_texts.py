"""The Texts page."""

from __future__ import annotations

import re

import pytest

import saelab
from saelab.app import markdown, page_texts, state

A = "\n".join(f"The weather today is fine {word}." for word in "abcdefghijk")
B = "\n".join(f"def main({word}): return {word} + 1" for word in "abcdefghijk")


def press(app):
    return next(button for button in app.button if button.label == "Compare").click().run()


def tables(app):
    return [
        found
        for found in (element.proto.body for element in app.get("html"))
        if "sa-table" in found and "<table" in found
    ]


def test_texts_of_the_address_are_compared(open_page, hostile_run):
    app = open_page("texts", a=A, b=B)
    assert [box.value for box in app.text_area] == [A, B] and not tables(app) and not app.exception
    press(app)
    store = saelab.load_features(hostile_run)
    lm = saelab.load_model(store.manifest["model"]["name"])  # in the dtype of the page's own
    found = store.contrast(lm, A.split("\n"), B.split("\n"))
    assert (
        not app.exception
        and not app.error
        and found.summary.split(";")[0] in markdown.plain(found.summary).replace("\\", "")
    )
    assert app.success[0].value == markdown.plain(found.summary)
    for shown, side in zip(tables(app), ("a", "b"), strict=True):
        rows = found.rows(25, side)
        assert [int(i) for i in re.findall(r'href="feature\?feature=(\d+)"', shown)] == [row["feature"] for row in rows]
        assert shown.count("\u2713") == sum(row["found"] for row in rows) > 0
        assert f"{rows[0]['difference']:+.2f} <small" in shown and "<script" not in shown
    (code,) = [block.value for block in app.code if "contrast" in block.value]
    names: dict = {}
    exec(code.replace(str(hostile_run), str(hostile_run)), names)
    assert names["found"].rows(25, "a") == found.rows(25, "a")


def test_few_texts_are_no_claim(open_page):
    app = press(open_page("texts"))
    assert not app.exception and "No claim is made with fewer than 10 texts" in app.info[0].value.replace("\\", "")
    assert "\u2713" not in "".join(tables(app))


def test_the_address_holds_what_is_short(open_page):
    app = open_page("texts")
    app.text_area[0].set_value("one text")
    app.text_area[1].set_value("another <b>text</b>")
    press(app)
    assert {name: app.query_params[name] for name in "ab"} in (
        {"a": "one text", "b": "another <b>text</b>"},
        {"a": ["one text"], "b": ["another <b>text</b>"]},
    )
    app.text_area[0].set_value("a long text of words " * 100)
    press(app)
    assert "a" not in app.query_params and "b" not in app.query_params
    assert (
        app.text_area[0].value == "a long text of words " * 100 or app.error
    )  # 2,100 characters: more than its context
    app.query_params["a"] = "other"
    app.run()
    assert app.text_area[0].value == "other"
    app.text_area[0].set_value("typed")
    press(app)
    assert app.text_area[0].value == "typed" and app.query_params["a"] in ("typed", ["typed"])


def test_other_texts_than_those_compared_show_no_result(open_page):
    app = press(open_page("texts", a=A, b=B))
    assert tables(app)
    app.query_params["a"] = "another text"
    app.run()
    assert not tables(app) and "press Compare" in app.info[0].value


@pytest.mark.parametrize(
    ("a", "said"),
    [
        ("", "First texts are empty"),
        ("\n \n", "First texts are empty"),
        ("x\n" * 201, "201 lines"),
        ("word " * 300, "split it"),
        ("a", "counted token"),
    ],
)
def test_what_cannot_be_compared_is_said(open_page, a, said):
    app = open_page("texts", b=B)
    app.text_area[0].set_value(a)
    press(app)
    assert not app.exception and said in app.error[0].value.replace("\\", "") and not tables(app)
    assert not state.MODEL_LOCK.locked() and "Cancel" not in [button.label for button in app.button]


def test_a_pass_can_be_cancelled(open_page, monkeypatch):
    """While it runs there is a button; what a click raises at the next message ends the pass and frees the model."""
    seen = []

    def contrast_texts(store, lm, a, b, progress):
        progress(1, 2)
        seen.append(state.MODEL_LOCK.locked())
        raise ValueError("stopped here")

    monkeypatch.setattr("saelab.features.text_sets.contrast_texts", contrast_texts)
    app = press(open_page("texts", a=A, b=B))
    assert seen == [True] and "stopped here" in app.error[0].value and not state.MODEL_LOCK.locked()
    assert "Cancel" not in [button.label for button in app.button] and not tables(app)
    assert page_texts.MAX_TEXTS * 2 <= 400


def test_a_second_text_on_the_prompt_page_is_read_too(open_page):
    app = open_page("prompt")
    for text in ("The weather today", "In the beginning", "a long text " * 200):
        app.text_area[0].set_value(text)
        next(button for button in app.button if button.label == "Read").click().run()
        assert app.text_area[0].value == text and not app.exception
    assert "text" not in app.query_params  # too long for an address: not cut
