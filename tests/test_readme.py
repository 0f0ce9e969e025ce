"""Every code block of the README, in order, in an empty folder, with the built wheel: model, sizes and texts are small.

The real model goes through the same commands in `.ci/run`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL_DEMO = "--texts small.jsonl --n-tokens 2000 --train-tokens 2048 --d-sae 64 --k 8"
# What is changed in the README's code before it runs: (pattern, replacement, how often it must be found).
REWRITES = [
    (r"^make demo$", f"saelab demo {SMALL_DEMO} --no-serve --model MODEL", 1),  # test_make_demo_is_saelab_demo
    (r"^saelab demo$", f"saelab demo {SMALL_DEMO} --no-serve --model MODEL", 1),
    (r'load_model\("smollm2"\)', 'load_model("MODEL")', 1),
    (r'load_texts\("demo"\)', 'load_texts("small.jsonl")', 1),
    (r"n_tokens=250_000", "n_tokens=2000", 1),
    (r"n_tokens=2_000_000", "n_tokens=2048", 1),
    (r"d_sae=4096, k=32", "d_sae=64, k=8", 1),
    (r"feature\(2769\)", "feature(17)", 1),
    (r"max_new_tokens=40", "max_new_tokens=3", 1),
    (r"--n-tokens 250_000", "--n-tokens 2000 --texts small.jsonl --model MODEL", 1),
    (r"--n-tokens 2_000_000", "--n-tokens 2048", 1),
    (r"--d-sae 4096 --k 32", "--d-sae 64 --k 8", 1),
    (r"--model smollm2", "--model MODEL --texts small.jsonl --n-tokens 300", 1),
    (r"saelab dash runs/mlp", "saelab dash runs/mlp --port PORT", 1),
]

IN_ONE_PROCESS = """
import contextlib, io, json, sys
from saelab.cli.main import main
for language, code in json.loads(sys.argv[1]):
    if language == "python":
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code, {})
        assert said.getvalue().count(chr(10)) >= 2, said.getvalue()
        continue
    for line in code.splitlines():
        program, *words = line.split()
        assert program == "saelab" and main(words) == 0, line
"""


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "saelab"
    names = ("pyproject.toml", "README.md", "LICENSE", "saelab", "kernels", "activation_cache", "app", "examples")
    copy.mkdir()
    for name in names:
        subprocess.run(["cp", "-R", "-P", str(ROOT / name), str(copy / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """An empty folder and an environment in which the wheel, not the checkout, is installed."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    folder = tmp_path_factory.mktemp("empty")
    environment = os.environ | {"PYTHONPATH": str(site), "PATH": f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment["OMP_NUM_THREADS"] = "1"  # at these sizes threads only wait for each other
    where = subprocess.run(
        [sys.executable, "-c", "import saelab; print(saelab.__file__)"],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site)
    return folder, environment


def write_small_texts(path: Path) -> None:
    """Beginnings of documents of the built-in corpus, two of them held out."""
    from saelab.tokens import is_held_out, load_texts

    beginnings = [text[:400] for text in load_texts("demo").documents()]
    held_out = [text for text in beginnings if is_held_out(text)]
    documents = [*[text for text in beginnings if not is_held_out(text)][:30], *held_out[:2]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def small(code: str, found: list[int]) -> str:
    for number, (pattern, replacement, _) in enumerate(REWRITES):
        code, count = re.subn(pattern, replacement, code, flags=re.MULTILINE)
        found[number] += count
    return code


@pytest.mark.timeout(600)
def test_every_block_runs_in_order(user, deep_folder):
    folder, environment = user
    found = [0] * len(REWRITES)
    codes = [(language, small(code, found).replace("MODEL", str(deep_folder))) for language, code in blocks(README)]
    assert found == [count for _, _, count in REWRITES]
    assert [language for language, _ in codes] == ["sh", "sh", "python", "sh", "sh"]
    write_small_texts(folder / "small.jsonl")
    commands, dash = codes[-1][1].strip().rsplit("\n", 1)
    assert codes.pop(0) == codes[0]  # make demo is saelab demo, and test_cli.py repeats one
    codes[-1] = ("sh", commands)
    # One process for all but the dashboard: each would import torch and transformers anew.
    run([sys.executable, "-c", IN_ONE_PROCESS, json.dumps(codes)], folder, environment)
    serve(dash, folder, environment)
    made = {"cache", "sae", "features", "report.json"}
    for name, more in (("demo", {"annotations.sqlite", "steering"}), ("mlp", set())):
        assert {path.name for path in (folder / "runs" / name).iterdir()} == made | more
    report = json.loads((folder / "runs" / "mlp" / "report.json").read_text(encoding="utf-8"))
    assert report["hook_name"] == "blocks.14.hook_mlp_out"


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def serve(line: str, folder: Path, environment: dict[str, str]) -> None:
    """Start the dashboard, ask for its page until it answers, stop it with Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = line.replace("PORT", str(port)).split()
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        try:
            answer = wait_for_page(f"http://127.0.0.1:{port}/", server)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    assert "<html" in answer.lower()


def wait_for_page(url: str, server: subprocess.Popen) -> str:
    for _ in range(240):
        assert server.poll() is None, server.stdout.read() if server.stdout else ""
        try:
            with urllib.request.urlopen(url, timeout=5) as page:
                return page.read().decode()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
    raise AssertionError(f"{url} did not answer within a minute")


def test_make_demo_is_saelab_demo():
    for serve_flag, words in (("1", "saelab demo"), ("0", "saelab demo --no-serve")):
        command = ["make", "-n", "--no-print-directory", "-o", ".venv/.installed", "demo", f"SERVE={serve_flag}"]
        dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert dry.stdout.splitlines()[-1].strip() == words


@pytest.mark.parametrize(("target", "extra"), [("demo", False), ("test", True), ("lint", True), ("install", True)])
def test_only_what_develops_installs_the_development_extra(target: str, extra: bool):
    command = ["make", "-n", "-W", "pyproject.toml", "--no-print-directory", target]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-e . -c constraints.txt" in dry
    assert ("[dev]" in dry) == extra


def test_the_wheel_holds_everything_once(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"saelab"}
    for package, folder in (("kernels", "kernels"), ("activation_cache", "activation_cache"), ("app", "app")):
        expected = {f"saelab/{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert expected <= names
    data = {path.name for path in (ROOT / "examples" / "data").iterdir() if path.is_file()}
    assert data >= {"corpus.parquet", "concepts.parquet", "README.md", "LICENSE-PSF.txt", "LICENSE-WORDNET.txt"}
    assert {f"saelab/data/{name}" for name in data} <= names
    notebooks = {f"saelab/notebooks/{path.name}" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert {name for name in names if name.endswith(".ipynb")} == notebooks
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which does not exist"
