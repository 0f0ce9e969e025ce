"""`saelab serve RUN` through OpenAI's own client, over real sockets: every answer is the text of `lm.generate` alone."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import HOOK, make_run

import saelab
from saelab.cli.main import main
from saelab.errors import SaelabError
from saelab.serving import responses
from saelab.serving.asked import Bounds
from saelab.serving.guard import find_token
from saelab.serving.plans import Plans, model_name
from saelab.serving.server import ModelServer, checked_hosts
from saelab.steering import Direction, Plan

openai = pytest.importorskip("openai")

TOKEN = "a-token-of-the-tests"
MODEL = "tiny-llama"
PROMPT = "The river runs"
MESSAGES = [{"role": "user", "content": "The river runs past"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm) -> Path:
    folder = make_run(tmp_path_factory.mktemp("serving") / "run", tiny_lm)
    train = saelab.TrainConfig(n_tokens=6_000, batch_size=256, warmup_steps=5, checkpoint_every=0, device="cpu")
    config = saelab.saes.TopKConfig(d_sae=48, k=4)
    sae = saelab.train(config, folder / "cache", train, folder / "sae", progress=False)
    assert isinstance(sae, saelab.saes.SAE)
    saelab.collect_features(sae, tiny_lm, out_dir=folder / "features", progress=False)
    return folder


@pytest.fixture(scope="module")
def plans(run) -> dict[str, Plan]:
    """Plans that change the text; "preset" is one of the run."""
    store = saelab.load_features(run)
    first, second = (store.feature(row["feature"]) for row in store.table(limit=2))
    vector = torch.linspace(-1, 1, 32)
    made = {
        "first": Plan((first * 6.0,), on="generated"),
        "second": Plan((second.clamp(9.0),), keep_norm=True),
        "preset": Plan((first * -5.0, Direction(vector, "blocks.0.hook_resid_post").add(2.0)), cap=4.0),
    }
    made["preset"].save(run / "steering" / "presets" / "preset.json")
    return made


@contextmanager
def serving(lm: Any, run: Path, **options: Any) -> Iterator[ModelServer]:
    server = ModelServer(lm, Plans(run), TOKEN, port=0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tiny_lm, run, plans) -> Iterator[ModelServer]:
    with serving(tiny_lm, run, bounds=Bounds(max_tokens=110)) as made:
        yield made


@contextmanager
def connected(server: ModelServer, token: str = TOKEN) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.address, api_key=token, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def client(server) -> Iterator[Any]:
    with connected(server) as made:
        yield made


def raw(
    server: ModelServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer, without OpenAI's client."""
    connection = http.client.HTTPConnection("127.0.0.1", server.socket.getsockname()[1], timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def generated(lm: Any, prompt: str, plan: Plan | None = None, **options: Any) -> str:
    """What the model alone continues a prompt with."""
    with lm.steer(*([] if plan is None else [plan])):
        return lm.generate(prompt, **options)[len(prompt) :]


def text_of(client: Any, is_chat: bool, is_streamed: bool, **options: Any) -> str:
    """The text of one answer, however it was asked for."""
    if is_chat:
        found = client.chat.completions.create(messages=MESSAGES, stream=is_streamed, **options)
        if is_streamed:
            return "".join(chunk.choices[0].delta.content or "" for chunk in found)
        return found.choices[0].message.content
    found = client.completions.create(prompt=PROMPT, stream=is_streamed, **options)
    return "".join(chunk.choices[0].text for chunk in found) if is_streamed else found.choices[0].text


def test_requests_at_once_get_the_text_each_gets_alone(server, tiny_lm, plans):
    cases = []
    for i in range(24):
        is_chat, is_streamed = bool(i % 2), bool(i // 2 % 2)
        name = [None, "first", "second", "preset"][(i + i // 8) % 4]
        options: dict[str, Any] = {"temperature": [0.0, 0.9][i // 4 % 2], "seed": i}
        alone = generated(
            tiny_lm,
            tiny_lm.chat(MESSAGES) if is_chat else PROMPT,
            None if name is None else plans[name],
            max_new_tokens=10,
            **options,
        )
        asked: dict[str, Any] = options | {"model": "preset" if name == "preset" else MODEL, "max_tokens": 10}
        if name in ("first", "second"):
            told = plans[name].to_json()
            asked["extra_body"] = {"steering": told if i % 3 else json.loads(told)}
        cases.append((is_chat, is_streamed, asked, alone))
    assert len({alone for *_, alone in cases}) > 15
    with connected(server) as client, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda case: text_of(client, case[0], case[1], **case[2]), cases))
    for text, case in zip(found, cases, strict=True):
        assert text == case[3], case


def test_several_texts_are_those_of_the_seeds_after_it(client, tiny_lm, plans):
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0.8, "seed": 5, "n": 3}
    prompts = [PROMPT, "It came to pass"]
    steered = {"steering": plans["first"].to_json()}
    found = client.completions.create(prompt=prompts, extra_body=steered, **options)
    expected = [
        generated(tiny_lm, prompt, plans["first"], max_new_tokens=6, temperature=0.8, seed=5 + j)
        for prompt in prompts
        for j in range(3)
    ]
    assert [choice.text for choice in found.choices] == expected and len(set(expected)) > 3
    assert [choice.saelab["seed"] for choice in found.choices] == [5, 6, 7, 5, 6, 7]
    streamed = ["", "", ""]
    for chunk in client.completions.create(prompt=PROMPT, stream=True, extra_body=steered, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected[:3]
    assert (
        client.completions.create(prompt=tiny_lm.to_ids(PROMPT)[0].tolist(), extra_body=steered, **options)
        .choices[0]
        .text
        == expected[0]
    )


def test_an_answer_says_what_steering_did_and_what_it_counted(client, tiny_lm, plans):
    plan, options = plans["second"], {"model": MODEL, "temperature": 0, "max_tokens": 5}
    found = client.completions.create(prompt=PROMPT, extra_body={"steering": plan.to_json()}, **options)
    generated(tiny_lm, PROMPT, plan, max_new_tokens=5)
    (report,) = tiny_lm.last_report
    assert found.choices[0].saelab["report"] == [report._asdict() | {"edits": list(report.edits)}]
    n_prompt = tiny_lm.to_ids(PROMPT).shape[1]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (n_prompt, 5)
    assert found.choices[0].finish_reason == "length"
    *_, last = client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **options)
    assert last.usage == found.usage and last.choices == []
    assert client.completions.create(prompt=PROMPT, **options).choices[0].saelab["report"] == []


def test_without_a_seed_texts_differ_and_the_answer_tells_it(client, tiny_lm):
    first, second = (client.completions.create(model=MODEL, prompt=PROMPT).choices[0] for _ in range(2))
    assert first.text != second.text
    again = generated(tiny_lm, PROMPT, max_new_tokens=16, temperature=1.0, seed=first.saelab["seed"])
    assert first.text == again


def test_log_probabilities_are_those_of_the_logits(client, tiny_lm, plans):
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0.7, "seed": 3}
    options["extra_body"] = {"steering": plans["first"].to_json()}
    with tiny_lm.steer(plans["first"]):
        found = tiny_lm.generate_ids(PROMPT, 8, 0.7, 3, keep_logits=True)
        chat = tiny_lm.generate_ids(tiny_lm.chat(MESSAGES), 8, 0.7, 3, keep_logits=True)
    for generation, is_chat in ((found, False), (chat, True)):
        logprobs = torch.log_softmax(generation.logits, -1)
        new = generation.ids[generation.n_prompt :]
        expected = logprobs[torch.arange(len(new)), new].tolist()
        best = logprobs.topk(3).values.tolist()
        if is_chat:
            extra = {"logprobs": True, "top_logprobs": 3}
            told = client.chat.completions.create(messages=MESSAGES, **options, **extra).choices[0].logprobs.content
            assert [one.logprob for one in told] == pytest.approx(expected)
            assert [[one.logprob for one in token.top_logprobs] for token in told] == [
                pytest.approx(row) for row in best
            ]
            text = b"".join(bytes(one.bytes) for one in told).decode(errors="replace")
            assert text == text_of(client, True, False, **options)
            chunks = client.chat.completions.create(messages=MESSAGES, stream=True, **options, **extra)
            parts = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
            assert [one for part in parts for one in part] == told
        else:
            told = client.completions.create(prompt=PROMPT, logprobs=3, **options).choices[0]
            assert told.logprobs.token_logprobs == pytest.approx(expected)
            assert [sorted(row.values())[-3:][::-1] for row in told.logprobs.top_logprobs] == [
                pytest.approx(row) for row in best
            ]
            for token, at in zip(told.logprobs.tokens, told.logprobs.text_offset, strict=True):
                assert token.startswith("bytes:") or told.text[at:].startswith(token)


def test_a_stop_word_ends_the_text_before_it(client, tiny_lm):
    text = generated(tiny_lm, PROMPT, max_new_tokens=40, temperature=0.9, seed=2)
    ends = [at for at in range(8, 38) if text[at : at + 2].isascii() and text.find(text[at : at + 2]) == at]
    assert len(ends) > 4
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0.9, "seed": 2}
    for at in ends[:5]:
        stop = [text[at : at + 2], "nowhere in it"]
        found = client.completions.create(stop=stop, logprobs=0, **options)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (text[:at], "stop")
        assert found.usage.completion_tokens < 40
        assert all(offset < at for offset in found.choices[0].logprobs.text_offset)
        streamed = [chunk.choices[0] for chunk in client.completions.create(stop=stop, stream=True, **options)]
        assert "".join(one.text for one in streamed) == text[:at]
        assert streamed[-1].finish_reason == "stop" and len(streamed) > 2


def test_the_end_of_the_model_is_a_stop(tiny_folder, run):
    lm = saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")
    new = lm.generate_ids(PROMPT, 6).ids[-6:].tolist()
    last = next(i for i in range(1, 6) if new[i] not in new[:i])
    lm.model.generation_config.eos_token_id = new[last]
    with serving(lm, run) as server, connected(server) as client:
        found = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, logprobs=0)
        assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens == last + 1
        assert found.choices[0].text == generated(lm, PROMPT, max_new_tokens=16)
        assert len(found.choices[0].logprobs.tokens) == last  # the token that ended it is no text


