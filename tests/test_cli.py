"""The `saelab` command: the whole way on a tiny model, errors as one line, `--json` as one object."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest

from saelab.cli import commands, main
from saelab.runs import find_saes

HOOK = "blocks.1.hook_resid_post"
SENTENCE = "the river runs past an old mill where nobody came to see what the light of morning had made of it"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory) -> Path:
    """80 short documents, all different; about a tenth is held out."""
    path = tmp_path_factory.mktemp("texts") / "notes.jsonl"
    documents = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60)) + f" {i}." for i in range(80)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder, texts_file) -> Path:
    """A RUN with a cache, two SAEs, their reports and features, made by the commands."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    source = ["--model", str(tiny_folder), "--dtype", "float32", "--texts", str(texts_file), "--column", "body"]
    steps = [
        ["harvest", str(folder), "--hook-name", HOOK, "--n-tokens", "4_000", "--ctx-len", "64", *source],
        ["train", str(folder), "--d-sae", "48", "--k", "4", "--n-tokens", "4_000", "--batch-size", "200"],
        ["train", str(folder), "--variant", "relu", "--name", "l1", "--d-sae", "40", "--n-tokens", "4_000"],
        ["eval", str(folder)],
        ["features", str(folder), "--top-k", "5"],
    ]
    for step in steps:
        assert main.main(step) == 0
    return folder


def test_the_commands_fill_the_run_folder(run: Path):
    made = {path.name for path in run.iterdir()}
    assert made == {"cache", "sae", "sae-l1", "report.json", "report-l1.json", "features", "features-l1"}
    config = json.loads((run / "sae-l1" / "sae.json").read_text(encoding="utf-8"))
    assert config["variant"] == "relu"
    assert (run / "sae" / "sae.safetensors").stat().st_size > (run / "sae-l1" / "sae.safetensors").stat().st_size


def test_every_command_says_where_its_output_went(run: Path, capsys):
    assert (
        main.main(["train", str(run), "--d-sae", "48", "--k", "4", "--n-tokens", "4_000", "--batch-size", "200"]) == 0
    )
    assert str(run / "sae") in capsys.readouterr().out
    assert main.main(["eval", str(run / "sae-l1")]) == 0
    assert str(run / "report-l1.json") in capsys.readouterr().out
    assert main.main(["features", str(run / "sae"), "--top-k", "5"]) == 0
    assert str(run / "features") in capsys.readouterr().out


def test_train_needs_no_flag(run: Path, monkeypatch):
    trained = Mock()
    monkeypatch.setattr("saelab.train", trained)
    assert main.main(["train", str(run)]) == 0
    config, _, train = trained.call_args.args
    assert (config.d_sae, config.k, train.n_tokens) == (4096, 32, 2_000_000)


def test_dash_takes_the_only_run(run: Path, tmp_path, capsys, monkeypatch):
    served = Mock()
    monkeypatch.setattr("saelab.app.serve.serve", served)
    monkeypatch.chdir(tmp_path)
    assert main.main(["dash"]) == 2
    assert "runs/ holds no RUN with an SAE" in capsys.readouterr().err
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "runs" / "one").symlink_to(run)
    assert main.main(["dash"]) == 0
    assert served.call_args.args == (Path("runs/one"),)
    (tmp_path / "runs" / "two").symlink_to(run)
    assert main.main(["dash"]) == 2
    assert "name one of runs/one, runs/two" in capsys.readouterr().err


def test_eval_can_leave_the_loss_out(run: Path, capsys):
    assert main.main(["eval", str(run / "sae-l1"), "--json", "--n-tokens-ce", "0", "--n-tokens", "100"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tokens_ce"] == 0
    assert main.main(["eval", str(run / "sae-l1")]) == 0  # as it was


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("50", "tokens, the whole contexts that hold the 50 asked for."),
        ("90_000", "tokens, all that were read, not 90,000."),
    ],
)
def test_eval_says_on_how_many_tokens_the_loss_was_measured(run: Path, capsys, asked, said):
    assert main.main(["eval", str(run / "sae"), "--n-tokens", "200", "--n-tokens-ce", asked]) == 0
    shown = capsys.readouterr().out
    measured = json.loads((run / "report.json").read_text(encoding="utf-8"))["n_tokens_ce"]
    assert f"The loss was measured on {measured:,} {said}" in shown
    assert main.main(["eval", str(run / "sae"), "--n-tokens", "200", "--n-tokens-ce", str(measured)]) == 0
    assert "The loss was measured on" not in capsys.readouterr().out
    assert main.main(["eval", str(run / "sae")]) == 0  # as it was


