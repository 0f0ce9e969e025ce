"""The memory plan: against the peak of real steps, against real weights, with given bytes free, and the refusal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_saes import config_of, data

from saelab.errors import TrainingError
from saelab.saes import VARIANTS, ReLUConfig, TopKConfig
from saelab.training import TrainConfig, train
from saelab.training.data import open_data
from saelab.training.memory import Plan, check_memory, free_bytes, plan_memory

CPU = torch.device("cpu")
BATCH = TrainConfig(n_tokens=4_000, batch_size=500)


def plan_of(config, d_in=64, device=CPU, train=BATCH, **shape) -> Plan:
    variant = next(one for one in VARIANTS.values() if type(config) is one.Config)
    x = torch.randn(4, *([shape["n_sources"]] if shape else []), d_in)
    return plan_memory(variant, config, open_data(data(variant.variant, x), None).view(variant, config), train, device)


MEASURE = """
import logging, sys, torch, saelab
from pathlib import Path
torch.set_num_threads(1)
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

def measured(d_sae, batch):
    config = saelab.TrainConfig(n_tokens=2 * batch, batch_size=batch, checkpoint_every=1)
    saelab.train(getattr(saelab.saes, sys.argv[1])(d_sae), x[:2 * batch], config, sys.argv[2] + str(d_sae))

def status(name):  # not ru_maxrss, which begins with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

x = torch.randn(1024, 256)
measured(64, 64)  # what is loaded when it is first needed
before = status("VmRSS")
measured(int(sys.argv[3]), 256)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(("config", "d_sae"), [("TopKConfig", 8_192), ("ReLUConfig", 4_096)], ids=["topk", "relu"])
def test_the_plan_is_near_the_peak_of_real_steps(tmp_path, config, d_sae):
    """Within a factor of 1.5, of a run whose weights decide and of one whose codes do (half of the features fire)."""
    command = [sys.executable, "-c", MEASURE, config, str(tmp_path / "sae"), str(d_sae)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"Memory on cpu: about ([\d.]+) MB of [\d.]+ GB free \(weights ", done.stdout)
    planned, peak = float(said[-1]) * 1e6, int(done.stdout.split()[-1])
    assert planned / 1.5 < peak < planned * 1.5, done.stdout


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_are_counted_before_they_are_made(name):
    config = config_of(name, d_sae=2048)
    shape: dict[str, Any] = {"n_sources": 2} if "n_sources" in VARIANTS[name].extra_dims else {}
    parts = plan_of(config, **shape)["cpu"]
    real = sum(4 * p.numel() for p in VARIANTS[name](config, 64, **shape).parameters())
    assert parts["weights"] == parts["gradients"] == parts["Adam"] / 2 == pytest.approx(real, rel=0.04)


def test_smaller_parts_of_a_batch_need_less_and_a_gpu_its_own_line():
    config = TopKConfig(4096, 32)
    whole = plan_of(config)["cpu"]
    parts = plan_of(config, train=TrainConfig(n_tokens=4_000, batch_size=500, grad_accumulation=10))["cpu"]
    assert parts["workspace"] < whole["workspace"] and parts["weights"] == whole["weights"]
    on_gpu = plan_of(config, device=torch.device("mps:0"))
    assert on_gpu["mps:0"]["weights"] == whole["weights"]
    assert on_gpu["cpu"] == {"batches": whole["batches"], "checkpoint": 3 * whole["weights"]}


def test_what_fits_is_said_and_what_does_not_is_refused_with_the_fix():
    plans = [{"cpu": {"weights": 600, "Adam": 0}}, {"cpu": {"weights": 200, "pool": 100}, "cuda:0": {"weights": 5}}]
    assert check_memory(plans, {"cpu": 900}).splitlines() == [
        "Memory on cpu: about 900 bytes of 900 bytes free (weights 800 bytes, pool 100 bytes).",
        "Memory on cuda:0: about 5 bytes (weights 5 bytes).",
    ]
    with pytest.raises(TrainingError, match=r"does not fit. Memory on cpu: about 900 bytes of 899 .* Lower d_sae"):
        check_memory(plans, {"cpu": 899})


def test_a_training_that_cannot_fit_leaves_nothing(tmp_path):
    too_large = TopKConfig(2**40, 4)  # 280 TB
    with pytest.raises(TrainingError, match=r"does not fit.*281\.5 TB.*or raise grad_accumulation"):
        train([ReLUConfig(16), too_large], torch.randn(600, 16), BATCH, tmp_path / "run", progress=False)
    assert not list(tmp_path.rglob("run.json")) and not list(tmp_path.rglob("metrics.jsonl"))


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8_192_000),
        (
            {
                "proc/self/cgroup": "0::/job/7\n",
                "sys/fs/cgroup/job/7/memory.max": "5000\n",
                "sys/fs/cgroup/job/7/memory.current": "4500\n",
                "sys/fs/cgroup/job/7/memory.stat": "anon 4000\ninactive_file 300\n",
            },
            800,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/a\n1:cpu:/docker/a\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
            },
            6000,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "1\n",
            },
            8_192_000,
        ),
    ],
    ids=["no limit", "version 2", "version 1 in a container", "max"],
)
def test_free_memory_is_what_the_system_and_the_control_group_leave(tmp_path, files, free):
    assert free_bytes(CPU, tree(tmp_path, files)) == {"cpu": free}


def test_free_memory_here_and_where_nobody_tells(tmp_path):
    assert 0 < free_bytes(CPU)["cpu"] < 2**50
    assert free_bytes(CPU, tmp_path) == {}
    assert check_memory([{"cpu": {"weights": 2**60}}], {}).startswith("Memory on cpu: about ")
