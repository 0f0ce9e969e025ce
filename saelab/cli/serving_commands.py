"""The command that serves a language model to other programs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from saelab.cli.commands import Dtype, OwnModel, Run

_HOSTS = "Further names by which clients call this machine; others are refused."
_SNIPPET = """
    from openai import OpenAI

    client = OpenAI(base_url="{address}", api_key={token})
    {call}
{presets}
    # Steered: extra_body={{"steering": plan.to_json()}}, where plan is a saelab.steering.Plan
"""
_CHAT = 'client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello"}}])'
_TEXT = 'client.completions.create(model="{model}", prompt="The weather today", max_tokens=40)'


def serve(
    run: Run,
    model: OwnModel = None,
    host: Annotated[str, arg(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, arg(help="Port; 0: any that is free.")] = 8321,
    token_file: Annotated[
        Path | None, arg(help="File with the token; None: SAELAB_TOKEN, or a new one that is printed.")
    ] = None,
    allow_remote: Annotated[
        bool, arg(help="Listen on a --host that other machines reach, without encryption.")
    ] = False,
    allowed_hosts: Annotated[tuple[str, ...], arg(help=_HOSTS, help_behavior_hint="(default: none)")] = (),
    max_tokens: Annotated[int, arg(help="Most new tokens of one text.")] = 1024,
    max_n: Annotated[int, arg(help="Most texts of one request.")] = 16,
    max_waiting: Annotated[int, arg(help="Most requests in the queue.")] = 32,
    dtype: Dtype = None,
) -> None:
    """Serve the language model of RUN by OpenAI's protocol until Ctrl-C, steered by the plan in a request or by a preset."""
    from saelab.run_folder.opening import load_lm
    from saelab.serving.asked import Bounds
    from saelab.serving.guard import find_token
    from saelab.serving.plans import Plans, model_name
    from saelab.serving.server import ModelServer, checked_hosts
    from saelab.validation import check_integer

    for name, value in {"--max-tokens": max_tokens, "--max-n": max_n, "--max-waiting": max_waiting}.items():
        check_integer(name, value, 1)
    checked_hosts(host, allow_remote, allowed_hosts)  # before the model, which takes longer to load
    token, origin = find_token(token_file)
    plans = Plans(run)
    lm = load_lm(model or model_name(plans), dtype)
    bounds = Bounds(n=max_n, max_tokens=max_tokens, waiting=max_waiting)
    server = ModelServer(lm, plans, token, host, port, allow_remote, allowed_hosts, bounds)
    _introduce(server, token, origin)
    with suppress(KeyboardInterrupt):  # raised again after the server has closed
        server.run()
    print("Stopped.")


def _introduce(server: Any, token: str, origin: str) -> None:
    """Print the address, the token unless the user knows it, and lines to begin with."""
    names = server.requests.models
    print(f"{names[0]} is served at {server.address} (Ctrl-C stops it)")
    print(f"The token is that of {origin}" if origin else f"The token is {token}")
    template = getattr(server.requests.tokenizer, "chat_template", None)
    call = _TEXT if template is None else _CHAT
    presets = f"    # Presets, to name as model: {', '.join(names[1:])}" if names[1:] else ""
    shown = '"..."' if origin else f'"{token}"'
    print(
        _SNIPPET.format(address=server.address, token=shown, call=call.format(model=names[0]), presets=presets),
        flush=True,
    )


SERVING: dict[str, tuple[Callable[..., None], str]] = {
    "serve": (
        serve,
        "saelab serve runs/demo\n"
        "saelab serve runs/demo --port 8600 --token-file token.txt --max-tokens 256\n"
        "saelab serve runs/demo --host 192.168.1.5 --allow-remote",
    ),
}
