"""A batch of episodes as the learner holds it: padded tensors, aligned with targets, the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from learners.batching import pad
from learners.process_group import device
from learners.rows import list_values
from models.sequences import SequenceBatch, sequence_batch
from objectives.advantages import generalised_advantages
from objectives.kl import kl_per_token, sequence_kl
from objectives.masks import masked_mean
from objectives.normalise import Moments, whiten
from objectives.rewards import scores_with_eos_rule, token_rewards
from objectives.value import explained_variance


@dataclass(frozen=True)
class EpisodeBatch:
    """All episodes of one update. Column t of a [batch, time − 1] tensor speaks of token t + 1."""

    sequences: SequenceBatch
    lengths: list[int]
    """Prompt + response tokens of each row."""
    mask: Bool[Tensor, "batch targets"]
    """True at response tokens."""
    behaviour_logprobs: Float[Tensor, "batch targets"]
    reference_logprobs: Float[Tensor, "batch targets"]
    own_version: Bool[Tensor, "batch targets"]
    """True at response tokens that the learner's present weights wrote."""
    scores: Float[Tensor, " batch"]
    ended: Bool[Tensor, " batch"]
    """True where the response ends with end-of-text."""
    version_lag: Float[Tensor, "batch targets"]
    """Updates by which the weights that wrote a response token were older than the learner's."""

    @property
    def rows(self) -> int:
        """Number of episodes."""
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Columns of the sequences."""
        return self.sequences.tokens.shape[1]

    def response_lengths(self) -> Float[Tensor, " batch"]:
        """Response tokens of each episode."""
        return self.mask.sum(-1).float()


def episode_batch(table: pa.Table, update: int) -> EpisodeBatch:
    """The batch of an episode table, for a learner whose weights are those of `update`.

    Weights of that update are the learner's own whichever attempt published them: an episode that was accepted before a
    restart is of the checkpoint's weights, and the stream has none of weights that were rolled back.
    """
    prompts = [row.tolist() for row in list_values(table["prompt_tokens"])]
    responses = [row.tolist() for row in list_values(table["response_tokens"])]
    sequences = sequence_batch(prompts, responses)
    mask = sequences.response_mask[:, 1:]
    spans: list[list[dict[str, int]]] = table["version_spans"].to_pylist()
    own = np.zeros(mask.shape, dtype=bool)
    lag = np.zeros(mask.shape, dtype=np.float32)
    for row, (prompt, row_spans) in enumerate(zip(prompts, spans, strict=True)):
        for span in row_spans:
            columns = slice(len(prompt) - 1 + span["start"], len(prompt) - 1 + span["end"])
            own[row, columns] = span["update"] == update
            lag[row, columns] = update - span["update"]
    return EpisodeBatch(
        sequences=sequences,
        lengths=[len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)],
        mask=mask,
        behaviour_logprobs=_at_responses(table["behaviour_logprobs"], mask),
        reference_logprobs=_at_responses(table["reference_logprobs"], mask),
        own_version=torch.from_numpy(own),
        scores=torch.from_numpy(table["score"].to_numpy().copy()),
        ended=torch.tensor([reason == "stop" for reason in table["finish_reason"].to_pylist()]),
        version_lag=torch.from_numpy(lag),
    )


def _at_responses(column: pa.ChunkedArray, mask: Bool[Tensor, "batch targets"]) -> Float[Tensor, "batch targets"]:
    values = torch.zeros(mask.shape, dtype=torch.float32)
    values[mask] = torch.from_numpy(np.concatenate(list_values(column)).astype(np.float32, copy=False))
    return values


def summed_over_ranks(values: Float[Tensor, "batch targets"]) -> Float[Tensor, "batch targets"]:
    """Rows that each rank filled in for its share, and left 0 elsewhere, put together on every rank."""
    if dist.get_world_size() == 1:
        return values
    moved = values.to(device())
    dist.all_reduce(moved)
    return moved.cpu()


@dataclass(frozen=True)
class Rewards:
    """What a batch is worth, token by token, and the means that are logged."""

    advantages: Float[Tensor, "batch targets"]
    returns: Float[Tensor, "batch targets"]
    figures: dict[str, float]


@dataclass(frozen=True)
class RewardRules:
    """The choices between a score and an advantage; see `PpoSettings` for each and its source."""

    kl_coefficient: float
    kl_estimator: str
    discount: float
    trace: float
    whiten_rewards: bool
    whiten_advantages: bool
    missing_eos: str
    missing_eos_score: float
    missing_eos_penalty: float

    def with_coefficient(self, kl_coefficient: float) -> "RewardRules":
        """The same rules with another β."""
        return replace(self, kl_coefficient=kl_coefficient)


def reward_batch(
    batch: EpisodeBatch,
    old_logprobs: Float[Tensor, "batch targets"],
    values: Float[Tensor, "batch targets"],
    rules: RewardRules,
) -> Rewards:
    """Scores → EOS rule → per-token rewards with the KL penalty → GAE → whitening over the whole batch."""
    mask = batch.mask
    scores = scores_with_eos_rule(
        batch.scores,
        batch.ended,
        rules.missing_eos,  # pyright: ignore[reportArgumentType] - a Literal of the settings
        rules.missing_eos_score,
        rules.missing_eos_penalty,
    )
    kl = kl_per_token(old_logprobs, batch.reference_logprobs, rules.kl_estimator)  # pyright: ignore[reportArgumentType]
    rewards = token_rewards(scores, kl, mask, rules.kl_coefficient)
    if rules.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = generalised_advantages(rewards, values, mask, rules.discount, rules.trace)
    if rules.whiten_advantages:
        advantages = whiten(advantages, mask)
    nats = sequence_kl(kl_per_token(old_logprobs, batch.reference_logprobs, "k1"), mask)
    lengths = batch.response_lengths()
    penalty = rules.kl_coefficient * sequence_kl(kl, mask)
    errors, spread = Moments.of(returns - values, mask), Moments.of(returns, mask)
    return Rewards(
        advantages,
        returns,
        {
            "objective/kl": nats.mean().item(),
            "objective/kl_per_token": masked_mean(old_logprobs - batch.reference_logprobs, mask).item(),
            "objective/kl_coefficient": rules.kl_coefficient,
            "objective/entropy": -sequence_kl(old_logprobs, mask).mean().item(),
            "objective/scores": batch.scores.mean().item(),
            "objective/scores_std": batch.scores.std(correction=0).item(),
            "objective/non_score_reward": -penalty.mean().item(),
            "objective/rlhf_reward": (scores - penalty).mean().item(),
            "response/length_mean": lengths.mean().item(),
            "response/length_std": lengths.std(correction=0).item(),
            "response/truncated_fraction": 1.0 - batch.ended.float().mean().item(),
            "val/num_eos_tokens": float(batch.ended.sum()),
            "val/explained_variance": explained_variance(errors, spread),
            "staleness/version_lag_mean": masked_mean(batch.version_lag, mask).item(),
            "staleness/version_lag_max": batch.version_lag[mask].max().item(),
        },
    )


def minibatch_rows(rows: int, minibatches: int, seed: Sequence[int]) -> list[list[int]]:
    """The rows of each minibatch: a seeded permutation of the batch, cut into equal parts."""
    order = np.random.default_rng(list(seed)).permutation(rows)
    return [part.tolist() for part in np.split(order, minibatches)]


def padded_rows(rows: Sequence[np.ndarray], width: int) -> tuple[Tensor, Tensor]:
    """Documents as tokens right-padded to `width`, and their attention mask."""
    tokens = pad(rows, 0, torch.int64, width)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1])[None] < lengths[:, None]