def test_a_run_without_features_names_the_command_with_its_folder(run: Path, tmp_path, capsys):
    (tmp_path / "sae").symlink_to(run / "sae")
    assert main.main(["steer", str(tmp_path), "--feature", "1"]) == 2
    said = capsys.readouterr().err
    assert f"`saelab features {tmp_path}`" in said and "again" not in said


def test_help_tells_every_command_in_one_sentence(capsys):
    assert main.main(["--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(lines) == len(main.COMMANDS) and all(line.endswith(".") and len(line) <= 132 for line in lines)


@pytest.mark.parametrize("command", [["bench", "synthetic"], ["bench", "family"], ["train"], ["label"]])
def test_help_has_plain_usage_and_no_empty_default(command, capsys):
    with pytest.raises(SystemExit):
        main.main([*command, "--help"])
    said = capsys.readouterr().out
    assert f"usage: saelab {' '.join(command)} [-h] [OPTIONS]" in said
    assert "(default: )" not in " ".join(said.replace("\u2502", " ").split())


def test_eval_json_prints_one_object_and_nothing_else(run: Path, capfd):
    assert main.main(["eval", str(run / "sae"), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert printed["hook_name"] == HOOK
    assert printed["split"] == "held_out"


def test_eval_again_returns_at_once_and_other_arguments_measure_anew(run: Path, capsys, monkeypatch):
    words = ["eval", str(run / "sae-l1"), "--json", "--dtype", "float32"]
    assert main.main(words) == 0
    first = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("saelab.evaluation.report._measure", Mock(side_effect=ValueError("measured again")))
        assert main.main(words) == 0
        assert capsys.readouterr().out == first
        assert main.main([*words, "--split", "all", "--allow-train"]) == 2


def test_eval_json_of_several_saes_names_them(run: Path, capsys):
    assert main.main(["eval", str(run), "--json"]) == 2
    assert f"name one of {run / 'sae'}, {run / 'sae-l1'}" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["add", "clamp", "scale", "ablate"])
def test_steer_prints_both_texts(run: Path, capsys, mode: str):
    import saelab

    store = saelab.load_features(run / "features")
    often = store.table(sort="n_fired", limit=1)[0]["feature"]
    words = ["--feature", str(often), "--mode", mode, "--strength", "30", "--max-new-tokens", "8"]
    assert main.main(["steer", str(run / "sae"), *words, "--prompt", "the river"]) == 0
    default, steered = capsys.readouterr().out.strip().split("\n\n", 1)
    assert default.startswith("default: the river")
    assert steered.startswith(f"feature {often}, {mode}")
    if mode == "add":
        assert default.partition(": ")[2] != steered.partition(": ")[2]


def test_demo_does_everything_and_goes_on(tmp_path, tiny_folder, texts_file, monkeypatch, capsys):
    text = [json.loads(line)["body"] for line in texts_file.read_text(encoding="utf-8").splitlines()]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in text), encoding="utf-8")
    out = tmp_path / "run"
    words = ["demo", "--model", str(tiny_folder), "--texts", str(corpus), "--hook-name", HOOK, "--out-dir", str(out)]
    words += ["--n-tokens", "4_000", "--train-tokens", "4_000", "--d-sae", "48", "--k", "4"]
    assert main.main([*words, "--no-serve"]) == 0
    first = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"cache", "sae", "features", "steering"} | {
        "annotations.sqlite",
        "report.json",
    }
    assert all(f"[{step}/6]" in first for step in range(1, 7))
    assert "features that were tried" in first and "  unsteered  " in first and "  2 p99 " in first
    assert f"Next: saelab dash {out}; " in first
    assert str(out) in first.splitlines()[-1]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != "journal.jsonl"}
    served = []
    monkeypatch.setattr("saelab.app.serve.serve", lambda *args, **options: served.append((args, options)))
    assert main.main(words) == 0
    assert served == [((out,), {"port": 8501})]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_cache_is_described_verified_and_repaired(run: Path, tmp_path, capsys):
    copy = shutil.copytree(run / "cache", tmp_path / "cache")
    assert main.main(["cache", "info", str(tmp_path)]) == 0
    assert HOOK in (out := capsys.readouterr().out) and "split train" in out
    assert main.main(["cache", "stats", str(copy)]) == 0
    assert "mean norm" in capsys.readouterr().out
    shard = next(copy.rglob(f"{HOOK}.safetensors"))
    before = shard.read_bytes()
    shard.write_bytes(before[:-8])
    assert main.main(["cache", "verify", str(tmp_path)]) == 2
    assert "saelab cache repair RUN" in capsys.readouterr().err
    assert main.main(["cache", "repair", str(tmp_path)]) == 0
    assert "rebuilt, byte for byte" in capsys.readouterr().out
    assert shard.read_bytes() == before
    assert main.main(["cache", "verify", str(tmp_path)]) == 0
    (copy / "manifest.json").unlink()
    assert main.main(["cache", "info", str(tmp_path)]) == 0
    assert "is unfinished" in capsys.readouterr().out


