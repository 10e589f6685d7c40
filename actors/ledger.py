"""Which slot is where: a pure state machine that the stream actor is a thin shell over.

Invariants, whatever the order of leases, deliveries, expiries and restarts:
- Slot i is admitted iff i < (version + max_staleness + 1) · batch_size, so no token that trains in batch k was written
  by weights older than version k − max_staleness.
- A slot is accepted at most once; a second delivery, or one of an older attempt, changes nothing.
- A slot that was leased and did not come back is leased again; none is lost.
- Nothing is leased to a holder that is excluded: it may miss the weights that admit further slots.
- Batches are trained in order, each once: batch k holds slots [k·batch_size, (k+1)·batch_size) and nothing else.
- Tokens of weights of another attempt than the present one are refused.
- Whoever acts for an attempt that is not the present one is refused, and after a restart nothing is leased until the
  engines hold weights of the new attempt: until then they hold weights that may have been rolled back.

What is counted is a history, by attempt: a restart rolls back slots, and no count. A ledger that is restored knows of
every attempt what the checkpoint or it itself has seen.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

from corpus.problems import RunProblem

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Lease:
    """Who generates chunk `chunk`, since when, and until when nobody else is asked. Times are Unix seconds."""

    chunk: int
    holder: str
    since: float
    deadline: float


@dataclass
class Counts:
    """What happened in one attempt, in slots."""

    admitted: int = 0
    """From the first one that was not trained when it began to the last that was admitted."""
    leased: int = 0
    generated: int = 0
    """Delivered, and accepted."""
    regenerated: int = 0
    """Leased, and free again before they were delivered: the lease expired or its holder died."""
    duplicates: int = 0
    """Delivered though accepted already: they changed nothing."""
    refused: int = 0
    """Delivered for this attempt after it had ended: they changed nothing."""
    trained: int = 0
    """Given to training; a later attempt may have rolled that back."""
    discarded: int = 0
    """Generated in this attempt, accepted, and rolled back by a later one."""

    def plus(self, others: "Counts") -> "Counts":
        """Both together."""
        return Counts(**{each.name: getattr(self, each.name) + getattr(others, each.name) for each in fields(self)})

    def with_at_least(self, others: "Counts") -> "Counts":
        """The higher of each count: counts only grow, so of two pictures of one attempt it is the later."""
        return Counts(**{each.name: max(getattr(self, each.name), getattr(others, each.name)) for each in fields(self)})


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
        self.counts: dict[int, Counts] = {0: Counts()}
        """By attempt."""
        self._start = 0
        """Batches trained when the present attempt began."""
        self._waits_for_weights = False
        self._leases: dict[int, Lease] = {}
        self._excluded: set[str] = set()
        self._accepted: dict[int, int] = {}
        """By slot that is accepted and not trained: the attempt it was generated in."""
        self._trained_from: Counter[int] = Counter()
        """By attempt: how many of the slots that are trained were generated in it."""
        self._count_admitted()

    # admission -------------------------------------------------------------------------------------------------

    @property
    def admitted(self) -> int:
        """Slots below this index may be generated now."""
        return min(self.version + self.max_staleness + 1, self.batches) * self.batch_size

    def _count_admitted(self) -> None:
        now = self.counts[self.attempt]
        now.admitted = max(now.admitted, self.admitted - self._start * self.batch_size)

    def lease(self, holder: str, chunks: int, now: float, seconds: float) -> list[Lease]:
        """Up to `chunks` leases, lowest slots first; an expired lease counts as free. None before the engines hold
        weights of the present attempt, and none to a holder that is excluded."""
        if self._waits_for_weights or holder in self._excluded:
            return []
        granted = []
        for chunk in range(self.trained * self.batch_size // self.chunk_size, self.admitted // self.chunk_size):
            if len(granted) == chunks:
                break
            open_slots = self._open(chunk)
            if not open_slots:
                continue
            held = self._leases.get(chunk)
            if held is not None and held.deadline > now:
                continue
            counts = self.counts[self.attempt]
            counts.regenerated += open_slots if held is not None else 0
            counts.leased += open_slots
            granted.append(Lease(chunk, holder, now, now + seconds))
        self._leases.update({lease.chunk: lease for lease in granted})
        return granted

    @property
    def next_expiry(self) -> float | None:
        """When the first of the leases ends, in Unix seconds; None where nothing is leased."""
        return min((lease.deadline for lease in self._leases.values()), default=None)

    def exclude(self, holder: str) -> None:
        """Lease nothing more to `holder`, over restarts too. What it has leased stays with it."""
        self._excluded.add(holder)

    def excludes(self, holder: str) -> bool:
        """Whether nothing is leased to `holder` any more."""
        return holder in self._excluded

    def release(self, holder: str) -> int:
        """Exclude `holder` and free what it has leased (it died, or stopped). Returns how many chunks became free."""
        self.exclude(holder)
        held = [chunk for chunk, lease in self._leases.items() if lease.holder == holder]
        for chunk in held:
            del self._leases[chunk]
            self.counts[self.attempt].regenerated += self._open(chunk)
        return len(held)

    def slots(self, chunk: int) -> range:
        """The slots of a chunk."""
        return range(chunk * self.chunk_size, (chunk + 1) * self.chunk_size)

    def _open(self, chunk: int) -> int:
        """How many slots of a chunk are not accepted."""
        return sum(slot not in self._accepted for slot in self.slots(chunk))

    # delivery --------------------------------------------------------------------------------------------------

    def accept(
        self, slots: Iterable[int], attempt: int, written_by: Sequence[tuple[int, int]] | None = None
    ) -> list[int]:
        """The slots among these that are new and now accepted; the rest were duplicates, late, or of an old attempt.

        `written_by` are, slot by slot, the oldest weights, (attempt, update), that wrote a token of it. Raises
        RunProblem for a slot that is not admitted, or whose tokens are of another attempt or would be too old when it
        is trained; then nothing is accepted.
        """
        slots = list(slots)
        if attempt != self.attempt:
            self.counts.setdefault(attempt, Counts()).refused += len(slots)
            return []
        fresh: list[int] = []
        for place, slot in enumerate(slots):
            if slot in self._accepted or slot in fresh or slot < self.trained * self.batch_size:
                continue
            if slot >= self.admitted:
                raise RunProblem(
                    f"Slot {slot} was delivered but is not admitted yet: only {self.admitted} are.", "episodes/order"
                )
            if written_by is not None:
                self._refuse_weights(slot, *written_by[place])
            fresh.append(slot)
        counts = self.counts[attempt]
        counts.duplicates += len(slots) - len(fresh)
        counts.generated += len(fresh)
        self._accepted.update(dict.fromkeys(fresh, attempt))
        for chunk in {slot // self.chunk_size for slot in fresh}:
            if not self._open(chunk):
                self._leases.pop(chunk, None)
        return fresh

    def _refuse_weights(self, slot: int, attempt: int, update: int) -> None:
        """Raises RunProblem where a token of `slot` may not be of these weights."""
        if attempt != self.attempt:
            raise RunProblem(
                f"Slot {slot} was delivered with tokens of weights {update} of attempt {attempt}, but attempt "
                f"{self.attempt} is the present one.",
                "episodes/order",
            )
        oldest = slot // self.batch_size - self.max_staleness
        if update < oldest:
            raise RunProblem(
                f"Slot {slot} was delivered with tokens of weights {update}, but trains in batch "
                f"{slot // self.batch_size}, where none may be older than {oldest}.",
                "episodes/order",
            )

    @property
    def accepted(self) -> Set[int]:
        """The slots that are accepted and not trained."""
        return self._accepted.keys()

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

    def refuse_other_attempts(self, attempt: int, what: str) -> None:
        """Returns where `attempt` is the present one. Raises RunProblem, which says `what` the other one did."""
        if attempt != self.attempt:
            raise RunProblem(
                f"Attempt {attempt} {what}, but attempt {self.attempt} is the present one.", "episodes/order"
            )

    def train(self, batch: int, attempt: int) -> None:
        """Record that `batch` was trained. Raises RunProblem unless it is the next one, complete, and of the present
        attempt."""
        self.refuse_other_attempts(attempt, f"trained batch {batch}")
        if batch != self.trained:
            raise RunProblem(
                f"Batch {batch} was given to training, but batch {self.trained} is next.", "episodes/order"
            )
        missing = self.missing(batch)
        if missing:
            raise RunProblem(f"Batch {batch} was given to training without its slots {missing[:8]}.", "episodes/order")
        self.trained += 1
        self.counts[attempt].trained += self.batch_size
        self._trained_from.update(self._accepted.pop(slot) for slot in self.batch_slots(batch))

    def advance(self, attempt: int, version: int) -> None:
        """Weights `version` of `attempt` are in the engines. Raises RunProblem for another attempt, a step back, or
        weights of more updates than were trained."""
        self.refuse_other_attempts(attempt, "published weights")
        if version < self.version:
            raise RunProblem(f"Version {version} was published after version {self.version}.", "episodes/order")
        if version > self.trained:
            raise RunProblem(
                f"Version {version} was published, but {self.trained} batches are trained.", "episodes/order"
            )
        self.version = version
        self._waits_for_weights = False
        self._count_admitted()

    # checkpoints -----------------------------------------------------------------------------------------------

    def state(self, attempt: int) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON. Leases are not kept: whoever held them is asked again, or gone.

        Raises RunProblem where `attempt`, which wants to save it, is not the present one.
        """
        self.refuse_other_attempts(attempt, "wanted to save a checkpoint")
        return {
            "schema_version": SCHEMA_VERSION,
            "attempt": self.attempt,
            "version": self.version,
            "trained": self.trained,
            "accepted": sorted([slot, generated_in] for slot, generated_in in self._accepted.items()),
            "trained_from": sorted([generated_in, slots] for generated_in, slots in self._trained_from.items()),
            "counts": {str(number): asdict(counts) for number, counts in sorted(self.counts.items())},
        }

    def restore(self, state: dict[str, Any] | None, attempt: int, history: Mapping[int, Counts] | None = None) -> None:
        """Go back to `state` (None: to the beginning) under a new `attempt`; whatever acts for another is refused from
        now on. `history` are counts that are known from elsewhere.

        Raises RunProblem where the number is not new, or the state is of a schema that is not known.
        """
        state = _as_written_now(state, self.batch_size)
        latest = max(self.attempt, state["attempt"])
        if attempt <= latest:
            raise RunProblem(f"Attempt {attempt} cannot follow attempt {latest}.", "episodes/order")
        self.attempt = attempt
        self.version = state["version"]
        self.trained = self._start = state["trained"]
        self._accepted = dict(state["accepted"])
        self._trained_from = Counter(dict(state["trained_from"]))
        self._leases = {}
        self._waits_for_weights = True
        saved = {int(number): Counts(**counted) for number, counted in state["counts"].items()}
        for number, counted in (*saved.items(), *(history or {}).items()):
            self.counts[number] = self.counts.get(number, Counts()).with_at_least(counted)
        kept = self._trained_from + Counter(self._accepted.values())
        for number, counts in self.counts.items():
            counts.discarded = max(0, counts.generated - kept[number])
        self.counts.setdefault(attempt, Counts())
        self._count_admitted()


def _as_written_now(state: dict[str, Any] | None, batch_size: int) -> dict[str, Any]:
    """`state` in the present schema. Version 1 did not say in which attempt a slot was generated: its own is taken."""
    if state is None:
        return {"attempt": -1, "version": 0, "trained": 0, "accepted": [], "trained_from": [], "counts": {}}
    if state["schema_version"] == SCHEMA_VERSION:
        return state
    if state["schema_version"] != 1:
        raise RunProblem(
            f"The ledger in the checkpoint is of schema version {state['schema_version']}; this program reads 1 and "
            f"{SCHEMA_VERSION}.",
            "run/schema-version",
        )
    number, trained = state["attempt"], state["trained"] * batch_size
    regenerated, duplicates, refused = state["counts"]
    counted = Counts(
        generated=trained + len(state["accepted"]),
        regenerated=regenerated,
        duplicates=duplicates,
        refused=refused,
        trained=trained,
    )
    return {
        **state,
        "accepted": [[slot, number] for slot in state["accepted"]],
        "trained_from": [[number, trained]],
        "counts": {str(number): asdict(counted)},
    }
