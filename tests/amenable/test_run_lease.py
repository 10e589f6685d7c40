"""One run, one writer: with real processes."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from amenable import run_lease
from amenable.run_lease import LEASE_FILE, LOCK_FILE, RunLease
from corpus.file_lock import file_lock
from corpus.problems import RunProblem, UsageProblem

HOLDER = """
import sys, time
from pathlib import Path
from amenable.run_lease import RunLease
with RunLease(Path(sys.argv[1])) as lease:
    print(lease.epoch, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start_holder(tmp_path: Path):
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def written(directory: Path) -> dict:
    return json.loads((directory / LEASE_FILE).read_text())


def test_a_live_holder_is_named_and_a_killed_one_is_succeeded(tmp_path, start_holder):
    holder = start_holder()
    with pytest.raises(UsageProblem) as caught, RunLease(tmp_path):
        pass
    told = str(caught.value)
    assert f"is in use by process {holder.pid} on {os.uname().nodename} since 20" in told
    assert f"(kill {holder.pid})" in told
    assert "--run" in told
    assert written(tmp_path)["epoch"] == 1

    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunLease(tmp_path) as lease:
        assert lease.epoch == 2
        assert written(tmp_path)["pid"] == os.getpid()


def test_a_killed_holder_that_nobody_has_waited_for_is_dead_too(tmp_path, start_holder):
    holder = start_holder()
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with RunLease(tmp_path) as lease:
        assert lease.epoch == 2


def test_the_lease_is_given_back_at_the_end_even_of_a_failed_run_and_the_epoch_grows(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLease(tmp_path):
        raise ZeroDivisionError
    assert written(tmp_path)["held"] is False
    with RunLease(tmp_path) as lease:
        assert lease.epoch == 2
        lease.check()


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with RunLease(tmp_path), pytest.raises(UsageProblem, match=f"process {os.getpid()}"), RunLease(tmp_path):
        pass


def test_a_lock_around_the_lease_that_nobody_lets_go_of_is_told_with_who_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lease, "LOCK_DEADLINE_S", 0.1)
    told = rf"lock was locked for 0\.1 s by process {os.getpid()} on"
    with file_lock(tmp_path / LOCK_FILE, 1.0):
        with pytest.raises(UsageProblem, match=told) as found:
            RunLease(tmp_path).__enter__()
        assert found.value.code == "storage/locked"
    lease = RunLease(tmp_path)
    lease.__enter__()
    with file_lock(tmp_path / LOCK_FILE, 1.0):
        lease.__exit__(
            ZeroDivisionError, ZeroDivisionError(), None
        )  # what the run ended with is what a person hears of
        with pytest.raises(UsageProblem, match=told):
            lease.__exit__(None, None, None)


def test_a_later_process_with_the_same_number_is_not_the_holder(tmp_path):
    with RunLease(tmp_path):
        pass
    content = written(tmp_path)
    machine = content["process"].rpartition("/")[0]
    (tmp_path / LEASE_FILE).write_text(json.dumps({**content, "held": True, "process": f"{machine}/1"}))
    with RunLease(tmp_path) as lease:
        assert lease.epoch == 2


def test_a_holder_on_another_machine_lives_while_it_shows_life(tmp_path):
    with RunLease(tmp_path):
        pass
    content = {**written(tmp_path), "held": True, "process": "elsewhere/1", "host": "far-away"}
    (tmp_path / LEASE_FILE).write_text(json.dumps(content))
    with pytest.raises(UsageProblem, match=r"on far-away since .*, last seen .* ago; .*try again in 1 min"):
        RunLease(tmp_path).__enter__()
    long_ago = time.time() - run_lease.DEAD_AFTER_S - 5
    os.utime(tmp_path / LEASE_FILE, (long_ago, long_ago))
    with RunLease(tmp_path) as lease:
        assert lease.epoch == 2


def test_a_holder_elsewhere_that_has_just_died_is_succeeded_by_who_has_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lease, "DEAD_AFTER_S", 0.3)
    with RunLease(tmp_path):
        pass
    content = {**written(tmp_path), "held": True, "process": "elsewhere/1", "host": "far-away"}

    def dies_now() -> None:
        (tmp_path / LEASE_FILE).write_text(json.dumps(content))

    def take(patience_s: float, meanwhile) -> int:
        with run_lease.held(lambda: RunLease(tmp_path), patience_s, meanwhile) as lease:
            return lease.epoch

    def sleep(problem: UsageProblem) -> None:
        assert "far-away" in str(problem)
        time.sleep(0.05)

    def lives(problem: UsageProblem) -> None:
        time.sleep(0.05)
        os.utime(tmp_path / LEASE_FILE)

    dies_now()
    with pytest.raises(UsageProblem, match="far-away"):
        take(0.0, sleep)
    assert take(30.0, sleep) == 2
    dies_now()
    with pytest.raises(UsageProblem, match="far-away"):  # a holder that goes on is never succeeded
        take(1.0, lives)
    (tmp_path / LEASE_FILE).write_text("no lease")
    with pytest.raises(UsageProblem, match="cannot be read"):  # nor is anything else waited for
        take(30.0, sleep)


