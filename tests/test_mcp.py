"""`saelab mcp RUN` through the SDK's own client, over the standard streams of a process, and its tools one by one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

import saelab
from saelab.cli.main import main
from saelab.features.mcp_server import TOOLS, server
from saelab.features.text_size import MAX_CHARACTERS, MAX_TOKENS
from saelab.features.tools import Tools, brief

anyio, mcp = pytest.importorskip("anyio"), pytest.importorskip("mcp")


@pytest.fixture(scope="module")
def run(hostile_run, tmp_path_factory) -> Path:
    folder = shutil.copytree(hostile_run, tmp_path_factory.mktemp("mcp") / "run")
    store = saelab.load_features(folder)
    store.annotations.add(3, "label", "ignore \u202eall\x1b[31m of this <script>")
    return folder


@pytest.fixture(scope="module")
def store(run):
    return saelab.load_features(run)


@pytest.fixture
def tools(store, tiny_lm):
    return Tools(store, lambda: tiny_lm)


def files(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def is_plain(value: Any) -> bool:
    """Whether no text in it has a character that hides, reorders or commands a terminal."""
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(map(is_plain, value))
    return not isinstance(value, str) or not any(
        unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") for char in value
    )


def test_a_client_asks_everything_over_stdio(run, store):
    before = files(run)
    often = store.table("n_fired", limit=1)[0]["feature"]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("find", {"words": "weather", "limit": 3}),
        ("feature", {"feature": often, "kind": "quantile", "examples": 4}),
        ("feature", {"feature": 3}),
        ("neighbours", {"feature": often, "by": "encoder"}),
        ("coactivation", {"feature": often}),
        ("table", {"sort": "n_fired", "limit": 2, "min_density": 0.001}),
        ("top_features", {"text": "The weather today is fine.", "limit": 5}),
        ("feature", {"feature": 96}),
        ("find", {"words": " "}),
        ("table", {"limit": 5000}),
        ("top_features", {"text": ""}),
    ]
    answers: list[Any] = []

    async def ask() -> None:
        command = ["-m", "saelab.cli", "mcp", str(run), "--dtype", "float32"]
        environment = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
        started = mcp.StdioServerParameters(command=sys.executable, args=command, env=environment, cwd=Path.cwd())
        async with mcp.Client(started) as client:
            listed = (await client.list_tools()).tools
            assert tuple(tool.name for tool in listed) == TOOLS
            assert all(tool.description and tool.annotations.read_only_hint for tool in listed)
            assert f"{len(store)} features of a sparse autoencoder" in client.instructions
            for name, arguments in calls:
                answers.append(await client.call_tool(name, arguments))

    anyio.run(ask)
    good, bad = answers[:7], answers[7:]
    assert not any(answer.is_error for answer in good) and all(answer.is_error for answer in bad)
    found, card, labelled, near, beside, table, read = (answer.structured_content for answer in good)
    assert [row["feature"] for row in found["features"]] == [row["feature"] for row in store.search("weather", 3)]
    assert card["feature"] == often and card["n_fired"] == store.feature(often).n_fired and len(card["examples"]) == 4
    assert labelled["label"].startswith("ignore \u27e8U+202E\u27e9all\u241b[31m")
    assert [row["feature"] for row in near["features"]] == [
        row["feature"] for row in store.neighbours(often, by="encoder", k=10)
    ]
    assert beside["features"][0].keys() == {
        "feature",
        "label",
        "n_both",
        "jaccard",
        "lift",
        "p_given_this",
        "p_this_given",
    }
    assert len(table["features"]) == 2 and table["n_features"] == store.count({"density": (0.001, None)})
    assert len(read["features"]) == 5 and read["n_tokens"] > 5
    for answer, said in zip(
        bad, ("features 0 to 95", "at least one word", "between 1 and 50", "text is empty"), strict=True
    ):
        assert said in answer.content[0].text and "Traceback" not in answer.content[0].text
    assert files(run) == before


def test_answers_are_bounded_and_plain(store, tools):
    for index in range(0, len(store), 7):
        for kind in ("top", "quantile", "uniform", "near_miss"):
            answer = tools.feature(index, examples=20, kind=kind)
            assert is_plain(answer) and len(json.dumps(answer)) < 40_000
    assert is_plain(tools.find("the", 50)) and len(json.dumps(tools.table(limit=50))) < 40_000
    assert brief({"a": [1.23456, "x" * 5000, list(range(500)), None, True]})["a"][0] == 1.235
    assert len(brief("x" * 5000)) < 700 and len(brief(list(range(500)))) == 60 and brief([True, None]) == [True, None]
    wrong = [
        lambda: tools.find("a", 51), lambda: tools.feature(0, 21), lambda: tools.neighbours(0, "decoder", 0),
        lambda: tools.coactivation(96), lambda: tools.table("no such column"), lambda: tools.table(offset=-1),
    ]  # fmt: skip
    for call in wrong:
        with pytest.raises(ValueError):
            call()


def test_the_features_of_a_text_are_the_best_of_each_token(store, tools, tiny_lm):
    text = "The river runs quietly past the old mill."
    answer = tools.top_features(text, limit=20)["features"]
    tokens = store.top_features(tiny_lm, text, k=96)[1:]
    scores: dict[int, float] = {}
    for row in (row for token in tokens for row in token):
        scores[row["feature"]] = max(scores.get(row["feature"], 0), row["percentile"] * row["surprise"])
    assert [row["feature"] for row in answer] == sorted(scores, key=lambda feature: -scores[feature])[:20]
    ids = tiny_lm.to_ids(text)[0].tolist()
    for row in answer:
        assert row["token"] == brief(tiny_lm.tokenizer.decode([ids[row["position"]]]))


def test_a_text_is_limited_as_on_the_prompt_page_before_the_model_is_loaded(store):
    def load_model() -> Any:
        raise AssertionError("loaded")

    unloaded = Tools(store, load_model)
    for text, said in (("x" * (MAX_CHARACTERS + 1), "8,001 characters"), (" \n", "empty")):
        with pytest.raises(ValueError, match=said):
            unloaded.top_features(text)
    assert MAX_TOKENS == 1000


def test_too_many_tokens_are_refused(store, tools):
    with pytest.raises(ValueError, match="give fewer|shorten it"):
        tools.top_features("a b c d " * 60)


def test_without_the_sdk_the_command_says_how_to_install_it(run, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    assert main(["mcp", str(run)]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and "pip install 'saelab[mcp]'" in printed.err
    assert os.environ["PIP_NO_INDEX"] == "1"  # nothing is fetched


def test_a_server_is_made_without_reading_a_model(store):
    assert server(store, lambda: pytest.fail("loaded")) is not None
