"""Rows on a GPU before the step that reads them. Without a GPU: the order in which batches are read, staged and handed out."""

import json

import pytest
import torch
from test_activation_cache import make_cache

import saelab
from saelab.activation_cache.streaming import ActivationStream
from saelab.saes import ReLUConfig, TopKConfig
from saelab.training import data, loop
from saelab.training.device_rows import AHEAD, StagedRows, ahead_on, common_device, device_rows, read_ahead

CPU = torch.device("cpu")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU")


class Source:
    """Batches that are noted when they are read, and whether they were closed; `error` in place of the batch after the last."""

    def __init__(self, n, said, error=None):
        self.left, self.said, self.error, self.closed = iter(range(n)), said, error, 0

    def __iter__(self):
        return self

    def __next__(self):
        for i in self.left:
            self.said.append(f"read {i}")
            return {"x": torch.full((2, 3), float(i))}
        if self.error is not None:
            raise self.error
        raise StopIteration

    def close(self):
        self.closed += 1


def copied(rows, uses=None, dtype=None):
    """A batch as a GPU's would be, with "copies" on the CPU."""
    copies = {name: x.clone() if dtype is None else x.to(dtype) for name, x in rows.items()}
    return StagedRows(rows, CPU, copies, lambda copy: None if uses is None else uses.append(copy))


def staging(said):
    def stage(rows):
        said.append(f"stage {int(rows['x'][0, 0])}")
        return copied(rows)

    return stage


def numbers(batches):
    return [int(rows["x"][0, 0]) for rows in batches]


def test_on_the_cpu_the_batches_are_the_same_objects():
    batches = iter([{"x": torch.zeros(1, 2)}])
    assert ahead_on(CPU, batches) is batches and ahead_on(torch.device("mps:0"), batches) is batches


def test_two_batches_are_staged_ahead_in_order_and_no_more():
    said = []
    batches = read_ahead(Source(6, said), staging(said))
    assert not said  # nothing is read before the first is asked for
    for i in range(6):
        rows = next(batches)
        assert int(rows["x"][0, 0]) == i
        so_far = range(min(6, i + 1 + AHEAD))
        assert said == [f"{what} {j}" for j in so_far for what in ("read", "stage")]
    assert AHEAD == 2 and next(batches, None) is None


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_it_ends_where_its_source_ends(n):
    source = Source(n, [])
    assert numbers(read_ahead(source, staging([]))) == list(range(n)) and source.closed == 1


@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_error_comes_after_the_batches_before_it(n):
    source, got = Source(n, [], OSError("shard 3 is damaged")), []
    batches = read_ahead(source, staging([]))
    with pytest.raises(OSError, match="shard 3"):
        got.extend(int(rows["x"][0, 0]) for rows in batches)
    assert got == list(range(n)) and source.closed == 1 and next(batches, None) is None


def test_an_interrupt_is_not_held_back():
    batches = read_ahead(Source(1, [], KeyboardInterrupt()), staging([]))
    with pytest.raises(KeyboardInterrupt):
        next(batches)


def test_a_reader_that_stops_early_closes_the_source():
    source = Source(9, [])
    batches = read_ahead(source, staging([]))
    next(batches)
    assert not source.closed
    batches.close()
    assert source.closed == 1


def test_batches_that_need_no_copy_are_not_read_ahead():
    said = []
    batches = read_ahead(Source(3, said), lambda rows: rows)
    for i in range(3):
        assert int(next(batches)["x"][0, 0]) == i and said == [f"read {j}" for j in range(i + 1)]
    assert next(batches, None) is None


def test_a_staged_batch_is_the_rows_on_the_cpu_and_their_copies():
    rows, uses = {"x": torch.randn(6, 3), "y": torch.randn(6, 4)}, []
    copy = rows["x"].bfloat16()
    staged = StagedRows(rows, CPU, {"x": copy}, uses.append)
    assert list(staged) == ["x", "y"] and len(staged) == 2 and all(staged[name] is rows[name] for name in rows)
    part = device_rows(staged, "x", slice(2, 5), CPU)
    assert torch.equal(part, copy[2:5]) and part.data_ptr() == copy[2:].data_ptr()
    assert uses[0] is copy and len(uses) == 1  # what reads it waits until it has arrived
    assert torch.equal(device_rows(staged, "y", slice(0, 2), CPU), rows["y"][:2]) and len(uses) == 1
    assert device_rows(staged, "x", slice(0, 2), torch.device("meta")).dtype == torch.float32 and len(uses) == 1
    assert torch.equal(device_rows(rows, "x", slice(1, 3), CPU), rows["x"][1:3])


