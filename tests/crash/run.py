"""`kill -9` at random moments of a harvest and of a training; the same call again must leave the same bytes.

    python tests/crash/run.py                    # 30 + 30 on a tiny model, some minutes
    python tests/crash/run.py --kills 3 --model smollm2

Exit status 1 when a resumed run differs from one that was left alone. The moments are drawn from `--seed`.
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
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).with_name("worker.py")
sys.path[:0] = [str(WORKER.parent), str(WORKER.parents[1])]
from conftest import build_tiny_llama  # noqa: E402
from worker import WORK  # noqa: E402

import saelab  # noqa: E402

_COMPARED = {"harvest": "cache", "train": "."}
_FORKS = multiprocessing.get_context("fork")  # a process of its own for each, without importing torch in each


def start(kind: str, lm: Any, folder: Path) -> Any:
    """A process that does the work."""
    process = _FORKS.Process(target=WORK[kind], args=(lm, folder))
    process.start()
    return process


def _check_end(process: Any) -> None:
    if process.exitcode:
        raise RuntimeError(f"A process ended with {process.exitcode}")  # and has printed why


def whole_run(model: str, folder: Path) -> dict[str, float]:
    """Both kinds left alone, in a Python that shares nothing with the forks, not even its hashes of texts; seconds of each."""
    command = [sys.executable, str(WORKER), model, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run left alone ended with {done.returncode}: {done.stderr[-2000:]}")
    return dict(zip(WORK, map(float, done.stdout.split()[-len(WORK) :]), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same: all tensors and the manifest, and the log without its speeds."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    found = {name: content for name, content in found.items() if "/checkpoints/" not in name}
    for path in folder.rglob("manifest.json"):
        found[str(path.relative_to(folder))] = path.read_bytes()
    for path in folder.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found["metrics"] = json.dumps(
            [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
        ).encode()
    return found


def trial(kind: str, lm: Any, whole: Path, seconds: float, moments: random.Random) -> list[float]:
    """Kill one run once, one in three more often, then let it end; the moments of the kills. Raises when bytes differ."""
    with tempfile.TemporaryDirectory() as name:
        folder, kills = Path(name), []
        if kind == "train":
            shutil.copytree(whole / "cache", folder / "cache")
        while not kills or moments.random() < 1 / 3:
            process, moment = start(kind, lm, folder), moments.uniform(0, seconds)
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
        ours, theirs = (contents(made / _COMPARED[kind]) for made in (folder, whole))
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different:
            raise AssertionError(f"{kind} killed after {kills} s differs in {', '.join(different)}")
        return kills


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="at least so many of each kind")
    parser.add_argument("--model", default="tiny", help="tiny or smollm2")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    moments = random.Random(asked.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        model = asked.model if asked.model != "tiny" else str(build_tiny_llama(Path(name) / "tiny-llama"))
        took, lm = whole_run(model, whole), saelab.load_model(model)
        for kind, seconds in took.items():
            kills = 0
            while kills < asked.kills:
                try:
                    times = trial(kind, lm, whole, seconds, moments)
                except AssertionError as error:
                    print(error)
                    return 1
                kills += len(times)
                print(
                    f"{kind}: killed after {', '.join(f'{t:.2f}' for t in times) or 'its end'} of {seconds:.2f} s: same bytes",
                    flush=True,
                )
            print(f"{kind}: {kills} kills, the same bytes each time")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
