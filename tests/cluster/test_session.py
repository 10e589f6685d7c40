"""The local Ray session of a command."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray

from cluster.session import session

CALL = "import sys; from ray._raylet import GcsClient; print(GcsClient(sys.argv[1]).cluster_id.hex())"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the port by which a session's head node is reached."""
    with session(None, cpus=1, object_store_mib=80):
        yield ray.get_runtime_context().gcs_address


def called(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another process that asks the session for its name."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return subprocess.run(
        [sys.executable, "-c", CALL, address], env=known | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "stranger",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["no token", "a wrong one"],
)
def test_a_stranger_is_refused(address: str, stranger: dict[str, str]) -> None:
    answer = called(address, **stranger)
    assert answer.returncode != 0
    assert "InvalidAuthToken" in answer.stderr, answer.stderr[-2000:]


@pytest.mark.slow
def test_its_own_processes_are_taken(address: str) -> None:
    own = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    answer = called(address, **own)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert int(answer.stdout, 16) > 0
    assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote(), timeout=60) == "token"
