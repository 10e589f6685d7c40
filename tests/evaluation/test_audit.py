"""The audit of a run: what is right is accepted, and everything that is not is told by a sentence of its own."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from actors.attempts import SavedProgress, begin_attempt, write_counts, write_trained
from actors.episodes import EPISODE, PromptOrder
from amenable.cli import app
from corpus.problems import RunProblem, UsageProblem
from corpus.schemas import make_table, write_table
from evaluation.audit import StageAudit, audit_run

BATCH, PROMPTS, SEED = 4, 5, 3
PPO = {
    "batch_size": BATCH,
    "max_staleness": 1,
    "updates": 6,
    "minibatches": 2,
    "inner_epochs": 3,
    "critic_warmup_updates": 1,
}
READS = {"seed": SEED, "ppo": PPO}
ORDER = PromptOrder(PROMPTS, SEED)


def episode(slot: int, attempt: int, *spans: tuple[int, int]) -> dict[str, Any]:
    """An episode of two tokens for each span, which says (attempt, update) of the weights that wrote them."""
    tokens = 2 * len(spans)
    return {
        "run": "r",
        "round": 1,
        "slot": slot,
        "sample": 0,
        "attempt": attempt,
        "prompt_id": f"p{ORDER[slot]}",
        "prompt_tokens": [ORDER[slot]],
        "response_tokens": [7] * tokens,
        "behaviour_logprobs": [-1.0] * tokens,
        "version_spans": [
            {"attempt": by, "update": update, "start": 2 * place, "end": 2 * place + 2}
            for place, (by, update) in enumerate(spans)
        ],
        "finish_reason": "stop",
        "generator": "g",
        "leased_at": 1.0,
        "generated_at": 2.0,
        "score": 0.5,
        "reference_logprobs": [-1.0] * tokens,
        "accepted_at": 3.0,
    }


def saved_data(step: int, attempt: int, waiting: int = 0, ledger: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint of `step` updates says, after which the next `waiting` slots are accepted."""
    slots = range(step * BATCH, step * BATCH + waiting)
    state = {"attempt": attempt, "version": step, "trained": step, "accepted": [[slot, attempt] for slot in slots]}
    steps = {"policy": 6 * (step - 1), "value": 6 * step}
    return {"attempt": attempt, "steps": steps, "stopped_by": "", "ledger": {**state, **(ledger or {})}}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=EPISODE), path)


