"""A lock that processes share by a file, with a deadline whose error names who holds it."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from corpus.problems import UsageProblem

_LOOK_S = 0.05


@contextmanager
def file_lock(path: Path, deadline_s: float) -> Iterator[IO[str]]:
    """Alone among all that lock `path`, a file of its own that is made where it is missing; gives the open file, which
    says who has it. The end of a process frees what it holds.

    Raises UsageProblem where it is not free within `deadline_s`, and OSError where it cannot be opened or locked.
    """
    with open(path, "a+", encoding="utf-8") as lock:
        give_up = time.monotonic() + deadline_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise UsageProblem(
                        f"{path} was locked for {deadline_s:g} s by {_holder(lock)}: look whether that process, or the "
                        "file system, hangs; then try again.",
                        "storage/locked",
                    ) from None
                time.sleep(_LOOK_S)
        lock.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):  # of a full disk: who waits is told less, and that is all
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        try:
            yield lock
        finally:
            lock.truncate(0)


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "a process that has not said who it is"
