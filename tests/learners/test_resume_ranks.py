"""A run that goes on with another number of ranks and another ZeRO stage goes on where it was."""

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from recording_worker import RecordingWorker
from safetensors.torch import load_file
from toy_data import demonstration_rows, write_demonstrations
from toy_ppo import job_of as ppo_job_of
from toy_ppo import settings_of, write_given
from two_ranks import largest_difference
from two_ranks import train_ppo as train_ppo_here

from learners import answers
from learners.checkpoint import load_newest
from learners.engine import EngineSettings
from learners.language_model import LanguageModelJob, LanguageModelSettings, train_language_model
from learners.metrics import read_metrics
from learners.optimizer import OptimizerSettings
from learners.ppo_job import PpoJob
from learners.worker import Interrupted
from models.build import TinyLlamaSettings

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def job_of(directory: Path, data: Path, tokenizer: Path) -> LanguageModelJob:
    """Twelve steps. Adam divides by the gradient, and so by its rounding: a larger epsilon leaves that out."""
    return LanguageModelJob(
        stage="sft",
        identity="a",
        settings=LanguageModelSettings(
            optimizer=OptimizerSettings(peak_lr=1e-3, eps=1e-4),
            batch_size=4,
            epochs=2,
            context_length=16,
            residual_dropout=0.0,
            keep_epochs=False,
        ),
        engine=EngineSettings(zero_stage=0),
        seed=0,
        directory=directory,
        tokenizer=str(tokenizer),
        start=TinyLlamaSettings(hidden_size=16, layers=1, heads=2, mlp_size=16, context_length=16),
        max_new_tokens=4,
        demonstrations=write_demonstrations(data / "train.parquet", demonstration_rows(24, 0)),
        demonstrations_valid=write_demonstrations(data / "valid.parquet", demonstration_rows(8, 1)),
    )


def run_ranks(
    job: LanguageModelJob | PpoJob, stage: Literal[0, 3], world: int, stop_after: int, scratch: Path, unseen: str = ""
) -> list[str]:
    """Trains on `world` ranks with ZeRO `stage` until the question of number `stop_after`; returns what each prints.
    The first alone sees a checkpoint of the name `unseen`."""
    path = scratch / f"job-{stop_after}.pickle"
    path.write_bytes(pickle.dumps(dataclasses.replace(job, engine=EngineSettings(zero_stage=stage))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)])}
    command = [sys.executable, "-W", "ignore", str(HERE / "resume_ranks.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(scratch / f"store-{stop_after}"), str(path), str(stop_after), unseen],
            env=environment | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)
    return outputs


@pytest.mark.usefixtures("one_process")
def test_two_ranks_with_zero_3_go_on_as_one_with_zero_0_and_back(tmp_path, tokenizer_directory):
    alone = job_of(tmp_path / "alone", tmp_path, tokenizer_directory)
    train_language_model(alone, RecordingWorker())

    job = dataclasses.replace(alone, directory=tmp_path / "changing")
    assert "stopped at sft, step 4 of 12\nloaded []" in run_ranks(job, 3, 2, 4, tmp_path)[0]
    assert "stopped at sft, step 7 of 12\nloaded [4]" in run_ranks(job, 0, 1, 3, tmp_path)[0]
    assert "loaded [7]" in run_ranks(job, 3, 2, 100, tmp_path)[0]

    first, second = (load_newest(each.directory / "checkpoints") for each in (alone, job))
    assert first is not None
    assert second is not None
    assert first.step == second.step == 12
    for part, tensors in first.tensors.items():
        apart = max((tensors[name] - second.tensors[part][name]).abs().max().item() for name in tensors)
        scale = max(tensor.abs().max().item() for tensor in tensors.values())
        assert apart < 1e-5 * max(scale, 1e-3), (part, apart, scale)
    assert first.tensors["exp_avg_sq"].keys() == first.tensors["weights"].keys()


@pytest.mark.usefixtures("one_process")
def test_ppo_goes_on_with_other_ranks_and_another_zero_stage(tmp_path, tokenizer_directory, monkeypatch):
    monkeypatch.setattr(answers, "ray", answers.ray)  # put back afterwards
    given = write_given(tmp_path / "given", tokenizer_directory)
    small = OptimizerSettings(peak_lr=1e-3, schedule="constant", eps=1e-5)
    settings = settings_of(minibatches=8, policy=small, value=small)
    alone = ppo_job_of(given, tmp_path / "alone", tokenizer_directory, settings, None, None)
    train_ppo_here(alone, RecordingWorker())

    job = dataclasses.replace(alone, directory=tmp_path / "changing")
    assert "stopped at ppo, update 1 of 4\nloaded []" in run_ranks(job, 3, 2, 1, tmp_path)[0]
    assert "stopped at ppo, update 2 of 4\nloaded [8, 8]" in run_ranks(job, 0, 1, 1, tmp_path)[0]
    assert "loaded [16, 16]" in run_ranks(job, 3, 2, 100, tmp_path)[0]

    start = load_file(given / "policy" / "model.safetensors")
    for name in ("policy", "ema", "value"):
        one, other = (load_file(each.directory / name / "model.safetensors") for each in (alone, job))
        assert largest_difference(one, other) < 1e-5, name
        assert name == "value" or largest_difference(one, start) > 5e-4
    one, other = (read_metrics(each.directory / "metrics.jsonl") for each in (alone, job))
    assert [row["step"] for row in other] == [1, 2, 3, 4]
    assert [row["objective/kl"] for row in other] == pytest.approx(
        [row["objective/kl"] for row in one], rel=1e-3, abs=1e-6
    )


@pytest.mark.usefixtures("one_process")
def test_ranks_that_find_different_checkpoints_load_none_and_say_who_found_which(tmp_path, tokenizer_directory):
    job = job_of(tmp_path / "lm", tmp_path, tokenizer_directory)
    for step in (4, 7):
        with pytest.raises(Interrupted, match=f"step {step} of 12"):
            train_language_model(job, RecordingWorker(4 if step == 4 else 3))
    newest = "step-00000007-1"
    before = [(path, path.read_bytes()) for path in sorted(job.directory.rglob("*.*")) if path.is_file()]
    for output in run_ranks(job, 3, 2, 1, tmp_path, unseen=newest):
        assert f"would go on from {job.directory / 'checkpoints' / newest}, rank 1 from {job.directory}" in output
        assert "step-00000004-1; all nodes must see the same files" in output
        assert output.endswith("loaded []\n")
    assert [(path, path.read_bytes()) for path in sorted(job.directory.rglob("*.*")) if path.is_file()] == before
