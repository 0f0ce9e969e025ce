"""Jobs as real processes on a tiny run: one outlives what started it, one is cancelled, one is killed, one fails."""

import inspect
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_labels import serve  # noqa: F401

from saelab.cli import feature_commands
from saelab.errors import SaelabError, StoreError
from saelab.features import collect_features
from saelab.features.store import load_features
from saelab.files import locked
from saelab.io import load_sae
from saelab.jobs import Collect, Job, Label, Verify, cancel, jobs, start
from saelab.jobs.control import sae_of
from saelab.jobs.job import ACTIVE, PROGRESS, RECORD, read_job
from saelab.jobs.kinds import command, from_arguments
from saelab.jobs.processes import Process, this_process
from saelab.runs import find_saes

WAIT = 120


@pytest.fixture
def run(hostile_run, tmp_path):
    """A copy of a whole run; jobs that a test leaves at work are killed."""
    folder = Path(shutil.copytree(hostile_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))
    yield folder
    for job in jobs(folder):
        if job.process is not None:
            job.process.send(signal.SIGKILL)


@pytest.fixture
def silent(serve):  # noqa: F811
    """The address of a server that never answers."""
    end = threading.Event()

    def reply(*_: str) -> int:
        end.wait()
        return 500

    yield serve(reply)
    end.set()


def until(job: Job, *states: str) -> Job:
    """The job once it is in one of these states."""
    for _ in range(WAIT * 20):
        job = read_job(job.folder)
        if job.state in states:
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job.state}, not {states}: {job.log()}")


def under_way(run: Path, server) -> Job:
    """The newest job once it has asked for the first label and has said how far it is."""
    for _ in range(WAIT * 20):
        (job, *_) = jobs(run)
        if server.asked and job.progress is not None:
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job.state}: {job.log()}")


def test_a_job_comes_to_its_end_though_what_started_it_is_gone(run):
    code = "import sys; from saelab.jobs import Collect, start; start(sys.argv[1], 'sae', Collect(512, True))"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
    (job,) = jobs(run)
    assert job.state in ("starting", "running")
    for second, message in ((Verify(), "and verify cannot go beside it"), (Collect(), f"is at work .job {job.id}.")):
        with pytest.raises(SaelabError, match=message):
            start(run, "sae", second)
    job = until(job, "done", "failed", "lost")
    assert job.end is not None and job.state == "done", job.log()
    store = load_features(run)
    assert job.end.text == f"The store has 96 features, counted on {store.n_tokens:,} tokens."
    assert 0 < store.n_tokens <= 512
    assert "Collecting features on" in job.log() and "\r" not in job.log()
    assert sorted(path.name for path in job.folder.iterdir()) == ["job.json", "log.txt", "progress.jsonl"]
    assert cancel(job) == "done"


def test_a_cancelled_job_ends_and_keeps_what_it_had(run, silent):
    job = start(run, "sae", Label(silent.address, "m", n_features=3))
    job = under_way(run, silent)
    assert job.state == "running" and job.progress is not None
    assert job.progress[1:5] == ("Labels", 0, 3, "feature")
    with pytest.raises(SaelabError, match="Label features of sae is at work"):
        start(run, "sae", Label(silent.address, "another"))
    assert cancel(job) in ("stopping", "cancelled")
    job = until(job, "cancelled")
    assert job.end is not None and "kept" in job.end.text
    assert f"are sent to {silent.address}" in job.log()


def test_a_killed_job_is_seen_to_have_ended_without_a_result(run, silent):
    job = start(run, "sae", Label(silent.address, "m", n_features=3))
    job = under_way(run, silent)
    assert job.process is not None and job.state == "running"
    os.kill(job.process.pid, signal.SIGKILL)
    job = until(job, "lost")
    assert job.end is None and cancel(job) == "lost"
    again = start(run, "sae", Label(silent.address, "m", n_features=3))  # the dead one is in nobody's way
    assert [one.id for one in jobs(run)] == [
        one.id for one in sorted((again, job), key=lambda one: one.id, reverse=True)
    ]


