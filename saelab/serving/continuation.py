"""One text while it is generated: what of it can be told already, where a stop word ends it, and its log-probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.features.token_text import token_bytes

_LOWEST = -9999.0
"""Told instead of a log-probability below it: JSON has no infinity."""
_CLEANED = 4
"""Characters at the end of a text that a tokenizer which joins "do n't" to "don't" may still change."""


class Token(NamedTuple):
    """A generated token, with what it could have been."""

    begin: int
    """Where in the generated text it begins, in characters."""
    text: bytes
    logprob: float
    """In nats, from the logits before temperature."""
    top: tuple[tuple[bytes, float], ...]
    """The most likely tokens and their log-probabilities, from the most likely on."""


class Piece(NamedTuple):
    """What can be told of a text after another token."""

    text: str
    tokens: tuple[Token, ...]
    """Those that begin in it, if log-probabilities were asked for."""


class Continuation:
    """The generated text of one prompt: that of `lm.generate`, up to the first of the `stop` words."""

    def __init__(self, lm: Any, n_prompt: int, stop: tuple[str, ...] = (), n_top: int | None = None) -> None:
        self.lm, self.n_prompt, self.stop, self.n_top = lm, n_prompt, stop, n_top
        self.n_new, self.reason = 0, ""
        self._start: int | None = None
        self._told, self._before = 0, ""
        self._tokens: list[Token] = []
        cleans = getattr(lm.tokenizer, "clean_up_tokenization_spaces", False)
        self._held = _CLEANED if cleans else 0

    def add(self, ids: Int[Tensor, " n_tokens"], logits: Float[Tensor, " vocab"], is_last: bool) -> Piece | None:
        """The next piece after one more token: `ids` are those of the prompt and all new ones, `logits` those that the last was
        chosen from. `reason` says whether the text has ended: with "stop" at a stop word or EOS, or with "length"."""
        self.n_new += 1
        last, generated = int(ids[-1]), self._text(ids)
        stable = generated.rstrip("\ufffd")  # a character whose last bytes are still missing
        if self.n_top is not None and last not in self.lm.stop_ids:
            self._tokens.append(self._token(last, self._begin(generated), logits))
        self._before = generated
        found = [at for at in (stable.find(word) for word in self.stop) if at >= 0]
        if found:
            self.reason = "stop"
            return self._piece(stable, max(min(found), self._told), all_tokens=False)
        if is_last or last in self.lm.stop_ids:
            self.reason = "stop" if last in self.lm.stop_ids else "length"
            return self._piece(generated, len(generated), all_tokens=True)
        return self._piece(stable, self._ready(stable), all_tokens=False)

    def _text(self, ids: Tensor) -> str:
        decode = self.lm.tokenizer.decode
        if self._start is None:
            self._start = len(decode(ids[: self.n_prompt], skip_special_tokens=True))
        return decode(ids, skip_special_tokens=True)[self._start :]

    def _begin(self, text: str) -> int:
        """Where the last token of `text` begins: behind all before it, or where it completes a character."""
        return len(self._before if text.startswith(self._before) else self._before.rstrip("\ufffd"))

    def _ready(self, text: str) -> int:
        """The length that neither a stop word nor the tokenizer can take back."""
        begun = [n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])]
        return max(len(text) - max([self._held, *begun]), self._told)

    def _piece(self, text: str, until: int, all_tokens: bool) -> Piece | None:
        n = len(self._tokens) if all_tokens else sum(token.begin < until for token in self._tokens)
        tokens, self._tokens = tuple(self._tokens[:n]), self._tokens[n:]
        piece = Piece(text[self._told : until], tokens)
        self._told = until
        return piece if piece.text or tokens else None

    def _token(self, token: int, begin: int, logits: Tensor) -> Token:
        logprobs = torch.log_softmax(logits.float(), dim=-1).clamp_min(_LOWEST)
        top = logprobs.topk(min(self.n_top or 0, len(logprobs)))
        texts = token_bytes(self.lm.tokenizer, [token, *top.indices.tolist()])
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Token(begin, texts[token], float(logprobs[token]), tuple((texts[i], p) for i, p in pairs))
