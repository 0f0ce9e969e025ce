"""The kernel benches at tiny sizes: they run, judge and print what they promise. Nothing here looks at a time."""

import csv
import json
import sys

import pytest
import torch

from saelab.kernels import candidates, dispatch
from saelab.kernels.bench import bench_step, exactness, measure, memory, peers
from saelab.kernels.bench.dense_step import DenseTopK
from saelab.kernels.bench.rows import COLUMNS, quantiles
from saelab.kernels.bench.sparse_step import SparseTopK
from saelab.kernels.sparse_acts import SparseActs
from saelab.kernels.workspace import WORKSPACE
from saelab.saes import TopKConfig
from saelab.training import TrainConfig, train


def step_settings(**changes):
    """On the CPU everywhere: what a GPU measures is kept (`results.csv`), and these sizes say nothing."""
    return bench_step.Settings(device="cpu", **changes)


def test_the_two_steps_do_the_same_work():
    """Same start, same batches: losses, L0 and gradient norms of both steps agree for as long as rounding allows."""
    x = torch.randn(3, 64, 12, generator=torch.Generator().manual_seed(0))
    ours, dense = SparseTopK(12, 40, 4), DenseTopK(12, 40, 4)
    for rows in x:
        a, b = ours.step(rows), dense.step(rows)
        assert a == pytest.approx(b, rel=1e-4)


def test_step_rows_and_files(tmp_path, capsys):
    settings = step_settings(d_sae=(64, 128), k=(4,), d_in=16, batch_size=64, pairs=3, warmup=1, out=tmp_path)
    assert bench_step.main(settings) == 0
    assert capsys.readouterr().out.splitlines()[1] == ",".join(COLUMNS)
    rows = list(csv.DictReader((tmp_path / "step.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["provider"] for row in rows] == ["dense", "saelab"] * 2
    for row in rows[1::2]:
        assert float(row["ratio"]) > 0 and float(row["certified"]) + float(row["recomputed"]) == pytest.approx(1)
        assert float(row["margin"]) > -4 and row["hardware"]
    assert len(json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))) == 4
    assert bench_step.main(step_settings(d_sae=(64,), k=(4,), d_in=16, batch_size=64, pairs=1, floor={64: 1e9})) == 1


def test_growth_is_told_from_8192_on():
    rows = [
        {"shape": f"2048x576x{d_sae}x{k}", "median": ms}
        for d_sae, k, ms in [
            (4096, 32, 90.0),
            (16384, 32, 150.0),
            (8192, 32, 100.0),
            (8192, 64, 10.0),
            (16384, 64, 21.0),
        ]
    ]
    assert bench_step.growth([*rows, {"shape": "8192x576x8192x32", "median": 1.0}]) == [
        "2048x576, k 32: d_sae 8192 to 16384 (2x), time 1.50x: at most linear",
        "2048x576, k 64: d_sae 8192 to 16384 (2x), time 2.10x: MORE THAN LINEAR",
    ]


def test_without_bf16_the_screen_is_float32(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "_has_fast_bf16", lambda _: True)
    for bf16 in (True, False):
        for batch_size in (candidates.MIN_BF16_ROWS, candidates.MIN_BF16_ROWS - 1):
            WORKSPACE.buffers.clear()
            settings = step_settings(d_sae=(64,), k=(4,), d_in=16, batch_size=batch_size, pairs=1, warmup=1, bf16=bf16)
            assert bench_step.main(settings) == 0
            used = bf16 and batch_size >= candidates.MIN_BF16_ROWS
            assert any(dtype == torch.bfloat16 for _, dtype in WORKSPACE.buffers) == used
            assert (",float32 (bf16 screen)," in capsys.readouterr().out) == used


FAKE_PEERS = """
import os, sys
sys.path.insert(0, {folder!r})
import peer_worker
class Raises(peer_worker.Plain):
    def step(self, x): raise ValueError("no such batch\\nsecond line")
class Dies(peer_worker.Plain):
    def step(self, x): print("out of memory", flush=True); os._exit(9)
class Nan(peer_worker.Plain):
    def step(self, x): return float("nan")
class Stuck(peer_worker.Plain):
    def step(self, x): return 1.0
peer_worker.PEERS |= dict(raises=Raises, dies=Dies, nan=Nan, stuck=Stuck)
peer_worker.main(sys.argv[1])
"""


def test_peers_have_rows_or_a_reason(tmp_path, capsys, monkeypatch):
    script = tmp_path / "fake_peers.py"
    script.write_text(FAKE_PEERS.format(folder=str(peers.WORKER.parent)), encoding="utf-8")
    names = ("raises", "dies", "plain", "nan", "stuck", "absent")
    commands = {name: [sys.executable, "-I", str(script), name] for name in names}
    monkeypatch.setattr(peers, "install", lambda folder: commands)
    settings = step_settings(d_sae=(64,), k=(4,), d_in=16, batch_size=64, pairs=3, warmup=20, peers=True)
    assert bench_step.main(settings) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()[1:]))
    assert [row["provider"] for row in rows] == ["dense", f"plain {torch.__version__}", "saelab"]
    assert float(rows[1]["ratio"]) > 0 and float(rows[1]["ratio_q20"]) <= float(rows[1]["ratio_q80"])
    assert float(rows[1]["median"]) > 0 and rows[0]["ratio"] == rows[2]["ratio"]
    assert sorted(err.splitlines()) == [
        "peers: absent skipped: KeyError: 'absent'",
        "peers: dies skipped: its process exited with status 9: out of memory",
        "peers: nan skipped: ArithmeticError: the loss is nan",
        "peers: raises skipped: ValueError: no such batch",
        "peers: stuck skipped: its loss went from 1 to 1 in 21 steps",
    ]


