"""What `bench_step` compares with, and what it says about a GPU: baselines, ops, the model of the least time, traces."""

import csv
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saelab.kernels.bench import bench_step, gpu_trace, rows
from saelab.kernels.bench.dense_step import DenseEncoder, DenseTopK, sparse_acts_of
from saelab.kernels.bench.providers import BASELINES
from saelab.kernels.bench.sizes import GPU_SIZES, Shape
from saelab.kernels.bench.sparse_step import SparseTopK
from saelab.kernels.bench.step_settings import Settings
from saelab.kernels.bench.traffic import step_model
from saelab.kernels.bench.traffic.step_model import Machine, dense_is_less, least_ms
from saelab.kernels.sparse_acts import SparseActs

DeviceType = torch.autograd.DeviceType  # pyright: ignore[reportPrivateImportUsage]
SMALL = {"d_sae": (64,), "k": (4,), "d_in": 16, "batch_size": 64, "pairs": 1, "warmup": 1, "device": "cpu"}


def batches(n):
    return torch.randn(n, 64, 12, generator=torch.Generator().manual_seed(0))


def test_a_dense_encoder_does_the_same_work():
    ours, encoder = SparseTopK(12, 40, 4), DenseEncoder(12, 40, 4)
    for x in batches(3):
        assert ours.step(x) == pytest.approx(encoder.step(x), rel=1e-4)


