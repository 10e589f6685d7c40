"""One run, one writer: the lease in a run's directory says who writes there.

run.lease is JSON: `host`, `pid`, `process` (what tells this process from a later one with the same number), `started`
(ISO time), `epoch` and `held`. The epoch grows by one with every holder and stays in the file after the lease is given
back, so that an older holder that was thought dead can be told from the present one: it must call `check` before it
commits anything, and so must the processes that write for it (`run_epoch`).

Whether a holder lives is asked of the kernel where it runs on this machine. A holder elsewhere shows that it lives by
touching the file; one that has not for a minute is taken for dead.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from amenable.durations import spoken
from amenable.json_files import write_json
from corpus.file_lock import file_lock
from corpus.problems import UsageProblem
from corpus.processes import started_ticks
from corpus.run_epoch import RunEpoch

LEASE_FILE = "run.lease"
LOCK_FILE = ".run.lease.lock"
SIGN_OF_LIFE_EVERY_S = 10.0
DEAD_AFTER_S = 60.0
SUCCESSION_S = DEAD_AFTER_S + 2 * SIGN_OF_LIFE_EVERY_S
"""Seconds after which a holder elsewhere that has just died is known to be dead, whenever it last gave a sign."""
LOCK_DEADLINE_S = 30.0
"""Seconds that the lock around the lease is waited for: it is held for a few small reads and writes. Below
DEAD_AFTER_S, so that a holder can show its life again in time."""

HELD = "lease/held"
"""The code of the UsageProblem that a live holder makes."""

Lease = TypeVar("Lease")


@dataclass(frozen=True)
class Holder:
    """What run.lease says."""

    host: str
    pid: int
    process: str
    started: str
    epoch: int
    held: bool

    @property
    def machine(self) -> str:
        return self.process.rpartition("/")[0]


def this_machine() -> str:
    """Tells whether a process number seen here means the same there: the same boot and the same set of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def mark_of_process(pid: int) -> str | None:
    """What tells the living process `pid` of this machine from any other one, ever; None where it is dead."""
    ticks = started_ticks(pid)
    return None if ticks is None else f"{this_machine()}/{ticks}"


class RunLease:
    """The right to write in a run's directory (absolute), held from `__enter__` to `__exit__`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / LEASE_FILE
        self._holder: Holder | None = None
        self._given_back = threading.Event()

    @property
    def epoch(self) -> int:
        """The number of this holder, from 1. Raises RuntimeError before the lease is taken."""
        if self._holder is None:
            raise RuntimeError("the lease is not held")
        return self._holder.epoch

    @property
    def run_epoch(self) -> RunEpoch:
        """What processes that write for this holder check. Raises RuntimeError before the lease is taken."""
        return RunEpoch(self._path, self.epoch)

    def __enter__(self) -> "RunLease":
        """Takes the lease. Raises UsageProblem, which says who holds it, where another process does and lives, or where
        one does not let go of the lock around it."""
        with self._locked() as now:
            earlier = self._read()
            if earlier is not None and earlier.held:
                self._refuse_if_alive(earlier, now)
            own = mark_of_process(os.getpid())
            assert own is not None, "this process runs"
            self._holder = Holder(
                host=socket.gethostname(),
                pid=os.getpid(),
                process=own,
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                epoch=(earlier.epoch if earlier else 0) + 1,
                held=True,
            )
            self._write(self._holder)
        self._given_back.clear()
        threading.Thread(target=self._show_life, name="run-lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the lease back, unless someone else has taken it over meanwhile."""
        self._given_back.set()
        if not self._directory.is_dir():  # removed under the run: `check` has told it, nothing is left to give back
            return
        try:
            with self._locked():
                present = self._read()
                if self._holder is not None and present is not None and present.epoch == self._holder.epoch:
                    self._write(Holder(**{**asdict(present), "held": False}))
        except UsageProblem:
            if error is None:  # else what went wrong first is what a person must hear of; a dead holder is succeeded
                raise
        self._holder = None

    def check(self) -> None:
        """Returns while this process holds the lease. Raises RunProblem once another has taken it over."""
        self.run_epoch.check()

    def _refuse_if_alive(self, holder: Holder, now: float) -> None:
        if holder.machine == this_machine():
            if mark_of_process(holder.pid) != holder.process:
                return
            remedy = f"wait for it, stop it (kill {holder.pid})"
            seen = ""
        else:
            silent_s = max(now - self._path.stat().st_mtime, 0.0)
            if silent_s > DEAD_AFTER_S:
                return
            remedy = f"wait for it, stop it, try again in {spoken(DEAD_AFTER_S)} if that machine is gone"
            seen = f", last seen {spoken(silent_s)} ago"
        raise UsageProblem(
            f"{self._directory} is in use by process {holder.pid} on {holder.host} since {holder.started}{seen}; "
            f"{remedy}, or give this run another directory with --run.",
            "lease/held",
        )

    def _show_life(self) -> None:
        holder = self._holder
        while holder is not None and not self._given_back.wait(SIGN_OF_LIFE_EVERY_S):
            try:
                if not self._directory.is_dir():
                    return
                with self._locked():
                    present = self._read()
                    if present is None or present.epoch != holder.epoch:
                        return  # taken over: `check` tells the run
                    os.utime(self._path)
            except (OSError, UsageProblem):
                continue  # a network file system may answer again, and this holder must not be taken for dead till then

    def _read(self) -> Holder | None:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageProblem(
                f"{self._path} cannot be read ({error.strerror}); give the run another directory with --run.",
                "lease/unusable",
            ) from None
        try:
            return Holder(**json.loads(text))
        except (ValueError, TypeError):
            raise UsageProblem(
                f"{self._path} cannot be read; remove it if no run writes there.", "lease/unusable"
            ) from None

    def _write(self, holder: Holder) -> None:
        write_json(self._path, asdict(holder))

    @contextmanager
    def _locked(self) -> Iterator[float]:
        """Alone in reading and changing the lease; yields the time by the clock that stamps the directory's files."""
        with ExitStack() as block:
            try:
                lock = block.enter_context(file_lock(self._directory / LOCK_FILE, LOCK_DEADLINE_S))
            except OSError as error:
                raise UsageProblem(
                    f"{self._directory} cannot be written to ({error.strerror}); give the run another directory with "
                    "--run.",
                    "lease/unusable",
                ) from None
            os.utime(lock.name)
            yield os.stat(lock.name).st_mtime


@contextmanager
def held(
    lease: Callable[[], AbstractContextManager[Lease]], patience_s: float, meanwhile: Callable[[UsageProblem], None]
) -> Iterator[Lease]:
    """What `lease` makes, held. For `patience_s` seconds a holder that may be dead is not believed to live: `meanwhile`
    is called with what was said of it, and it is looked at again. Then UsageProblem says who holds the lease."""
    give_up = time.monotonic() + patience_s
    with ExitStack() as block:
        while True:
            try:
                found = block.enter_context(lease())
                break
            except UsageProblem as problem:
                if problem.code != HELD or time.monotonic() >= give_up:
                    raise
                meanwhile(problem)
        yield found
