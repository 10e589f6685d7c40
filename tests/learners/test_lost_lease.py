"""A loop whose run another command has taken over writes nothing more: no metrics, no checkpoint, no export."""

import dataclasses
from pathlib import Path

import pytest
from recording_worker import RecordingWorker
from toy_data import demonstration_rows, write_comparisons, write_demonstrations

from corpus.problems import RunProblem
from learners.engine import EngineSettings
from learners.language_model import LanguageModelJob, LanguageModelSettings, train_language_model
from learners.metrics import read_metrics
from learners.optimizer import OptimizerSettings
from learners.reward_model import RewardModelJob, RewardModelSettings, train_reward_model
from learners.worker import Worker
from models.build import TinyLlamaSettings

pytestmark = pytest.mark.usefixtures("one_process")


class Holder:
    """Another command takes the run over after `checks` questions."""

    def __init__(self, checks: int) -> None:
        self.checks, self.asked = checks, 0

    def check(self) -> None:
        self.asked += 1
        if self.asked > self.checks:
            raise RunProblem("taken over", "run/unexpected")

    def worker(self) -> Worker:
        plain = RecordingWorker()
        return dataclasses.replace(Worker(0, 1, plain.report, plain.should_stop), check_lease=self.check)


def language_model_job(directory: Path, tokenizer: Path) -> LanguageModelJob:
    """Four steps, and an export at the end."""
    return LanguageModelJob(
        stage="sft",
        identity="a",
        settings=LanguageModelSettings(
            optimizer=OptimizerSettings(peak_lr=1e-3), batch_size=5, epochs=1, context_length=16, keep_epochs=False
        ),
        engine=EngineSettings(),
        seed=0,
        directory=directory / "sft",
        tokenizer=str(tokenizer),
        start=TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=16),
        max_new_tokens=4,
        demonstrations=write_demonstrations(directory / "demonstrations.parquet", demonstration_rows(20, 0)),
        demonstrations_valid=write_demonstrations(directory / "valid.parquet", demonstration_rows(5, 1)),
    )


def reward_model_job(directory: Path, tokenizer: Path, start: Path) -> RewardModelJob:
    return RewardModelJob(
        stage="rm",
        identity="a",
        settings=RewardModelSettings(optimizer=OptimizerSettings(peak_lr=1e-3), batch_prompts=2),
        engine=EngineSettings(),
        seed=0,
        directory=directory / "rm",
        start=str(start),
        tokenizer=str(tokenizer),
        comparisons=write_comparisons(directory / "comparisons.parquet", 8, 0),
        comparisons_valid=write_comparisons(directory / "comparisons-valid.parquet", 3, 1),
        demonstrations=directory / "valid.parquet",
    )


def test_metrics_are_not_written_once_the_run_was_taken_over(tmp_path, tokenizer_directory):
    job = language_model_job(tmp_path, tokenizer_directory)
    with pytest.raises(RunProblem, match="taken over"):
        train_language_model(job, Holder(2).worker())
    assert [row["step"] for row in read_metrics(job.directory / "metrics.jsonl")] == [1, 2]
    assert not (job.directory / "export").exists()


def test_nothing_at_all_is_committed_by_one_who_never_held_the_run_and_all_by_one_who_does(
    tmp_path, tokenizer_directory
):
    job = language_model_job(tmp_path, tokenizer_directory)
    with pytest.raises(RunProblem, match="taken over"):
        train_language_model(job, Holder(0).worker())
    assert list(job.directory.rglob("manifest.json")) == []

    holder = Holder(1000)
    train_language_model(job, holder.worker())
    assert len(read_metrics(job.directory / "metrics.jsonl")) == 4
    assert (job.directory / "export" / "model.safetensors").exists()

    late = Holder(holder.asked - 2)  # after the last checkpoint, before the export and its line of metrics
    job = dataclasses.replace(job, directory=tmp_path / "late")
    with pytest.raises(RunProblem, match="taken over"):
        train_language_model(job, late.worker())
    assert list(job.directory.rglob("manifest.json")) != []
    assert not (job.directory / "export").exists()


def test_a_reward_model_is_not_exported_once_the_run_was_taken_over(tmp_path, tokenizer_directory):
    sft = language_model_job(tmp_path, tokenizer_directory)
    train_language_model(sft, RecordingWorker())
    job = reward_model_job(tmp_path, tokenizer_directory, sft.directory / "export")
    holder = Holder(1000)
    train_reward_model(job, holder.worker())
    assert (job.directory / "export").exists()
    job = dataclasses.replace(job, directory=tmp_path / "late")
    with pytest.raises(RunProblem, match="taken over"):
        train_reward_model(job, Holder(holder.asked - 1).worker())
    assert not (job.directory / "export").exists()
