"""Episodes and networks over the sixteen tokens of the tests' tokenizer, small enough to check gradients by hand."""

import dataclasses

import numpy as np
import pyarrow as pa
import torch

from actors.episodes import EPISODE
from learners.engine import Engine
from learners.engine_settings import EngineSettings
from learners.optimizer import OptimizerSettings
from learners.ppo_batch import EpisodeBatch, RewardRules, Rewards, episode_batch, reward_batch
from learners.ppo_settings import PpoSettings
from learners.ppo_update import PpoUpdate, PretrainingOrder
from models.build import TinyLlamaSettings, tiny_llama
from models.forward import PolicyModel
from models.scalar_head import ScalarHeadModel

EOS, PAD, WORDS = 14, 13, 16
SHAPE = TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=32)
RULES = RewardRules(
    kl_coefficient=0.1,
    kl_estimator="k1",
    discount=1.0,
    trace=0.95,
    whiten_rewards=False,
    whiten_advantages=False,
    missing_eos="none",
    missing_eos_score=-1.0,
    missing_eos_penalty=1.0,
)


def llama(seed: int = 0):
    return tiny_llama(SHAPE, WORDS, PAD, None, EOS, seed=seed)


def episodes(rows: int, seed: int = 0) -> pa.Table:
    """Prompts of 1 to 6 tokens, responses of 1 to 8, all by version (0, 0), with log-probs drawn at random."""
    random = np.random.default_rng(seed)
    found = []
    for slot in range(rows):
        prompt = random.integers(0, 13, random.integers(1, 7)).tolist()
        response = [*random.integers(0, 13, random.integers(0, 8)).tolist(), EOS]
        found.append(
            {
                "run": "toy",
                "round": 1,
                "slot": slot,
                "sample": 0,
                "attempt": 0,
                "prompt_id": str(slot),
                "prompt_tokens": prompt,
                "response_tokens": response,
                "behaviour_logprobs": (-3 * random.random(len(response))).tolist(),
                "version_spans": [{"attempt": 0, "update": 0, "start": 0, "end": len(response)}],
                "finish_reason": "stop",
                "generator": "g",
                "leased_at": 1.0,
                "generated_at": 2.0,
                "score": random.normal(),
                "reference_logprobs": (-3 * random.random(len(response))).tolist(),
                "accepted_at": 3.0,
            }
        )
    return pa.Table.from_pylist(found, schema=EPISODE)


def documents(count: int = 40, seed: int = 9) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 13, random.integers(2, 9)).astype(np.int32) for _ in range(count)]


@dataclasses.dataclass
class Learner:
    """A policy and a value engine with the update between them, and one batch of the policy's own episodes."""

    update: PpoUpdate
    batch: EpisodeBatch
    rewards: Rewards
    old_values: torch.Tensor

    def run(self, number: int = 0, old_logprobs: torch.Tensor | None = None, after_step=lambda: None):
        old = self.batch.behaviour_logprobs if old_logprobs is None else old_logprobs
        return self.update.run(self.batch, self.rewards, old, self.old_values, number, after_step)


def learner(
    rows: int = 8,
    budget: int = 8192,
    learning_rate: float = 1e-2,
    pretraining: list[np.ndarray] | None = None,
    zero_stage: int = 0,
    rules: RewardRules = RULES,
    **settings,
) -> Learner:
    """A learner whose behaviour log-probs are its own, so that every ratio is 1 until it moves."""
    optimizer = OptimizerSettings(peak_lr=learning_rate, schedule="constant", eps=1e-5)
    chosen = PpoSettings(
        **{
            "updates": 4,
            "batch_size": rows,
            "minibatches": 2,
            "chunk_size": rows,
            "ptx_coefficient": 0.0,
            "ptx_per_episode": 2,
            "policy": optimizer,
            "value": optimizer,
            **settings,
        }
    )
    engine = EngineSettings(zero_stage=zero_stage, tokens_per_microbatch=budget)
    policy = Engine(PolicyModel(llama()), engine, optimizer, 0)
    value = Engine(ScalarHeadModel(llama(1).model, seed=2), engine, optimizer, 1)
    order = PretrainingOrder(pretraining, 3, 8) if pretraining is not None else None
    update = PpoUpdate(policy, value, chosen, 0.7, budget, 5, order)
    batch = episode_batch(episodes(rows), 0)
    batch = dataclasses.replace(batch, behaviour_logprobs=update.logprobs(batch))
    old_values = update.values(batch)
    return Learner(update, batch, reward_batch(batch, batch.behaviour_logprobs, old_values, rules), old_values)
