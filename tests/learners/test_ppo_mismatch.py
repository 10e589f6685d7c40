"""Which tokens engine and learner are held to agree on."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from corpus.problems import RunProblem
from learners.ppo_mismatch import default_bound, effective_sample_size, mismatch, refuse_beyond, refuse_straggler

SIZE = {"staleness/effective_sample_size": 1.0}


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
    assert found(True, own, apart).keys() == {"staleness/effective_sample_size"}
    assert "mismatch/max_abs_log_ratio" in found(False, own, apart)


def test_the_effective_sample_size_is_that_of_the_importance_weights():
    assert effective_sample_size(torch.full((8,), -3.0)) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([0.0, 0.0, -99.0, -99.0])) == pytest.approx(1 / 2)
    weights = torch.tensor([1.0, 2.0, 3.0]).double()
    assert effective_sample_size(weights.log() + 800) == pytest.approx(36 / (3 * 14))
    assert math.isnan(effective_sample_size(torch.tensor([0.0, float("nan")])))


def test_it_is_that_of_all_tokens_also_of_those_that_older_weights_wrote():
    of_all = found(False, [[0, 0, 1, 1]], [[5.0, 1.0, 0.0, 0.0]])["staleness/effective_sample_size"]
    assert of_all == pytest.approx(effective_sample_size(torch.tensor([1.0, 0.0, 0.0])))


@pytest.mark.parametrize("size", [0.09, float("nan")])
def test_a_batch_below_the_least_sample_size_is_refused_and_one_above_is_not(size):
    with pytest.raises(RunProblem, match=r"at update 4 the effective sample size is .*, below .* of 0\.1") as problem:
        refuse_beyond(1.0, 0.1, {"staleness/effective_sample_size": size}, 3)
    assert problem.value.code == "ppo/off-policy"
    refuse_beyond(1.0, None, {"staleness/effective_sample_size": size}, 3)
    refuse_beyond(1.0, 0.1, {"staleness/effective_sample_size": 0.11}, 3)


def test_a_straggler_is_refused_only_beyond_a_bound():
    refuse_straggler(None, 1e9, 0)
    refuse_straggler(10.0, 9.9, 0)
    with pytest.raises(RunProblem, match=r"update 1 took 11 s .* more than ppo\.straggler_bound_s of 10") as problem:
        refuse_straggler(10.0, 11.0, 0)
    assert problem.value.code == "ppo/straggler"


def test_the_bound_is_tightest_on_the_first_minibatch_in_float32():
    assert default_bound("float32", "float32", first_minibatch=True) == 1e-4
    assert default_bound("float32", "float32") == 1e-3
    for pair in (("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        assert default_bound(*pair, first_minibatch=True) == default_bound(*pair) == 1.0


def test_what_is_beyond_the_bound_or_no_number_is_refused_and_what_is_within_it_is_not():
    for found in (1.01e-4, float("nan"), float("inf")):
        with pytest.raises(RunProblem, match=r"at update 3 engine and learner disagree .* beyond the bound of 0\.0001"):
            refuse_beyond(1e-4, None, {**SIZE, "mismatch/max_abs_log_ratio": found}, 2)
    refuse_beyond(1e-4, None, {**SIZE, "mismatch/max_abs_log_ratio": 1e-4}, 2)
    refuse_beyond(1e-4, None, SIZE, 2)
