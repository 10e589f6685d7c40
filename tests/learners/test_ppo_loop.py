"""The PPO learner's loop, with the real stream and networks but no Ray: what it leaves, and how it goes on."""

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from recording_worker import RecordingWorker
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_ppo import OPTIMIZER, TEMPERATURE, job_of, plan_of, settings_of, write_given
from toy_rollouts import DirectRay, Handle, Late, ToyConductor, stream_of

from actors.attempts import read_trained
from corpus.problems import RunProblem
from evaluation.audit import audit_run
from learners import answers, checkpoint, ppo, ppo_networks
from learners.engine_settings import EngineSettings
from learners.metrics import read_metrics
from learners.optimizer import OptimizerSettings
from learners.ppo import train_ppo
from learners.ppo_update import PpoUpdate
from learners.worker import Interrupted
from tests.learning_metrics import learning

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer_directory) -> Path:
    return write_given(tmp_path_factory.mktemp("given"), tokenizer_directory)


class Run:
    """A PPO stage in `directory`; each `train` is a process of its own as far as the loop can tell."""

    result: dict

    def __init__(self, given: Path, directory: Path, tokenizer: Path, **settings) -> None:
        self.given, self.directory, self.tokenizer = given, directory, tokenizer
        self.settings = settings_of(**settings)

    def train(
        self,
        stop_after: int | None = None,
        skew: float = 0.0,
        identity: str = "toy",
        engine: EngineSettings | None = None,
        spoil: Callable[["Run"], Any] = lambda run: None,
        anew: bool = True,
    ) -> dict:
        """With `anew` stream and conductor are started too, else the learner alone is."""
        if anew:
            self.stream = stream_of(plan_of(self.given, self.directory, self.settings))
            self.conductor = ToyConductor(self.stream, str(self.given / "policy"), TEMPERATURE, skew)
        spoil(self)
        self.worker = RecordingWorker(stop_after)
        handles = Handle(self.stream), Handle(self.conductor)
        job = job_of(self.given, self.directory, self.tokenizer, self.settings, *handles, engine, identity)
        return train_ppo(job, self.worker)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.directory / name / "model.safetensors")

    def metrics(self) -> list[dict]:
        return read_metrics(self.directory / "metrics.jsonl")

    def evaluated(self) -> list[int]:
        """The updates of the held-out evaluations."""
        return [json.loads(line)["update"] for line in (self.directory / "evaluations.jsonl").read_text().splitlines()]

    def trained(self) -> list[tuple[int, int]]:
        """Update and attempt of every batch that was taken."""
        names = (path.stem.split("-") for path in sorted((self.directory / "episodes").iterdir()))
        return [(int(update), int(attempt)) for _, update, _, attempt in names]

    def episodes(self) -> dict[int, dict]:
        """By slot; of a slot that several attempts wrote, the last one's."""
        rows = (
            row for path in sorted((self.directory / "episodes").iterdir()) for row in pq.read_table(path).to_pylist()
        )
        return {row["slot"]: row for row in rows}


@pytest.fixture(autouse=True, scope="module")
def direct():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "ray", DirectRay)
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
    assert (whole.directory / "checkpoints").exists()  # until the stage is committed
    assert not list(whole.directory.glob("best-*"))
    assert [report.done for report in whole.worker.reports][-1] == 4


def test_the_time_of_a_checkpoint_is_told_with_the_updates_after_it(run):
    each = run(updates=4, checkpoint_every=2)
    each.train()
    told = [row.get("time/checkpoint") for row in each.metrics()]
    assert told[:2] == [None, None]
    assert told[2] == told[3] > 0


