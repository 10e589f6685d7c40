import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_torch import TinyNetwork, train_plain
from recording_worker import RecordingWorker
from safetensors.torch import load_file
from toy_data import demonstration_rows, write_comparisons, write_demonstrations
from toy_ppo import job_of, settings_of, write_given
from two_ranks import OPTIMIZER, largest_difference
from two_ranks import train_ppo as train_ppo_here

from learners import answers
from learners.engine import Engine, EngineSettings
from learners.language_model import LanguageModelJob, LanguageModelSettings, train_language_model
from learners.metrics import read_metrics
from learners.optimizer import OptimizerSettings
from learners.ppo import train_ppo
from learners.ppo_job import PpoJob
from learners.reward_model import RewardModelJob, RewardModelSettings, train_reward_model
from models.build import TinyLlamaSettings

HERE = Path(__file__).parent
# Adam divides by the gradient, and so by its rounding where that is all there is: a larger epsilon leaves it out.
WELL_CONDITIONED = OptimizerSettings(peak_lr=1e-3, eps=1e-4)
SMALL_STEPS = OptimizerSettings(peak_lr=1e-3, schedule="constant", eps=1e-5)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def language_model_job(directory: Path, data: Path, tokenizer: Path, stage: int) -> LanguageModelJob:
    """A minibatch is three rows in micro-batches of one or two, so that one rank of two runs a row of weight 0."""
    return LanguageModelJob(
        stage="sft",
        identity="a",
        settings=LanguageModelSettings(
            optimizer=WELL_CONDITIONED,
            batch_size=3,
            epochs=1,
            context_length=16,
            residual_dropout=0.0,
        ),
        engine=EngineSettings(zero_stage=stage, tokens_per_microbatch=16),
        seed=0,
        directory=directory,
        tokenizer=str(tokenizer),
        start=TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=16),
        max_new_tokens=4,
        demonstrations=write_demonstrations(data / "train.parquet", demonstration_rows(20, 0)),
        demonstrations_valid=write_demonstrations(data / "valid.parquet", demonstration_rows(7, 1)),
    )


def reward_model_job(directory: Path, data: Path, tokenizer: Path, start: Path, stage: int) -> RewardModelJob:
    """One ranking a minibatch: the other rank has none."""
    return RewardModelJob(
        stage="rm",
        identity="a",
        settings=RewardModelSettings(optimizer=WELL_CONDITIONED, batch_prompts=1),
        engine=EngineSettings(zero_stage=stage),
        seed=0,
        directory=directory,
        start=str(start),
        tokenizer=str(tokenizer),
        comparisons=write_comparisons(data / "comparisons.parquet", 9, 0),
        comparisons_valid=write_comparisons(data / "comparisons-valid.parquet", 3, 1),
        demonstrations=data / "valid.parquet",
    )


def ppo_job(directory: Path, given: Path, tokenizer: Path, stage: int) -> PpoJob:
    """A minibatch is one episode, so that in every one of them one of two ranks has none."""
    settings = settings_of(updates=2, minibatches=8, policy=SMALL_STEPS, value=SMALL_STEPS)
    return job_of(given, directory, tokenizer, settings, None, None, EngineSettings(zero_stage=stage))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tokenizer_directory) -> Path:
    """Runs two_ranks.py as two processes and gives their directory."""
    directory = tmp_path_factory.mktemp("two_ranks")
    jobs: list[tuple[Callable, object]] = []
    for stage in (0, 3):
        lm = language_model_job(directory / f"lm-{stage}", directory, tokenizer_directory, stage)
        jobs.append((train_language_model, lm))
        start = lm.directory / "epoch-01"
        rm = reward_model_job(directory / f"rm-{stage}", directory, tokenizer_directory, start, stage)
        jobs.append((train_reward_model, rm))
    given = write_given(directory / "given", tokenizer_directory)
    jobs += [
        (train_ppo, ppo_job(directory / f"ppo-{stage}", given, tokenizer_directory, stage)) for stage in (0, 1, 2, 3)
    ]
    (directory / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "two_ranks.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(directory)],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=550)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    return directory


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_plain_torch_does_in_one_process(two_ranks, stage):
    torch.manual_seed(0)
    reference, _ = train_plain(TinyNetwork(), OPTIMIZER)
    states = [torch.load(two_ranks / f"stage-{stage}-rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in states:
        assert largest_difference(state["weights"], reference) < 1e-6


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_state_of_two_ranks_is_that_of_one(two_ranks, stage):
    torch.manual_seed(0)
    base = TinyNetwork()
    state = torch.load(two_ranks / f"stage-{stage}-rank-0.pt", weights_only=True)
    engine = Engine(copy.deepcopy(base), EngineSettings(), OPTIMIZER, 0)
    engine.load_state(state)
    again = engine.state()
    engine.close()
    assert again["steps"] == state["steps"] == 5
    for key in ("weights", "exp_avg", "exp_avg_sq"):
        assert largest_difference(again[key], state[key]) == 0


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 3])
def test_supervised_training_on_two_ranks_is_that_on_one(two_ranks, tokenizer_directory, tmp_path, stage):
    def results_of_ranks(name: str) -> dict:
        first, second = (json.loads((two_ranks / f"{name}-rank-{rank}.json").read_text()) for rank in (0, 1))
        for figures in (first, second):
            for timing in ("seconds", "tokens_per_s", "peak_memory_bytes"):
                del figures[timing]
        assert first == second
        return first

    def losses(directory: Path) -> list[float]:
        return [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]

    job = language_model_job(tmp_path / "lm", tmp_path, tokenizer_directory, 0)
    alone = train_language_model(job, RecordingWorker())
    together = results_of_ranks(f"lm-{stage}")
    assert losses(two_ranks / f"lm-{stage}") == pytest.approx(losses(job.directory), rel=1e-4)
    assert together["exports"][0]["valid_loss"] == pytest.approx(alone["exports"][0]["valid_loss"], rel=1e-4)

    start = two_ranks / f"lm-{stage}" / "epoch-01"
    job = reward_model_job(tmp_path / "rm", tmp_path, tokenizer_directory, start, 0)
    alone = train_reward_model(job, RecordingWorker())
    together = results_of_ranks(f"rm-{stage}")
    assert losses(two_ranks / f"rm-{stage}") == pytest.approx(losses(job.directory), rel=1e-4)
    for name in ("bias", "valid_loss", "valid_accuracy"):
        assert together[name] == pytest.approx(alone[name], rel=1e-3), name


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ppo_with_ptx_on_two_ranks_is_that_on_one(two_ranks, tokenizer_directory, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(answers, "ray", answers.ray)  # put back afterwards
    job = ppo_job(tmp_path / "alone", two_ranks / "given", tokenizer_directory, 0)
    train_ppo_here(job, RecordingWorker())
    together = two_ranks / f"ppo-{stage}"
    results = [json.loads((two_ranks / f"ppo-{stage}-rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["updates"] for each in results] == [2, 2]
    for name in ("policy", "ema", "value"):
        alone, other = (load_file(each / name / "model.safetensors") for each in (job.directory, together))
        start = load_file(two_ranks / "given" / "policy" / "model.safetensors")
        assert largest_difference(alone, other) < 1e-5, name
        assert name == "value" or largest_difference(alone, start) > 5e-4
    for one, two in zip(*(read_metrics(each / "metrics.jsonl") for each in (job.directory, together)), strict=True):
        for name in (
            "loss/policy_avg",
            "loss/ptx",
            "loss/value_avg",
            "policy/approxkl_avg",
            "val/ratio",
            "objective/kl",
        ):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-6), name