def test_dash_serves_the_run(run: Path, monkeypatch):
    served = []
    monkeypatch.setattr("saelab.app.serve.serve", lambda *args, **options: served.append((args, options)))
    assert main.main(["dash", str(run), "--port", "8600"]) == 0
    assert served == [((run,), {"port": 8600, "browser": False})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["harvst"], "unknown command 'harvst'; did you mean harvest?"),
        (["xyz"], "unknown command 'xyz'; choose one of demo, harvest, train"),
        (["train", "no-such", "--d-sae", "8", "--k", "2", "--n-tokens", "2048"], "saelab harvest no-such --hook-name"),
        (["train", "no-such", "--d-sae", "10"], "no-such holds no cache"),
        (["eval", "no-such"], "no-such holds no SAE"),
        (
            ["harvest", "out", "--hook-name", "x", "--n-tokens", "9", "--texts", "no.txt", "--model", "./no-model"],
            "no.txt",
        ),
        (["features", "no-such"], "no-such holds no SAE"),
        (["dash", "no-such"], "no SAE"),
        (["harvest", "out", "--hook-name", "x", "--n-tokens", "9", "--model", "./no-model"], "no-model"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("saelab: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_hook_names_those_that_exist(tmp_path, tiny_folder, texts_file, capsys):
    words = ["harvest", str(tmp_path / "run"), "--hook-name", "blocks.1.hook_resid_pots", "--n-tokens", "100"]
    words += ["--model", str(tiny_folder), "--texts", str(texts_file), "--column", "body", "--ctx-len", "64"]
    assert main.main(words) == 2
    assert HOOK in capsys.readouterr().err


def test_a_refused_training_leaves_no_sae_behind(run: Path, capsys):
    before = find_saes(run)
    words = ["train", str(run), "--name", "b", "--hook-name", "blocks.0.hook_resid_post", "--n-tokens", "4_000"]
    assert main.main([*words, "--d-sae", "48", "--k", "4"]) == 2
    assert "blocks.0.hook_resid_post" in capsys.readouterr().err
    assert find_saes(run) == before


def test_a_wrong_flag_or_value_is_exit_code_2(run: Path, capsys):
    for words in (["--k-foo", "3"], ["--k", "many"], ["--k", "100"]):
        with pytest.raises(SystemExit) as stopped:
            main.main(["train", str(run), "--d-sae", "8", "--n-tokens", "2048", *words])
        assert stopped.value.code == 2
        assert words[-1] in capsys.readouterr().err or words[0] == "--k-foo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "jumpreu"], "unknown --variant 'jumpreu'; did you mean jumprelu?"),
        (["--variant=zzz"], "unknown --variant 'zzz'; choose one of topk, "),
        (["--variant", "jumprelu", "--k=32"], "--k is not a flag of jumprelu (only of topk, batch_topk"),
        (["--l1_coefficient", "5"], "saelab train --variant topk --help"),
    ],
)
def test_a_flag_of_another_variant_is_named(run: Path, capsys, words, message):
    assert main.main(["train", str(run), "--d-sae", "8", "--n-tokens", "2048", *words]) == 2
    assert message in capsys.readouterr().err


