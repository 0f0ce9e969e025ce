"""Answers in OpenAI's form: of chats and of completions, at once and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from saelab.serving.continuation import Token
from saelab.serving.worker import Ended


class Chat:
    """Answers of `/v1/chat/completions`."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, text: str, tokens: Sequence[Token] | None) -> dict[str, Any]:
        """A complete text."""
        return {"message": {"role": "assistant", "content": text}, "logprobs": self.logprobs(tokens)}

    def delta(self, text: str, tokens: Sequence[Token] | None, begins: bool) -> dict[str, Any]:
        """A piece of a text."""
        role = {"role": "assistant"} if begins else {}
        content = {"content": text} if text or begins else {}
        return {"delta": role | content, "logprobs": self.logprobs(tokens or None)}

    def logprobs(self, tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        """None where they were not asked for."""
        if tokens is None:
            return None
        told = [
            _entry(one.text, one.logprob) | {"top_logprobs": [_entry(text, logprob) for text, logprob in one.top]}
            for one in tokens
        ]
        return {"content": told, "refusal": None}


class Text:
    """Answers of `/v1/completions`."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl-"

    def choice(self, text: str, tokens: Sequence[Token] | None) -> dict[str, Any]:
        """A complete text."""
        return {"text": text, "logprobs": self.logprobs(tokens)}

    def delta(self, text: str, tokens: Sequence[Token] | None, begins: bool) -> dict[str, Any]:
        """A piece of a text."""
        return {"text": text, "logprobs": self.logprobs(tokens or None)}

    def logprobs(self, tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        """None where they were not asked for."""
        if tokens is None:
            return None
        return {
            "tokens": [_name(one.text) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [_by_name(one) for one in tokens],
            "text_offset": [one.begin for one in tokens],
        }


class Answer:
    """The parts that all chunks of an answer share."""

    def __init__(self, form: Chat | Text, model: str) -> None:
        self.form, self.model = form, model
        self.id, self.created = form.prefix + uuid.uuid4().hex, int(time.time())

    def complete(self, choices: list[dict[str, Any]], n_prompt: int, n_new: int) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        return self._with(self.form.object, choices) | {"usage": usage(n_prompt, n_new)}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return self._with(self.form.chunk_object, choices)

    def _with(self, object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices}


def usage(n_prompt: int, n_new: int) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def ending(ended: Ended) -> dict[str, Any]:
    """How a text ended; under "saelab" its seed and what steering changed, which is not in OpenAI's protocol."""
    report = [one._asdict() for one in ended.report]
    return {"finish_reason": ended.reason, "saelab": {"seed": ended.seed, "report": report}}


def _entry(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode(errors="replace"), "bytes": list(text), "logprob": logprob}


def _name(text: bytes) -> str:
    """A token in the older form, which has no bytes: those of half a character are written out."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _by_name(token: Token) -> dict[str, float]:
    return {_name(text): logprob for text, logprob in token.top} | (
        {_name(token.text): token.logprob} if token.top else {}
    )
