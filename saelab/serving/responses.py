"""The answer to a request as an ASGI response, at once or as a stream. A client that goes away takes its request along."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from saelab.serving.continuation import Token
from saelab.serving.formats import Answer, ending, usage
from saelab.serving.refused import Refused
from saelab.serving.worker import Ended, Event, Job, Told, Worker

PATIENCE = 5.0
"""Seconds for which a stream waits for its first event, so that an error has its status; then it sends a comment that often."""


async def send_json(send: Any, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """Send a complete response."""
    body = json.dumps(content, allow_nan=False).encode("ascii")
    await _start(send, status, "application/json", {"content-length": str(len(body))} | dict(headers or {}))
    await send({"type": "http.response.body", "body": body})


async def send_refusal(send: Any, refused: Refused) -> None:
    """Send an error in the protocol's form."""
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "5"}}.get(refused.status)
    await send_json(send, refused.content(), refused.status, headers)


class Response:
    """An ASGI application that puts a job into the queue and sends what comes of it."""

    def __init__(self, worker: Worker, job: Job, events: asyncio.Queue[Event], answer: Answer) -> None:
        self.worker, self.job, self.events, self.answer = worker, job, events, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work, gone = asyncio.ensure_future(self._respond(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.worker.cancel(self.job)
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _respond(self, send: Any) -> None:
        try:
            self.worker.submit(self.job)
            await self.send(send)
        except Refused as refused:
            await send_refusal(send, refused)

    async def send(self, send: Any) -> None:
        """Send the response. Raises `Refused` before it has begun."""
        raise NotImplementedError

    async def event(self) -> Told | Ended | None:
        """The next event. Raises `Refused` where the request has failed."""
        event = await self.events.get()
        if isinstance(event, Refused):
            raise event
        return event


class Complete(Response):
    """All texts of a request, once the last is complete."""

    async def send(self, send: Any) -> None:
        texts: dict[int, str] = {}
        tokens: dict[int, list[Token]] = {}
        ended: dict[int, Ended] = {}
        while (event := await self.event()) is not None:
            if isinstance(event, Ended):
                ended[event.choice] = event
                continue
            texts[event.choice] = texts.get(event.choice, "") + event.piece.text
            tokens.setdefault(event.choice, []).extend(event.piece.tokens)
        asked = self.job.n_top is not None
        choices = [
            {
                "index": i,
                **self.answer.form.choice(texts.get(i, ""), tokens.get(i, []) if asked else None),
                **ending(end),
            }
            for i, end in ended.items()
        ]
        n_prompt, n_new = sum(map(len, self.job.prompts)), sum(end.n_new for end in ended.values())
        await send_json(send, self.answer.complete(choices, n_prompt, n_new))


class Stream(Response):
    """The texts of a request as server-sent events. One that fails after it has begun ends with an event that says why."""

    def __init__(self, *args: Any, tell_usage: bool) -> None:
        super().__init__(*args)
        self.tell_usage, self.n_new = tell_usage, 0
        self.begun = set[int]()

    async def send(self, send: Any) -> None:
        next_event = asyncio.ensure_future(self.event())
        try:
            await asyncio.wait({next_event}, timeout=PATIENCE)
            if next_event.done():
                next_event.result()
            await _start(send, 200, "text/event-stream", {"cache-control": "no-store"})
            await self._send_events(send, next_event)
        finally:
            next_event.cancel()

    async def _send_events(self, send: Any, next_event: asyncio.Future[Told | Ended | None]) -> None:
        try:
            while True:
                while not (await asyncio.wait({next_event}, timeout=PATIENCE))[0]:
                    await _send_line(send, f": {self.worker.n_before(self.job)} requests before this one")
                event = next_event.result()
                if event is None:
                    break
                await _send_data(send, self.answer.chunk([self._choice(event)]))
                next_event = asyncio.ensure_future(self.event())
            if self.tell_usage:
                counts = usage(sum(map(len, self.job.prompts)), self.n_new)
                await _send_data(send, self.answer.chunk([]) | {"usage": counts})
            await _send_line(send, "data: [DONE]")
        except Refused as refused:
            await _send_data(send, refused.content())
        finally:
            next_event.cancel()
        await send({"type": "http.response.body", "body": b""})

    def _choice(self, event: Told | Ended) -> dict[str, Any]:
        begins = event.choice not in self.begun
        self.begun.add(event.choice)
        if isinstance(event, Ended):
            self.n_new += event.n_new
            return {"index": event.choice, **self.answer.form.delta("", None, begins), **ending(event)}
        delta = self.answer.form.delta(event.piece.text, event.piece.tokens, begins)
        return {"index": event.choice, **delta, "finish_reason": None}


async def _gone(receive: Any) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Any, status: int, kind: str, headers: Mapping[str, str]) -> None:
    told = {"content-type": kind, "x-content-type-options": "nosniff"} | dict(headers)
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def _send_data(send: Any, content: Any) -> None:
    await _send_line(send, "data: " + json.dumps(content, allow_nan=False))


async def _send_line(send: Any, line: str) -> None:
    await send({"type": "http.response.body", "body": f"{line}\n\n".encode("ascii"), "more_body": True})
