"""The weight store: owns the last two published snapshots, in the object store and on disk, so that they outlive the
learner that made them, and on disk the store itself.

Disks are slow and may be full; a publication waits for neither. A snapshot is written after it was handed out, by a
thread of its own, and one that a newer one has overtaken is left out.
"""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.exported_metrics import STORE_DISK_FAILURES, STORE_SNAPSHOT, STORE_UPDATE
from actors.published import PublishedFiles
from actors.snapshot_files import SnapshotFiles, Version
from actors.telemetry import Telemetry
from models.snapshot import Snapshot, verify

KEPT = 2
"""The present version, and the one before it for a generator that is still fetching."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreState:
    """Versions in the object store and on disk, oldest first; whether one is being written; why the last could not."""

    held: list[Version]
    on_disk: list[Version]
    writing: bool
    disk_problem: str | None


@ray.remote(num_cpus=0)
class WeightStore:
    """One a PPO stage. What it hands out are references into the object store: a node fetches a snapshot once."""

    def __init__(self, directory: str | None, run: str = "") -> None:
        """Snapshots are on disk in `directory`, which is this store's alone; nowhere where it is None. `run` is the
        run's tag in exported metrics."""
        self._telemetry = Telemetry(run, "weight_store")
        self._references: OrderedDict[Version, Any] = OrderedDict()
        self._files = SnapshotFiles(Path(directory), KEPT) if directory is not None else None
        self._published: PublishedFiles | None = None
        self._publish_every = 0
        self._lock = threading.Lock()
        self._next: Snapshot | None = None
        self._writing = False
        self._disk_problem: str | None = None
        if self._files is not None:
            self._files.remove_partial()

    def publish_to(self, directory: str, identity: str, every: int, kept: int) -> None:
        """From now on leave the last `kept` snapshots of every so many updates in `directory` too, for services
        elsewhere (actors/published.py). `identity` is the hash of the stage."""
        self._published, self._publish_every = PublishedFiles(Path(directory), identity, kept), every

    def put(self, snapshot: Snapshot) -> list[Any]:
        """Check and keep `snapshot`; returns its reference (in a list, so that Ray does not resolve it on the way)."""
        verify(snapshot)
        reference = self._keep(snapshot)
        if self._files is not None:
            self._write_later(snapshot, self._files)
        return [reference]

    def hold(self, snapshot: Snapshot) -> list[Any]:
        """Check `snapshot` and keep it in the object store for as long as its reference (in a list) is held."""
        verify(snapshot)
        return [ray.put(snapshot)]

    def newest(self) -> tuple[Version, list[Any]] | None:
        """Version and reference of the newest snapshot, which a store that was started again reads from disk; None
        before the first. A damaged file is passed over for the one before."""
        if not self._references and self._files is not None:
            found = self._files.newest()
            if found is not None:
                self._keep(found)
        if not self._references:
            return None
        version = next(reversed(self._references))
        return version, [self._references[version]]

    def state(self) -> StoreState:
        """What there is, and whether the disk takes it."""
        on_disk = self._files.versions() if self._files is not None else []
        with self._lock:
            return StoreState(list(self._references), on_disk, self._writing, self._disk_problem)

    def _keep(self, snapshot: Snapshot) -> Any:
        reference = ray.put(snapshot)  # owned here: a learner's death would lose what it had put itself
        self._references[snapshot.version] = reference
        self._telemetry.set(STORE_SNAPSHOT, snapshot.buffer.nbytes)
        self._telemetry.set(STORE_UPDATE, snapshot.version[1])
        while len(self._references) > KEPT:
            self._references.popitem(last=False)
        return reference

    def _write_later(self, snapshot: Snapshot, files: SnapshotFiles) -> None:
        with self._lock:
            self._next = snapshot
            if not self._writing:
                self._writing = True
                threading.Thread(target=self._write, args=(files,), name="weights to disk", daemon=True).start()

    def _write(self, files: SnapshotFiles) -> None:
        while True:
            with self._lock:
                snapshot, self._next = self._next, None
                if snapshot is None:
                    self._writing = False
                    return
            problem = None
            try:
                files.save(snapshot)
                if self._published is not None and snapshot.version[1] % self._publish_every == 0:
                    self._published.save(snapshot, files.path(snapshot.version))
            except Exception as error:  # noqa: BLE001 - the run goes on without; its checkpoint has the weights too
                problem = f"the weights of update {snapshot.version[1]} could not be written to disk: {error}"
                log.warning(problem)
                self._telemetry.add(STORE_DISK_FAILURES)
            with self._lock:
                self._disk_problem = problem
            del snapshot  # else it stays in the object store until the next one comes
