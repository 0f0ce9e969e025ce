"""`saelab push`: to a local hub and back, the same bytes; a broken upload leaves nothing, and the same call completes it."""

import json
import shutil
from pathlib import Path

import pytest
from foreign_saes import CASES
from local_hub import COMMIT, DEAD_END, Hub, run, serving

import saelab
from saelab.interop.card import model_card

PUSH = """
import json, sys
from saelab.cli.main import main
import saelab
print(json.dumps([main(words) for words in WORDS]))
"""
BACK = """
import json
import saelab
sae = saelab.load_sae(SOURCE)
print(json.dumps([sae.hash, sae.provenance.origin]))
"""
TOKEN = {"HF_TOKEN": "hf_none", "PYTHONWARNINGS": "error,ignore::DeprecationWarning"}  # the hub's own code has one
REPORT = {
    "fvu": 0.25,
    "l0": 31.96,
    "ce_loss_recovered": 0.97,
    "dead_fraction": 0.01,
    "n_tokens": 12345,
    "texts": "demo",
    "split": "held_out",
}


@pytest.fixture
def hub(tmp_path):
    Hub.uploads, Hub.blobs, Hub.broken_puts = tmp_path / "hub", {}, 0
    with serving({}) as address:
        yield address
    Hub.uploads = None


@pytest.fixture
def folder(tmp_path) -> Path:
    """A RUN with an SAE, a report and a picture."""
    sae = saelab.load_sae(CASES["sae_lens jumprelu"](tmp_path / "lens").path)
    saelab.save_sae(sae, tmp_path / "run" / "sae")
    (tmp_path / "run" / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "run" / "family").mkdir()
    (tmp_path / "run" / "family" / "family.svg").write_text("<svg/>")
    return tmp_path / "run"


def push(run_folder: Path, address: str, home: Path, *more: str) -> str:
    words = [["push", str(run_folder), "me/my-sae", "--license", "apache-2.0", *more]]
    return run(PUSH.replace("WORDS", repr(words)), address, home, **TOKEN)


def test_pushed_and_pulled_it_has_the_same_bytes(hub, folder, tmp_path):
    said = push(folder, hub, tmp_path / "home")
    assert f"are in me/my-sae at commit {COMMIT}" in said and said.strip().endswith("[0]")
    there = tmp_path / "hub" / "me" / "my-sae"
    for name in ("sae.json", "sae.safetensors", "golden.safetensors"):
        assert (there / name).read_bytes() == (folder / "sae" / name).read_bytes()
    assert json.loads((there / "report.json").read_text()) == REPORT and (there / "family.svg").exists()
    assert {path.name for path in (there / "sae_lens").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    found, origin = json.loads(run(BACK.replace("SOURCE", "'me/my-sae'"), hub, tmp_path / "home"))
    assert found == saelab.load_sae(folder).hash and origin["hub"] == {"source": "me/my-sae", "revision": COMMIT}
    card = (there / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:") and 'license: "apache-2.0"' in card
    for part in ("| hook | blocks.1.hook_resid_pre |", "| language model | gpt2 |", "| features per token | 31.96 |"):
        assert part in card
    assert "![FVU against L0" in card and 'saelab.load_sae("me/my-sae")' in card and "SAE.load_from_disk" in card


def test_a_broken_upload_leaves_nothing_and_is_completed(hub, folder, tmp_path):
    Hub.broken_puts = 99
    words = [["push", str(folder), "me/my-sae"]]
    no_waiting = "import time; time.sleep = lambda seconds: None\n"
    said = run(no_waiting + PUSH.replace("WORDS", repr(words)), hub, tmp_path / "home", **TOKEN)
    assert said.strip().endswith("[2]")
    there = tmp_path / "hub" / "me" / "my-sae"
    assert not [path for path in there.rglob("*") if path.is_file()]
    Hub.broken_puts = 0
    push(folder, hub, tmp_path / "home")
    assert (there / "sae.safetensors").read_bytes() == (folder / "sae" / "sae.safetensors").read_bytes()


def test_what_cannot_be_pushed_says_why(folder, tmp_path, capsys):
    from saelab.cli import main

    shutil.copytree(folder / "sae", folder / "sae-other")
    assert main.main(["push", str(folder), "me/my-sae"]) == 2
    assert "holds 2 SAEs: name one of" in capsys.readouterr().err
    code = PUSH.replace(
        "WORDS", repr([["push", str(folder / "sae"), "me/my-sae"], ["push", str(folder / "sae"), "no id!"]])
    )
    no_waiting = "import time; time.sleep = lambda seconds: None\n"
    assert run(no_waiting + code, DEAD_END, tmp_path / "home", **TOKEN).strip().endswith("[2, 2]")


def test_a_card_says_only_what_is_known(tmp_path):
    sae = saelab.load_sae(CASES["dictionary_learning checkpoint without its class"](tmp_path / "sae").path)
    card = model_card(sae, "me/x", None, license=None, picture=None, for_sae_lens=False)
    assert "| language model | not recorded |" in card and "| licence | not stated |" in card
    assert "## Report" not in card and "SAELens" not in card and "license:" not in card
