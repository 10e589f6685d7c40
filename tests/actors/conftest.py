import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that tests share

import pytest


@pytest.fixture(scope="module")
def ray_session():
    """A local Ray session for the tests of this room that run real actors."""
    import ray

    from cluster.session import session

    with session(None, cpus=2):
        logging.getLogger("ray").setLevel(logging.ERROR)
        yield ray


@pytest.fixture
def play(monkeypatch):
    """Runs a coroutine function of a `stand_in_cast.Cast` that is ready; who was killed is in `cast.killed`."""
    import asyncio

    from stand_in_cast import Cast

    from actors import pulse, weight_store

    killed: list = []

    def kill(handle, last_pulse) -> None:
        handle.actor.dead = True
        killed.append(handle.actor)

    monkeypatch.setattr(weight_store.ray, "put", lambda content: content)
    monkeypatch.setattr(pulse, "kill", kill)

    def run(scene, deadline_s: float = 30.0, sampling_deadline_s: float = 30.0, **given) -> Cast:
        async def whole() -> Cast:
            each = await Cast(deadline_s, sampling_deadline_s, **given).begin()
            each.killed = killed
            await asyncio.wait_for(scene(each), 60)
            return each

        return asyncio.run(whole())

    return run
