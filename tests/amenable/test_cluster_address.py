"""Where a cluster is said to be, who answers there, and that nobody is waited for without an end."""

import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from cluster.address import Place, check_cluster, cluster_place
from corpus.problems import RunProblem, UsageProblem


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("10.0.0.7:6379", Place("10.0.0.7", 6379)),
        ("head.cluster:6380", Place("head.cluster", 6380)),
        ("[::1]:6379", Place("::1", 6379)),
        ("ray://head:10002", Place("head", 10002)),
        ("ray://head", Place("head", 10001)),
        ("auto", None),
    ],
)
def test_an_address_says_host_and_port(address, place):
    assert cluster_place(address) == place


@pytest.mark.parametrize("address", ["garbage", "local", "http://a:1", "a:b", "a:0", "a:99999", "a:1/x", "u@a b:1", ""])
def test_what_is_no_address_is_a_usage_problem(address):
    with pytest.raises(UsageProblem, match=r"^Command line: .* is no address of a Ray cluster; give HOST:PORT"):
        cluster_place(address)


def test_nobody_at_the_port_is_told_and_somebody_is_found():
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{port.getsockname()[1]}"
        with pytest.raises(RunProblem, match=rf"connect to the Ray cluster at {address} \(.*refused\): is it running"):
            check_cluster(address)
        port.listen()
        check_cluster(address)
    with pytest.raises(RunProblem, match=r"connect to the Ray cluster at nowhere\.invalid:6379"):
        check_cluster("nowhere.invalid:6379")
    check_cluster("auto")


@pytest.fixture
def silent(monkeypatch):
    """Ray that never gets an answer, behind a port that somebody listens at."""
    from cluster import session

    ended = threading.Event()
    monkeypatch.setattr(session, "check_cluster", lambda address: None)
    monkeypatch.setattr(session.ray, "init", lambda **_: ended.wait(30))
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    yield session
    ended.set()


def test_a_port_that_is_no_clusters_is_given_up_in_time(silent, monkeypatch):
    monkeypatch.setattr(silent, "CONNECT_DEADLINE_S", 0.5)
    began = time.monotonic()
    with (
        pytest.raises(RunProblem, match=r"The Ray cluster at 10\.0\.0\.7:22 did not take this command in within"),
        silent.session("10.0.0.7:22", cpus=1),
    ):
        pass
    assert time.monotonic() - began < 10


def test_a_stop_that_is_asked_for_ends_the_wait(silent):
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop), silent.session("10.0.0.7:6379", cpus=1, meanwhile=stop):
        pass


def test_what_ray_says_is_told_in_one_line(silent, monkeypatch):
    def refuse(**_):
        raise ConnectionError("Version mismatch:\n  Ray 1\n  Ray 2")

    monkeypatch.setattr(silent.ray, "init", refuse)
    with (
        pytest.raises(RunProblem, match=r"cluster at 10\.0\.0\.7:6379: Version mismatch: Ray 1 Ray 2$"),
        silent.session("10.0.0.7:6379", cpus=1),
    ):
        pass


def test_a_local_session_is_its_own_whatever_cluster_this_machine_has(silent, monkeypatch):
    """Without an address Ray would take the cluster that it finds here, or the one of RAY_ADDRESS."""
    given = {}
    monkeypatch.setattr(silent.ray, "init", lambda **options: given.update(options))
    with silent.session(None, cpus=3):
        pass
    assert (given["address"], given["num_cpus"]) == ("local", 3)


def test_what_is_started_for_a_run_writes_log_lines_of_it(silent, monkeypatch):
    """Here by this process's environment, in a cluster by Ray's, and not twice where a job has it already."""
    given = []
    monkeypatch.setattr(silent.ray, "init", lambda **options: given.append((options, dict(os.environ))))
    monkeypatch.setenv("AMENABLE_LOG", "json")
    monkeypatch.setenv("AMENABLE_RUN", "")
    with silent.session(None, cpus=1, run="x"):
        pass
    with silent.session("10.0.0.7:6379", cpus=1, run="x"):
        pass
    job = {"runtime_env": {"env_vars": {"AMENABLE_LOG": "json"}}, "metadata": {"job_submission_id": "a"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with silent.session("10.0.0.7:6379", cpus=1, run="x"):
        pass
    assert (given[0][1]["AMENABLE_RUN"], given[0][1]["AMENABLE_LOG"]) == ("x", "json")
    assert "runtime_env" not in given[0][0]
    assert given[1][0]["runtime_env"] == {"env_vars": {"AMENABLE_RUN": "x", "AMENABLE_LOG": "json"}}
    assert given[2][0]["runtime_env"] == {"env_vars": {"AMENABLE_RUN": "x"}}


def slow_start(tries: list[subprocess.Popen], succeeds_at: int, says: str):
    """A ray.init whose processes are not there in time, before try `succeeds_at`."""

    def init(**_):
        tries.append(subprocess.Popen(["sleep", "60"]))
        if len(tries) < succeeds_at:
            raise Exception(f"The current node {says}.")  # as Ray does

    return init


def test_a_local_session_that_is_slow_to_start_is_tried_again_and_what_was_begun_is_ended(silent, monkeypatch):
    tries = []
    monkeypatch.setattr(silent.ray, "init", slow_start(tries, 2, "timed out during startup"))
    with silent.session(None, cpus=1):
        first, second = tries
        assert first.wait(10) == -signal.SIGKILL
        assert second.poll() is None
    second.kill()


@pytest.mark.parametrize(("says", "count"), [("timed out during startup", 3), ("has no room", 1)])
def test_a_local_session_that_does_not_start_ends_in_a_sentence(silent, monkeypatch, says, count):
    tries = []
    monkeypatch.setattr(silent.ray, "init", slow_start(tries, 9, says))
    with pytest.raises(RunProblem, match=f"local Ray session: The current node {says}"), silent.session(None, cpus=1):
        pass
    assert len(tries) == count
    tries[-1].kill()
