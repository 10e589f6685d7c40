"""Who is silent, who is stuck, and who only seems so; and the end of a process that is stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest

from corpus.processes import started_ticks
from learners.desk import Beat, Process
from learners.liveness import LOOK_COUNTS_S, Liveness, kill_here


def looks(liveness: Liveness, beats: list[Beat], every_s: float = 1.0, incarnation: int = 1) -> list[dict[int, str]]:
    return [liveness.look(number * every_s, incarnation, {0: beat}) for number, beat in enumerate(beats)]


def test_a_rank_that_beats_no_more_is_given_up_after_its_silence_and_not_before():
    found = looks(Liveness(silence_s=10, stall_s=1000), [Beat(1, 1)] * 12)
    assert found[:11] == [{}] * 11
    assert found[11] == {0: "gave no sign of life for 10 s (learners.silence_s) and was killed"}


def test_a_long_step_is_no_silence_but_in_the_end_a_stall():
    beats = [Beat(number, 1) for number in range(103)]
    found = looks(Liveness(silence_s=10, stall_s=100), beats)
    assert found[:101] == [{}] * 101
    assert "made no progress for 100 s (learners.stall_s)" in found[102][0]


def test_a_rank_that_beats_and_moves_now_and_then_is_never_given_up():
    beats = [Beat(number // 9, number // 90) for number in range(1000)]
    assert not any(looks(Liveness(silence_s=10, stall_s=100), beats))


def test_an_observer_that_was_stopped_itself_takes_nobody_for_dead():
    liveness = Liveness(silence_s=10, stall_s=100)
    assert liveness.look(0.0, 1, {0: Beat(1, 1)}) == {}
    assert liveness.look(5000.0, 1, {0: Beat(1, 1)}) == {}, f"it counts {LOOK_COUNTS_S:g} s of a look at most"
    assert liveness.look(5005.0, 1, {0: Beat(1, 1)}) == {}
    assert liveness.look(5010.0, 1, {0: Beat(1, 1)}), "negative control: these 15 s count"


def test_the_clock_of_a_new_incarnation_begins_anew_and_each_rank_has_its_own():
    liveness = Liveness(silence_s=3, stall_s=100)
    looks(liveness, [Beat()] * 4)
    assert liveness.look(4.0, 2, {0: Beat()}) == {}
    assert [liveness.look(second, 2, {0: Beat(int(second)), 1: Beat()}) for second in (5.0, 6.0, 7.0)] == [{}] * 3
    assert list(liveness.look(9.0, 2, {0: Beat(9), 1: Beat()})) == [1]


def sleeper() -> tuple[subprocess.Popen[bytes], Process]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ticks = started_ticks(child.pid)
    assert ticks is not None
    return child, Process("here", child.pid, ticks)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_process_is_killed_stopped_or_not(stopped):
    child, process = sleeper()
    if stopped:
        os.kill(child.pid, signal.SIGSTOP)
    assert kill_here(process)
    assert child.wait(10) == -signal.SIGKILL
    assert not kill_here(process), "it is no more"


def test_a_later_process_of_the_same_number_is_spared():
    child, process = sleeper()
    try:
        assert not kill_here(Process("here", child.pid, str(int(process.started_ticks) - 1)))
        time.sleep(0.1)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
