"""Strikes a process, or the disk, while a phase is open, and knows whether it did."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import phases

from corpus.processes import started_ticks

EFFECT_S = 5.0
"""Seconds in which a signal must have had its effect."""


@dataclass(frozen=True)
class Strike:
    """What came of it. `problem` says why it did not land, and is empty where it did."""

    problem: str
    pid: int | None = None

    @property
    def landed(self) -> bool:
        return not self.problem


def await_phase(cell: Path, phase: str, deadline_s: float, over: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """What the process says that opened `phase`; empty where none has within `deadline_s`, or before it was `over`."""
    give_up = time.monotonic() + deadline_s
    while not (cell / "opened.json").exists():
        if time.monotonic() > give_up or over():
            return {}
        time.sleep(0.01)
    opened = phases.opened(cell)
    return opened if opened["phase"] == phase else {}


def strike_process(cell: Path, role: str, phase: str, number: signal.Signals, pid: int | None = None) -> Strike:
    """Sends a signal to the process of `role` while `phase` is open: to the one that holds it open, where it is of that
    role, else to the first one of the role, or to `pid`."""
    opened = phases.opened(cell)
    if opened["phase"] != phase:
        return Strike(f"the phase that was open is {opened['phase']}, not {phase}")
    players = {each["pid"]: each["ticks"] for each in phases.registered(cell).get(role, [])}
    if pid is None:
        pid = opened["pid"] if opened["pid"] in players else next(iter(players), None)
    if pid not in players:
        return Strike(f"no process that lives plays {role}" if pid is None else f"process {pid} does not play {role}")
    os.kill(pid, number)
    problem = "" if had_effect(pid, players[pid], number) else f"process {pid} goes on after {number.name}"
    return _release(cell, Strike(problem, pid))


def fill_disk(cell: Path, directory: Path) -> Strike:
    """Fills the file system of `directory` while a phase is open, with a file `filler` there."""
    with open(directory / "filler", "wb", buffering=0) as stream:
        try:
            for size in (1 << 16, 1):
                while True:
                    try:
                        stream.write(b"x" * size)
                    except OSError:
                        if size == 1:
                            raise
                        break
        except OSError:
            pass
    free = os.statvfs(directory).f_bavail
    return _release(cell, Strike("" if free == 0 else f"{free} blocks are still free"))


def _release(cell: Path, strike: Strike) -> Strike:
    """Lets the phase go on; whether it was open until now decides whether the strike landed."""
    if phases.closed(cell, phases.opened(cell).get("number")).exists() and not strike.problem:
        strike = Strike("the phase was over before the strike was", strike.pid)
    (cell / "struck").touch()
    return strike


def had_effect(pid: int, ticks: str, number: signal.Signals) -> bool:
    """Whether within EFFECT_S the process, which began at `ticks`, has ended or stopped by signal `number`."""
    give_up = time.monotonic() + EFFECT_S
    while time.monotonic() < give_up:
        present = started_ticks(pid)
        if number == signal.SIGKILL and present != ticks:
            return True
        if number == signal.SIGSTOP and present == ticks and phases.is_stopped(pid):
            return True
        time.sleep(0.005)
    return False