class Stage:
    """A PPO stage of six updates at staleness 1 in three attempts: 0 trained updates 1 to 4, of which 1 to 3 are in the
    checkpoint that attempt 1 began from; 1 trained update 4 and was lost; 2 began from the same checkpoint."""

    def __init__(self, run: Path, done: bool) -> None:
        self.run, self.directory, self.done = run, run / "round-01" / "ppo", done
        columns = {
            "prompt_id": [f"p{row}" for row in range(PROMPTS)],
            "user_id": ["u"] * PROMPTS,
            "prompt": ["?"] * PROMPTS,
            "prompt_tokens": [[row] for row in range(PROMPTS)],
            "meta": [""] * PROMPTS,
        }
        write_table(make_table("prompts", columns), run / "data" / "prompts-ppo.parquet", "prompts")
        (run / "recipe.yaml").write_text("name: r\n")
        for start, parent in ((0, None), (3, 0), (3, 0)):
            begin_attempt(self.directory, start, None, parent, "i")
        for update in (1, 2, 3, 4):
            self.write_update(update, 0)
        self.write_update(4, 1)
        for update in (4, 5, 6) if done else (4, 5):
            self.write_update(update, 2)
        write_counts(
            self.directory,
            {
                0: {"admitted": 20, "generated": 17, "regenerated": 2, "discarded": 1},
                1: {"admitted": 8, "generated": 4, "regenerated": 0, "discarded": 4},
                2: {"admitted": 12, "generated": 10 if done else 6, "regenerated": 0, "discarded": 0},
            },
        )
        lines = [json.dumps({"step": step, "time": 1.0}) + "\n" for step in range(1, 7 if done else 6)]
        (self.directory / "metrics.jsonl").write_text("".join(lines))
        if done:
            self.write_trained()
            made = [*self.directory.rglob("*.parquet"), *(self.directory / "attempts").iterdir()]
            files = {path.relative_to(self.directory).as_posix(): {"sha256": sha256(path)} for path in made}
            record = {"reads": READS, "values": {"updates": 6}, "files": files}
            (self.directory / "stage.json").write_text(json.dumps(record))
        else:
            (self.directory / "stage.started.json").write_text(json.dumps({"hash": "h", "reads": READS}))
            self.write_checkpoint(4, attempt=2)

    def path(self, update: int, attempt: int) -> Path:
        return self.directory / "episodes" / f"update-{update:06d}-attempt-{attempt}.parquet"

    def rows_of(self, update: int, attempt: int) -> list[dict[str, Any]]:
        """Of update 4, half is of attempt 0, whose checkpoint had it already."""
        rows = []
        for slot in range((update - 1) * BATCH, update * BATCH):
            kept = update < 4 or attempt == 0 or (update == 4 and slot < 14)
            by = 0 if kept else attempt
            versions = [update - 2, update - 1] if update > 1 and kept and update < 4 else [update - 1]
            rows.append(episode(slot, by, *((by, version) for version in versions)))
        return rows

    def write_update(self, update: int, attempt: int) -> None:
        write(self.path(update, attempt), self.rows_of(update, attempt))

    def change(self, update: int, attempt: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        """Changes the rows of a file, and the record of the stage, which is not what is to be found out."""
        path = self.path(update, attempt)
        rows = pq.read_table(path).to_pylist()
        change(rows)
        write(path, rows)
        self.forget_hashes()

    def forget_hashes(self) -> None:
        if self.done:
            record = json.loads((self.directory / "stage.json").read_text())
            (self.directory / "stage.json").write_text(json.dumps(record | {"files": {}}))

    def write_checkpoint(
        self, step: int, attempt: int, number: int = 1, waiting: int = 1, ledger: dict[str, Any] | None = None
    ) -> Path:
        """A complete checkpoint of `step` updates with the next `waiting` episodes in it."""
        path = self.directory / "checkpoints" / f"step-{step:08d}-{number}"
        slots = range(step * BATCH, step * BATCH + waiting)
        write(path / "episodes.parquet", [episode(slot, attempt, (attempt, step)) for slot in slots])
        (path / "data.json").write_text(json.dumps(saved_data(step, attempt, waiting, ledger)))
        (path / "ema.safetensors").write_bytes(b"weights")
        self.write_manifest(path)
        return path

    def write_trained(self, step: int = 6, attempt: int = 2, waiting: Sequence[int] = (), **changed: Any) -> None:
        """What the learner leaves at the end, with some of what it says `changed`."""
        data = saved_data(step, attempt) | changed
        write_trained(self.directory, SavedProgress.of(step, data, waiting))

    def write_manifest(self, path: Path) -> None:
        files = {
            file.name: {"sha256": sha256(file), "size_bytes": file.stat().st_size}
            for file in path.iterdir()
            if file.name != "manifest.json"
        }
        (path / "manifest.json").write_text(json.dumps({"schema_version": 1, "files": files}))

    def audit(self) -> StageAudit:
        [found] = audit_run(self.run)
        return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def done(tmp_path) -> Stage:
    return Stage(tmp_path / "run", done=True)


@pytest.fixture
def under_way(tmp_path) -> Stage:
    return Stage(tmp_path / "run", done=False)


def test_a_finished_run_is_accepted_with_what_each_attempt_did(done):
    found = done.audit()
    assert found.problems == []
    assert found.verdict == (
        "round-01/ppo: accepted: 24 slots, each trained exactly once in 6 updates; none lost, none duplicated, no "
        "token older than allowed."
    )
    rows = [
        (each.attempt, each.began_with, each.ended_with, each.generated, each.discarded, each.trained, each.rolled_back)
        for each in found.attempts
    ]
    assert rows == [(0, 0, 3, 17, 3, 12, 4), (1, 3, None, 4, 4, 0, 4), (2, 3, 6, 10, 0, 12, 0)]
    assert [(each.duplicated, each.lost) for each in found.attempts] == [(0, 0)] * 3


def test_an_unfinished_run_is_audited_as_far_as_it_went_and_says_so(under_way):
    found = under_way.audit()
    assert found.problems == []
    assert (found.finished, found.updates, found.planned, found.uncommitted, found.waiting) == (False, 4, 6, 1, 1)
    assert "16 slots, each trained exactly once in 4 updates so far, of 6 (the stage is not finished)" in found.verdict
    assert [(each.trained, each.ended_with) for each in found.attempts] == [(12, 3), (0, None), (4, 4)]


def test_a_run_that_has_no_checkpoint_yet_has_nothing_committed(under_way):
    shutil.rmtree(under_way.directory / "checkpoints")
    shutil.rmtree(under_way.directory / "attempts")
    shutil.rmtree(under_way.directory / "episodes")
    begin_attempt(under_way.directory, 0)
    under_way.write_update(1, 0)
    found = under_way.audit()
    assert (found.problems, found.updates, found.uncommitted) == ([], 0, 1)


def drop(rows):
    del rows[1]


def double(rows):
    rows.insert(2, rows[1])


def replace(rows):
    rows[1] = rows[2]


def swap(rows):
    rows[1], rows[2] = rows[2], rows[1]


def foreign(rows):
    rows[1]["slot"] = 17


def setting(**values):
    def change(rows):
        rows[1].update(values)

    return change


def spans(*found: tuple[int, int, int, int]):
    return setting(
        version_spans=[{"attempt": a, "update": u, "start": start, "end": end} for a, u, start, end in found]
    )


FILE = "update-000005-attempt-2.parquet"
UNCOVERED = f"{FILE}: slot 17 has version spans that do not cover its 2 response tokens one after another."


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (drop, [f"{FILE}: slot 17 is missing."]),
        (double, [f"{FILE}: slot 17 is there 2 times."]),
        (replace, [f"{FILE}: slot 17 is missing.", f"{FILE}: slot 18 is there 2 times."]),
        (swap, [f"{FILE}: the rows are not in the order of their slots: slot 18 stands where slot 17 should."]),
        (
            setting(slot=3),
            [
                f"{FILE}: slot 17 is missing.",
                f"{FILE}: slot 3 does not belong to update 5, which trains slots 16 to 19.",
            ],
        ),
        (
            spans((2, 2, 0, 2)),
            [f"{FILE}: slot 17 has tokens of weights 2.2, but update 5 allows none older than those of update 3."],
        ),
        (spans((1, 4, 0, 2)), [f"{FILE}: slot 17 has tokens of weights 1.4, which were rolled back."]),
        (spans((0, 4, 0, 2)), [f"{FILE}: slot 17 has tokens of weights 0.4, which were rolled back."]),
        (spans((0, 3, 0, 2)), []),  # what the checkpoint had that the attempt began from
        (
            spans((2, 5, 0, 2)),
            [f"{FILE}: slot 17 has tokens of weights 2.5, which were not there yet when update 5 was trained."],
        ),
        *(
            (spans(*each), [UNCOVERED])
            for each in (
                [],
                [(2, 4, 0, 1)],
                [(2, 4, 1, 2)],
                [(2, 4, 0, 1), (2, 4, 0, 2)],
                [(2, 4, 0, 2), (2, 4, 2, 3)],
                [(2, 4, 0, 0), (2, 4, 0, 2)],
            )
        ),
        (setting(attempt=1), [f"{FILE}: slot 17 was generated in attempt 1, which was rolled back."]),
        (setting(prompt_id="p9"), [f"{FILE}: slot 17 answers prompt p9, but belongs to prompt p{ORDER[17]}."]),
        (setting(prompt_tokens=[99]), [f"{FILE}: slot 17 has other tokens than prompt p{ORDER[17]}."]),
        (setting(round=2), [f"{FILE}: slot 17 is of round 2, sample 0."]),
        (
            setting(reference_logprobs=[-1.0]),
            [f"{FILE}: slot 17 has 1 reference_logprobs for 2 response_tokens."],
        ),
    ],
)
def test_a_row_that_is_not_what_its_slot_asks_for_is_told(done, change, sentences):
    done.change(5, 2, change)
    assert done.audit().problems == sentences


