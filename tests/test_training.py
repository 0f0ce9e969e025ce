"""Training: it learns, repeats bit for bit, goes on after an interruption, and stops on bad numbers with nothing harmed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saelab.errors import SaelabError, TrainingError
from saelab.files import process_number, remove_leftovers, temporary_path, tensors_hash
from saelab.interop import load_sae
from saelab.kernels.primitives import project_
from saelab.saes import Batch, BatchTopKConfig, ReLUConfig, StepInfo, TopKConfig, TopKSAE
from saelab.training import TrainConfig, train
from saelab.training.adam import Adam
from saelab.training.checkpoint import claimed, list_checkpoints
from saelab.training.dead_features import DeadFeatures
from saelab.training.metrics_log import MetricsLog
from saelab.training.optimizer import apply_step, learning_rate

SMALL = TrainConfig(
    n_tokens=64 * 40, batch_size=64, warmup_steps=5, checkpoint_every=10, log_every=5, dead_after_tokens=500
)
TOPK = TopKConfig(64, 4)


def planted(n=2000, d_in=16, seed=0):
    """Sparse sums of 32 planted directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(32, d_in, generator=generator)
    codes = torch.rand(n, 32, generator=generator) * (torch.rand(n, 32, generator=generator) < 0.1)
    return codes @ directions + 1.5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed: TOPK on planted() with SMALL."""
    train(TOPK, planted(), SMALL, folder := tmp_path_factory.mktemp("whole") / "sae", progress=False)
    return folder


@pytest.fixture(scope="module")
def whole_hash(whole):
    return load_sae(whole).hash


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("config", [TOPK, ReLUConfig(64, l1_coefficient=0.5)], ids=["topk", "relu"])
def test_it_learns_and_fills_its_folder(tmp_path, config):
    x = planted()
    sae = train(
        config, x, TrainConfig(n_tokens=64 * 300, batch_size=64, warmup_steps=5), tmp_path / "sae", progress=False
    )
    error = (sae(x).x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error.item() < 0.25
    assert {f.name for f in (tmp_path / "sae").iterdir()} == {
        "sae.json", "sae.safetensors", "golden.safetensors", "metrics.jsonl", "checkpoints",
    }  # fmt: skip
    lines = metrics(tmp_path / "sae")
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert {
        "step",
        "tokens",
        "loss",
        "fvu",
        "l0",
        "dead_fraction_train",
        "lr",
        "grad_norm",
        "tokens_per_second",
    } <= set(lines[0])
    assert load_sae(tmp_path / "sae").hash == sae.hash


def test_same_seed_same_bits_other_seed_other_bits():
    x = planted()
    first, second = (train(TOPK, x, SMALL, progress=False).hash for _ in "ab")
    other = train(TOPK, x, TrainConfig(**{**vars(SMALL), "seed": 1}), progress=False).hash
    assert first == second != other


def interrupt_at(monkeypatch, step):
    from saelab.training import sae_run

    real = sae_run.Run.train_step

    def train_step(self, rows):
        if self.step == step:
            raise KeyboardInterrupt
        real(self, rows)

    monkeypatch.setattr(sae_run.Run, "train_step", train_step)


@pytest.mark.parametrize("step", [3, 10, 27, 39])
def test_interrupt_and_resume_gives_the_same_bits(tmp_path, monkeypatch, step, whole, whole_hash):
    x = planted()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step)
        train(TOPK, x, SMALL, tmp_path / "cut", progress=False)
    assert not (tmp_path / "cut" / "sae.json").exists()
    again = train(TOPK, x, SMALL, tmp_path / "cut", progress=False)
    assert again.hash == whole_hash
    for name in ("sae.safetensors", "golden.safetensors", "sae.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    keep = lambda lines: [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]  # noqa: E731
    assert keep(metrics(tmp_path / "cut")) == keep(metrics(whole))


def press_ctrl_c_in(monkeypatch, update, times=1, number=signal.SIGINT):
    """Send a signal in the middle of a step, just before its update of the weights."""
    from saelab.training import steps

    real, updates = steps.apply_step, iter(range(10**6))

    def apply_step(*arguments):
        for _ in range(times if next(updates) == update else 0):
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(steps, "apply_step", apply_step)


@pytest.mark.parametrize("step", [0, 7, 20])
def test_ctrl_c_writes_a_checkpoint_between_steps(tmp_path, monkeypatch, step, whole_hash):
    """Less than checkpoint_every steps are done, and still nothing is lost, bit for bit."""
    x, config = planted(), TrainConfig(**{**vars(SMALL), "checkpoint_every": 250})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"resumes from step {step + 1}$"):
        press_ctrl_c_in(patch, step)
        train(TOPK, x, config, tmp_path, progress=False)
    assert list_checkpoints(tmp_path) == [step + 1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(TOPK, x, config, tmp_path, progress=False).hash == whole_hash


def test_sigterm_does_as_ctrl_c(tmp_path, monkeypatch, whole_hash):
    x = planted()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="resumes from step 6$"):
        press_ctrl_c_in(patch, 5, number=signal.SIGTERM)
        train(TOPK, x, SMALL, tmp_path, progress=False)
    assert list_checkpoints(tmp_path) == [6]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train(TOPK, x, SMALL, tmp_path, progress=False).hash == whole_hash


def test_an_applications_own_handler_stays(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        press_ctrl_c_in(monkeypatch, 5, number=signal.SIGTERM)
        train(TOPK, planted(), SMALL, progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


def test_ctrl_c_saves_each_of_several_saes(tmp_path, monkeypatch):
    x, configs = planted(), [TOPK, ReLUConfig(32)]
    whole = train(configs, x, SMALL, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        press_ctrl_c_in(patch, 2 * 6)  # the seventh step of the first of the two
        train(configs, x, SMALL, tmp_path, progress=False)
    assert [list_checkpoints(folder) for folder in sorted(tmp_path.iterdir())] == [[7], [7]]
    assert [s.hash for s in train(configs, x, SMALL, tmp_path, progress=False)] == [s.hash for s in whole]


def test_ctrl_c_in_the_last_step_ends_a_finished_run(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c_in(monkeypatch, 39)
        train(TOPK, planted(), SMALL, tmp_path, progress=False)
    assert (tmp_path / "sae.json").exists()


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c_in(monkeypatch, 5, times=2)
        train(TOPK, planted(), SMALL, tmp_path, progress=False)
    assert list_checkpoints(tmp_path) == []


def test_resuming_under_other_conditions_warns(tmp_path, monkeypatch):
    x = planted()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 15)
        train(TOPK, x, SMALL, tmp_path, progress=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.warns(UserWarning, match=r"threads \d+ -> 77"):
        train(TOPK, x, SMALL, tmp_path, progress=False)


def flip_a_byte(path):
    path.write_bytes(path.read_bytes()[:-50] + bytes([path.read_bytes()[-50] ^ 255]) + path.read_bytes()[-49:])


def save_without(names):
    def save(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(names)}
        save_file(tensors, path, metadata | {"sha256": tensors_hash(tensors)})

    return save


def without_latest(copy):
    """As a run of before there was a `latest.json`, which would name the whole one."""

    def damage(path):
        (path.parent / "latest.json").unlink()
        copy(path)

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is skipped"),
        (flip_a_byte, "SHA-256 differs"),
        (save_without("adam."), "not those of this run"),
        (save_without("tokens_since_fired"), "not those of this run"),
        (
            without_latest(lambda path: shutil.copy(path, path.with_name("step-00000099.safetensors"))),
            "it is from step 20; the run has 40",
        ),
        (
            without_latest(lambda path: shutil.copy(path, path.with_name("step-00000030.safetensors"))),
            "it is from step 20",
        ),
    ],
    ids=["cut", "flipped", "no moments", "no counters", "past the end", "renamed"],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch, damage, says, whole_hash):
    x = planted()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 25)
        train(TOPK, x, SMALL, tmp_path, progress=False)
    assert list_checkpoints(tmp_path) == [10, 20]
    damage(tmp_path / "checkpoints" / "step-00000020.safetensors")
    with pytest.warns(UserWarning, match=says):
        assert train(TOPK, x, SMALL, tmp_path, progress=False).hash == whole_hash


def test_latest_names_the_newest_checkpoint_and_so_many_are_kept(tmp_path, monkeypatch):
    x, keep_three = planted(), TrainConfig(**{**vars(SMALL), "keep_checkpoints": 3})
    whole = train(TOPK, x, SMALL, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 35)
        train(TOPK, x, keep_three, tmp_path, progress=False)
    assert list_checkpoints(tmp_path) == [10, 20, 30]
    latest = json.loads((tmp_path / "checkpoints" / "latest.json").read_text())
    assert latest == {"step": 30, "file": "step-00000030.safetensors"}
    for number, other in enumerate(('{"step": 20}', "[3]")):  # that one is whole too; this names none
        (tmp_path / "checkpoints" / "latest.json").write_text(other)
        copy = shutil.copytree(tmp_path, tmp_path / f"copy-{number}", ignore=shutil.ignore_patterns("copy-*"))
        assert train(TOPK, x, SMALL, copy, progress=False).hash == whole.hash


def test_latest_is_taken_before_a_newer_file(tmp_path, monkeypatch):
    """Killed between a checkpoint and its pointer, or a file that somebody put there: what the pointer names goes first."""
    x = planted()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 25)
        train(TOPK, x, SMALL, tmp_path, progress=False)
    (tmp_path / "checkpoints" / "step-00000030.safetensors").write_text("half")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 20)  # it resumes from step 20 without a warning
        train(TOPK, x, SMALL, tmp_path, progress=False)


def test_a_finished_run_returns_at_once(whole, whole_hash, monkeypatch):
    from saelab.training import sae_run

    monkeypatch.setattr(sae_run.Run, "train_step", lambda *_: pytest.fail("trained again"))
    assert train(TOPK, planted(), SMALL, whole, progress=False).hash == whole_hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"config": TopKConfig(64, 5)},
            r"different arguments \(config\.k: 4 -> 5\)\. Use .*--name NAME or another RUN; in Python, another out_dir",
        ),
        ({"train": TrainConfig(**{**vars(SMALL), "lr": 0.1})}, r"\(train\.lr: None -> 0\.1\)"),
        ({"x": planted(seed=1)}, r"\(data: tensor \w{12}\.\.\. -> tensor \w{12}\.\.\.\)"),
        ({"x": planted(d_in=8)}, "d_in: 16 -> 8"),
    ],
    ids=["k", "lr", "data", "width"],
)
def test_another_run_in_the_folder_is_refused_and_unharmed(tmp_path, whole, change, says):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match=says):
        train(
            change.get("config", TOPK), change.get("x", planted()), change.get("train", SMALL), tmp_path, progress=False
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        train(TOPK, planted(), SMALL, tmp_path, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_foreign_folder_with_checkpoints_in_it_is_refused_and_unharmed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/model.pt", "notes.md", "metrics.jsonl"):
        (tmp_path / name).write_text('{"step": 1, "accuracy": 0.9}\n')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"checkpoints, metrics\.jsonl, notes\.md.* no checkpoints/run\.json"):
        train(TOPK, planted(), SMALL, tmp_path, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_cut_off_before_its_first_file_is_taken_up(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".run.json.tmp-1").write_text("{")
    train(TOPK, planted(), SMALL, tmp_path, progress=False)
    assert (tmp_path / "sae.json").exists()


def test_a_list_trains_side_by_side_as_each_would_alone(tmp_path):
    x = planted()
    configs = [TOPK, TopKConfig(64, 8), ReLUConfig(32), TOPK]
    saes = train(configs, x, SMALL, tmp_path, progress=False)
    assert [s.hash for s in saes] == [train(c, x, SMALL, progress=False).hash for c in configs]
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "sae-relu-32",
        "sae-topk-64-k4",
        "sae-topk-64-k4--2",
        "sae-topk-64-k8",
    ]


def test_an_iterator_of_tensors(tmp_path):
    x = planted(64 * 40)
    sae = train(TOPK, iter(x.split(100)), SMALL, progress=False)
    assert torch.equal(sae.center, x[:100].double().mean(0).float())
    with pytest.raises(TrainingError, match="data ended after"):
        train(TOPK, iter(x[:1000].split(100)), SMALL, progress=False)


def test_a_numpy_array_is_as_good_as_a_tensor(whole_hash):
    x = planted()
    arrays = [x.numpy(), x.double().numpy(), np.broadcast_to(x.numpy(), x.shape), np.asfortranarray(x.numpy())]
    assert {train(TOPK, array, SMALL, progress=False).hash for array in arrays} == {whole_hash}
    train(TOPK, iter(np.split(planted(2560).numpy(), 40)), SMALL, progress=False)


def test_fewer_rows_than_a_batch_warn():
    with pytest.warns(UserWarning, match="63 different rows, fewer than one batch of 64"):
        train(TOPK, planted(63), SMALL, progress=False)


def test_nan_rows_stop_the_run_and_keep_the_checkpoint(tmp_path):
    x = planted(64 * 40)
    x[64 * 25 + 3, 2] = math.nan
    with pytest.raises(
        TrainingError, match=r"step 25: 1 of 64 activations in batch 25 .*checkpoint of step 20 .* intact"
    ):
        train(TOPK, iter(x.split(64)), SMALL, tmp_path, progress=False)
    assert list_checkpoints(tmp_path) == [10, 20]
    with pytest.raises(ValueError, match="1 of 2560 rows contain NaN"):
        train(TOPK, x, SMALL, progress=False)


def test_bad_numbers_before_any_checkpoint_do_not_promise_one(tmp_path):
    x = planted(64 * 40)
    x[64 * 5, 2] = math.nan
    with pytest.raises(TrainingError, match="step 5: .*; nothing was saved yet"):
        train(TOPK, iter(x.split(64)), SMALL, tmp_path, progress=False)


def test_two_trainers_in_one_folder_are_refused_and_a_killed_one_lets_go(tmp_path):
    x = planted()
    code = (
        "import sys; from pathlib import Path; from saelab.training.checkpoint import claimed;"
        "c = claimed(Path(sys.argv[1])); c.__enter__(); print('claimed', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sae")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"claimed\n"
        with pytest.raises(SaelabError, match="Another process is training in .*sae"):
            train(TOPK, x, SMALL, tmp_path / "sae", progress=False)
        other.kill()
    train(TOPK, x, SMALL, tmp_path / "sae", progress=False)
    with claimed(tmp_path / "sae"):  # finished: whoever asks again only reads
        train(TOPK, x, SMALL, tmp_path / "sae", progress=False)


def test_a_full_disk_is_named_in_the_log(tmp_path):
    """In a process of its own: the limit on file sizes would hit pytest's files as well."""
    code = (
        "import resource, sys, torch, saelab; from saelab.saes import TopKConfig;"
        "config = saelab.TrainConfig(n_tokens=6400, batch_size=64, log_every=1, checkpoint_every=0);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "saelab.train(TopKConfig(8, 2), torch.randn(64, 4), config, sys.argv[1], progress=False)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sae")], capture_output=True, text=True)
    assert "SaelabError: The disk is full while writing" in run.stderr and "metrics.jsonl" in run.stderr


@pytest.mark.parametrize(
    "machine, pid, age, stays",
    [
        ("own", "own", 0, True),
        ("own", "dead", 0, False),
        ("own", "dead", 48, False),
        ("other", "own", 0, True),
        ("other", "dead", 0, True),  # it may run there
        ("other", "dead", 48, False),
        ("other", "own", 48, False),
    ],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_leftovers_are_judged_by_the_machine_that_left_them(tmp_path, machine, pid, age, stays, is_folder):
    own, here = divmod(process_number(), 2**23)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    number = (own if machine == "own" else own ^ 1) * 2**23 + (here if pid == "own" else int(dead.stdout))
    left = temporary_path(tmp_path / "x", number)
    if is_folder:
        left.mkdir()
        (left / "part").write_text("half")
    else:
        left.write_text("half")
    for path in ([left / "part"] if is_folder else []) + [left]:
        os.utime(path, (time.time() - age * 3600,) * 2)
    remove_leftovers(tmp_path)
    assert left.exists() == stays


def test_leftovers_of_killed_trainers_are_removed(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / "checkpoints").mkdir()
    left = tmp_path / "checkpoints" / f".step-00000010.safetensors.tmp-{int(dead.stdout)}"
    alive = tmp_path / "checkpoints" / f".x.tmp-{os.getppid()}"
    for path in (left, alive):
        path.write_text("half")
    train(TOPK, planted(), SMALL, tmp_path, progress=False)
    assert not left.exists() and alive.exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"variant": "topk"}'])
def test_an_altered_run_file_is_named(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run.json").write_text(content)
    with pytest.raises(TrainingError, match=r"run\.json was not written by train"):
        train(TOPK, planted(), SMALL, tmp_path, progress=False)


def test_odd_lines_of_the_log_are_left_out_and_the_others_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'garbage\n{"step": 0}\n[1]\n3\n{"a": 1}\n{"step": "x"}\n\xff\xfe\n{"step": 5}\n{"step": 10}\n{"st'
    )
    MetricsLog(tmp_path, 10)
    assert metrics(tmp_path) == [{"step": 0}, {"step": 5}]


def test_a_loss_that_explodes_says_lower_lr():
    config = TrainConfig(n_tokens=64 * 40, batch_size=64, lr=1e30, warmup_steps=0, clip_norm=float("inf"))
    with pytest.raises(TrainingError, match="lower lr"):
        train(ReLUConfig(64), planted(), config, progress=False)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(0, 4),
        torch.zeros(4),
        torch.zeros(4, 0),
        torch.ones(3, 3, dtype=torch.int64),
        7,
        iter([]),
        ["rows"],
        np.ones((3, 3), int),
    ],
    ids=["no rows", "1-D", "no columns", "ints", "int", "empty", "strings", "numpy ints"],
)
def test_data_that_cannot_be_trained_on(data):
    with pytest.raises(ValueError, match="train on"):
        train(TOPK, data, SMALL, progress=False)


