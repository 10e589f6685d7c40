"""Which tokens engine and learner are held to agree on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learners.ppo_mismatch import mismatch


def found(kv_kept: bool, own: list[list[int]], apart: list[list[float]]) -> dict[str, float]:
    """The learner is `apart` nats from the engine on tokens of responses that fill the last three columns."""
    mask = torch.tensor([[0, 1, 1, 1]] * len(own)).bool()
    batch: Any = SimpleNamespace(
        rows=len(own), mask=mask, own_version=torch.tensor(own).bool(), behaviour_logprobs=torch.zeros(mask.shape)
    )
    return mismatch(None, batch, 0, torch.tensor(apart), kv_kept)  # pyright: ignore[reportArgumentType]


def test_where_keys_and_values_are_kept_a_response_that_older_weights_began_is_left_out():
    own = [[0, 0, 1, 1], [0, 1, 1, 1]]
    apart = [[9.0, 9.0, 0.5, 0.5], [9.0, 0.01, 0.02, 0.03]]
    assert found(False, own, apart)["mismatch/max_abs_log_ratio"] == pytest.approx(0.5)
    kept = found(True, own, apart)
    assert kept["mismatch/max_abs_log_ratio"] == pytest.approx(0.03)
    assert kept["mismatch/mean_abs_log_ratio"] == pytest.approx(0.02)


def test_nothing_is_said_where_older_weights_began_every_response():
    own, apart = [[0, 0, 1, 1]], [[0.0, 0.0, 0.5, 0.5]]
    assert found(True, own, apart) == {}
    assert found(False, own, apart) != {}
