"""The files of a run that somebody else works on, as a command that only looks finds them again and again.

A run in a directory is looked at where it is. Of a run in an object store only its small files come, into a directory
of this command's own, and of them only what has changed; they are as of the run's last checkpoint or stage. Where a
command works on such a run on this very machine, its working copy is newer, and is looked at instead.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from amenable.run_directory import RunDirectory
from amenable.run_lease import DEAD_AFTER_S, LEASE_FILE, Holder, mark_of_process, this_machine
from amenable.run_view import NOBODY, Writer
from amenable.store_lease import LEASES
from corpus.problems import RunProblem
from corpus.run_epoch import claims_in
from corpus.storage import below, one_line
from corpus.stored_directory import StoredDirectory

SMALL_FILES = (
    "recipe.yaml",
    "summary.json",
    "failure.json",
    "stage.json",
    "stage.started.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "workers.json",
    "fleet.json",
    "desired.json",
)


@dataclass(frozen=True)
class Watched:
    """Where the files are, and what is called before each look: it brings them up to date and says who works on the
    run. It raises RunProblem where the store cannot be read."""

    root: Path
    refresh: Callable[[], Writer]


@contextmanager
def watched(run: RunDirectory) -> Iterator[Watched]:
    """The run's files within the block."""
    stored = run.stored
    if stored is None or writer_in(run.root).is_alive:
        yield Watched(run.root, lambda: writer_in(run.root))
        return
    with tempfile.TemporaryDirectory(prefix="amenable-") as temporary:
        copy = StoredDirectory(stored.address, Path(temporary), stored.local, stored.commits)

        def refresh() -> Writer:
            copy.pull(_is_small)
            return writer_at(stored.address)

        yield Watched(copy.root, refresh)


def writer_in(directory: Path) -> Writer:
    """Who has the lease of the run in `directory`, or had it last. One of another machine lives while it touches the
    lease."""
    path = directory / LEASE_FILE
    try:
        holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
        seen_at = path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return NOBODY
    return _writer(holder, seen_at, time.time())


def writer_at(address: str) -> Writer:
    """The same of the run at an address in an object store, whose clock stamps the claims. Raises RunProblem."""
    try:
        filesystem, claims = claims_in(below(address, LEASES))
        if not claims:
            return NOBODY
        with filesystem.open_input_stream(claims[-1].path, compression=None) as stream:
            holder = Holder(**json.loads(stream.read()))
    except FileNotFoundError:  # given back meanwhile
        return NOBODY
    except OSError as error:
        raise RunProblem(f"Who works on the run cannot be read ({one_line(error)}).", "storage/read") from error
    except (ValueError, TypeError):
        return NOBODY
    return _writer(holder, (claims[-1].mtime_ns or 0) / 1e9, time.time())


def _writer(holder: Holder, seen_at: float, now: float) -> Writer:
    said = f"{holder.host}, process {holder.pid}"
    if holder.machine == this_machine():
        alive = mark_of_process(holder.pid) == holder.process
    else:
        alive = now - seen_at <= DEAD_AFTER_S
    return Writer(said, holder.held and alive, seen_at)


def _is_small(path: str) -> bool:
    name = os.path.basename(path)
    inside_an_export = path.count("/") > 2 and "/attempts/" not in path
    return not inside_an_export and (name in SMALL_FILES or name.startswith("attempt-"))
