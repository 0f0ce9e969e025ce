"""`kill -9` at random moments of a harvest and of a training; the same call again must leave the same bytes.

    python tests/crash/run.py                    # 30 + 30 on a tiny model, some minutes
    python tests/crash/run.py --kinds stream     # a training that harvests by the way
    python tests/crash/run.py --kinds finetune   # a training inside the model
    python tests/crash/run.py --kills 3 --model smollm2

Two trials run at once, each process with one thread. Exit status 1 when a resumed run differs from one that was left alone.
The moments are drawn from `--seed` and the number of the trial.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).with_name("worker.py")
sys.path[:0] = [str(WORKER.parent), str(WORKER.parents[1])]
from conftest import build_tiny_llama  # noqa: E402
from worker import WORK  # noqa: E402

import saelab  # noqa: E402

_AT_ONCE = 2
_LATEST = 1.1  # of the seconds of the run left alone: two at once are slower
_COMPARED = {"harvest": ["cache"], "train": ["cache", "sae"], "stream": ["streamed"], "finetune": ["finetuned"]}
_FORKS = multiprocessing.get_context("fork")  # a process of its own for each, without importing torch in each


def start(kind: str, lm: Any, folder: Path) -> Any:
    """A process that does the work."""
    process = _FORKS.Process(target=_work, args=(kind, lm, folder))
    process.start()
    return process


def _work(kind: str, lm: Any, folder: Path) -> None:
    torch.set_num_threads(
        1
    )  # torch makes its pool anew after a fork: before there are threads, which would race for it
    WORK[kind](lm, folder)


def _check_end(process: Any) -> None:
    if process.exitcode:
        raise RuntimeError(f"A process ended with {process.exitcode}")  # and has printed why


def whole_run(model: str, folder: Path, kinds: list[str]) -> dict[str, float]:
    """Each kind left alone, in a Python that shares nothing with the forks, not even its hashes of texts; seconds of each."""
    command = [sys.executable, str(WORKER), model, str(folder), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run left alone ended with {done.returncode}: {done.stderr[-2000:]}")
    seconds = [float(line) for line in done.stdout.splitlines() if line.replace(".", "").isdigit()]
    return dict(zip(kinds, seconds, strict=True))


def contents(made: Path, parts: list[str]) -> dict[str, bytes]:
    """What must be the same: all tensors and the manifest, and the log without its speeds."""
    found: dict[str, bytes] = {}
    for path in (path for part in parts for path in (made / part).rglob("*")):
        if path.name == "manifest.json" or (path.suffix == ".safetensors" and path.parent.name != "checkpoints"):
            found[str(path.relative_to(made))] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
            found["metrics"] = json.dumps(kept).encode()
    return found


def trial(kind: str, lm: Any, whole: Path, seconds: float, seed: str) -> list[float]:
    """Kill one run once, one in three more often, then let it end; the moments of the kills. Raises when bytes differ."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, kills = Path(name), []
        if kind == "train":
            shutil.copytree(whole / "cache", folder / "cache")
        while not kills or moments.random() < 1 / 3:
            process, moment = start(kind, lm, folder), moments.uniform(0, _LATEST * seconds)
            process.join(moment)
            if not process.is_alive():
                _check_end(process)  # it was faster than the one that was left alone
                break
            process.kill()
            process.join()
            kills.append(moment)
        process = start(kind, lm, folder)
        process.join()
        _check_end(process)
        ours, theirs = (contents(made, _COMPARED[kind]) for made in (folder, whole))
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different or not theirs:
            raise AssertionError(f"{kind} killed after {kills} s differs in {', '.join(different)}")
        return kills


_TRIALS: list[partial[list[float]]] = []  # what a fork finds here need not be pickled


def _numbered(number: int, seed: str) -> list[float]:
    return _TRIALS[-1](seed=f"{seed} {number}")


def trials(kind: str, lm: Any, whole: Path, seconds: float, kills: int, seed: int) -> int:
    """Trials until there were so many kills; their number."""
    _TRIALS.append(partial(trial, kind, lm, whole, seconds))
    done = tried = 0
    with ProcessPoolExecutor(_AT_ONCE, mp_context=_FORKS) as forks:
        while done < kills:
            numbers = range(tried, tried + kills - done)
            for times in forks.map(partial(_numbered, seed=f"{seed} {kind}"), numbers):
                done, tried = done + len(times), tried + 1
                at = ", ".join(f"{moment:.2f}" for moment in times) or "its end"
                print(f"{kind}: killed after {at} of {seconds:.2f} s: same bytes", flush=True)
    return done


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="at least so many of each kind")
    parser.add_argument("--kinds", nargs="+", default=["harvest", "train"], choices=list(WORK))
    parser.add_argument("--model", default="tiny", help="tiny or smollm2")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        model = asked.model if asked.model != "tiny" else str(build_tiny_llama(Path(name) / "tiny-llama"))
        kinds = list(dict.fromkeys((["harvest"] if "train" in asked.kinds else []) + asked.kinds))
        took, lm = whole_run(model, whole, kinds), saelab.load_model(model)
        for kind in asked.kinds:
            try:
                kills = trials(kind, lm, whole, took[kind], asked.kills, asked.seed)
            except AssertionError as error:
                print(error)
                return 1
            print(f"{kind}: {kills} kills, the same bytes each time")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