def test_a_failed_job_says_why_in_one_line(run, serve):  # noqa: F811
    job = start(run, "sae", Label(serve(lambda *_: 401).address, "m", n_features=1))
    job = until(job, "failed")
    assert job.end is not None and "refused the request (401" in job.end.text and "\n" not in job.end.text
    assert "Traceback" not in job.log()


def test_a_verified_store_is_noted(run):
    (sae,) = find_saes(run)
    assert Verify(5).run(sae).startswith("The store holds: hashes, the numbers of 96 features")
    assert load_features(run).annotations.latest("verified")


def test_a_store_that_is_read_is_not_replaced(run, tiny_lm):
    (sae,) = find_saes(run)
    before = (run / "features" / "manifest.json").read_bytes()
    with (
        locked(sae.features_dir, "busy", shared=True),
        pytest.raises(SaelabError, match="collects or reads the features"),
    ):
        collect_features(load_sae(sae.sae_dir), tiny_lm, out_dir=sae.features_dir, renew=True, progress=False)
    assert (run / "features" / "manifest.json").read_bytes() == before


def test_another_process_with_the_same_number_is_left_alone():
    here = this_process()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        reused = Process(here.host, child.pid, here.started)
        assert here.is_running and not reused.is_running and not reused.send(signal.SIGKILL)
        assert not Process("elsewhere", child.pid, here.started).is_here
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    assert not Process(here.host, child.pid, here.started).send(signal.SIGTERM)
    assert not Process(here.host, 2**40, here.started).send(signal.SIGTERM)


def _recorded(run: Path, **fields: object) -> Job:
    folder = run / "jobs" / "20260101-000000-abcd"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"kind": "verify", "sae": "sae", "arguments": {}, "created": time.time(), "process": None, "end": None}
    (folder / RECORD).write_text(json.dumps(record | fields))
    return read_job(folder)


def test_states_of_jobs_that_left_only_their_record(tmp_path):
    assert _recorded(tmp_path).state == "starting"
    assert _recorded(tmp_path, created=time.time() - 60).state == "lost"
    with pytest.raises(SaelabError, match="just being started"):
        cancel(_recorded(tmp_path))
    elsewhere = {"host": "elsewhere", "pid": os.getpid(), "started": "1 after x"}
    job = _recorded(tmp_path, process=elsewhere)
    (job.folder / PROGRESS).write_text("{}\n")  # a sign of life
    assert job.state == "running" and job.progress is None
    with pytest.raises(SaelabError, match="runs on elsewhere: cancel it there"):
        cancel(job)
    os.utime(job.folder / PROGRESS, (1, 1))
    assert job.state == "lost"
    assert _recorded(tmp_path, process=elsewhere | {"host": socket.gethostname()}).state == "lost"
    (job.folder / "cancel").touch()
    assert _recorded(tmp_path, process=elsewhere | {"host": socket.gethostname()}).state == "cancelled"


@pytest.mark.parametrize(
    "fields",
    [
        {"created": "yesterday"},
        {"created": float("nan")},
        {"end": {"state": "done", "time": 1e30, "text": ""}},
        {"end": {"state": "done", "time": 1.0, "text": 3}},
        {"process": {"pid": 3}},
        {"process": {"host": "a", "pid": "-1", "started": "x"}},
        {"end": {"state": "running", "time": 0, "text": ""}},
        {"kind": None},
        {"arguments": 3},
    ],
)
def test_an_altered_record_is_a_job_that_failed(tmp_path, fields):
    with pytest.raises(SaelabError, match="is no record of a job"):
        _recorded(tmp_path, **fields)
    (job,) = jobs(tmp_path)
    assert job.state == "failed" and job.end is not None and "it was altered" in job.end.text


@pytest.mark.parametrize(
    "line",
    [
        "3",
        '{"what": "x"}',
        '{"time": 1, "what": "x", "done": NaN, "total": 3, "unit": ""}',
        "{",
        '{"done": "many", "total": 3}',
    ],
)
def test_a_line_that_says_nothing_is_passed_over(tmp_path, line):
    job = _recorded(tmp_path)
    good = {"time": 1.0, "what": "Labels", "done": 2, "total": 4, "unit": "feature", "remaining": 3.5}
    (job.folder / PROGRESS).write_text(f"{json.dumps(good)}\n{line}\n")
    assert job.progress == (1.0, "Labels", 2.0, 4.0, "feature", 3.5)
    (job.folder / PROGRESS).write_text(f"{line}\n")
    assert job.progress is None


