"""Phases of a run that a process enters visibly, and stays in until it, or another, has been struck.

Every process of a cell finds the cell's directory in the environment. `plan.json` there says which phase is wanted, and
who is to hold it open; `opened.json` is written by the process that entered it, `closed-NUMBER`, with the number of its
plan, when it went on; `struck` by whoever struck. Without a plan nothing lingers. `brake` says with which update the
learner waits; `engine` says which engine the generators have.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from corpus.processes import started_ticks

VARIABLE = "AMENABLE_CHAOS_CELL"
"""Environment variable: the cell's directory. It also marks the processes that belong to the cell."""

HOLD_S = 10.0
"""Seconds that a phase is held open for whoever is to strike."""

BRAKE_S = 90.0
"""Seconds that an update is put off at most."""

FROM_UPDATE = 2
"""Updates that are trained before a phase is held: there is a checkpoint to go back to by then."""


def cell_directory() -> Path:
    """The directory of the cell that this process belongs to."""
    return Path(os.environ[VARIABLE])


def engine() -> str:
    """Which engine the generators of the cell have: "torch" or "vLLM"."""
    said = cell_directory() / "engine"
    return said.read_text() if said.exists() else "torch"


def write_new(path: Path, content: dict[str, Any]) -> bool:
    """Writes a JSON file that appears whole; returns False where somebody else has made it already."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    partial.write_text(json.dumps(content))
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def register(role: str, pid: int | None = None) -> None:
    """Tells that this process, or the process `pid`, plays `role`."""
    pid = os.getpid() if pid is None else pid
    content = {"role": role, "pid": pid, "ticks": started_ticks(pid), "at": time.time()}
    write_new(cell_directory() / "processes" / f"{time.time_ns()}-{pid}.json", content)


def registered(cell: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """By role: its processes that live, in the order in which they began."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(((cell or cell_directory()) / "processes").glob("*.json")):
        each = json.loads(path.read_text())
        if each["ticks"] is not None and started_ticks(each["pid"]) == each["ticks"]:
            found.setdefault(each["role"], []).append(each)
    return found


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def _await_player(role: str) -> None:
    """Until a process that plays `role`, who is to be struck, is there; for as long as the phase would be held open."""
    give_up = time.monotonic() + HOLD_S
    while role not in registered() and time.monotonic() < give_up:
        time.sleep(0.05)


def brake(update: int) -> None:
    """Where `brake` says so, waits with this update until it says another number, or is gone."""
    brake = cell_directory() / "brake"
    give_up = time.monotonic() + BRAKE_S
    while time.monotonic() < give_up:
        try:
            if update < int(brake.read_text()):
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)


def linger(role: str, phase: str, update: int) -> None:
    """Where the plan wants `role` to hold `phase` open, says that it is and waits until somebody has struck, or
    HOLD_S. Does so once a plan, and not before update FROM_UPDATE."""
    cell = cell_directory()
    wanted = _plan(cell)
    if update < FROM_UPDATE or (wanted.get("holder"), wanted.get("phase")) != (role, phase):
        return
    _await_player(wanted["target"])
    if _plan(cell) != wanted:  # whoever is to be struck was struck just now, and had to be made anew
        return
    mine = {"role": role, "phase": phase, "pid": os.getpid(), "at": time.time(), "number": wanted.get("number")}
    if not write_new(cell / "opened.json", mine):
        return
    give_up = time.monotonic() + HOLD_S
    while not (cell / "struck").exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    if opened(cell).get("number") == mine["number"]:
        closed(cell, mine["number"]).touch()


def closed(cell: Path, number: int | None) -> Path:
    """The file that says that the phase of plan `number` is over: one that had read an earlier plan and comes late says
    nothing of a later one."""
    return cell / f"closed-{number}"


def _plan(cell: Path) -> dict[str, Any]:
    try:
        return json.loads((cell / "plan.json").read_text())
    except FileNotFoundError:
        return {}


def opened(cell: Path) -> dict[str, Any]:
    """What the process has said that opened a phase; empty where none has."""
    try:
        return json.loads((cell / "opened.json").read_text())
    except FileNotFoundError:
        return {}
