"""One run, one writer, where the run is kept in an object store: the lease is an object that its holder renews.

Claims are objects `leases/epoch-NNNNNN-RANDOM.json` of the run, whose content is a `Holder`; the highest epoch counts.
To take the lease is to write a claim of the next epoch and to list the claims again: who sees another one of its own
epoch, or a later one, takes its claim back. Listings of S3 and Google's store show all that was written before, so of
two that claim at once the later one sees the earlier: never do both go on, though both may take their claims back, wait
for a random time and try again.

A holder renews its claim every ten seconds. One elsewhere that has not for a minute, by the store's own clock, is taken
for dead; one of this machine is asked of the kernel. Whoever commits looks first whether its epoch still is the highest
(`RunEpoch.check`). There is no conditional write in pyarrow.fs: a holder that was stopped for more than a minute
between that look and its write still lands that one write.
"""

import json
import os
import random
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pyarrow import fs

from amenable.durations import spoken
from amenable.run_lease import (
    DEAD_AFTER_S,
    SIGN_OF_LIFE_EVERY_S,
    Holder,
    RunLease,
    mark_of_process,
    this_machine,
)
from corpus.problems import RunProblem, UsageProblem
from corpus.run_epoch import RunEpoch, claim_name, claims_in, epoch_of
from corpus.storage import below, one_line, opened, without_options

LEASES = "leases"
TRIES = 6
"""Times that the lease is tried where others claim it at the same moment. House default."""
LAST_SIGN_S = 30.0
"""Seconds that the end of a run waits for a renewal of its claim that is under way. House default."""


class StoreLease:
    """The right to write in the run at `address`, and in its working copy, held from `__enter__` to `__exit__`."""

    def __init__(self, address: str, working_copy: Path) -> None:
        self._address = below(address, LEASES)
        self._filesystem, self._inner = opened(self._address)
        self._run = without_options(address)
        self._local = RunLease(working_copy)
        self._holder: Holder | None = None
        self._claim = ""
        self._given_back = threading.Event()
        self._life: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        """The number of this holder, from 1. Raises RuntimeError before the lease is taken."""
        if self._holder is None:
            raise RuntimeError("the lease is not held")
        return self._holder.epoch

    @property
    def run_epoch(self) -> RunEpoch:
        """What processes that write for this holder check. Raises RuntimeError before the lease is taken."""
        return RunEpoch(self._address, self.epoch)

    def __enter__(self) -> "StoreLease":
        """Takes the lease. Raises UsageProblem, which says who holds it, where another process does and lives; and
        where the store cannot be read or written."""
        self._local.__enter__()  # first: two commands of one machine share the working copy, and this needs no guess
        try:
            self._take()
        except OSError as error:
            self._local.__exit__(None, None, None)
            raise UsageProblem(f"{self._run} cannot be written to ({one_line(error)}).", "lease/unusable") from error
        except BaseException:
            self._local.__exit__(None, None, None)
            raise
        self._given_back.clear()
        self._life = threading.Thread(target=self._show_life, name="store-lease", daemon=True)
        self._life.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the lease back, unless someone else has taken it over meanwhile."""
        self._given_back.set()
        if self._life is not None:
            self._life.join(LAST_SIGN_S)  # what it writes must not come after what is written here
        try:
            if self._holder is not None and self._is_mine():
                self._write(replace(self._holder, held=False))
        except OSError as problem:
            if kind is None:  # else what went wrong before is what a person must hear of
                raise RunProblem(
                    f"{self._run}: the lease could not be given back ({one_line(problem)}).", "lease/unusable"
                ) from problem
        finally:
            self._holder = None
            self._local.__exit__(kind, error, trace)

    def check(self) -> None:
        """Returns while this process holds the lease. Raises RunProblem once another has taken it over."""
        self.run_epoch.check()

    def _take(self) -> None:
        own = mark_of_process(os.getpid())
        assert own is not None, "this process runs"
        for _ in range(TRIES):
            earlier = self._claims()
            if earlier:
                self._refuse_if_alive(earlier[-1])
            epoch = epoch_of(earlier[-1].base_name) + 1 if earlier else 1
            self._claim = f"{self._inner}/{claim_name(epoch, uuid.uuid4().hex[:12])}"
            started = datetime.now(UTC).isoformat(timespec="seconds")
            holder = Holder(socket.gethostname(), os.getpid(), own, started, epoch, held=True)
            self._write(holder)
            rivals = [each for each in self._claims() if epoch_of(each.base_name) >= epoch and each.path != self._claim]
            if not rivals:
                self._holder = holder
                for each in earlier:
                    self._delete(each.path)
                return
            self._delete(self._claim)
            time.sleep(random.uniform(0.2, 2.0))
        raise UsageProblem(f"{self._run} is being taken by another process at this moment; try again.", "lease/held")

    def _refuse_if_alive(self, claim: fs.FileInfo) -> None:
        try:
            with self._filesystem.open_input_stream(claim.path, compression=None) as stream:
                holder = Holder(**json.loads(stream.read()))
        except FileNotFoundError:
            return  # taken back meanwhile
        except (ValueError, TypeError):
            told = f"{self._run}: {claim.base_name} is no lease; remove it if no run writes there."
            raise UsageProblem(told, "lease/unusable") from None
        if not holder.held:
            return
        if holder.machine == this_machine():
            if mark_of_process(holder.pid) != holder.process:
                return
            remedy, seen = f"wait for it, stop it (kill {holder.pid})", ""
        else:
            silent_s = max(self._now() - claim.mtime_ns / 1e9, 0.0)
            if silent_s > DEAD_AFTER_S:
                return
            remedy = f"wait for it, stop it, try again in {spoken(DEAD_AFTER_S)} if that machine is gone"
            seen = f", last seen {spoken(silent_s)} ago"
        raise UsageProblem(
            f"{self._run} is in use by process {holder.pid} on {holder.host} since {holder.started}{seen}; {remedy}, "
            "or give this run another directory with --run.",
            "lease/held",
        )

    def _now(self) -> float:
        """Unix seconds by the store's clock, which stamps the claims."""
        knock = f"{self._inner}/knock-{uuid.uuid4().hex[:12]}"
        with self._filesystem.open_output_stream(knock) as stream:
            stream.write(b"what time is it?")
        now = self._filesystem.get_file_info(knock).mtime_ns / 1e9
        self._delete(knock)
        return now

    def _show_life(self) -> None:
        holder = self._holder
        while holder is not None and not self._given_back.wait(SIGN_OF_LIFE_EVERY_S):
            try:
                if not self._is_mine():
                    return  # taken over: `check` tells the run
                self._write(holder)
            except OSError:
                continue  # the store may answer again, and this holder must not be taken for dead till then

    def _is_mine(self) -> bool:
        claims = self._claims()
        return bool(claims) and claims[-1].path == self._claim

    def _claims(self) -> list[fs.FileInfo]:
        return claims_in(self._address)[1]

    def _write(self, holder: Holder) -> None:
        with self._filesystem.open_output_stream(self._claim) as stream:
            stream.write(json.dumps(asdict(holder), indent=2).encode())

    def _delete(self, inner: str) -> None:
        with suppress(FileNotFoundError):  # someone else has
            self._filesystem.delete_file(inner)
