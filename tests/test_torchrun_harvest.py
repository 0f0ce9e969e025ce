"""scripts/slurm.sbatch, and so its torchrun line: ranks share a harvest, one is killed, and what is begun goes on."""

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

from saelab.activation_cache import layout
from saelab.cli.main import main

SIZES = ["--n-tokens", "80_000", "--ctx-len", "64", "--block-contexts", "64"]


SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "slurm.sbatch"
SRUN = """#!/bin/bash
exec "${@:2}"
"""  # Slurm's, on one node: without its own option


def start_script(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """scripts/slurm.sbatch as on a node with two GPUs."""
    bin_folder = folder.parent / "bin"
    bin_folder.mkdir()
    (bin_folder / "srun").write_text(SRUN)
    (bin_folder / "srun").chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = os.environ | {"PATH": path, "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), str(folder), *arguments]
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True)


def descendants(pid: int) -> list[int]:
    """Process ids below one."""
    with contextlib.suppress(OSError):
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return children + [one for child in children for one in descendants(child)]
    return []


def pid_of_rank(rank: int, pid: int) -> int:
    """Process id of one that torchrun started, below `pid`."""
    named = [one for one in descendants(pid) if f"\0RANK={rank}\0" in Path(f"/proc/{one}/environ").read_text()]
    return named[0]


@pytest.mark.timeout(900)  # three processes start, each with its imports
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks of torchrun in /proc")
def test_a_rank_is_killed_and_one_process_goes_on(tiny_folder, tmp_path):
    """Two ranks, one gets SIGKILL in the middle, torchrun ends the other; one process leaves the bytes of an undisturbed one."""
    texts, cache = tmp_path / "texts.jsonl", tmp_path / "run" / "cache"
    words = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 200)) + f" {i}." for i in range(300)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    arguments = ["--texts", str(texts), "--model", str(tiny_folder), "--hook-name", HOOK, *SIZES]
    job = start_script(tmp_path / "run", *arguments)
    try:
        while job.poll() is None and sum(b'"end"' in one.read_bytes() for one in cache.glob("journals/*")) < 2:
            time.sleep(0.005)
        os.kill(pid_of_rank(1, job.pid), signal.SIGKILL)
        said = job.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode and "Signal 9" in said, said
    assert not (cache / layout.MANIFEST).exists()
    before = {name: data for name, data in contents(cache).items() if name.startswith("shards")}
    with one_thread():
        for name in ("run", "whole"):
            assert main(["harvest", str(tmp_path / name), *arguments]) == 0
    whole = contents(tmp_path / "whole" / "cache")
    assert contents(cache) == whole
    assert 2 <= len(before) < sum(name.startswith("shards") for name in whole)
    assert all(whole[name] == data for name, data in before.items())


@contextlib.contextmanager
def one_thread():
    """As the ranks had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
