"""ASGI application of the dashboard: Streamlit behind middleware that sets the page's base URL, script and security headers.

Without the base URL, a deep link (`/feature?feature=17`) makes Streamlit's page probe `/feature/_stcore/health` and log
a 404. The Content-Security-Policy stops the browser from contacting any other host.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from streamlit.starlette import App

from saelab.app.script import SCRIPT

_HEAD = f"<head><script>window.__streamlit={{BACKEND_BASE_URL:window.location.origin}};{SCRIPT}</script>".encode()
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
# Streamlit imports the script of a component from a blob; what can make one can also run inline.
_warming = Event()


class LocalPage:
    """ASGI middleware that rewrites HTML responses; everything else passes through untouched."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: dict[str, Any] = {}
        body = bytearray()

        async def complete(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                if not MutableHeaders(scope=message).get("content-type", "").startswith("text/html"):
                    await send(message)
            elif not MutableHeaders(scope=start).get("content-type", "").startswith("text/html"):
                await send(message)
            else:
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    await _send_page(start, bytes(body), send, scope["path"])

        # The HTML is rewritten here, so Streamlit must not send it compressed or answer 304 Not Modified.
        hidden = (b"accept-encoding", b"if-none-match", b"if-modified-since")
        if "." not in scope["path"].rpartition("/")[2]:
            scope = scope | {"headers": [pair for pair in scope["headers"] if pair[0] not in hidden]}
        await self.app(scope, receive, complete)


async def _send_page(start: dict[str, Any], body: bytes, send: Any, path: str) -> None:
    if not _warming.is_set():
        _warming.set()
        Thread(target=_warm_up, args=(path,), daemon=True).start()
    headers = MutableHeaders(scope=start)
    if body:  # a HEAD response has none
        body = body.replace(b"<head>", _HEAD, 1)
        headers["content-length"] = str(len(body))
    headers["content-security-policy"] = _POLICY
    headers["x-content-type-options"] = "nosniff"
    headers["referrer-policy"] = "no-referrer"
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _warm_up(path: str) -> None:
    """Import the page modules, and what the page at `path` draws with, while the browser is still loading its scripts."""
    for page in ("runs", "features", "feature", "dead", "prompt", "texts", "steer", "map", "compare", "jobs"):
        import_module(f"saelab.app.page_{page}")
    if path in ("/", "/runs"):
        import_module("pandas")  # Streamlit's way to a Vega chart


# Against DNS rebinding: a foreign domain that resolves to this address still sends its own name as Host.
_HOSTS = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"])
app = App(Path(__file__).with_name("main.py"), middleware=[_HOSTS, Middleware(LocalPage)])
