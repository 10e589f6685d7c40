"""The recipe of the toy run. Apart from the run itself, so that reading it imports no torch."""

from pathlib import Path

from actors.rewards import RewardSettings
from actors.settings import FleetSettings, RolloutSettings, SamplingSettings, ScoringSettings
from amenable.recipe import LearnerSettings, Recipe
from corpus.files import FileCorpusSettings
from corpus.tokenising import TokenLimits
from learners.engine_settings import EngineSettings
from learners.optimizer import OptimizerSettings
from learners.ppo_settings import PpoSettings

UPDATES, BATCH_SIZE = 4, 8


def recipe_of(root: Path, updates: int = UPDATES, restarts: int = 5, stale: bool = False) -> Recipe:
    """Updates of eight episodes with a checkpoint after each, two generators, a scorer and a reference; whoever is
    silent is found in seconds. `restarts` is the budget of each role. `stale`: staleness 1, and two learner ranks with
    ZeRO 1.

    The effective sample size is unbound where weights of an update before write the tokens. Two of Adam's steps at this
    learning rate move the logits of a policy of 64 units by more than a nat, and the first minibatch has 20 tokens at
    most: one rare token that has become likely outweighs them, and a share of 1/20 would end a campaign whose subject
    is who dies.
    """
    optimizer = OptimizerSettings(peak_lr=1e-2, schedule="constant", eps=1e-5)
    return Recipe(
        name="chaos",
        run_directory=str(root),
        seed=3,
        deadline_s=120,
        corpus=FileCorpusSettings(path=str(root / "data")),
        tokens=TokenLimits(max_prompt_tokens=6, max_response_tokens=5, context_tokens=16),
        learners=LearnerSettings(
            workers=2 if stale else 1,
            max_restarts=restarts,
            silence_s=15,
            stall_s=120,
            engine=EngineSettings(tokens_per_microbatch=64, zero_stage=1 if stale else 0),
        ),
        rollouts=RolloutSettings(generators=2, max_concurrent=8),
        scoring=ScoringSettings(fused=False),
        fleet=FleetSettings(
            heartbeat_s=0.5, suspect_after_s=5, dead_after_s=15, start_deadline_s=200, restarts=restarts
        ),
        sampling=SamplingSettings(temperature=0.8, max_response_tokens=5),
        reward=RewardSettings(kind="function", function="toy_reward:count_threes"),
        ppo=PpoSettings(
            updates=updates,
            batch_size=BATCH_SIZE,
            max_staleness=1 if stale else 0,
            min_effective_sample_size=None if stale else 0.1,
            minibatches=2,
            chunk_size=2,
            ptx_coefficient=0.5,
            ptx_per_episode=1,
            ptx_context=8,
            policy=optimizer,
            value=optimizer,
            evaluate_every=100,
            evaluation_prompts=4,
            checkpoint_every=1,
            batch_deadline_s=120,
        ),
    )
