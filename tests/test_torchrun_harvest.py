"""The torchrun line of docs/distributed.md: ranks share a harvest, one is killed, and what is begun goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_harvest import contents
from tiny_runs import HOOK, WORDS

from saelab.activation_cache import format
from saelab.cli import main

SIZES = ["--n-tokens", "80_000", "--ctx-len", "64", "--block-contexts", "64"]


def start_torchrun(folder, model, n):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command += ["-m", "saelab.cli", "harvest", str(folder), "--model", str(model), "--hook-name", HOOK]
    command += ["--texts", str(folder.parent / "texts.jsonl"), *SIZES]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def ranks(agent):
    """Process id of each rank that torchrun started."""
    found = {}
    for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(one[5:]): int(pid) for one in variables if one.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks of torchrun in /proc")
def test_torchrun_with_a_rank_killed_and_one_process_after_it(tiny_folder, tmp_path):
    """The real command: two ranks, one gets SIGKILL in the middle, torchrun ends the other; one process goes on."""
    words = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 200)) + f" {i}." for i in range(300)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    agent = start_torchrun(tmp_path / "run", tiny_folder, 2)
    journals = tmp_path / "run" / "cache" / format.BLOCK_JOURNALS
    try:
        while agent.poll() is None and sum(b'"end"' in one.read_bytes() for one in journals.glob("*.jsonl")) < 2:
            time.sleep(0.01)
        os.kill(ranks(agent)[1], signal.SIGKILL)
        said = agent.communicate(timeout=60)[1]
    finally:
        agent.kill()
    assert agent.returncode and "Signal 9" in said, said
    cache = tmp_path / "run" / "cache"
    assert not (cache / format.MANIFEST).exists()
    before = {name: data for name, data in contents(cache).items() if name.startswith("shards")}
    with torch_threads(1):
        arguments = ["--texts", str(tmp_path / "texts.jsonl"), "--model", str(tiny_folder), "--hook-name", HOOK]
        assert main(["harvest", str(tmp_path / "run"), *arguments, *SIZES]) == 0
        assert main(["harvest", str(tmp_path / "whole"), *arguments, *SIZES]) == 0
    whole = contents(tmp_path / "whole" / "cache")
    assert contents(cache) == whole
    assert len(before) >= 2 and all(whole[name] == data for name, data in before.items())


@contextlib.contextmanager
def torch_threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)