def test_only_names_that_are_ours_are_jobs(tmp_path):
    _recorded(tmp_path)
    shutil.copytree(tmp_path / "jobs" / "20260101-000000-abcd", tmp_path / "jobs" / "..." / "x")
    shutil.copytree(tmp_path / "jobs" / "20260101-000000-abcd", tmp_path / "jobs" / "20260101-000000-abcd.old")
    assert [job.id for job in jobs(tmp_path)] == ["20260101-000000-abcd"]


BAD = [
    (Verify(0), "n_examples=0 must be between 1 and 100000"),
    (Collect(0), "n_tokens=0 must be between"),
    (Label("http://127.0.0.1:1/v1", ""), "model is empty: give the model's name at that address"),
    (Label("", ""), "model is empty: give a model to load here"),
    (Label("", "m", 0), "n_features=0 must be"),
    (Label("", "m", 5, (1, -1)), "feature=-1 must be"),
    (Label("", "a\nb"), "model must be one line of at most 300 characters"),
    (Label("", "m" * 301), "model must be one line"),
    (Label("ftp://host/v1", "m"), "must begin with http:// or https://"),
    (Label("http://", "m"), "must begin with http:// or https://"),
    (Label("http://host:123456/v1", "m"), "is no address"),
    (Label("http://me:secret@host/v1", "m"), "^address must hold no key or password"),
    (Label("http://host/v1?key=secret", "m"), "^address must hold no key or password"),
]


@pytest.mark.parametrize(("kind", "message"), BAD)
def test_bad_arguments_are_refused_before_anything_is_made(hostile_run, kind, message):
    with pytest.raises(ValueError, match=message):
        start(hostile_run, "sae", kind)
    assert not (hostile_run / "jobs").exists()


def test_what_is_missing_is_said(tmp_path, hostile_run):
    shutil.copytree(hostile_run / "sae", tmp_path / "sae")
    with pytest.raises(StoreError, match="No features have been collected for sae yet"):
        start(tmp_path, "sae", Verify())
    with pytest.raises(ValueError, match=r"sae='\.\./sae' is not in .*; expected one of sae"):
        start(tmp_path, "../sae", Collect())
    (tmp_path / "sae" / "sae.json").unlink()
    with pytest.raises(SaelabError, match="sae is still being trained"):
        start(tmp_path, "sae", Collect())
    with pytest.raises(ValueError, match="kind='rm' is unknown; expected one of verify, features, label"):
        from_arguments("rm", {})
    with pytest.raises(ValueError, match="do not fit verify"):
        from_arguments("verify", {"path": "/"})


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (Verify(), []),
        (Verify(7), ["--n-examples", "7"]),
        (Collect(5000, True), ["--n-tokens", "5000", "--renew"]),
        (
            Label("http://a/v1", "a model", 2, (3, 4)),
            ["--address", "http://a/v1", "--model", "a model", "--n-features", "2", "--feature", "3", "4"],
        ),
        (Label("", "smollm2"), ["--model", "smollm2", "--n-features", "100"]),
    ],
)  # fmt: skip
def test_the_same_as_a_command_and_in_python(hostile_run, kind, flags):
    (sae,) = find_saes(hostile_run)
    assert shlex.split(command(kind, sae)) == ["saelab", kind.name, str(sae.sae_dir), *flags]
    known = inspect.signature(feature_commands.FEATURES[kind.name][0]).parameters
    assert all(flag[2:].replace("-", "_") in known for flag in flags if flag.startswith("--"))
    compile(kind.python(sae), "python", "exec")
    assert str(hostile_run) in kind.python(sae)
    assert from_arguments(kind.name, json.loads(json.dumps(vars(kind)))) == kind


def test_a_job_of_an_sae_that_is_gone(run):
    job = _recorded(run, sae="sae-x")
    with pytest.raises(SaelabError, match="sae-x is no longer in"):
        sae_of(run, job)
    assert job.state in ACTIVE
