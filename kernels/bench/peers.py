"""Run other SAE libraries for `bench_step --peers`: one virtual environment for all, one worker process for each.

saelab depends on none of them: pip installs them into a folder, once, with the torch version of this process, and the
workers are driven through pipes (`peer_worker.py`). A peer that cannot be installed, raises, dies or does not learn is
reported on stderr with the reason and gets no row: a failure never appears as a time.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

PEERS = ("sae-lens", "dictionary-learning", "eai-sparsify", "overcomplete")
"""Names on PyPI."""
WORKER = Path(__file__).with_name("peer_worker.py")
LEARNS_AFTER = 20
"""Steps after which a peer's loss on its first batch must be lower than it was at first."""


class PeerError(Exception):
    """The reason why a peer is skipped, in one line."""


def install(folder: Path) -> dict[str, list[str]]:
    """The worker command of every peer installed in `folder`; installs missing peers with pip first."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pin, listed = f"torch=={importlib.metadata.version('torch')}", folder / "peers.json"
    there = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    if pin not in there:
        there = []
    missing = [name for name in PEERS if name not in there]
    if missing:
        print(f"peers: installing {', '.join(missing)} with {pin} into {folder}", file=sys.stderr, flush=True)
        try:
            _run(sys.executable, "-m", "venv", str(folder))
            _pip(python, "install", pin)
        except PeerError as error:
            for name in missing:
                _leave_out(name, error)
            return {}
        there = [pin, *(name for name in PEERS if name in there or _installed(python, pin, name))]
        _drop_foreign_torchvision(python)
        listed.write_text(json.dumps(there) + "\n", encoding="utf-8")
    return {name: [str(python), "-I", str(WORKER), name] for name in PEERS if name in there}


def _installed(python: Path, pin: str, name: str) -> bool:
    try:
        _pip(python, "install", pin, name)
    except PeerError as error:
        _leave_out(name, error)
        return False
    return True


def _drop_foreign_torchvision(python: Path) -> None:
    """Uninstall torchvision if it cannot be imported. Some peers require it, but no step needs it, and one built for another
    torch (for CUDA, where torch is for the CPU) breaks the imports of transformers."""
    try:
        _run(str(python), "-I", "-c", "import torchvision")
    except PeerError:
        _pip(python, "uninstall", "--yes", "torchvision")


def _pip(python: Path, command: str, *arguments: str) -> None:
    _run(str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", command, *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise PeerError((errors or lines[-1:] or [f"exit status {done.returncode}"])[0])


def _leave_out(name: str, error: PeerError) -> None:
    print(f"peers: {name} skipped: {error}", file=sys.stderr, flush=True)


class Peers:
    """The peers at one shape. They run only inside `step`, one after the other; one that fails is dropped, times included."""

    def __init__(self, commands: Mapping[str, Sequence[str]], first: Tensor, d_sae: int, k: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="saelab-peers-")
        self._batch = Path(self._folder.name) / "batch.f32"
        shape = {"d_in": first.shape[1], "d_sae": d_sae, "k": k, "batch": len(first)}
        self._first = shape | {"threads": torch.get_num_threads(), "path": str(self._batch)}
        self._workers = {name: _Worker(command) for name, command in commands.items()}

    def __enter__(self) -> Peers:
        for name in list(self._workers):
            self._ask(name, self._first)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._folder.cleanup()

    def step(self, x: Tensor, timed: bool = False) -> None:
        """One step of each peer on this batch; `timed` records the seconds."""
        if self._workers:
            self._batch.write_bytes(x.contiguous().numpy().data)
        for name in list(self._workers):
            answer = self._ask(name, {"step": True})
            if answer is not None:
                worker = self._workers[name]
                worker.losses.append(answer["loss"])
                worker.seconds += [answer["seconds"]] if timed else []

    def check_learning(self, first: Tensor) -> None:
        """One more step on the batch of the first step; drops peers whose loss is not lower than it was then."""
        self.step(first)
        for name, worker in list(self._workers.items()):
            before, after, steps = worker.losses[0], worker.losses[-1], len(worker.losses) - 1
            if steps >= LEARNS_AFTER and not after < before:
                self._leave(name, PeerError(f"its loss went from {before:.4g} to {after:.4g} in {steps} steps"))

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of the timed steps of every remaining peer, by name and version."""
        return {f"{name} {worker.version}": worker.seconds for name, worker in self._workers.items()}

    def _ask(self, name: str, message: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self._workers[name].ask(message)
        except PeerError as error:
            self._leave(name, error)
            return None

    def _leave(self, name: str, error: PeerError) -> None:
        _leave_out(name, error)
        self._workers.pop(name).close()


class _Worker:
    """A worker process, its pipes and its answers."""

    def __init__(self, command: Sequence[str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8"
        )
        self.version = ""
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # if the process has exited, there is no answer below
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise PeerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        self.version = answer.get("version", self.version)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process exited with status {status}" + (f": {lines[-1].strip()}" if lines else "")

    def close(self) -> None:
        """End the process by closing its input; kill it after 10 seconds."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