def test_models_are_the_language_model_and_the_presets(client, run, plans):
    assert [model.id for model in client.models.list()] == [MODEL, "preset"]
    assert client.models.retrieve("preset").id == "preset"
    later = plans["first"].save(run / "steering" / "presets" / "later.json")
    assert [model.id for model in client.models.list()] == [MODEL, "later", "preset"]
    later.write_text("{", encoding="utf-8")
    with pytest.raises(openai.BadRequestError, match="preset 'later' cannot be used.*no JSON"):
        client.completions.create(model="later", prompt=PROMPT)
    later.unlink()
    for name in ("later", "../presets/preset", "sae"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.models.retrieve(name)
        with pytest.raises(openai.NotFoundError, match="does not exist; there: tiny-llama, preset"):
            client.completions.create(model=name, prompt=PROMPT)


def test_without_the_token_nothing_is_answered(server, caplog):
    body = json.dumps({"model": MODEL, "prompt": PROMPT})
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/nowhere"),
        ("OPTIONS", "/v1/models"),
    ):
        for headers in (
            {},
            {"Authorization": "Bearer " + TOKEN[:-1]},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": "Bearer caf\u00e9"},
            {"Authorization": TOKEN},
        ):
            status, told, answer = raw(server, method, f"{path}?token={TOKEN}&api_key={TOKEN}", body, **headers)
            assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
            assert not [name for name in told if name.startswith("access-control")]
    with connected(server, "another-token") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert TOKEN not in caplog.text and PROMPT not in caplog.text


