"""Plays many cells on one run, one after another: each begins where the run has recovered from the one before.

So a strike meets a run that has been struck before, and the run that is audited in the end has survived all of them.
"""

import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import phases
from cells import Cell
from harness import A_SENTENCE, END_S, Command, Outcome, audit, audit_so_far, end_processes
from striking import Strike, await_phase, strike_process
from toy_recipe import BATCH_SIZE

from actors.desired import read_fleet
from amenable.run_directory import RunDirectory
from amenable.scale import scale
from learners.checkpoint_place import CheckpointPlace

RECOVERY_S = 300.0
"""Seconds after a strike in which the struck role must be there again and, after that, a checkpoint saved."""

UPDATES_A_STRIKE, UPDATES_AFTER = 5, 5
"""Updates of the run for each cell: until whoever was struck is there again, and from then on. The learner goes no
further, or the run would be over before its cells are."""

UPDATES_A_CELL = UPDATES_A_STRIKE + UPDATES_AFTER
TAKEN_BACK = 2
"""Updates of these that a restart may take back: they are kept for the end."""


class Campaign:
    """One run, in `directory`, which is its own. `template` is a run that has all that PPO reads."""

    def __init__(self, cells: Sequence[Cell], template: Path, directory: Path) -> None:
        [engine] = {cell.engine for cell in cells}
        self._directory, self._run = directory, directory / "run"
        self._updates = UPDATES_A_CELL * len(cells)
        (directory / "processes").mkdir(parents=True)
        shutil.copytree(template, self._run)
        (directory / "engine").write_text(engine)
        self._outcomes = [Outcome(cell) for cell in cells]
        self._command = self._start()

    def play(self, tell: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
        """What came of each cell, of which `tell` hears at its end; the audit comes after all. What is wrong with the
        run as a whole is a problem of the last one."""
        last = self._outcomes[-1]
        try:
            for outcome in self._outcomes:
                began = time.monotonic()
                self._play(outcome)
                outcome.seconds = time.monotonic() - began
                tell(outcome)
            (self._directory / "brake").unlink(missing_ok=True)
            code = self._command.wait()
            if code != 0:
                last.problems.append(f"The command ended with {code}: {self._command.said[-2000:]}")
            audit(last, self._run, self._updates * BATCH_SIZE)
        finally:
            left = end_processes(self._directory)
        if left:
            last.problems.append(f"{END_S:.0f} s after the last command ended, still there: {', '.join(left)}.")
        for outcome in self._outcomes:
            outcome.audit = last.audit
        return self._outcomes

    def _start(self) -> Command:
        stale = ["--stale"] if self._outcomes[0].cell.stale else []
        return Command(self._directory, self._run, f"--updates={self._updates}", *stale)

    def _play(self, outcome: Outcome) -> None:
        cell, directory = outcome.cell, self._directory
        if self._command.is_over():  # the cell before this one has ended it against its will, and says so
            self._command = self._start()
        if not self._await(lambda: self._saved() >= phases.FROM_UPDATE and self._count(cell.target) > 0):
            outcome.problems.append(f"No {cell.target} was there to be struck: {self._command.said[-2000:]}")
            return
        players = Counter({role: self._count(role) for role in (cell.target, "generator")})
        self._let_go_on(UPDATES_A_STRIKE)
        number = self._outcomes.index(outcome)
        plan = {"holder": cell.holder, "phase": cell.phase, "target": cell.target, "number": number}
        phases.write_new(directory / "plan.json", plan)
        opened = self._await_phase(cell.phase, number)
        if opened:
            strike = self._strike(cell, players[cell.target])
            outcome.landed = strike.landed
            if not strike.landed:
                outcome.problems.append(f"The strike did not land: {strike.problem}.")
        else:
            outcome.problems.append("The strike did not land: the phase was never open.")
        self._forget(opened)
        (self._recover if cell.survives else self._resume)(outcome, players)

    def _strike(self, cell: Cell, players: int) -> Strike:
        if cell.how != "scaled in":
            how = signal.SIGSTOP if cell.how == "SIGSTOP" else signal.SIGKILL
            return strike_process(self._directory, cell.target, cell.phase, how)
        scale(RunDirectory(self._run), f"generators={players - 1}")
        (self._directory / "struck").touch()
        if not self._await(lambda: self._count(cell.target) < players):
            return Strike(f"no {cell.target} has gone")
        scale(RunDirectory(self._run), f"generators={players}")
        return Strike("")

    def _await_phase(self, phase: str, number: int) -> dict:
        """What the process says that opened the phase for plan `number`; empty where none has in time. One that had
        read an earlier plan may come late, and is not meant."""
        give_up = time.monotonic() + RECOVERY_S
        while time.monotonic() < give_up:
            await_phase(self._directory, phase, give_up - time.monotonic(), self._command.is_over)
            opened = phases.opened(self._directory)
            if not opened or opened["number"] == number:
                return opened
            (self._directory / "opened.json").unlink(missing_ok=True)
        return {}

    def _let_go_on(self, updates: int) -> None:
        """By so many from what is saved now, less what a restart may take back."""
        brake = self._directory / "brake.new"
        brake.write_text(str(self._saved() + updates - TAKEN_BACK // 2))
        brake.rename(self._directory / "brake")

    def _recover(self, outcome: Outcome, players: Counter[str]) -> None:
        """The command itself goes on: whoever was struck is replaced and serves, and something is saved after that."""
        role = outcome.cell.target
        outcome.ended = "went on"
        replaced = self._await(lambda: self._replaced(role, players[role]) and self._serves())
        if replaced:
            saved = self._saved()
            self._let_go_on(UPDATES_AFTER)
            whole = self._await(lambda: self._saved() > saved)
        if self._command.is_over():
            outcome.ended, outcome.said = "stopped", self._command.sentence
            outcome.problems.append(f"The command was to survive this, and ended: {outcome.said}")
        elif not replaced:
            outcome.problems.append(f"No other {role} served within {RECOVERY_S:.0f} s of the strike.")
        elif not whole:
            outcome.problems.append(f"Nothing was saved within {RECOVERY_S:.0f} s of another {role}'s serving.")

    def _resume(self, outcome: Outcome, players: Counter[str]) -> None:
        """The command ends, with a sentence unless it was killed itself; the same command goes on."""
        killed = outcome.cell.role == "driver"
        code = self._command.wait()
        outcome.said, outcome.ended = self._command.sentence, "killed" if killed else "stopped"
        if code != (-signal.SIGKILL if killed else 1):
            outcome.problems.append(f"The command was to end, and ended with {code}: {self._command.said[-2000:]}")
        elif not killed and ("Traceback" in self._command.said or not A_SENTENCE.search(outcome.said)):
            outcome.problems.append(f"The command ended without a sentence: {self._command.said[-2000:]}")
        left = end_processes(self._directory)
        if left:
            outcome.problems.append(f"{END_S:.0f} s after the command had ended, still there: {', '.join(left)}.")
        if code == 0:
            return
        audit_so_far(outcome, self._run)
        saved = self._saved()  # by now: a command that ends by itself saves what it has trained
        self._let_go_on(UPDATES_AFTER)
        self._command = self._start()
        if self._await(lambda: self._saved() > saved):
            outcome.ended += ", resumed"
        else:
            outcome.problems.append(f"The same command again saved nothing: {self._command.said[-2000:]}")

    def _forget(self, opened: dict) -> None:
        """Ends the plan of a cell, once whoever held its phase open has gone on or died."""
        with suppress(FileNotFoundError):
            (self._directory / "plan.json").unlink()
        holder, give_up = opened.get("pid"), time.monotonic() + 2 * phases.HOLD_S
        closed = phases.closed(self._directory, opened.get("number"))
        while not closed.exists() and time.monotonic() < give_up:
            playing = phases.registered(self._directory).values()
            if holder not in {each["pid"] for players in playing for each in players}:
                break
            time.sleep(0.05)
        for path in (self._directory / "opened.json", self._directory / "struck", closed):
            path.unlink(missing_ok=True)

    def _await(self, holds: Callable[[], bool]) -> bool:
        """Until it holds; False where it does not within RECOVERY_S, or before the command is over."""
        give_up = time.monotonic() + RECOVERY_S
        while not holds():
            if time.monotonic() > give_up or self._command.is_over():
                return False
            time.sleep(0.1)
        return True

    def _count(self, role: str) -> int:
        return len(phases.registered(self._directory).get(role, []))

    def _replaced(self, role: str, as_before: int) -> bool:
        """Whether as many as before play `role`, none of whom is stopped."""
        playing = phases.registered(self._directory).get(role, [])
        return len(playing) >= as_before and not any(phases.is_stopped(each["pid"]) for each in playing)

    def _serves(self) -> bool:
        """Whether the conductor says of all workers that they are healthy, none waits, and as many generators as are
        wanted are there."""
        fleet = read_fleet(self._run / "round-01" / "ppo") or {}
        workers: dict[str, str] = fleet.get("workers", {})  # pyright: ignore[reportAssignmentType]
        return bool(workers) and set(workers.values()) == {"healthy"} and not fleet["waiting"]

    def _saved(self) -> int:
        """The newest whole checkpoint's update."""
        return newest_checkpoint(self._run)


def newest_checkpoint(run: Path) -> int:
    """The update of the newest whole checkpoint of a run, 0 where there is none."""
    names = CheckpointPlace(run / "round-01" / "ppo" / "checkpoints").complete()
    return int(names[-1].split("-")[1]) if names else 0
