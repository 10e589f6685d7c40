"""Ctrl-C and SIGTERM, with real processes and real signals."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from amenable import interruption
from amenable.interruption import Interrupted, listening, requested, stop_if_requested

# The command with a pipeline that works on, and stops where it may, as the real one does.
PROGRAM = """
import sys, time, types
from pydantic import BaseModel
from amenable import interruption

def run_pipeline(recipe, *, until, progress, address, variables):
    progress.plan(["ppo"])
    progress.stage("ppo")
    for update in range(1, 2000):
        progress.update(update, 2000, "updates")
        if update == 1: progress.note("working")
        time.sleep(0.02)
        if recipe.seed == 1: interruption.stop_if_requested(f"ppo, update {update} of 2,000")

pipeline = types.ModuleType("amenable.pipeline")
pipeline.run_pipeline = run_pipeline

class Recipe(BaseModel):
    name: str
    seed: int = 0

recipe = types.ModuleType("amenable.recipe")
recipe.Recipe = Recipe
sys.modules["amenable.recipe"] = recipe
sys.modules["amenable.pipeline"] = pipeline
from amenable.cli import main
main()
"""


@pytest.fixture
def start(tmp_path: Path):
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "small.yaml").write_text("name: small\n")

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "run", "small.yaml", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        started.append(process)
        stream = process.stderr if "--json" in arguments else process.stdout
        assert stream is not None
        assert "started" in stream.readline()
        assert stream.readline() == "working\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_the_first_signal_stops_at_a_checkpoint_and_says_how_to_go_on(start):
    process = start("seed=1")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    lines = stderr.strip().splitlines()
    assert lines[0] == "Stopping after a checkpoint; once more to stop at once."
    assert lines[1].startswith("Interrupted at ppo, update ")
    assert lines[1].endswith(" of 2,000; the same command continues.")
    assert len(lines) == 2


def test_the_second_signal_stops_at_once(start):
    process = start("seed=0")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline().startswith("Stopping after a checkpoint")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.startswith("Stopped at once at ppo, ")
    assert stderr.endswith(" of 2,000 updates; the same command continues from what was last saved.\n")


def test_an_interruption_is_an_answer_in_json_too(start):
    process = start("seed=1", "--json")
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert '"kind": "interrupted"' in stdout
    assert stdout.startswith("{")


def test_the_flag_and_the_handlers_last_as_long_as_one_listens():
    before = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with listening():
        stop_if_requested("nowhere")
        signal.raise_signal(signal.SIGINT)
        assert interruption.wait(5)
        assert requested()
        with pytest.raises(Interrupted, match=r"^ppo, update 3$"):
            stop_if_requested("ppo, update 3")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not requested()
    assert (signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before
    assert "sigterm" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.timeout(30)
def test_ctrl_c_is_heard_also_where_it_interrupts_a_wait_for_the_flag():
    with listening():
        with interruption._requested._cond:  # as `wait` holds it when it begins and ends
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert interruption.wait(5)


# In a process of its own: this one has threads that are older.
TAKEN = """
import os, signal, threading, time
from amenable import interruption

interruption.TWICE_S = 0.02
with interruption.listening():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    other = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGTERM))
    other.start()
    other.join()
    assert interruption.wait(10), "not heard"
    time.sleep(1)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except KeyboardInterrupt:
        print("at once")
"""

# Twice at once, as `timeout` sends it, to a process whose parent has blocked SIGINT and whose reader has left.
TWICE = """
import os, signal, time
from amenable import interruption

interruption.TWICE_S = 1.0
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(writer)
os.close(reader)
with interruption.listening():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            pass
    time.sleep(2 * interruption.TWICE_S)
    assert interruption.requested()
    print("once")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except KeyboardInterrupt:
        print("at once")
"""


def test_a_signal_that_comes_twice_is_one_and_is_heard_where_nobody_reads_and_sigint_was_blocked():
    ended = subprocess.run(
        [sys.executable, "-c", TWICE],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout.split("\n")) == (0, ["once", "at once", ""])


# What each command that listens has for threads when it begins to. OpenBLAS begins one for each core that it sees.
OLDER = """
import os, sys
from amenable import interruption

def listening(*says):
    sealed = [
        int(line.split()[1], 16) >> 14 & 1
        for task in os.listdir("/proc/self/task")
        for line in open(f"/proc/self/task/{task}/status")
        if line.startswith("SigBlk")
    ]
    print("open threads:", sealed.count(0))
    os._exit(0)

interruption.listening = listening
from amenable.cli import main
main()
"""


@pytest.mark.parametrize("words", [["run", "demo"], ["eval", "demo"], ["doctor"], ["serve", "runs/demo"]])
def test_no_thread_is_older_that_could_be_given_the_signal(words, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(
        [sys.executable, "-c", OLDER, *words],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.getcwd(), "OPENBLAS_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout == "open threads: 1\n", ended.stderr[-2000:]


def test_it_is_heard_twice_whatever_handler_another_has_put():
    ended = subprocess.run(
        [sys.executable, "-c", TAKEN],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (0, "at once\n"), ended.stderr


def test_processes_begun_meanwhile_are_ended_by_it():
    with listening():
        # As Ray begins its daemons.
        show = ["grep", "SigBlk", "/proc/self/status"]
        shown = subprocess.run(show, preexec_fn=lambda: None, stdout=subprocess.PIPE, text=True, timeout=30)
    assert not int(shown.stdout.split()[1], 16) >> (signal.SIGTERM - 1) & 1


def test_signals_can_only_be_heard_in_the_main_thread():
    errors: list[BaseException] = []

    def other() -> None:
        try:
            with listening():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1


# A signal when Ray has put its handler in Python, and one when it has put that in C++: a command was ended by either.
STARTING = """
import os, signal, time
from amenable import interruption

interruption.TWICE_S = 0.02

def struck():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.wait(10), "not heard"
    interruption._requested.clear()

with interruption.listening():
    import psutil
    from ray._private import worker
    from cluster.session import session

    connect = worker.connect
    def connected(*given, **named):
        struck()
        found = connect(*given, **named)
        struck()
        return found
    worker.connect = connected

    with session(None, cpus=1, object_store_mib=80):
        print("there")
        struck()
        daemons = [each for each in psutil.Process().children() if each.name() in ("raylet", "gcs_server")]
        assert len(daemons) == 2, daemons
        for each in daemons:
            status = open(f"/proc/{each.pid}/status").read()
            blocked = int(status.split("SigBlk:")[1].split()[0], 16)
            assert not blocked >> (signal.SIGTERM - 1) & 1, each
        print("theirs")
"""


@pytest.mark.slow
def test_a_signal_that_comes_while_ray_starts_is_heard():
    ended = subprocess.run(
        [sys.executable, "-c", STARTING],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.split() == ["there", "theirs"]
    assert ended.stderr.count(interruption.STOPPING) == 3