def test_another_host_is_refused_and_no_page_may_ask(server):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert raw(server, "GET", "/v1/models", **headers)[0] == 200
    assert raw(server, "GET", "/v1/models", Host="rebound.example", **headers)[0] == 400
    status, told, _ = raw(server, "OPTIONS", "/v1/models", Origin="http://a.example", **headers)
    assert status == 405 and not [name for name in told if name.startswith("access-control")]
    status, _, answer = raw(server, "GET", "/v1/embeddings", **headers)
    assert status == 404 and "POST /v1/completions" in json.loads(answer)["error"]["message"]


REFUSED = [
    ({"top_p": 0.5}, "top_p"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"echo": True}, "echo"),
    ({"extra_body": {"min_p": 0.1}}, "min_p"),
    ({"extra_body": {"top_logprobs": 2}}, "top_logprobs"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"prompt": ["a"] * 17}, "n"),
    ({"max_tokens": 111}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"logprobs": 6}, "logprobs"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [0, 300]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("asked", "param"), REFUSED)
def test_what_cannot_be_met_is_refused_by_name(client, asked, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**({"model": MODEL, "prompt": PROMPT} | asked))
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


def test_parameters_that_ask_for_nothing_are_taken(client):
    asked = {"top_p": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "echo": False, "suffix": None}
    assert client.completions.create(model=MODEL, prompt=PROMPT, **asked).choices[0].text


