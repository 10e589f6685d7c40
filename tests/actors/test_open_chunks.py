"""What a generator holds and what it has room for."""

import pytest

from actors.episodes import Chunk, Slot
from actors.open_chunks import OpenChunks, chunks_to_lease
from actors.rollout_engine import Completion
from actors.settings import SamplingSettings


def chunk(first: int, attempt: int = 0) -> Chunk:
    return Chunk([Slot(index, "p", [1, index], seed=index) for index in (first, first + 1)], attempt, 1.0)


def completion(key: str) -> Completion:
    return Completion(key, [4], [-1.0], "stop", [])


def keys(opened) -> list[str]:
    return [request.key for request in opened.requests(SamplingSettings())]


def test_a_chunk_is_whole_with_its_last_response_and_then_no_longer_held():
    chunks = OpenChunks()
    one, two = chunks.add(chunk(0)), chunks.add(chunk(2))
    assert one is not None
    assert two is not None
    assert chunks.slots == 4
    assert chunks.complete(completion(keys(one)[1])) is None
    assert chunks.complete(completion(keys(one)[0])) is one
    assert chunks.slots == 2
    assert chunks.add(chunk(2)) is None, "it is open already"
    assert chunks.slots == 2


def test_what_an_abandoned_chunk_leaves_behind_belongs_to_nobody():
    chunks = OpenChunks()
    old = chunks.add(chunk(0))
    assert old is not None
    assert chunks.abandon_but(0) == []
    assert chunks.abandon_but(1) == keys(old)
    new = chunks.add(chunk(0, attempt=1))
    assert new is not None
    assert not set(keys(old)) & set(keys(new))
    assert [chunks.complete(completion(key)) for key in keys(old)] == [None, None]
    assert [chunks.complete(completion(key)) for key in keys(new)] == [None, new]


@pytest.mark.parametrize(
    ("held", "pending", "chunk_size", "share", "max_concurrent", "chunks"),
    [
        (0, 0, 4, 64, 32, 8),  # the engine's room
        (0, 0, 4, 12, 32, 3),  # its share
        (8, 8, 4, 12, 32, 1),
        (12, 2, 4, 12, 32, 0),  # stragglers are held all the same
        (8, 3, 4, 64, 8, 1),  # rows of the engine that stragglers have left are filled
        (0, 0, 16, 64, 8, 1),  # a chunk beyond the engine's room queues there
        (0, 4, 16, 64, 8, 1),
        (16, 8, 16, 64, 8, 0),
    ],
)
def test_a_generator_leases_what_engine_and_share_have_room_for(
    held, pending, chunk_size, share, max_concurrent, chunks
):
    assert chunks_to_lease(held, pending, chunk_size, share, max_concurrent) == chunks
