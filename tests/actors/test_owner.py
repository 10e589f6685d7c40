"""Processes of an engine end with the actor or replica that they belong to, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from actors.owner import OWNER_VARIABLE

ROOT = Path(__file__).parents[2]

ENGINE = "import time; from actors.owner import end_with_owner; end_with_owner(); print('up', flush=True); time.sleep(60)"


def begin(owner: int | None) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != OWNER_VARIABLE}
    environment |= {} if owner is None else {OWNER_VARIABLE: str(owner)}
    process = subprocess.Popen([sys.executable, "-c", ENGINE], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_a_process_whose_owner_is_killed_ends_and_one_without_an_owner_does_not():
    owner = begin(None)
    owned, free = begin(owner.pid), begin(None)
    try:
        assert owned.poll() is None
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
        assert owned.wait(20) == 1
        time.sleep(1.5)
        assert free.poll() is None
    finally:
        for process in (owner, owned, free):
            process.kill()
            process.wait(10)
