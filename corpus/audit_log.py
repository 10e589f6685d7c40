"""The audit log of a run: who submitted, stopped, scaled or pinned it, who ran it, and what came of that.

Entries are added and never changed. In a directory they are lines of RUN/audit-log.jsonl, each appended by one write
and on the disk before the command goes on. An object store cannot append, so each entry is an object of its own there,
RUN/audit-log/TIME-RANDOM.json, under a name that nobody had before.

Secrets are left out, whatever was asked: the log is read by everybody who may read the run.
"""

import fcntl
import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyarrow import fs

from corpus.problems import RunProblem, UsageProblem
from corpus.secrecy import redacted
from corpus.storage import below, is_object_store, one_line, opened, without_options

SCHEMA_VERSION = 1
LOCK_S = 15.0
"""Seconds that an entry waits for those of other processes. House default."""
FILE = "audit-log.jsonl"
DIRECTORY = "audit-log"

SUBMITTED, RESUMED, STOPPED = "submitted", "resumed", "stopped"
SCALED, PINNED, UNPINNED = "scaled", "pinned", "unpinned"
BEGAN, ENDED = "began", "ended"

DONE = "done"
"""The outcome of what was carried out."""


@dataclass(frozen=True)
class Entry:
    """One thing that was asked of a run."""

    time: str
    """ISO time in UTC, to the millisecond, by the clock of whoever wrote the entry."""
    actor: str
    """Who, as USER@HOST."""
    action: str
    asked: dict[str, Any] = field(default_factory=dict)
    """What was asked, as plain values."""
    outcome: str = DONE
    token_name: str | None = None
    """The name of the token by which the page of a service knew who asked; None for a command."""


def actor_here() -> str:
    """Who this process works for: USER@HOST; a user without a name is a number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in many containers
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def entry_now(
    action: str,
    asked: Mapping[str, Any],
    outcome: str = DONE,
    token_name: str | None = None,
    actor: str | None = None,
) -> Entry:
    """An entry of this moment. `actor` is this process's user where it is not given."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return Entry(now, actor or actor_here(), action, dict(asked), outcome, token_name)


def add(place: str | Path, entry: Entry, environment: Mapping[str, str] = os.environ) -> None:
    """Adds the entry to the log of the run at `place`, a directory that is there or an address in an object store,
    without what is secret in it. Raises RunProblem where it cannot be written, whose sentence does not say whether what
    the entry is of was done."""
    told = {"schema_version": SCHEMA_VERSION, **redacted(asdict(entry), environment)}
    line = json.dumps(told, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        if is_object_store(place):
            _put(str(place), entry.time, line)
        else:
            _append(Path(place) / FILE, line)
    except (OSError, UsageProblem) as error:  # of a store that does not answer, too, which looks like a wrong address
        where = without_options(str(place)) if is_object_store(place) else str(place)
        raise RunProblem(
            f"{where}: the entry {entry.action!r} could not be written to its audit log ({one_line(error)}).",
            "storage/write",
        ) from error


@dataclass
class Asking:
    """What is being asked; whoever carries it out may say what came of it, and add to what was asked."""

    asked: dict[str, Any]
    outcome: str = DONE


@contextmanager
def audited(
    place: str | Path, action: str, asked: Mapping[str, Any], token_name: str | None = None
) -> Iterator[Asking]:
    """Around what is done to the run at `place`: an entry of it is added at the end, also where it was refused or went
    wrong. Raises what the block raises, and RunProblem where the entry of what was done cannot be written, which says
    that it was done."""
    asking = Asking(dict(asked))
    try:
        yield asking
    except (UsageProblem, RunProblem) as problem:
        verb = "refused" if isinstance(problem, UsageProblem) else "failed"
        try:
            add(place, entry_now(action, asking.asked, f"{verb}: {problem}", token_name))
        except RunProblem as unwritten:  # what went wrong first is what a person must hear of
            problem.add_note(str(unwritten))
        raise
    try:
        add(place, entry_now(action, asking.asked, asking.outcome, token_name))
    except RunProblem as unwritten:
        raise RunProblem(
            f"The run was {action}, and need not be {action} again; only the entry of it is missing. {unwritten}",
            "storage/audit-log",
        ) from unwritten


def read(place: str | Path) -> tuple[list[Entry], int]:
    """The entries of the run at `place`, by their times, and how many could not be understood. Raises RunProblem where
    the log cannot be read."""
    try:
        texts = _objects(str(place)) if is_object_store(place) else _lines(Path(place) / FILE)
    except OSError as error:
        where = without_options(str(place)) if is_object_store(place) else str(place)
        raise RunProblem(f"The audit log of {where} cannot be read ({one_line(error)}).", "storage/read") from error
    entries = [_entry(text) for text in texts]
    found = [entry for entry in entries if entry is not None]
    return sorted(found, key=lambda entry: entry.time), len(entries) - len(found)


def _append(path: Path, line: bytes) -> None:
    # The umask decides: where it leaves the group its right to write, others of a shared directory append too.
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        _lock(handle)  # network file systems know no append of several machines at once
        if not _ends_whole(handle):  # what a machine that went down has written half stays a line of its own
            line = b"\n" + line
        written = os.write(handle, line)
        os.fsync(handle)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written")
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    give_up = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise TimeoutError(f"another process has held its lock for {LOCK_S:g} s") from None
            time.sleep(0.02)


def _ends_whole(handle: int) -> bool:
    size = os.fstat(handle).st_size
    return size == 0 or os.pread(handle, 1, size - 1) == b"\n"


def _put(address: str, time: str, content: bytes) -> None:
    stamp = datetime.fromisoformat(time).strftime("%Y%m%dT%H%M%S.%f")
    filesystem, inner = opened(below(address, DIRECTORY))
    with filesystem.open_output_stream(f"{inner}/{stamp}-{secrets.token_hex(8)}.json") as stream:
        stream.write(content)


def _lines(path: Path) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []


def _objects(address: str) -> list[bytes]:
    filesystem, inner = opened(below(address, DIRECTORY))
    listed = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    found = []
    for each in sorted(listed, key=lambda info: info.base_name):
        if each.type == fs.FileType.File and each.base_name.endswith(".json"):
            with filesystem.open_input_stream(each.path, compression=None) as stream:
                found.append(stream.read())
    return found


def _entry(text: bytes) -> Entry | None:
    try:
        content = json.loads(text)
        if content.pop("schema_version") != SCHEMA_VERSION:
            return None
        entry = Entry(**content)
        datetime.fromisoformat(entry.time)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return entry
