"""Every command that reads or measures prints, with `--json`, one JSON object on standard output and nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_labels import Server

import saelab
from saelab.benchmarks.results import open_rows
from saelab.cli import bench_commands, cache_commands
from saelab.cli.answers import answering
from saelab.cli.main import COMMANDS, main
from saelab.saes import ITDAConfig

pytestmark = pytest.mark.usefixtures("models_load_in_fp32")

MAKE = {
    "demo",
    "harvest",
    "train",
    "finetune",
    "dash",
    "export",
    "push",
    "map",
    "mcp",
    "serve",
    "notebooks",
    "cache repair",
}
"""Commands that only make something, or serve."""
_SMALL = "--d-in 16 --n-features 32 --n-active 2 --d-sae 32 --k 2 --n-tokens 512 --batch-size 256 --variants topk --device cpu"
ANSWERS: dict[str, tuple[str, set[str]]] = {
    "eval": ("{run}", {"fvu", "l0", "ce_loss_recovered", "split", "hook_name"}),
    "find": (
        "{run} --feature {feature} --max-new-tokens 4 --prompt weather --model {model}",
        {"n_tried", "n_working", "trials", "rows"},
    ),
    "steer": ("{run} --feature {feature} --max-new-tokens 2", {"default", "steered", "prompt", "seed"}),
    "sweep": ("{run} --n-tokens 512 --d-sae 32 --k 2 --out-dir {out} --batch-size 256", {"rows", "folder"}),
    "features": ("{run}", {"n_features", "n_silent", "n_tokens", "hook_name", "model"}),
    "probe": (
        "{run} --model {model} --sets wordnet_noun.food --ks 1 --n-splits 1 --n-hard-sets 0",
        {"sae", "hooks", "sets", "regimes", "draws", "config"},
    ),
    "diff": ("{layers} --n-tokens 512", {"a", "b", "kind", "features", "counts", "conclusions", "path"}),
    "absorption": ("{run} --model {model} --n-words 80 --max-k 2", {"sae", "hooks", "letters", "absorption", "n_main"}),
    "similarity": ("{atoms}", {"saes", "jaccard", "model_jaccard", "layer_matching_accuracy"}),
    "label": ("{run} --address {server} --model m --feature {feature}", {"labelled", "left_out", "unusable"}),
    "verify": ("{run} --n-examples 5", {"n_examples", "n_features", "largest_error"}),
    "import": ("{foreign} {out} --model {model} --texts {texts} --n-tokens 512", {"check", "warnings", "report"}),
    "releases": ("gemma-scope-2 270m --limit 2", {"n_saes", "releases", "saes"}),
    "cache info": ("{run}", {"n_rows", "hooks", "masked", "finished", "bytes", "split"}),
    "cache verify": ("{run}", {"n_files", "folder"}),
    "cache stats": ("{run}", {"hooks", "folder"}),
    "bench synthetic": ("--out-dir {out} --data signed --seeds 0 --steps 2", {"rows", "claims"}),
    "bench family": ("{run} --out-dir {out} --variants topk --d-sae 32 --l0 2 --steps 2", {"rows", "comparisons"}),
    "bench large": (f"{_SMALL} --out-dir {{out}}", {"rows", "folder"}),
    "bench claims": ("--out-dir {claims} --only signed --seeds 0", {"claims", "page", "folder"}),
}


def answering_commands() -> Iterator[str]:
    for name, (function, _) in COMMANDS.items():
        if "as_json" in inspect.signature(function).parameters:
            yield name
    for name, module in (("cache", cache_commands), ("bench", bench_commands)):
        for one in vars(module).values():
            if isinstance(one, type) and dataclasses.is_dataclass(one):
                flags = {field.name for field in dataclasses.fields(one)}
                yield from [f"{name} {one.__name__.lower()}"] if "as_json" in flags else []


@pytest.fixture(scope="module")
def words(hostile_run, tiny_folder, tmp_path_factory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("json")
    run = shutil.copytree(hostile_run, home / "run")
    saelab.save_sae(saelab.load_sae(run), home / "foreign", format="sae_lens")
    server = Server(lambda *_: "a label")
    feature = saelab.load_features(run).table("n_fired", limit=1)[0]["feature"]
    layers = home / "layers"  # of one model: its crosscoder compares two hooks
    cache = saelab.harvest(
        saelab.load_model(str(tiny_folder)), run / "texts.jsonl", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"],
        1024, layers / "cache", ctx_len=64, progress=False,
    )  # fmt: skip
    small = saelab.TrainConfig(n_tokens=1024, batch_size=256, warmup_steps=1, checkpoint_every=0, device="cpu")
    saelab.train(saelab.saes.CrosscoderConfig(d_sae=32, k=4), cache, small, layers / "sae", progress=False)
    for name in ("a", "b"):
        small = saelab.TrainConfig(n_tokens=128, batch_size=64, device="cpu")
        saelab.train(ITDAConfig(8, 2), torch.randn(100, 8), small, home / "atoms" / f"sae-{name}", progress=False)
    places = {
        "run": run,
        "layers": layers,
        "atoms": home / "atoms",
        "foreign": home / "foreign",
        "model": tiny_folder,
        "texts": run / "texts.jsonl",
    }
    with open_rows(places.setdefault("claims", home / "claims"), {}, ("data", "sae", "seed")) as rows:
        for sae in ("topk", "abs_topk"):  # measured already
            rows.get(lambda: {"fvu": 0.1, "l0": 3, "recovered": 1.0, "copies": 1}, data="signed", sae=sae, seed=0)
    yield {**{name: str(path) for name, path in places.items()}, "server": server.address, "feature": str(feature)}
    server.close()


def test_every_command_answers_or_makes_something():
    assert set(answering_commands()) == set(ANSWERS)
    assert {name.partition(" ")[0] for name in (*ANSWERS, *MAKE)} == set(COMMANDS)


@pytest.mark.parametrize("name", ANSWERS)
def test_one_object_and_nothing_else(name: str, words, tmp_path, capfd):
    given, keys = ANSWERS[name]
    asked = [*name.split(), *given.format(**words, out=tmp_path / "out").split()]
    assert main([*asked, "--json"]) == 0, capfd.readouterr().err
    (line,) = capfd.readouterr().out.splitlines()
    assert keys <= json.loads(line).keys() and line.isascii()
    if name not in ("bench synthetic", "sweep", "import"):  # said again for readers
        assert main(asked) == 0
        assert line not in capfd.readouterr().out


def test_features_are_found_and_shown(words, capfd):
    store = saelab.load_features(words["run"])
    assert main(["features", words["run"], "--find", "weather", "--json", "--limit", "3"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [row["feature"] for row in found["features"]] == [row["feature"] for row in store.search("weather", 3)]
    assert found["features"][0]["label"] == store.feature(found["features"][0]["feature"]).label
    token = store.pieces([store.feature(int(words["feature"])).row["peak_token"]])[0].decode()
    assert main(["features", words["run"], "--find", f'"{token}"', "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["features"]
    assert [row["feature"] for row in rows] == [row["feature"] for row in store.firing_on(token, 20)]
    assert rows[0]["peak_share"] >= rows[-1]["peak_share"] > 0
    assert main(["features", words["run"], "--feature", words["feature"], "3", "--json", "--limit", "2"]) == 0
    (card, _) = json.loads(capfd.readouterr().out)["features"]
    feature = store.feature(int(words["feature"]))
    assert card["p99"] == feature.p99 and card["n_fired"] == feature.n_fired and len(card["examples"]) == 2
    for shown, example in zip(card["examples"], feature.examples(2), strict=True):
        assert shown["before"] + shown["peak"] + shown["after"] == example.text and shown["value"] == example.value
    assert main(["features", words["run"], "--find", "weather"]) == 0
    assert "\u202e" not in capfd.readouterr().out


def test_two_files_of_texts_are_contrasted(words, tmp_path, capfd):
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    a.write_text("".join(f"The weather today {i} is fine.\n\n" for i in range(10)), encoding="utf-8")
    b.write_text("".join(json.dumps({"text": f"def main({i}): return\n{i}"}) + "\n" for i in range(10)), "utf-8")
    assert main(["features", words["run"], "--contrast", str(a), str(b), "--json", "--limit", "4"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["n_texts"] == [10, 10] and found["enough"] and len(found["more_in_a"]) == 4
    assert all(row["difference"] < 0 for row in found["more_in_b"])
    assert main(["features", words["run"], "--contrast", str(a), str(b)]) == 0
    assert f"Fire in more texts of {a}" in (said := capfd.readouterr().out) and found["summary"] in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["features", "{run}", "--find", " "], "at least one word"),
        (["features", "{run}", "--feature", "96"], "features 0 to 95"),
        (["features", "{run}", "--find", "a", "--feature", "1"], "ask one"),
        (["features", "{run}", "--contrast", "no.txt", "no.txt"], "no.txt"),
        (["verify", "no-such"], "no SAE"),
        (["releases", "xyzzy"], "no release"),
        (["cache", "info", "no-such"], "no-such"),
    ],
)
def test_an_error_leaves_standard_output_empty(asked, said, words, capfd):
    assert main([*(word.format(**words) for word in asked), "--json"]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and said in printed.err and printed.err.count("\n") == 1


def test_several_saes_are_no_one_object(words, tmp_path, capfd):
    run = tmp_path / "two"
    for name in ("sae", "sae-b"):
        shutil.copytree(Path(words["run"]) / "sae", run / name)
    for command in ("eval", "verify", "features"):
        assert main([command, str(run), "--json"]) == 2
        printed = capfd.readouterr()
        assert printed.out == "" and f"holds 2 SAEs; name one of {run / 'sae'}, {run / 'sae-b'}" in printed.err


def test_what_json_cannot_hold(capfd):
    with answering(True) as answer:
        print("aside")
        answer({"nan": float("nan"), "path": Path("a/b"), "tuple": (1, None, True), 3: {"inf": -float("inf")}}, "shown")
    assert json.loads(capfd.readouterr().out) == {
        "nan": None,
        "path": "a/b",
        "tuple": [1, None, True],
        "3": {"inf": None},
    }
    with pytest.raises(KeyError), answering(True) as answer:
        answer({"a": 1})
        raise KeyError
    assert capfd.readouterr().out == ""
