"""Tokenising documents and prompts, with one rule for what is put in front of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from saelab.tokens.documents import Document, is_table, whole_numbers
from saelab.tokens.sources import without_lone_surrogates

Bos = bool | Sequence[int] | None
"""Whether contexts begin with BOS, or the ids that they begin with; None follows the tokenizer."""
_PROBES = ("a", "the", "0", "A text.")


def context_start(lm_or_tokenizer: Any, prepend_bos: Bos = None) -> list[int]:
    """Ids that every context and every prompt begins with.

    None: what the tokenizer itself puts in front of a text (nothing without a tokenizer). What it appends, such as EOS,
    would end the text before a model continues it, and is always left out.
    Raises `ValueError` for `True` without a BOS token.
    """
    tokenizer = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer)
    if prepend_bos is None:
        return [] if tokenizer is None else _added(tokenizer)[0]
    check_bos(prepend_bos)
    if not isinstance(prepend_bos, bool):
        return list(prepend_bos)
    if not prepend_bos:
        return []
    bos = getattr(lm_or_tokenizer, "bos_id", getattr(tokenizer, "bos_token_id", None))
    if bos is None:
        raise ValueError("prepend_bos=True, but the tokenizer has no BOS token: use prepend_bos=False.")
    return [bos]


def check_bos(prepend_bos: Any) -> None:
    """Raise `ValueError` unless it is True, False, None, or a list of token ids."""
    listed = isinstance(prepend_bos, list | tuple) and whole_numbers(prepend_bos) is not None
    if prepend_bos is not None and not isinstance(prepend_bos, bool) and not listed:
        raise ValueError(
            f"prepend_bos={prepend_bos!r} must be True, False, None (as the tokenizer does), or a list of ids."
        )


def resolved_bos(lm: Any, prepend_bos: Bos) -> bool | list[int]:
    """`prepend_bos` as it is recorded: a bool, or the ids if the tokenizer begins texts with something other than BOS."""
    check_bos(prepend_bos)
    if prepend_bos is not None:
        return prepend_bos if isinstance(prepend_bos, bool) else list(prepend_bos)
    start = context_start(lm)
    return start if start and start != [lm.bos_id] else bool(start)


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and after it."""
    for probe in (*_PROBES, *_of_its_vocabulary(tokenizer)):
        bare, full = _ids(tokenizer, probe, add_special_tokens=False), _ids(tokenizer, probe)
        for start in range(len(full) - len(bare) + 1) if bare else ():
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    return [], []


def to_continue(rows: list[Tensor], tokenizer: Any) -> list[Tensor]:
    """Ids `(n)` of a tokenizer's output without what it appends to a text, such as EOS, which would end the text."""
    end = [] if tokenizer is None else _added(tokenizer)[1]
    n = len(end)
    return [row[:-n] if n and len(row) > n and row[-n:].tolist() == end else row for row in rows]


def _of_its_vocabulary(tokenizer: Any, n: int = 50) -> Iterator[str]:
    """Texts of single tokens, for a tokenizer without Latin letters."""
    if not hasattr(tokenizer, "__len__"):  # a custom tokenizer
        return
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(min(len(tokenizer), 20 * n)) if index not in special]
    yield from (tokenizer.decode([index]) for index in ordinary[-n:])


def tokenizer_probe(tokenizer: Any) -> list[int]:
    """Ids of a text with the features in which tokenizers differ, including written-out special tokens."""
    special = getattr(tokenizer, "all_special_tokens", ())
    text = f"A text, \u00e9t\u00e9  1234 \u043f\u043e {' '.join(special)}"
    return _ids(tokenizer, text, add_special_tokens=False)


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer([text], **options)["input_ids"][0])


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, preceded by the tokenizer's own prefix, which is never doubled (chat templates write it out).

    Raises `ValueError` for an empty text, and without a tokenizer.
    """
    check_tokenizer(tokenizer)
    ids = _ids(tokenizer, without_lone_surrogates(text), add_special_tokens=False) if text else []
    if not ids:
        raise ValueError(f"The prompt {text!r} is empty; give at least one token of text.")
    start = context_start(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ValueError` if there is no tokenizer to read texts with."""
    if tokenizer is None:
        raise ValueError("This model has no tokenizer: give token ids, or use load_model(model, tokenizer).")


