"""The desk without Ray: what it hands out and what it takes, over the incarnations of a group."""

import asyncio
from typing import Any

import pytest

from learners.desk import PROGRESS_KEPT, Beat, Desk, Loss, News, Ordered, Outcome, Process, Superseded
from learners.worker import Progress

PROCESS = Process("node", 1, "100")
STEP = Progress("toy", 1, 2, "steps")


def desk_of(incarnations: int = 1) -> Any:
    """The class behind the actor, with a job that is under way."""
    actor: Any = Desk
    desk = actor.__ray_metadata__.modified_class()

    async def begin() -> None:
        await desk.order(Ordered(1, b""))
        for _ in range(incarnations):
            await desk.begin_incarnation()
        await desk.enlist(incarnations, 0, PROCESS)

    asyncio.run(begin())
    return desk


def news_of(desk: Any) -> News:
    return asyncio.run(desk.news(0.0))


def test_a_new_incarnation_is_given_the_job_under_way_and_an_earlier_one_nothing():
    desk = desk_of(2)
    assert asyncio.run(desk.next_job(2, 0, 0.01)) == (False, Ordered(1, b""))
    with pytest.raises(Superseded):
        asyncio.run(desk.next_job(1, 0, 0.01))


def test_a_job_that_has_ended_is_not_given_to_a_new_incarnation_but_to_the_late_ranks_of_its_own():
    async def story(desk: Any) -> None:
        await desk.finish(1, Outcome(1, result={}))
        assert await desk.next_job(1, 0, 0.01) == (False, Ordered(1, b""))
        await desk.begin_incarnation()
        assert await desk.next_job(2, 0, 0.01) == (False, None)
        await desk.order(Ordered(2, b"next"))
        assert await desk.next_job(2, 0, 0.01) == (False, Ordered(2, b"next"))

    asyncio.run(story(desk_of()))


def test_progress_of_a_lost_incarnation_is_not_told_as_the_new_ones():
    desk = desk_of()
    asyncio.run(desk.report(1, STEP))
    asyncio.run(desk.begin_incarnation())
    assert news_of(desk).progress == []
    asyncio.run(desk.report(2, STEP))
    assert news_of(desk).progress == [STEP]


def test_an_earlier_incarnation_can_do_nothing_any_more():
    desk = desk_of(2)
    for call in (
        lambda number: desk.report(number, STEP),
        desk.asked_to_stop,
        desk.check_present,
        lambda number: desk.beat(number, 0, Beat(1, 1)),
        lambda number: desk.enlist(number, 0, PROCESS),
        lambda number: desk.saved(number, "step 1"),
        lambda number: desk.finish(number, Outcome(1, result={})),
    ):
        with pytest.raises(Superseded, match="incarnation 1 stops here and writes nothing more, 2 goes on"):
            asyncio.run(call(1))
        assert news_of(desk).outcome is None
        asyncio.run(call(2))


def test_ranks_that_were_ready_are_not_once_their_incarnation_is_lost():
    desk = desk_of()
    assert news_of(desk).processes == {0: PROCESS}
    asyncio.run(desk.lost({0: "died"}, True))
    asyncio.run(desk.beat(1, 0, Beat(9, 9)))  # on its way when the rank died
    assert news_of(desk) == News([], None, 1, {}, {}, [Loss(1, {0: "died"})])
    assert news_of(desk).losses == [], "told once"


@pytest.mark.parametrize("dies", [True, False])
def test_a_failure_that_comes_of_a_death_is_no_outcome_and_another_one_is(dies):
    async def story(desk: Any) -> Outcome | None:
        failure = Outcome(1, problem=RuntimeError("connection closed by peer"))
        telling = asyncio.ensure_future(desk.finish(1, failure, 0.05))
        await asyncio.sleep(0)
        assert (await desk.news(0.0)).outcome is None, "it is held for a while"
        if dies:
            await desk.lost({1: "died"}, True)
        await telling
        return (await desk.news(0.0)).outcome

    assert (asyncio.run(story(desk_of())) is None) == dies


def test_the_first_outcome_counts_and_that_of_another_job_does_not():
    async def story(desk: Any) -> None:
        await desk.finish(1, Outcome(7, result={"other": 1}))
        assert (await desk.news(0.0)).outcome is None
        await desk.finish(1, Outcome(1, result={"first": 1}))
        await desk.finish(1, Outcome(1, result={"second": 1}))
        assert (await desk.news(0.0)).outcome == Outcome(1, result={"first": 1})

    asyncio.run(story(desk_of()))


@pytest.mark.parametrize("asks_first", [True, False])
def test_a_job_that_waits_with_its_checkpoint_to_go_on_elsewhere_stops_at_once_where_asked(asks_first):
    async def story(desk: Any) -> News:
        if asks_first:
            await desk.stop_job()
        await desk.saved(1, "ppo, update 3 of 9")
        if not asks_first:
            assert (await desk.news(0.0)).outcome is None, "nobody has asked yet"
            await desk.stop_job()
        return await desk.news(0.0)

    assert asyncio.run(story(desk_of())).outcome == Outcome(1, interrupted="ppo, update 3 of 9")


def test_a_job_that_went_on_elsewhere_is_not_ended_by_where_it_had_saved():
    async def story(desk: Any) -> News:
        await desk.saved(1, "ppo, update 3 of 9")
        await desk.begin_incarnation()
        await desk.stop_job()
        return await desk.news(0.0)

    news = asyncio.run(story(desk_of()))
    assert news.outcome is None
    [note] = news.notes
    assert note.startswith("learners saved at ppo, update 3 of 9: their machine is about to be taken away")


def test_of_progress_that_nobody_fetches_the_newest_is_kept():
    async def story(desk: Any) -> None:
        for done in range(PROGRESS_KEPT + 5):
            await desk.report(1, Progress("toy", done, 100, "steps"))

    desk = desk_of()
    asyncio.run(story(desk))
    assert [each.done for each in news_of(desk).progress] == list(range(5, PROGRESS_KEPT + 5))
    assert news_of(desk).progress == []
