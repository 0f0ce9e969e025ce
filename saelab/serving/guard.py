"""What stands before every address: the token, compared in constant time, and the limit on a request's body."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from saelab.serving.refused import Refused
from saelab.serving.responses import send_refusal

VARIABLE = "SAELAB_TOKEN"
SHORTEST = 16
_DRAINED = 8
"""A body is read, and forgotten, up to this many times the limit, so that the client hears why it was refused."""


class TokenFrom(NamedTuple):
    """The token that clients send, and where it is from; "" if it was made up."""

    token: str
    origin: str


def find_token(file: str | Path | None = None) -> TokenFrom:
    """The token in a file, else in the environment variable SAELAB_TOKEN, else a new one. Raises `ValueError` for one that is
    short or holds what a header cannot."""
    given = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(VARIABLE)
    if given is None:
        return TokenFrom(secrets.token_urlsafe(32), "")
    origin = str(file) if file else VARIABLE
    if len(given) < SHORTEST or not given.isascii() or not given.isprintable() or " " in given:
        raise ValueError(
            f"The token in {origin} must have at least {SHORTEST} printable ASCII characters without spaces, such as "
            "`python -c 'import secrets; print(secrets.token_urlsafe())'` prints."
        )
    return TokenFrom(given, origin)


class Guard:
    """ASGI middleware that answers 401 without the token, whatever the address."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # the server's own start and end; there are no websockets
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self.app(scope, receive, send)
        else:
            said = (
                "The request has no valid token: send `Authorization: Bearer TOKEN`, in OpenAI's client api_key=TOKEN."
            )
            await send_refusal(send, Refused(said, 401, None, "invalid_api_key"))


async def read_body(receive: Any, most: int) -> bytes:
    """The body of a request. Raises `Refused` for one of more than `most` bytes."""
    body, n_read, more = bytearray(), 0, True
    while more and n_read <= _DRAINED * most:
        message = await receive()
        n_read += len(message.get("body", b""))
        if n_read <= most:
            body += message.get("body", b"")
        more = message.get("more_body", False)
    if n_read > most:
        raise Refused(f"The request has more than {most:,} bytes; send a shorter one.", 413)
    return bytes(body)
