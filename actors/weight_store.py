"""The weight store: owns the last two published snapshots, in the object store and on disk, so that they outlive the
learner that made them, and on disk the store itself.

Disks and object stores are slow, may be full or away; a publication waits for neither. A snapshot is written after it
was handed out, by a thread of its own, and from the disk sent to the store by another; one that a newer one has
overtaken is left out.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.exported_metrics import PROCESS_MEMORY, STORE_SNAPSHOT, STORE_UPDATE, STORE_WRITE_FAILURES
from actors.newest_only import NewestOnly
from actors.published import PublishedFiles, PublishedSnapshot, read_published
from actors.pulse import resident_bytes
from actors.role_reports import peak_bytes
from actors.snapshot_files import SnapshotFiles, Version
from actors.stored_snapshots import StoredRun, StoredSnapshots
from actors.stored_snapshots import told as told_of_store
from actors.telemetry import Telemetry
from corpus import logs
from models.snapshot import Snapshot, verify

KEPT = 2
"""The present version, and the one before it for a generator that is still fetching."""


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
        logs.begin("weight-store")
        self._telemetry = Telemetry(run, "weight_store")
        self._references: OrderedDict[Version, Any] = OrderedDict()
        self._files = SnapshotFiles(Path(directory), KEPT) if directory is not None else None
        self._published: PublishedFiles | None = None
        self._published_in = Path()
        self._publish_every = 0
        self._to_disk = NewestOnly("weights to disk", self._write, self._told_of_disk)
        self._stored: StoredSnapshots | None = None
        self._to_store: NewestOnly[PublishedSnapshot] | None = None
        if self._files is not None:
            self._files.remove_partial()

    def publish_to(self, directory: str, identity: str, every: int, kept: int, stored: StoredRun | None = None) -> None:
        """From now on leave the last `kept` snapshots of every so many updates in `directory` too, for services
        elsewhere (actors/published.py), and in the object store that keeps the run, where one does. `identity` is the
        hash of the stage."""
        self._published_in, self._published = Path(directory), PublishedFiles(Path(directory), identity, kept)
        self._publish_every = every
        if stored is not None:
            self._stored = StoredSnapshots(stored, identity, kept)
            self._to_store = NewestOnly("weights to object store", self._stored.save, self._told_of_store)

    def put(self, snapshot: Snapshot) -> list[Any]:
        """Check and keep `snapshot`; returns its reference (in a list, so that Ray does not resolve it on the way)."""
        verify(snapshot)
        reference = self._keep(snapshot)
        if self._files is not None:
            self._to_disk.give(snapshot)
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
        return StoreState(list(self._references), on_disk, self._to_disk.is_busy, self._to_disk.problem)

    def is_settled(self) -> bool:
        """Whether all that was put is on disk and published, or could not be."""
        return not self._to_disk.is_busy and not (self._to_store is not None and self._to_store.is_busy)

    def figures(self) -> dict[str, float]:
        """Metrics: the memory of this process and, where an object store keeps the run, snapshots that are there since
        the stage began, and those that did not arrive."""
        self._telemetry.set(PROCESS_MEMORY, resident_bytes())
        figures = {"memory/weight_store_bytes": float(peak_bytes())}
        if self._stored is not None and self._to_store is not None:
            figures["published/stored"] = float(self._stored.saved)
            figures["published/failed"] = float(self._to_store.failed)
        return figures

    def _keep(self, snapshot: Snapshot) -> Any:
        reference = ray.put(snapshot)  # owned here: a learner's death would lose what it had put itself
        self._references[snapshot.version] = reference
        self._telemetry.set(STORE_SNAPSHOT, snapshot.buffer.nbytes)
        self._telemetry.set(STORE_UPDATE, snapshot.version[1])
        while len(self._references) > KEPT:
            self._references.popitem(last=False)
        return reference

    def _write(self, snapshot: Snapshot) -> None:
        assert self._files is not None
        self._files.save(snapshot)
        if self._published is None or snapshot.version[1] % self._publish_every:
            return
        self._published.save(snapshot, self._files.path(snapshot.version))
        one = read_published(self._published_in, snapshot.version)
        if self._to_store is not None and one is not None:
            self._to_store.give(one)

    def _told_of_disk(self, snapshot: Snapshot, error: Exception) -> str:
        # The run goes on without; its checkpoint has the weights too.
        self._telemetry.add(STORE_WRITE_FAILURES, place="disk")
        return f"the weights of update {snapshot.version[1]} could not be written to disk: {error}"

    def _told_of_store(self, one: PublishedSnapshot, error: Exception) -> str:
        self._telemetry.add(STORE_WRITE_FAILURES, place="object_store")
        return told_of_store(one.version, error)
