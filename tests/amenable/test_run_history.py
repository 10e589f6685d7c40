"""What the commands write into a run's audit log, and what `amenable history` makes of it."""

import json
import time
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amenable import run_history
from amenable.cli import app
from amenable.interruption import Interrupted
from amenable.run_history import can_record, record_from_here, record_own_submission, recorded_work
from cluster.jobs import Asked, Labels
from corpus.audit_log import BEGAN, ENDED, RESUMED, STOPPED, SUBMITTED, actor_here, entry_now, read
from corpus.problems import RunProblem
from serving.desired import WishOvertaken, write_wish
from tests.amenable.stand_in_jobs import StandInJobs
from tests.amenable.test_submit import amenable, cluster, submitted  # noqa: F401 - the fixture is used by its name


@pytest.fixture
def run(tmp_path) -> Path:
    directory = tmp_path / "x"
    (directory / "round-01" / "ppo").mkdir(parents=True)
    (directory / "recipe.yaml").write_text("name: x\n")
    return directory


def labels(run: Path, attempt: int = 1, by: str = "ann@laptop", at: str = "2026-03-01T08:00:00.000+00:00") -> Labels:
    return Labels("ann/x-0000000001", attempt, "ann", "h", "abc", str(run), Asked("x.yaml", ("seed=7",)), by, at)


def as_job(labels: Labels, job: str) -> dict[str, str]:
    told = {"metadata": {"job_submission_id": job, **labels.metadata()}}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(told)}


def actions(run: Path) -> list[str]:
    return [entry.action for entry in read(run)[0]]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Interrupted("ppo, update 3 of 9"), "interrupted: ppo, update 3 of 9"),
        (RunProblem("The loss is not finite.", "run/unexpected"), "failed: The loss is not finite."),
        (KeyboardInterrupt(), "stopped at once"),
        (ZeroDivisionError("by zero"), "failed: ZeroDivisionError: by zero"),
    ],
)
def test_a_run_that_begins_and_ends_is_recorded_with_its_outcome(run, error, outcome):
    with recorded_work(str(run), {"recipe": "x"}):
        assert actions(run) == [BEGAN]
    with pytest.raises(type(error)), recorded_work(str(run), {"recipe": "x"}):
        raise error
    entries, _ = read(run)
    assert [(entry.action, entry.outcome) for entry in entries] == [
        (BEGAN, "done"),
        (ENDED, "done"),
        (BEGAN, "done"),
        (ENDED, outcome),
    ]
    assert {entry.actor for entry in entries} == {actor_here()}


def test_a_job_records_its_own_submission_once_and_by_whom_it_was(run, monkeypatch):
    job = "ann.x-0000000001.1"
    for _ in range(2):
        record_own_submission(str(run), as_job(labels(run), job))
    ((entry,), _) = read(run)
    assert (entry.action, entry.actor, entry.outcome) == (SUBMITTED, "ann@laptop", f"as {job}")
    assert (entry.asked["overrides"], entry.asked["submission_id"]) == (["seed=7"], job)
    record_own_submission(str(run), as_job(labels(run, 2), "ann.x-0000000001.2"))
    assert actions(run) == [SUBMITTED, RESUMED]
    record_own_submission(str(run), {})
    record_own_submission(str(run), as_job(labels(run, 3), "somebody-elses"))
    assert actions(run) == [SUBMITTED, RESUMED]


def test_a_submission_to_a_new_head_is_recorded_too_though_its_id_is_the_one_of_the_first(run):
    """Ray forgets its jobs with its head, so that attempts are counted from one again."""
    job = "ann.x-0000000001.1"
    later = labels(run, by="eve@desk", at="2026-03-02T08:00:00.000+00:00")
    for each in (labels(run), labels(run), later, later):
        record_own_submission(str(run), as_job(each, job))
    entries, _ = read(run)
    assert [(entry.action, entry.actor, entry.asked["submitted"]) for entry in entries] == [
        (SUBMITTED, "ann@laptop", "2026-03-01T08:00:00.000+00:00"),
        (SUBMITTED, "eve@desk", "2026-03-02T08:00:00.000+00:00"),
    ]


def test_each_submission_says_when_it_was(cluster: StandInJobs):  # noqa: F811
    first = submitted()
    cluster.becomes(first["submission_id"], "STOPPED")
    cluster.kept.clear()  # as a new head
    assert submitted()["submission_id"] == first["submission_id"]
    one, other = (Labels.read(request["metadata"]) for request in cluster.requests)
    assert one is not None
    assert other is not None
    assert datetime.fromisoformat(one.at) < datetime.fromisoformat(other.at)


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(run_history, "RECORD_S", 0.05)
    monkeypatch.setattr(run_history, "add", lambda place, entry: time.sleep(1))
    told = record_from_here("s3://bucket/run?region=x", entry_now(STOPPED, {}))
    assert told == "s3://bucket/run: that the run was stopped was not written to its audit log within 0.05 s."


def test_a_place_that_is_no_run_here_is_left_alone(tmp_path):
    """It may be the mount of other machines."""
    assert not can_record(str(tmp_path / "mnt" / "x"))
    assert record_from_here(str(tmp_path / "mnt" / "x"), entry_now(STOPPED, {})) == ""
    assert not (tmp_path / "mnt").exists()


def test_stop_is_recorded_where_this_machine_sees_the_run(cluster: StandInJobs, tmp_path):  # noqa: F811
    found = json.loads(
        amenable("submit", "recipes/x.yaml", "--storage", str(tmp_path / "kept"), "--no-wait", "--json").stdout
    )
    directory = Path(found["run_directory"])
    assert not directory.exists(), "submit makes no directory"
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text("name: x\n")
    assert amenable("stop", "x").exit_code == 0
    ((entry,), _) = read(directory)
    assert (entry.action, entry.outcome, entry.actor) == (STOPPED, "stopped", actor_here())
    assert entry.asked["submission_id"] == found["submission_id"]


def test_the_wish_of_a_service_names_the_token_that_asked(run):
    write_wish(run, "policy@3", 0, "ops", "now", token_name="ops")
    write_wish(run, None, 1, "ops", "now", token_name="ops")
    with pytest.raises(WishOvertaken):
        write_wish(run, "policy@1", 0, "eve", "now")
    entries, _ = read(run)
    assert [(each.action, each.token_name, each.asked["version"]) for each in entries] == [
        ("pinned", "ops", "policy@3"),
        ("unpinned", "ops", "newest"),
        ("pinned", None, "policy@1"),
    ]
    assert entries[1].asked["before"] == "policy@3"
    assert entries[2].outcome.startswith("refused: ops has asked for the newest weights")


def test_history_tells_it_to_a_person_and_to_a_program(run):
    assert "has no audit log yet" in CliRunner().invoke(app, ["history", str(run)]).stdout
    assert CliRunner().invoke(app, ["scale", str(run), "generators=3"]).exit_code == 0
    with open(run / "audit-log.jsonl", "a") as stream:
        stream.write("{half")
    told = CliRunner().invoke(app, ["history", str(run)]).stdout.splitlines()
    assert told[0].endswith(f"scaled     {actor_here()}: done")
    assert told[1].strip() == "generators 3"
    assert told[2].startswith("1 more could not be understood")
    answer = json.loads(CliRunner().invoke(app, ["history", str(run), "--json"]).stdout)
    assert (answer["unreadable"], len(answer["entries"])) == (1, 1)
    assert answer["entries"][0]["asked"] == {"generators": 3, "before": None}
    ended = CliRunner().invoke(app, ["history", str(run / "nowhere")])
    assert (ended.exit_code, "There is no run in" in ended.output) == (2, True)