def test_grad_accumulation_is_close_to_the_whole_batch():
    """ReLU's loss is a mean over tokens, so its gradient does not depend on how a batch is cut."""
    x, config = planted().double(), ReLUConfig(32)
    whole = train(config, x, SMALL, progress=False)
    parts = train(config, x, TrainConfig(**{**vars(SMALL), "grad_accumulation": 4}), progress=False)
    torch.testing.assert_close(whole.W_dec, parts.W_dec, rtol=2e-2, atol=2e-3)


def test_learning_rate_by_hand():
    config = TrainConfig(n_tokens=200, batch_size=2, lr=1.0, warmup_steps=10, decay_fraction=0.2)
    rates = [learning_rate(config, 9.0, 4096, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1 and rates[79] == 1 and rates[80] == 1
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    default = TrainConfig(n_tokens=200, batch_size=2, warmup_steps=0, decay_fraction=0.0)
    assert learning_rate(default, 3e-3, 4 * 4096, 50) == pytest.approx(1.5e-3)


def test_projection_removes_the_part_along_each_row():
    W = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
    gradient = torch.randn(5, 3, dtype=torch.float64)
    across = gradient - (gradient * W).sum(1, keepdim=True) * W
    project_(gradient, W)
    torch.testing.assert_close(gradient, across)
    assert (gradient * W).sum(1).abs().max() < 1e-12


def test_a_step_keeps_unit_norm_clips_and_skips_infinite_gradients():
    x = planted(64)
    sae = TopKSAE(TOPK, 16)
    adam = Adam(sae.parameters())
    info = StepInfo(torch.zeros(64, dtype=torch.bool), 0, 10)
    (1e6 * sae.loss(Batch(x, x), info).total).backward()
    assert apply_step(sae, adam, 0.1, 1.0) > 1
    assert (sae.W_dec.norm(dim=1) - 1).abs().max().item() < 1e-5
    before = sae.hash
    (math.inf * sae.loss(Batch(x, x), info).total).backward()
    assert not math.isfinite(apply_step(sae, adam, 0.1, 1.0))
    assert sae.hash == before


def test_dead_features_count_tokens_since_a_nonzero_code():
    from saelab.kernels.sparse_acts import SparseActs

    dead = DeadFeatures(3, 20, torch.device("cpu"))
    dead.update(SparseActs.from_dense(torch.tensor([[1.0, 0.0, 0.0]] * 10)))
    dead.update(SparseActs.from_dense(torch.tensor([[0.0, -1.0, 0.0]] * 10)))
    assert dead.tokens_since_fired.tolist() == [10, 0, 20]
    assert dead.dead.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"n_tokens": 10}, "n_tokens=10.*2048"),
        ({"n_tokens": 5000, "batch_size": 0}, "batch_size=0"),
        ({"n_tokens": 5000, "lr": -1.0}, "lr=-1"),
        ({"n_tokens": 5000, "decay_fraction": 3.0}, "decay_fraction=3"),
        ({"n_tokens": 5000, "clip_norm": 0.0}, "clip_norm=0"),
        ({"n_tokens": 5000, "log_every": 0}, "log_every=0"),
        ({"n_tokens": 5000, "keep_checkpoints": 0}, "keep_checkpoints=0 must be at least 1"),
        ({"n_tokens": 5000, "seed": 2**63}, "seed=.* between 0 and"),
        ({"n_tokens": 5000, "batch_size": 1}, "batch_size=1 .*one row, whose FVU is undefined"),
        (
            {"n_tokens": 5000, "batch_size": 5, "grad_accumulation": 4},
            "grad_accumulation=4 leaves a micro-batch of one row",
        ),
        (
            {"n_tokens": 5000, "batch_size": 4, "grad_accumulation": 10},
            "grad_accumulation=10 leaves a micro-batch of one row",
        ),
    ],
)
def test_bad_train_configs_name_the_value(values, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**values)


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here"):
        train(TOPK, planted(), TrainConfig(n_tokens=640, batch_size=64, device=device), tmp_path / "a", progress=False)
    assert not (tmp_path / "a" / "checkpoints" / "run.json").exists()


