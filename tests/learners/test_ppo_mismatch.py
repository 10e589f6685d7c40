"""Which tokens engine and learner are held to agree on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from corpus.problems import RunProblem
from learners.ppo_mismatch import default_bound, mismatch, refuse_beyond


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


def test_the_bound_is_tightest_on_the_first_minibatch_in_float32():
    assert default_bound("float32", "float32", first_minibatch=True) == 1e-4
    assert default_bound("float32", "float32") == 1e-3
    for pair in (("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        assert default_bound(*pair, first_minibatch=True) == default_bound(*pair) == 1.0


def test_what_is_beyond_the_bound_or_no_number_is_refused_and_what_is_within_it_is_not():
    for found in (1.01e-4, float("nan"), float("inf")):
        with pytest.raises(RunProblem, match=r"at update 3 engine and learner disagree .* beyond the bound of 0\.0001"):
            refuse_beyond(1e-4, {"mismatch/max_abs_log_ratio": found}, 2)
    refuse_beyond(1e-4, {"mismatch/max_abs_log_ratio": 1e-4}, 2)
    refuse_beyond(1e-4, {}, 2)
