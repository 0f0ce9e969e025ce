"""Every command that another one prints, after its work or in an error, works on what is there: each is followed to its end."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from typing import Any

import pytest
from tiny_runs import write_texts

import saelab
from saelab.cli import main
from saelab.errors import StoreError

PRE, MID, POST = (f"blocks.1.hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post"))
MLP = "blocks.1.hook_mlp_out"
CACHES: dict[str, tuple[list[str], list[str]]] = {
    # hooks and flags of the harvest: the variants that are offered
    "one hook": ([POST], ["topk"]),
    "three hooks with gradients": ([PRE, MID, POST, "--gradients"], ["crosscoder", "gradient"]),
    "an MLP in all documents": ([MID, MLP, "--split", "all"], ["transcoder", "crosscoder", "topk"]),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Trainings of the sizes that are named would take minutes, and a dashboard for ever."""
    train = saelab.train

    def less(config: Any, data: Any, settings: Any, *args: Any, **options: Any) -> Any:
        config = dataclasses.replace(config, d_sae=48, k=4)
        settings = dataclasses.replace(settings, n_tokens=400, batch_size=200)
        return train(config, data, settings, *args, progress=False, **options)

    monkeypatch.setattr(saelab, "train", less)
    monkeypatch.setattr("saelab.app.serve.serve", lambda *_, **__: None)


def commands_in(text: str) -> list[str]:
    """The `saelab` commands of a text, as `Next: one; two`, one a line, or at the end of an error."""
    parts = [part.strip() for line in text.splitlines() for part in re.split(r"; |: | or |`", line)]
    return [part for part in parts if part.startswith("saelab ") and part.split()[1] in main.COMMANDS]


def run_line(line: str, capsys) -> str:
    """Run a command line; what it printed."""
    capsys.readouterr()
    code, said = main.main(shlex.split(line)[1:]), capsys.readouterr()
    assert code == 0, f"{line}: {said.err}"
    return said.out


def follow(line: str, capsys) -> list[str]:
    """Run a command line and all that it leads to; the lines that were run."""
    ran, waiting = [], [line]
    while waiting:
        ran.append(waiting.pop(0))
        waiting += [new for new in commands_in(run_line(ran[-1], capsys)) if new not in [*ran, *waiting]]
    return ran


def variants(lines: list[str]) -> list[str]:
    return [
        shlex.split(line)[shlex.split(line).index("--variant") + 1] if "--variant" in line else "topk" for line in lines
    ]


@pytest.mark.parametrize("shape", CACHES)
def test_what_a_harvest_leads_to(shape, tmp_path, tiny_folder, capsys):
    (hooks, offered), run = CACHES[shape], tmp_path / "of mine"
    texts = write_texts(tmp_path / "texts.jsonl")
    words = [str(run), "--n-tokens", 1500, "--ctx-len", 64, "--model", tiny_folder, "--texts", texts, "--hook-name"]
    harvest = shlex.join(["saelab", "harvest", *map(str, words), *hooks])
    lines = commands_in(run_line(harvest, capsys))
    assert variants(lines) == offered
    main.main(["eval", str(run)])
    assert commands_in(capsys.readouterr().err) == lines  # the same, where the SAE is still missing
    for line in lines[1:]:
        run_line(line, capsys)
        shutil.rmtree(run / "sae")
    ran = [one.split()[1] for one in follow(lines[0], capsys)]
    assert list(dict.fromkeys(ran)) == [
        "train",
        "eval",
        "features",
        *(["diff"] if "crosscoder" in lines[0] else []),
        "dash",
    ]
    again = commands_in(run_line(harvest, capsys))  # beside the SAE that is there
    assert variants(again) == offered and all("--name 2" in line for line in again)
    assert main.main(["similarity", str(run / "sae")]) == 2
    follow(commands_in(capsys.readouterr().err)[0], capsys)
    assert {path.name for path in run.glob("sae*")} == {"sae", "sae-2"}


@pytest.mark.parametrize(
    "words",
    [
        "harvest {sae} --hook-name h --n-tokens 100",
        "train {sae}",
        "train {sae} --stream h",
        "sweep {sae} --n-tokens 100",
        "bench family {sae}",
        "finetune {sae} --from-scratch --n-tokens 1_024",
        "demo --out-dir {sae} --no-serve",
    ],
)
def test_an_sae_in_the_place_of_its_run_is_refused(words, tmp_path, capsys):
    sae = tmp_path / "run" / "sae"
    sae.mkdir(parents=True)
    (sae / "sae.json").write_text("{}", encoding="utf-8")
    assert main.main(words.format(sae=sae).split()) == 2
    assert f"{sae} is an SAE, and this needs the RUN that it is in: {sae.parent}." in capsys.readouterr().err


def test_a_store_that_is_missing_names_its_sae(tmp_path):
    for store, sae in (("features", "sae"), ("features-x", "sae-x"), ("sae/snapshots/features-step-00000250", "")):
        folder = tmp_path / (sae or "sae/snapshots/step-00000250")
        folder.mkdir(parents=True)
        (folder / "sae.json").write_text("{}", encoding="utf-8")
        with pytest.raises(StoreError, match=f"`saelab features {folder}`"):
            saelab.load_features(tmp_path / store)
