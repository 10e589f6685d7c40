"""The PPO learner's loop, with the real stream and networks but no Ray: what it leaves, and how it goes on."""

import errno
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from recording_worker import RecordingWorker
from safetensors.torch import load_file
from toy_data import write_counting
from toy_episodes import llama
from toy_rollouts import DirectRay, Handle, ToyConductor, stream_of

from actors.conductor import HeldOut
from actors.settings import SamplingSettings
from actors.stream import StreamPlan
from corpus.problems import RunProblem
from corpus.schemas import make_table, write_table
from learners import checkpoint, ppo
from learners.engine_settings import EngineSettings
from learners.metrics import read_metrics
from learners.optimizer import OptimizerSettings
from learners.ppo import PpoJob, train_ppo
from learners.ppo_settings import PpoSettings
from learners.worker import Interrupted
from models.build import load_tokenizer
from models.export import export_causal_lm
from models.scalar_head import ScalarHeadModel

pytestmark = pytest.mark.usefixtures("one_process")

TEMPERATURE = 0.8
OPTIMIZER = OptimizerSettings(peak_lr=1e-2, schedule="constant", eps=1e-5)


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer_directory) -> Path:
    """What the stages before PPO leave: policy, reward model, prompts, pretraining text."""
    directory = tmp_path_factory.mktemp("given")
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


class Run:
    """A PPO stage in `directory`; each `train` is a process of its own as far as the loop can tell."""

    result: dict

    def __init__(self, given: Path, directory: Path, tokenizer: Path, **settings) -> None:
        self.given, self.directory, self.tokenizer = given, directory, tokenizer
        self.settings = PpoSettings(
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

    def train(
        self, stop_after: int | None = None, skew: float = 0.0, identity: str = "toy", spoil=lambda run: None
    ) -> dict:
        self.stream = stream_of(
            StreamPlan(
                prompts=str(self.given / "prompts.parquet"),
                directory=str(self.directory / "episodes"),
                seed=3,
                round_number=1,
                batch_size=self.settings.batch_size,
                chunk_size=self.settings.chunk_size,
                max_staleness=self.settings.max_staleness,
                batches=self.settings.updates,
                lease_s=60.0,
            )
        )
        self.conductor = ToyConductor(self.stream, str(self.given / "policy"), TEMPERATURE, skew)
        spoil(self)
        self.worker = RecordingWorker(stop_after)
        prompts = pq.read_table(self.given / "prompts.parquet")
        job = PpoJob(
            identity=identity,
            settings=self.settings,
            sampling=SamplingSettings(temperature=TEMPERATURE, max_response_tokens=5),
            engine=EngineSettings(tokens_per_microbatch=32),
            seed=0,
            directory=self.directory,
            tokenizer=str(self.tokenizer),
            policy=str(self.given / "policy"),
            reward_model=str(self.given / "rm"),
            pretraining=self.given / "pretraining.parquet",
            stream=Handle(self.stream),
            conductor=Handle(self.conductor),
            rollout_dtype="float32",
            held_out=HeldOut(prompts, 1, 0),
        )
        return train_ppo(job, self.worker)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.directory / name / "model.safetensors")

    def metrics(self) -> list[dict]:
        return read_metrics(self.directory / "metrics.jsonl")

    def evaluated(self) -> list[int]:
        """The updates of the held-out evaluations."""
        return [json.loads(line)["update"] for line in (self.directory / "evaluations.jsonl").read_text().splitlines()]

    def episodes(self) -> dict[int, dict]:
        """By slot; of a slot that several attempts wrote, the last one's."""
        rows = (
            row for path in sorted((self.directory / "episodes").iterdir()) for row in pq.read_table(path).to_pylist()
        )
        return {row["slot"]: row for row in rows}


@pytest.fixture(autouse=True, scope="module")
def direct():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "ray", DirectRay)
        yield


@pytest.fixture
def run(tmp_path, given, tokenizer_directory):
    def make(**settings) -> Run:
        return Run(given, tmp_path / "run", tokenizer_directory, **settings)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, given, tokenizer_directory) -> Run:
    """A run that nothing disturbed."""
    finished = Run(given, tmp_path_factory.mktemp("whole"), tokenizer_directory)
    finished.result = finished.train()
    return finished


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    assert some.keys() == others.keys()
    return all(torch.equal(some[name], others[name]) for name in some)


