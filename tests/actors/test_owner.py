"""Processes of an engine end with the actor or replica that they belong to, however it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from actors.owner import OWNER_VARIABLE

ROOT = Path(__file__).parents[2]

PART = "import time; from actors.owner import end_with_owner; end_with_owner(); print('up', flush=True); time.sleep(60)"
LOOP = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PART!r}])"
OWNER = f"""
import os, subprocess, sys
names = {{sys.argv[1]: str(os.getpid())}} if len(sys.argv) > 1 else {{}}
subprocess.run([sys.executable, "-c", {LOOP!r}], env=os.environ | names)
"""


def begin(*names: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """An owner and the processes below it: an engine's loop, and a part of its model."""
    environment = {name: value for name, value in os.environ.items() if name != OWNER_VARIABLE}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *names], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    return owner, psutil.Process(owner.pid).children(recursive=True)


def test_a_killed_owner_takes_its_engine_with_it_and_nothing_else():
    owner, engine = begin(OWNER_VARIABLE)
    other, unowned = begin()
    try:
        assert len(engine) == len(unowned) == 2
        for each in (owner, other):
            each.kill()
            each.wait(10)
        assert psutil.wait_procs(engine, timeout=20)[1] == []
        time.sleep(1.5)
        assert all(each.is_running() for each in unowned)  # the check would see who lives on
    finally:
        for each in (*engine, *unowned):
            if each.is_running():
                each.kill()
