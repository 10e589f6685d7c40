"""What one PPO update does to the two networks, held against plain torch on the whole batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toy_episodes import documents, learner, llama

from corpus.problems import RunProblem
from learners.ppo_settings import PpoSettings
from learners.ppo_update import PretrainingOrder
from models import packing
from models.forward import PolicyModel, response_logprobs

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(autouse=True)
def packed(monkeypatch) -> list[int]:
    """Toy batches are packed too, short as they are. Filled with the rows of every attention that reads packed rows."""
    rows: list[int] = []
    monkeypatch.setattr(packing, "LENGTH_STEP", 1)
    homes = packing._homes

    def counted(places, tokens):
        rows.append(len(places))
        return homes(places, tokens)

    monkeypatch.setattr(packing, "_homes", counted)
    return rows


@pytest.fixture
def make():
    """`toy_episodes.learner`, whose engines are closed afterwards."""
    made = []

    def learner_of(**settings):
        made.append(learner(**settings))
        return made[-1]

    yield learner_of
    for each in made:
        each.update.policy.close()
        each.update.value.close()


def gradients(engine) -> dict[str, torch.Tensor]:
    """Of the first step: Adam's first moment is then (1 − β₁) times the gradient."""
    return {name: moment / 0.1 for name, moment in engine.state()["exp_avg"].items()}


