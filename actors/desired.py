"""How many generators a PPO stage is to have: a file below the stage's directory that people write and the conductor
follows, and another in which the conductor says how far it is.

Both are JSON. `desired.json`: `schema_version`, `counter`, `generators`, `who`, `when` (ISO time). Every change counts
the counter up; whoever changes it must have seen the counter before.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from corpus.file_lock import file_lock
from corpus.problems import RunProblem, UsageProblem

SCHEMA_VERSION = 1
DESIRED_FILE = "desired.json"
FLEET_FILE = "fleet.json"
LOCK_FILE = ".desired.lock"
LOCK_DEADLINE_S = 30.0
"""Seconds that the lock around the wish is waited for: it is held while a small file is read and written."""


@dataclass(frozen=True)
class Desired:
    """A wish: its number, and how many generators `who` wanted `when`."""

    counter: int
    generators: int
    who: str
    when: str


def read_desired(directory: Path) -> Desired | None:
    """The newest wish for the stage in `directory`; None before the first. Raises RunProblem where it is unreadable."""
    path = directory / DESIRED_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another version of the program")
        wish = Desired(**found)
        if type(wish.generators) is not int or type(wish.counter) is not int or wish.generators < 1:
            raise ValueError("generators and counter should be whole numbers above 0")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunProblem(f"{path} cannot be read ({error}): write it anew with amenable scale.", "fleet/wish") from None
    return wish


def write_desired(directory: Path, seen: int, generators: int, who: str, when: str) -> Desired:
    """The wish that follows the one numbered `seen` (0 where there was none), on disk. Raises UsageProblem where
    somebody else has changed it since, or holds the lock around it for too long."""
    path = directory / DESIRED_FILE
    with file_lock(directory / LOCK_FILE, LOCK_DEADLINE_S):
        present = read_desired(directory)
        counter = present.counter if present is not None else 0
        if present is not None and counter != seen:
            raise UsageProblem(
                f"{present.who} has asked for {present.generators} generators at {present.when}, since this command "
                "looked; look again.",
                "fleet/overtaken",
            )
        wish = Desired(counter + 1, generators, who, when)
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump({"schema_version": SCHEMA_VERSION, **asdict(wish)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    return wish


def read_fleet(directory: Path) -> dict[str, object] | None:
    """What the conductor last said of the fleet; None where it has not."""
    try:
        return json.loads((directory / FLEET_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_fleet(directory: Path, says: dict[str, object]) -> None:
    """Say how the fleet is, with the `time` (Unix seconds)."""
    partial = directory / f"{FLEET_FILE}.partial"
    partial.write_text(json.dumps({"time": time.time(), **says}), encoding="utf-8")
    partial.replace(directory / FLEET_FILE)
