"""What a request asks for: its JSON, checked. A parameter that is unknown, or that would have no effect, is refused by name."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from saelab.serving.refused import Refused
from saelab.tokens.documents import whole_numbers

Kind = Literal["chat", "text"]
MOST_STOPS, MOST_TOP, MOST_SEED = 4, {"chat": 20, "text": 5}, 2**63 - 1
_BOTH = {"model", "max_tokens", "temperature", "seed", "n", "stop", "stream", "stream_options", "steering", "logprobs"}
_KNOWN = {"chat": _BOTH | {"messages", "max_completion_tokens", "top_logprobs"}, "text": _BOTH | {"prompt"}}
_NO_EFFECT = {
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "tools": [],
    "response_format": {"type": "text"},
}
"""Parameters of the protocol that are not supported, with the value that asks for nothing."""
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Bounds:
    """How much a request may ask for."""

    body_bytes: int = 4 * 2**20
    n: int = 16
    """Texts: prompts times `n`."""
    max_tokens: int = 1024
    """New tokens of each text."""
    waiting: int = 32
    """Requests in the queue."""


@dataclass(frozen=True)
class Asked:
    """A request."""

    kind: Kind
    model: str
    messages: list[dict[str, str]]
    """Of a chat."""
    prompts: list[str | list[int]]
    """Of a completion, as texts or token ids."""
    max_tokens: int | None
    temperature: float
    seed: int
    n: int
    stop: tuple[str, ...]
    stream: bool
    tell_usage: bool
    n_top: int | None
    """Most likely tokens to tell beside each token; None: no log-probabilities at all."""
    steering: Any
    """A plan as JSON, None without any."""


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises `Refused` for anything else."""
    try:
        told = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The body of the request is no JSON: {error}.") from error
    if not isinstance(told, dict):
        raise Refused(f"The body of the request is a {type(told).__name__}; expected an object.")
    return told


def asked(kind: Kind, told: Mapping[str, Any], bounds: Bounds) -> Asked:
    """A request for a chat or a completion. Raises `Refused` naming the parameter and what was expected."""
    for name, value in told.items():
        if name not in _KNOWN[kind] and not (name in _NO_EFFECT and value in (None, _NO_EFFECT[name])):
            known = ", ".join(sorted(_KNOWN[kind]))
            raise Refused(f"{name[:80]!r} is not supported here; a request may have {known}.", param=name[:80])
    given = {name: value for name, value in told.items() if value is not None}
    prompts = _prompts(given.get("prompt")) if kind == "text" else []
    n = _integer(given, "n", 1, bounds.n) or 1
    if n * max(1, len(prompts)) > bounds.n:
        raise Refused(f"{len(prompts)} prompts with n={n} ask for over {bounds.n} texts; send fewer.", param="n")
    temperature = given.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise Refused(f"temperature={_short(temperature)}; expected a number from 0 to 2.", param="temperature")
    if n > 1 and temperature == 0:
        raise Refused(
            f"n={n} at temperature 0 would be the same text {n} times: give a temperature above 0.", param="n"
        )
    seed = _integer(given, "seed", 0, MOST_SEED - n)
    return Asked(
        kind=kind,
        model=_model(given),
        messages=_messages(given.get("messages")) if kind == "chat" else [],
        prompts=prompts,
        max_tokens=_max_tokens(kind, given, bounds),
        temperature=float(temperature),
        seed=secrets.randbelow(2**31) if seed is None else seed,
        n=n,
        stop=_stops(given.get("stop", [])),
        stream=_flag(given, "stream"),
        tell_usage=_tell_usage(given),
        n_top=_n_top(kind, given),
        steering=given.get("steering"),
    )


def _model(given: Mapping[str, Any]) -> str:
    if not isinstance(given.get("model"), str):
        raise Refused("The request names no model; /v1/models lists them.", param="model")
    return given["model"]


def _messages(told: Any) -> list[dict[str, str]]:
    if not isinstance(told, list) or not told:
        raise Refused('messages must be a list such as [{"role": "user", "content": "Hello"}].', param="messages")
    return [_message(one) for one in told]


def _message(one: Any) -> dict[str, str]:
    if not isinstance(one, dict) or one.get("role") not in _ROLES:
        raise Refused(f"{_short(one)} is no message: its role is one of {', '.join(_ROLES)}.", param="messages")
    if unknown := sorted(name for name, value in one.items() if name not in ("role", "content") and value is not None):
        raise Refused(f"A message has {unknown[0][:80]!r}; it may have role and content.", param="messages")
    content = one.get("content")
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(f"{_short(part)}: content may be text only.", param="messages")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused(f"content={_short(content)}; expected a text.", param="messages")
    return {"role": one["role"], "content": content}


def _prompts(told: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids."""
    if isinstance(told, str) or whole_numbers(told) is not None:
        return [told]
    listed = told if isinstance(told, list) else []
    is_text = [isinstance(one, str) for one in listed]
    if listed and (all(is_text) or all(whole_numbers(one) is not None for one in listed)):
        return listed
    raise Refused(f"prompt={_short(told)}; expected a text, token ids, or a list of either.", param="prompt")


def _max_tokens(kind: Kind, given: Mapping[str, Any], bounds: Bounds) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(names) > 1:
        raise Refused("max_tokens and max_completion_tokens mean the same: give one of them.", param="max_tokens")
    found = _integer(given, names[0] if names else "max_tokens", 1, bounds.max_tokens)
    return min(16, bounds.max_tokens) if found is None and kind == "text" else found


def _stops(told: Any) -> tuple[str, ...]:
    listed = [told] if isinstance(told, str) else told
    if (
        not isinstance(listed, list)
        or len(listed) > MOST_STOPS
        or not all(isinstance(one, str) and one for one in listed)
    ):
        raise Refused(f"stop={_short(told)}; expected a text, or up to {MOST_STOPS} of them.", param="stop")
    return tuple(listed)


def _n_top(kind: Kind, given: Mapping[str, Any]) -> int | None:
    if kind == "text":
        return _integer(given, "logprobs", 0, MOST_TOP[kind])
    n_top = _integer(given, "top_logprobs", 0, MOST_TOP[kind])
    if _flag(given, "logprobs"):
        return n_top or 0
    if n_top is not None:
        raise Refused("top_logprobs needs logprobs=true.", param="top_logprobs")
    return None


def _tell_usage(given: Mapping[str, Any]) -> bool:
    options = given.get("stream_options", {})
    if "stream_options" in given and not _flag(given, "stream"):
        raise Refused("stream_options needs stream=true.", param="stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise Refused(f"stream_options={_short(options)}; it may have include_usage.", param="stream_options")
    return _flag(options, "include_usage")


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refused(f"{name}={_short(value)}; expected true or false.", param=name)
    return value


def _integer(given: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(f"{name}={_short(value)}; expected a whole number from {low} to {high}.", param=name)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _short(value: Any) -> str:
    return repr(value)[:80]
