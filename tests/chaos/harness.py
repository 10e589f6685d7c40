"""Runs one cell: the command, the strike, the command again where it stopped, and the audit of what it left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import phases
from cells import Cell
from striking import Strike, await_phase, fill_disk, strike_process
from toy_recipe import BATCH_SIZE, UPDATES

from actors.attempts import read_attempts
from corpus.problems import CODE
from evaluation.audit import audit_run
from learners.checkpoint_place import CheckpointPlace

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMAND_DEADLINE_S = 400.0
"""Seconds for one command: to the end of the run, or to its stop."""
DISK_BYTES = 24 << 20
END_S = 90.0
"""Seconds for all processes of a command that has ended to end too. Where Ray's own control service was killed with
it, Ray's agents try to reach that for one minute before they give up."""

A_SENTENCE = re.compile(rf"\. \[{CODE}\]$")
"""How a command that stopped by itself ends: a full stop, and the code of its problem."""


@dataclass
class Outcome:
    """What came of a cell. `problems` are sentences; a cell without any is passed."""

    cell: Cell
    landed: bool = False
    ended: str = "not at all"
    seconds: float = 0.0
    audit: str = "not made"
    said: str = ""
    """The sentence with which the command stopped."""
    problems: list[str] = field(default_factory=list)

    @property
    def row(self) -> dict[str, str]:
        """For the table."""
        cell = {"role": self.cell.role, "phase": self.cell.phase, "how": self.cell.what}
        result = "passed" if not self.problems else "FAILED"
        landed = "yes" if self.landed else "no"
        return {
            **cell,
            "landed": landed,
            "ended": self.ended,
            "seconds": f"{self.seconds:.0f}",
            "audit": self.audit,
        } | {"result": result}


class Command:
    """The driver of a cell, and all processes that come of it."""

    def __init__(self, cell: Path, run: Path, *options: str) -> None:
        self._log = cell / f"command-{time.monotonic_ns()}.log"
        path = os.pathsep.join([str(HERE), str(ROOT)])
        given = {phases.VARIABLE: str(cell), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "drive.py"), str(run), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cell,
                env={**os.environ, **given},
                start_new_session=True,
            )

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the driver alone."""
        self._process.send_signal(number)

    def wait(self) -> int | None:
        """Its exit code; None where it has not ended in time."""
        try:
            return self._process.wait(COMMAND_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return None

    @property
    def said(self) -> str:
        """All that it printed."""
        return self._log.read_text(errors="replace").strip()

    @property
    def sentence(self) -> str:
        """The last line that it printed."""
        return self.said.rpartition("\n")[2]


def run_cell(cell: Cell, template: Path, directory: Path) -> Outcome:
    """Plays a cell in `directory`, which is its own. `template` is a run that has all that PPO reads."""
    run, outcome = directory / "run", Outcome(cell)
    (directory / "processes").mkdir(parents=True)
    shutil.copytree(template, run)
    plan = {"holder": cell.holder, "phase": cell.phase, "target": cell.target}
    (directory / "plan.json").write_text(json.dumps(plan))
    (directory / "engine").write_text(cell.engine)
    options = ("--nodes",) if cell.role == "node" else ()
    began = time.monotonic()
    try:
        with _small_disk(run) if cell.how == "full disk" else _nothing():
            command = Command(directory, run, *options)
            opened = await_phase(directory, cell.phase, COMMAND_DEADLINE_S, command.is_over)
            strike = _strike(cell, directory, run) if opened else Strike("the phase was never open")
            outcome.landed = strike.landed
            if not strike.landed:
                outcome.problems.append(f"The strike did not land: {strike.problem}.")
            _end(cell, outcome, command, directory, run, options)
            audit(outcome, run, UPDATES * BATCH_SIZE)
    finally:
        outcome.seconds = time.monotonic() - began
        left = end_processes(directory)
        if left:
            outcome.problems.append(f"{END_S:.0f} s after the cell's commands ended, still there: {', '.join(left)}.")
    return outcome


def _strike(cell: Cell, directory: Path, run: Path) -> Strike:
    if cell.how == "full disk":
        return fill_disk(directory, run / "round-01" / "ppo")
    # Where a checkpoint is to be damaged, the command is ended first, between two updates.
    number = signal.SIGSTOP if cell.how == "SIGSTOP" else signal.SIGKILL
    return strike_process(directory, cell.target, cell.phase, number)


def _end(cell: Cell, outcome: Outcome, command: Command, directory: Path, run: Path, options: tuple[str, ...]) -> None:
    """Waits for the command's end, and gives it again where it stopped."""
    code = command.wait()
    if code is None:
        outcome.problems.append(f"The command did not end within {COMMAND_DEADLINE_S:.0f} s of the strike.")
        return
    if code == 0:
        outcome.ended = "finished"
        return
    outcome.said = command.sentence
    (directory / "plan.json").unlink()
    if cell.role in ("driver", "checkpoint"):
        outcome.ended = "killed"
        if code != -signal.SIGKILL:
            outcome.problems.append(f"The command was to be killed, and ended with {code}: {outcome.said}")
    else:
        outcome.ended = "stopped"
        if cell.survives:
            outcome.problems.append(f"The command was to survive this, and ended with {code}: {outcome.said}")
        if code != 1 or "Traceback" in command.said or not A_SENTENCE.search(outcome.said):
            outcome.problems.append(f"The command ended with {code} and no sentence: {command.said[-2000:]}")
    newest = damage(cell, run / "round-01" / "ppo" / "checkpoints") if cell.role == "checkpoint" else None
    if cell.how == "full disk":
        (run / "round-01" / "ppo" / "filler").unlink()
    again = Command(directory, run, *options)
    code = again.wait()
    if code != 0:
        outcome.problems.append(f"The same command again ended with {code}: {again.said[-2000:]}")
        return
    outcome.ended += ", resumed, finished"
    if newest is not None:
        start = read_attempts(run / "round-01" / "ppo")[-1].start
        if start != newest - 1:
            outcome.problems.append(f"Checkpoint {newest} was damaged, and the run went on from {start}.")


