"""What a token looks like: the table of character, kind of tokenizer and place; and token ids to bytes."""

import pytest
from test_render import Page, example
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from saelab.app import feature_effect, feature_rows
from saelab.features.effect import Estimate, MeasuredEffect, TokenChange, effect_html
from saelab.features.records import PromotedToken
from saelab.features.render import chips_html, example_line, examples_html
from saelab.features.token_text import _byte_alphabet, token_bytes
from saelab.features.visible import escape, visible
from saelab.steering.compare_html import drafts_html
from saelab.steering.compared import Continuation

SHOWN = {
    "\n": "\u21b5",
    "\r": "\u240d",
    "\t": "\u21e5",
    "\x00": "\u2400",
    "\x1b": "\u241b",
    "\x7f": "\u2421",
    "\x85": "\u27e8U+0085\u27e9",
    "\xa0": "\u237d",
    "\xad": "\u27e8U+00AD\u27e9",
    "\u034f": "\u27e8U+034F\u27e9",
    "\u061c": "\u27e8U+061C\u27e9",
    "\u115f": "\u27e8U+115F\u27e9",
    "\u1680": "\u27e8U+1680\u27e9",
    "\u17b4": "\u27e8U+17B4\u27e9",
    "\u180e": "\u27e8U+180E\u27e9",
    "\u2003": "\u27e8U+2003\u27e9",
    "\u200b": "\u27e8U+200B\u27e9",
    "\u200d": "\u27e8U+200D\u27e9",
    "\u2028": "\u27e8U+2028\u27e9",
    "\u202e": "\u27e8U+202E\u27e9",
    "\u202f": "\u27e8U+202F\u27e9",
    "\u205f": "\u27e8U+205F\u27e9",
    "\u2066": "\u27e8U+2066\u27e9",
    "\u2800": "\u27e8U+2800\u27e9",
    "\u3000": "\u27e8U+3000\u27e9",
    "\u3164": "\u27e8U+3164\u27e9",
    "\ufe0f": "\u27e8U+FE0F\u27e9",
    "\ufeff": "\u27e8BOM\u27e9",
    "\uffa0": "\u27e8U+FFA0\u27e9",
    "\ufffc": "\u27e8U+FFFC\u27e9",
    "\ue000": "\u27e8U+E000\u27e9",
    "\U000e0041": "\u27e8U+E0041\u27e9",
    "\U000e0100": "\u27e8U+E0100\u27e9",
    "\u0301": "\u25cc\u0301",  # a combining mark alone
    "\u093f": "\u25cc\u093f",
    "<": "<",
    "'": "'",
    "\u6f22": "\u6f22",
}
_OF_BYTE = {byte: char for char, byte in _byte_alphabet().items()}
GEMMA = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
LLAMA = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
# kind -> decoder, and how its vocabulary spells a text that does not begin a word
KINDS = {
    "byte-level": (decoders.ByteLevel(), lambda text: "".join(_OF_BYTE[byte] for byte in text.encode())),
    "metaspace": (decoders.Metaspace(), lambda text: text.replace(" ", "\u2581")),
    "gemma": (GEMMA, lambda text: text.replace(" ", "\u2581")),
    "llama": (LLAMA, lambda text: text.replace(" ", "\u2581")),
    "wordpiece": (decoders.WordPiece(), lambda text: "##" + text),
    "word endings": (decoders.BPEDecoder(), lambda text: text),
}


def _tokenizer(kind, texts, added=()):
    decoder, spell = KINDS[kind]
    vocabulary = dict.fromkeys(["[UNK]", *(spell(text) for text in texts)])
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.decoder = decoder
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _id(tokenizer, piece) -> int:
    return tokenizer.convert_tokens_to_ids(piece)


def _chip(text):
    return chips_html([PromotedToken(text, 1.0, 2.0)])


def _silent(text):
    return examples_html([example([b"x", text.encode()], [1.0, 0.0])], 1.0)


def _effect(text):
    change = Estimate(-1.0, -2.0, -0.5)
    return MeasuredEffect(2, 9, change, change, (TokenChange(text, change, 0.5, 0.2),), (), 0.0)


