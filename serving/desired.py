"""What the replicas of a service should serve as `policy`: RUN/serving/desired.json, which people write and replicas
follow.

JSON: `schema_version`, `counter`, `pinned` (a model name such as policy@12; null follows the newest weights), `who`,
`when` (ISO time). Every change counts the counter up; whoever changes it must have seen the counter before. Replicas
say how far they are in RUN/serving/replicas/<id>.json.

Of a run that an object store keeps the wish is the newest of the numbered objects RUN/serving/desired/
(corpus/numbered_objects.py), with the same content; reports are objects of the same names. Everything here takes the
run as `Place`: its directory, or its address.
"""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs

from actors.published import DESIRED_FILE, PINNED_NAME, STORED_WISHES
from corpus.audit_log import PINNED, UNPINNED, audited
from corpus.file_lock import file_lock
from corpus.numbered_objects import NumberedObjects, Overtaken
from corpus.problems import RunProblem, UsageProblem
from corpus.storage import below, is_object_store, one_line, opened, without_options

SCHEMA_VERSION = 1
REPLICAS = Path("serving", "replicas")
LOCK_FILE = ".desired.lock"
LOCK_S = 15.0
"""Seconds that a wish waits for those of other processes. House default, as of an audit log."""

REPORT_STALE_S = 30.0
"""Seconds after which a replica that has said nothing is no longer told of."""

Place = Path | str
"""A run: its directory, or its address in an object store."""

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


def read_wish(run: Place) -> Wish:
    """The newest wish for the run. Raises RunProblem where it is unreadable, or a store does not say."""
    if is_object_store(run):
        number, text = _wishes(str(run)).newest()
        if not number:
            return Wish()
        wish = _parsed(text.decode(errors="replace"), f"{without_options(str(run))}/{STORED_WISHES}")
        return replace(wish, counter=number)  # the object's own number is what the next one must follow
    path = Path(run) / DESIRED_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Wish()
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), error) from None
    return _parsed(text, str(path))


def write_wish(run: Place, pinned: str | None, seen: int, who: str, when: str, token_name: str | None = None) -> Wish:
    """The wish that follows the one numbered `seen`, where the run is kept, and in its audit log. `token_name` is that
    of the token by which the service knew who asks. Raises WishOvertaken where somebody else has changed it since,
    UsageProblem for a name that no version can have and where another process has been writing one for LOCK_S,
    RunProblem where it cannot be recorded."""
    if pinned is not None and not PINNED_NAME.fullmatch(pinned):
        raise UsageProblem(
            f"{pinned!r} names no version; give policy@UPDATE, as in policy@12, or newest.", "serving/version"
        )
    wish = Wish(seen + 1, pinned, who, when)
    asked = {"version": pinned or "newest", "before": read_wish(run).pinned or "newest"}
    with audited(run, UNPINNED if pinned is None else PINNED, asked, token_name):
        _put(run, wish, seen)
    return wish


def _put(run: Place, wish: Wish, seen: int) -> None:
    content = {"schema_version": SCHEMA_VERSION, **asdict(wish)}
    if is_object_store(run):
        try:
            _wishes(str(run)).put_after(seen, json.dumps(content).encode())
        except Overtaken:
            raise _overtaken(read_wish(run)) from None
        return
    path = Path(run) / DESIRED_FILE
    path.parent.mkdir(exist_ok=True)
    with file_lock(path.parent / LOCK_FILE, LOCK_S):
        present = read_wish(run)
        if present.counter != seen:
            raise _overtaken(present)
        _write_whole(path, content)


def write_report(run: Place, replica: str, says: dict[str, Any]) -> None:
    """Say what the replica serves now. `replica` is its id. Raises OSError."""
    if not _REPLICA.fullmatch(replica):
        raise ValueError(f"{replica!r} is no id of a replica")
    if is_object_store(run):
        filesystem, inner = _reports(str(run))
        with filesystem.open_output_stream(f"{inner}/{replica}.json") as stream:
            stream.write(json.dumps(says).encode())
        return
    directory = Path(run) / REPLICAS
    directory.mkdir(parents=True, exist_ok=True)
    _write_whole(directory / f"{replica}.json", says)


def remove_report(run: Place, replica: str) -> None:
    """Say that the replica serves no more. Raises OSError."""
    if is_object_store(run):
        filesystem, inner = _reports(str(run))
        with suppress(FileNotFoundError):
            filesystem.delete_file(f"{inner}/{replica}.json")
        return
    (Path(run) / REPLICAS / f"{replica}.json").unlink(missing_ok=True)


def read_reports(run: Place) -> dict[str, dict[str, Any]]:
    """What the replicas that have spoken lately serve, by their ids. Raises RunProblem where a store does not say;
    what it stamps is held against this machine's clock."""
    if is_object_store(run):
        return _stored_reports(str(run))
    found = {}
    for path in sorted((Path(run) / REPLICAS).glob("*.json")):
        try:
            if time.time() - path.stat().st_mtime < REPORT_STALE_S:
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it has just ended, or is just beginning
            continue
    return found


@lru_cache(maxsize=16)
def _wishes(address: str) -> NumberedObjects:
    return NumberedObjects(below(address, STORED_WISHES))


def _reports(address: str) -> tuple[fs.FileSystem, str]:
    return opened(below(address, REPLICAS.as_posix()))


def _stored_reports(address: str) -> dict[str, dict[str, Any]]:
    filesystem, inner = _reports(address)
    found = {}
    try:
        listed = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
        for each in sorted(listed, key=lambda each: each.base_name):
            replica, _, ending = each.base_name.rpartition(".")
            if ending != "json" or time.time() - each.mtime_ns / 1e9 >= REPORT_STALE_S:
                continue
            with suppress(FileNotFoundError, ValueError), filesystem.open_input_stream(each.path, None) as stream:
                found[replica] = json.loads(stream.read())
    except OSError as error:
        place = f"{without_options(address)}/{REPLICAS.as_posix()}"
        raise RunProblem(f"{place} cannot be read ({one_line(error)}).", "serving/wish") from error
    return found


def _parsed(text: str, where: str) -> Wish:
    try:
        found = json.loads(text)
        if found.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another version of the program")
        wish = Wish(**found)
        if type(wish.counter) is not int or wish.counter < 1:
            raise ValueError("counter should be a whole number above 0")
        if wish.pinned is not None and not PINNED_NAME.fullmatch(wish.pinned):
            raise ValueError("pinned should be null or a name such as policy@12")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(where, error) from None
    return wish


def _unreadable(where: str, error: Exception) -> RunProblem:
    return RunProblem(f"{where} cannot be read ({error}): write it anew with amenable pin.", "serving/wish")


def _overtaken(present: Wish) -> WishOvertaken:
    return WishOvertaken(
        f"{present.who} has asked for {present.pinned or 'the newest weights'} at {present.when}, since you looked; "
        "look again.",
        "serving/overtaken",
    )


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
