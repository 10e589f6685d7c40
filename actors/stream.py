"""The episode stream: leases slots to generators, keeps what they deliver, hands whole batches to the learners.

A thin shell over `actors.ledger`: it adds waiting with deadlines, the rows themselves, and Parquet, the audit trail.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from actors.episodes import EPISODE, Chunk, PromptOrder, Slot, episode_seed, with_scores
from actors.failures import Problem
from actors.ledger import Ledger
from corpus.problems import RunProblem
from corpus.schemas import read_table


class StreamPlan:
    """What the stream needs to know of a PPO stage. Sizes are in slots, times in seconds."""

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


@ray.remote(num_cpus=0)
class EpisodeStream:
    """One a PPO stage. All methods are coroutines of one event loop, so each runs undisturbed between its awaits."""

    def __init__(self, plan: StreamPlan) -> None:
        self._plan = plan
        self._ledger = Ledger(plan.batch_size, plan.chunk_size, plan.max_staleness, plan.batches)
        table = read_table(plan.prompts, "prompts")
        self._prompt_ids: list[str] = table["prompt_id"].to_pylist()
        self._prompt_tokens: list[list[int]] = table["prompt_tokens"].to_pylist()
        self._order = PromptOrder(len(self._prompt_ids), plan.seed)
        self._rows: dict[int, pa.RecordBatch] = {}
        self._written: set[int] = set()
        self._changed = asyncio.Event()
        self._failure: Problem | None = None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for_change(self, deadline: float) -> bool:
        """Until something changes or `deadline` (monotonic) passes; False where it passed."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        try:
            await asyncio.wait_for(self._changed.wait(), remaining)
        except TimeoutError:
            return False
        return True

    # generators --------------------------------------------------------------------------------------------------

    async def lease(self, holder: str, chunks: int, wait_s: float) -> list[Chunk]:
        """Up to `chunks` chunks of slots for `holder` to generate; waits up to `wait_s` for the first."""
        deadline = time.monotonic() + wait_s
        while True:
            now = time.time()
            leases = self._ledger.lease(holder, chunks, now, self._plan.lease_s)
            if leases:
                return [
                    Chunk([self._slot(index) for index in self._ledger.slots(lease.chunk)], self._ledger.attempt, now)
                    for lease in leases
                ]
            if not await self._wait_for_change(deadline):
                return []

    def _slot(self, index: int) -> Slot:
        row = self._order[index]
        seed = episode_seed(self._plan.seed, self._plan.round_number, index)
        return Slot(index, self._prompt_ids[row], self._prompt_tokens[row], seed)

    async def accept(
        self, episodes: pa.RecordBatch, scores: Sequence[float], reference_logprobs: Sequence[Sequence[float]]
    ) -> int:
        """Keep what is new of a scored chunk; returns how many episodes that was."""
        slots = episodes.column("slot").to_pylist()
        fresh = set(self._ledger.accept(slots, episodes.column("attempt")[0].as_py()))
        scored = with_scores(episodes, scores, reference_logprobs, time.time())
        for row, slot in enumerate(slots):
            if slot in fresh:
                self._rows[slot] = scored.slice(row, 1)
        if fresh:
            self._notify()
        return len(fresh)

    async def release(self, holder: str) -> int:
        """Free the leases of a generator that stopped or died."""
        freed = self._ledger.release(holder)
        self._notify()
        return freed

    # the learner -------------------------------------------------------------------------------------------------

    async def take(self, batch: int, timeout_s: float) -> pa.Table:
        """All episodes of `batch`, in slot order, once they are there; also written to Parquet.

        Raises RunProblem after `timeout_s`, naming who owes which slots, or at once if an actor failed meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while missing := self._ledger.missing(batch):
            if self._failure is not None:
                raise self._failure
            if not await self._wait_for_change(deadline):
                raise RunProblem(
                    f"Batch {batch} was not complete after {timeout_s:.0f} s: {len(missing)} of "
                    f"{self._plan.batch_size} episodes are missing, the first of slot {missing[0]}; "
                    f"{self._owing(batch)}."
                )
        table = pa.Table.from_batches([self._rows[slot] for slot in self._ledger.batch_slots(batch)], schema=EPISODE)
        if batch not in self._written:  # every rank of the learner takes the batch
            self._written.add(batch)
            await asyncio.to_thread(self._write, batch, table)
        return table

    def _owing(self, batch: int) -> str:
        owed = self._ledger.owed_by(batch, time.time())
        unleased = owed.pop("nobody", None) is not None
        holders = ", ".join(f"{holder} (leased {age:.0f} s ago)" for holder, age in sorted(owed.items()))
        if not owed:
            return "no generator has leased them"
        return f"owed by {holders}" + ("; some were leased by nobody" if unleased else "")

    def _write(self, batch: int, table: pa.Table) -> None:
        directory = Path(self._plan.directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"update-{batch + 1:06d}-attempt-{self._ledger.attempt}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial)
        partial.replace(path)

    async def trained(self, batch: int) -> None:
        """Batch `batch` went into the weights; its rows are dropped here (they are in Parquet)."""
        self._ledger.train(batch)
        for slot in self._ledger.batch_slots(batch):
            del self._rows[slot]

    # the conductor -----------------------------------------------------------------------------------------------

    async def advance(self, attempt: int, version: int) -> None:
        """The engines hold weights `version`: further slots are admitted."""
        self._ledger.advance(attempt, version)
        self._notify()

    async def fail(self, problem: Problem) -> None:
        """Some actor cannot go on: whoever waits is told. `problem` must not be an error of Ray's (see `failures`)."""
        if self._failure is None:
            self._failure = problem
        self._notify()

    async def counts(self) -> dict[str, float]:
        """What the ledger has counted, and the memory of this process."""
        return {
            "stream/accepted_waiting": len(self._rows),
            "stream/regenerated": self._ledger.regenerated,
            "stream/duplicates": self._ledger.duplicates,
            "stream/refused": self._ledger.refused,
        }

    # recovery ----------------------------------------------------------------------------------------------------

    async def state(self) -> tuple[dict[str, Any], pa.Table]:
        """For the checkpoint: the ledger's state and the accepted episodes that are not trained yet."""
        rows = [self._rows[slot] for slot in sorted(self._rows)]
        return self._ledger.state(), pa.Table.from_batches(rows, schema=EPISODE)

    async def restore(self, state: dict[str, Any], episodes: pa.Table, attempt: int) -> None:
        """Go back to a checkpoint under a new attempt."""
        self._ledger.restore(state, attempt)
        self._written.clear()
        batches = episodes.combine_chunks().to_batches()
        self._rows = {
            slot: batch.slice(row, 1) for batch in batches for row, slot in enumerate(batch.column("slot").to_pylist())
        }
        self._notify()
