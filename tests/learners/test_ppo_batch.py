"""A hand-made batch of two episodes: which column speaks of which token, and what each token is worth."""

import math

import pyarrow as pa
import pytest
import torch

from actors.episodes import EPISODE
from learners.ppo_batch import EpisodeBatch, RewardRules, episode_batch, minibatch_rows, reward_batch

EOS = 9
EPISODES = [
    {
        "prompt_tokens": [1, 2, 3],
        "response_tokens": [4, 5, EOS],
        "behaviour_logprobs": [-1.0, -2.0, -3.0],
        "reference_logprobs": [-1.5, -2.0, -2.0],
        "version_spans": [(1, 4, 0, 3)],
        "finish_reason": "stop",
        "score": 2.0,
    },
    {
        "prompt_tokens": [6],
        "response_tokens": [7, 8],
        "behaviour_logprobs": [-0.5, -0.25],
        "reference_logprobs": [-1.0, -0.5],
        "version_spans": [(1, 3, 0, 1), (1, 4, 1, 2)],
        "finish_reason": "length",
        "score": 3.0,
    },
]
RULES = RewardRules(
    kl_coefficient=0.1,
    kl_estimator="k1",
    discount=1.0,
    trace=1.0,
    whiten_rewards=False,
    whiten_advantages=False,
    missing_eos="replace",
    missing_eos_score=-1.0,
    missing_eos_penalty=1.0,
)


def table(*episodes: dict) -> pa.Table:
    spans = ("attempt", "update", "start", "end")
    rest = {"run": "r", "round": 1, "sample": 0, "attempt": 1, "prompt_id": "p", "generator": "g"}
    times = {"leased_at": 1.0, "generated_at": 2.0, "accepted_at": 3.0}
    rows = [
        {
            **rest,
            **times,
            "slot": slot,
            **episode,
            "version_spans": [dict(zip(spans, span, strict=True)) for span in episode["version_spans"]],
        }
        for slot, episode in enumerate(episodes)
    ]
    return pa.Table.from_pylist(rows, schema=EPISODE)


@pytest.fixture
def batch() -> EpisodeBatch:
    return episode_batch(table(*EPISODES), update=4)


def test_a_column_speaks_of_the_token_after_it(batch):
    targets = batch.sequences.tokens[:, 1:]
    assert targets[batch.mask].tolist() == [4, 5, EOS, 7, 8]
    # a prompt of three tokens: columns 0 and 1 speak of its second and third token, column 2 of the response's first
    assert batch.mask.tolist() == [[False, False, True, True, True], [True, True, False, False, False]]
    assert batch.behaviour_logprobs.tolist() == [[0, 0, -1, -2, -3], [-0.5, -0.25, 0, 0, 0]]
    assert batch.reference_logprobs.tolist() == [[0, 0, -1.5, -2, -2], [-1, -0.5, 0, 0, 0]]


def test_rows_keep_their_lengths_scores_and_endings(batch):
    assert (batch.rows, batch.width) == (2, 6)
    assert batch.lengths == [6, 3]
    assert batch.response_lengths().tolist() == [3, 2]
    assert batch.scores.tolist() == [2, 3]
    assert batch.ended.tolist() == [True, False]


def test_version_lag_is_counted_token_by_token(batch):
    assert batch.version_lag.tolist() == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.own_version.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    figures = reward_batch(batch, batch.behaviour_logprobs, torch.zeros_like(batch.behaviour_logprobs), RULES).figures
    assert figures["staleness/version_lag_mean"] == pytest.approx(1 / 5)
    assert figures["staleness/version_lag_max"] == 1


def test_weights_of_an_update_are_the_learners_own_whichever_attempt_published_them(batch):
    earlier = [{**row, "version_spans": [(0, *span[1:]) for span in row["version_spans"]]} for row in EPISODES]
    assert batch.own_version.any()
    assert torch.equal(episode_batch(table(*earlier), update=4).own_version, batch.own_version)


def test_a_slice_of_a_longer_table_in_several_chunks_reads_the_same(batch):
    longer = pa.concat_tables([table(EPISODES[1], EPISODES[0]), table(EPISODES[1])])
    cut = episode_batch(longer.slice(1, 2), update=4)
    assert torch.equal(cut.sequences.tokens, batch.sequences.tokens)
    assert torch.equal(cut.behaviour_logprobs, batch.behaviour_logprobs)
    assert torch.equal(cut.version_lag, batch.version_lag)


