"""What the PPO stage tells its actors."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.exported_metrics import PROCESS_MEMORY
from actors.fleet import share_of
from actors.telemetry import Telemetry
from amenable.stages.ppo import memory_teller


@pytest.mark.parametrize(
    ("batch_size", "max_staleness", "generators", "chunk_size", "share"),
    [
        (512, 0, 4, 32, 128),
        (512, 1, 4, 32, 256),
        (64, 0, 1, 32, 64),
        (64, 0, 3, 16, 32),  # a third of 64 is 22: two chunks
        (32, 0, 4, 32, 32),  # never less than one chunk
    ],
)
def test_a_generators_share_is_its_part_of_what_is_admitted_in_whole_chunks(
    batch_size, max_staleness, generators, chunk_size, share
):
    found = share_of(batch_size * (max_staleness + 1), generators, chunk_size)
    assert found == share
    assert found % chunk_size == 0
    assert found * generators >= batch_size * (max_staleness + 1)
    assert (found - chunk_size) * generators < batch_size * (max_staleness + 1)


def test_the_driver_tells_its_memory_and_nothing_more_to_a_conductor_that_has_not_heard_it_yet(monkeypatch):
    exported: list[tuple[str, str]] = []
    meter: Any = SimpleNamespace(record=lambda metric, value, labels: exported.append((metric.name, labels["role"])))
    calls: list[dict[str, Any]] = []

    def hear(memory_bytes: int) -> dict[str, Any]:
        calls.append({"bytes": memory_bytes, "is_heard": False})
        return calls[-1]

    def wait(answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout == 0
        heard = [each for each in answers if each["is_heard"]]
        return heard, [each for each in answers if not each["is_heard"]]

    monkeypatch.setattr(ray, "wait", wait)
    conductor = SimpleNamespace(hear_of_driver=SimpleNamespace(remote=hear))
    tell = memory_teller(conductor, Telemetry("demo", "driver", meter=meter))
    for _ in range(3):
        tell()
    assert len(calls) == 1
    assert calls[0]["bytes"] > 1e6
    calls[0]["is_heard"] = True
    for _ in range(2):
        tell()
    assert len(calls) == 2
    assert exported == [(PROCESS_MEMORY.name, "driver")] * 5