TOLD = ("response_tokens", "behaviour_logprobs", "reference_logprobs", "score", "finish_reason", "prompt_id")


def test_a_run_leaves_exports_episodes_metrics_and_evaluations(whole):
    result = whole.result
    assert (result["updates"], result["episodes"], result["stopped_by"]) == (4, 32, "")
    assert whole.conductor.finished
    assert [row["step"] for row in whole.metrics()] == [1, 2, 3, 4]
    assert whole.evaluated() == [2, 4]
    assert sorted(whole.episodes()) == list(range(32))
    assert not equal(whole.weights("policy"), load_file(whole.given / "policy" / "model.safetensors"))
    assert not equal(whole.weights("policy"), whole.weights("ema"))
    assert not (whole.directory / "checkpoints").exists()
    assert [report.done for report in whole.worker.reports][-1] == 4


def test_engine_and_learner_agree_and_the_policy_starts_at_its_reference(whole):
    for row in whole.metrics():
        assert row["mismatch/max_abs_log_ratio"] <= 1e-4
        assert row["mismatch/probe_nats"] <= 1e-4
        assert row["staleness/version_lag_max"] == 0
    assert whole.metrics()[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(whole.metrics()[3]["objective/kl"]) > 1e-3


def test_a_run_that_is_stopped_goes_on_to_the_same_weights_bit_for_bit(run, whole):
    stopped = run()
    for at in (1, 2):
        with pytest.raises(Interrupted, match=f"ppo, update {at} of 4"):
            stopped.train(stop_after=1)
    result = stopped.train()
    assert result["attempt"] == 2
    assert result["kl_coefficient"] == whole.result["kl_coefficient"] != 0.02
    assert [row["step"] for row in stopped.metrics()] == [1, 2, 3, 4]
    assert stopped.evaluated() == [2, 4]
    for name in ("policy", "ema", "value", "best"):
        assert equal(stopped.weights(name), whole.weights(name)), name
    slots, others = stopped.episodes(), whole.episodes()
    assert [{key: slots[slot][key] for key in TOLD} for slot in range(32)] == [
        {key: others[slot][key] for key in TOLD} for slot in range(32)
    ]


@pytest.mark.slow
def test_a_run_of_staleness_1_that_is_stopped_trains_every_slot_once(run):
    stopped = run(max_staleness=1)
    for at in (1, 2):
        with pytest.raises(Interrupted, match=f"ppo, update {at} of 4"):
            stopped.train(stop_after=1)
    assert stopped.train()["attempt"] == 2
    assert [row["step"] for row in stopped.metrics()] == [1, 2, 3, 4]
    assert sorted(stopped.episodes()) == list(range(32))
    # what was accepted before the stop is trained after it, one update old
    assert max(row["staleness/version_lag_max"] for row in stopped.metrics()) == 1


def test_a_run_that_is_lost_goes_on_from_its_checkpoint_bit_for_bit(run, whole):
    lost = run()

    def lose_update_4(each: Run) -> None:
        take = each.stream.take

        async def failing(batch: int, timeout_s: float):
            if batch == 3:
                raise RunProblem("the power went out")
            return await take(batch, timeout_s)

        each.stream.take = failing

    with pytest.raises(RunProblem, match="the power went out"):
        lost.train(spoil=lose_update_4)
    assert [row["step"] for row in lost.metrics()] == [1, 2, 3]
    lost.train()
    assert [row["step"] for row in lost.metrics()] == [1, 2, 3, 4]
    assert lost.evaluated() == [2, 4]
    for name in ("policy", "ema", "value"):
        assert equal(lost.weights(name), whole.weights(name)), name


def test_a_full_disk_at_a_checkpoint_loses_nothing_that_was_saved_before(run, whole, monkeypatch):
    full = run(checkpoint_every=1)
    save, count = checkpoint.save_file, []

    def filling(tensors, path):
        count.append(path)
        if len(count) > 10:  # in the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", filling)
    with pytest.raises(RunProblem, match=r"the checkpoint of step 2 was not written: the disk is full"):
        full.train()
    monkeypatch.setattr(checkpoint, "save_file", save)
    assert [path.name for path in checkpoint.list_complete(full.directory / "checkpoints")] == ["step-00000001-1"]
    full.train()
    assert equal(full.weights("policy"), whole.weights("policy"))


def test_at_learning_rate_zero_the_exported_policy_is_the_initial_one(run):
    unmoved = run(policy=OptimizerSettings(peak_lr=0.0, schedule="constant"))
    unmoved.train()
    initial = load_file(unmoved.given / "policy" / "model.safetensors")
    for name in ("policy", "ema"):
        assert equal(unmoved.weights(name), initial), name


def test_a_kl_budget_ends_the_run_early_and_says_why(run):
    short = run(updates=6, kl_budget_nats=1e-3, policy=OPTIMIZER.model_copy(update={"peak_lr": 0.05}), batch_size=32)
    result = short.train()
    assert result["updates"] < 6
    assert "the KL budget" in result["stopped_by"]
    assert result["stopped_by"].endswith("over 0.001")
    assert short.metrics()[-1]["objective/kl"] > 1e-3
    assert all(row["objective/kl"] <= 1e-3 for row in short.metrics()[:-1])
    assert short.weights("policy").keys() == short.weights("ema").keys()


def test_with_staleness_1_batches_are_one_update_old_and_never_older(run):
    stale = run(max_staleness=1)
    stale.train()
    assert [row["staleness/version_lag_max"] for row in stale.metrics()] == [0, 1, 1, 1]
    # no token of such a batch is of the learner's own version, so nothing can be said of a mismatch
    assert "mismatch/max_abs_log_ratio" in stale.metrics()[0]
    assert "mismatch/max_abs_log_ratio" not in stale.metrics()[1]


def test_an_engine_that_disagrees_with_the_learner_ends_the_run_beyond_the_bound(run):
    with pytest.raises(RunProblem, match=r"at update 1 engine and learner disagree .* by 0\.0[12]\d* nats, beyond"):
        run().train(skew=0.02)
    assert run().metrics() == []
    run(updates=1, mismatch_bound_nats=0.05).train(skew=0.02)


@pytest.mark.parametrize(("source", "difference"), [("recomputed", 0.0), ("behaviour", 0.1)])
def test_ratios_are_taken_to_the_learners_own_log_probabilities_or_to_the_engines(run, source, difference):
    one = run(old_logprobs=source, mismatch_bound_nats=1.0, minibatches=1, updates=1, ptx_coefficient=0.0)
    one.train(skew=0.1)
    assert one.metrics()[0]["policy/max_abs_log_ratio"] == pytest.approx(difference, abs=1e-4)
    lengths = one.metrics()[0]["response/length_mean"]
    assert one.metrics()[0]["objective/kl"] == pytest.approx(difference * lengths, abs=1e-3)


def test_the_best_average_policy_by_held_out_reward_is_kept(run):
    each = run(updates=3, evaluate_every=1, ema_decay=0.0)
    result = each.train()  # the conductor finds 1.0, 3.0 and 2.0
    assert result["best"] == {"update": 2, "objective": 3.0}
    averages = each.conductor.averages
    assert equal(each.weights("best"), averages[2])
    assert equal(each.weights("ema"), averages[3])
    assert not equal(averages[2], averages[3])
    assert equal(each.weights("ema"), each.weights("policy"))  # an average without decay is the policy


def test_a_checkpoint_of_other_inputs_is_not_continued(run, whole):
    changed = run()
    with pytest.raises(Interrupted):
        changed.train(stop_after=1, identity="before the change")
    assert (changed.directory / "checkpoints").exists()
    result = changed.train()
    assert result["attempt"] == 0
    assert [row["step"] for row in changed.metrics()] == [1, 2, 3, 4]
    assert {row["attempt"] for row in changed.episodes().values()} == {0}
    assert equal(changed.weights("policy"), whole.weights("policy"))
