"""`kill -9` at random moments of a harvest and of a training; the same call again must leave the same bytes.

    python tests/crash/run.py                    # 30 + 30 on a tiny model, about 10 minutes
    python tests/crash/run.py --kills 3 --model smollm2

Exit status 1 when a resumed run differs from one that was left alone. The moments are drawn from `--seed`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
sys.path.insert(0, str(WORKER.parents[1]))  # for conftest, which builds the tiny model


def start(kind: str, model: str, folder: Path) -> subprocess.Popen[str]:
    """A worker that has begun its work."""
    command = [sys.executable, str(WORKER), kind, model, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            return process
    raise RuntimeError(f"{kind} never began: {process.communicate()[1][-2000:]}")


def finish(kind: str, model: str, folder: Path) -> float:
    """Run a worker to its end; seconds of work."""
    process, begun = start(kind, model, folder), time.perf_counter()
    said = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"{kind} ended with {process.returncode}: {said[-2000:]}")
    return time.perf_counter() - begun


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


def trial(
    kind: str, model: str, whole: Path, begun_with: Path | None, seconds: float, moments: random.Random
) -> list[float]:
    """Kill one run once, one in three more often, then let it end; the moments of the kills. Raises when bytes differ."""
    with tempfile.TemporaryDirectory() as name:
        folder, kills = Path(name), []
        if begun_with is not None:
            shutil.copytree(begun_with, folder / "cache")
        while not kills or moments.random() < 1 / 3:
            process, moment = start(kind, model, folder), moments.uniform(0, seconds)
            try:
                process.wait(moment)
                break  # it was faster than the one that was left alone
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills.append(moment)
        finish(kind, model, folder)
        ours, theirs = contents(folder), contents(whole)
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
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        model = asked.model
        if model == "tiny":
            from conftest import build_tiny_llama

            model = str(build_tiny_llama(Path(name) / "tiny-llama"))
        for kind in ("harvest", "train"):
            seconds, kills = finish(kind, model, whole), 0
            while kills < asked.kills:
                try:
                    times = trial(kind, model, whole, whole / "cache" if kind == "train" else None, seconds, moments)
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
