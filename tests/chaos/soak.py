"""A soak: the run of a cell for half an hour, while processes of any role are struck at random.

`python tests/chaos/soak.py --minutes 30` plays it, prints what came of it, and ends with exit code 0 where the audit
accepts the run with no slot lost or duplicated and no role's memory grew; else 1. `--calm` strikes nobody: each process
lives as long as the soak, so that also what grows slowly shows.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import phases
from campaign import newest_checkpoint
from cells import ROLES, WORKERS
from growth import YOUNG_S, Growth, Sample, growth_of, not_judged, too_young
from harness import END_S, Command, end_processes, processes
from striking import had_effect

from evaluation.audit import audit_run

EVERY_S = (20.0, 45.0)
"""Seconds between two strikes, at least and at most. The run must also have saved a checkpoint in between."""

LAST_S = 60.0
"""Seconds before the end in which nobody is struck: a rank that is stopped has no checkpoint to give when it is asked
for one, which ends the command with exit code 1, as it should."""

SAMPLE_S = 5.0
STANDSTILL_S = 300.0
"""Seconds without a new checkpoint after which the soak has failed."""

ENDLESS = "--updates=1000000"
"""More than half an hour has."""

JUDGED = (*ROLES, "raylet", "gcs_server", "object store")
"""Whose memory must be known."""

STRIKES = [(role, signal.SIGKILL) for role in ROLES] + [(role, signal.SIGSTOP) for role in WORKERS]


@dataclass
class Soak:
    """What came of it."""

    seconds: float = 0.0
    updates: int = 0
    commands: int = 1
    strikes: Counter[str] = field(default_factory=Counter)
    growth: list[Growth] = field(default_factory=list)
    audit: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Soaking:
    def __init__(self, directory: Path, minutes: float, seed: int, calm: bool) -> None:
        from toy_run import write_given  # imports torch

        self._directory, self._run, self._calm = directory, directory / "run", calm
        (directory / "processes").mkdir(parents=True)
        write_given(self._run)
        self._random = random.Random(seed)
        self._duration_s = minutes * 60
        self._samples: list[Sample] = []
        self._began = time.monotonic()
        self.outcome = Soak()

    def play(self) -> Soak:
        command, outcome = Command(self._directory, self._run, ENDLESS), self.outcome
        try:
            command = self._until_time_is_up(command)
            outcome.seconds = time.monotonic() - self._began
            if not command.is_over():
                command.signal(signal.SIGTERM)
            code = command.wait()
            if code != 130:
                outcome.problems.append(f"Asked to stop, the command ended with {code}: {command.said[-2000:]}")
        finally:
            left = end_processes(self._directory)
        if left:
            outcome.problems.append(f"{END_S:.0f} s after the last command ended, still there: {', '.join(left)}.")
        self._audit()
        outcome.growth = growth_of(self._samples, outcome.seconds)
        outcome.problems += [f"The memory of {each.role} grew: {each}." for each in outcome.growth if not each.bounded]
        outcome.problems += [
            f"No {role} older than {YOUNG_S:.0f} s was there at the beginning and at the end: give more --minutes."
            for role in not_judged(outcome.growth, JUDGED)
        ]
        if self._calm:
            outcome.problems += [
                f"No {role} lived through two thirds of the soak, in which nobody was struck."
                for role in too_young(outcome.growth, outcome.seconds)
            ]
        return outcome

    def _until_time_is_up(self, command: Command) -> Command:
        """Strikes, samples, and gives the command again where a strike has ended it; returns the last one."""
        strike_at, saved, sampled_at = self._next_strike(), self._saved(), 0.0
        moved_at = time.monotonic()
        while time.monotonic() - self._began < self._duration_s:
            time.sleep(0.2)
            now = time.monotonic()
            if self._saved() > self.outcome.updates:
                self.outcome.updates, moved_at = self._saved(), now
            if now - moved_at > STANDSTILL_S:
                self.outcome.problems.append(f"Nothing was saved for {STANDSTILL_S:.0f} s: {command.said[-2000:]}")
                break
            if command.is_over():
                if command.wait() not in (1, -signal.SIGKILL) or "Traceback" in command.said:
                    self.outcome.problems.append(f"The command ended with {command.wait()}: {command.said[-2000:]}")
                end_processes(self._directory)
                command = Command(self._directory, self._run, ENDLESS)
                self.outcome.commands += 1
            if now - sampled_at > SAMPLE_S:
                self._sample()
                sampled_at = now
            is_late = now - self._began > self._duration_s - LAST_S  # whoever is struck is there again at the end
            if now > strike_at and self.outcome.updates > saved and not (self._calm or is_late):
                self._strike()
                strike_at, saved = self._next_strike(), self._saved()
        return command

    def _next_strike(self) -> float:
        return time.monotonic() + self._random.uniform(*EVERY_S)

    def _saved(self) -> int:
        """The newest whole checkpoint's update."""
        return newest_checkpoint(self._run)

    def _strike(self) -> None:
        role, number = self._random.choice(STRIKES)
        players = phases.registered(self._directory).get(role, [])
        if not players:
            return
        struck = self._random.choice(players)
        with suppress(ProcessLookupError):
            os.kill(struck["pid"], number)
            if not had_effect(struck["pid"], struck["ticks"], number):
                self.outcome.problems.append(f"{role} went on after {number.name}.")
            self.outcome.strikes[f"{role} {number.name}"] += 1

    def _sample(self) -> None:
        at = time.monotonic() - self._began
        roles = {each["pid"]: role for role, playing in phases.registered(self._directory).items() for each in playing}
        for pid in processes(self._directory):
            with suppress(OSError, ValueError):
                status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                name = status["Name"].strip()
                role = roles.get(pid) or (name if name in ("raylet", "gcs_server") else None)
                if role is not None and "RssAnon" in status:  # one that is ending has no memory any more
                    age = time.time() - Path(f"/proc/{pid}").stat().st_ctime
                    anonymous = int(status["RssAnon"].split()[0]) << 10
                    self._samples.append(Sample(role, at, age, anonymous))
                    if name == "raylet":  # what it maps of shared memory are objects
                        objects = int(status["RssShmem"].split()[0]) << 10
                        self._samples.append(Sample("object store", at, age, objects))

    def _audit(self) -> None:
        try:
            [stage] = audit_run(self._run)
        except Exception as problem:  # noqa: BLE001 - whatever it is, the soak has failed by it
            self.outcome.problems.append(f"The audit could not be made: {problem}")
            return
        names = ("trained", "regenerated", "discarded", "lost", "duplicated")
        self.outcome.audit = {name: sum(getattr(each, name) for each in stage.attempts) for name in names}
        self.outcome.audit["attempts"] = len(stage.attempts)
        self.outcome.problems += stage.problems
        if not stage.accepted or self.outcome.audit["lost"] or self.outcome.audit["duplicated"]:
            self.outcome.problems.append(f"The audit does not accept the run: {self.outcome.audit}.")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the strikes")
    parser.add_argument("--calm", action="store_true", help="strike nobody")
    parser.add_argument("--keep", type=Path, help="a new directory for the run; else a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        soak = _Soaking(given.keep or Path(temporary) / "soak", given.minutes, given.seed, given.calm).play()
    struck = sum(soak.strikes.values())
    print(f"{soak.seconds / 60:.1f} minutes, {soak.updates} updates, {struck} strikes, {soak.commands} commands")
    print("strikes:", ", ".join(f"{name} {count}" for name, count in sorted(soak.strikes.items())) or "none")
    print("audit:", ", ".join(f"{count} {name}" for name, count in soak.audit.items()))
    print(f"{'MiB a process':16} {'first third':>12} {'last third':>12} {'peak':>8} {'samples':>8} {'oldest, s':>10}")
    for each in soak.growth:
        held = f"{each.first:12.1f} {each.last:12.1f} {each.peak:8.1f}"
        print(f"{each.role:16} {held} {each.samples:8d} {each.oldest_s:10.0f}")
    for problem in soak.problems:
        print("problem:", problem)
    print(json.dumps({**asdict(soak), "strikes": dict(soak.strikes), "passed": not soak.problems}))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