def render(tokenizer: Any, messages: Sequence[Any]) -> str:
    """A conversation rendered with the tokenizer's chat template. Raises `ValueError` for anything but messages."""
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'{repr(message)[:60]} is not a message: expected {{"role": ..., "content": ...}}.')
    return tokenizer.apply_chat_template(list(messages), tokenize=False)


def eos_and_start(lm_or_tokenizer: Any, ctx_len: int, batch_size: int, prepend_bos: Bos) -> tuple[int, list[int]]:
    """The id that ends a document and those that begin a context. Raises `ValueError` as `tokens.pack` does."""
    tokenizer = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer)
    eos = getattr(lm_or_tokenizer, "eos_id", None)
    eos = getattr(tokenizer, "eos_token_id", None) if eos is None else eos
    start = context_start(lm_or_tokenizer, prepend_bos)
    if eos is None:
        whose, where = (
            ("model", "model.config.eos_token_id") if tokenizer is None else ("tokenizer", "tokenizer.eos_token")
        )
        raise ValueError(f"the {whose} has no EOS token, which separates documents: set {where}.")
    minimum = 1 + len(start)
    if ctx_len < minimum or batch_size < 1:
        raise ValueError(
            f"ctx_len={ctx_len}, batch_size={batch_size}: ctx_len must be at least {minimum}, batch_size 1."
        )
    return eos, start


def tokenized(
    documents: Any,
    lm_or_tokenizer: Any,
    start: list[int],
    eos: int,
    on_document: Callable[[int, Document], None] | None,
) -> Iterator[list[int]]:
    """Token ids of each non-empty document, tokenised in groups; `on_document(index, document)` is called before they are
    yielded. A leading `start` is dropped, and an `eos` at the end of a document given as ids."""
    tokenizer, index = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer), 0
    if isinstance(documents, str | bytes | Mapping) or is_table(documents):
        raise ValueError(
            f'documents is a {type(documents).__name__}: give a list of documents, or load_texts(...).documents("all").'
        )
    for group in _groups(documents):
        for document, ids in zip(group, _group_ids(group, tokenizer), strict=True):
            ids = ids[len(start) :] if start and ids[: len(start)] == start else ids
            ids = ids[:-1] if not isinstance(document, str) and ids and ids[-1] == eos else ids
            if ids:
                if on_document is not None:
                    on_document(index, document)
                index += 1
                yield ids


def _group_ids(group: list[Document], tokenizer: Any) -> Iterator[list[int]]:
    """Ids of each document of a group, whose texts are tokenised in one call."""
    texts = [without_lone_surrogates(document) for document in group if isinstance(document, str)]
    found: Iterator[list[int]] = iter(())
    if texts:
        check_tokenizer(tokenizer)
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        # verbose would warn about documents longer than the context
        found = iter(tokenizer(texts, verbose=False, **options)["input_ids"])
    for document in group:
        yield next(found) if isinstance(document, str) else document


def _groups(
    documents: Iterable[Document], max_documents: int = 64, max_size: int = 200_000
) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == max_documents or sum(map(len, group)) >= max_size:
            yield group
            group = []
    if group:
        yield group


def special_tokens(tokenizer: Any, model: Any) -> tuple[int | None, int | None, tuple[int, ...]]:
    """BOS, EOS, and every special id, ascending: as the tokenizer marks them, or, without one, as the model's config does."""
    if tokenizer is None:
        special = _of_config(getattr(model, "config", None) or getattr(model, "cfg", None))
        return special.get("bos"), special.get("eos"), tuple(sorted(set(special.values())))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {index for index, token in added.items() if getattr(token, "special", False)}
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tuple(sorted(marked | set(tokenizer.all_special_ids)))


def _of_config(config: Any) -> dict[str, int]:
    found = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    first = {name: value[0] if isinstance(value, list | tuple) and value else value for name, value in found.items()}
    return {name: value for name, value in first.items() if isinstance(value, int) and value >= 0}
