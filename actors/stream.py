"""The episode stream: leases slots to generators, keeps what they deliver, hands whole batches to the learners.

A thin shell over `actors.ledger`: it adds waiting with deadlines, the rows themselves, and Parquet, the audit trail.

Nothing in it grows with the length of a run. Rows are those of slots that are admitted and not trained: at most
(max_staleness + 1) batches, because no version is admitted beyond what is trained. A change is one event that all who
wait for it share; a failure is kept once, and so is the name of a generator that has left (restarts have a budget).
Who waits are one call a generator, for a lease, and one a learner rank, for a batch, each until its deadline.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from actors.attempts import read_counts, write_counts
from actors.episodes import EPISODE, Chunk, PromptOrder, Slot, episode_seed, oldest_weights, with_scores
from actors.exported_metrics import (
    PROCESS_MEMORY,
    STREAM_ADMITTED,
    STREAM_ATTEMPT,
    STREAM_AWAITED,
    STREAM_SLOTS,
    STREAM_TRAINED,
    STREAM_WAITING,
)
from actors.failures import Problem
from actors.ledger import Counts, Ledger
from actors.pulse import resident_bytes
from actors.role_reports import peak_bytes
from actors.telemetry import Telemetry
from corpus import logs
from corpus.problems import RunProblem, code_in_traceback
from corpus.schemas import read_table
from corpus.storage import write_atomically

OUTCOMES = ("leased", "generated", "regenerated", "duplicates", "refused", "trained", "discarded")
"""Of slots, as the ledger counts them and they are exported."""


class StreamPlan:
    """What the stream needs to know of a PPO stage. Sizes are in slots, times in seconds.

    `directory` is where episodes are written; the counts of attempts go beside it (see `actors.attempts`). `run` is the
    run's tag in exported metrics.
    """

    def __init__(
        self,
        *,
        prompts: str,
        directory: str,
        seed: int,
        round_number: int,
        batch_size: int,
        chunk_size: int,
        max_staleness: int,
        batches: int,
        lease_s: float,
        run: str = "",
    ) -> None:
        self.prompts = prompts
        self.directory = directory
        self.seed = seed
        self.round_number = round_number
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.max_staleness = max_staleness
        self.batches = batches
        self.lease_s = lease_s
        self.run = run


@ray.remote(num_cpus=0)
class EpisodeStream:
    """One a PPO stage. All methods are coroutines of one event loop, so each runs undisturbed between its awaits."""

    def __init__(self, plan: StreamPlan) -> None:
        logs.begin("stream")
        self._plan = plan
        self._ledger = Ledger(plan.batch_size, plan.chunk_size, plan.max_staleness, plan.batches)
        with code_in_traceback():
            table = read_table(plan.prompts, "prompts")
        self._prompt_ids: list[str] = table["prompt_id"].to_pylist()
        self._prompt_tokens: list[list[int]] = table["prompt_tokens"].to_pylist()
        self._order = PromptOrder(len(self._prompt_ids), plan.seed)
        self._rows: dict[int, pa.RecordBatch] = {}
        self._writing: tuple[int, asyncio.Task[None]] | None = None
        """The batch that was taken last, and the writing of its Parquet, which every rank that takes it waits for."""
        self._freed = asyncio.Event()
        """Set, and replaced, when slots may have become free to lease. Apart from `_delivered`, because there are many
        deliveries, and nobody who waits for slots gets any by one."""
        self._delivered = asyncio.Event()
        """Set, and replaced, when a batch may have become complete, or never will."""
        self._failure: Problem | None = None
        self._suspended: frozenset[str] = frozenset()
        """Holders that are given nothing for now."""
        self._awaiting = 0
        """Ranks of the learner that wait for a batch."""
        self._telemetry = Telemetry(plan.run, "stream")
        self._telemetry.set(STREAM_AWAITED, 0.0)
        self._telemetry.set(STREAM_TRAINED, time.time())

    def _wake_holders(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    def _wake_learners(self) -> None:
        self._delivered.set()
        self._delivered = asyncio.Event()

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        """Until `event`, for `seconds` at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), max(seconds, 0.0))

    # generators --------------------------------------------------------------------------------------------------

    async def lease(self, holder: str, chunks: int, wait_s: float) -> list[Chunk] | None:
        """Up to `chunks` chunks of slots for `holder` to generate; waits up to `wait_s` for the first.

        None, at once, where `holder` was excluded or released: it gets no more, and need not ask again.
        """
        deadline = time.monotonic() + wait_s
        while True:
            if self._ledger.excludes(holder):
                return None
            now = time.time()
            waits = holder in self._suspended
            leases = [] if waits else self._ledger.lease(holder, chunks, now, self._plan.lease_s)
            if leases:
                return [
                    Chunk([self._slot(index) for index in self._ledger.slots(lease.chunk)], self._ledger.attempt, now)
                    for lease in leases
                ]
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return []
            expiry = None if waits else self._ledger.next_expiry
            await self._wait(self._freed, remaining if expiry is None else min(remaining, expiry - time.time()))

    def _slot(self, index: int) -> Slot:
        row = self._order[index]
        seed = episode_seed(self._plan.seed, self._plan.round_number, index)
        return Slot(index, self._prompt_ids[row], self._prompt_tokens[row], seed)

    async def accept(
        self, episodes: pa.RecordBatch, scores: Sequence[float], reference_logprobs: Sequence[Sequence[float]]
    ) -> int:
        """Keep what is new of a scored chunk; returns how many episodes that was: none of an older attempt's.

        Raises RunProblem where a slot is not admitted, or a token too old or of weights of another attempt.
        """
        slots, attempt = episodes.column("slot").to_pylist(), episodes.column("attempt")[0].as_py()
        scored = with_scores(episodes, scores, reference_logprobs, time.time())  # before a slot counts as accepted
        fresh = set(self._ledger.accept(slots, attempt, oldest_weights(episodes)))
        for row, slot in enumerate(slots):
            if slot in fresh:
                self._rows[slot] = scored.slice(row, 1)
        if fresh:
            self._wake_learners()
        return len(fresh)

    async def suspend(self, holders: Sequence[str]) -> None:
        """Lease nothing to these, and to these alone, until told otherwise: nobody knows whether they live."""
        self._suspended = frozenset(holders)
        self._wake_holders()

    async def exclude(self, holder: str) -> None:
        """Lease nothing more to a generator that is to leave; it may still deliver what it holds."""
        self._ledger.exclude(holder)
        self._wake_holders()

    async def release(self, holder: str) -> int:
        """Free the leases of a generator that stopped or died. It gets none any more; one in its place has another
        name.

        Returns how many chunks became free.
        """
        freed = self._ledger.release(holder)
        self._wake_holders()
        return freed

    # the learner -------------------------------------------------------------------------------------------------

    async def take(self, batch: int, timeout_s: float, attempt: int) -> pa.Table:
        """All episodes of `batch`, in slot order, once they are there and written to Parquet; for the present attempt.

        Raises RunProblem after `timeout_s`, naming who owes which slots, at once if an actor failed meanwhile, if the
        batch is trained already, or if `attempt` is not or no longer the present one.
        """
        with self._awaited():
            await self._complete(batch, timeout_s, attempt)
        table = pa.Table.from_batches([self._rows[slot] for slot in self._ledger.batch_slots(batch)], schema=EPISODE)
        if self._writing is None or self._writing[0] != batch:  # every rank of the learner takes the batch
            writing = asyncio.to_thread(self._write, batch, attempt, table, self._history())
            self._writing = batch, asyncio.ensure_future(writing)
        await asyncio.shield(self._writing[1])
        self._ledger.refuse_other_attempts(attempt, f"asked for batch {batch}")
        return table

    async def _complete(self, batch: int, timeout_s: float, attempt: int) -> None:
        """Until all episodes of `batch` are accepted. Raises RunProblem as `take` does."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._ledger.refuse_other_attempts(attempt, f"asked for batch {batch}")
            if batch < self._ledger.trained:
                raise RunProblem(
                    f"Batch {batch} was asked for, but batch {self._ledger.trained} is next.", "episodes/order"
                )
            missing = self._ledger.missing(batch)
            if not missing:
                return
            if self._failure is not None:
                raise self._failure
            remaining = deadline - time.monotonic()
            if remaining > 0:
                await self._wait(self._delivered, remaining)
            else:
                raise RunProblem(
                    f"Batch {batch} was not complete after {timeout_s:.0f} s: {len(missing)} of "
                    f"{self._plan.batch_size} episodes are missing, the first of slot {missing[0]}; "
                    f"{self._owing(batch)}.",
                    "episodes/deadline",
                )

    @contextlib.contextmanager
    def _awaited(self) -> Iterator[None]:
        """Around the wait of one rank of the learner: exports since when any of them waits."""
        if self._awaiting == 0:
            self._telemetry.set(STREAM_AWAITED, time.time())
        self._awaiting += 1
        try:
            yield
        finally:
            self._awaiting -= 1
            if self._awaiting == 0:
                self._telemetry.set(STREAM_AWAITED, 0.0)

    def _owing(self, batch: int) -> str:
        owed = self._ledger.owed_by(batch, time.time())
        unleased = owed.pop("nobody", None) is not None
        holders = ", ".join(f"{holder} (leased {age:.0f} s ago)" for holder, age in sorted(owed.items()))
        if not owed:
            return "no generator has leased them"
        return f"owed by {holders}" + ("; some were leased by nobody" if unleased else "")

    def _write(self, batch: int, attempt: int, table: pa.Table, history: dict[int, dict[str, int]]) -> None:
        directory = Path(self._plan.directory)
        # Safe on the disk when it appears: the checkpoint that follows, which is, has these rows no more.
        path = directory / f"update-{batch + 1:06d}-attempt-{attempt}.parquet"
        write_atomically(path, lambda stream: pq.write_table(table, stream))
        write_counts(directory.parent, history)

    def _history(self) -> dict[int, dict[str, int]]:
        return {number: asdict(counts) for number, counts in self._ledger.counts.items()}

    async def trained(self, batch: int, attempt: int) -> None:
        """Batch `batch` went into the weights of the present attempt; its rows are dropped here (they are in Parquet).

        Raises RunProblem unless it is the next one, complete, and `attempt` the present one.
        """
        self._ledger.train(batch, attempt)
        for slot in self._ledger.batch_slots(batch):
            del self._rows[slot]
        self._telemetry.set(STREAM_TRAINED, time.time())

    # the conductor -----------------------------------------------------------------------------------------------

    async def advance(self, attempt: int, version: int) -> None:
        """The engines hold weights `version` of `attempt`: further slots are admitted.

        Raises RunProblem where that is not the present attempt, or the version is no next one.
        """
        self._ledger.advance(attempt, version)
        self._wake_holders()

    async def fail(self, problem: Problem) -> None:
        """Some actor cannot go on: whoever waits is told. `problem` must not be an error of Ray's (see `failures`)."""
        if self._failure is None:
            self._failure = problem
        self._wake_learners()

    async def counts(self) -> dict[str, float]:
        """The episodes that wait, what the ledger has counted, in slots, over all attempts, and peak memory."""
        every = self._counted()
        for outcome in OUTCOMES:
            self._telemetry.count_to(STREAM_SLOTS, getattr(every, outcome), outcome=outcome)
        self._telemetry.set(STREAM_WAITING, len(self._rows))
        self._telemetry.set(STREAM_ADMITTED, self._ledger.admitted)
        self._telemetry.set(STREAM_ATTEMPT, self._ledger.attempt)
        self._telemetry.set(PROCESS_MEMORY, resident_bytes())
        return {
            "stream/accepted_waiting": len(self._rows),
            "stream/attempt": self._ledger.attempt,
            "stream/admitted": self._ledger.admitted,
            "stream/leased": every.leased,
            "stream/generated": every.generated,
            "stream/regenerated": every.regenerated,
            "stream/duplicates": every.duplicates,
            "stream/refused": every.refused,
            "stream/trained": every.trained,
            "stream/discarded": every.discarded,
            "memory/stream_bytes": float(peak_bytes()),
        }

    def _counted(self) -> Counts:
        """Over all attempts."""
        every = Counts()
        for counts in self._ledger.counts.values():
            every = every.plus(counts)
        return every

    # recovery ----------------------------------------------------------------------------------------------------

    async def state(self, attempt: int) -> tuple[dict[str, Any], pa.Table]:
        """For the checkpoint: the ledger's state and the accepted episodes that are not trained yet.

        Raises RunProblem where `attempt`, which wants to save them, is not the present one.
        """
        state = self._ledger.state(attempt)
        rows = [self._rows[slot] for slot in sorted(self._rows)]
        await asyncio.to_thread(write_counts, Path(self._plan.directory).parent, self._history())
        return state, pa.Table.from_batches(rows, schema=EPISODE)

    async def restore(self, state: dict[str, Any] | None, episodes: pa.Table | None, attempt: int) -> None:
        """Go back to a checkpoint, or, where there is none, to the beginning, under a new attempt. Nothing is leased
        until the engines hold weights of it; whatever an older attempt wants, also what it waits for, is refused.

        Raises RunProblem where the attempt is not a new one, or the checkpoint's ledger and episodes do not agree.
        """
        batches = [] if episodes is None else episodes.combine_chunks().to_batches()
        rows = {
            slot: batch.slice(row, 1) for batch in batches for row, slot in enumerate(batch.column("slot").to_pylist())
        }
        logs.note_attempt(attempt)
        history = read_counts(Path(self._plan.directory).parent)
        is_fresh = self._counted().leased == 0
        self._ledger.restore(state, attempt, {number: Counts(**counts) for number, counts in history.items()})
        if set(rows) != set(self._ledger.accepted):
            raise RunProblem(
                f"The checkpoint has episodes of {len(rows)} slots, but its ledger has {len(self._ledger.accepted)} "
                "accepted that are not trained.",
                "checkpoint/unreadable",
            )
        self._rows = rows
        self._writing = None
        if is_fresh:  # what processes before this one have counted is theirs
            for outcome in OUTCOMES:
                self._telemetry.count_from(STREAM_SLOTS, getattr(self._counted(), outcome), outcome=outcome)
        self._wake_holders()
        self._wake_learners()