def by_hand(rules: RewardRules, values: list[list[float]]) -> list[list[float]]:
    """Advantages of the two responses, from the formulas, one Python number at a time."""
    scores = [2.0, rules.missing_eos_score]  # the second was cut before its end
    advantages = []
    for episode, score, value in zip(EPISODES, scores, values, strict=True):
        pairs = zip(episode["behaviour_logprobs"], episode["reference_logprobs"], strict=True)
        rewards = [-rules.kl_coefficient * (own - reference) for own, reference in pairs]
        rewards[-1] += score
        following, found = 0.0, []
        for t in reversed(range(len(rewards))):
            later = value[t + 1] if t + 1 < len(rewards) else 0.0
            following = rewards[t] + rules.discount * later - value[t] + rules.discount * rules.trace * following
            found.insert(0, following)
        advantages.append(found)
    return advantages


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
def test_scores_become_advantages_and_returns_as_the_formulas_say(batch, discount, trace):
    rules = RewardRules(**{**RULES.__dict__, "discount": discount, "trace": trace})
    values = [[0.3, -0.2, 0.7], [0.1, 0.4]]
    tensor = torch.tensor([[0, 0, *values[0]], [*values[1], 0, 0, 0]])
    rewards = reward_batch(batch, batch.behaviour_logprobs, tensor, rules)
    expected = [number for row in by_hand(rules, values) for number in row]
    assert rewards.advantages[batch.mask].tolist() == pytest.approx(expected, abs=1e-6)
    flat = [number for row in values for number in row]
    returns = [advantage + value for advantage, value in zip(expected, flat, strict=True)]
    assert rewards.returns[batch.mask].tolist() == pytest.approx(returns, abs=1e-6)
    assert not rewards.advantages[~batch.mask].any()
    assert not rewards.returns[~batch.mask].any()


def test_the_score_stands_on_the_last_token_and_a_cut_response_gets_the_replacement(batch):
    values = torch.zeros_like(batch.behaviour_logprobs)
    plain = RewardRules(**{**RULES.__dict__, "kl_coefficient": 0.0, "trace": 0.0})
    found = reward_batch(batch, batch.behaviour_logprobs, values, plain)
    assert found.advantages[batch.mask].tolist() == [0, 0, 2, 0, -1]
    subtracted = RewardRules(**{**plain.__dict__, "missing_eos": "subtract", "missing_eos_penalty": 0.5})
    found = reward_batch(batch, batch.behaviour_logprobs, values, subtracted)
    assert found.advantages[batch.mask].tolist() == [0, 0, 2, 0, 2.5]


def test_whitening_is_over_all_response_tokens_of_the_batch_and_leaves_returns_alone(batch):
    values = torch.zeros_like(batch.behaviour_logprobs)
    plain = reward_batch(batch, batch.behaviour_logprobs, values, RULES)
    white = reward_batch(
        batch, batch.behaviour_logprobs, values, RewardRules(**{**RULES.__dict__, "whiten_advantages": True})
    )
    tokens = white.advantages[batch.mask]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6)
    assert tokens.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(white.returns, plain.returns)


def test_figures_are_means_over_episodes_of_sums_over_tokens(batch):
    values = torch.zeros_like(batch.behaviour_logprobs)
    figures = reward_batch(batch, batch.behaviour_logprobs, values, RULES).figures
    kl = [0.5 + 0.0 - 1.0, 0.5 + 0.25]
    assert figures["objective/kl"] == pytest.approx(sum(kl) / 2)
    assert figures["objective/kl_per_token"] == pytest.approx(sum(kl) / 5)
    assert figures["objective/scores"] == pytest.approx(2.5)  # as scored, before the rule for cut responses
    assert figures["objective/non_score_reward"] == pytest.approx(-0.1 * sum(kl) / 2)
    assert figures["objective/rlhf_reward"] == pytest.approx((2.0 - 1.0) / 2 - 0.1 * sum(kl) / 2)
    assert figures["objective/entropy"] == pytest.approx((6.0 + 0.75) / 2)
    assert figures["response/length_mean"] == 2.5
    assert figures["response/truncated_fraction"] == 0.5
    assert figures["val/num_eos_tokens"] == 1


def test_the_penalty_uses_the_old_log_probabilities_that_it_is_given(batch):
    values = torch.zeros_like(batch.behaviour_logprobs)
    figures = reward_batch(batch, batch.reference_logprobs, values, RULES).figures
    assert figures["objective/kl"] == 0
    assert figures["objective/non_score_reward"] == 0


def test_explained_variance_is_one_for_the_returns_themselves_and_unknown_where_they_do_not_vary(batch):
    returns = reward_batch(batch, batch.behaviour_logprobs, torch.zeros_like(batch.behaviour_logprobs), RULES).returns
    found = reward_batch(batch, batch.behaviour_logprobs, returns, RULES)
    assert found.figures["val/explained_variance"] == pytest.approx(1, abs=1e-6)
    flat = RewardRules(**{**RULES.__dict__, "kl_coefficient": 0.0, "missing_eos_score": 2.0})
    same = reward_batch(batch, batch.behaviour_logprobs, torch.zeros_like(returns), flat)
    assert math.isnan(same.figures["val/explained_variance"])


def test_minibatches_are_a_seeded_partition_of_the_batch():
    parts = minibatch_rows(12, 4, (5, 0, 0))
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    assert sorted(row for part in parts for row in part) == list(range(12))
    assert parts == minibatch_rows(12, 4, (5, 0, 0))
    assert parts != minibatch_rows(12, 4, (5, 1, 0))
    assert parts != minibatch_rows(12, 4, (5, 0, 1))
