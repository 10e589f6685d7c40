"""An end for an engine's processes whose owner, an actor or a replica, has died: one that is killed cannot tell them.

vLLM starts these processes and imports a module of ours in them, which calls `end_with_owner`.
"""

import logging
import os
import threading
import time
from contextlib import suppress

import psutil

OWNER_VARIABLE = "AMENABLE_ENGINE_OWNER_PID"
"""Environment variable: the process whose end ends the engine. Whoever makes the engine sets it."""

WATCH_S = 1.0
"""Seconds between two looks at the owner."""

log = logging.getLogger(__name__)


def end_with_owner() -> None:
    """Have this process end when the owner does. Does nothing in the owner itself, and where none is named."""
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    if owner not in (0, os.getpid()):
        threading.Thread(target=_watch, args=(owner,), name="watch owner", daemon=True).start()


def _watch(owner: int) -> None:
    """End this process, and those between the owner and it such as an engine's loop, once the owner is gone."""
    above = psutil.Process().parents()
    at = next((number for number, each in enumerate(above) if each.pid == owner), None)
    if at is not None:
        with suppress(psutil.NoSuchProcess):  # it may go between two questions
            while above[at].is_running() and above[at].status() != psutil.STATUS_ZOMBIE:
                time.sleep(WATCH_S)
    log.warning("the owner of this engine has ended; so does the engine")
    for between in above[: at or 0]:
        with suppress(psutil.NoSuchProcess):
            between.kill()
    os._exit(1)
