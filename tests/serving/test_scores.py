"""How the gateway asks the deployment that scores, where that is a stand-in."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from serving.errors import ApiError
from serving.requests import Lists
from serving.scores import scorer_of

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
