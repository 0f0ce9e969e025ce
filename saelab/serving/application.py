"""The addresses of the server, as an ASGI application: the models, chats and completions."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Route

from saelab.errors import explain
from saelab.serving.asked import Asked, Bounds, Kind, asked, parsed
from saelab.serving.formats import Answer, Chat, Text
from saelab.serving.guard import Guard, read_body
from saelab.serving.plans import Plans
from saelab.serving.refused import Refused
from saelab.serving.responses import Complete, Response, Stream, send_json, send_refusal
from saelab.serving.worker import Event, Job, Worker
from saelab.steering import Plan
from saelab.tokens.tokenizing import text_ids


class Requests:
    """Makes jobs of requests. The tokenizer is a copy: the model's works in another thread."""

    def __init__(self, lm: Any, plans: Plans, bounds: Bounds) -> None:
        self.lm, self.plans, self.bounds = lm, plans, bounds
        self.tokenizer = copy.deepcopy(lm.tokenizer)
        self.model = Path(lm.name).name if Path(lm.name).is_dir() else lm.name

    @property
    def models(self) -> list[str]:
        """What a request may name as its model: the language model, and the presets."""
        return [self.model, *(name for name in self.plans.names if name != self.model)]

    def job(self, request: Asked) -> Job:
        """A request as a job that tells nobody yet. Raises `Refused` naming what cannot be met."""
        plan = self._plan(request)
        prompts = [
            self._ids(prompt) for prompt in ([self._chat(request)] if request.kind == "chat" else request.prompts)
        ]
        room = self.lm.max_ctx - max(map(len, prompts))
        max_tokens = min(self.bounds.max_tokens, room) if request.max_tokens is None else request.max_tokens
        if max_tokens > room or room < 1:
            raise Refused(
                f"{self.lm.max_ctx - room} tokens of prompt and max_tokens={max_tokens} exceed the context of {self.model}, "
                f"{self.lm.max_ctx} tokens.",
                param="max_tokens" if room > 0 else None,
                code="context_length_exceeded",
            )
        how = (max_tokens, request.temperature, request.seed, request.n, request.stop, request.n_top)
        return Job(prompts, plan, *how, tell=lambda event: None)

    def _plan(self, request: Asked) -> Plan | None:
        plan = None if request.model == self.model else self.plans.preset(request.model)
        if plan is None and request.model != self.model:
            known = ", ".join(self.models)
            raise Refused(
                f"The model {request.model[:80]!r} does not exist; there: {known}.", 404, "model", "model_not_found"
            )
        if request.steering is None:
            return plan
        if plan is not None:
            raise Refused(
                f"The preset {request.model} steers already: give steering with {self.model}.", 400, "steering"
            )
        plan = self.plans.of_request(request.steering)
        if plan.positions is not None and len(plan.positions) > self.lm.max_ctx:
            raise Refused("steering: the plan names more positions than the context has.", 400, "steering")
        return plan

    def _chat(self, request: Asked) -> str:
        try:
            return self.lm.chat(request.messages)
        except Exception as error:  # a template may refuse an order of roles, in its own words
            raise Refused(explain(error) or f"The chat template failed: {error}.", param="messages") from error

    def _ids(self, prompt: str | list[int]) -> list[int]:
        try:
            ids = text_ids(prompt, self.tokenizer) if isinstance(prompt, str) else prompt
            if len(ids) <= self.lm.max_ctx:
                self.lm.to_ids(ids)
            return ids
        except ValueError as error:
            raise Refused(str(error), param="prompt") from error


class Addresses:
    """The functions behind the addresses."""

    def __init__(self, requests: Requests, worker: Worker) -> None:
        self.requests, self.worker = requests, worker
        self.begun, self._one_at_a_time = int(time.time()), asyncio.Lock()

    async def models(self, scope: Any, receive: Any, send: Any) -> None:
        """All models, or the one that is named."""
        listed = [
            {"id": name, "object": "model", "created": self.begun, "owned_by": "saelab"}
            for name in self.requests.models
        ]
        name = scope["path_params"].get("name")
        if name is None:
            await send_json(send, {"object": "list", "data": listed})
            return
        found = [one for one in listed if one["id"] == name]
        if not found:
            raise Refused(f"The model {name[:80]!r} does not exist.", 404, "model", "model_not_found")
        await send_json(send, found[0])

    async def chat(self, scope: Any, receive: Any, send: Any) -> None:
        """`/v1/chat/completions`."""
        await self._answer("chat", scope, receive, send)

    async def text(self, scope: Any, receive: Any, send: Any) -> None:
        """`/v1/completions`."""
        await self._answer("text", scope, receive, send)

    async def _answer(self, kind: Kind, scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(receive, self.requests.bounds.body_bytes)
        request = asked(kind, parsed(body), self.requests.bounds)
        async with self._one_at_a_time:
            job = await asyncio.to_thread(self.requests.job, request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        job.tell = tell
        shared = self.worker, job, events, Answer(Chat() if kind == "chat" else Text(), request.model)
        response: Response = Stream(*shared, tell_usage=request.tell_usage) if request.stream else Complete(*shared)
        await response(scope, receive, send)


def application(requests: Requests, worker: Worker, token: str, hosts: Sequence[str]) -> Any:
    """The ASGI application. `hosts` are the names by which clients call it; others are refused, against DNS rebinding."""
    addresses = Addresses(requests, worker)
    posts = {"/v1/chat/completions": addresses.chat, "/v1/completions": addresses.text}
    routes = [
        Route("/v1/models", _App(addresses.models), methods=["GET"]),
        Route("/v1/models/{name:path}", _App(addresses.models), methods=["GET"]),
        *(Route(path, _App(function), methods=["POST"]) for path, function in posts.items()),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(Guard, token=token),
        ],
        exception_handlers={HTTPException: _no_such_address},
    )


class _App:
    """An ASGI application of one function, which may raise `Refused`."""

    def __init__(self, function: Any) -> None:
        self.function = function

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.function(scope, receive, send)
        except Refused as refused:
            await send_refusal(send, refused)


async def _no_such_address(request: Any, error: Exception) -> Any:
    assert isinstance(error, HTTPException)
    said = f"{error.detail}: there are GET /v1/models, POST /v1/chat/completions and POST /v1/completions."
    return _Sends(Refused(said, error.status_code))


class _Sends:
    def __init__(self, refused: Refused) -> None:
        self.refused = refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send_refusal(send, self.refused)