def test_what_is_doubled_or_missing_is_counted(done):
    done.change(5, 2, setting(slot=3))
    assert [(each.duplicated, each.lost) for each in done.audit().attempts] == [(0, 0), (0, 0), (1, 1)]


def test_a_file_that_is_missing_or_no_parquet_loses_its_slots(done):
    done.forget_hashes()
    done.path(5, 2).unlink()
    found = done.audit()
    assert found.problems == [f"{FILE} is missing: slots 16 to 19, which attempt 2 trained in update 5, are lost."]
    assert found.attempts[2].lost == BATCH
    done.path(5, 2).write_bytes(b"PAR1 and no more")
    found = done.audit()
    [problem] = found.problems
    assert problem.startswith(f"{FILE}: this is not a readable Parquet file")
    assert found.attempts[2].lost == BATCH


def test_a_file_of_an_attempt_that_cannot_have_trained_it_is_told(done):
    done.forget_hashes()
    done.path(5, 2).rename(done.path(5, 7))
    assert done.audit().problems == [
        "update-000005-attempt-7.parquet is of attempt 7, of which there is no record.",
        f"{FILE} is missing: slots 16 to 19, which attempt 2 trained in update 5, are lost.",
    ]
    done.path(5, 7).rename(done.path(5, 2))
    shutil.copy(done.path(2, 0), done.path(2, 2))
    assert done.audit().problems == [
        "update-000002-attempt-2.parquet: attempt 2 began with 3 updates trained, so it has not trained update 2."
    ]
    done.path(2, 2).rename(done.path(7, 2))
    assert done.audit().problems == ["update-000007-attempt-2.parquet: the run has updates 1 to 6."]


