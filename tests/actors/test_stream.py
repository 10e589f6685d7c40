"""The stream as its users meet it: leased from, delivered to, taken from, waited for.

Its class runs in an event loop of a thread here, as it does in its actor; the last tests are with the real actor.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors import stream as streams
from actors.attempts import read_counts
from actors.episodes import EPISODE, GENERATED, Chunk, PromptOrder, episode_seed
from actors.stream import EpisodeStream, StreamPlan
from corpus.problems import RunProblem
from corpus.schemas import make_table, write_table

BATCH, CHUNK, PROMPTS = 4, 2, 5


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    columns = {
        "prompt_id": [f"p{number}" for number in range(PROMPTS)],
        "user_id": ["u"] * PROMPTS,
        "prompt": ["?"] * PROMPTS,
        "prompt_tokens": [[number] for number in range(PROMPTS)],
        "meta": [""] * PROMPTS,
    }
    write_table(make_table("prompts", columns), path, "prompts")
    return path


def plan(prompts: Path, directory: Path, staleness: int = 0, lease_s: float = 60.0, batches: int = 3) -> StreamPlan:
    return StreamPlan(
        prompts=str(prompts),
        directory=str(directory),
        seed=11,
        round_number=1,
        batch_size=BATCH,
        chunk_size=CHUNK,
        max_staleness=staleness,
        batches=batches,
        lease_s=lease_s,
    )


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    events = asyncio.new_event_loop()
    thread = threading.Thread(target=events.run_forever, daemon=True)
    thread.start()
    yield events
    asyncio.run_coroutine_threadsafe(_end_tasks(), events).result(30)
    events.call_soon_threadsafe(events.stop)
    thread.join()
    events.close()


async def _end_tasks() -> None:
    """As `asyncio.run` does at its end: a task that is left says so in the log of whichever test is under way when
    it is collected."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def start(loop, prompts, tmp_path):
    """Makes a stream, whose coroutines run in `loop`."""

    def stream(**settings) -> "Stream":
        made = EpisodeStream.__ray_metadata__.modified_class(plan(prompts, tmp_path / "episodes", **settings))  # pyright: ignore

        def call(method: str, *arguments: Any) -> Future:
            return asyncio.run_coroutine_threadsafe(getattr(made, method)(*arguments), loop)

        return Stream(call)

    return stream


@pytest.fixture
def start_actor(ray_session, prompts, tmp_path):
    """Makes a stream in an actor, which is killed afterwards."""
    started = []

    def stream(**settings) -> "Stream":
        actor: Any = EpisodeStream.remote(plan(prompts, tmp_path / "episodes", **settings))  # pyright: ignore
        started.append(actor)
        return Stream(lambda method, *arguments: getattr(actor, method).remote(*arguments).future())

    yield stream
    for each in started:
        ray_session.kill(each)


class Stream:
    """A stream whose methods are called and waited for; `later` only calls."""

    def __init__(self, call: Any) -> None:
        self.later = call

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self.later(method, *arguments).result(60)

    def deliver(self, chunk: Chunk, holder: str = "a", score: float = 1.0) -> int:
        return self.accept(generated(chunk, holder), [score] * CHUNK, [[-2.0, -2.0]] * CHUNK)

    def fill(self, holder: str = "a") -> None:
        """Leases and delivers all that is admitted."""
        for chunk in self.lease(holder, 99, 0.0):
            self.deliver(chunk, holder)


def waits(answer: Future, seconds: float = 0.3) -> bool:
    try:
        answer.result(seconds)
    except TimeoutError:
        return True
    return False


