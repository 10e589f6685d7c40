"""A PPO stage small enough for a test: what the stages before it leave, its settings, and the job of its learner."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from toy_data import write_counting
from toy_episodes import llama

from actors.conductor import HeldOut
from actors.settings import SamplingSettings
from actors.stream import StreamPlan
from corpus.schemas import make_table, write_table
from learners.engine_settings import EngineSettings
from learners.optimizer import OptimizerSettings
from learners.ppo_job import PpoJob
from learners.ppo_settings import PpoSettings
from models.build import load_tokenizer
from models.export import export_causal_lm
from models.scalar_head import ScalarHeadModel

TEMPERATURE = 0.8
OPTIMIZER = OptimizerSettings(peak_lr=1e-2, schedule="constant", eps=1e-5)


def write_given(directory: Path, tokenizer_directory: Path) -> Path:
    """What the stages before PPO leave: policy, reward model, prompts, pretraining text."""
    tokenizer = load_tokenizer(str(tokenizer_directory))
    model = llama()
    export_causal_lm(directory / "policy", model, model.state_dict(), tokenizer, max_new_tokens=5)
    ScalarHeadModel(llama(1).model, seed=2).save_reward_model(directory / "rm", tokenizer, bias=0.0)
    random = np.random.default_rng(0)
    tokens = [random.integers(0, 13, random.integers(1, 6)).tolist() for _ in range(12)]
    columns = {"prompt_id": [f"p{i}" for i in range(12)], "user_id": ["u"] * 12, "prompt": ["?"] * 12}
    prompts = make_table("prompts", {**columns, "prompt_tokens": tokens, "meta": [""] * 12})
    write_table(prompts, directory / "prompts.parquet", "prompts")
    write_counting(directory / "pretraining.parquet")
    return directory


def settings_of(**settings: Any) -> PpoSettings:
    """Four updates of eight episodes, with everything due every second one, unless told otherwise."""
    return PpoSettings(
        **{
            "updates": 4,
            "batch_size": 8,
            "minibatches": 2,
            "chunk_size": 4,
            "ptx_coefficient": 0.5,
            "ptx_per_episode": 1,
            "ptx_context": 8,
            "policy": OPTIMIZER,
            "value": OPTIMIZER,
            "kl_controller": "adaptive",
            "kl_horizon_episodes": 100,
            "evaluate_every": 2,
            "checkpoint_every": 2,
            **settings,
        }
    )


def plan_of(given: Path, directory: Path, settings: PpoSettings) -> StreamPlan:
    """The plan of the stage's stream."""
    return StreamPlan(
        prompts=str(given / "prompts.parquet"),
        directory=str(directory / "episodes"),
        seed=3,
        round_number=1,
        batch_size=settings.batch_size,
        chunk_size=settings.chunk_size,
        max_staleness=settings.max_staleness,
        batches=settings.updates,
        lease_s=60.0,
    )


def job_of(
    given: Path,
    directory: Path,
    tokenizer: Path,
    settings: PpoSettings,
    stream: Any,
    conductor: Any,
    engine: EngineSettings | None = None,
    identity: str = "toy",
) -> PpoJob:
    """The learner's job. `stream` and `conductor` are handles, or what looks like them."""
    return PpoJob(
        identity=identity,
        settings=settings,
        sampling=SamplingSettings(temperature=TEMPERATURE, max_response_tokens=5),
        engine=engine or EngineSettings(tokens_per_microbatch=32),
        seed=0,
        directory=directory,
        tokenizer=str(tokenizer),
        policy=str(given / "policy"),
        reward_model=str(given / "rm"),
        pretraining=given / "pretraining.parquet",
        stream=stream,
        conductor=conductor,
        rollout_dtype="float32",
        rollout_transport="object_store",
        answer_deadline_s=60.0,
        held_out=HeldOut(pq.read_table(given / "prompts.parquet"), 1, 0),
    )