@pytest.mark.parametrize(
    "chunk", [torch.zeros(9, 8), torch.zeros(16), torch.zeros(9, 16, dtype=torch.int64)], ids=["width", "1-D", "ints"]
)
def test_a_later_chunk_of_another_shape_is_named(chunk):
    with pytest.raises(ValueError, match=r"\(n, 16\) floats, got "):
        train(TOPK, iter([planted(64), chunk, planted()]), SMALL, progress=False)


def test_not_an_sae_config():
    with pytest.raises(ValueError, match="TopKConfig"):
        train({"d_sae": 4}, planted(), SMALL, progress=False)
    with pytest.raises(ValueError, match="empty"):
        train([], planted(), SMALL, progress=False)


def test_wandb_is_never_imported_unasked():
    code = (
        "import sys, torch, saelab; from saelab.saes import TopKConfig;"
        "saelab.train(TopKConfig(8, 2), torch.randn(64, 4), saelab.TrainConfig(n_tokens=64, batch_size=32), progress=False);"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_takes_a_train_config_for_each_sae_of_one_stream(tmp_path):
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    configs = [TopKConfig(16, 2), TopKConfig(16, 2), BatchTopKConfig(16, 2)]
    trains = [TrainConfig(400, 40, lr=lr, warmup_steps=1, seed=3) for lr in (1e-2, 1e-3, None)]
    saes = train(configs, x, trains, tmp_path, progress=False)
    names = ["sae-topk-16-k2-lr0.01-seed3", "sae-topk-16-k2-lr0.001-seed3", "sae-batch_topk-16-k2-seed3"]
    assert [sae.provenance.folder for sae in saes] == [tmp_path / name for name in names]
    alone = [train(config, x, one, progress=False) for config, one in zip(configs, trains, strict=True)]
    assert [sae.hash for sae in saes] == [sae.hash for sae in alone]
    for other, says in (
        (trains[:2], "2 TrainConfigs for 3 SAE configs"),
        (
            [*trains[:2], TrainConfig(400, 40, seed=4)],
            "seed=3 and 4: SAEs trained side by side see the same batches",
        ),
        ([*trains[:2], TrainConfig(800, 40, seed=3)], "n_tokens=400 and 800"),
        ([*trains[:2], TrainConfig(400, 80, seed=3)], "batch_size=40 and 80"),
    ):
        with pytest.raises(ValueError, match=says):
            train(configs, x, other, progress=False)


@pytest.mark.parametrize(("n_tokens", "said"), [(150, True), (128, False)])
def test_it_says_how_many_tokens_whole_batches_are(n_tokens, said, caplog):
    with caplog.at_level("INFO", "saelab"):
        train(TopKConfig(16, 2), torch.randn(300, 8), TrainConfig(n_tokens, 64, device="cpu"))
    assert ("Training reads 128 of the 150 tokens asked for: 2 whole batches." in caplog.text) == said
