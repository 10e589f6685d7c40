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
    before = signal.getsignal(signal.SIGTERM)
    with listening():
        stop_if_requested("nowhere")
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.wait(5)
        assert requested()
        with pytest.raises(Interrupted, match=r"^ppo, update 3$"):
            stop_if_requested("ppo, update 3")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not requested()
    assert signal.getsignal(signal.SIGTERM) == before


def test_whoever_took_the_signals_away_can_give_them_back():
    with listening():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interruption.listen()
        signal.raise_signal(signal.SIGTERM)
        assert requested()


def test_signals_can_only_be_heard_in_the_main_thread():
    errors: list[BaseException] = []

    def other() -> None:
        try:
            interruption.listen()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1
