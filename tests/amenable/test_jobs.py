"""status, list, logs, stop and resume: which run is meant, what is told, and what is refused."""

import json

import pytest

from cluster.jobs import Asked, Job, Labels, find_run
from corpus.problems import UsageProblem
from tests.amenable.stand_in_jobs import StandInJobs
from tests.amenable.test_submit import amenable, cluster, submitted  # noqa: F401 - the fixture is used by its name


def job(run: str, attempt: int = 1, state: str = "RUNNING") -> Job:
    labels = Labels(run, attempt, run.partition("/")[0], "h", "g", "/mnt", Asked("x.yaml"))
    return Job(f"{run.replace('/', '.')}.{attempt}", state, labels, started=float(attempt))


JOBS = [job("ann/x-0000000001"), job("ann/x-0000000001", 2), job("bob/x-0000000002"), job("ann/y-0000000003")]


@pytest.mark.parametrize(
    ("wanted", "owner", "found"),
    [
        ("ann/x-0000000001", "bob", "ann.x-0000000001.2"),
        ("ann.x-0000000001.1", "ann", "ann.x-0000000001.1"),
        ("x", "ann", "ann.x-0000000001.2"),
        ("x", "bob", "bob.x-0000000002.1"),
        ("y", "bob", "ann.y-0000000003.1"),
        ("0000000002", "ann", "bob.x-0000000002.1"),
        ("x-0000000002", "carl", "bob.x-0000000002.1"),
    ],
)
def test_a_run_is_found_by_its_id_and_by_what_is_plain(wanted, owner, found):
    assert find_run(JOBS, wanted, owner).submission_id == found


def test_a_run_that_is_not_there_or_could_be_several_is_told():
    with pytest.raises(UsageProblem, match=r"'x' could be ann/x-0000000001 or bob/x-0000000002"):
        find_run(JOBS, "x", "carl")
    with pytest.raises(UsageProblem, match=r"knows no run 'z'; its runs are: ann/x-0000000001, ann/y"):
        find_run(JOBS, "z", "ann")
    with pytest.raises(UsageProblem, match=r"its runs are: none\.$"):
        find_run([], "z", "ann")


def test_status_tells_the_newest_attempt_and_those_before(cluster: StandInJobs):  # noqa: F811
    first = submitted()
    cluster.becomes(first["submission_id"], "FAILED", 1)
    submitted()
    answer = json.loads(amenable("status", "x", "--json").stdout)
    assert (answer["attempt"], answer["state"]) == (2, "RUNNING")
    assert answer["other_attempts"] == [{"attempt": 1, "state": "FAILED"}]
    said = amenable("status", first["run"]).stdout
    assert f"{first['run']}, attempt 2: running for " in said
    assert "Attempt 1: failed" in said
    cluster.becomes(answer["submission_id"], "FAILED", 1)
    cluster.kept[answer["submission_id"]].message = "Job failed, last lines:\nThe loss is not finite."
    assert amenable("status", "x").stdout.splitlines()[-1] == "The loss is not finite."


def test_runs_are_listed_for_oneself_and_for_everybody(cluster: StandInJobs):  # noqa: F811
    assert "no runs of yours" in amenable("list").stdout
    mine, other = submitted(), submitted("--owner", "bob")
    assert [line.split()[0] for line in amenable("list").stdout.splitlines()] == [mine["run"]]
    answer = json.loads(amenable("list", "--all", "--json").stdout)
    assert [each["run"] for each in answer["runs"]] == [mine["run"], other["run"]]


def test_logs_are_printed_and_followed_to_the_end_of_the_job(cluster: StandInJobs):  # noqa: F811
    found = submitted()
    cluster.lines[found["submission_id"]] = ["one\n", "two\n"]
    ended = amenable("logs", "x")
    assert (ended.exit_code, ended.stdout) == (0, "one\ntwo\n")
    cluster.ends_as = ("STOPPED", None)
    ended = amenable("logs", "-f", "x")
    assert (ended.exit_code, ended.stdout) == (3, "one\ntwo\n")


def test_a_job_is_stopped_within_the_grace_it_was_submitted_with(cluster: StandInJobs):  # noqa: F811
    found = submitted("--grace", "40")
    cluster.lines[found["submission_id"]] = ["x\n", "Interrupted at ppo, update 2 of 4; the same command continues.\n"]
    ended = amenable("stop", "x", "--grace", "41")
    assert ended.exit_code == 2
    assert "--grace 41 is more than the 40 s that this job was submitted with" in ended.stderr
    assert not cluster.stopped
    ended = amenable("stop", "x", "--grace", "20")
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.startswith(f"{found['run']} is stopped. Its last line: Interrupted at ppo, update 2 of 4")
    assert cluster.stopped == [found["submission_id"]]
    ended = amenable("stop", "x")
    assert ended.exit_code == 2
    assert "does not run: its attempt 1 is stopped" in ended.stderr


def test_a_job_that_does_not_end_in_time_is_told(cluster: StandInJobs, monkeypatch):  # noqa: F811
    submitted("--grace", "40")
    cluster.after_stop = "RUNNING"
    ended = amenable("stop", "x", "--grace", "1")
    assert ended.exit_code == 1
    assert "has not ended within 1 s; Ray kills it 40 s after it was asked to end" in ended.stderr


def test_resume_asks_for_the_same_again(cluster: StandInJobs):  # noqa: F811
    first = submitted("seed=5", "--env", "HOME", "--grace", "77", "--driver-resource", "head=1", "--exclude", "*.txt")
    cluster.becomes(first["submission_id"], "STOPPED")
    ended = amenable("resume", "x", "--no-wait", "--json")
    assert ended.exit_code == 0, ended.output
    one, two = cluster.requests
    assert json.loads(ended.stdout)["attempt"] == 2
    for key in ("entrypoint", "runtime_env", "entrypoint_resources"):
        assert one[key] == two[key]
    assert two["entrypoint_resources"] == {"head": 1.0}


def test_resume_refuses_a_live_run_somebody_elses_and_one_whose_recipe_has_changed(cluster, tmp_path):  # noqa: F811
    first = submitted()
    live = amenable("resume", "x", "--no-wait")
    assert (live.exit_code, len(cluster.requests)) == (2, 1)
    assert "is running already" in live.stderr
    cluster.becomes(first["submission_id"], "STOPPED")
    theirs = amenable("resume", first["run"], "--owner", "bob", "--no-wait")
    assert theirs.exit_code == 2
    assert f"{first['run']} is ann's run; whoever goes on with it says --owner ann." in theirs.stderr
    (tmp_path / "recipes" / "x.yaml").write_text("extends: base.yaml\nname: x\nseed: 99\n")
    changed = amenable("resume", "x", "--no-wait")
    assert changed.exit_code == 2
    assert f"is not what {first['run']} was begun with: it would be ann/x-" in changed.stderr
    assert len(cluster.requests) == 1