def largest_difference(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def mean_advantage(each, rows: list[int] | None = None) -> float:
    rows = list(range(each.batch.rows)) if rows is None else rows
    return each.rewards.advantages[rows][each.batch.mask[rows]].mean().item()


# the first minibatch: all ratios are 1 --------------------------------------------------------------------------------


def test_the_first_minibatchs_policy_loss_is_minus_the_mean_advantage(make):
    each = make(minibatches=1)
    figures = each.run()
    assert abs(mean_advantage(each)) > 0.01  # else the claim would say nothing
    assert figures["loss/policy_avg"] == pytest.approx(-mean_advantage(each), abs=1e-6)
    assert figures["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert figures["policy/max_abs_log_ratio"] < 1e-5
    assert figures["policy/clipfrac_avg"] == 0
    assert figures["policy/approxkl_avg"] == pytest.approx(0, abs=1e-10)


def test_later_minibatches_see_a_policy_that_has_moved(make):
    figures = make(minibatches=4).run()
    assert figures["policy/max_abs_log_ratio"] > 1e-3
    still = make(minibatches=4, learning_rate=0.0).run()
    assert still["policy/max_abs_log_ratio"] < 1e-5


# gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ptx_loss", ["token_mean", "sequence_sum"])
def test_ppo_and_ptx_are_one_gradient_that_plain_torch_gives_too(make, ptx_loss):
    texts = documents()
    each = make(minibatches=1, pretraining=texts, ptx_coefficient=3.0, ptx_loss=ptx_loss, budget=24)
    each.run()

    policy = PolicyModel(llama())
    batch = each.batch
    logprobs = response_logprobs(
        policy, batch.sequences.tokens, batch.sequences.attention_mask, batch.sequences.response_mask, 0.7
    )
    ratio = (logprobs - batch.behaviour_logprobs)[batch.mask].exp()
    loss = -(ratio * each.rewards.advantages[batch.mask]).mean()
    chosen = PretrainingOrder(texts, 3, 8).at(0, 2 * batch.rows)
    nats = []
    for text in chosen:
        tokens = torch.from_numpy(text[None].astype(np.int64))
        logits = policy.causal_lm(tokens).logits[0, :-1]
        nats.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    ptx = torch.cat(nats).mean() if ptx_loss == "token_mean" else torch.stack([each.sum() for each in nats]).mean()
    (loss + 3.0 * ptx).backward()
    expected = {name.removeprefix("causal_lm."): p.grad for name, p in policy.named_parameters()}
    assert largest_difference(gradients(each.update.policy), expected) < 1e-5
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 0.1


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_gradients_do_not_depend_on_how_a_minibatch_is_cut_into_microbatches(make, zero_stage):
    settings = {"minibatches": 1, "pretraining": documents(), "ptx_coefficient": 3.0, "zero_stage": zero_stage}
    whole = make(budget=8192, **settings)
    figures = whole.run()
    for budget in (1, 24):
        cut = make(budget=budget, **settings)
        found = cut.run()
        for name in ("policy", "value"):
            own, expected = getattr(cut.update, name), getattr(whole.update, name)
            assert largest_difference(gradients(own), gradients(expected)) < 1e-5, (budget, name)
        assert found == pytest.approx(figures, rel=1e-4, abs=1e-6, nan_ok=True)


def test_leaving_padding_out_changes_no_gradient(make, packed, monkeypatch):
    settings = {"minibatches": 1, "pretraining": documents(), "ptx_coefficient": 3.0}
    each = make(**settings)
    each.run()
    assert len(packed) >= 10  # two layers, forward passes of policy and value, and the arguments of each
    packed.clear()
    monkeypatch.setattr(packing, "packs", lambda model: False)
    plain = make(**settings)
    plain.run()
    assert packed == []
    for name in ("policy", "value"):
        own, expected = getattr(each.update, name), getattr(plain.update, name)
        assert largest_difference(gradients(own), gradients(expected)) < 1e-5, name


def test_a_padded_row_in_a_wider_batch_weighs_no_more(make):
    """The same episodes, padded to twice the width: nothing changes but rounding."""
    narrow, wide = make(minibatches=1), make(minibatches=1)
    padding = (0, wide.batch.width)
    sequences = wide.batch.sequences
    pad = torch.nn.functional.pad
    wide.batch = dataclasses.replace(
        wide.batch,
        sequences=dataclasses.replace(
            sequences,
            tokens=pad(sequences.tokens, padding),
            attention_mask=pad(sequences.attention_mask, padding),
            response_mask=pad(sequences.response_mask, padding),
        ),
        mask=pad(wide.batch.mask, padding),
        behaviour_logprobs=pad(wide.batch.behaviour_logprobs, padding),
    )
    wide.rewards = dataclasses.replace(
        wide.rewards,
        advantages=pad(wide.rewards.advantages, padding, value=float("nan")),
        returns=pad(wide.rewards.returns, padding, value=float("nan")),
    )
    wide.old_values = pad(wide.old_values, padding)
    narrow.run()
    wide.run()
    for name in ("policy", "value"):  # not to the bit: rows are padded to another width, and sums are of other lengths
        own, expected = getattr(wide.update, name).weights(), getattr(narrow.update, name).weights()
        assert largest_difference(own, expected) < 1e-6, name


# steps ----------------------------------------------------------------------------------------------------------------


def test_each_minibatch_of_each_inner_epoch_is_one_optimiser_step(make):
    each, steps = make(minibatches=4, inner_epochs=2, pretraining=documents(), ptx_coefficient=1.0), []
    each.run(after_step=lambda: steps.append(each.update.policy.steps))
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert each.update.value.steps == 8


def test_with_a_warming_critic_the_policy_does_not_move(make):
    each = make(critic_warmup_updates=1, pretraining=documents(), ptx_coefficient=1.0)
    before, value_before = each.update.policy.weights(), each.update.value.weights()
    averaged = []
    figures = each.run(0, after_step=lambda: averaged.append(1))
    assert largest_difference(each.update.policy.weights(), before) == 0
    assert largest_difference(each.update.value.weights(), value_before) > 1e-3
    assert (each.update.policy.steps, figures["lr"], averaged) == (0, 0.0, [])
    figures = each.run(1, after_step=lambda: averaged.append(1))
    assert largest_difference(each.update.policy.weights(), before) > 1e-3
    assert (figures["lr"], len(averaged)) == (1e-2, 2)


def test_a_critic_that_warms_up_to_the_end_is_refused():
    with pytest.raises(ValidationError, match="critic_warmup_updates 2 leaves the policy none of the 2 updates"):
        PpoSettings(updates=2, critic_warmup_updates=2)
    PpoSettings(updates=3, critic_warmup_updates=2)


def test_at_learning_rate_zero_nothing_moves(make):
    each = make(learning_rate=0.0, pretraining=documents(), ptx_coefficient=1.0)
    before = each.update.policy.weights()
    each.run()
    assert largest_difference(each.update.policy.weights(), before) == 0


# ptx ------------------------------------------------------------------------------------------------------------------


def test_a_ptx_coefficient_of_zero_is_plain_ppo(make):
    plain, zero = make(), make(pretraining=documents(), ptx_coefficient=0.0)
    mixed = make(pretraining=documents(), ptx_coefficient=1.0)
    figures = [each.run() for each in (plain, zero, mixed)]
    weights = [each.update.policy.weights() for each in (plain, zero, mixed)]
    assert largest_difference(weights[0], weights[1]) == 0
    assert largest_difference(weights[0], weights[2]) > 1e-3
    assert figures[1]["loss/ptx"] == 0
    assert figures[2]["loss/ptx"] == pytest.approx(math.log(16), abs=0.5)


def test_pretraining_documents_go_on_where_the_update_before_stopped_and_return_after_a_pass():
    texts = [np.array([number, number]) for number in range(10)]
    order = PretrainingOrder(texts, 7, 8)
    first = [text[0] for text in order.at(0, 10)]
    assert sorted(first) == list(range(10))
    assert [text[0] for text in order.at(4, 3)] == first[4:7]
    second = [text[0] for text in order.at(10, 10)]
    assert sorted(second) == list(range(10))
    assert second != first
    assert [text[0] for text in order.at(8, 4)] == [*first[8:], *second[:2]]


def test_documents_are_cut_at_the_context_and_single_tokens_are_left_out():
    order = PretrainingOrder([np.arange(9), np.arange(1)], 0, 4)
    assert [len(text) for text in order.at(0, 3)] == [4, 4, 4]
    with pytest.raises(RunProblem, match="pretraining documents of at least two tokens"):
        PretrainingOrder([np.arange(1)], 0, 4)


# off-policy -----------------------------------------------------------------------------------------------------------


def test_the_decoupled_objective_weighs_by_learner_over_behaviour_up_to_the_cap(make):
    losses = {}
    for cap in (None, 2.0):
        each = make(minibatches=1, old_logprobs="recomputed", decoupled=True, importance_cap=cap)
        old = each.batch.behaviour_logprobs
        older = torch.where(each.batch.mask, old - 1.0, 0.0)  # what wrote the tokens was e times less sure of them
        each.batch = dataclasses.replace(each.batch, behaviour_logprobs=older)
        losses[cap] = each.run(old_logprobs=old)["loss/policy_avg"] / -mean_advantage(each)
    assert losses == pytest.approx({None: math.e, 2.0: 2.0}, rel=1e-4)


def test_a_stale_behaviour_as_the_old_policy_is_clipped_instead(make):
    each = make(minibatches=1)
    mask, advantages = each.batch.mask, each.rewards.advantages
    figures = each.run(old_logprobs=torch.where(mask, each.batch.behaviour_logprobs - 1.0, 0.0))
    ratio = torch.tensor(math.e)
    expected = -torch.minimum(ratio * advantages, 1.2 * advantages)[mask].mean().item()
    assert figures["loss/policy_avg"] == pytest.approx(expected, rel=1e-4)
    assert figures["val/ratio"] == pytest.approx(math.e, rel=1e-4)
    positive = (advantages[mask] > 0).float().mean().item()
    assert figures["policy/clipfrac_avg"] == pytest.approx(positive, abs=1e-6)


# what must not pass ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_step_and_is_named(make):
    each = make()
    each.rewards.returns[each.batch.mask] = float("nan")
    before = each.update.policy.weights(), each.update.value.weights()
    with pytest.raises(RunProblem, match=r"update 1, minibatch 1, the losses are policy .*, value nan"):
        each.run()
    assert largest_difference(each.update.policy.weights(), before[0]) == 0
    assert largest_difference(each.update.value.weights(), before[1]) == 0


def test_an_entropy_bonus_is_subtracted_from_the_gradient_of_the_loss(make):
    plain, bonus = make(minibatches=1), make(minibatches=1, entropy_coefficient=0.5)
    plain.run()
    bonus.run()
    policy = PolicyModel(llama())
    sequences = plain.batch.sequences
    _, entropy = policy(
        sequences.tokens,
        sequences.attention_mask,
        sequences.response_mask,
        0.7,
        with_entropy=True,
        entropy_gradient=True,
    )
    (-0.5 * entropy[plain.batch.mask].mean()).backward()
    expected = {name.removeprefix("causal_lm."): p.grad for name, p in policy.named_parameters()}
    found = {name: own - gradients(plain.update.policy)[name] for name, own in gradients(bonus.update.policy).items()}
    assert largest_difference(found, expected) < 1e-5