def test_work_that_was_rolled_back_does_not_stand_in_for_what_is_missing(done):
    done.forget_hashes()
    done.path(4, 2).unlink()
    [problem] = done.audit().problems
    assert problem.startswith("update-000004-attempt-2.parquet is missing: slots 12 to 15, which attempt 2 trained")


def test_a_file_that_changed_since_the_stage_was_finished_is_told(done):
    path = done.path(1, 0)
    pq.write_table(pq.read_table(path), path, compression="zstd")
    assert done.audit().problems == [f"episodes/{path.name} is not as it was when the stage was finished."]


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def test_an_update_without_a_line_of_metrics_is_told(done):
    path = done.directory / "metrics.jsonl"
    rewrite(path, lambda text: "".join(line for line in text.splitlines(True) if '"step": 4,' not in line))
    assert done.audit().problems == ["metrics.jsonl has no line of update 4."]
    rewrite(path, lambda text: text.partition("\n")[0] + "\n")
    assert done.audit().problems == ["metrics.jsonl has no line of updates 2, 3, 4, 5, 6."]
    path.unlink()
    assert done.audit().problems == []


def test_of_an_unfinished_stage_what_a_checkpoint_holds_must_have_its_line_of_metrics_and_no_more(under_way):
    path = under_way.directory / "metrics.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:4]))
    assert under_way.audit().problems == []
    path.write_text("".join(lines[:3]))
    assert under_way.audit().problems == ["metrics.jsonl has no line of update 4."]


def test_an_update_with_two_lines_of_metrics_is_told(done):
    with (done.directory / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "time": 2.0}\n')
    assert done.audit().problems == ["metrics.jsonl has more than one line of update 3."]


def test_fewer_generated_than_kept_is_told(done):
    done.forget_hashes()
    write_counts(done.directory, {0: {"admitted": 20, "generated": 9, "regenerated": 2, "discarded": 0}})
    assert done.audit().problems == [
        "attempts/counts.json: attempt 0 generated 9 slots, but 14 of it are there.",
    ]
    assert done.audit().attempts[2].generated is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"trained": 3}, "its ledger has 3 updates trained, but the checkpoint is of 4."),
        ({"attempt": 0}, "its ledger is of attempt 0, it itself of 2."),
        ({"accepted": [[16, 2], [17, 2]]}, "its episodes are not those that its ledger has accepted: see slot 17."),
        ({"accepted": [[15, 2], [16, 2]]}, "slot 15 waits to be trained, but update 4 is done."),
        ({"version": 2}, "slot 16 was accepted, but only 16 are admitted."),
    ],
)
def test_a_checkpoint_that_disagrees_with_its_ledger_is_told(under_way, settings, sentence):
    under_way.write_checkpoint(4, attempt=2, ledger=settings)
    assert f"step-00000004-1: {sentence}" in under_way.audit().problems


TRAINED = "attempts/trained.json"
STEPS = "the optimiser of the"


