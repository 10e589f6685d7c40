"""What the PPO stage tells its actors."""

import pytest

from actors.fleet import share_of


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
