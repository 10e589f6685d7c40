"""A lock between processes: with a real one that holds it."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corpus.file_lock import file_lock
from corpus.problems import UsageProblem

HOLDER = """
import sys, time
from pathlib import Path
from corpus.file_lock import file_lock
with file_lock(Path(sys.argv[1]), 1.0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_waits_in_vain_is_told_who_holds_the_lock_and_a_killed_holder_frees_it(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(UsageProblem) as found, file_lock(tmp_path / "lock", deadline_s=0.3):
        pass
    assert 0.3 <= time.monotonic() - began < 5
    assert f"was locked for 0.3 s by process {holder.pid} on {os.uname().nodename} since 20" in str(found.value)
    assert found.value.code == "storage/locked"
    holder.kill()
    holder.wait()
    with file_lock(tmp_path / "lock", deadline_s=5.0):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""


def test_it_is_waited_for_until_the_deadline(tmp_path):
    with file_lock(tmp_path / "lock", 1.0):
        pass
    with file_lock(tmp_path / "lock", deadline_s=0.0):
        pass


def test_a_disk_that_takes_nothing_more_keeps_nobody_from_the_lock(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    taken = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # every write is refused, as on a full disk
    try:
        with pytest.raises(OSError, match="too large"), open(tmp_path / "other", "wb", buffering=0) as other:
            other.write(b"a byte")
        with file_lock(tmp_path / "lock", 1.0):
            taken.append("held")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert taken == ["held"]
    assert (tmp_path / "lock").read_text() == ""