def test_chats_are_of_plain_messages(client, tiny_lm):
    create = client.chat.completions.create
    parts = [{"type": "text", "text": "The river"}, {"type": "text", "text": " runs past"}]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_completion_tokens": 6}
    joined = create(messages=[{"role": "user", "content": parts}], **options)
    assert joined.choices[0].message.content == generated(tiny_lm, tiny_lm.chat(MESSAGES), max_new_tokens=6)
    wrong = [
        ([], "messages must be a list"),
        ([{"role": "tool", "content": "x"}], "its role is one of"),
        ([{"role": "user", "content": "x", "name": "me"}], "A message has 'name'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "may be text only"),
        ([{"role": "user"}], "expected a text"),
    ]
    for messages, said in wrong:
        with pytest.raises(openai.BadRequestError, match=said):
            create(messages=messages, **options)
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        create(messages=MESSAGES, top_logprobs=2, **options)
    with pytest.raises(openai.BadRequestError, match="mean the same"):
        create(messages=MESSAGES, max_tokens=2, **options)
    full = create(messages=MESSAGES, model=MODEL, temperature=0)  # until the context is full
    assert full.usage.total_tokens == tiny_lm.max_ctx or full.choices[0].finish_reason == "stop"


def test_a_model_without_chat_template_answers_completions_only(tiny_folder, run):
    lm = saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")
    lm.tokenizer.chat_template = None
    with serving(lm, run) as server, connected(server) as client:
        with pytest.raises(openai.BadRequestError, match="no chat template; give plain text"):
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert client.completions.create(model=MODEL, prompt=PROMPT).choices[0].text


def test_a_template_that_raises_is_a_refusal(tiny_folder, run):
    lm = saelab.load_model(tiny_folder, dtype=torch.float32, device="cpu")
    lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with (
        serving(lm, run) as server,
        connected(server) as client,
        pytest.raises(openai.BadRequestError, match="roles must alternate"),
    ):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)


def test_a_prompt_that_is_too_long_is_refused(client):
    for prompt, options in (("river " * 200, {}), (PROMPT, {"max_tokens": 110}), ([5] * 129, {}), ([5] * 128, {})):
        prompt = prompt * 4 if prompt == PROMPT else prompt
        with pytest.raises(openai.BadRequestError, match="exceed the context of tiny-llama, 128 tokens") as refused:
            client.completions.create(model=MODEL, prompt=prompt, **options)
        assert refused.value.code == "context_length_exceeded"


def test_what_is_no_request_or_too_large_is_refused(server, tiny_lm):
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    for body, said in (
        (b"{", "no JSON"),
        (b"[1]", "is a list"),
        (b"[" * 100_000, "no JSON"),
        (b'{"n": NaN}', "finite"),
    ):
        status, _, answer = raw(server, "POST", "/v1/completions", body, **headers)
        assert status == 400 and said in json.loads(answer)["error"]["message"]
    big = json.dumps({"model": MODEL, "prompt": "x" * 10_000_000}).encode()
    status, _, answer = raw(server, "POST", "/v1/completions", big, **headers)
    assert status == 413 and "more than 4,194,304 bytes" in json.loads(answer)["error"]["message"]
    surrogate = json.dumps({"model": MODEL, "prompt": PROMPT, "\ud800": 1}).encode()
    assert raw(server, "POST", "/v1/completions", surrogate, **headers)[0] == 400


def is_idle(server: ModelServer) -> bool:
    return server.worker._running is None and not server.worker._waiting


def until(condition: Any, seconds: float = 20) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_client_that_goes_away_frees_the_queue(server, client, caplog):
    caplog.set_level(logging.INFO, "saelab")
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100, "n": 16, "seed": 1}
    for is_streamed in (True, False):
        caplog.clear()
        if is_streamed:
            stream = client.completions.create(stream=True, **options)
            next(iter(stream))
            stream.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).completions.create(**options)
        assert client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1).choices
        assert until(lambda: is_idle(server))
        assert "cancelled" in caplog.text and len(caplog.messages) < 12


