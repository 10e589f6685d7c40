"""Whether the ranks of a learner group live: clocks over their signs of life, and the end of a process that is silent.

A rank's sign of life comes from a thread of its own, so that a long step is not taken for silence: it stops where the
process is stopped, frozen or dead. Whether its job moves is another clock, and a far more patient one.
"""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corpus.problems import RunProblem
from corpus.processes import started_ticks
from learners.desk import Beat, Process

LOOK_COUNTS_S = 5.0
"""Most seconds of silence that one look counts: where the observer itself was stopped or late, the ranks were not."""


@dataclass
class _Clock:
    beat: Beat
    silent_s: float = 0.0
    stalled_s: float = 0.0


class Liveness:
    """Clocks of all ranks. Pure: it is told the time and the beats, and says who is to be given up."""

    def __init__(self, silence_s: float, stall_s: float) -> None:
        self._silence_s, self._stall_s = silence_s, stall_s
        self._clocks: dict[tuple[int, int], _Clock] = {}
        self._looked: float | None = None

    def look(self, now: float, incarnation: int, beats: Mapping[int, Beat]) -> dict[int, str]:
        """The ranks that are given up now, and why ("said nothing for 60 s"). `now` in seconds of a monotonic clock."""
        passed = 0.0 if self._looked is None else min(now - self._looked, LOOK_COUNTS_S)
        self._looked = now
        before, self._clocks = self._clocks, {}
        given_up: dict[int, str] = {}
        for rank, beat in beats.items():
            clock = before.get((incarnation, rank)) or _Clock(beat)
            self._clocks[incarnation, rank] = clock
            clock.silent_s = 0.0 if beat.count != clock.beat.count else clock.silent_s + passed
            clock.stalled_s = 0.0 if beat.moves != clock.beat.moves else clock.stalled_s + passed
            clock.beat = beat
            if clock.silent_s > self._silence_s:
                given_up[rank] = f"gave no sign of life for {self._silence_s:g} s (learners.silence_s) and was killed"
            elif clock.stalled_s > self._stall_s:
                given_up[rank] = f"made no progress for {self._stall_s:g} s (learners.stall_s) and was killed"
        return given_up


def kill_here(process: Process) -> bool:
    """Kills the process on this machine, stopped or not; False where it is no more. Waits for its end, up to 10 s.

    Raises RunProblem where it does not end.
    """
    if started_ticks(process.pid) != process.started_ticks:
        return False
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    deadline = time.monotonic() + 10.0
    while started_ticks(process.pid) == process.started_ticks:
        if time.monotonic() > deadline:
            raise RunProblem(
                f"Process {process.pid} of a silent learner did not end within 10 s of SIGKILL.", "learners/lost"
            )
        time.sleep(0.01)
    return True


def kill_on_its_node(process: Process) -> Any:
    """Begins to kill the process where it runs, by a Ray task; returns what `ray.get` waits for."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(kill_here)
    there = NodeAffinitySchedulingStrategy(node_id=process.node, soft=False)
    return task.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(process)