@pytest.mark.parametrize(
    ("changed", "sentences"),
    [
        ({"step": 5}, [f"{TRAINED}: it is of 5 updates, but stage.json of 6."]),
        ({"attempt": 0}, [f"{TRAINED}: it is of attempt 0 with 6 updates, which was rolled back."]),
        (
            {"ledger": saved_data(6, 2, ledger={"trained": 5})["ledger"]},
            [f"{TRAINED}: its ledger has 5 updates trained, but the checkpoint is of 6."],
        ),
        (
            {"ledger": saved_data(6, 2, ledger={"attempt": 1})["ledger"]},
            [f"{TRAINED}: its ledger is of attempt 1, it itself of 2."],
        ),
        (
            {"ledger": saved_data(6, 2, ledger={"accepted": [[23, 2]]})["ledger"], "waiting": [23]},
            [f"{TRAINED}: slot 23 waits to be trained, but update 6 is done."],
        ),
        (
            {"ledger": saved_data(6, 2, ledger={"accepted": [[24, 2]]})["ledger"], "waiting": [24]},
            [f"{TRAINED}: slot 24 was accepted, but only 24 are admitted."],
        ),
        ({"waiting": [24]}, [f"{TRAINED}: its episodes are not those that its ledger has accepted: see slot 24."]),
        (
            {"steps": {"policy": 29, "value": 36}},
            [f"{TRAINED}: {STEPS} policy network has taken 29 steps, but 6 updates are 30."],
        ),
        (
            {"steps": {"policy": 36, "value": 36}},
            [f"{TRAINED}: {STEPS} policy network has taken 36 steps, but 6 updates are 30."],
        ),
        (
            {"steps": {"policy": 30, "value": 42}},
            [f"{TRAINED}: {STEPS} value network has taken 42 steps, but 6 updates are 36."],
        ),
        ({"steps": {"policy": 30}}, [f"{TRAINED}: {STEPS} value network has taken no steps, but 6 updates are 36."]),
    ],
)
def test_what_the_learner_of_a_finished_stage_left_must_agree_with_the_rest(done, changed, sentences):
    done.forget_hashes()
    done.write_trained(**changed)
    assert done.audit().problems == sentences


def test_an_attempt_that_only_exported_leaves_what_the_one_before_it_saved(done):
    assert begin_attempt(done.directory, 6, None, 2, "i").number == 3
    assert done.audit().problems == []


def test_a_stage_that_its_kl_budget_ended_may_have_left_episodes_that_waited_and_any_other_end_is_told(done):
    done.path(6, 2).unlink()
    record = json.loads((done.directory / "stage.json").read_text())
    (done.directory / "stage.json").write_text(json.dumps(record | {"values": {"updates": 5}, "files": {}}))
    data = saved_data(5, 2, waiting=2)
    done.write_trained(5, waiting=[20, 21], ledger=data["ledger"], stopped_by="the KL budget")
    assert done.audit().problems == ["metrics.jsonl has a line of update 6, which the stage has not."]
    rewrite(done.directory / "metrics.jsonl", lambda text: "".join(text.splitlines(True)[:5]))
    assert done.audit().problems == []
    done.write_trained(5, waiting=[20, 21], ledger=data["ledger"], stopped_by="")
    assert done.audit().problems == [
        f"{TRAINED}: training ended after 5 of 6 updates, and nothing is said to have ended it."
    ]


def test_a_finished_stage_whose_learner_left_nothing_is_told_and_why_that_can_be(done):
    (done.directory / TRAINED).unlink()
    missing = (
        f"{TRAINED} is missing: what the learner itself recorded as trained cannot be compared with the episodes (a "
        "release that kept no such file finished the stage, or the file was removed)."
    )
    assert done.audit().problems == [missing, f"{TRAINED} is not as it was when the stage was finished."]
    done.forget_hashes()
    assert done.audit().problems == [missing]


def test_what_the_learner_left_may_not_have_changed_since_and_must_be_readable(done):
    path = done.directory / TRAINED
    rewrite(path, lambda text: text.replace("}", " }", 1))
    assert done.audit().problems == [f"{TRAINED} is not as it was when the stage was finished."]
    done.forget_hashes()
    rewrite(path, lambda text: text.replace('"trained"', '"drained"'))
    assert done.audit().problems == [f"{path} cannot be read as what a stage's last checkpoint says."]


def test_of_an_unfinished_stage_the_optimisers_of_its_newest_checkpoint_must_have_taken_the_steps(under_way):
    path = under_way.directory / "checkpoints" / "step-00000004-1"
    rewrite(path / "data.json", lambda text: text.replace('"value": 24', '"value": 23'))
    under_way.write_manifest(path)
    assert under_way.audit().problems == [
        f"step-00000004-1: {STEPS} value network has taken 23 steps, but 4 updates are 24."
    ]


def test_an_episode_that_waits_in_a_checkpoint_must_be_fit_for_its_update(under_way):
    path = under_way.directory / "checkpoints" / "step-00000004-1"
    write(path / "episodes.parquet", [episode(16, 1, (1, 3))])
    under_way.write_manifest(path)
    assert under_way.audit().problems == [
        "step-00000004-1/episodes.parquet: slot 16 has tokens of weights 1.3, which were rolled back.",
        "step-00000004-1/episodes.parquet: slot 16 was generated in attempt 1, which was rolled back.",
    ]