def test_requests_wait_in_a_queue_of_limited_length(tiny_lm, run, monkeypatch):
    monkeypatch.setattr(responses, "PATIENCE", 0.1)
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    body = json.dumps(options | {"stream": True})
    headers = {"Authorization": f"Bearer {TOKEN}"}
    alone = generated(tiny_lm, PROMPT, max_new_tokens=2)
    with serving(tiny_lm, run, bounds=Bounds(waiting=2)) as server, ThreadPoolExecutor(4) as threads:
        with tiny_lm.steer():  # the model is taken: nothing moves
            answers = [threads.submit(raw, server, "POST", "/v1/completions", body, **headers)]
            assert until(lambda: server.worker._running is not None)
            answers.append(threads.submit(raw, server, "POST", "/v1/completions", body, **headers))
            assert until(lambda: len(server.worker._waiting) == 1)
            with connected(server) as client:
                impatient = threads.submit(client.with_options(timeout=1.5).completions.create, **options)
                assert until(lambda: len(server.worker._waiting) == 2)
                with pytest.raises(openai.RateLimitError, match="2 requests are waiting already"):
                    client.completions.create(**options)
                with pytest.raises(openai.APITimeoutError):
                    impatient.result(30)
                assert until(lambda: len(server.worker._waiting) == 1)  # its request went with it
        for answer in answers:
            status, _, told = answer.result(30)
            events = [json.loads(line[6:]) for line in told.decode().splitlines() if line.startswith("data: {")]
            assert status == 200 and "".join(event["choices"][0]["text"] for event in events) == alone
            assert told.endswith(b"data: [DONE]\n\n")
        assert b": 1 requests before this one" in answers[1].result()[2]


def test_an_error_in_a_stream_that_has_begun_ends_it(client, plans):
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    nowhere = json.loads(plans["first"].to_json()) | {"on": "prompt", "positions": [100]}
    stream = client.completions.create(stream=True, extra_body={"steering": nowhere}, **options)
    assert next(iter(stream)).choices[0].text
    with pytest.raises(openai.APIError, match="applied to none of the"):
        list(stream)


def test_the_model_stays_free_of_edits(client, tiny_lm, plans):
    before = tiny_lm.logits(PROMPT)
    client.completions.create(model="preset", prompt=PROMPT)
    assert torch.equal(tiny_lm.logits(PROMPT), before) and tiny_lm.edits == ()


def test_requests_write_nothing_to_disk(client, run, plans):
    def files() -> dict[str, str]:
        found = (path for path in run.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    before = files()
    client.completions.create(model="preset", prompt=PROMPT)
    client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"steering": plans["second"].to_json()})
    assert files() == before


def test_a_preset_of_constant_vectors_leaves_as_a_control_vector(run, plans, tmp_path, capsys):
    store, out = saelab.load_features(run), tmp_path / "vector.gguf"
    plan = Plan((store.feature(0) * 2.0,)).save(tmp_path / "plan.json")
    assert main(["export", str(run), str(out), "--format", "gguf", "--plan", str(plan)]) == 0
    assert out.exists() and f"The vectors of {plan} are in {out}" in capsys.readouterr().out
    assert main(["export", str(run), str(out), "--format", "gguf", "--plan", str(plan), "--feature", "1"]) == 2
    assert main(["export", str(run), str(out), "--plan", str(plan)]) == 2
    plan = plans["first"].save(tmp_path / "plan.json")
    assert main(["export", str(run), str(out), "--format", "gguf", "--plan", str(plan)]) == 2
    assert "The plan has on='generated'" in capsys.readouterr().err


def test_the_token_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("SAELAB_TOKEN", raising=False)
    first, second = find_token(), find_token()
    assert first.token != second.token and len(first.token) > 40 and first.origin == ""
    monkeypatch.setenv("SAELAB_TOKEN", "from-the-environment")
    assert find_token() == ("from-the-environment", "SAELAB_TOKEN")
    file = tmp_path / "token.txt"
    file.write_text("from-a-file-of-mine\n", encoding="utf-8")
    assert find_token(file) == ("from-a-file-of-mine", str(file))
    for wrong in ("short", "", "with a space inside", "caf\u00e9" * 8):
        monkeypatch.setenv("SAELAB_TOKEN", wrong)
        with pytest.raises(ValueError, match="SAELAB_TOKEN must have at least 16 printable ASCII"):
            find_token()


def test_other_machines_only_where_that_is_meant():
    assert checked_hosts("127.0.0.1", False, []) == ["localhost", "127.0.0.1", "127.0.0.1"]
    for host in ("0.0.0.0", "192.168.1.5", "example.com", "::"):
        with pytest.raises(ValueError, match="pass --allow-remote if that is meant"):
            checked_hosts(host, False, ["example.com"])
    with pytest.raises(ValueError, match="name those that clients call"):
        checked_hosts("0.0.0.0", True, [])
    assert checked_hosts("0.0.0.0", True, ["box.example"]) == ["localhost", "127.0.0.1", "box.example"]
    assert "192.168.1.5" in checked_hosts("192.168.1.5", True, [])