def generated(chunk: Chunk, holder: str, update: int | None = None) -> pa.RecordBatch:
    """The chunk's episodes, by the weights before the slot's own update, unless told otherwise."""
    count = len(chunk.slots)
    wrote = [slot.index // BATCH if update is None else update for slot in chunk.slots]
    columns = {
        "run": ["r"] * count,
        "round": [1] * count,
        "slot": [slot.index for slot in chunk.slots],
        "sample": [0] * count,
        "attempt": [chunk.attempt] * count,
        "prompt_id": [slot.prompt_id for slot in chunk.slots],
        "prompt_tokens": [slot.prompt_tokens for slot in chunk.slots],
        "response_tokens": [[7, 8]] * count,
        "behaviour_logprobs": [[-1.0, -1.0]] * count,
        "version_spans": [[{"attempt": chunk.attempt, "update": update, "start": 0, "end": 2}] for update in wrote],
        "finish_reason": ["stop"] * count,
        "generator": [holder] * count,
        "leased_at": [chunk.leased_at] * count,
        "generated_at": [time.time()] * count,
    }
    return pa.RecordBatch.from_pydict(columns, schema=GENERATED)


def indices(chunks) -> list[int]:
    return [slot.index for chunk in chunks for slot in chunk.slots]


def test_slots_are_leased_once_with_the_prompt_and_the_seed_that_the_run_gives_them(start):
    stream = start(staleness=1)
    first, second = stream.lease("a", 1, 0.0), stream.lease("b", 99, 0.0)
    assert (indices(first), indices(second)) == ([0, 1], [2, 3, 4, 5, 6, 7])
    order = PromptOrder(PROMPTS, 11)
    for chunk in [*first, *second]:
        for slot in chunk.slots:
            assert slot.prompt_id == f"p{order[slot.index]}"
            assert slot.prompt_tokens == [order[slot.index]]
            assert slot.seed == episode_seed(11, 1, slot.index)
    assert stream.lease("a", 1, 0.0) == []


def test_a_batch_is_taken_in_slot_order_whoever_delivered_first_and_is_on_the_disk(start, tmp_path):
    take_a_batch(start(), tmp_path)


def take_a_batch(stream: Stream, tmp_path: Path) -> None:
    one, two = stream.lease("a", 2, 0.0)
    taken = stream.later("take", 0, 30.0, 0)
    assert stream.deliver(two, score=2.0) == CHUNK
    assert stream.deliver(one, score=1.0) == CHUNK
    table = taken.result(30)
    assert table.schema == EPISODE
    assert table["slot"].to_pylist() == [0, 1, 2, 3]
    assert table["score"].to_pylist() == [1.0, 1.0, 2.0, 2.0]
    [path] = (tmp_path / "episodes").iterdir()
    assert path.name == "update-000001-attempt-0.parquet"
    assert pq.read_table(path).equals(table)


def test_a_second_delivery_changes_nothing(start):
    stream = start()
    one, two = stream.lease("a", 2, 0.0)
    stream.deliver(one, score=1.0)
    assert stream.deliver(one, score=5.0) == 0
    stream.deliver(two)
    assert stream.take(0, 1.0, 0)["score"].to_pylist() == [1.0, 1.0, 1.0, 1.0]
    stream.trained(0, 0)
    assert stream.deliver(one) == 0  # later still: its batch is in the weights
    counts = stream.counts()
    assert (counts["stream/duplicates"], counts["stream/accepted_waiting"]) == (4, 0)
    assert counts["memory/stream_bytes"] > 10 << 20


def test_an_expired_lease_is_given_to_another_and_the_first_to_deliver_counts(start):
    stream = start(lease_s=0.2)
    [slow] = stream.lease("slow", 1, 0.0)
    assert indices([slow]) == [0, 1]
    time.sleep(0.3)
    again = stream.lease("quick", 1, 0.0)
    assert indices(again) == [0, 1]
    assert stream.deliver(again[0], "quick") == CHUNK
    assert stream.deliver(slow, "slow") == 0
    counts = stream.counts()
    assert (counts["stream/regenerated"], counts["stream/duplicates"]) == (2, 2)


def test_who_waits_for_slots_gets_those_of_a_lease_that_expires_meanwhile(start):
    stream = start(lease_s=1.0)
    stream.lease("slow", 2, 0.0)
    waiting = stream.later("lease", "quick", 2, 30.0)
    assert waits(waiting)
    began = time.monotonic()
    assert indices(waiting.result(30)) == [0, 1, 2, 3]
    assert time.monotonic() - began < 10


def test_a_delivery_wakes_nobody_who_waits_for_slots(start, monkeypatch):
    asked = []
    lease = streams.Ledger.lease
    monkeypatch.setattr(streams.Ledger, "lease", lambda *given: asked.append(given[1]) or lease(*given))
    stream = start()
    chunks = stream.lease("busy", 2, 0.0)
    waiting = [stream.later("lease", f"idle-{number}", 1, 30.0) for number in range(3)]
    assert all(waits(each) for each in waiting)
    before = len(asked)
    for chunk in chunks:
        assert stream.deliver(chunk, "busy") == CHUNK
    stream.take(0, 1.0, 0)
    assert len(asked) == before
    stream.trained(0, 0)
    stream.advance(0, 1)
    assert sorted(index for each in waiting[:2] for index in indices(each.result(30))) == [4, 5, 6, 7]


def test_what_a_dead_generator_held_is_leased_at_once(start):
    stream = start()
    stream.lease("dying", 2, 0.0)
    waiting = stream.later("lease", "other", 2, 30.0)
    assert stream.release("dying") == 2
    began = time.monotonic()
    assert indices(waiting.result(30)) == [0, 1, 2, 3]
    assert time.monotonic() - began < 10


def test_a_dead_generators_call_that_still_waits_is_given_nothing(start):
    stream = start()
    stream.lease("dying", 9, 0.0)
    of_the_dead = stream.later("lease", "dying", 9, 1.0)
    assert waits(of_the_dead)
    assert stream.release("dying") > 0
    assert of_the_dead.result(30) is None
    assert stream.lease("dying", 1, 0.0) is None
    assert indices(stream.lease("in its place", 1, 0.0)) == [0, 1]


def test_a_generator_that_is_to_leave_is_given_no_slot_of_the_weights_that_it_does_not_get(start):
    stream = start(staleness=1)
    [last] = stream.lease("leaving", 1, 0.0)
    stream.fill("staying")
    waiting = {holder: stream.later("lease", holder, 1, 30.0) for holder in ("leaving", "staying")}
    assert all(waits(each) for each in waiting.values())
    stream.exclude("leaving")
    assert waiting["leaving"].result(5) is None, "at once"
    assert stream.deliver(last, "leaving") == CHUNK, "what it holds it may finish"
    stream.trained(0, 0)
    stream.advance(0, 1)
    assert indices(waiting["staying"].result(30)) == [8, 9]
    assert stream.lease("leaving", 1, 30.0) is None
    stream.restore(*stream.state(0), 1)
    stream.advance(1, 1)
    assert stream.lease("leaving", 1, 30.0) is None, "a restart of the learner brings it no weights either"


def test_a_generator_that_is_silent_is_given_nothing_until_it_is_heard_again(start):
    stream = start()
    stream.suspend(["silent"])
    waiting = stream.later("lease", "silent", 1, 30.0)
    assert waits(waiting)
    assert indices(stream.lease("other", 1, 0.0)) == [0, 1]
    stream.suspend([])
    assert indices(waiting.result(30)) == [2, 3]


def test_a_lease_waits_until_further_slots_are_admitted(start):
    stream = start()
    stream.fill()
    assert stream.lease("a", 1, 0.1) == []
    waiting = stream.later("lease", "a", 2, 30.0)
    stream.take(0, 1.0, 0)
    stream.trained(0, 0)
    assert waits(waiting)
    stream.advance(0, 1)
    assert indices(waiting.result(30)) == [4, 5, 6, 7]


def test_the_deadline_of_a_batch_names_who_owes_it(start):
    stream = start()
    with pytest.raises(RunProblem, match="4 of 4 episodes are missing, the first of slot 0; no generator has leased"):
        stream.take(0, 0.1, 0)
    [one] = stream.lease("generator-3", 1, 0.0)
    with pytest.raises(RunProblem) as late:
        stream.take(0, 0.1, 0)
    assert str(late.value) == (
        "Batch 0 was not complete after 0 s: 4 of 4 episodes are missing, the first of slot 0; "
        "owed by generator-3 (leased 0 s ago); some were leased by nobody."
    )
    stream.deliver(one)
    stream.lease("generator-5", 1, 0.0)
    with pytest.raises(RunProblem) as late:
        stream.take(0, 0.1, 0)
    assert str(late.value) == (
        "Batch 0 was not complete after 0 s: 2 of 4 episodes are missing, the first of slot 2; "
        "owed by generator-5 (leased 0 s ago)."
    )


def test_an_actor_that_failed_is_told_to_whoever_waits_for_a_batch_at_once(start):
    fail_a_batch(start())


def fail_a_batch(stream: Stream) -> None:
    waiting = stream.later("take", 0, 300.0, 0)
    assert waits(waiting)
    stream.fail(RunProblem("the scorer gave up", "run/unexpected"))
    stream.fail(RunProblem("and so, later, did the generator", "run/unexpected"))
    began = time.monotonic()
    with pytest.raises(RunProblem, match="the scorer gave up"):
        waiting.result(30)
    assert time.monotonic() - began < 10


def test_batches_are_trained_in_order_and_whole(start):
    stream = start(staleness=1)
    stream.fill()
    with pytest.raises(RunProblem, match="Batch 1 was given to training, but batch 0 is next"):
        stream.trained(1, 0)
    stream.trained(0, 0)
    with pytest.raises(RunProblem, match="Batch 0 was given to training, but batch 1 is next"):
        stream.trained(0, 0)


def test_a_checkpoint_continues_under_a_new_attempt_and_the_old_one_is_refused(start, tmp_path):
    go_on(start(staleness=1), start(staleness=1), tmp_path)


def go_on(before: Stream, after: Stream, tmp_path: Path) -> None:
    chunks = before.lease("a", 4, 0.0)
    for chunk in chunks[:3]:
        before.deliver(chunk)
    before.take(0, 1.0, 0)
    before.trained(0, 0)
    state, episodes = before.state(0)
    assert episodes["slot"].to_pylist() == [4, 5]

    after.restore(state, episodes, 1)
    assert after.deliver(chunks[3]) == 0  # generated for the attempt before
    assert after.counts()["stream/refused"] == CHUNK
    for method, *arguments in (("advance", 0, 1), ("take", 1, 1.0, 0), ("trained", 1, 0), ("state", 0)):
        with pytest.raises(RunProblem, match=r"Attempt 0 .*, but attempt 1 is the present one"):
            getattr(after, method)(*arguments)
    assert after.lease("b", 9, 0.1) == []  # the engines may hold weights that were rolled back
    after.advance(1, 1)
    [again] = after.lease("b", 1, 0.0)
    assert (indices([again]), again.attempt) == ([6, 7], 1)
    assert again.slots == chunks[3].slots  # the same prompts, drawn with the same seeds
    assert after.deliver(again, "b") == CHUNK
    table = after.take(1, 1.0, 1)
    assert table["slot"].to_pylist() == [4, 5, 6, 7]
    assert table["attempt"].to_pylist() == [0, 0, 1, 1]
    names = sorted(path.name for path in (tmp_path / "episodes").iterdir())
    assert names == ["update-000001-attempt-0.parquet", "update-000002-attempt-1.parquet"]


def test_whoever_waits_for_a_batch_when_a_new_attempt_begins_is_refused(start):
    stream = start()
    waiting = stream.later("take", 0, 30.0, 0)
    assert waits(waiting)
    stream.restore(None, None, 1)
    with pytest.raises(RunProblem, match="Attempt 0 asked for batch 0, but attempt 1 is the present one"):
        waiting.result(30)
    stream.advance(1, 0)
    stream.fill()
    assert stream.take(0, 1.0, 1)["attempt"].to_pylist() == [1, 1, 1, 1]


def test_a_batch_that_is_trained_is_not_given_again(start):
    stream = start()
    stream.fill()
    stream.trained(0, 0)
    with pytest.raises(RunProblem, match="Batch 0 was asked for, but batch 1 is next"):
        stream.take(0, 60.0, 0)


def test_every_rank_gets_the_batch_once_it_is_on_the_disk(start, tmp_path, monkeypatch):
    stream, begun, may_go = start(), threading.Event(), threading.Event()
    real = streams.write_atomically

    def slow(path: Path, write: Any) -> None:
        begun.set()
        may_go.wait(30)
        real(path, write)

    monkeypatch.setattr(streams, "write_atomically", slow)
    stream.fill()
    first = stream.later("take", 0, 30.0, 0)
    assert begun.wait(30)
    second = stream.later("take", 0, 30.0, 0)
    assert waits(first)
    assert waits(second)
    may_go.set()
    assert first.result(30).equals(second.result(30))
    assert [path.name for path in (tmp_path / "episodes").iterdir()] == ["update-000001-attempt-0.parquet"]


def test_where_the_disk_refuses_a_batch_every_rank_is_told(start, tmp_path):
    stream = start()
    (tmp_path / "episodes").write_text("a file where the directory should be")
    stream.fill()
    for _ in range(2):
        with pytest.raises(RunProblem, match=r"update-000001-attempt-0\.parquet: could not be written"):
            stream.take(0, 1.0, 0)


def test_a_token_older_than_the_staleness_bound_is_refused_on_delivery(start):
    stream = start(staleness=0)
    stream.fill()
    stream.trained(0, 0)
    stream.advance(0, 1)
    [chunk, _] = stream.lease("a", 2, 0.0)
    with pytest.raises(RunProblem, match="Slot 4 was delivered with tokens of weights 0, but trains in batch 1, where"):
        stream.accept(generated(chunk, "a", update=0), [1.0] * CHUNK, [[-2.0, -2.0]] * CHUNK)
    assert stream.deliver(chunk) == CHUNK


def test_a_delivery_that_fails_leaves_a_stream_whose_checkpoint_can_be_continued(start):
    stream = start()
    one, two = stream.lease("a", 2, 0.0)
    with pytest.raises(ValueError, match="same length"):
        stream.accept(generated(one, "a"), [1.0] * (CHUNK + 1), [[-2.0, -2.0]] * CHUNK)
    stream.deliver(two)
    state, episodes = stream.state(0)
    assert [slot for slot, _ in state["accepted"]] == episodes["slot"].to_pylist() == [2, 3]
    start().restore(state, episodes, 1)


def test_what_happened_in_an_attempt_is_known_to_the_stream_that_follows_a_dead_one(start, tmp_path):
    dying = start(staleness=1)
    state, episodes = dying.state(0)
    dying.fill()
    dying.take(0, 1.0, 0)
    dying.trained(0, 0)
    after = start(staleness=1)
    after.restore(state, episodes, 1)
    assert read_counts(tmp_path)[0]["generated"] == 8
    counts = after.counts()
    assert (counts["stream/generated"], counts["stream/discarded"], counts["stream/accepted_waiting"]) == (8, 8, 0)
    after.advance(1, 0)
    after.fill()
    counts = after.counts()
    assert (counts["stream/generated"], counts["stream/discarded"], counts["stream/accepted_waiting"]) == (16, 8, 8)


def test_a_checkpoint_whose_ledger_and_episodes_differ_is_refused(start):
    stream = start()
    stream.fill()
    state, episodes = stream.state(0)
    with pytest.raises(RunProblem, match="has episodes of 3 slots, but its ledger has 4 accepted that are not trained"):
        start().restore(state, episodes.slice(1), 1)


def test_a_checkpoint_is_not_continued_under_its_own_attempt(start):
    state, episodes = start().state(0)
    with pytest.raises(RunProblem, match="Attempt 0 cannot follow attempt 0"):
        start().restore(state, episodes, 0)


@pytest.mark.slow
def test_the_real_actor_does_the_same(start_actor, tmp_path):
    first, second, third = start_actor(), start_actor(staleness=1), start_actor(staleness=1)
    take_a_batch(first, tmp_path)
    (tmp_path / "episodes" / "update-000001-attempt-0.parquet").unlink()
    go_on(second, third, tmp_path)
    first.trained(0, 0)
    first.advance(0, 1)
    with pytest.raises(RunProblem, match="Batch 1 was not complete after 1 s: 4 of 4 episodes are missing"):
        first.take(1, 1.0, 0)


@pytest.mark.slow
def test_the_real_actor_tells_of_a_failure(start_actor):
    fail_a_batch(start_actor())
