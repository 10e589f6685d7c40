"""Live progress: rates, time left, and no silence."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from amenable import interruption
from amenable.durations import spoken
from amenable.progress import LINE_EVERY_S, Progress
from amenable.stage_progress import StageProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (65, "1 min 5 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_said_as_a_person_says_them(seconds, said):
    assert spoken(seconds) == said


def test_rate_and_time_left_follow_the_updates_not_the_start_up():
    stage = StageProgress("sft", started=0)
    stage.update(100, 0, 400, "steps", {})
    assert stage.rate() is None
    assert stage.seconds_left(100) is None
    stage.update(110, 100, 400, "steps", {})
    assert stage.rate() == 10
    assert stage.seconds_left(110) == 30
    assert stage.seconds_left(115) == 25
    assert stage.seconds_left(1000) == 0


def test_the_rate_is_that_of_the_last_minute():
    stage = StageProgress("sft", started=0)
    for second in range(200):
        stage.update(second, second, 1000, "steps", {})
    for second in range(200, 300):
        stage.update(second, 200 + 3 * (second - 200), 1000, "steps", {})
    assert stage.rate() == pytest.approx(3, rel=0.02)


def test_a_return_to_a_checkpoint_starts_a_new_rate():
    stage = StageProgress("ppo", started=0)
    stage.update(1, 10, 48, "updates", {})
    stage.update(2, 20, 48, "updates", {})
    stage.update(3, 15, 48, "updates", {})
    assert stage.rate() is None
    stage.update(4, 16, 48, "updates", {})
    assert stage.rate() == 1


def test_a_line_holds_amount_rate_time_left_and_figures():
    stage = StageProgress("sft", started=0)
    stage.update(0, 0, 1400, "steps", {})
    stage.update(26, 320, 1400, "steps", {"loss": 2.31347, "lr": 1e-3, "tokens": 12345, "best": "epoch 2"})
    assert stage.line(26) == (
        "320 of 1,400 steps, 12.3 steps/s, 1 min 28 s left (loss 2.313, lr 0.001, tokens 12,345, best epoch 2)"
    )
    assert stage.line(56).endswith("58 s left (loss 2.313, lr 0.001, tokens 12,345, best epoch 2); no news for 30 s")


def test_slow_work_is_counted_by_the_minute():
    stage = StageProgress("ppo", started=0)
    stage.update(0, 1, None, "updates", {})
    stage.update(30, 2, None, "updates", {})
    assert stage.pace(30) == "2 updates/min"


def lines_of(progress_lines: io.StringIO) -> list[str]:
    return progress_lines.getvalue().splitlines()


def plain(clock=time.monotonic, **options) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(["base", "sft", "ppo"], console=Console(file=stream), clock=clock, **options), stream


def test_without_a_terminal_a_run_tells_its_stages_in_plain_unwrapped_lines(clock):
    progress, stream = plain(clock)
    with progress as p:
        p.reuse_stage("base", "loss 2.1")
        p.stage("sft")
        p.update(1, 10, "steps", {"loss": 3.0})
        p.note("x" * 300)
        clock.now += 72
        assert p.finish_stage({"validation loss": 1.434}) == 72
        p.stage("ppo")
        p.finish_stage()
    assert lines_of(stream) == [
        "[1 of 3] base: done before, and nothing it reads has changed (loss 2.1)",
        "[2 of 3] sft: started",
        "x" * 300,
        "[2 of 3] sft: done in 1 min 12 s (validation loss 1.434)",
        "[3 of 3] ppo: started",
        "[3 of 3] ppo: done in 0.0 s",
    ]


def wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.005)


def test_a_run_that_only_waits_is_not_silent():
    progress, stream = plain(line_every_s=0.02)
    with progress as p:
        wait_for(stream, "still working (")
        with p.waiting("Ray to start"):
            wait_for(stream, "still waiting for Ray to start (0.")
        p.stage("sft")
        wait_for(stream, "[2 of 3] sft: still working (")
        with p.waiting("the generator to start"):
            wait_for(stream, "[2 of 3] sft: still waiting for the generator to start (")
        p.update(3, 10)
        wait_for(stream, "[2 of 3] sft: 3 of 10 steps")
        with p.waiting("the weights"):
            wait_for(stream, "[2 of 3] sft: 3 of 10 steps; still waiting for the weights (")


def test_lines_are_few_however_many_the_updates():
    progress, stream = plain(line_every_s=0.2)
    with progress as p:
        p.stage("sft")
        begun = time.monotonic()
        for step in range(3000):
            p.update(step, 3000)
        seconds = time.monotonic() - begun
    assert len(lines_of(stream)) <= 2 + seconds / 0.2


def test_silence_is_never_longer_than_ten_seconds():
    assert LINE_EVERY_S <= 10


def test_the_ticker_ends_with_the_run():
    progress, stream = plain(line_every_s=0.01)
    with progress:
        wait_for(stream, "still working")
    before = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == before
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_the_place_is_told_for_the_sentence_of_an_interruption():
    progress, _ = plain()
    with progress as p:
        assert p.where() == "the beginning"
        with p.waiting("Ray to start"):
            assert p.where() == "waiting for Ray to start"
        p.stage("ppo")
        assert p.where() == "ppo"
        p.update(17, 48, "updates")
        assert p.where() == "ppo, 17 of 48 updates"


def test_mistakes_of_the_pipeline_are_refused():
    progress, _ = plain()
    with progress as p:
        with pytest.raises(ValueError, match="'rm' is not among the planned"):
            p.stage("rm")
        with pytest.raises(ValueError, match="'rm' is not among the planned"):
            p.reuse_stage("rm")
        with pytest.raises(RuntimeError, match="outside a stage"):
            p.update(1)
        with pytest.raises(RuntimeError, match="no stage is under way"):
            p.finish_stage()
        p.plan(["rm"])
        p.stage("rm")


def test_a_terminal_gets_a_live_picture_with_bar_rate_and_time_left():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None, legacy_windows=False, _environ={})
    with Progress(["sft", "ppo"], console=console) as p:
        p.stage("sft")
        with p.waiting("the learner to start"):
            wait_for(stream, "[1 of 2] sft: still waiting for the learner to start")
        p.update(0, 100, "steps")
        time.sleep(0.05)
        p.update(50, 100, "steps", {"loss": 1.5})
        wait_for(stream, "50 of 100 steps")
        wait_for(stream, "loss 1.5")
        assert "━" in stream.getvalue()
        assert "steps/s" in stream.getvalue()
        for number in range(200):
            p.note(f"note {number} [not markup]")
        p.finish_stage("loss 1.5")
    assert "note 199 [not markup]" in stream.getvalue()
    assert "[1 of 2] sft: done in" in stream.getvalue()


def test_the_live_picture_goes_on_saying_that_the_run_will_stop():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, _environ={})
    with interruption.listening(), Progress(["sft"], console=console) as p:
        p.stage("sft")
        p.update(1, 100)
        wait_for(stream, "1 of 100 steps")
        assert interruption.STOPPING not in stream.getvalue()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(stream, interruption.STOPPING)


def test_notes_and_drawing_do_not_wait_for_each_other_for_ever():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
    progress = Progress(["sft"], console=console)

    def work() -> None:
        with progress as p:
            p.stage("sft")
            for step in range(100):
                p.update(step, 100)
                p.note("x")
                progress._live.refresh()

    def draw() -> None:
        while worker.is_alive():
            progress._live.refresh()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    drawer = threading.Thread(target=draw, daemon=True)
    drawer.start()
    worker.join(timeout=60)
    assert not worker.is_alive()
    drawer.join(timeout=60)


def test_in_json_mode_standard_output_stays_empty():
    code = """
from amenable.progress import Progress
with Progress(["sft"], json=True) as p:
    p.stage("sft"); p.note("hello"); p.finish_stage()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr.splitlines()[0] == "[1 of 1] sft: started"


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    code = f"""
import time
from pathlib import Path
from amenable.progress import Progress
with Progress(["sft"]) as p:
    p.stage("sft")
    while not Path({str(tmp_path)!r}, "closed").exists(): time.sleep(0.005)
    for _ in range(3): p.note("anyone?")
    p.finish_stage()
Path({str(tmp_path)!r}, "finished").touch()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"[1 of 1] sft")
    process.stdout.close()
    (tmp_path / "closed").touch()
    process.wait(timeout=60)
    assert (tmp_path / "finished").exists()
