"""What can be asked for a label: any address that speaks OpenAI's chat protocol, or a language model that is loaded here."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from saelab.errors import SaelabError

_RETRIED = (429, 500, 502, 503, 504)
_MAX_ANSWER = 100_000
"""Bytes that are read of an answer."""

Messages = Sequence[dict[str, str]]


@runtime_checkable
class Explainer(Protocol):
    """Answers a conversation. `name` is recorded with every label."""

    @property
    def name(self) -> str: ...
    def ask(self, messages: Messages, max_tokens: int) -> str:
        """The answer's text. Raises `SaelabError` saying why there is none."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """A server of OpenAI's protocol at `address` (".../v1"). The key, if it needs one, is read from the environment variable
    `key_variable` at every call, and is neither stored nor shown."""

    address: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 4

    @property
    def name(self) -> str:
        return f"{self.model} at {self.address}"

    def ask(self, messages: Messages, max_tokens: int) -> str:
        """The answer's text; a busy or failing server is asked again, up to `attempts` times with growing pauses."""
        body = json.dumps({"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0})
        for attempt in range(self.attempts):
            try:
                return _content(self._post(body.encode()), self.address)
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED or attempt + 1 == self.attempts:
                    raise SaelabError(f"{self.address} refused the request ({error.code} {error.reason}).") from error
            except OSError as error:
                if attempt + 1 == self.attempts:
                    raise SaelabError(
                        f"{self.address} did not answer ({error}): is a server running there, within {self.timeout:g} s?"
                    ) from error
            time.sleep(0.5 * 2**attempt)
        raise SaelabError(f"{self.address}: attempts={self.attempts} must be 1 or more.")

    def _post(self, body: bytes) -> bytes:
        if not self.address.startswith(("http://", "https://")):
            raise SaelabError(f"address={self.address!r} must begin with http:// or https://.")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.address.rstrip('/')}/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read(_MAX_ANSWER)


def _content(answer: bytes, address: str) -> str:
    try:
        return str(json.loads(answer)["choices"][0]["message"]["content"] or "").strip()
    except (ValueError, KeyError, IndexError, TypeError) as error:
        shown = answer[:80].decode("utf-8", "replace").replace("\n", " ")
        raise SaelabError(
            f"{address} answered with something else than a chat completion ({shown!r}): is it the address of a server of "
            "OpenAI's protocol, ending in /v1?"
        ) from error


@dataclass(frozen=True)
class LocalModel:
    """A `saelab.models.LanguageModel` with a chat template."""

    lm: Any

    @property
    def name(self) -> str:
        return str(self.lm.name)

    def ask(self, messages: Messages, max_tokens: int) -> str:
        """The answer's text, greedily."""
        template = getattr(self.lm.tokenizer, "apply_chat_template", None)
        if template is None or not self.lm.tokenizer.chat_template:
            raise SaelabError(
                f"{self.lm.name} has no chat template: choose a model that was trained to follow instructions."
            )
        ids = template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=False)
        generated = self.lm.generate_ids(ids, max_tokens)
        return self.lm.tokenizer.decode(generated.ids[generated.n_prompt :], skip_special_tokens=True).strip()
