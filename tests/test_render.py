"""Token text to HTML: nothing in a corpus may run, break out, hide or reorder; cut characters come whole."""

import html
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import HOSTILE
from hypothesis import given
from hypothesis import strategies as st

from saelab.features.histogram_html import histogram_html
from saelab.features.numbers import number, percent
from saelab.features.records import Example, Histogram, PromotedToken
from saelab.features.render import chips_html, example_line, examples_html, feature_card
from saelab.features.store import load_features
from saelab.features.token_text import display_groups, token_bytes, trim_to_characters
from saelab.features.visible import escape, visible

ALLOWED_TAGS = {"div", "span", "bdi", "wbr", "small"}
ALLOWED_ATTRIBUTES = {"class", "role", "aria-label", "title", "tabindex", "style", "data-at", "data-v", "data-bin"}


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.titles, self.open = set(), set(), "", [], 0
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value for name, value in attrs if name == "aria-label"]
        self.open += tag != "wbr"

    def handle_endtag(self, tag):
        self.open -= 1

    def handle_data(self, data):
        self.text += data


def example(pieces, values=None, peak=0):
    values = tuple(values or [1.0] * len(pieces))
    return Example(values[peak], 3, 0, 7, tuple(range(len(pieces))), tuple(pieces), values, peak)


def check_harmless(markup):
    page = Page(markup)
    assert page.tags <= ALLOWED_TAGS and page.attributes <= ALLOWED_ATTRIBUTES
    assert page.open == 0
    return page


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(text):
    whole = check_harmless(examples_html([example([text.encode()])], 1.0))
    assert visible(text) in whole.text
    parts = [bytes([byte]) for byte in text.encode()]
    check_harmless(examples_html([example(parts)], 1.0))
    check_harmless(chips_html([PromotedToken(text, 1.0, 2.0)]))


@given(st.text(max_size=40), st.integers(1, 5))
def test_any_text_cut_anywhere_is_only_text(text, size):
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)] or [b"x"]
    page = check_harmless(examples_html([example(pieces)], 1.0))
    assert "".join(visible(group.text) for group in display_groups(pieces)) in page.text


@given(st.text(max_size=60))
def test_nothing_is_invisible_or_reorders(text):
    shown = visible(text)
    assert not any(char in shown for char in "\x00\x07\x1b\n\r\t\u200b\u200d\u202e\u2066\u2069\ufeff\u2028")
    assert "<" not in escape(text) and '"' not in escape(text) and "'" not in escape(text)
    assert html.unescape(escape(text)) == shown


def test_a_character_in_several_tokens_is_one_group_with_all_values():
    pieces = [b"a", b"\xe6\xbc", b"\xa2", b"b"]
    assert [(group.start, group.stop, group.text) for group in display_groups(pieces)] == [
        (0, 1, "a"),
        (1, 3, "\u6f22"),
        (3, 4, "b"),
    ]
    page = Page(examples_html([example(pieces, [0.0, 0.0, 2.0, 0.0], peak=2)], 4.0))
    assert page.titles[1:] == ["token '\u6f22', activation 0, 2.00, 50% of maximum, peak"]
    assert "\ufffd" not in page.text


@pytest.mark.parametrize(
    "pieces, texts",
    [
        ([b"\xe6", b"a"], ["\\xe6", "a"]),
        ([b"\xa2", b"a"], ["\\xa2", "a"]),
        ([b"a", b"\xf0\x9f"], ["a", "\\xf0\\x9f"]),
        ([b"\xff"], ["\\xff"]),
        ([b"x\xf0\x9f", b"\x98\x80y"], ["x\U0001f600y"]),
        ([b""], [""]),
        ([], []),
    ],
)
def test_broken_bytes_are_shown_as_codes(pieces, texts):
    assert [group.text for group in display_groups(pieces)] == texts


def test_a_window_is_cut_between_characters_but_keeps_its_peak():
    pieces = [b"\xbc\xa2", b"\xa2", b"a", b"b", b"\xe6", b"\xbc"]
    assert trim_to_characters(pieces, 2) == (2, 4)
    assert trim_to_characters(pieces, 1) == (1, 4)
    assert trim_to_characters(pieces, 5) == (2, 6)
    assert trim_to_characters([b"a"], 0) == (0, 1)


def test_token_bytes_of_a_real_tokenizer(tiny_lm):
    text = "The \u6f22 \U0001f600\n"
    ids = tiny_lm.tokenizer(text)["input_ids"]
    table = token_bytes(tiny_lm.tokenizer, ids)
    assert b"".join(table[index] for index in ids) == text.encode()
    assert token_bytes(tiny_lm.tokenizer, [1]) == {1: b"<|endoftext|>"}


def test_the_highlight_is_a_share_of_the_features_maximum():
    markup = examples_html([example([b"a", b"b", b"c"], [4.0, 2.0, 0.0])], 8.0)
    assert markup.count("tabindex") == 2  # the silent token is plain text
    assert markup.count('tabindex="0"') == 1  # an example is one tab stop
    assert markup.count('data-v="4.00"') == markup.count('data-v="2.00"') == 1
    assert "rgba(230,159,0,0.25)" in markup and "rgba(230,159,0,0.12)" in markup
    assert markup.count("sl-peak") == 1


def test_newlines_are_marked():
    assert "\u21b5" in Page(examples_html([example([b"a\n"])], 1.0)).text


def test_no_example_has_words_instead():
    assert "did not fire on any counted token" in examples_html([], None)
    empty = Histogram(np.zeros(1), np.zeros(0, dtype=np.int64))
    assert "never fired" in histogram_html(empty)


def test_card_of_a_feature(hostile_run):
    store = load_features(hostile_run)
    for row in store.table("density", limit=5) + store.table("n_fired", descending=False, limit=3):
        card = feature_card(store.feature(row["feature"]), n_examples=20)
        page = Page(card)
        assert page.tags <= ALLOWED_TAGS | {"style", "h3", "h4", "p", "dl", "dt", "dd"}
        assert not any(name.startswith("on") or name in ("href", "src") for name in page.attributes)
        assert len(card) < 200_000
        assert "prefers-color-scheme:dark" in card and f"Feature {row['feature']}" in page.text
        text = repr(store.feature(row["feature"]))
        assert f"Feature {row['feature']} of blocks.1.hook_resid_post" in text and "p99" in text


def test_one_line_of_an_example():
    pieces = [b" word"] * 40 + [b"PEAK"] + [b" after"] * 16
    line = example_line(example(pieces, peak=40))
    assert line == " word" * 12 + "\u27e6PEAK\u27e7" + " after" * 6


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "\u2013"),
        (0.0, "0"),
        (1.234, "1.23"),
        (12345.6, "12,346"),
        (0.00012, "1.2e-04"),
        (-2.5, "-2.50"),
        (11.0, "11.0"),
        (100.0, "100"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(
    "value, shown", [(None, "\u2013"), (0.0, "0%"), (0.00012, "0.012%"), (0.1667, "16.67%"), (1.0, "100.00%")]
)
def test_percent(value, shown):
    assert percent(value) == shown
