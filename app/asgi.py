"""ASGI application of the dashboard: Streamlit behind middleware that sets the page's base URL, script and security headers.

Without the base URL, a deep link (`/feature?feature=17`) makes Streamlit's page probe `/feature/_stcore/health` and log
a 404. The Content-Security-Policy stops the browser from contacting any other host. An address that is nearly that of a page
(`/Feature`, `/feature/17`) leads there; one that is none gets a page that says so.
"""

from __future__ import annotations

import html
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, RedirectResponse
from streamlit.starlette import App

from saelab.app.browser_script import SCRIPT

PAGES = sorted(path.stem.removeprefix("page_") for path in Path(__file__).parent.glob("page_*.py"))
_HOME = "runs"  # at "/"
_HEAD = f"<head><script>window.__streamlit={{BACKEND_BASE_URL:window.location.origin}};{SCRIPT}</script>".encode()
_NOT_FOUND = (
    '<!doctype html><html lang="en"><head><meta name="color-scheme" content="light dark"><title>Not found \u00b7 saelab</title>'
    '</head><body style="font-family:system-ui,sans-serif;max-width:40rem;margin:4rem auto;padding:0 1rem">'
    "<h1>No such page</h1><p>The dashboard has no page at {path}. It has these:</p><p>{links}</p></body></html>"
)
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
        if (instead := elsewhere(scope)) is not None:
            await instead(scope, receive, _with_policy(send))
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


def elsewhere(scope: Any) -> Any:
    """The redirect for an address that is nearly a page's, the answer for one that is none; None for all others."""
    path, query = scope["path"], scope.get("query_string", b"").decode("latin-1")
    names = [name for name in path.split("/") if name]
    if not names or names[0].startswith("_") or names[0] in ("static", "media", "component") or "." in names[-1]:
        return None
    name, *rest = names[0].lower(), *names[1:]
    if name in PAGES and path == f"/{name}" and name != _HOME:
        return None
    if name == "feature" and len(rest) == 1 and rest[0].isascii() and rest[0].isdigit():
        query, rest = f"feature={rest[0]}" + (f"&{query}" if query else ""), []
    if name in PAGES and not rest:
        return RedirectResponse(("/" if name == _HOME else f"/{name}") + (f"?{query}" if query else ""))
    links = " \u00b7 ".join(f'<a href="/{"" if one == _HOME else one}">{one.capitalize()}</a>' for one in PAGES)
    return HTMLResponse(_NOT_FOUND.format(path=html.escape(path[:100]), links=links), 404)


def _with_policy(send: Any) -> Any:
    """`send`, with the security headers on the response."""

    async def secured(message: Any) -> None:
        if message["type"] == "http.response.start":
            _set_policy(MutableHeaders(scope=message))
        await send(message)

    return secured


def _set_policy(headers: MutableHeaders) -> None:
    headers["content-security-policy"] = _POLICY
    headers["x-content-type-options"] = "nosniff"
    headers["referrer-policy"] = "no-referrer"


async def _send_page(start: dict[str, Any], body: bytes, send: Any, path: str) -> None:
    if not _warming.is_set():
        _warming.set()
        Thread(target=_warm_up, args=(path,), daemon=True).start()
    headers = MutableHeaders(scope=start)
    if body:  # a HEAD response has none
        body = body.replace(b"<head>", _HEAD, 1)
        headers["content-length"] = str(len(body))
    _set_policy(headers)
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _warm_up(path: str) -> None:
    """Import the page modules, and what the page at `path` draws with, while the browser is still loading its scripts."""
    for page in PAGES:
        import_module(f"saelab.app.page_{page}")
    if path in ("/", "/runs"):
        import_module("pandas")  # Streamlit's way to a Vega chart


# Against DNS rebinding: a foreign domain that resolves to this address still sends its own name as Host.
_HOSTS = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"])
app = App(Path(__file__).with_name("main.py"), middleware=[_HOSTS, Middleware(LocalPage)])
