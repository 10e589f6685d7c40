"""Which slot is where: a pure state machine that the stream actor is a thin shell over.

Invariants, whatever the order of leases, deliveries, expiries and restarts:
- Slot i is admitted iff i < (version + max_staleness + 1) · batch_size, so no token that trains in batch k was written
  by weights older than version k − max_staleness.
- A slot is accepted at most once; a second delivery, or one of an older attempt, changes nothing.
- A slot that was leased and did not come back is leased again; none is lost.
- Batches are trained in order, each once: batch k holds slots [k·batch_size, (k+1)·batch_size) and nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corpus.problems import RunProblem

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Lease:
    """Who generates chunk `chunk`, since when, and until when nobody else is asked. Times are Unix seconds."""

    chunk: int
    holder: str
    since: float
    deadline: float


class Ledger:
    """Slots of `batches` batches of `batch_size`, leased in chunks of `chunk_size` consecutive slots."""

    def __init__(self, batch_size: int, chunk_size: int, max_staleness: int, batches: int) -> None:
        if batch_size % chunk_size:
            raise ValueError(f"a batch of {batch_size} slots is not a whole number of chunks of {chunk_size}")
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.max_staleness = max_staleness
        self.batches = batches
        self.attempt = 0
        self.version = 0
        self.trained = 0
        """Batches trained so far: the frontier."""
        self._leases: dict[int, Lease] = {}
        self._accepted: set[int] = set()
        self.regenerated = 0
        self.duplicates = 0
        self.refused = 0

    # admission -------------------------------------------------------------------------------------------------

    @property
    def admitted(self) -> int:
        """Slots below this index may be generated now."""
        return min(self.version + self.max_staleness + 1, self.batches) * self.batch_size

    def lease(self, holder: str, chunks: int, now: float, seconds: float) -> list[Lease]:
        """Up to `chunks` leases, lowest slots first; an expired lease counts as free."""
        granted = []
        for chunk in range(self.trained * self.batch_size // self.chunk_size, self.admitted // self.chunk_size):
            if len(granted) == chunks:
                break
            if self._slots(chunk) <= self._accepted:
                continue
            held = self._leases.get(chunk)
            if held is not None and held.deadline > now:
                continue
            self.regenerated += held is not None
            granted.append(Lease(chunk, holder, now, now + seconds))
        self._leases.update({lease.chunk: lease for lease in granted})
        return granted

    def release(self, holder: str) -> int:
        """Free what `holder` has leased (it died, or stopped). Returns how many chunks became free."""
        held = [chunk for chunk, lease in self._leases.items() if lease.holder == holder]
        for chunk in held:
            del self._leases[chunk]
            self.regenerated += 1
        return len(held)

    def slots(self, chunk: int) -> range:
        """The slots of a chunk."""
        return range(chunk * self.chunk_size, (chunk + 1) * self.chunk_size)

    def _slots(self, chunk: int) -> set[int]:
        return set(self.slots(chunk))

    # delivery --------------------------------------------------------------------------------------------------

    def accept(self, slots: Iterable[int], attempt: int) -> list[int]:
        """The slots among these that are new and now accepted; the rest were duplicates, late, or of an old attempt."""
        slots = list(slots)
        if attempt != self.attempt:
            self.refused += len(slots)
            return []
        fresh = []
        for slot in slots:
            if slot in self._accepted or slot < self.trained * self.batch_size:
                self.duplicates += 1
            elif slot >= self.admitted:
                raise RunProblem(f"Slot {slot} was delivered but is not admitted yet: only {self.admitted} are.")
            else:
                self._accepted.add(slot)
                fresh.append(slot)
        for chunk in {slot // self.chunk_size for slot in fresh}:
            if self._slots(chunk) <= self._accepted:
                self._leases.pop(chunk, None)
        return fresh

    def missing(self, batch: int) -> list[int]:
        """Slots of `batch` that are not accepted yet."""
        return [slot for slot in self.batch_slots(batch) if slot not in self._accepted]

    def owed_by(self, batch: int, now: float) -> dict[str, float]:
        """For every holder that still owes slots of `batch`: the age in seconds of its oldest lease."""
        owed: dict[str, float] = {}
        for chunk in {slot // self.chunk_size for slot in self.missing(batch)}:
            lease = self._leases.get(chunk)
            holder = lease.holder if lease else "nobody"
            owed[holder] = max(owed.get(holder, 0.0), now - lease.since if lease else 0.0)
        return owed

    def batch_slots(self, batch: int) -> range:
        """The slots of a batch."""
        return range(batch * self.batch_size, (batch + 1) * self.batch_size)

    # training --------------------------------------------------------------------------------------------------

    def train(self, batch: int) -> None:
        """Record that `batch` was trained. Raises RunProblem unless it is the next one and complete."""
        if batch != self.trained:
            raise RunProblem(f"Batch {batch} was given to training, but batch {self.trained} is next.")
        missing = self.missing(batch)
        if missing:
            raise RunProblem(f"Batch {batch} was given to training without its slots {missing[:8]}.")
        self.trained += 1
        self._accepted.difference_update(self.batch_slots(batch))

    def advance(self, attempt: int, version: int) -> None:
        """Weights `version` of `attempt` are in the engines. Raises RunProblem for an old attempt or a step back."""
        if attempt != self.attempt:
            raise RunProblem(f"Attempt {attempt} published weights, but attempt {self.attempt} is the present one.")
        if version < self.version:
            raise RunProblem(f"Version {version} was published after version {self.version}.")
        self.version = version

    # checkpoints -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. Leases are not kept: whoever held them is asked again, or gone."""
        return {
            "schema_version": SCHEMA_VERSION,
            "attempt": self.attempt,
            "version": self.version,
            "trained": self.trained,
            "accepted": sorted(self._accepted),
            "counts": [self.regenerated, self.duplicates, self.refused],
        }

    def restore(self, state: dict[str, Any], attempt: int) -> None:
        """Go back to `state` under a new `attempt`; deliveries of older attempts are refused from now on."""
        if attempt <= state["attempt"]:
            raise RunProblem(f"Attempt {attempt} cannot follow attempt {state['attempt']}.")
        self.attempt = attempt
        self.version = state["version"]
        self.trained = state["trained"]
        self._accepted = set(state["accepted"])
        self._leases = {}
        self.regenerated, self.duplicates, self.refused = state["counts"]