def test_warnings_are_one_line(run: Path, tmp_path, capsys):
    shutil.copytree(run / "cache", tmp_path / "cache")
    words = ["train", str(tmp_path), "--d-sae", "8", "--k", "2", "--n-tokens", "20_000", "--batch-size", "10_000"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main.main(words) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "fewer than one batch" in line]
    assert len(warned) == 1 and warned[0].startswith("saelab: There are ")


def test_steer_of_several_saes_names_them(run: Path, capsys):
    assert main.main(["steer", str(run), "--feature", "3"]) == 2
    assert f"saelab steer {run / 'sae'} or saelab steer {run / 'sae-l1'}" in capsys.readouterr().err


def test_a_run_without_an_sae_names_the_next_command(run: Path, tmp_path, capsys):
    shutil.copytree(run / "cache", tmp_path / "cache")
    assert main.main(["features", str(tmp_path)]) == 2
    assert f"saelab train {tmp_path} --d-sae" in capsys.readouterr().err
    assert main.main(["dash", str(tmp_path / "none")]) == 2
    assert "it does not exist" in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(monkeypatch, tmp_path):
    monkeypatch.setenv("SAELAB_DEBUG", "1")
    with pytest.raises(Exception, match="holds no SAE"):
        main.main(["eval", str(tmp_path)])


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    for kept in ("", "40 activations are in RUN"):
        stopped = KeyboardInterrupt(kept) if kept else KeyboardInterrupt()
        monkeypatch.setattr(commands, "runs_of", Mock(side_effect=stopped))
        assert main.main(["eval", str(tmp_path)]) == 130
        said = f"Interrupted. {kept + '. ' if kept else ''}Repeat the same command to resume from what is on disk.\n"
        assert capsys.readouterr().err == "\n" + said


def test_sigterm_ends_a_command_as_ctrl_c_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(commands, "runs_of", lambda run, **_: os.kill(os.getpid(), signal.SIGTERM))
    assert main.main(["eval", str(tmp_path)]) == 130
    assert "resume from what is on disk" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_has_examples(command: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"Examples:\n  saelab {command} " in out or f"Examples:\n  saelab {command}\n" in out


def test_help_and_version_load_nothing_heavy():
    script = "import sys; from saelab.cli.main import main; main(['--help']); main(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for command in main.COMMANDS:
        assert f"\n  {command} " in done.stdout
    loaded = {module.split(".")[0] for module in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"torch", "numpy", "transformers", "transformer_lens", "datasets", "streamlit", "plotly"}


def test_crosscoders_and_transcoders_are_trained_from_flags(tmp_path, tiny_folder, texts_file, capsys):
    run, out = tmp_path / "run", "blocks.1.hook_mlp_out"
    source = ["--model", str(tiny_folder), "--dtype", "float32", "--texts", str(texts_file), "--column", "body"]
    size = ["--d-sae", "40", "--k", "4", "--n-tokens", "4_000", "--batch-size", "200"]
    train = ["train", str(run), *size]
    steps = [
        ["harvest", str(run), "--hook-name", HOOK, out, "--n-tokens", "4_000", "--ctx-len", "64", *source],
        [*train, "--variant", "crosscoder", "--name", "both"],
        [*train, "--variant", "crosscoder", "--name", "swapped", "--hook-names", out, HOOK, "--sparsity", "l1"],
        [*train, "--variant", "transcoder", "--name", "trans", "--hook-name", HOOK, "--hook-name-out", out],
        [*train, "--variant", "skip_transcoder", "--name", "skip", "--hook-name-out", out],
    ]
    for step in steps:
        assert main.main(step) == 0, capsys.readouterr().err
    known = {
        name: json.loads((run / f"sae-{name}" / "sae.json").read_text())
        for name in ("both", "swapped", "trans", "skip")
    }
    assert known["both"]["hook_names"] == [HOOK, out] and known["swapped"]["hook_names"] == [out, HOOK]
    assert known["swapped"]["config"]["sparsity"] == "l1"
    for name in ("trans", "skip"):
        assert (known[name]["hook_name"], known[name]["hook_name_out"], known[name]["d_out"]) == (HOOK, out, 32)
    capsys.readouterr()
    assert main.main(["eval", str(run / "sae-trans"), "--json", "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out)["hook_name"] == f"{HOOK} -> {out}"
    assert main.main(["features", str(run / "sae-both"), "--top-k", "3", "--n-tokens", "500"]) == 0
    assert "Labelling 40 features and writing their store" in capsys.readouterr().out