def test_a_peer_that_pip_refuses_is_named(tmp_path, capsys, monkeypatch):
    calls: list[tuple[str, ...]] = []

    def run(*command: str) -> None:
        calls.append(command)
        if command[-1] == "overcomplete":
            raise peers.PeerError("ERROR: no such wheel")

    monkeypatch.setattr(peers, "_run", run)
    assert list(peers.install(tmp_path)) == ["sae-lens", "dictionary-learning", "eai-sparsify"]
    assert capsys.readouterr().err.splitlines()[1:] == ["peers: overcomplete skipped: ERROR: no such wheel"]
    assert all(command[-2].startswith("torch==") for command in calls if command[-1] in peers.PEERS)
    del calls[:]
    assert len(peers.install(tmp_path)) == 3
    assert [command[-1] for command in calls if command[-1] in peers.PEERS] == ["overcomplete"]  # the others are there


def test_a_wrong_op_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "_timed", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(SparseActs, "to_dense", lambda self: torch.zeros(self.batch, self.d_sae))
    with pytest.raises(AssertionError, match="encode_topk differs from float64"):
        bench_step.main(step_settings(d_sae=(64,), k=(4,), d_in=16, batch_size=64, pairs=1, warmup=1))


def test_quantiles_by_hand():
    assert quantiles([0.001, 0.002, 0.003, 0.004, 0.005, 0.006]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}


def test_memory_counts_what_a_step_adds(capsys):
    assert memory.main(memory.Settings(d_sae=256, d_in=16, k=4, batch_size=64, steps=1, limit_mib=1e6)) == 0
    assert memory.main(memory.Settings(d_sae=256, d_in=16, k=4, batch_size=64, steps=1, limit_mib=-1e6)) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[0])["d_sae"] == 256


@pytest.fixture
def small_run(tmp_path, tiny_folder):
    import saelab

    lm = saelab.load_model(str(tiny_folder), dtype=torch.float32)
    texts = [f"the river runs past mill number {i} and the {i}th hill" for i in range(200)]
    cache = saelab.harvest(lm, texts, ["blocks.1.hook_resid_post"], 1500, tmp_path / "cache", ctx_len=32)
    train(
        TopKConfig(d_sae=96, k=6), cache, TrainConfig(n_tokens=2560, batch_size=256), tmp_path / "sae", progress=False
    )
    return tmp_path


def test_exactness_sees_right_and_wrong_sets(small_run, capsys, monkeypatch):
    settings = exactness.Settings(run=small_run, n_tokens=512, batch_size=256)
    assert exactness.main(settings) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["selection"] for line in lines[:-1]] == [
        *("topk value", "topk magnitude", "topk decoder_norm"),
        *("batch_topk", "threshold", "feature_topk"),
    ]
    assert all(line["rows"] >= 96 and line["different"] == 0 for line in lines[:-1])
    right = exactness.encode_topk
    monkeypatch.setattr(exactness, "encode_topk", lambda x, W, b, k, *rest: right(x, W, b, k - 1, *rest))
    assert exactness.main(settings) == 1
