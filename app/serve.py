"""`saelab dash RUN`: start Streamlit on 127.0.0.1 with settings for a local tool."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from saelab.runs import find_saes

ADDRESS = "127.0.0.1"
RUN_VARIABLE = "SAELAB_DASH_RUN"
_OPTIONS = {
    "server.address": ADDRESS,
    "server.fileWatcherType": "none",
    "server.enableCORS": "true",
    "server.enableXsrfProtection": "true",
    "server.maxUploadSize": "1",
    "server.maxMessageSize": "50",
    "server.showEmailPrompt": "false",
    "browser.gatherUsageStats": "false",
    "browser.serverAddress": ADDRESS,
    "client.toolbarMode": "minimal",
    "logger.hideWelcomeMessage": "true",
    "theme.light.primaryColor": "#0067a5",
    "theme.dark.primaryColor": "#62b5e5",
    "theme.light.linkColor": "#0067a5",
    "theme.dark.linkColor": "#7cc4ef",
    "theme.baseRadius": "0.4rem",
    "theme.baseFontSize": "15",
}


def serve(run: str | Path, port: int = 8501, browser: bool = False) -> None:
    """Serve the dashboard of a RUN or one SAE folder until Ctrl-C; `browser` opens its first page.

    Listens on 127.0.0.1 only. If the port is in use, takes the next free one and says so. Raises `SaelabError` when
    `run` holds no SAE, `ValueError` for a port outside 1024 to 65535 or when no port nearby is free.
    """
    run = Path(run).resolve()
    find_saes(run)
    free = free_port(port)
    if free != port:
        print(f"Port {port} is in use; using {free} instead.")
    print(f"The dashboard of {run} is at http://{ADDRESS}:{free} (Ctrl-C stops it)", flush=True)
    os.environ[RUN_VARIABLE] = str(run)
    import click
    from streamlit.web import cli

    with suppress(KeyboardInterrupt, click.Abort):  # raised again after the server has closed
        cli.main(arguments(free, browser), standalone_mode=False)


def arguments(port: int, browser: bool = False) -> list[str]:
    """The `streamlit` command line."""
    options = _OPTIONS | {"server.port": str(port), "server.headless": str(not browser).lower()}
    flags = [f"--{name}={value}" for name, value in options.items()]
    hosts = ["--server.allowedHosts=localhost", f"--server.allowedHosts={ADDRESS}"]  # against DNS rebinding
    return ["run", str(Path(__file__).with_name("asgi.py")), *flags, *hosts]


def free_port(port: int, attempts: int = 50) -> int:
    """`port` or the next free one. Raises `ValueError` when none of `attempts` ports is free, or for one out of range."""
    if not 1024 <= port <= 65535:
        raise ValueError(f"port={port} must be between 1024 and 65535.")
    for candidate in range(port, min(port + attempts, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, candidate))
            except OSError:
                continue
            return candidate
    raise ValueError(f"Ports {port} to {port + attempts - 1} are all in use; choose another --port.")