PLACES = {
    "chip": _chip,
    "lit": lambda text: examples_html([example([text.encode()])], 1.0),
    "silent": _silent,
    "preview": lambda text: feature_rows._preview(example([text.encode()])),
    "promoted": lambda text: feature_effect._token_rows("Promotes", [PromotedToken(text, 1.0, 2.0)]),
    "effect": lambda text: effect_html(_effect(text)),
    "generated": lambda text: drafts_html([Continuation(0, 0, None, False, text, (1,), (text.encode(),))], ""),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_character_is_seen_in_every_place(kind, place):
    tokenizer = _tokenizer(kind, SHOWN)
    for char, shown in SHOWN.items():
        index = _id(tokenizer, KINDS[kind][1](char))
        text = token_bytes(tokenizer, [index])[index].decode()
        assert text == char, (kind, hex(ord(char)))
        markup = PLACES[place](text)
        if place == "generated" and char == "\n":
            assert "<br>" in markup
            continue
        assert escape(char) in markup or shown in Page(markup).text
        assert shown in Page(markup).text
        if shown != char and not shown.endswith(char):
            assert char not in Page(markup).text.replace("doc\xa03\u2009:\u20097", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" ", "  ", "   ", " the", "the", "a b"])
def test_spaces_are_spaces_and_dots_in_chips(kind, text):
    """Whether learnt or added as tokens of their own, as Gemma's runs of spaces are."""
    spelled = KINDS[kind][1](text)
    learnt = _tokenizer(kind, [text])
    added = _tokenizer(kind, [], [AddedToken(spelled, normalized=False, special=False)])
    for tokenizer in (learnt, added):
        index = _id(tokenizer, spelled)
        assert token_bytes(tokenizer, [index]) == {index: text.encode()}
    assert Page(_chip(text)).text == text.replace(" ", "\u00b7") + "+1.0, +2.00"


@pytest.mark.parametrize(
    "kind, piece, expected",
    [
        ("byte-level", "\u2581", "\u2581".encode()),  # a block that stands in the text
        ("byte-level", "\xe6", b"\xe6"),
        ("byte-level", "<0xE6>", b"<0xE6>"),
        ("metaspace", "<0xE6>", b"<0xE6>"),  # without byte fallback these are six letters
        ("gemma", "<0xE6>", b"\xe6"),
        ("llama", "<0x0A>", b"\n"),
        ("gemma", "\u2581\u2581\u2581", b"   "),
        ("wordpiece", "the", b" the"),
        ("wordpiece", "##re", b"re"),
        ("word endings", "the</w>", b"the "),
        ("word endings", "th", b"th"),
    ],
)
def test_pieces_are_read_as_the_decoder_reads_them(kind, piece, expected):
    spelled = piece if piece != "\u2581" else KINDS[kind][1](piece)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, spelled: 1}, unk_token="[UNK]"))
    tokenizer.decoder = KINDS[kind][0]
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [1]) == {1: expected}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_shown_as_written(kind):
    special = "<\uff5cbegin\u2581of\u2581text\uff5c>"
    tokenizer = _tokenizer(kind, ["a"], [AddedToken(special, special=True, normalized=False)])
    index = _id(tokenizer, special)
    assert token_bytes(tokenizer, [index, 10_000]) == {index: special.encode(), 10_000: b"<|10000|>"}


@pytest.mark.parametrize(
    "text, shown",
    [
        ("e\u0301", "e\u0301"),  # a mark on its base is left alone, stacked ones too
        ("e\u0301\u0302", "e\u0301\u0302"),
        (" \u0301", " \u25cc\u0301"),
        ("\n\u0301", "\u21b5\u25cc\u0301"),
        ("\u0939\u093f\u0928", "\u0939\u093f\u0928"),
        ("\u2764\ufe0f", "\u2764\u27e8U+FE0F\u27e9"),
    ],
)
def test_combining_marks_keep_their_base(text, shown):
    assert visible(text) == shown


def test_silent_tokens_are_one_text_in_which_marks_keep_their_base():
    text = "\u0939\u093f"
    pieces = [b"x", *(char.encode() for char in text)]
    shown = example(pieces, [1.0, 0.0, 0.0])
    assert text in Page(examples_html([shown], 1.0)).text
    assert text in Page(feature_rows._preview(shown)).text and text in example_line(shown)
