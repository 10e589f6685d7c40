"""The run of a service: its files on this machine, and where what is wanted and what replicas say is kept."""

from dataclasses import dataclass
from pathlib import Path

from corpus.storage import is_object_store, without_options
from corpus.working_copies import mirror
from serving.desired import Place
from serving.mirror import STAGES_S, Mirror
from serving.names import Names
from serving.stored_sessions import StoredSessions


@dataclass(frozen=True)
class ServedRun:
    """A run, in a directory that this machine sees or in an object store."""

    place: Place
    """The directory, or the address in an object store."""
    root: Path
    """Its files on this machine: the directory itself, or the mirror's."""
    mirror: Mirror | None
    """What brings them here; None where they are here."""

    @classmethod
    def of(cls, run: str) -> "ServedRun":
        """The run meant by a path or an address. Raises UsageProblem for an address that cannot be understood."""
        place = place_of(run)
        if isinstance(place, Path):
            return cls(place, place, None)
        root = mirror(place)
        return cls(place, root, Mirror(place, root))

    @property
    def name(self) -> str:
        """What people are told of where the run is: its path, or its address without options."""
        return without_options(self.place) if isinstance(self.place, str) else str(self.place)

    @property
    def title(self) -> str:
        """Its last part."""
        return self.name.rpartition("/")[2]

    @property
    def names(self) -> Names:
        """Its models; their weights are brought here when they are checked."""
        return Names(self.root, None if self.mirror is None else self.mirror.fetch)

    @property
    def sessions(self) -> StoredSessions | None:
        """What machines that share nothing but the store know of browsers' sessions; None where they share files."""
        return StoredSessions(self.place) if isinstance(self.place, str) else None

    def keep(self, path: Path) -> None:
        """Brings a file that was made below `root` to where the run is kept. Raises RunProblem where it refuses."""
        if self.mirror is not None:
            self.mirror.send(path)

    def look(self, every_s: float = 0.0) -> None:
        """Has the files here, but for weights, be as the run's are; a look less than `every_s` ago will do.
        Raises RunProblem where the store does not answer; files that are the run's own need no look."""
        if self.mirror is not None:
            self.mirror.look(every_s, max(every_s, STAGES_S) if every_s else 0.0)


def place_of(run: str) -> Place:
    """The run meant by a path or an address, which is not looked at."""
    return run if is_object_store(run) else Path(run)