def test_a_holder_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lease, "SIGN_OF_LIFE_EVERY_S", 0.02)
    with RunLease(tmp_path):
        os.utime(tmp_path / LEASE_FILE, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / LEASE_FILE).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_file_system_that_fails_once_does_not_end_the_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lease, "SIGN_OF_LIFE_EVERY_S", 0.02)
    touch, failed = os.utime, threading.Event()

    def fails_once(path, times=None) -> None:
        if times is None and Path(path).name == LEASE_FILE and not failed.is_set():
            failed.set()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        touch(path, times)

    with RunLease(tmp_path):
        monkeypatch.setattr(run_lease.os, "utime", fails_once)
        assert failed.wait(10)
        touch(tmp_path / LEASE_FILE, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / LEASE_FILE).stat().st_mtime < 2:
            assert time.monotonic() < deadline, "the thread ended at its first error"
            time.sleep(0.01)


def test_what_other_processes_check_is_sent_to_them_and_says_the_same(tmp_path):
    with RunLease(tmp_path) as lease:
        sent = pickle.loads(pickle.dumps(lease.run_epoch))
        sent.check()
        content = written(tmp_path)
        (tmp_path / LEASE_FILE).write_text(json.dumps({**content, "epoch": 2, "pid": 4242}))
        with pytest.raises(RunProblem, match="taken over by process 4242"):
            sent.check()
        (tmp_path / LEASE_FILE).write_text("{")
        with pytest.raises(RunProblem, match="no lease of a run any more"):
            sent.check()
        (tmp_path / LEASE_FILE).write_text(json.dumps(content))
        sent.check()


def test_a_holder_that_was_taken_over_is_told_and_does_not_give_back_what_is_not_its_own(tmp_path):
    with RunLease(tmp_path) as lease:
        content = {**written(tmp_path), "epoch": 7, "pid": 4242, "host": "far-away"}
        (tmp_path / LEASE_FILE).write_text(json.dumps(content))
        with pytest.raises(RunProblem, match=r"taken over by process 4242 on far-away .* this older attempt stops"):
            lease.check()
    assert written(tmp_path) == content


def test_a_lease_that_someone_removed_is_missed(tmp_path):
    with RunLease(tmp_path) as lease:
        (tmp_path / LEASE_FILE).unlink()
        with pytest.raises(RunProblem, match="is gone"):
            lease.check()


@pytest.mark.parametrize("content", ["", "[]", '{"host": "x"}'])
def test_a_lease_that_cannot_be_read_is_not_overwritten(tmp_path, content):
    (tmp_path / LEASE_FILE).write_text(content)
    with pytest.raises(UsageProblem, match="cannot be read; remove it if no run writes there"):
        RunLease(tmp_path).__enter__()
    assert (tmp_path / LEASE_FILE).read_text() == content


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    code = """
import sys, time
from pathlib import Path
from amenable.run_lease import RunLease
from corpus.problems import UsageProblem
run, number = Path(sys.argv[1]), sys.argv[2]
(run / f"ready-{number}").touch()
while len(list(run.glob("ready-*"))) < 3: time.sleep(0.001)
try:
    with RunLease(run):
        deadline = time.monotonic() + 30
        while len(list(run.glob("lost-*"))) < 2 and time.monotonic() < deadline: time.sleep(0.001)
except UsageProblem:
    (run / f"lost-{number}").touch()
    sys.exit(2)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert sorted(process.wait(timeout=60) for process in processes) == [0, 2, 2]


AS_NOBODY = """
import encodings.ascii, os, sys
from pathlib import Path
from amenable.run_lease import RunLease
from corpus.problems import UsageProblem
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    with RunLease(Path(sys.argv[1])):
        print("held")
except UsageProblem as problem:
    print(problem)
"""


def as_nobody(directory: Path) -> str:
    """What an ordinary person, who does not own `directory`, is told. The program is read from where it is."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(directory)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


@pytest.fixture
def outside():
    """A directory that everybody may reach; pytest's own are the owner's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_directory_that_may_not_be_written_to_is_one_sentence(outside):
    run = outside / "run"
    run.mkdir()
    run.chmod(0o777)
    assert as_nobody(run) == "held", "negative control: this one may be written to"
    (run / LEASE_FILE).unlink()
    (run / run_lease.LOCK_FILE).unlink()
    run.chmod(0o555)
    told = f"{run} cannot be written to (Permission denied); give the run another directory with --run."
    assert as_nobody(run) == told


def test_a_lease_that_may_not_be_read_is_one_sentence(outside):
    run = outside / "run"
    run.mkdir()
    run.chmod(0o777)
    with RunLease(run):
        pass
    (run / run_lease.LOCK_FILE).chmod(0o666)
    (run / LEASE_FILE).chmod(0o000)
    if os.getuid() == 0:
        assert as_nobody(run).startswith(f"{run / LEASE_FILE} cannot be read (Permission denied); give the run another")