def test_runs_on_different_devices_copy_for_themselves():
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    assert common_device([one, one]) == one and common_device([one, other]) == CPU


def files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.safetensors"))
        if "checkpoint" not in str(file)
    }


def test_staged_rows_in_the_dtype_of_the_cache_train_the_same_bits(tmp_path, monkeypatch):
    """Side by side on the same copies, with micro-batches, snapshots, and the golden inputs of bfloat16 rows."""
    cache = make_cache(tmp_path / "cache")
    configs = [TopKConfig(d_sae=24, k=3), ReLUConfig(d_sae=16, target_l0=2.0)]
    training = saelab.TrainConfig(640, 64, grad_accumulation=2, snapshot_every=4, device="cpu", log_every=1)

    def run(name):
        saelab.train(configs, cache, training, tmp_path / name, hook_name="h", progress=False)
        return files(tmp_path / name)

    plain, uses, seen = run("plain"), [], []

    def staged(device, batches, pinned):
        assert device == CPU and not pinned

        def stage(rows):
            seen.append(rows["h"].dtype)
            return copied(rows, uses)

        return read_ahead(batches, stage)

    reading = data._reading
    monkeypatch.setattr(loop, "ahead_on", staged)
    monkeypatch.setattr(
        data, "_reading", lambda cache, leave_out, _: reading(cache, leave_out, True) | {"pin_memory": False}
    )
    assert run("staged") == plain and plain
    assert set(seen) == {torch.bfloat16} and len(uses) == 10 * 2 * 2 and len({id(copy) for copy in uses}) >= 3
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if "per_second" not in key}
            for file in sorted((tmp_path / name).rglob("metrics.jsonl"))
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for name in ("plain", "staged")
    ]
    assert logs[0] == logs[1] and logs[0]


@pytest.mark.parametrize(
    ("storage", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("int8", torch.float32)]
)
def test_a_gpu_gets_rows_as_they_are_stored_and_the_cpu_float32(storage, dtype, tmp_path):
    cache, stream = make_cache(tmp_path / "cache", storage=storage), ActivationStream.__new__(ActivationStream)
    assert data._reading(cache, 5, True) == {"dtype": dtype, "leave_out": 5, "pin_memory": True}
    assert data._reading(cache, 5, False) == {"dtype": torch.float32, "leave_out": 5, "pin_memory": False}
    assert data._reading(stream, 0, True) == {"dtype": torch.bfloat16}
    assert data._reading(stream, 0, False) == {"dtype": torch.float32}


@on_a_gpu
@pytest.mark.parametrize("own_memory", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_arrive_on_the_gpu_unchanged(device, dtype, own_memory):
    """Also where the source writes each batch into the memory of the last, pinned or not."""
    gpu = torch.zeros(0, device=device).device
    expected = [torch.randn(4096, 512).to(dtype) for _ in range(10)]
    buffer = torch.empty(4096, 512, dtype=dtype, pin_memory=True)
    source = ({"x": x.pin_memory() if own_memory else buffer.copy_(x)} for x in expected)
    n = 0
    for rows, x in zip(ahead_on(gpu, source, pinned=own_memory), expected, strict=True):
        work = torch.randn(2048, 2048, device=gpu)
        for _ in range(20):  # the step is still computing while later rows are copied
            work = work @ work
        there = device_rows(rows, "x", slice(0, 4096), gpu)
        assert there.device == gpu and there.dtype == dtype
        assert torch.equal(there.cpu(), x) and torch.equal(rows["x"], x) and rows["x"].is_pinned()
        n += 1
    assert n == 10


@on_a_gpu
def test_rows_on_the_gpu_pass_through(device):
    batch = {"x": torch.randn(4, 3, device=device)}
    batches = ahead_on(batch["x"].device, iter([batch]))
    assert (
        next(batches) is batch
        and device_rows(batch, "x", slice(0, 4), batch["x"].device).data_ptr() == batch["x"].data_ptr()
    )


@on_a_gpu
def test_a_cache_is_gathered_into_pinned_memory_as_stored(device, tmp_path):
    cache = make_cache(tmp_path / "cache")
    gpu = torch.zeros(0, device=device).device
    source = data.open_data(cache, "h", device=gpu)
    assert source.pinned
    widened = cache.batches(32, seed=1, hook_name=["h"])
    for rows, plain, _ in zip(
        ahead_on(gpu, source.batches(["h"], 32, 1, 0), source.pinned), widened, range(10), strict=False
    ):
        assert rows["h"].is_pinned() and rows["h"].dtype == torch.bfloat16
        assert torch.equal(device_rows(rows, "h", slice(0, 32), gpu).float().cpu(), plain["h"])