def test_a_checkpoint_of_an_attempt_that_was_rolled_back_is_told(under_way):
    under_way.write_checkpoint(5, attempt=0)
    assert "step-00000005-1: it is of attempt 0 with 5 updates, which was rolled back." in under_way.audit().problems


@pytest.mark.parametrize("damage", ["manifest", "cut short", "changed", "weights"])
def test_a_checkpoint_that_is_not_complete_is_none(under_way, damage):
    path = under_way.write_checkpoint(5, attempt=2, waiting=0)
    assert under_way.audit().updates == 5
    if damage == "manifest":
        (path / "manifest.json").unlink()
    elif damage == "weights":
        (path / "ema.safetensors").unlink()
    else:
        text = (path / "data.json").read_text()
        (path / "data.json").write_text(text[:-1] if damage == "cut short" else text.replace("2", "3", 1))
    assert under_way.audit().updates == 4


def test_in_a_copy_without_weights_a_checkpoint_counts(under_way):
    (under_way.directory / "checkpoints" / "step-00000004-1" / "ema.safetensors").unlink()
    assert under_way.audit().updates == 0
    [found] = audit_run(under_way.run, with_weights=False)
    assert (found.updates, found.problems) == (4, [])


def test_attempts_that_do_not_fit_together_or_are_not_recorded_are_told(done):
    (done.directory / "attempts" / "attempt-000000.json").unlink()
    assert done.audit().problems == ["round-01/ppo: Attempt 2 began from attempt 0, of which there is no record."]
    shutil.rmtree(done.directory / "attempts")
    [problem] = done.audit().problems
    assert problem.startswith("round-01/ppo has no record of its attempts: who trained which update cannot be told")


def test_settings_come_from_the_stage_itself_or_else_from_the_recipe(under_way):
    (under_way.directory / "stage.started.json").unlink()
    with pytest.raises(UsageProblem, match=r"neither its stage record nor recipe\.yaml says what it was to do"):
        under_way.audit()
    (under_way.run / "recipe.yaml").write_text(json.dumps(READS))
    assert under_way.audit().problems == []


def test_a_run_without_ppo_has_nothing_to_audit(tmp_path):
    with pytest.raises(RunProblem, match="has no PPO stage yet: there is nothing to audit"):
        audit_run(tmp_path)


# the command ------------------------------------------------------------------------------------------------------


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["audit", *arguments])
    return result.exit_code, result.output


def test_the_command_prints_the_table_and_the_verdict(done):
    code, said = call(str(done.run))
    assert code == 0
    heading = next(line for line in said.splitlines() if "attempt" in line)
    columns = ["attempt", "updates", "admitted", "generated", "regenerated", "discarded", "trained", "rolled back"]
    assert [heading.index(name) for name in columns] == sorted(heading.index(name) for name in columns)
    assert "round-01/ppo: accepted: 24 slots" in said


def test_the_command_tells_what_is_wrong_and_ends_with_1(under_way):
    under_way.change(3, 0, drop)
    code, said = call(str(under_way.run))
    assert code == 1
    assert "- update-000003-attempt-0.parquet: slot 9 is missing." in said
    assert "round-01/ppo is not finished: 4 of 6 updates are in its newest checkpoint, 1 more" in said
    assert "round-01/ppo: not accepted: 1 thing is not as it must be."


def test_the_command_answers_in_json(done):
    code, said = call(str(done.run), "--json")
    answer = json.loads(said)
    assert (code, answer["accepted"], answer["stages"][0]["attempts"][0]["trained"]) == (0, True, 12)
    done.change(5, 2, double)
    code, said = call(str(done.run), "--json")
    answer = json.loads(said)
    assert (code, answer["accepted"], answer["stages"][0]["accepted"]) == (1, False, False)
    assert answer["stages"][0]["problems"] == [f"{FILE}: slot 17 is there 2 times."]


def test_no_run_is_a_mistake_of_whoever_asks(tmp_path):
    code, said = call(str(tmp_path / "nowhere"))
    assert code == 2
    assert "There is no run in" in said


def test_the_audit_loads_neither_torch_nor_ray():
    code = "import sys, evaluation.audit; print(*({'torch', 'ray'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