def test_the_line_of_an_update_is_on_the_disk_before_the_checkpoint_that_holds_it(run, monkeypatch):
    synced: list[str] = []
    sync = os.fsync

    def recording(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "metrics.jsonl":
            synced.append(f"{len(read_metrics(path))} lines")
        elif path.name == "manifest.json":
            synced.append(path.parent.name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    run(updates=2, checkpoint_every=1).train()
    assert synced == ["1 lines", "step-00000001-1", "2 lines", "step-00000002-1"]


def test_tensorboard_has_the_held_out_evaluations_the_last_one_included(whole):
    lines = [json.loads(line) for line in (whole.directory / "evaluations.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(whole.directory / "tensorboard")).Reload()
    for name, key in (("eval/scores", "reward"), ("eval/kl", "kl"), ("eval/length_mean", "length")):
        drawn = [(event.step, event.value) for event in events.Scalars(name)]
        assert drawn == [(line["update"], pytest.approx(line[key])) for line in lines]
    assert [row["step"] for row in whole.metrics()] == [1, 2, 3, 4]


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
    assert [*map(learning, stopped.metrics())] == [*map(learning, whole.metrics())]
    assert stopped.evaluated() == [2, 4]
    for name in ("policy", "ema", "value", "best"):
        assert equal(stopped.weights(name), whole.weights(name)), name
    slots, others = stopped.episodes(), whole.episodes()
    assert [{key: slots[slot][key] for key in TOLD} for slot in range(32)] == [
        {key: others[slot][key] for key in TOLD} for slot in range(32)
    ]


def wait_at(batch: int, evaluations: bool = True) -> Callable[[Run], None]:
    """A spoiler: half of batch `batch` never comes, and, without `evaluations`, no held-out evaluation ends."""

    def spoil(run: Run) -> None:
        take, publish = run.stream.take, run.conductor.publish

        async def late(number: int, timeout_s: float, attempt: int):
            return Late() if number == batch else await take(number, timeout_s, attempt)

        async def filling_half(attempt: int, update: int, *rest):
            if update == batch:
                run.conductor.chunks = 1
            return await publish(attempt, update, *rest)

        async def never(*_):
            return Late()

        run.stream.take, run.conductor.publish = late, filling_half
        if not evaluations:
            run.conductor.evaluate = never

    return spoil


@pytest.mark.parametrize("batch", [0, 2, 3])
@pytest.mark.parametrize("questions", [1, 3])
def test_a_stop_while_a_batch_is_waited_for_saves_at_once_and_costs_no_bit(run, whole, batch, questions):
    stopped = run(checkpoint_every=100)
    with pytest.raises(Interrupted, match=f"ppo, update {batch} of 4"):
        stopped.train(stop_after=batch + questions, spoil=wait_at(batch, evaluations=False))
    [saved] = (stopped.directory / "checkpoints").iterdir()
    assert saved.name == f"step-{batch:08d}-1"
    assert pq.read_table(saved / "episodes.parquet").num_rows == 4  # half a batch waits
    stopped.train()
    assert [row["step"] for row in stopped.metrics()] == [1, 2, 3, 4]
    assert stopped.evaluated() == [2, 4]  # that of update 2 was under way each time
    for name in ("policy", "ema", "value", "best"):
        assert equal(stopped.weights(name), whole.weights(name)), name
    slots, others = stopped.episodes(), whole.episodes()
    assert [{key: slots[slot][key] for key in TOLD} for slot in range(32)] == [
        {key: others[slot][key] for key in TOLD} for slot in range(32)
    ]


def test_a_stop_does_not_wait_for_held_out_evaluations_and_they_are_made_again_under_their_own_weights(run, whole):
    stopped = run(checkpoint_every=4)
    with pytest.raises(Interrupted, match="ppo, update 3 of 4"):
        stopped.train(stop_after=3, spoil=wait_at(9, evaluations=False))
    assert not (stopped.directory / "evaluations.jsonl").exists()
    stopped.train()
    assert stopped.evaluated() == [2, 4]
    for update in (2, 4):
        assert equal(stopped.conductor.averages[update], whole.conductor.averages[update])
    assert equal(stopped.weights("best"), whole.weights("best"))


def test_a_stop_is_heeded_while_a_checkpoint_waits_for_an_evaluation(run, whole):
    stopped = run()
    with pytest.raises(Interrupted, match="ppo, update 2 of 4"):
        stopped.train(stop_after=4, spoil=wait_at(9, evaluations=False))
    stopped.train()
    assert stopped.evaluated() == [2, 4]
    assert equal(stopped.weights("policy"), whole.weights("policy"))


def never_arrive_at(update: int) -> Callable[[Run], None]:
    """A spoiler: the publication of that update's weights does not come to its end."""

    def spoil(run: Run) -> None:
        publish = run.conductor.publish

        async def late(attempt: int, number: int, *rest):
            return Late() if number == update else await publish(attempt, number, *rest)

        run.conductor.publish = late

    return spoil


# At staleness 1 the learner takes the batch beside it, and waits for it before it publishes the next.
@pytest.mark.parametrize(("staleness", "update", "saved"), [(0, 0, 0), (0, 2, 2), (1, 2, 3)])
def test_a_stop_while_weights_are_published_saves_at_once_and_costs_no_bit(run, whole, staleness, update, saved):
    stopped = run(max_staleness=staleness, checkpoint_every=100)
    with pytest.raises(Interrupted, match=f"ppo, update {saved} of 4"):
        stopped.train(stop_after=saved + 2, spoil=never_arrive_at(update))
    [path] = (stopped.directory / "checkpoints").iterdir()
    assert path.name == f"step-{saved:08d}-1"
    stopped.train()
    assert [row["step"] for row in stopped.metrics()] == [1, 2, 3, 4]
    assert sorted(stopped.episodes()) == list(range(32))
    if staleness == 0:
        for name in ("policy", "ema", "value", "best"):
            assert equal(stopped.weights(name), whole.weights(name)), name


def test_a_publication_that_does_not_end_ends_the_run_with_all_that_was_trained_in_a_checkpoint(run, monkeypatch):
    monkeypatch.setattr(answers.Answers, "patience_s", property(lambda self: -1.0))
    lost = run(checkpoint_every=100)
    with pytest.raises(RunProblem, match="for the conductor to say that new weights are published"):
        lost.train(spoil=never_arrive_at(3))
    [path] = checkpoint.list_complete(lost.directory / "checkpoints")
    assert path.name.startswith("step-00000003")


def test_a_stop_while_the_last_evaluation_is_waited_for_ends_the_run_and_it_is_made_again(run, whole):
    stopped = run(evaluate_every=100)
    with pytest.raises(Interrupted, match="ppo, update 4 of 4"):
        stopped.train(stop_after=5, spoil=wait_at(9, evaluations=False))
    stopped.train()
    assert stopped.evaluated() == [4]
    assert stopped.trained() == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert equal(stopped.weights("policy"), whole.weights("policy"))


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


def fail_at(batch: int, problem: Exception) -> Callable[[Run], None]:
    """A spoiler: the stream never gets batch `batch` together."""

    def spoil(run: Run) -> None:
        take = run.stream.take

        async def failing(number: int, timeout_s: float, attempt: int):
            if number == batch:
                raise problem
            return await take(number, timeout_s, attempt)

        run.stream.take = failing

    return spoil


def test_a_batch_that_never_comes_ends_the_run_with_all_that_was_trained_in_a_checkpoint(run, whole):
    lost = run()
    with pytest.raises(RunProblem, match="the power went out"):
        lost.train(spoil=fail_at(3, RunProblem("the power went out", "run/unexpected")))
    assert [row["step"] for row in lost.metrics()] == [1, 2, 3]
    lost.train()
    assert [row["step"] for row in lost.metrics()] == [1, 2, 3, 4]
    assert lost.evaluated() == [2, 4]
    for name in ("policy", "ema", "value"):
        assert equal(lost.weights(name), whole.weights(name)), name
    assert lost.trained() == [(1, 0), (2, 0), (3, 0), (4, 1)]


def die_at(batch: int, checkpoints: int) -> Callable[[Run], None]:
    """A spoiler: at `batch` the learner ends like one that is killed, with `checkpoints` written and no further one."""

    def spoil(each: Run) -> None:
        fail_at(batch, RunProblem("the power went out", "run/unexpected"))(each)
        state, calls = each.stream.state, []

        async def dead_in_the_end(attempt: int):
            calls.append(1)
            if len(calls) > checkpoints:
                raise RunProblem("the stream died", "run/unexpected")
            return await state(attempt)

        each.stream.state = dead_in_the_end

    return spoil


def heal(run: Run) -> None:
    del run.stream.take, run.stream.state


def test_where_the_checkpoint_of_a_failed_run_fails_too_the_first_problem_is_told(run, whole):
    lost = run()
    with pytest.raises(RunProblem, match="the power went out"):
        lost.train(spoil=die_at(3, checkpoints=1))
    lost.train()
    assert lost.trained() == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1)]  # from the checkpoint of update 2
    assert equal(lost.weights("policy"), whole.weights("policy"))


@pytest.mark.parametrize(("batch", "trained"), [(3, [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1)]), (1, [(1, 0), (1, 1)])])
def test_a_learner_that_starts_again_beside_a_living_stream_takes_it_back_to_the_checkpoint(run, whole, batch, trained):
    lost = run()
    with pytest.raises(RunProblem, match="the power went out"):
        lost.train(spoil=die_at(batch, checkpoints=batch // 2))
    old = lost.stream
    result = lost.train(anew=False, spoil=heal)
    assert (result["attempt"], lost.stream) == (1, old)
    assert lost.trained()[: len(trained)] == trained
    for name in ("policy", "ema", "value"):
        assert equal(lost.weights(name), whole.weights(name)), name
    counts = asyncio.run(old.counts())
    assert counts["stream/generated"] - counts["stream/discarded"] == 32
    for call in (old.take(3, 1.0, 0), old.trained(3, 0), old.state(0), old.advance(0, 4), old.restore(None, None, 0)):
        with pytest.raises(RunProblem, match=r"Attempt 0 .*attempt 1"):
            asyncio.run(call)


def test_restarts_from_one_checkpoint_are_attempts_of_their_own_and_the_audit_accepts_the_run(
    tmp_path, given, tokenizer_directory
):
    root = tmp_path / "run"
    each = Run(given, root / "round-01" / "ppo", tokenizer_directory, max_staleness=1)
    (root / "data").mkdir(parents=True)
    shutil.copy(given / "prompts.parquet", root / "data" / "prompts-ppo.parquet")
    settings = {"seed": 3, "ppo": each.settings.model_dump(mode="json")}
    (root / "recipe.yaml").write_text(json.dumps(settings))
    for attempt in range(2):
        with pytest.raises(RunProblem, match="the power went out"):
            each.train(spoil=die_at(3, checkpoints=1 - attempt))
        [found] = audit_run(root)
        assert found.problems == []
        assert (found.updates, found.uncommitted, found.waiting) == (2, 1, 8)
    assert each.train()["attempt"] == 2
    assert each.trained() == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (4, 2)]
    record = {"reads": settings, "values": {"updates": 4}}
    (each.directory / "stage.json").write_text(json.dumps(record))
    shutil.rmtree(each.directory / "checkpoints")  # as a command does once the stage is committed
    [found] = audit_run(root)
    assert found.problems == []
    assert [(one.began_with, one.ended_with, one.trained, one.rolled_back) for one in found.attempts] == [
        (0, 2, 16, 8),
        (2, None, 0, 8),
        (2, 4, 16, 0),
    ]
    assert [(one.generated, one.discarded) for one in found.attempts] == [(32, 8), (8, 8), (8, 0)]
    (each.directory / "episodes" / "update-000004-attempt-2.parquet").rename(
        each.directory / "episodes" / "update-000004-attempt-1.parquet"
    )
    [found] = audit_run(root)
    assert not found.accepted


# With staleness a publication is awaited after the update beside it: then that one is saved, too.
@pytest.mark.parametrize(("method", "staleness", "saved"), [("publish", 0, 3), ("publish", 1, 4), ("evaluate", 0, 3)])
def test_a_conductor_that_fails_between_updates_costs_no_update(run, method, staleness, saved):
    lost = run(evaluate_every=3, checkpoint_every=100, max_staleness=staleness)

    def spoil(each: Run) -> None:
        real = getattr(each.conductor, method)

        async def failing(*arguments):
            snapshot = arguments[0] if method == "evaluate" else arguments[2]
            if snapshot.version[1] == 3:
                raise RunProblem("a generator is late", "run/unexpected")
            return await real(*arguments)

        setattr(each.conductor, method, failing)

    with pytest.raises(RunProblem, match="a generator is late"):
        lost.train(spoil=spoil)
    [path] = checkpoint.list_complete(lost.directory / "checkpoints")
    assert path.name.startswith(f"step-{saved:08d}")
    assert [row["step"] for row in lost.metrics()] == [*range(1, saved + 1)]
    lost.train()
    assert [row["step"] for row in lost.metrics()] == [1, 2, 3, 4]
    assert lost.trained() == [(1, 0), (2, 0), (3, 0), (4, int(saved == 3))]
    assert lost.evaluated() == [3, 4]  # the third was under way, or failed: it is made again


def test_where_the_newest_checkpoint_is_damaged_and_the_best_went_with_it_another_best_is_found(run, monkeypatch):
    each = run(updates=3, evaluate_every=1, checkpoint_every=1)
    real = PpoUpdate.run

    def no_power(self, batch, rewards, old_logprobs, old_values, update, after_step):
        if update == 2:  # in the midst of it: there is nothing whole to save
            raise RunProblem("the power went out", "run/unexpected")
        return real(self, batch, rewards, old_logprobs, old_values, update, after_step)

    with monkeypatch.context() as patched:
        patched.setattr(PpoUpdate, "run", no_power)
        with pytest.raises(RunProblem, match="the power went out"):
            each.train(spoil=found({1: 1.0, 2: 3.0}))
    kept = checkpoint.list_complete(each.directory / "checkpoints")
    assert [path.name for path in kept] == ["step-00000001-1", "step-00000002-1"]  # the first knows best-000001 alone
    assert [path.name for path in each.directory.glob("best-*")] == ["best-000002"]
    (kept[-1] / "data.json").write_text("{}")
    result = each.train(spoil=found({1: 0.6, 2: 0.5, 3: 0.7}))
    assert each.evaluated() == [1, 2, 3]  # the first one again, whose policy is gone; its line is not there twice
    assert result["best"] == {"update": 3, "objective": 0.7}
    assert each.weights("best")


def test_a_checkpoint_that_could_not_be_read_does_not_displace_the_one_that_was_gone_on_from(run):
    each = run(checkpoint_every=1, evaluate_every=100)
    with pytest.raises(RunProblem, match="the power went out"):
        each.train(spoil=die_at(2, checkpoints=2))
    shard = each.directory / "checkpoints" / "step-00000002-1" / "ema.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunProblem, match="the power went out"):
        each.train(spoil=die_at(2, checkpoints=1))
    kept = checkpoint.list_complete(each.directory / "checkpoints")
    assert [path.name for path in kept] == ["step-00000001-1", "step-00000002-2"]


def test_an_evaluation_that_is_no_number_ends_the_run(run):
    each = run(updates=2, evaluate_every=1)
    for _ in range(2):  # the checkpoint that it leaves does not take the evaluation for made
        with pytest.raises(RunProblem, match=r"EMA policy of update 1 has a held-out reward of nan and a KL"):
            each.train(spoil=found({1: float("nan"), 2: 1.0}))
    assert each.train(spoil=found({1: 0.5, 2: 1.0}))["best"] == {"update": 2, "objective": 1.0}
    assert each.evaluated() == [1, 2]  # what is no number was never written down


@pytest.mark.parametrize("where", ["the last evaluation", "the export"])
def test_a_failure_after_the_last_update_does_not_cost_the_training(run, whole, monkeypatch, where):
    lost = run()

    def no_evaluation(each: Run) -> None:
        evaluate = each.conductor.evaluate

        async def failing(snapshot, *rest):
            if snapshot.version[1] == 4:
                raise RunProblem("no room", "run/unexpected")
            return await evaluate(snapshot, *rest)

        each.conductor.evaluate = failing

    def no_export(directory, *arguments, **named):
        if directory.name.startswith("ema"):
            raise OSError(errno.ENOSPC, "no room")
        export(directory, *arguments, **named)

    export = ppo_networks.export_causal_lm
    if where == "the export":
        monkeypatch.setattr(ppo_networks, "export_causal_lm", no_export)
    with pytest.raises(RunProblem, match="no room"):
        lost.train(spoil=no_evaluation if where == "the last evaluation" else lambda run: None)
    monkeypatch.setattr(ppo_networks, "export_causal_lm", export)
    lost.train()
    assert [row["step"] for row in lost.metrics()] == [1, 2, 3, 4]
    assert lost.trained() == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert lost.evaluated() == [2, 4]
    for name in ("policy", "ema", "value", "best"):
        assert equal(lost.weights(name), whole.weights(name)), name
    said = read_trained(lost.directory)
    assert said is not None
    assert said.attempt == said.ledger["attempt"] == 0  # attempt 1 trained nothing: it says what it went on from
    assert said.steps == read_trained(whole.directory).steps  # pyright: ignore[reportOptionalMemberAccess]


def test_what_the_last_checkpoint_says_outlives_it(whole):
    said = read_trained(whole.directory)
    assert said is not None
    assert (said.step, said.attempt, said.stopped_by, said.waiting) == (4, 0, "", [])
    assert said.steps == {"policy": 8, "value": 8}
    newest = json.loads((whole.directory / "checkpoints" / "step-00000004-1" / "data.json").read_text())
    assert (said.ledger, said.steps) == (newest["ledger"], newest["steps"])


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
    # no token of such a batch is of the learner's own version: engine and learner are compared by the probe alone
    assert "mismatch/max_abs_log_ratio" in stale.metrics()[0]
    assert "mismatch/max_abs_log_ratio" not in stale.metrics()[1]
    sizes = [row["staleness/effective_sample_size"] for row in stale.metrics()]
    assert sizes[0] == pytest.approx(1, abs=1e-6)
    assert all(0.1 < size < 1 - 1e-5 for size in sizes[1:])
    assert all(0 <= row["mismatch/probe_nats"] <= 1e-4 for row in stale.metrics())


@pytest.mark.parametrize("staleness", [0, 1])
def test_every_publication_is_probed_with_real_sequences_once_there_are_some_and_logged_once(run, staleness):
    each = run(max_staleness=staleness)
    each.train()
    assert each.conductor.probed == [1, 4, 4, 4]
    assert all("sync/publish_seconds" in row for row in each.metrics())


def test_a_batch_too_far_from_the_learner_ends_the_run_before_it_is_trained(run):
    stale = run(max_staleness=1, min_effective_sample_size=1.0 - 1e-5)
    with pytest.raises(RunProblem, match="at update 2 the effective sample size is"):
        stale.train()
    assert [row["step"] for row in stale.metrics()] == [1]
    [path] = checkpoint.list_complete(stale.directory / "checkpoints")
    assert path.name == "step-00000001-1"


def test_an_episode_slower_than_the_bound_ends_the_run(run):
    with pytest.raises(RunProblem, match="the slowest episode of update 1 took"):
        run(straggler_bound_s=1e-9).train()


def test_what_was_accepted_before_a_stop_is_compared_after_it(run):
    stopped = run()

    def skewed_from_batch_2_on(each: Run) -> None:
        wait_at(2)(each)
        publish = each.conductor.publish

        async def skewing(attempt: int, update: int, *rest):
            each.conductor.skew = 0.02 if update == 2 else 0.0
            return await publish(attempt, update, *rest)

        each.conductor.publish = skewing

    with pytest.raises(Interrupted, match="ppo, update 2 of 4"):
        stopped.train(stop_after=3, spoil=skewed_from_batch_2_on)
    with pytest.raises(RunProblem, match=r"at update 3 engine and learner disagree .* by 0\.02"):
        stopped.train()  # the engine is right again, but half of the batch was written before


def test_an_engine_that_disagrees_with_the_learner_ends_the_run_beyond_the_bound(run):
    with pytest.raises(RunProblem, match=r"at update 1 engine and learner disagree .* by 0\.0[12]\d* nats, beyond"):
        run().train(skew=0.02)
    assert run().metrics() == []
    run(updates=1, mismatch_bound_nats=0.05).train(skew=0.02)


def test_in_float32_at_staleness_0_the_first_minibatch_is_held_to_a_ten_thousandth_of_a_nat(run):
    with pytest.raises(
        RunProblem, match=r"at update 1 engine and learner disagree .* by 0\.000\d+ nats, beyond .* 0\.0001"
    ):
        run(updates=1).train(skew=5e-4)
    run(updates=1, max_staleness=1).train(skew=5e-4)
    run(updates=1, old_logprobs="recomputed").train(skew=5e-4)
    run(updates=1, mismatch_bound_nats=1e-3).train(skew=5e-4)


@pytest.mark.parametrize(("source", "difference"), [("recomputed", 0.0), ("behaviour", 0.1)])
def test_ratios_are_taken_to_the_learners_own_log_probabilities_or_to_the_engines(run, source, difference):
    one = run(old_logprobs=source, mismatch_bound_nats=1.0, minibatches=1, updates=1, ptx_coefficient=0.0)
    one.train(skew=0.1)
    assert one.metrics()[0]["policy/max_abs_log_ratio"] == pytest.approx(difference, abs=1e-4)
    lengths = one.metrics()[0]["response/length_mean"]
    assert one.metrics()[0]["objective/kl"] == pytest.approx(difference * lengths, abs=1e-3)


def found(rewards: dict[int, float], kl: dict[int, float] | None = None) -> Callable[[Run], None]:
    """A spoiler: what held-out evaluations find, by update."""

    def spoil(run: Run) -> None:
        run.conductor.rewards, run.conductor.kl = rewards, kl or {}

    return spoil


def test_the_best_average_policy_by_held_out_reward_less_its_kl_penalty_is_kept(run):
    each = run(updates=3, evaluate_every=1, ema_decay=0.0, kl_controller="fixed", kl_coefficient=0.1)
    result = each.train(spoil=found({1: 1.0, 2: 3.0, 3: 9.0}, kl={3: 70.0}))
    assert result["best"] == {"update": 2, "objective": 3.0}
    averages = each.conductor.averages
    assert equal(each.weights("best"), averages[2])
    assert equal(each.weights("ema"), averages[3])
    assert not equal(averages[2], averages[3])
    assert equal(each.weights("ema"), each.weights("policy"))  # an average without decay is the policy


def test_the_best_of_an_attempt_that_was_lost_is_not_taken_for_the_best_of_the_run(run):
    each = run(updates=3, evaluate_every=1, checkpoint_every=1)

    def lose_update_2(lost: Run) -> None:
        found({1: 1.0, 2: 3.0})(lost)

        async def no_state(attempt: int):
            raise RunProblem("the stream died", "run/unexpected")

        trained = lost.stream.trained

        async def then_no_checkpoint(batch: int, attempt: int):
            await trained(batch, attempt)
            if batch == 1:
                lost.stream.state = no_state

        lost.stream.trained = then_no_checkpoint

    with pytest.raises(RunProblem, match="the stream died"):
        each.train(spoil=lose_update_2)
    assert each.evaluated() == [1, 2]
    result = each.train(spoil=found({1: 1.0, 2: 0.5, 3: 0.7}))
    assert result["best"]["update"] == 1
    assert each.evaluated() == [1, 2, 3]
    first = run(updates=1)
    shutil.rmtree(first.directory)
    first.train()
    assert equal(each.weights("best"), first.weights("ema"))


def test_an_average_that_is_taken_once_an_update_moves_once_an_update(run):
    each = run(updates=1, ema_every="update", ema_decay=0.9)
    each.train()
    initial = load_file(each.given / "policy" / "model.safetensors")
    policy, average = each.weights("policy"), each.weights("ema")
    for name, start in initial.items():
        torch.testing.assert_close(average[name], 0.9 * start + 0.1 * policy[name])
    shutil.rmtree(each.directory)
    by_step = run(updates=1, ema_decay=0.9)
    by_step.train()
    assert not equal(by_step.weights("ema"), average)


def test_while_the_critic_warms_up_beta_and_the_policys_schedule_wait(run):
    warming = OptimizerSettings(peak_lr=1e-2, schedule="constant", warmup_steps=2, warmup_start_fraction=0.1)
    each = run(critic_warmup_updates=2, policy=warming, value=warming)
    each.train()
    rows = each.metrics()
    assert [row["lr"] for row in rows] == pytest.approx([0, 0, 1e-3, 5.5e-3])
    assert [row["lr_value"] for row in rows] == pytest.approx([1e-3, 5.5e-3, 1e-2, 1e-2])
    assert [row["objective/kl_coefficient"] for row in rows[:3]] == [0.02] * 3
    assert rows[3]["objective/kl_coefficient"] != 0.02


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_activation_checkpointing_computes_each_layer_twice_for_a_gradient(run, monkeypatch, checkpointing, passes):
    forwards, gradients = [], []

    def counting(directory):
        model = make(directory)
        mlp = model.model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_: forwards.append(1) if torch.is_grad_enabled() else None)
        mlp.register_full_backward_hook(lambda *_: gradients.append(1))
        return model

    make = ppo.load_policy
    monkeypatch.setattr(ppo, "load_policy", counting)
    run(updates=1).train(engine=EngineSettings(tokens_per_microbatch=32, activation_checkpointing=checkpointing))
    assert len(gradients) > 2
    assert len(forwards) == passes * len(gradients)


@pytest.mark.parametrize("version", [1, 99])
def test_where_no_checkpoint_can_be_read_the_run_stops_and_removes_nothing(run, whole, version):
    lost = run(checkpoint_every=1)
    with pytest.raises(Interrupted):
        lost.train(stop_after=2)
    manifests = sorted(lost.directory.glob("checkpoints/*/manifest.json"))
    assert len(manifests) == 2
    contents = [manifest.read_text() for manifest in manifests]
    for manifest in manifests:
        manifest.write_text(json.dumps({"schema_version": version}))
    with pytest.raises(RunProblem, match=r"none that can be gone on from .* to begin the stage anew on purpose"):
        lost.train()
    for manifest, content in zip(manifests, contents, strict=True):
        manifest.write_text(content)
    lost.train()
    assert [row["step"] for row in lost.metrics()] == [1, 2, 3, 4]
    assert equal(lost.weights("policy"), whole.weights("policy"))


def test_a_pinned_checkpoint_of_other_inputs_is_neither_continued_nor_removed_nor_in_the_way(run, whole):
    changed = run()
    with pytest.raises(Interrupted):
        changed.train(stop_after=3, identity="before the change")
    [*_, pinned] = checkpoint.list_complete(changed.directory / "checkpoints")
    (pinned / "pinned").touch()
    with pytest.raises(Interrupted):
        changed.train(stop_after=1)
    assert [path.name for path in checkpoint.list_complete(pinned.parent)] == ["step-00000001-1", pinned.name]
    assert changed.train()["attempt"] == 1
    assert [row["step"] for row in changed.metrics()] == [1, 2, 3, 4]
    assert equal(changed.weights("policy"), whole.weights("policy"))


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