def test_what_cannot_be_served_is_refused(server, tiny_lm, run, monkeypatch):
    port = server.socket.getsockname()[1]
    with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be used .*: choose another --port"):
        ModelServer(tiny_lm, Plans(run), TOKEN, port=port)
    with pytest.raises(ValueError, match="port=80 must be between"):
        ModelServer(tiny_lm, Plans(run), TOKEN, port=80)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SaelabError, match=r"pip install 'saelab\[serve\]'"):
        ModelServer(tiny_lm, Plans(run), TOKEN, port=0)


def test_the_model_of_a_run_is_the_one_of_its_saes(run, tiny_lm):
    found = Plans(run)
    assert model_name(found) == tiny_lm.name
    found.sources = [found.sources[0].sae]  # before features were collected
    assert model_name(found) == tiny_lm.name
    found.sources = []
    with pytest.raises(SaelabError, match="--model"):
        model_name(found)


@pytest.fixture(scope="module")
def process(run, plans) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """`saelab serve` as users start it, with a client."""
    command = [sys.executable, "-m", "saelab.cli", "serve", str(run), "--port", "0", "--dtype", "float32"]
    environment = {name: value for name, value in os.environ.items() if name != "SAELAB_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stdout is not None
        lines = list(itertools.takewhile(lambda line: "Steered" not in line, started.stdout))
        told = "".join(lines)
        address, token = re.findall(r"at (http\S+/v1) .*\nThe token is (\S+)\n", told)[0]
        assert f'OpenAI(base_url="{address}", api_key="{token}")' in told and "to name as model: preset" in told
        with openai.OpenAI(base_url=address, api_key=token, max_retries=0, timeout=60) as client:
            yield client, started
        started.kill()


def test_a_bad_plan_is_refused_with_what_is_wrong(process, plans):
    client, _ = process
    told = json.loads(plans["first"].to_json())
    edit = told["edits"][0]
    vector = {"direction": [1.0, 2.0], "hook_name": HOOK, "do": "add", "value": 1.0}

    def with_edit(**changes: Any) -> dict[str, Any]:
        return told | {"edits": [edit | changes]}

    wrong = [
        ("{", "no JSON"),
        (17, "no plan of version 1"),
        (told | {"gated": 1}, "'gated', which is unknown"),
        (told | {"edits": []}, "1 to 64 entries"),
        (told | {"on": "never"}, "on='never' is unknown"),
        (told | {"positions": list(range(1, 200))}, "more positions than the context"),
        (with_edit(feature=48), "feature"),
        (with_edit(sae="0" * 64), "which is not given"),
        (with_edit(do=["add"]), "do=.* is unknown"),
        (with_edit(value="two"), "two"),
        (told | {"edits": [vector]}, "width 2, but"),
        (told | {"edits": [vector | {"hook_name": "blocks.99.hook_resid_post"}]}, "blocks.99"),
    ]
    for plan, said in wrong:
        for is_streamed in (False, True):
            with pytest.raises(openai.BadRequestError, match=said):
                client.completions.create(model=MODEL, prompt=PROMPT, stream=is_streamed, extra_body={"steering": plan})
    with pytest.raises(openai.BadRequestError, match="applied to none of the"):
        nowhere = told | {"on": "prompt", "positions": [100]}
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, extra_body={"steering": nowhere})
    with pytest.raises(openai.BadRequestError, match="The preset preset steers already"):
        client.completions.create(model="preset", prompt=PROMPT, extra_body={"steering": told})


def test_ctrl_c_ends_the_command_in_the_middle_of_a_text(process, tiny_lm, plans):
    client, started = process
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0.9, "seed": 4, "max_tokens": 100}
    steered = {"steering": plans["second"].to_json()}
    found = client.completions.create(extra_body=steered, **options).choices[0].text
    assert found == generated(tiny_lm, PROMPT, plans["second"], max_new_tokens=100, temperature=0.9, seed=4)
    stream = client.completions.create(stream=True, n=16, **options)
    next(iter(stream))
    started.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="The server is stopping"):
        list(stream)
    assert started.wait(20) == 0
    assert started.stdout.read().rstrip().endswith("Stopped.")
