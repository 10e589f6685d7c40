import numpy as np
import pytest
import torch

from bench.kv import ADAM_STEPS, Bias, Cost, Step, bias_of, distance, stepped, table


def test_the_kl_is_that_of_what_was_drawn_from_to_what_is_exact():
    drawn_from, exact = np.array([0.8, 0.1, 0.1]), np.array([0.3, 0.4, 0.3])
    tokens = np.random.default_rng(0).choice(3, 200_000, p=drawn_from)
    bias = bias_of(np.log(drawn_from)[tokens], np.log(exact)[tokens])
    assert bias.kl_token_nats == pytest.approx((drawn_from * np.log(drawn_from / exact)).sum(), rel=0.02)
    assert bias.max_nats == pytest.approx(np.log(4))
    assert bias.tokens == 200_000
    other_way = (exact * np.log(exact / drawn_from)).sum()
    assert bias.kl_token_nats != pytest.approx(other_way, rel=0.02)


def test_equal_logprobs_have_no_bias():
    assert bias_of(np.array([-1.0, -2.0]), np.array([-1.0, -2.0])) == Bias(2, 0.0, 0.0, 0.0)


def test_the_step_is_a_copy_that_moves_by_the_learning_rate_and_other_seeds_elsewhere():
    model = torch.nn.Linear(40, 40)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    moved = stepped(model, 1e-3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    furthest = (moved.weight - model.weight).abs().max().item()
    assert 1e-3 < furthest < 1e-3 * ADAM_STEPS * 1.5
    assert distance(model, stepped(model, 1e-4, seed=1)) == pytest.approx(distance(model, moved) / 10, rel=0.01)
    assert not torch.equal(moved.weight, stepped(model, 1e-3, seed=2).weight)
    assert distance(model, model) == 0


def test_the_table_has_the_delay_of_both_and_a_row_for_every_bias():
    costs = {"recompute": [Cost(0.1, 0.5, 0.2, 900)], "keep": [Cost(0.1, 0.2, 0.2, 0)]}
    biases = {"recompute": Bias(64, 1e-6, 1e-5, 0.0), "keep": Bias(64, 0.01, 0.1, 0.002)}
    lines = table([Step(1e-4, 0.01, costs, biases, Bias(64, 0.02, 0.3, 0.005))])
    [late] = [line.split() for line in lines if "late by" in line]
    assert late[-2:] == ["0.4000", "0.1000"]
    [again] = [line.split() for line in lines if "computed again" in line]
    assert again[-2:] == ["900", "0"]
    [kept] = [line.split() for line in lines if line.split()[:1] == ["keep"]]
    assert kept == ["keep", "0.01", "0.1", "0.002", "0.128"]
