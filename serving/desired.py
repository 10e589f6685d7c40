"""What the replicas of a service should serve as `policy`: RUN/serving/desired.json, which people write and replicas
follow.

JSON: `schema_version`, `counter`, `pinned` (a model name such as policy@12; null follows the newest weights), `who`,
`when` (ISO time). Every change counts the counter up; whoever changes it must have seen the counter before. Replicas
say how far they are in RUN/serving/replicas/<id>.json.
"""

import fcntl
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.published import DESIRED_FILE, PINNED_NAME
from corpus.problems import RunProblem, UsageProblem

SCHEMA_VERSION = 1
REPLICAS = Path("serving", "replicas")
LOCK_FILE = ".desired.lock"
REPORT_STALE_S = 30.0
"""Seconds after which a replica that has said nothing is no longer told of."""

_REPLICA = re.compile(r"[\w-]{1,80}")


class WishOvertaken(UsageProblem):
    """Somebody else has changed the wish since it was looked at."""


@dataclass(frozen=True)
class Wish:
    """What is wanted: its number (0 before the first), the name that `policy` is held at, and who wanted it when."""

    counter: int = 0
    pinned: str | None = None
    who: str | None = None
    when: str | None = None


def read_wish(run: Path) -> Wish:
    """The newest wish for the run. Raises RunProblem where the file is unreadable."""
    path = run / DESIRED_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another version of the program")
        wish = Wish(**found)
        if type(wish.counter) is not int or wish.counter < 1:
            raise ValueError("counter should be a whole number above 0")
        if wish.pinned is not None and not PINNED_NAME.fullmatch(wish.pinned):
            raise ValueError("pinned should be null or a name such as policy@12")
    except FileNotFoundError:
        return Wish()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunProblem(f"{path} cannot be read ({error}): write it anew with amenable pin.", "serving/wish") from None
    return wish


def write_wish(run: Path, pinned: str | None, seen: int, who: str, when: str) -> Wish:
    """The wish that follows the one numbered `seen`, on disk. Raises WishOvertaken where somebody else has changed it
    since, UsageProblem for a name that no version can have."""
    if pinned is not None and not PINNED_NAME.fullmatch(pinned):
        raise UsageProblem(
            f"{pinned!r} names no version; give policy@UPDATE, as in policy@12, or newest.", "serving/version"
        )
    path = run / DESIRED_FILE
    path.parent.mkdir(exist_ok=True)
    with open(path.parent / LOCK_FILE, "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        present = read_wish(run)
        if present.counter != seen:
            raise WishOvertaken(
                f"{present.who} has asked for {present.pinned or 'the newest weights'} at {present.when}, since you "
                "looked; look again.",
                "serving/overtaken",
            )
        wish = Wish(present.counter + 1, pinned, who, when)
        _write_whole(path, {"schema_version": SCHEMA_VERSION, **asdict(wish)})
    return wish


def write_report(run: Path, replica: str, says: dict[str, Any]) -> None:
    """Say what the replica serves now. `replica` is its id. Raises OSError."""
    if not _REPLICA.fullmatch(replica):
        raise ValueError(f"{replica!r} is no id of a replica")
    directory = run / REPLICAS
    directory.mkdir(parents=True, exist_ok=True)
    _write_whole(directory / f"{replica}.json", says)


def remove_report(run: Path, replica: str) -> None:
    """Say that the replica serves no more."""
    (run / REPLICAS / f"{replica}.json").unlink(missing_ok=True)


def read_reports(run: Path) -> dict[str, dict[str, Any]]:
    """What the replicas that have spoken lately serve, by their ids."""
    found = {}
    for path in sorted((run / REPLICAS).glob("*.json")):
        try:
            if time.time() - path.stat().st_mtime < REPORT_STALE_S:
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it has just ended, or is just beginning
            continue
    return found


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
