"""Break the code in every way that mutants.toml lists, one at a time, and see that a named test notices.

    python tests/mutants/run.py             # all
    python tests/mutants/run.py topk mask   # those whose file or name contains a word

Each breakage is made in a copy of the checkout, of which there is one a core. Exit code 1 when a mutant survives, when a
text to break stands in its file not exactly once, or when the named tests fail without any breakage.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.toml")
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")
_TIMEOUT = 600


@dataclass(frozen=True)
class Mutant:
    """One breakage: `old` becomes `new` in `file`; at least one of `tests` (pytest node ids) must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


def load_mutants(words: list[str]) -> list[Mutant]:
    mutants = [Mutant(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8")).get("mutant", [])]
    return [m for m in mutants if not words or any(word in f"{m.file} {m.name}" for word in words)]


def problem_of(mutant: Mutant) -> str | None:
    """Why this mutant cannot be made, or None."""
    path = ROOT / mutant.file
    if not path.exists():
        return f"{mutant.file} does not exist"
    count = path.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        return f"the old text stands {count} times in {mutant.file}, expected once"
    return "old and new are the same" if mutant.old == mutant.new else None


def run_tests(copy: Path, tests: list[str], timeout: float | None = _TIMEOUT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests]
    # The copy stands before the installed package on the path, and no bytecode of another mutant is left behind.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def fate(copy: Path, mutant: Mutant) -> str:
    """ "killed", or what went wrong."""
    path = copy / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        done = run_tests(copy, mutant.tests)
    except subprocess.TimeoutExpired:
        return "killed"  # the breakage made the test hang
    finally:
        path.write_text(whole, encoding="utf-8")
    if done.returncode == 1:
        return "killed"
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    return "SURVIVED" if done.returncode == 0 else f"ERROR: pytest exit code {done.returncode}: {last}"


def fates(copies: list[Path], mutants: list[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with its fate, as they become known; one at a time in each copy."""
    free: Queue[Path] = Queue()
    for copy in copies:
        free.put(copy)

    def one(mutant: Mutant) -> tuple[Mutant, str]:
        copy = free.get()
        try:
            return mutant, fate(copy, mutant)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        for done in as_completed([pool.submit(one, mutant) for mutant in mutants]):
            yield done.result()


def main(words: list[str]) -> int:
    mutants = load_mutants(words)
    broken = {m.name: problem for m in mutants if (problem := problem_of(m))}
    for name, problem in broken.items():
        print(f"BAD ENTRY  {name}: {problem}")
    failures = len(broken)
    good = [m for m in mutants if m.name not in broken]
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / f"copy{n}" / "saelab" for n in range(os.cpu_count() or 1)]
        for copy in copies:
            shutil.copytree(ROOT, copy, symlinks=True, ignore=_LEFT_OUT)
        tests = sorted({test for m in good for test in m.tests})
        print(f"{len(tests)} named tests without any breakage ...", flush=True)
        each = ["-n", str(len(copies)), "--dist", "loadfile", *tests]
        if tests and (done := run_tests(copies[0], each, timeout=None)).returncode != 0:
            print(done.stdout[-3000:])
            print("The named tests fail without any breakage; nothing can be said about the mutants.")
            return 1
        for number, (mutant, result) in enumerate(fates(copies, good), 1):
            failures += result != "killed"
            print(f"{number:>3}/{len(good)}  {result:<9} {mutant.name}  ({mutant.file})", flush=True)
    print(f"{len(mutants) - failures} of {len(mutants)} mutants killed")
    return 1 if failures or not mutants else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
