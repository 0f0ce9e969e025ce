"""`saelab serve RUN`: the server as an object that is opened, run until Ctrl-C, and stopped."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from threading import Thread
from typing import Any

from saelab.errors import SaelabError
from saelab.serving.asked import Bounds
from saelab.serving.plans import Plans
from saelab.serving.worker import Worker

LOOPBACK, PORT = "127.0.0.1", 8321
_ANY = ("0.0.0.0", "::")
_CONNECTIONS = 64
_GRACE = 10.0


class ModelServer:
    """Serves a language model, steered by the plans of a RUN. Its socket is open, and `address` known, once it is made.

    Raises `ValueError` for a host or port that cannot be used, `SaelabError` without the packages of `saelab[serve]`, or for a
    model without a tokenizer.
    """

    def __init__(
        self,
        lm: Any,
        plans: Plans,
        token: str,
        host: str = LOOPBACK,
        port: int = PORT,
        allow_remote: bool = False,
        allowed_hosts: Sequence[str] = (),
        bounds: Bounds | None = None,
    ) -> None:
        bounds = bounds or Bounds()
        if lm.tokenizer is None:
            raise SaelabError(f"{lm.name} has no tokenizer, so it cannot answer requests for text.")
        hosts = checked_hosts(host, allow_remote, allowed_hosts)
        try:
            import uvicorn

            from saelab.serving.application import Requests, application
        except ImportError as error:
            raise SaelabError(
                f"saelab serve needs starlette and uvicorn ({error}): pip install 'saelab[serve]'."
            ) from error
        self.worker = Worker(lm, bounds.waiting)
        self.requests = Requests(lm, plans, bounds)
        config = uvicorn.Config(
            application(self.requests, self.worker, token, hosts),
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="off",
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=int(_GRACE),
        )
        self._server = _stopping_first(uvicorn.Server, self.worker)(config)
        self.socket = _bound(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self.socket.getsockname()[1]}/v1"

    def run(self) -> None:
        """Serve until `stop`, or Ctrl-C, which is raised again once all is closed."""
        try:
            self._server.run(sockets=[self.socket])
        finally:
            self.worker.stop()
            self.worker.join(_GRACE)
            self.socket.close()

    def stop(self) -> None:
        """End all requests and `run`; from any thread."""
        self.worker.stop()
        self._server.should_exit = True


def checked_hosts(host: str, allow_remote: bool, allowed_hosts: Sequence[str]) -> list[str]:
    """The names by which clients may call the server. Raises `ValueError` for a host that other machines reach without
    `allow_remote`, and for all interfaces without `allowed_hosts`."""
    local = ["localhost", LOOPBACK]
    if _is_loopback(host):
        return [*local, f"[{host}]" if ":" in host else host, *allowed_hosts]
    if not allow_remote:
        raise ValueError(
            f"--host {host} can be reached from other machines: pass --allow-remote if that is meant. The token and all texts "
            "then travel unencrypted; an SSH tunnel to 127.0.0.1 is safer."
        )
    if host in _ANY and not allowed_hosts:
        raise ValueError(
            f"--host {host} is every address: name those that clients call, --allowed-hosts my-machine.example."
        )
    return [*local, *([] if host in _ANY else [host]), *allowed_hosts]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    """A socket on which nobody else listens; port 0: any that is free."""
    if port != 0 and not 1024 <= port <= 65535:
        raise ValueError(f"port={port} must be between 1024 and 65535, or 0 for any that is free.")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ValueError(f"{host}:{port} cannot be used ({error}): choose another --port or --host.") from error
    return bound


def _stopping_first(server: Any, worker: Worker) -> Any:
    """uvicorn's server, which on Ctrl-C ends requests at once instead of waiting for their last token."""

    class Stopping(server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            Thread(target=worker.stop, daemon=True).start()  # a signal may interrupt what holds the worker's lock
            super().handle_exit(sig, frame)

    return Stopping
