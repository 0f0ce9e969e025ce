"""Labels by a model, against a local server that answers well, slowly, wrongly, and not at all."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny_llama

import saelab
from saelab.cli.main import main
from saelab.errors import SaelabError
from saelab.labels import Endpoint, LocalModel, label_features, prompts
from saelab.labels.scoring import Case, score, wilson


class Server:
    """Answers as `reply(task, texts)` says: a text, a status code, or bytes that are no chat completion."""

    def __init__(self, reply: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                answer = reply(*(message["content"] for message in body["messages"]))
                status = answer if isinstance(answer, int) else 200
                sent = answer if isinstance(answer, bytes) else json.dumps(
                    {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                ).encode()  # fmt: skip
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"" if status != 200 else sent)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(reply: Any) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def store(hostile_run, tmp_path):
    return saelab.load_features(shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))


def knows_all(store, feature: int):
    """A perfect judge of one feature: it knows the stored texts in which it fires, and its marks."""
    fires = {
        prompts.plain(one)
        for kind in ("top", "uniform", "quantile")
        for one in store.feature(feature).examples(kind=kind)
    }
    right = {prompts.marked(one) for one in store.feature(feature).examples(kind="uniform")}

    def reply(task: str, texts: str) -> str:
        lines = [re.sub(r"^\d+\. ", "", line) for line in texts.split("\n")]
        if "Say what these have in common" in task:
            return ' "Words of weather."\nBecause ...'
        known = right if "<<marked>>" in task else fires
        return f"I think: {[i for i, line in enumerate(lines, 1) if line in known]}"

    return reply


def test_a_good_judge_labels_and_scores(store, serve):
    index = store.table("n_fired", limit=1)[0]["feature"]
    server = serve(knows_all(store, index))
    explainer = Endpoint(server.address, "judge")
    assert label_features(store, explainer, [index], progress=False) == {"labelled": 1, "left_out": 0, "unusable": 0}
    feature = store.feature(index)
    assert feature.label == "Words of weather"
    found = feature.scores["detection"]
    assert found["balanced_accuracy"] == 1.0 and found["fails"] == [] and found["label"] == feature.label
    assert found["n_positive"] >= 4 and found["n_negative"] >= 4 and found["interval"][0] < 1.0 == found["interval"][1]
    assert feature.scores["fuzz"]["balanced_accuracy"] == 1.0
    assert {one["path"] for one in server.asked} == {"/v1/chat/completions"} and len(server.asked) == 3
    assert all("<<" in one["messages"][1]["content"] for one in server.asked[:1])
    assert label_features(store, explainer, [index], progress=False)["left_out"] == 1 and len(server.asked) == 3
    store.annotations.add(index, "label", "by hand")
    assert store.feature(index).label == "by hand"


def test_a_judge_that_says_yes_to_all_is_at_chance(store, serve):
    index = store.table("n_fired", limit=1)[0]["feature"]
    server = serve(lambda task, texts: "thing" if "in common" in task else str(list(range(1, texts.count("\n") + 2))))
    label_features(store, Endpoint(server.address, "m"), [index], progress=False)
    found = store.feature(index).scores["detection"]
    assert found["balanced_accuracy"] == 0.5 and found["found"] == found["n_positive"] and found["rejected"] == 0
    assert len(found["fails"]) == found["n_negative"] and {one["fits"] for one in found["fails"]} == {False}
    assert found["interval"][0] < 0.5 < found["interval"][1]


ANSWERS = {
    "a page": (b"<!DOCTYPE html><title>It works</title>", "something else than a chat completion"),
    "no choices": (b'{"choices": []}', "something else than a chat completion"),
    "forbidden": (403, "refused the request .403"),
    "too busy": (503, "refused the request .503"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_named_and_nothing_is_written(store, serve, name):
    answer, said = ANSWERS[name]
    server = serve(lambda *_: answer)
    with pytest.raises(SaelabError, match=said):
        label_features(store, Endpoint(server.address, "m", attempts=2), [0, 1, 2], progress=False)
    assert store.annotations.latest("model_label") == [] and len(server.asked) == (2 if answer == 503 else 1)


def test_a_server_that_is_slow_away_or_busy_for_a_while(store, serve, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    index, real = store.table("n_fired", limit=1)[0]["feature"], threading.Event()
    slow = serve(lambda *_: real.wait(3) or "late")
    with pytest.raises(SaelabError, match="did not answer.*within 0.2 s"):
        label_features(store, Endpoint(slow.address, "m", timeout=0.2, attempts=1), [index], progress=False)
    real.set()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(SaelabError, match="did not answer"):
        label_features(store, Endpoint(f"http://127.0.0.1:{port}/v1", "m", attempts=2), [index], progress=False)
    with pytest.raises(SaelabError, match="must begin with http"):
        label_features(store, Endpoint("file:///etc/passwd", "m"), [index], progress=False)
    good, failures = knows_all(store, index), [500, 429]
    server = serve(lambda *given: failures.pop() if failures else good(*given))
    assert label_features(store, Endpoint(server.address, "m"), [index], progress=False)["labelled"] == 1


def test_answers_that_are_no_label_or_no_list_are_left_out(store, serve):
    index = store.table("n_fired", limit=1)[0]["feature"]
    server = serve(lambda task, texts: "" if "in common" in task else "x")
    assert label_features(store, Endpoint(server.address, "m"), [index], progress=False)["unusable"] == 1
    server = serve(lambda task, texts: "a label" if "in common" in task else "none of them [99]")
    assert label_features(store, Endpoint(server.address, "n"), [index], progress=False)["labelled"] == 1
    assert store.feature(index).scores == {}


def test_an_interrupted_call_goes_on(store, serve):
    chosen = store.features("n_fired", True, {"n_fired": (20, None)})[:4]
    calls: list[int] = []

    def reply(task: str, texts: str) -> Any:
        calls.append(1)
        return 403 if len(calls) == 5 else "a label" if "in common" in task else "[]"

    server = serve(reply)
    with pytest.raises(SaelabError):
        label_features(store, Endpoint(server.address, "m"), chosen, progress=False)
    assert len(store.annotations.latest("model_label")) == 1
    counts = label_features(store, Endpoint(server.address, "m"), chosen, progress=False)
    assert counts == {"labelled": 3, "left_out": 1, "unusable": 0}


def test_the_key_is_sent_and_not_kept(store, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(knows_all(store, 0))
    label_features(store, Endpoint(server.address, "m"), store.features("n_fired")[:1], progress=False)
    assert server.asked[0]["key"] == "Bearer sk-secret"
    assert b"sk-secret" not in store.annotations.path.read_bytes() and "sk-secret" not in repr(
        Endpoint(server.address, "m")
    )


def test_a_local_model_is_asked(store, tiny_lm, tmp_path):
    index = store.table("n_fired", limit=1)[0]["feature"]
    long = saelab.load_model(build_tiny_llama(tmp_path / "long", positions=4096))
    counts = label_features(store, LocalModel(long), [index], scores=(), progress=False)
    assert counts["labelled"] + counts["unusable"] == 1
    bare = saelab.load_model(tiny_lm.model)
    with pytest.raises(SaelabError, match="no chat template"):
        label_features(store, LocalModel(bare), [index], progress=False)


def test_the_command(store, serve, capsys):
    run, index = store.folder.parent, store.table("n_fired", limit=1)[0]["feature"]
    server = serve(knows_all(store, index))
    words = ["label", str(run), "--address", server.address, "--model", "judge", "--feature", str(index)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"are sent to {server.address} (model judge)" in said and "1 labelled" in said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == 1
    assert main(["label", str(run)]) == 2 and "--model" in capsys.readouterr().err


def test_scores_count_both_classes(store):
    (one,) = store.feature(store.features("n_fired")[0]).examples(1)
    cases = [Case("t", i < 4, "uniform" if i < 4 else "near_miss", one) for i in range(10)]
    found = score(cases, {0, 1, 2, 9})
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 5 / 6) / 2)
    assert (found["n_positive"], found["n_negative"], found["found"], found["rejected"]) == (4, 6, 3, 5)
    assert [(fail["kind"], fail["fits"]) for fail in found["fails"]] == [("uniform", True), ("near_miss", False)]
    assert wilson(0, 0) == (0.0, 1.0) and wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)


def test_answers_are_read():
    for answer, wanted in (
        ("[1, 3]", {0, 2}),
        ("none: []", set()),
        ("[1,2,]", {0, 1}),
        ("[9]", None),
        ("yes", None),
        ("[9] then [2]", {1}),
    ):
        assert prompts.numbers(answer, 3) == wanted
    assert prompts.phrase("\n **Rain.** \nmore") == "Rain" and prompts.phrase(" \n") is None
    assert prompts.phrase("<html>") is None and len(prompts.phrase("x" * 500) or "") == 120
    assert Path(prompts.__file__).exists()
