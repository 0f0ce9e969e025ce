"""What other libraries raise leaves the command line as one line; a fault of saelab as a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

import saelab
from saelab.activation_cache.streaming import stream
from saelab.cli import main
from saelab.errors import SaelabError
from saelab.models.caching import Remembered
from saelab.models.multi_model import together
from saelab.steering import diff_means

HOOK = "blocks.1.hook_resid_post"
IDS = torch.tensor([[5, 17, 30, 44]])


def raise_(error):
    raise error


def in_python_of_a_library():
    torch.nn.Linear(2, 2)(torch.zeros(3, 3))


RAISED = {
    "our own": (lambda: raise_(ValueError("k=0 must be 1 or more")), "k=0 must be 1 or more"),
    "our own kind": (lambda: raise_(SaelabError("no cache")), "no cache"),
    "disk full": (lambda: raise_(OSError(28, "No space left on device")), "No space left on device"),
    "no permission": (lambda: raise_(PermissionError(13, "Permission denied", "/out")), "Permission denied"),
    "no package": (lambda: __import__("wandb_that_is_not_there"), "wandb_that_is_not_there.*install"),
    "memory": (lambda: raise_(torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
    "a library": (
        lambda: torch.nn.functional.softmax(torch.zeros(2), dim=5),
        "torch raised IndexError.*SAELAB_DEBUG=1",
    ),
    "a library's Python": (in_python_of_a_library, "torch raised RuntimeError"),
}


@pytest.mark.parametrize("command", ["eval", "features", "harvest", "steer"])
@pytest.mark.parametrize("what", RAISED)
def test_one_line_for_what_a_user_can_mend(monkeypatch, capsys, what, command):
    raises, says = RAISED[what]

    def run() -> None:
        """Fails."""
        raises()

    monkeypatch.setitem(main.COMMANDS, command, (run, ""))
    assert main.main([command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(says, said), said


@pytest.mark.parametrize(
    "error", [TypeError("x"), AttributeError("x"), KeyError("x")], ids=lambda error: type(error).__name__
)
def test_a_fault_of_saelab_keeps_its_traceback(monkeypatch, error):
    scope = {"__name__": "saelab.fault", "error": error}
    exec("def run() -> None:\n    'Fails.'\n    raise error", scope)
    monkeypatch.setitem(main.COMMANDS, "eval", (scope["run"], ""))
    with pytest.raises(type(error)):
        main.main(["eval"])


def test_a_chat_template_that_refuses_names_the_row_and_the_file(tmp_path, tiny_lm):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}{{ messages[0].content }}"
    file = tmp_path / "chats.jsonl"
    chats = [[{"role": role, "content": "hello"}] for role in ("user", "user", "system")]
    file.write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
    before, tiny_lm.tokenizer.chat_template = tiny_lm.tokenizer.chat_template, template
    try:
        with pytest.raises(ValueError, match=r"row 2 of .*chats.jsonl.*no system turns.*change or remove that row"):
            list(saelab.load_texts(str(file), chat=tiny_lm).documents())
    finally:
        tiny_lm.tokenizer.chat_template = before


READERS = {
    "model": lambda lm, hooks: next(iter(lm.stream_activations([IDS], hooks))),
    "remembered": lambda lm, hooks: next(iter(Remembered(lm).stream_activations([IDS], hooks))),
    "several models": lambda lm, hooks: next(
        iter(together([lm, lm]).stream_activations([IDS], "".join([_first(lm), hooks])))
    ),
    "stream": lambda lm, hooks: next(
        stream(lm, [f"The river runs past mill {n}." for n in range(80)], hooks, ctx_len=16).batches(8, hook_name=hooks)
    ),
}


def _first(lm):
    return together([lm, lm]).hook_names[0].partition("/")[0] + "/"


@pytest.mark.parametrize("reader", READERS)
def test_a_hooks_bare_name_is_one_hook(tiny_lm, reader):
    (found,) = READERS[reader](tiny_lm, HOOK).items()
    assert found[0].endswith(HOOK) and found[1].shape[-1] == 32


NO_SAE = """
import sys, saelab
lm = saelab.load_model(sys.argv[1])
for given in ("runs/demo/sae", lm):
    for call in (
        lambda: saelab.evaluate(given, lm, ["a text"], progress=False),
        lambda: saelab.collect_features(given, lm, ["a text"], out_dir=sys.argv[2]),
        lambda: saelab.save_sae(given, sys.argv[2]),
    ):
        try:
            call()
        except ValueError as error:
            print(error)
"""


def test_something_else_in_place_of_an_sae_is_named(tiny_folder, tmp_path):
    """In a process of its own: here the annotations are checked first."""
    command = [sys.executable, "-c", NO_SAE, str(tiny_folder), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    needs, calls = "needs an SAE, such as saelab.load_sae(folder); got a", ("scoring", "scoring", "save_sae")
    assert said == [f"{call} {needs} {kind}." for kind in ("str", "LanguageModel") for call in calls]
    assert not (tmp_path / "out").exists()


def test_texts_of_one_mean_have_no_direction(tiny_lm):
    with pytest.raises(ValueError, match="same mean activation at blocks.0.hook_resid_post: give texts that differ"):
        diff_means(tiny_lm, ["The weather"], ["The weather"], "blocks.0.hook_resid_post")


def test_text_without_a_tokenizer_names_the_call_for_ids(tiny_lm):
    bare = saelab.load_model(tiny_lm.model)
    with pytest.raises(ValueError, match="use generate_ids"):
        bare.generate([5, 6, 7])
    assert len(bare.generate_ids([5, 6, 7], 2).ids) == 5
