"""Submitting a run: what Ray is asked, what is refused before anything is sent, and how commands about jobs end."""

import json
import socket
import subprocess

import pytest
import requests
from typer.testing import CliRunner

import amenable.run_history as run_history
import cluster.job_server as job_server
from amenable.cli import app
from cluster.jobs import STOP_WAIT, Asked, Labels
from tests.amenable.stand_in_jobs import StandInJobs

CANARY = "zq7-canary-4b1f-secret"


@pytest.fixture
def cluster(monkeypatch, tmp_path) -> StandInJobs:
    """A cluster that answers, and a project with a recipe, in which the command is."""
    stand_in = StandInJobs()
    monkeypatch.setattr(job_server, "_client", lambda url: stand_in)
    monkeypatch.setattr(job_server, "LOOK_S", 0.01)
    monkeypatch.setattr(job_server, "LAST_LINES_S", 0.1)
    monkeypatch.setattr(run_history, "RECORD_S", 0.1)  # there is no such store
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "AMENABLE_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AMENABLE_OWNER", "ann")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text("name: base\nseed: 1\n")
    (tmp_path / "recipes" / "x.yaml").write_text("extends: base.yaml\nname: x\n")
    monkeypatch.chdir(tmp_path)
    return stand_in


def amenable(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def submit(*arguments: str):
    return amenable("submit", "recipes/x.yaml", "--storage", "s3://bucket/runs", *arguments)


def submitted(*arguments: str) -> dict:
    ended = submit("--no-wait", "--json", *arguments)
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


def test_a_job_is_asked_for_with_its_run_its_storage_its_grace_and_what_travels(cluster, tmp_path):
    found = submitted("seed=7", "--grace", "90", "--env", "HF_TOKEN", "--driver-cpus", "1", "--driver-memory", "2")
    (request,) = cluster.requests
    run = found["run"]
    assert run.startswith("ann/x-")
    assert found["submission_id"] == request["submission_id"] == f"{run.replace('/', '.')}.1"
    assert found["run_directory"] == f"s3://bucket/runs/{run}"
    assert request["entrypoint"] == (
        f"exec python -m amenable run recipes/x.yaml seed=7 --run s3://bucket/runs/{run} --env HF_TOKEN"
    )
    assert request["runtime_env"]["working_dir"] == str(tmp_path)
    assert "runs/" in request["runtime_env"]["excludes"]
    assert request["runtime_env"]["env_vars"][STOP_WAIT] == "90"
    assert (request["entrypoint_num_cpus"], request["entrypoint_memory"]) == (1.0, 2 << 30)
    assert all(isinstance(text, str) for text in request["metadata"].values())
    labels = Labels.read(request["metadata"])
    assert labels is not None
    assert (labels.run, labels.attempt, labels.owner, labels.git) == (run, 1, "ann", "unknown")
    assert len(labels.recipe_hash) == 64


def test_the_default_grace_is_that_of_the_learners_and_a_margin(cluster):
    submitted("learners.stop_grace_s=100")
    assert cluster.requests[0]["runtime_env"]["env_vars"][STOP_WAIT] == "130"


def test_what_travels_is_marked_with_its_commit_and_as_dirty_where_it_is(cluster, tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = submitted()["git"]
    assert len(clean) == 40
    (tmp_path / "new.py").write_text("")
    assert submitted("seed=2")["git"] == f"{clean}-dirty"


def test_a_resubmission_goes_on_with_the_run_a_fresh_one_begins_another_and_is_then_gone_on_with(cluster):
    first = submitted()
    cluster.becomes(first["submission_id"], "FAILED", 1)
    second = submitted()
    assert (second["run"], second["attempt"]) == (first["run"], 2)
    assert second["run_directory"] == first["run_directory"]
    cluster.becomes(second["submission_id"], "STOPPED")
    fresh = submitted("--fresh")
    assert fresh["run"] != first["run"]
    assert (fresh["attempt"], fresh["run_directory"]) == (1, f"s3://bucket/runs/{fresh['run']}")
    cluster.becomes(fresh["submission_id"], "FAILED", 1)
    again = submitted()
    assert (again["run"], again["attempt"]) == (fresh["run"], 2)


@pytest.mark.parametrize(
    ("plain", "others"),
    [
        ("/mnt/runs", ("/mnt/runs/", "/mnt//runs", "//mnt/runs", "/mnt/./runs", "/mnt/x/../runs/")),
        ("s3://bucket/runs", ("s3://bucket/runs/", "s3://bucket/runs//")),
        ("s3://bucket/runs?region=x", ("s3://bucket/runs/?region=x",)),
    ],
)
def test_one_place_is_one_run_however_it_is_written(cluster, plain, others):
    def planned(*words: str) -> tuple[str, str]:
        ended = amenable("submit", "recipes/x.yaml", *words, "--dry-run", "--json")
        assert ended.exit_code == 0, ended.output
        answer = json.loads(ended.stdout)
        return answer["run"], answer["run_directory"]

    below, here = planned("--storage", plain), planned(f"run_directory={plain}")
    assert here[1] == plain
    for other in others:
        assert planned("--storage", other) == below
        assert planned(f"run_directory={other}") == here
    for another in (plain.replace("runs", "runs2"), plain.replace("runs", "Runs")):
        assert planned("--storage", another)[0] != below[0]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_live_job_refuses_a_second_of_its_run_and_of_no_other(cluster, state):
    first = submitted()
    cluster.becomes(first["submission_id"], state)
    ended = submit("--no-wait")
    assert ended.exit_code == 2
    assert f"{first['run']} is {state.lower()} already, as {first['submission_id']}" in ended.stderr
    assert len(cluster.requests) == 1
    assert submitted("seed=9")["run"] != first["run"]
    assert submitted("--owner", "bob")["run"].startswith("bob/x-")


def test_of_two_who_submit_at_once_the_second_is_told(cluster):
    taken = "Request failed with status code 500: Job with submission_id ann.x.1 already exists. Use a different one."
    cluster.refuses = RuntimeError(taken)
    ended = submit("--no-wait")
    assert ended.exit_code == 2
    assert "was submitted by somebody else at this moment" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["recipes/x.yaml"], "run_directory runs/x is a relative path"),
        (["recipes/x.yaml", "--storage", "runs"], "--storage runs is a relative path"),
        (["recipes/x.yaml", "--storage", "~/runs"], "--storage ~/runs is a relative path"),
        (["recipes/x.yaml", "run_directory=/mnt/x", "--fresh"], "--fresh begins a run in a directory of its own"),
        (["recipes/y.yaml", "--storage", "/mnt"], "There is no recipe file 'recipes/y.yaml'"),
        (["recipes/x.yaml", "--storage", "/mnt", "--exclude", "x.yaml"], "recipes/x.yaml would be left out of what is"),
        (["recipes/x.yaml", "--storage", "/mnt", "--exclude", "base.yaml"], "recipes/base.yaml would be left out"),
        (["recipes/x.yaml", "--storage", "/mnt", "--working-dir", "recipes/.."], ""),
        (["recipes/x.yaml", "--storage", "/mnt", "--owner", "A B"], "'A B' cannot own a run"),
        (["recipes/x.yaml", "--storage", "/mnt", "--driver-resource", "head"], "should be NAME=AMOUNT"),
        (["recipes/x.yaml", "--storage", "/mnt", "--address", "ray://head"], "is no address of a Ray dashboard"),
        (["recipes/x.yaml", "--storage", "s3://key:word@bucket/x"], "the name of a bucket should come first"),
        (["recipes/x.yaml", "--storage", "/mnt", f"reward.url=http://h/?token={CANARY}"], "dashboard"),
        (["recipes/x.yaml", "--storage", "/mnt", "--env", f"HF_TOKEN={CANARY}"], "--env HF_TOKEN=… gives a value"),
        (["recipes/x.yaml", "--storage", "/mnt", f"model.base=/models/{CANARY}"], "value of WANDB_API_KEY in it"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_sent_and_no_secret_is_repeated(cluster, monkeypatch, arguments, says):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    ended = amenable("submit", *arguments, "--no-wait")
    assert ended.exit_code == (2 if says else 0), ended.output
    assert says in ended.stderr
    assert CANARY not in ended.output
    assert len(cluster.requests) == (0 if says else 1)


def test_a_secret_in_the_recipe_file_itself_is_refused(cluster, tmp_path):
    with (tmp_path / "recipes" / "x.yaml").open("a") as file:
        file.write(f"reward: {{kind: http, url: 'http://user:{CANARY}@host/score'}}\n")
    ended = submit("--no-wait")
    assert ended.exit_code == 2
    assert CANARY not in ended.output
    assert not cluster.requests


def test_a_canary_in_the_environment_is_nowhere_in_what_ray_is_asked(cluster, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    (tmp_path / ".env").write_text(f"HF_TOKEN={CANARY}")
    ended = submit("--env", "HF_TOKEN", "--dry-run", "--json")
    assert ended.exit_code == 0, ended.output
    submitted("--env", "HF_TOKEN")
    assert CANARY not in ended.output + json.dumps(cluster.requests)
    assert "HF_TOKEN" in cluster.requests[0]["entrypoint"]


def test_a_directory_that_is_too_large_is_told_before_the_upload(cluster, monkeypatch, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x" * 5000)
    monkeypatch.setattr("amenable.submit.upload_limit_bytes", lambda: 4000)
    ended = submit("--no-wait")
    assert ended.exit_code == 2
    assert "The largest: model.bin" in ended.stderr
    assert submit("--no-wait", "--exclude", "*.bin").exit_code == 0


def test_a_dry_run_tells_all_and_submits_nothing(cluster):
    ended = submit("--dry-run")
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.splitlines()[-1] == "Nothing was submitted."
    assert "exec python -m amenable run recipes/x.yaml" in ended.stdout
    answer = json.loads(submit("--dry-run", "--json").stdout)
    assert answer["package"]["files"] == 2
    assert "seed: 1" in answer["recipe"]
    assert not cluster.requests


def test_a_packaged_recipe_is_submitted_by_its_name(cluster):
    ended = amenable("submit", "demo", "--storage", "/mnt/runs", "--no-wait")
    assert ended.exit_code == 0, ended.output
    assert cluster.requests[0]["entrypoint"].startswith("exec python -m amenable run demo --run /mnt/runs/ann/demo-")


@pytest.mark.parametrize(
    ("ends_as", "code", "says"),
    [
        (("SUCCEEDED", 0), 0, "is done; its report is in s3://bucket/runs/ann/x-"),
        (("FAILED", 1), 1, "failed (exit code 1); amenable resume ann/x-"),
        (("FAILED", 2), 2, "was given something that is wrong"),
        (("FAILED", 130), 3, "was stopped; amenable resume ann/x-"),
        (("STOPPED", None), 3, "was stopped; amenable resume ann/x-"),
        (("FAILED", None), 1, "failed ("),
    ],
)
def test_who_waits_sees_every_line_once_and_ends_as_the_job_did(cluster, monkeypatch, ends_as, code, says):
    cluster.ends_as, cluster.breaks = ends_as, 2
    prepared = json.loads(submit("--dry-run", "--json").stdout)
    cluster.lines[prepared["submission_id"]] = ["one\n", "two\nth", "ree\n", "four\n"]
    ended = submit()
    assert ended.exit_code == code, ended.output
    assert "one\ntwo\nthree\nfour\n" in ended.stdout
    assert ended.stdout.count("two") == 1
    assert says in ended.stderr


def test_json_of_a_job_that_was_waited_for_is_one_answer_and_its_lines_are_elsewhere(cluster):
    prepared = json.loads(submit("--dry-run", "--json").stdout)
    cluster.lines[prepared["submission_id"]] = ["a line of the job\n"]
    ended = submit("--json")
    assert json.loads(ended.stdout)["state"] == "SUCCEEDED"
    assert "a line of the job" in ended.stderr


def test_a_reader_who_has_gone_ends_the_wait():
    cluster = StandInJobs()
    labels = Labels("ann/x-0123456789", 1, "ann", "h", "g", "/mnt", Asked("x.yaml"))
    cluster.add("j", labels.metadata(), {}, "RUNNING")
    cluster.lines["j"] = ["one\n"]
    server = job_server.JobServer("http://head:8265", cluster)

    def gone(text: str) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        server.follow("j", gone)


def test_nobody_at_the_address_is_unreachable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ended = amenable("list", "--address", "http://127.0.0.1:1", "--json")
    assert ended.exit_code == 4
    answer = json.loads(ended.stdout)
    assert answer["kind"] == "unreachable"
    assert answer["problem"].startswith("The Ray cluster's dashboard at http://127.0.0.1:1 does not answer (")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (requests.exceptions.ReadTimeout("timed out"), 4, "does not answer (timed out)"),
        (
            RuntimeError("Request failed with status code 500: Traceback\n  x\nOSError: disk full."),
            1,
            "OSError: disk full",
        ),
    ],
)
def test_what_the_server_says_is_told(cluster, monkeypatch, error, code, says):
    def refuse():
        raise error

    cluster.list_jobs = refuse
    ended = amenable("list")
    assert ended.exit_code == code
    assert says in ended.stderr


def test_a_token_that_is_refused_is_told(cluster):
    from ray.exceptions import AuthenticationError

    def refuse():
        raise AuthenticationError("Authentication failed: Forbidden: Invalid authentication token\n\nmore")

    cluster.list_jobs = refuse
    ended = amenable("list")
    assert ended.exit_code == 2
    assert "does not take this token (Authentication failed: Forbidden: Invalid authentication token)" in ended.stderr


@pytest.mark.parametrize(
    "address", ["auto", "head:6379", "ray://head:10001", "ftp://head", "http://u:p@head", "http://"]
)
def test_what_is_no_dashboard_is_told_without_its_password(cluster, address):
    ended = amenable("list", "--address", address)
    assert ended.exit_code == 2
    assert "is no address of a Ray dashboard; give http://HOST:8265" in ended.stderr
    assert "u:p" not in ended.stderr


def test_where_the_dashboard_is(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert job_server.dashboard_url(None) == "http://127.0.0.1:8265"
    assert job_server.dashboard_url("head:8265") == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example/")
    assert job_server.dashboard_url(None) == "https://ray.example"
    assert job_server.dashboard_url("http://other:1") == "http://other:1"


def test_a_server_that_takes_the_question_and_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(job_server, "ANSWER_S", 0.3)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")  # what was given is asked
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(job_server.Unreachable, match=r"does not answer \(.*timed out"):
            job_server.JobServer(f"http://127.0.0.1:{silent.getsockname()[1]}")
