"""A Hugging Face hub played by a local server: as much of its protocol as loading, streaming and uploading need."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DEAD_END = "http://127.0.0.1:9"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as loading a model and streaming a dataset need."""

    repos: dict[str, Path] = {}
    """"models/tiny/llama" -> folder"""
    requests: list[str] = []
    gated: set[str] = set()

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    uploads: Path | None = None
    """Where repositories are created; None: nothing may be uploaded."""
    blobs: dict[str, bytes] = {}
    broken_puts = 0
    """How many uploads of large files still break."""

    def do_POST(self) -> None:
        path, posted = unquote(urlsplit(self.path).path), self._posted().decode()
        if self.uploads is None or not self._uploading(path, posted):
            self._serve(body=True, posted=posted)

    def do_PUT(self) -> None:
        content = self._posted()
        self.requests.append(f"PUT {self.path}")
        if Hub.broken_puts:
            Hub.broken_puts -= 1
            return self._fail("Broken", 500)
        Hub.blobs[self.path.rpartition("/")[2]] = content
        return self._send(200, b"", {}, True)

    def _posted(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline().strip(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _uploading(self, path: str, posted: str) -> bool:
        """Answer a request of an upload; False if it is none."""
        address = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(posted)
            name = asked["name"] if "/" in asked["name"] else f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repos.setdefault(f"models/{name}", self._created(name))
            self._json({"url": f"{address}/{name}"}, True)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []}, True)
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
            files = [{"path": one["path"], "size": one["size"]} for one in json.loads(posted)["files"]]
            modes = [one | {"uploadMode": "lfs" if one["path"].endswith("tensors") else "regular"} for one in files]
            self._json({"files": [one | {"shouldIgnore": False, "oid": None} for one in modes]}, True)
        elif path.endswith("/info/lfs/objects/batch"):
            found = [self._action(one, address) for one in json.loads(posted)["objects"]]
            self._json({"transfer": "basic", "objects": found}, True)
        elif committed := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            self._commit(self.repos[f"models/{committed[1]}"], posted)
            self._json(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{address}/{committed[1]}/commit/{COMMIT}"}, True
            )
        else:
            return False
        self.requests.append(f"POST {path}")
        return True

    def _created(self, name: str) -> Path:
        assert self.uploads is not None
        folder = self.uploads / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _action(self, one: dict[str, Any], address: str) -> dict[str, Any]:
        if one["oid"] in Hub.blobs:
            return one
        return one | {"actions": {"upload": {"href": f"{address}/lfs/{one['oid']}"}}}

    def _commit(self, folder: Path, posted: str) -> None:
        """All files of a commit at once."""
        for line in map(json.loads, posted.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            to = folder / value["path"]
            to.parent.mkdir(parents=True, exist_ok=True)
            content = base64.b64decode(value["content"]) if line["key"] == "file" else Hub.blobs[value["oid"]]
            to.write_bytes(content)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self, body: bool, posted: str = "") -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path):
            kind, name, what, rest = found.groups()
            folder = self.repos.get(f"{kind}/{name}")
            if folder is None:
                return self._fail("RepoNotFound", 401)
            if name in self.gated:
                return self._fail("GatedRepo", 403)
            return self._json(self._listing(folder, name, what, rest, posted), body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            kind, name, file = found.groups()
            folder = self.repos.get(f"{'datasets' if kind else 'models'}/{name}")
            if folder is None:
                return self._fail("RepoNotFound", 401)
            if not (folder / file).is_file():
                return self._fail("EntryNotFound", 404)
            return self._file(folder / file, body)
        return self._fail("EntryNotFound", 404)

    def _listing(self, folder: Path, name: str, what: str | None, rest: str | None, posted: str) -> object:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [self._entry(folder, path) for path in files]
        if what == "tree":
            below = (rest or "").partition("/")[2]
            if below and not (folder / below).is_dir():
                return []
            return [entry for entry in entries if not below or str(entry["path"]).startswith(below + "/")]
        if what == "paths-info":
            asked = json.loads(posted)["paths"] if posted.startswith("{") else parse_qs(posted).get("paths", [])
            return [entry for entry in entries if entry["path"] in asked]
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        state = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return {"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings, **state}

    def _entry(self, folder: Path, path: Path) -> dict[str, object]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": str(path.relative_to(folder))}

    def _file(self, path: Path, body: bool) -> None:
        content = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(content)
        if span:
            start, stop = int(span[1]), min(int(span[2] or len(content) - 1) + 1, len(content))
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206 if span else 200, content[start:stop], headers, body)

    def _json(self, value: object, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _fail(self, code: str, status: int) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": "not found"}, False)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def serving(repos: dict[str, Path]) -> Iterator[str]:
    """Address of a server with these repositories ("models/tiny/llama" -> folder)."""
    Hub.repos, Hub.requests = repos, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def run(code: str, endpoint: str, home: Path, **more: str) -> str:
    """What `code` prints in a fresh process, in which any warning is an error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PIP_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONWARNINGS": "error"}
    env |= {"SAELAB_CACHE": str(home / "saelab"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **more}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
