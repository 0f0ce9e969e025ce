"""Threads of torch that wait soon sleep, so that a busy neighbour does not slow a step down many times over; the user decides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINTED = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        ("import saelab", {}, "1000"),
        ("import saelab, torch", {}, "1000"),
        ("import torch, saelab", {}, "None"),  # read already
        ("import saelab", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import saelab", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import saelab.cli.main", {}, "1000"),
    ],
)
def test_waiting_threads_sleep_unless_the_user_decided(first, given, expected):
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run([sys.executable, "-c", f"{first}; {PRINTED}"], env=own | given, capture_output=True, text=True)
    assert run.stdout.strip() == expected, run.stderr
