"""The PPO learner of a run that an object store keeps: what a checkpoint needs is there with it, and it goes on."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from recording_worker import RecordingWorker
from safetensors.torch import load_file
from toy_ppo import TEMPERATURE, job_of, plan_of, settings_of, write_given
from toy_rollouts import DirectRay, Handle, ToyConductor, stream_of

from corpus.stored_directory import StoredDirectory
from learners import answers
from learners.checkpoint import list_complete
from learners.metrics import read_metrics
from learners.ppo import train_ppo
from learners.worker import Interrupted

pytestmark = pytest.mark.usefixtures("one_process")
pytest_plugins = ["tests.object_store"]

EXPORTS = ("policy", "ema", "value")


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setattr(answers, "ray", DirectRay)


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer_directory) -> Path:
    return write_given(tmp_path_factory.mktemp("given"), tokenizer_directory)


@pytest.fixture
def train(given, tokenizer_directory, store, query):
    """Trains in a working copy of s3://bucket/run, or, without `is_stored`, in a directory that is all there is."""

    def run(machine: Path, stop_after: int | None = None, is_stored: bool = True, **settings):
        stored = StoredDirectory(f"s3://bucket/run{query}", machine, frozenset({"checkpoints"}), frozenset())
        if is_stored:
            stored.pull()
        directory = machine / "ppo"
        directory.mkdir(parents=True, exist_ok=True)
        chosen = settings_of(**settings)
        stream = stream_of(plan_of(given, directory, chosen))
        handles = Handle(stream), Handle(ToyConductor(stream, str(given / "policy"), TEMPERATURE, 0.0))
        job = job_of(given, directory, tokenizer_directory, chosen, *handles)
        job = dataclasses.replace(job, stored=stored if is_stored else None)
        return train_ppo(job, RecordingWorker(stop_after))

    return run


def test_a_run_whose_disk_is_lost_goes_on_to_bitwise_the_same(train, store, keys_in, query, tmp_path):
    train(tmp_path / "whole", is_stored=False)
    with pytest.raises(Interrupted):
        train(tmp_path / "one", stop_after=3)
    assert not (tmp_path / "one" / "ppo" / "checkpoints").exists()
    there = keys_in("run/ppo/")
    assert len([name for name in there if "/episodes/" in name and name.endswith(".parquet")]) == 3
    assert "run/ppo/metrics.jsonl" in there
    assert "run/ppo/evaluations.jsonl" in there
    assert steps(query) == [2, 3]
    shutil.rmtree(tmp_path / "one")
    result = train(tmp_path / "two")
    assert result["updates"] == 4
    assert [row["step"] for row in read_metrics(tmp_path / "two" / "ppo" / "metrics.jsonl")] == [1, 2, 3, 4]
    for name in EXPORTS:
        one, other = (
            load_file(tmp_path / machine / "ppo" / name / "model.safetensors") for machine in ("whole", "two")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_the_one_before_a_damaged_checkpoint_is_gone_on_from(train, store, query, tmp_path, caplog):
    with pytest.raises(Interrupted):
        train(tmp_path / "one", stop_after=3)
    name = "run/ppo/checkpoints/step-00000003-1/policy-weights.safetensors"
    content = store.get_object(Bucket="bucket", Key=name)["Body"].read()
    store.put_object(Bucket="bucket", Key=name, Body=content[:-8])
    train(tmp_path / "two")
    assert "step-00000003-1 is passed over: policy-weights.safetensors is damaged" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "two" / "ppo" / "metrics.jsonl")] == [1, 2, 3, 4]
    train(tmp_path / "whole", is_stored=False)
    one, other = (
        load_file(tmp_path / machine / "ppo" / "policy" / "model.safetensors") for machine in ("whole", "two")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("kept", "newest"), [(1, {6}), (3, {4, 5, 6})])
def test_as_many_are_kept_as_the_recipe_says_and_that_of_the_best_policys_update(train, query, tmp_path, kept, newest):
    train(tmp_path, updates=6, checkpoint_every=1, evaluate_every=2, checkpoints_kept=kept)
    assert set(steps(query)) == newest | {2}  # ToyConductor's rewards are best there


def steps(query: str) -> list[int]:
    addresses = list_complete(f"s3://bucket/run/ppo/checkpoints{query}")
    return [int(str(address).partition("?")[0].rpartition("/")[2].split("-")[1]) for address in addresses]