def test_the_precisions_learn_alike(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    exact, tf32, bf16, compiled = (
        DenseTopK(12, 40, 4, "cpu", precision) for precision in ("fp32", "tf32", "bf16", "compiled")
    )
    for x in batches(3):
        want = exact.step(x)
        assert tf32.step(x) == pytest.approx(want, rel=1e-4)  # a CPU has no TF32
        rounded = bf16.step(x)
        assert rounded == compiled.step(x) and rounded != want and rounded == pytest.approx(want, rel=0.05)
    assert torch.get_float32_matmul_precision() == "highest"


def test_entries_of_topk_are_sparse_acts_with_their_transpose():
    dense = torch.zeros(5, 9).scatter(1, torch.randn(5, 9).argsort(dim=1)[:, :3], torch.rand(5, 3) + 0.1)
    top = dense.topk(3, dim=1)
    got, want = sparse_acts_of(top.values, top.indices, 9), SparseActs.from_dense(dense)
    assert torch.equal(got.values, want.values) and torch.equal(got.features, want.features)
    assert torch.equal(got.offsets, want.offsets) and torch.equal(got.rows, want.rows)
    assert all(map(torch.equal, got.by_feature, want.by_feature))
    shapes = sparse_acts_of(top.values.to("meta"), top.indices.to("meta"), 9)  # nothing waits for a value
    assert [each.shape for each in shapes.by_feature] == [each.shape for each in want.by_feature]


def test_every_baseline_and_op_has_its_rows(capsys):
    settings = Settings(**SMALL, baselines=("fp32", "tf32", "bf16", "encoder"), ops=("step", "encode", "decode"))
    assert bench_step.main(settings) == 0
    found = list(csv.DictReader(capsys.readouterr().out.splitlines()[1:]))
    steps, ops = found[:5], found[5:]
    assert [row["provider"] for row in steps] == ["dense", "dense tf32", "dense bf16", "dense encoder", "saelab"]
    fastest = min(steps[:4], key=lambda row: float(row["median"]))
    assert steps[4]["ratio"] == fastest["ratio"] and steps[4]["certified"]
    assert [(row["op"], row["provider"]) for row in ops] == [
        (op, provider) for op in ("encode_topk", "decode") for provider in ("dense bf16", "saelab")
    ]
    assert all(float(row["ratio"]) > 0 for row in found)
    assert not any(row[name] for row in found for name in ("launches", "waits", "peak_mib", "least_ms", "share"))


def test_a_baseline_that_cannot_run_is_named(capsys, monkeypatch):
    def too_large(shape, device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(BASELINES, "bf16", replace(BASELINES["bf16"], build=too_large))
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    assert bench_step.main(Settings(**SMALL, baselines=("bf16", "sparsify"))) == 0
    out, err = capsys.readouterr()
    assert [row["provider"] for row in csv.DictReader(out.splitlines()[1:])] == ["saelab"]
    assert err.splitlines() == [
        "dense bf16 skipped at 64x16x64x4: OutOfMemoryError: CUDA out of memory.",
        "eai-sparsify skipped at 64x16x64x4: ModuleNotFoundError: import of schedulefree halted; None in sys.modules",
    ]


def test_a_size_that_does_not_fit_is_named(capsys, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench_step, "measure", too_large)
    assert bench_step.main(Settings(**SMALL)) == 0
    assert capsys.readouterr().err == "saelab skipped at 64x16x64x4: CUDA out of memory.\n"


def test_defaults_of_a_gpu():
    gpu, cpu = Settings(device="cuda"), Settings(device="cpu")
    assert gpu.shapes == list(GPU_SIZES) and len(set(GPU_SIZES)) == 12
    assert gpu.baselines_at(131072) == list(BASELINES.values()) and gpu.warmup_steps == 4
    assert Settings(device="cuda", d_sae=(8,), k=(2, 3)).shapes == [Shape(2048, 576, 8, 2), Shape(2048, 576, 8, 3)]
    assert [shape.d_sae for shape in cpu.shapes] == [4096, 8192, 16384, 32768, 65536, 131072]
    assert cpu.baselines_at(32768) == [BASELINES["fp32"]] and not cpu.baselines_at(65536) and cpu.warmup_steps == 20


def test_the_model_by_hand():
    assert step_model.sparse_step(2, 3, 64, 1) == (768 + 384, 28 * (2 * 192 + 67) + 96, 5 * 24)
    assert step_model.dense_step(2, 3, 64, 1) == (5 * 768, 28 * (2 * 192 + 67) + 96 + 3 * 256, 0)
    assert step_model.encoder_step(2, 3, 64, 1) == (2 * 768, 28 * (2 * 192 + 67) + 96 + 3 * 256, 3 * 24)
    machine = Machine({"bf16": 1000.0, "fp32": 100.0}, hbm_bytes=10.0, l2_bytes=20.0)
    assert least_ms(500, 20, 30, machine) == pytest.approx(500 + 2000 + 1500)
    assert least_ms(500, 20, 30, machine, "fp32") == pytest.approx(5000 + 2000 + 1500)


@pytest.mark.parametrize("grown", range(4))
def test_more_is_never_less_work(grown):
    h100, size = step_model.MACHINES["H100"], [2048, 576, 8192, 32]
    larger = [n * (1 + (at == grown)) for at, n in enumerate(size)]
    for work in (
        *(step_model.sparse_step, step_model.dense_step, step_model.encoder_step),
        *(step_model.sparse_encode, step_model.dense_encode, step_model.sparse_decode, step_model.dense_decode),
    ):
        assert all(a <= b for a, b in zip(work(*size), work(*larger), strict=True))
        assert least_ms(*work(*size), h100) <= least_ms(*work(*larger), h100)


def test_where_dense_products_are_less_work():
    assert dense_is_less(16384, 4096, 8192, 128)
    assert not dense_is_less(8192, 4096, 65536, 64)


def test_the_least_time_has_a_share_on_a_known_gpu(monkeypatch):
    work = step_model.dense_step(2, 3, 64, 1)
    assert rows.least(work, "bf16", "cpu", 1.0) == {}
    monkeypatch.setattr(rows, "hardware", lambda: "NVIDIA H100 80GB HBM3 torch 2.13")
    assert rows.least(step_model.Work(798e9, 3e9, 6.5e9), "bf16", "cuda", 12.0) == {"least_ms": 3.0, "share": 0.25}
    assert rows.least(None, "bf16", "cuda", 1.0) == {}
    monkeypatch.setattr(rows, "hardware", lambda: "another GPU")
    assert rows.least(work, "bf16", "cuda", 1.0) == {}


def test_kernels_and_waits_are_counted():
    def event(name, device=DeviceType.CUDA, **more):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=False, **more)

    cpu = [event(name, DeviceType.CPU) for name in ("cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize")]
    gpu = [event(name) for name in ("ampere_gemm", "Memcpy DtoH (Device -> Pinned)", "Memset (Device)", "spmm")]
    annotation = event("Optimizer.step#Adam.step")
    annotation.is_user_annotation = True
    assert gpu_trace.count([*cpu, *gpu, annotation]) == (2, 1)
    assert gpu_trace.trace(lambda: pytest.fail("run"), "cpu", 0) == {} and gpu_trace.allocated("cpu") == 0


def test_rows_are_not_appended_to_other_columns(tmp_path):
    path = tmp_path / "step.csv"
    for _ in range(2):
        rows.append_csv(path, [{"op": "decode"}])
    assert [row["op"] for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())] == ["decode"] * 2
    path.write_text("op,shape\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other columns"):
        rows.append_csv(path, [{"op": "decode"}])


def test_kept_results_have_todays_columns():
    with rows.RESULTS.open(encoding="utf-8", newline="") as file:
        kept = csv.DictReader(file)
        assert tuple(kept.fieldnames or ()) == rows.COLUMNS
        assert all(row["hardware"] and None not in row and None not in row.values() for row in kept)
