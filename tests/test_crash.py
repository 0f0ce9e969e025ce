"""`kill -9` at three seeded moments each of a harvest and a training; `tests/crash/run.py` does thirty and thirty."""

import re
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).with_name("crash") / "run.py"


def test_killed_and_repeated_leaves_the_same_bytes():
    done = subprocess.run(
        [sys.executable, RUN, "--kills", "3", "--seed", "7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for kind in ("harvest", "train"):
        said = re.search(rf"^{kind}: (\d+) kills, the same bytes each time$", done.stdout, re.MULTILINE)
        assert said is not None and int(said[1]) >= 3, done.stdout
