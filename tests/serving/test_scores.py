"""How the gateway asks the deployment that scores, where that is a stand-in."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from serving.errors import ApiError
from serving.requests import Lists
from serving.scores import RewardScores, Scores, positions_of, scorer_of
from tests.serving.run_on_disk import CONTEXT, write_run

NO_ID: Any = None
ASKED = Lists([("a", [("bc", True)])], pairs=True)


def scored(result: Any) -> Any:
    """What the scorer of a deployment gives that answers with `result`, or raises it."""

    async def remote(items: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    return asyncio.run(scorer_of(SimpleNamespace(score=SimpleNamespace(remote=remote)))(ASKED))


@pytest.mark.parametrize(
    "error", [ActorDiedError(), ActorUnavailableError("it went away", b"\0" * 16), DeploymentUnavailableError(NO_ID)]
)
def test_a_replica_that_has_died_is_no_internal_error(error):
    with pytest.raises(ApiError) as caught:
        scored(error)
    assert (caught.value.status, caught.value.code) == (503, "scorer_lost")
    assert (b"retry-after", b"5") in caught.value.headers()


def test_scores_and_what_else_goes_wrong_come_as_they_are():
    assert scored([[1.5]]) == [[1.5]]
    with pytest.raises(ZeroDivisionError):
        scored(ZeroDivisionError())


def test_what_cannot_be_scored_is_the_fault_of_the_request():
    with pytest.raises(ApiError) as caught:
        scored("It is too long.")
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, "It is too long.", "pairs")


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> RewardScores:
    run = write_run(tmp_path_factory.mktemp("scores") / "run")
    directory = run / "round-01" / "rm" / "export"
    assert positions_of(directory, 7) >= CONTEXT
    return RewardScores(str(directory), str(run / "data" / "tokenizer"), 4, "cpu", "float32", CONTEXT)


def test_one_thread_alone_is_in_the_tokenizer_also_where_who_asked_has_left():
    deployed: Any = object.__new__(Scores)
    begun, go_on = threading.Event(), threading.Event()
    inside: list[int] = []
    most = 0

    def rows(items: Any) -> list[Any]:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        begun.set()
        go_on.wait(10)
        inside.pop()
        return []

    async def batch(_: Any) -> list[float]:
        return []

    async def scene() -> None:
        scores = SimpleNamespace(rows=rows)
        vars(deployed).update(_scores=scores, _encoder=ThreadPoolExecutor(1), _together=batch)
        first = asyncio.create_task(deployed.score([]))
        await asyncio.to_thread(begun.wait, 10)
        first.cancel()
        second = asyncio.create_task(deployed.score([]))
        await asyncio.sleep(0.1)
        go_on.set()
        assert await second == []

    asyncio.run(scene())
    assert most == 1


def test_a_text_that_is_longer_than_the_model_reads_is_refused_before_others_are_scored_with_it(rewards):
    deployed: Any = object.__new__(Scores)
    together = []

    async def batch(rows: Any) -> list[float]:
        together.extend(rows)
        return rewards.of(rows)

    async def ask(words: int) -> Any:
        vars(deployed).update(_scores=rewards, _encoder=ThreadPoolExecutor(1), _together=batch)
        return await deployed.score([("w5", [("w6 " * words, True), ("w7", False)])])

    [(prompt, response), _] = rewards.rows([("w5", [("w6", True), ("w7", False)])])
    most = CONTEXT - len(prompt) - len(response) + 1
    [[longest, short]] = asyncio.run(ask(most))
    assert longest != short
    assert (len(together), sum(map(len, together[0]))) == (2, CONTEXT)
    assert f"{CONTEXT + 1} tokens; the reward model reads {CONTEXT}" in asyncio.run(ask(most + 1))
    assert len(together) == 2