def damage(cell: Cell, checkpoints: Path) -> int:
    """Damages the largest file of the newest checkpoint, of which another must be older; returns its step."""
    names = CheckpointPlace(checkpoints).complete()
    assert len(names) > 1, f"there is nothing older to go back to than {names}"
    shard = max((checkpoints / names[-1]).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with open(shard, "r+b") as stream:
        middle = shard.stat().st_size // 2
        if cell.how == "truncated shard":
            stream.truncate(middle)
        else:
            stream.seek(middle)
            byte = stream.read(1)
            stream.seek(middle)
            stream.write(bytes([byte[0] ^ 0xFF]))
    return int(names[-1].split("-")[1])


def audit(outcome: Outcome, run: Path, slots: int) -> None:
    """Adds what `amenable audit` does not accept, and what a finished run of `slots` slots would have otherwise."""
    try:
        [stage] = audit_run(run)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the cell has failed by it
        outcome.problems.append(f"The audit could not be made: {problem}")
        return
    lost, duplicated, trained = (sum(getattr(each, name) for each in stage.attempts) for name in _TALLIES)
    outcome.audit = f"{'accepted' if stage.accepted else 'not accepted'}, {lost} lost, {duplicated} duplicated"
    outcome.problems += stage.problems
    if not stage.finished or (lost, duplicated, trained) != (0, 0, slots):
        outcome.problems.append(
            f"Of {slots} slots {trained} are trained, {lost} lost, {duplicated} duplicated; the stage "
            f"is {'done' if stage.finished else 'not done'}."
        )


def audit_so_far(outcome: Outcome, run: Path) -> None:
    """Adds what `amenable audit` does not accept of a run that is not finished, and that nobody writes."""
    try:
        [stage] = audit_run(run)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the cell has failed by it
        outcome.problems.append(f"The audit could not be made when the command had ended: {problem}")
        return
    lost, duplicated = (sum(getattr(each, name) for each in stage.attempts) for name in ("lost", "duplicated"))
    outcome.problems += stage.problems
    if not stage.accepted or lost or duplicated:
        outcome.problems.append(f"When the command had ended {lost} slots were lost, {duplicated} duplicated.")


_TALLIES = ("lost", "duplicated", "trained")


# processes and disks ---------------------------------------------------------------------------------------------


def end_processes(directory: Path, patience_s: float = END_S) -> list[str]:
    """Waits for the end of every process that was started for the cell in `directory`; those that are still there then
    are killed. Returns what those were."""
    give_up = time.monotonic() + patience_s
    while processes(directory) and time.monotonic() < give_up:
        time.sleep(0.2)
    left = {pid: _description(pid) for pid in processes(directory)}
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(left.values())


def _description(pid: int) -> str:
    """What a process is, for a person: its number, command, parent, state, and where in the kernel it waits."""
    try:
        of = Path(f"/proc/{pid}")
        command = of.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        status = dict(line.split(":", 1) for line in of.joinpath("status").read_text().splitlines())
        parent, state, waits = status["PPid"].strip(), status["State"].strip(), of.joinpath("wchan").read_text()
    except OSError:
        return f"{pid} (ended meanwhile)"
    return f"{pid} ({command[:200]}; parent {parent}, state {state}, in {waits or '?'})"


def processes(directory: Path) -> list[int]:
    """Living processes that have the cell's directory in their environment, or have said that they play in it: Ray's
    workers write their titles over their environment."""
    mark = f"{phases.VARIABLE}={directory}\0".encode()
    found = {each["pid"] for playing in phases.registered(directory).values() for each in playing}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            status = (path.parent / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            if status not in "ZX" and mark in path.read_bytes() + b"\0":
                found.add(int(path.parent.name))
    return sorted(found)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _small_disk(run: Path) -> Iterator[None]:
    """The PPO stage's directory on a tmpfs of DISK_BYTES. Raises PermissionError where mounting is not permitted."""
    place = run / "round-01" / "ppo"
    place.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise PermissionError(f"A small disk is a tmpfs, and mounting one is not permitted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
